"""Brings the model of a bundle into the store, and trusts nothing of the bundle.

Names are checked before anything is written, links and devices are refused, no file may be larger than the list says,
and each is hashed while it is written. Only when all are right does the model become visible.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import zstandard

from spark_llm.errors import ConfigError, RefusedError, SparkLlmError
from spark_llm.reason import Reason
from spark_llm.store import durable, plan, snapshots
from spark_llm.store.bundle import FOLDER, FORMAT, INDEX
from spark_llm.store.hashing import Digests, Hasher
from spark_llm.store.layout import Incoming, ModelFolder
from spark_llm.store.receipt import Receipt, RemoteFile
from spark_llm.store.stamp import Stamp
from spark_llm.store.store import Store

_LARGEST_INDEX = 8 * 2**20
"""Forty thousand files; parsed, the worst JSON of this size takes some 200 MB."""
_LARGEST_HEADER = 2**16
"""What may lie between two contents: padding, a long name, a size of more than 8 GiB, a block read ahead."""
_BLOCK = 4 * 2**20


class Bundle:
    """A bundle that was opened; ``opened`` makes it.

    Attributes:
        promised: what will be kept of it, by its own word; nothing is proved before ``receive`` returns.
    """

    def __init__(
        self,
        tar: tarfile.TarFile,
        unpacked: "_Rationed",
        carrier: "_Carrier",
        *,
        allow_pickle: bool,
    ) -> None:
        self._tar, self._unpacked, self._carrier = tar, unpacked, carrier
        self._listed = self._index()
        kept = plan.select(self._listed.model, self._listed.files, allow_pickle=allow_pickle)
        self.promised = replace(self._listed, files=kept.files)

    def receive(
        self, root: Path, *, reserve_bytes: int, advance: Callable[[int], None] = lambda _: None
    ) -> Receipt:
        """Bring the model into the store; it becomes visible only when every file is verified. Works once.

        Args:
            root: the store.
            reserve_bytes: disk space to leave free, in bytes.
            advance: called with the bytes of each block.

        Raises:
            RefusedError: unsafe members, or no disk space.
            BusyError: the model is being changed.
            SparkLlmError: its content is not what its list says, or it is another file than was expected.
        """
        try:
            root.mkdir(parents=True, exist_ok=True)
            folder = ModelFolder(root, self.promised.model)
            with durable.umask_of(root), folder.write_lock.hold("import"):
                return self._receive(folder, reserve_bytes, advance)
        except PermissionError as error:
            raise snapshots.unwritable(root, error) from error
        except OSError as error:
            raise RefusedError(
                f"the import broke off: {error.strerror}",
                reason=Reason.NO_DISK,
                hint="Nothing of it is visible.",
            ) from error

    def _receive(
        self, folder: ModelFolder, reserve: int, advance: Callable[[int], None]
    ) -> Receipt:
        promised, store = self.promised, Store(folder.root)
        if store.locate(promised.model, promised.commit) is not None:
            self._carrier.check()
            snapshots.record(folder, promised.revision, promised.commit)
            return store.receipt(promised.model, promised.commit)
        plan.check_disk(
            promised.model,
            needed=promised.size,
            free=shutil.disk_usage(folder.root).free,
            reserve=reserve,
        )
        folder.path.mkdir(parents=True, exist_ok=True)
        if folder.snapshot(promised.commit).exists():
            snapshots.unpublish(folder, promised.commit)
        final = folder.incoming(promised.commit).path
        incoming = Incoming(final.with_name(f"{durable.TEMPORARY_PREFIX}{promised.commit}"))
        shutil.rmtree(incoming.path, ignore_errors=True)
        incoming.path.mkdir(parents=True)
        try:
            stamps = self._extract(incoming.path, advance)
            self._carrier.check()
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

    def _extract(self, folder: Path, advance: Callable[[int], None]) -> dict[str, Stamp]:
        expected = {FOLDER + file.path: file for file in self._listed.files}
        kept = set(self.promised.files)
        stamps: dict[str, Stamp] = {}
        with _damaged():
            while (member := self._next()) is not None:
                file = expected.pop(member.name, None)
                if file is None or not _plain(member) or member.size != file.size:
                    raise _refuse(
                        f"the bundle holds {member.name!r}, which its list does not allow",
                        "Do not use it.",
                    )
                content = self._content(member)
                if file not in kept:
                    while content.read(_BLOCK):
                        pass
                    continue
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
                f"the bundle ends before {min(expected).removeprefix(FOLDER)}",
                reason=Reason.MODEL_INCOMPLETE,
                hint="Copy the bundle again.",
            )
        return stamps

    def _next(self) -> tarfile.TarInfo | None:
        """The next member; iterating would give the index twice."""
        self._unpacked.allow(_LARGEST_HEADER)
        return self._tar.next()

    def _content(self, member: tarfile.TarInfo) -> IO[bytes]:
        self._unpacked.allow(member.size + _LARGEST_HEADER)
        content = self._tar.extractfile(member)
        assert content is not None  # noqa: S101  for the type checker: it is a regular file
        return content

    def _index(self) -> Receipt:
        name = self._carrier.name
        with _damaged():
            member = self._next()
            if (
                member is None
                or not _plain(member)
                or member.name != INDEX
                or not 0 <= member.size <= _LARGEST_INDEX
            ):
                raise _not_a_bundle(name)
            text = self._content(member).read()
        try:
            index: Any = json.loads(text)
            if index["format"] != FORMAT:
                raise SparkLlmError(
                    f"{name} is a bundle of format {index['format']}; this version reads format {FORMAT}",
                    reason=Reason.BAD_REQUEST,
                    hint="Use a newer spark-llm.",
                )
            files = tuple(RemoteFile.from_json(item) for item in index["files"])
            model, commit = str(index["model"]), str(index["commit"])
            revision = str(index["revision"])
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise _not_a_bundle(name) from error
        plan.check_model_name(model)
        plan.check_revision(revision)
        if not plan.is_commit(commit):
            raise _not_a_bundle(name)
        plan.check_paths(files)
        return Receipt(model, commit, revision, "bundle", 0.0, files, {})


@contextlib.contextmanager
def opened(
    stream: IO[bytes], name: str, *, sha256: str = "", allow_pickle: bool = False
) -> Iterator[Bundle]:
    """The bundle in ``stream``, which is read once, from where it is to its end.

    Args:
        stream: need not be able to seek.
        name: for messages.
        sha256: of the whole file, in hex, as export printed it; compared before the model becomes visible. Empty for
            any.
        allow_pickle: see ``plan.select``; what a pull would not fetch is not kept.

    Raises:
        ConfigError: ``sha256`` is not one.
        RefusedError: unsafe names, or what ``plan.select`` refuses.
        SparkLlmError: not a bundle, or it cannot be read.
    """
    carrier = _Carrier(stream, name, sha256.strip().lower())
    with zstandard.ZstdDecompressor().stream_reader(carrier, closefd=False) as unpacked:  # type: ignore[arg-type]  # reads only
        rationed = _Rationed(unpacked)
        try:
            tar = tarfile.open(fileobj=rationed, mode="r|")  # type: ignore[call-overload]  # noqa: SIM115  reads only; closed below
        except (tarfile.TarError, zstandard.ZstdError, EOFError) as error:
            raise _not_a_bundle(name) from error
        with tar:
            yield Bundle(tar, rationed, carrier, allow_pickle=allow_pickle)


class _Carrier:
    """The compressed file, hashed as it is read.

    Hashing it first and reading it again would prove nothing where others may write: what is compared must be the very
    bytes that were unpacked.
    """

    def __init__(self, stream: IO[bytes], name: str, expected: str) -> None:
        if expected and not re.fullmatch("[0-9a-f]{64}", expected):
            raise ConfigError(
                f"{expected!r} is no sha256",
                reason=Reason.BAD_REQUEST,
                hint="It has 64 hexadecimal digits; `bundle export` prints it.",
            )
        self.name = name
        self._stream, self._expected, self._hash = stream, expected, hashlib.sha256()

    def read(self, size: int) -> bytes:
        try:
            block = self._stream.read(size)
        except OSError as error:
            raise SparkLlmError(
                f"cannot read {self.name}: {error.strerror}", reason=Reason.MODEL_MISSING
            ) from error
        if self._expected:
            self._hash.update(block)
        return block

    def check(self) -> None:
        """Compare the whole file, to its end, with the checksum it must have.

        Raises:
            SparkLlmError: it is another file, or damaged.
        """
        while self._expected and self.read(_BLOCK):
            pass
        if self._expected and self._hash.hexdigest() != self._expected:
            raise SparkLlmError(
                f"{self.name} has sha256 {self._hash.hexdigest()}, not {self._expected}",
                reason=Reason.MODEL_CORRUPT,
                hint="Nothing of it was kept. Copy the bundle again.",
            )


class _Rationed:
    """The unpacked tar, of which no more can be read than was allowed.

    tarfile takes whatever belongs to a header (long names, pax records, maps of sparse files) into memory, however much
    that is; a few kilobytes of zstd can be gigabytes of it.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._left = stream, _LARGEST_HEADER

    def allow(self, count: int) -> None:
        """Let the next ``count`` bytes through, and no more."""
        self._left = count

    def read(self, size: int) -> bytes:
        block = self._stream.read(size)
        self._left -= len(block)
        if self._left < 0:
            raise _refuse("the bundle has a header of more than 64 KiB", "Do not use it.")
        return block


def _plain(member: tarfile.TarInfo) -> bool:
    return member.isreg() and not member.issparse()


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
def _damaged() -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, zstandard.ZstdError, EOFError) as error:
        raise SparkLlmError(
            f"the bundle is cut off or damaged: {error}",
            reason=Reason.MODEL_CORRUPT,
            hint="Copy the bundle again.",
        ) from error


def _not_a_bundle(name: str) -> SparkLlmError:
    return _refuse(f"{name} is not a model bundle", "`spark-llm bundle export` writes one.")


def _refuse(message: str, hint: str) -> RefusedError:
    return RefusedError(message, reason=Reason.MODEL_UNSAFE, hint=hint)
