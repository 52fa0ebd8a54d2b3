"""What a fetch says while it runs: one JSON object a line, the same for terminals, the API and ``STATUS=``."""

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from spark_llm.errors import ConfigError, RefusedError, SparkLlmError, TryAgainError
from spark_llm.reason import Reason
from spark_llm.store.plan import gigabytes

_WINDOW_S = 10.0
_SHORTEST_S = 0.5
"""A rate over less time than this, in seconds, says more about small files than about the line."""


@dataclass(frozen=True)
class Progress:
    """How far it is.

    Attributes:
        phase: ``fetching`` or ``verifying``.
        bytes: done of all files, in bytes; what was there before counts.
        total: all files together, in bytes.
        rate: over the last ten seconds, in bytes per second.
        eta_s: time left at that rate, in seconds; None while nothing moves.
        files_done: files that are verified.
        files: number of files.
        file: the one that moved last.
        file_bytes: done of it, in bytes.
        file_total: its size, in bytes.
        moving: path, bytes done and size of each file that has begun and is not done, at most sixteen.
    """

    phase: str
    bytes: int
    total: int
    rate: float = 0.0
    eta_s: float | None = None
    files_done: int = 0
    files: int = 0
    file: str = ""
    file_bytes: int = 0
    file_total: int = 0
    moving: tuple[tuple[str, int, int], ...] = ()

    def status_line(self) -> str:
        """One line for ``STATUS=`` and for terminals that are none."""
        percent = 100 * self.bytes // self.total if self.total else 100
        left = f", {duration(self.eta_s)} left" if self.eta_s is not None else ""
        return (
            f"{self.phase} {percent} %: {gigabytes(self.bytes)} of {gigabytes(self.total)}"
            f" at {gigabytes(int(self.rate))}/s{left}, {self.files_done} of {self.files} files"
        )


@dataclass(frozen=True)
class Note:
    """Something a person would want to know: a retry, a wait, a file fetched again.

    Attributes:
        message: one sentence.
        reason: the cause, ``ok`` where nothing is wrong.
    """

    message: str
    reason: str = Reason.OK


@dataclass(frozen=True)
class Result:
    """It is there, complete and verified.

    Attributes:
        model: ``ORG/NAME``.
        commit: 40-hex commit.
        path: the snapshot's folder.
        bytes: its size, in bytes.
        files: number of files.
        fetched_bytes: what came over the network this time, in bytes.
        seconds: time it took.
    """

    model: str
    commit: str
    path: str
    bytes: int
    files: int
    fetched_bytes: int
    seconds: float


@dataclass(frozen=True)
class Failure:
    """It did not work; the last event.

    Attributes:
        reason: the cause.
        message: one sentence.
        hint: what to do.
        exit_code: as the command would give.
    """

    reason: str
    message: str
    hint: str
    exit_code: int

    def error(self) -> SparkLlmError:
        """The exception this stands for."""
        for kind in (ConfigError, RefusedError, TryAgainError):
            if kind.exit_code == self.exit_code:
                return kind(self.message, reason=Reason(self.reason), hint=self.hint)
        return SparkLlmError(self.message, reason=Reason(self.reason), hint=self.hint)

    @classmethod
    def of(cls, error: SparkLlmError) -> "Failure":
        """The event for ``error``."""
        return cls(error.reason, error.message, error.hint, error.exit_code)

    @classmethod
    def silent(cls, status: int | None = None) -> "Failure":
        """The event for a fetching process that ended before it said how it went, e.g. killed for want of memory.

        Args:
            status: as ``Popen.returncode``; None if it is not known.
        """
        known = "" if status is None else f" (status {status})"
        return cls(
            Reason.ABORTED,
            f"the fetching process ended without a word{known}",
            "Fetch again: finished files are kept.",
            TryAgainError.exit_code,
        )


Event = Progress | Note | Result | Failure
_KINDS: dict[str, type[Progress | Note | Result | Failure]] = {
    kind.__name__.lower(): kind for kind in (Progress, Note, Result, Failure)
}


def encode(event: Event) -> str:
    """``event`` as one line of JSON without its newline."""
    return json.dumps(to_json(event), separators=(",", ":"))


def to_json(event: Event) -> dict[str, Any]:
    """``event`` as an object whose key ``event`` names its kind."""
    return {"event": type(event).__name__.lower(), **asdict(event)}


def decode(line: str | bytes) -> Event:
    """Inverse of ``encode``.

    Raises:
        ValueError: not an event.
    """
    value = json.loads(line)
    try:
        if "moving" in value:
            value["moving"] = tuple(
                (str(path), int(done), int(size)) for path, done, size in value["moving"]
            )
        return _KINDS[value.pop("event")](**value)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"not an event: {line!r}") from error


_REPORT_EVERY_S = 0.2
_MOST_MOVING = 16


class Reporter:
    """Turns byte counts of single files into ``Progress`` events, a few a second; for use by several threads.

    Args:
        emit: takes the events.
        phase: see ``Progress``.
        sizes: size of each file, in bytes, by path.
    """

    def __init__(self, emit: Callable[[Event], None], phase: str, sizes: Mapping[str, int]) -> None:
        self._emit, self._phase, self._sizes = emit, phase, sizes
        self._total = sum(sizes.values())
        self._done: dict[str, int] = {}
        self._bytes, self._reported = 0, 0.0
        self._finished: set[str] = set()
        self._meter = Meter()
        self._lock = threading.Lock()

    def start_at(self, path: str, done: int) -> None:
        """``done`` bytes of ``path`` were there before."""
        with self._lock:
            self._bytes += done - self._done.get(path, 0)
            self._done[path] = done

    def at(self, path: str, done: int) -> None:
        """``done`` bytes of ``path`` are there now."""
        self.start_at(path, done)
        self._report(path)

    def advance(self, count: int) -> None:
        """``count`` more bytes, of whichever file."""
        with self._lock:
            self._bytes += count
        self._report("")

    def finish(self, path: str) -> None:
        """``path`` is done."""
        self.start_at(path, self._sizes[path])
        with self._lock:
            self._finished.add(path)
        self._report(path, force=len(self._finished) == len(self._sizes))

    def _report(self, path: str, *, force: bool = False) -> None:
        with self._lock:
            now = time.monotonic()
            if not force and now - self._reported < _REPORT_EVERY_S:
                return
            self._reported = now
            rate = self._meter.rate(self._bytes)
            left = (self._total - self._bytes) / rate if rate else None
            moving = (
                (name, done, self._sizes[name])
                for name, done in self._done.items()
                if done and name not in self._finished
            )
            event = Progress(
                phase=self._phase,
                bytes=self._bytes,
                total=self._total,
                rate=round(rate),
                eta_s=round(left, 1) if left is not None else None,
                files_done=len(self._finished),
                files=len(self._sizes),
                file=path,
                file_bytes=self._done.get(path, 0),
                file_total=self._sizes.get(path, 0),
                moving=tuple(islice(moving, _MOST_MOVING)),
            )
        self._emit(event)


class Meter:
    """Rate over a sliding window of ten seconds.

    Args:
        clock: seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._points: deque[tuple[float, int]] = deque()

    def rate(self, count: int) -> float:
        """Bytes per second, given that ``count`` bytes are done now."""
        now = self._clock()
        self._points.append((now, count))
        while len(self._points) > 2 and now - self._points[0][0] > _WINDOW_S:  # noqa: PLR2004  a rate needs two points
            self._points.popleft()
        began, first = self._points[0]
        return max(0.0, (count - first) / (now - began)) if now - began >= _SHORTEST_S else 0.0


def duration(seconds: float) -> str:
    """Seconds for people: ``42 s``, ``3 min 20 s``, ``2 h 05 min``."""
    whole = round(seconds)
    if whole < 60:  # noqa: PLR2004  a minute
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:  # noqa: PLR2004  an hour
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"
