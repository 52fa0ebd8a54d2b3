"""Brings one model into the store: ``python -m spark_llm.store.fetch '<request as JSON>'`` prints events, one a line.

The command, the API's jobs and the controller all start this process. It holds the model's lock, decides and publishes;
the bytes are brought by a child, ``spark_llm.store.hub``, that it can kill when nothing moves any more.

Crash-safe by order: a file is downloaded to a partial name, flushed, hashed, put in its place in ``incoming`` and noted
in the journal; when all are there the receipt is written and one rename makes the snapshot visible.
"""

import contextlib
import errno
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from spark_llm.errors import SparkLlmError
from spark_llm.reason import Reason
from spark_llm.store import adopt, durable, plan, receipt, snapshots, worker
from spark_llm.store.hashing import Digests, hash_files
from spark_llm.store.layout import Incoming, ModelFolder
from spark_llm.store.lock import BusyError, Owner
from spark_llm.store.progress import (
    Event,
    Failure,
    Note,
    Progress,
    Reporter,
    Result,
    decode,
    encode,
    to_json,
)
from spark_llm.store.receipt import Receipt, RemoteFile
from spark_llm.store.request import Request
from spark_llm.store.stamp import Stamp
from spark_llm.store.transfer import Files, Transfer, partial_size

_WATCH_EVERY_S = 0.5


class Fetch:
    """One run.

    Args:
        request: what to bring.
        emit: takes every event.
        talk: runs a hub process, see ``worker.messages``.
    """

    def __init__(
        self, request: Request, emit: Callable[[Event], None], talk: worker.Talk = worker.messages
    ) -> None:
        self.request = request
        self.folder = ModelFolder(Path(request.root), plan.check_model_name(request.model))
        self._emit = emit
        self._began = time.monotonic()
        self._hub = Transfer(request, self.folder, self._tell, talk)

    def run(self) -> Result:
        """Bring the model, or find that it is there.

        Raises:
            SparkLlmError: it cannot be brought; nothing visible has changed.
        """
        if self.request.revision:
            plan.check_revision(self.request.revision)
        try:
            self.folder.root.mkdir(parents=True, exist_ok=True)
            with durable.umask_of(self.folder.root), self._lock():
                self.folder.path.mkdir(parents=True, exist_ok=True)
                try:
                    return self._run()
                finally:
                    self.folder.progress.unlink(missing_ok=True)
                    with contextlib.suppress(OSError):
                        self.folder.path.rmdir()  # a refusal leaves nothing behind; a model's folder is not empty
        except PermissionError as error:
            raise snapshots.unwritable(self.folder.root, error) from error
        except BrokenPipeError:
            raise
        except OSError as error:
            raise _disk_error(self.folder.root, error) from error

    def _run(self) -> Result:
        known = snapshots.recorded_commit(self.folder, self.request.branch)
        if (
            known
            and (plan.is_commit(self.request.branch) or not self.request.refresh)
            and (present := self._present(known))
        ):
            return present
        commit, files = self._plan(known)
        return self._present(commit) or self._complete(commit, files)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """The model's write lock; while another process has it, its progress is ours."""
        with contextlib.ExitStack() as stack:
            lock = self.folder.write_lock
            try:
                self._hub.lock_descriptor = stack.enter_context(lock.hold("pull"))
            except BusyError as busy:
                with self._watching(busy.owner):
                    self._hub.lock_descriptor = stack.enter_context(lock.hold("pull", wait=True))
            yield

    @contextlib.contextmanager
    def _watching(self, owner: Owner | None) -> Iterator[None]:
        by = f"process {owner.pid} ({owner.reason})" if owner else "another process"
        self._emit(
            Note(f"{self.request.model} is being changed by {by}: watching it", Reason.MODEL_BUSY)
        )
        free = threading.Event()

        def report() -> None:
            last: Any = None
            while not free.wait(_WATCH_EVERY_S):
                seen = durable.read_json(self.folder.progress)
                if isinstance(seen, dict) and seen != last:
                    last = seen
                    with contextlib.suppress(ValueError):
                        self._emit(decode(json.dumps(seen)))

        watcher = threading.Thread(target=report, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            free.set()
            watcher.join()

    def _tell(self, event: Event) -> None:
        """Emit, and leave the last progress where a second pull can see it."""
        if isinstance(event, Progress):
            with contextlib.suppress(OSError):
                durable.write_json(self.folder.progress, to_json(event), durable=False)
        self._emit(event)

    def _present(self, commit: str) -> Result | None:
        """The snapshot if it is there and right; otherwise what there is goes back to ``incoming``."""
        snapshot = self.folder.snapshot(commit)
        if not snapshot.is_dir():
            return None
        proof = receipt.read(snapshot)
        if proof is not None:
            suspects = proof.suspects(snapshot)
            stamps = self._verify(snapshot, suspects) if suspects else {}
            if len(stamps) == len(suspects):
                if suspects:
                    receipt.write(snapshot, proof.stamped(stamps))
                return self._result(commit, proof.files)
            self._emit(
                Note(
                    f"{len(suspects) - len(stamps)} files of {self.request.model} are missing or damaged"
                )
            )
        try:
            snapshots.unpublish(self.folder, commit)
        except BusyError as error:
            error.hint = f"{self.request.model} is damaged; stop what serves it, then pull again."
            raise
        return None

    def _verify(self, folder: Path, files: Iterable[RemoteFile]) -> dict[str, Stamp]:
        """Stamps of those ``files`` that are right; every byte is read."""
        by_path = {folder / file.path: file for file in files}
        report = Reporter(
            self._tell, "verifying", {file.path: file.size for file in by_path.values()}
        )
        before = {path: Stamp.of(path) for path in by_path if path.is_file()}
        stamps: dict[str, Stamp] = {}
        for path, digests in hash_files(before, advance=report.advance):
            file = by_path[path]
            if (
                isinstance(digests, Digests)
                and file.accepts(digests)
                and before[path].matches(Stamp.of(path))
            ):
                stamps[file.path] = replace(before[path], sha256=digests.sha256)
        return stamps

    def _plan(self, known: str) -> tuple[str, Files]:
        """The commit and its files: from the adopted cache, an earlier try, or the hub."""
        cached = adopt.cached_tree(self.request) if self.request.adopt else None
        if cached:
            commit, tree = cached
            indexes: Mapping[str, Iterable[str]] = adopt.cached_indexes(self.request, commit, tree)
        elif (
            known
            and not self.request.refresh
            and (earlier := snapshots.read_plan(self.folder.incoming(known)))
        ):
            return known, earlier
        else:
            try:
                commit, tree, indexes = self._hub.plan()
            except SparkLlmError as error:
                if error.reason in (Reason.NETWORK, Reason.STALLED, Reason.MODEL_MISSING) and (
                    files := self._known_files(known)
                ):
                    self._emit(
                        Note(
                            f"{error.message}; keeping to the known commit {known[:12]}",
                            error.reason,
                        )
                    )
                    return known, files
                raise
        plan.check_indexes(self.request.model, {file.path for file in tree}, indexes)
        return commit, plan.select(
            self.request.model, tree, allow_pickle=self.request.allow_pickle
        ).files

    def _known_files(self, known: str) -> Files:
        if not known:
            return ()
        proof = receipt.read(self.folder.snapshot(known))
        return proof.files if proof else snapshots.read_plan(self.folder.incoming(known))

    def _complete(self, commit: str, files: Files) -> Result:
        incoming = self.folder.incoming(commit)
        stamps = self._already_there(incoming, files)
        wanted = [file for file in files if file.path not in stamps]
        linkable = snapshots.siblings(self.folder, wanted) | adopt.candidates(
            self.request, commit, wanted
        )
        missing = [file for file in wanted if file.path not in linkable]
        copied = sum(
            file.size
            for file in wanted
            if file.path in linkable and adopt.is_copied(linkable[file.path], self.folder.root)
        )
        needed = sum(
            file.size - min(partial_size(incoming.part(file.path)), file.size) for file in missing
        )
        free = shutil.disk_usage(self.folder.root).free
        plan.check_disk(
            self.request.model,
            needed=needed + copied,
            free=free,
            reserve=self.request.reserve_bytes,
        )
        if self.request.dry_run:
            return Result(
                self.request.model,
                commit,
                "",
                sum(file.size for file in files),
                len(files),
                needed,
                0.0,
            )
        snapshots.write_plan(incoming, files)
        snapshots.record(self.folder, self.request.branch, commit)
        stamps |= adopt.take(linkable, self.folder.root, incoming, wanted)
        stamps |= self._hub.bring(incoming, files, stamps)
        source = "adopted" if self.request.adopt else "hub"
        proof = Receipt(
            self.request.model, commit, self.request.branch, source, time.time(), files, stamps
        )
        if suspects := proof.suspects(incoming.path):
            raise SparkLlmError(
                f"{suspects[0].path} changed while it was fetched",
                reason=Reason.MODEL_CORRUPT,
                hint="Does another program write to the store? Pull again.",
            )
        snapshots.publish(self.folder, proof)
        return self._result(commit, files)

    def _already_there(self, incoming: Incoming, files: Files) -> dict[str, Stamp]:
        """Finished files of an earlier try: believed if a stamp vouches for them, else hashed; bad ones go."""
        old = receipt.read(incoming.path)
        noted = {**(old.stamps if old else {}), **snapshots.read_journal(incoming)}
        stamps: dict[str, Stamp] = {}
        unsure: list[RemoteFile] = []
        for file in files:
            path = incoming.path / file.path
            if path.is_file():
                stamp = noted.get(file.path)
                if stamp and stamp.size == file.size and stamp.matches(Stamp.of(path)):
                    stamps[file.path] = stamp
                else:
                    unsure.append(file)
        right = self._verify(incoming.path, unsure)
        for file in unsure:
            if file.path not in right:
                self._hub.quarantine(incoming, file.path, incoming.path / file.path)
        return stamps | right

    def _result(self, commit: str, files: Files) -> Result:
        size = sum(file.size for file in files)
        seconds = round(time.monotonic() - self._began, 3)
        path = str(self.folder.snapshot(commit))
        return Result(
            self.request.model, commit, path, size, len(files), self._hub.fetched, seconds
        )


_FULL = (errno.ENOSPC, errno.EDQUOT)


def _disk_error(root: Path, error: OSError) -> SparkLlmError:
    return worker.error_of(
        {
            "reason": Reason.NO_DISK if error.errno in _FULL else Reason.UNWRITABLE_DIRECTORY,
            "message": f"cannot write the model store at {root}: {error.strerror}",
            "hint": "`spark-llm doctor` says more.",
        }
    )


def main(argv: list[str]) -> int:
    """Serve the request in ``argv[0]``; prints events, the last one is a result or a failure."""

    def emit(event: Event) -> None:
        sys.stdout.write(encode(event) + "\n")
        sys.stdout.flush()

    try:
        emit(Fetch(Request(**json.loads(argv[0])), emit).run())
    except SparkLlmError as error:
        emit(Failure.of(error))
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os._exit(
            1
        )  # whoever wanted the model is gone, and a flush at exit would only complain again
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
