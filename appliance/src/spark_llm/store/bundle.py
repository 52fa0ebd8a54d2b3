"""One file that carries a model to a machine without a network: a tar, compressed with zstd.

The first member, ``bundle.json``, lists every file with the hub's own hashes; then the files follow.
``spark_llm.store.unbundle`` reads it.
"""

import contextlib
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

import zstandard

from spark_llm import __version__
from spark_llm.errors import RefusedError, SparkLlmError
from spark_llm.reason import Reason
from spark_llm.store import durable
from spark_llm.store.hashing import Hasher, drop_pages
from spark_llm.store.layout import ModelFolder
from spark_llm.store.receipt import Receipt, RemoteFile
from spark_llm.store.store import Store

FORMAT = 1
INDEX = "bundle.json"
FOLDER = "files/"
_LEVEL = 1
"""Weights hardly compress; a higher level costs time and saves nothing."""


def export(
    store: Store,
    model: str,
    revision: str,
    target: Path,
    advance: Callable[[int], None] = lambda _: None,
) -> tuple[Receipt, str]:
    """Write a bundle of one verified snapshot; its receipt, and the bundle's sha256 in hex.

    The same snapshot always gives the same bytes. They are hashed as they are written: a file that another took the
    place of later would not be vouched for.

    Args:
        store: where it is.
        model: ``ORG/NAME``.
        revision: see ``Store.locate``.
        target: the file; appears only when it is complete.
        advance: called with the bytes of each block.

    Raises:
        ConfigError: no such snapshot.
        SparkLlmError: the snapshot is not as it was verified, or ``target`` cannot be written.
    """
    proof = store.receipt(model, revision)
    snapshot = ModelFolder(store.root, model).snapshot(proof.commit)
    temporary = target.with_name(f"{durable.TEMPORARY_PREFIX}{target.name}")
    try:
        with store.reading(model, "export"), temporary.open("xb") as stream:
            hashed = _Hashed(stream)
            _write(hashed, snapshot, proof, advance)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(target)
        durable.sync_folder(target.parent)
        drop_pages(target)
    except FileExistsError:
        raise RefusedError(
            f"another export to {target} is running, or was cut off",
            reason=Reason.MODEL_BUSY,
            hint=f"Remove {temporary}.",
        ) from None
    except PermissionError as error:
        _discard(temporary)
        raise RefusedError(
            f"cannot write {target}: {error.strerror}",
            reason=Reason.UNWRITABLE_DIRECTORY,
            hint="Root acts as the store's user here. Write it to /var/tmp, say, and move it.",
        ) from error
    except OSError as error:
        _discard(temporary)
        raise SparkLlmError(
            f"cannot write {target}: {error.strerror}",
            reason=Reason.NO_DISK,
            hint="Is there space, and may you write?",
        ) from error
    except BaseException:
        _discard(temporary)
        raise
    return proof, hashed.sha256.hexdigest()


def _discard(temporary: Path) -> None:
    with contextlib.suppress(OSError):  # where it cannot be made it cannot be removed
        temporary.unlink()


class _Hashed:
    """Hashes what goes into a file."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.sha256 = hashlib.sha256()

    def write(self, block: bytes) -> int:
        self.sha256.update(block)
        return self._stream.write(block)


def _write(stream: _Hashed, snapshot: Path, proof: Receipt, advance: Callable[[int], None]) -> None:
    index = {
        "format": FORMAT,
        "model": proof.model,
        "commit": proof.commit,
        "revision": proof.revision,
        "written_by": f"spark-llm {__version__}",
        "files": [file.to_json() for file in proof.files],
    }
    compressor = zstandard.ZstdCompressor(level=_LEVEL, threads=-1, write_checksum=True)
    with (
        compressor.stream_writer(stream, closefd=False) as packed,  # type: ignore[arg-type]  # writes only
        tarfile.open(fileobj=packed, mode="w|") as tar,
    ):
        text = json.dumps(index, indent=1, sort_keys=True).encode()
        tar.addfile(_member(INDEX, len(text)), io.BytesIO(text))
        for file in sorted(proof.files, key=lambda file: file.path):
            path = snapshot / file.path
            with path.open("rb") as source:
                reader = _CheckedReader(source, file, advance)
                tar.addfile(_member(FOLDER + file.path, file.size), reader)
                reader.check()
                os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _member(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.mtime = size, 0o644, 0
    return member


class _CheckedReader(io.RawIOBase):
    """A file that must turn out to be the one in the receipt: a bundle of a damaged model helps nobody."""

    def __init__(self, source: IO[bytes], file: RemoteFile, advance: Callable[[int], None]) -> None:
        self._source, self._file, self._advance = source, file, advance
        self._hasher = Hasher(file.size)

    def read(self, size: int = -1) -> bytes:
        block = self._source.read(size)
        self._hasher.update(block)
        self._advance(len(block))
        return block

    def check(self) -> None:
        if not self._file.accepts(self._hasher.digests()):
            raise SparkLlmError(
                f"{self._file.path} is damaged: nothing was exported",
                reason=Reason.MODEL_CORRUPT,
                hint="`spark-llm verify --full` and `spark-llm pull` mend it.",
            )
