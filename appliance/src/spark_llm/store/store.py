"""The models on this machine: find, list, verify, remove. Everything here works without a network."""

import contextlib
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from spark_llm.errors import ConfigError
from spark_llm.reason import Reason
from spark_llm.store import durable, receipt, snapshots
from spark_llm.store.hashing import Digests, hash_files
from spark_llm.store.layout import ModelFolder, model_folders
from spark_llm.store.progress import Event, Failure, Result, decode
from spark_llm.store.receipt import Receipt, RemoteFile
from spark_llm.store.request import Request
from spark_llm.store.stamp import Stamp


@dataclass(frozen=True)
class StoredModel:
    """One snapshot, for lists.

    Attributes:
        model: ``ORG/NAME``.
        commit: 40-hex commit.
        revisions: branches and tags that stood for it when the hub was last asked.
        bytes: its size, in bytes.
        files: number of files.
        state: ``ready``, ``changed`` (a file is not as it was when verified), ``unfinished``, or ``damaged``
            (no receipt).
        path: its folder.
        source: ``hub``, ``adopted`` or ``bundle``; empty while unfinished.
        verified_at: Unix time of the last look at every byte, in seconds.
        in_use: whether somebody reads the model now.
    """

    model: str
    commit: str
    revisions: tuple[str, ...]
    bytes: int
    files: int
    state: str
    path: Path
    source: str
    verified_at: float
    in_use: bool


@dataclass(frozen=True)
class Verification:
    """What a look at a snapshot found.

    Attributes:
        model: ``ORG/NAME``.
        commit: 40-hex commit.
        full: whether every byte was read.
        files: number of files it must have.
        bytes: bytes that were read.
        missing: files that are not there.
        corrupt: files with other content than the hub's.
        unreadable: files that could not be read, or changed meanwhile.
        extra: files that do not belong; they do no harm.
    """

    model: str
    commit: str
    full: bool
    files: int
    bytes: int
    missing: tuple[str, ...] = ()
    corrupt: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every file is there and right."""
        return not (self.missing or self.corrupt or self.unreadable)


class Store:
    """Models below one folder.

    Args:
        root: made by the first fetch; may be read-only for everything that only reads.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def locate(self, model: str, revision: str = "") -> Path | None:
        """Folder of the verified snapshot, or None. Looks at sizes and times only, so it costs milliseconds.

        Args:
            model: ``ORG/NAME``.
            revision: a commit, or a branch or tag that was pulled; empty means the default branch.
        """
        commit = snapshots.recorded_commit(ModelFolder(self.root, model), revision or "main")
        if not commit:
            return None
        snapshot = ModelFolder(self.root, model).snapshot(commit)
        proof = receipt.read(snapshot)
        if proof is None or proof.commit != commit or proof.suspects(snapshot):
            return None
        return snapshot

    def commit(self, model: str, revision: str = "") -> str:
        """The commit that ``revision`` is, or stood for when it was last pulled; empty if unknown."""
        return snapshots.recorded_commit(ModelFolder(self.root, model), revision or "main")

    @contextlib.contextmanager
    def reading(self, model: str, reason: str) -> Iterator[None]:
        """Keep ``rm`` and repairs away from ``model`` while it is served, verified or exported.

        Raises:
            BusyError: it is being removed or repaired.
        """
        with ModelFolder(self.root, model).use_lock.hold(reason, shared=True):
            yield

    def fetch(self, request: Request, *, pass_fds: tuple[int, ...] = ()) -> Iterator[Event]:
        """Events of a fetching process, started for ``request`` and stopped when the iterator is.

        The last one is a ``Result`` or a ``Failure``, whatever happens to the process.

        Args:
            request: what to bring.
            pass_fds: descriptors that its paths name, as ``/proc/self/fd/N``.
        """
        process = subprocess.Popen(  # noqa: S603  our own module
            request.command(),
            stdout=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            pass_fds=pass_fds,
        )
        assert process.stdout is not None  # noqa: S101  for the type checker: it is a pipe
        ended = False
        try:
            for line in process.stdout:
                event = decode(line)
                ended = isinstance(event, Result | Failure)
                yield event
            process.wait()
            if not ended:
                yield Failure.silent(process.returncode)
        finally:
            process.terminate()
            process.stdout.close()
            process.wait()

    def models(self) -> list[StoredModel]:
        """Everything in the store, sorted by name."""
        return [stored for folder in model_folders(self.root) for stored in _describe(folder)]

    def verify(
        self,
        model: str,
        revision: str = "",
        *,
        full: bool = False,
        workers: int = 0,
        advance: Callable[[int], None] = lambda _: None,
    ) -> Verification:
        """Compare a snapshot with the hub's hashes in its receipt; needs no network.

        A file found right gets a new stamp, one found wrong loses its own: then ``locate`` no longer gives the
        snapshot, and the next pull fetches that file again.

        Args:
            model: ``ORG/NAME``.
            revision: see ``locate``.
            full: read every byte; False reads only files that changed since they were verified.
            workers: threads; 0 takes one a core.
            advance: called with the bytes of each block, from several threads.

        Raises:
            ConfigError: no such snapshot.
        """
        folder, commit, proof = self._proof(model, revision)
        snapshot = folder.snapshot(commit)
        with self.reading(model, "verify"):
            files = proof.files if full else tuple(proof.suspects(snapshot))
            missing = [file.path for file in files if not (snapshot / file.path).is_file()]
            by_path = {snapshot / file.path: file for file in files if file.path not in missing}
            before = {path: Stamp.of(path) for path in by_path}
            right: dict[str, Stamp] = {}
            corrupt: list[str] = []
            unreadable: list[str] = []
            for path, digests in hash_files(by_path, workers=workers, advance=advance):
                file = by_path[path]
                if not isinstance(digests, Digests) or not before[path].matches(Stamp.of(path)):
                    unreadable.append(file.path)
                elif file.accepts(digests):
                    right[file.path] = replace(before[path], sha256=digests.sha256)
                else:
                    corrupt.append(file.path)
            wrong = [*missing, *corrupt, *unreadable]
            with contextlib.suppress(OSError):  # a read-only store can be verified all the same
                receipt.write(snapshot, proof.stamped(right, distrusted=wrong))
        return Verification(
            model,
            commit,
            full,
            len(proof.files),
            sum(stamp.size for stamp in before.values()),
            tuple(sorted(missing)),
            tuple(sorted(corrupt)),
            tuple(sorted(unreadable)),
            tuple(sorted(_extra(snapshot, proof.files))),
        )

    def remove(self, model: str, revision: str = "") -> int:
        """Remove one snapshot, or without ``revision`` everything of the model; the bytes that went.

        Raises:
            ConfigError: nothing to remove.
            BusyError: it is being served, pulled or verified.
        """
        folder = ModelFolder(self.root, model)
        if not folder.path.is_dir():
            raise missing_model(model, revision)
        with folder.write_lock.hold("rm"), folder.use_lock.hold("rm"):
            if not revision:
                size = _size(folder.path)
                durable.remove_tree(folder.path)
                return size
            commit = snapshots.recorded_commit(folder, revision)
            gone = [
                path
                for path in (
                    folder.snapshot(commit),
                    folder.incoming(commit).path,
                    folder.quarantine(commit),
                )
                if commit and path.is_dir()
            ]
            if not gone:
                raise missing_model(model, revision)
            size = sum(map(_size, gone))
            for path in gone:
                durable.remove_tree(path)
            if not folder.commits() and not folder.unfinished():
                durable.remove_tree(folder.path)
            return size

    def receipt(self, model: str, revision: str = "") -> Receipt:
        """The receipt of a snapshot.

        Raises:
            ConfigError: no such snapshot.
        """
        return self._proof(model, revision)[2]

    def _proof(self, model: str, revision: str) -> tuple[ModelFolder, str, Receipt]:
        folder = ModelFolder(self.root, model)
        commit = snapshots.recorded_commit(folder, revision or "main")
        if not commit and not revision and len(folder.commits()) == 1:
            commit = folder.commits()[0]
        proof = receipt.read(folder.snapshot(commit)) if commit else None
        if proof is None:
            raise missing_model(model, revision)
        return folder, commit, proof


def missing_model(model: str, revision: str) -> ConfigError:
    """The error for a model that is not in the store."""
    name = f"{model}@{revision}" if revision else model
    return ConfigError(
        f"{name} is not in the store",
        reason=Reason.MODEL_MISSING,
        hint=f"`spark-llm models` lists what is there, `spark-llm pull {name}` fetches it.",
    )


def _describe(folder: ModelFolder) -> Iterator[StoredModel]:
    refs = snapshots.read_refs(folder)
    in_use = folder.use_lock.held() is not None
    for commit in folder.commits():
        path = folder.snapshot(commit)
        names = tuple(sorted(name for name, known in refs.items() if known == commit))
        proof = receipt.read(path)
        if proof is None:
            yield StoredModel(
                folder.model, commit, names, _size(path), 0, "damaged", path, "", 0.0, in_use
            )
            continue
        state = "changed" if proof.suspects(path) else "ready"
        yield StoredModel(
            folder.model, commit, names, proof.size, len(proof.files), state, path, proof.source,
            proof.verified_at, in_use,
        )  # fmt: skip
    for commit in folder.unfinished():
        incoming = folder.incoming(commit)
        names = tuple(sorted(name for name, known in refs.items() if known == commit))
        done = len(snapshots.read_journal(incoming))
        yield StoredModel(
            folder.model,
            commit,
            names,
            _size(incoming.path),
            done,
            "unfinished",
            incoming.path,
            "",
            0.0,
            in_use,
        )


def _extra(snapshot: Path, files: tuple[RemoteFile, ...]) -> Iterator[str]:
    wanted = {file.path for file in files}
    for path in snapshot.rglob("*"):
        name = path.relative_to(snapshot).as_posix()
        if not path.is_dir() and name not in wanted and not name.startswith(receipt.OWN_FOLDER):
            yield name


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())


def free_bytes(root: Path) -> int:
    """Free space where the store is, or will be, in bytes."""
    while not root.exists():
        root = root.parent
    return shutil.disk_usage(root).free
