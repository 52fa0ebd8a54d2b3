"""One file that carries a model to a machine without a network: a tar, compressed with zstd.

The first member, ``bundle.json``, lists every file with the hub's own hashes; then the files follow. Import trusts none
of it: names are checked before anything is written, links and devices are refused, no file may be larger than the list
says, and each is hashed while it is written. Only when all are right does the model become visible.
"""

import contextlib
import io
import json
import os
import shutil
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import zstandard

from spark_llm import __version__
from spark_llm.errors import RefusedError, SparkLlmError
from spark_llm.reason import Reason
from spark_llm.store import durable, plan, snapshots
from spark_llm.store.hashing import Digests, Hasher, drop_pages, hash_file
from spark_llm.store.layout import Incoming, ModelFolder
from spark_llm.store.receipt import Receipt, RemoteFile
from spark_llm.store.stamp import Stamp
from spark_llm.store.store import Store

FORMAT = 1
_INDEX = "bundle.json"
_FOLDER = "files/"
_LEVEL = 1
"""Weights hardly compress; a higher level costs time and saves nothing."""
_LARGEST_INDEX = 64 * 2**20
_BLOCK = 4 * 2**20


def export(
    store: Store,
    model: str,
    revision: str,
    target: Path,
    advance: Callable[[int], None] = lambda _: None,
) -> Receipt:
    """Write a bundle of one verified snapshot. The same snapshot always gives the same bytes.

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
            _write(stream, snapshot, proof, advance)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(target)
        durable.sync_folder(target.parent)
        drop_pages(target)
    except FileExistsError:
        raise _refuse(
            f"another export to {target} is running, or was cut off", f"Remove {temporary}."
        ) from None
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise SparkLlmError(
            f"cannot write {target}: {error.strerror}",
            reason=Reason.NO_DISK,
            hint="Is there space, and may you write?",
        ) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return proof


def _write(
    stream: IO[bytes], snapshot: Path, proof: Receipt, advance: Callable[[int], None]
) -> None:
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
        compressor.stream_writer(stream, closefd=False) as packed,
        tarfile.open(fileobj=packed, mode="w|") as tar,
    ):
        text = json.dumps(index, indent=1, sort_keys=True).encode()
        tar.addfile(_member(_INDEX, len(text)), io.BytesIO(text))
        for file in sorted(proof.files, key=lambda file: file.path):
            path = snapshot / file.path
            with path.open("rb") as source:
                reader = _CheckedReader(source, file, advance)
                tar.addfile(_member(_FOLDER + file.path, file.size), reader)
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


def check_sha256(source: Path, expected: str) -> None:
    """Compare the whole bundle with the checksum that export printed.

    Raises:
        SparkLlmError: it is another file, or damaged.
    """
    try:
        found = hash_file(source).sha256
    except OSError as error:
        raise SparkLlmError(
            f"cannot read {source}: {error.strerror}", reason=Reason.MODEL_MISSING
        ) from error
    if found != expected.strip().lower():
        raise SparkLlmError(
            f"{source} has sha256 {found}, not {expected}",
            reason=Reason.MODEL_CORRUPT,
            hint="Copy the bundle again.",
        )


def read_index(source: Path) -> Receipt:
    """What a bundle says it contains; nothing of it is proved yet.

    Raises:
        SparkLlmError: not a bundle, or one with names that are not safe.
    """
    with _opened(source) as tar:
        return _index(tar, source)


def import_bundle(
    root: Path, source: Path, *, reserve_bytes: int, advance: Callable[[int], None] = lambda _: None
) -> Receipt:
    """Bring the model of a bundle into the store; it becomes visible only when every file is verified.

    Args:
        root: the store.
        source: the bundle.
        reserve_bytes: disk space to leave free, in bytes.
        advance: called with the bytes of each block.

    Raises:
        RefusedError: unsafe names or members, or no disk space.
        BusyError: the model is being changed.
        SparkLlmError: not a bundle, or its content is not what its list says.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _opened(source) as tar:
            promised = _index(tar, source)
            folder = ModelFolder(root, promised.model)
            with durable.umask_of(root), folder.write_lock.hold("import"):
                return _receive(tar, folder, promised, reserve_bytes, advance)
    except PermissionError as error:
        raise snapshots.unwritable(root, error) from error
    except OSError as error:
        raise RefusedError(
            f"the import broke off: {error.strerror}",
            reason=Reason.NO_DISK,
            hint="Nothing of it is visible.",
        ) from error


def _receive(
    tar: tarfile.TarFile,
    folder: ModelFolder,
    promised: Receipt,
    reserve: int,
    advance: Callable[[int], None],
) -> Receipt:
    store = Store(folder.root)
    if store.locate(promised.model, promised.commit) is not None:
        snapshots.record(folder, promised.revision, promised.commit)
        return store.receipt(promised.model, promised.commit)
    plan.check_disk(
        promised.model,
        needed=promised.size,
        free=shutil.disk_usage(folder.root).free,
        reserve=reserve,
    )
    plan.select(promised.model, promised.files, allow_pickle=True)
    folder.path.mkdir(parents=True, exist_ok=True)
    if folder.snapshot(promised.commit).exists():
        snapshots.unpublish(folder, promised.commit)
    incoming = Incoming(
        folder.incoming(promised.commit).path.with_name(
            f"{durable.TEMPORARY_PREFIX}{promised.commit}"
        )
    )
    shutil.rmtree(incoming.path, ignore_errors=True)
    incoming.path.mkdir(parents=True)
    try:
        stamps = _extract(tar, incoming.path, promised, advance)
        final = folder.incoming(promised.commit).path
        if final.exists():
            durable.remove_tree(final)
        incoming.path.rename(final)
        proof = replace(promised, stamps=stamps, verified_at=time.time())
        snapshots.record(folder, promised.revision, promised.commit)
        snapshots.publish(folder, proof)
    finally:
        shutil.rmtree(incoming.path, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.path.joinpath("incoming").rmdir()
            folder.path.rmdir()
    return proof


def _extract(
    tar: tarfile.TarFile, folder: Path, promised: Receipt, advance: Callable[[int], None]
) -> dict[str, Stamp]:
    expected = {_FOLDER + file.path: file for file in promised.files}
    stamps: dict[str, Stamp] = {}
    with _damaged():
        while (member := tar.next()) is not None:  # iterating would give bundle.json again
            file = expected.pop(member.name, None)
            content = tar.extractfile(member) if member.isreg() and not member.issparse() else None
            if file is None or content is None or member.size != file.size:
                raise _refuse(
                    f"the bundle holds {member.name!r}, which its list does not allow",
                    "Do not use it.",
                )
            target = folder / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            digests = _copy(content, target, file.size, advance)
            if not file.accepts(digests):
                raise SparkLlmError(
                    f"{file.path} in the bundle is damaged",
                    reason=Reason.MODEL_CORRUPT,
                    hint="Copy the bundle again.",
                )
            stamps[file.path] = replace(Stamp.of(target), sha256=digests.sha256)
    if expected:
        raise SparkLlmError(
            f"the bundle ends before {min(expected).removeprefix(_FOLDER)}",
            reason=Reason.MODEL_INCOMPLETE,
            hint="Copy the bundle again.",
        )
    return stamps


def _copy(content: IO[bytes], target: Path, size: int, advance: Callable[[int], None]) -> Digests:
    hasher = Hasher(size)
    with target.open("xb") as stream:
        while block := content.read(_BLOCK):
            stream.write(block)
            hasher.update(block)
            advance(len(block))
        stream.flush()
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return hasher.digests()


@contextlib.contextmanager
def _opened(source: Path) -> Iterator[tarfile.TarFile]:
    try:
        stream = source.open("rb")
    except OSError as error:
        raise SparkLlmError(
            f"cannot read {source}: {error.strerror}", reason=Reason.MODEL_MISSING
        ) from error
    with stream, zstandard.ZstdDecompressor().stream_reader(stream) as unpacked:
        try:
            tar = tarfile.open(fileobj=unpacked, mode="r|")  # noqa: SIM115  closed by the with below
        except (tarfile.TarError, zstandard.ZstdError, EOFError) as error:
            raise _not_a_bundle(source) from error
        with tar:
            yield tar


def _index(tar: tarfile.TarFile, source: Path) -> Receipt:
    with _damaged():
        member = tar.next()
        content = tar.extractfile(member) if member is not None and member.isreg() else None
        if (
            member is None
            or content is None
            or member.name != _INDEX
            or member.size > _LARGEST_INDEX
        ):
            raise _not_a_bundle(source)
        text = content.read()
    try:
        index: Any = json.loads(text)
        if index["format"] != FORMAT:
            raise SparkLlmError(
                f"{source} is a bundle of format {index['format']}; this version reads format {FORMAT}",
                reason=Reason.BAD_REQUEST,
                hint="Use a newer spark-llm.",
            )
        files = tuple(RemoteFile.from_json(item) for item in index["files"])
        model, commit, revision = str(index["model"]), str(index["commit"]), str(index["revision"])
    except (KeyError, TypeError, ValueError) as error:
        raise _not_a_bundle(source) from error
    plan.check_model_name(model)
    plan.check_revision(revision)
    if not plan.is_commit(commit):
        raise _not_a_bundle(source)
    plan.check_paths(files)
    return Receipt(model, commit, revision, "bundle", 0.0, files, {})


@contextlib.contextmanager
def _damaged() -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, zstandard.ZstdError, EOFError) as error:
        raise SparkLlmError(
            f"the bundle is cut off or damaged: {error}",
            reason=Reason.MODEL_CORRUPT,
            hint="Copy the bundle again.",
        ) from error


def _not_a_bundle(source: Path) -> SparkLlmError:
    return _refuse(f"{source} is not a model bundle", "`spark-llm bundle export` writes one.")


def _refuse(message: str, hint: str) -> RefusedError:
    return RefusedError(message, reason=Reason.MODEL_UNSAFE, hint=hint)
