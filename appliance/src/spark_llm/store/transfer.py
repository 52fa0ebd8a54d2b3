"""Asks the hub for a commit's files and brings those that are missing, with retries, progress and quarantine."""

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from spark_llm.errors import RefusedError, SparkLlmError
from spark_llm.reason import Reason
from spark_llm.store import plan, snapshots, worker
from spark_llm.store.layout import Incoming, ModelFolder
from spark_llm.store.progress import Event, Note, Reporter
from spark_llm.store.receipt import RemoteFile
from spark_llm.store.request import Request
from spark_llm.store.stamp import Stamp

Files = tuple[RemoteFile, ...]
_CORRUPT_LIMIT = 2
"""A file that comes with wrong content this often is not asked for again."""


_YES = ("1", "ON", "YES", "TRUE")
"""What huggingface_hub takes for yes (2.4.0, constants.py)."""


class Transfer:
    """All talk with the hub in one run.

    Args:
        request: what to bring.
        folder: the model's folder.
        tell: takes every event.
        talk: runs a hub process, see ``worker.messages``.

    Attributes:
        lock_descriptor: the model's write lock, which hub processes hold too.
        fetched: bytes that came over the network.
    """

    def __init__(
        self,
        request: Request,
        folder: ModelFolder,
        tell: Callable[[Event], None],
        talk: worker.Talk,
    ) -> None:
        self._request, self._folder, self._tell, self._talk = request, folder, tell, talk
        self.lock_descriptor = -1
        self.fetched = 0

    def plan(self) -> tuple[str, Files, dict[str, list[str]]]:
        """The commit that the revision stands for, its files, and the shards its indexes name.

        Raises:
            SparkLlmError: the hub does not say.
        """
        ask: worker.Message = {"op": "plan", "revision": self._request.revision}
        for message in self._attempts(lambda: ask):
            if message["event"] == "tree" and plan.is_commit(message["commit"]):
                return (
                    message["commit"],
                    tuple(map(RemoteFile.from_json, message["files"])),
                    message["indexes"],
                )
        raise SparkLlmError("the hub gave no list of files", reason=Reason.NETWORK)

    def bring(
        self, incoming: Incoming, files: Files, have: Mapping[str, Stamp]
    ) -> dict[str, Stamp]:
        """Fetch what is missing; the stamps of what came.

        Args:
            incoming: where to; its folder is named by the commit.
            files: everything the snapshot needs.
            have: stamps of what is there.

        Raises:
            SparkLlmError: it cannot be brought; what came stays for the next try.
        """
        missing = {file.path: file for file in files if file.path not in have}
        if not missing:
            return {}
        tally = _Tally(Reporter(self._tell, "fetching", {file.path: file.size for file in files}))
        for path in have:
            tally.report.finish(path)
        for file in missing.values():
            tally.start(file.path, partial_size(incoming.part(file.path)))
        corrupt: dict[str, int] = {}
        brought: dict[str, Stamp] = {}

        def ask() -> worker.Message:
            wanted = [file.to_json() for path, file in missing.items() if path not in brought]
            return {
                "op": "transfer",
                "commit": incoming.path.name,
                "folder": str(incoming.path),
                "files": wanted,
                "workers": self._request.workers,
            }

        try:
            for message in self._attempts(ask):
                path = message.get("path", "")
                match message["event"]:
                    case "bytes":
                        tally.at(path, message["done"])
                    case "verified":
                        brought[path] = snapshots.read_journal(incoming)[path]
                        tally.finish(path, missing[path].size)
                    case "corrupt":
                        self.quarantine(incoming, path, Path(message["part"]))
                        tally.at(path, message["size"])
                        tally.at(path, 0)
                        corrupt[path] = corrupt.get(path, 0) + 1
                        _give_up_on(path, corrupt[path])
        finally:
            self.fetched += tally.fetched
        return brought

    def quarantine(self, incoming: Incoming, path: str, bad: Path) -> None:
        """Put a bad file aside, and say so."""
        snapshots.quarantine(self._folder, incoming.path.name, path, bad)
        self._tell(
            Note(
                f"{path} has wrong content: put in quarantine, fetching it again",
                Reason.MODEL_CORRUPT,
            )
        )

    def _attempts(self, ask: Callable[[], worker.Message]) -> Iterator[worker.Message]:
        refuse_offline(self._request.model, self._request.revision)
        common = {
            "model": self._request.model,
            "endpoint": self._request.endpoint,
            "token_file": self._request.token_file,
        }

        def attempt(xet: bool) -> Iterator[worker.Message]:  # noqa: FBT001  the one thing attempts differ in
            return self._talk(
                {**common, **ask()},
                stall_timeout_s=self._request.stall_timeout_s,
                xet=xet,
                keep_open=self.lock_descriptor,
            )

        policy = worker.RetryPolicy(
            self._request.attempts, self._request.backoff_s, self._request.xet
        )
        return worker.retrying(
            attempt, policy, lambda message, reason: self._tell(Note(message, reason))
        )


class _Tally:
    """What came over the network, and where each file stands."""

    def __init__(self, report: Reporter) -> None:
        self.report = report
        self.fetched = 0
        self._reached: dict[str, int] = {}

    def start(self, path: str, done: int) -> None:
        self._reached[path] = done
        self.report.start_at(path, done)

    def at(self, path: str, done: int) -> None:
        self.fetched += max(0, done - self._reached[path])
        self._reached[path] = done
        self.report.at(path, done)

    def finish(self, path: str, size: int) -> None:
        self.fetched += size - self._reached[path]
        self.report.finish(path)


def _give_up_on(path: str, times: int) -> None:
    if times >= _CORRUPT_LIMIT:
        raise SparkLlmError(
            f"the hub sent {path} with wrong content {times} times",
            reason=Reason.MODEL_CORRUPT,
            hint="Try again later, or another revision; a proxy on the way may alter files.",
        )


def partial_size(part: Path) -> int:
    """Bytes of a partial file; 0 if there is none."""
    try:
        return part.stat().st_size
    except OSError:
        return 0


def refuse_offline(model: str, revision: str) -> None:
    """Raise where HF_HUB_OFFLINE is set.

    spark-llm.service sets it: it reaches loopback only, and another unit has network and token.

    Raises:
        RefusedError: how to fetch it then.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() not in _YES:
        return
    name = f"{model}@{revision}" if revision else model
    raise RefusedError(
        f"{name} is not in the store, and this process may not fetch it (HF_HUB_OFFLINE)",
        reason=Reason.MODEL_MISSING,
        hint=f'Fetch it: sudo systemctl start "spark-llm-fetch@$(systemd-escape {name})"; spark-llm goes on by itself '
        "then. In a shell: unset HF_HUB_OFFLINE and pull again.",
    )
