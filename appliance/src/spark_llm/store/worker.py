"""Starts the process that talks to the hub, watches that bytes move, kills it when none do, and tries again."""

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any, Protocol

from spark_llm.errors import ConfigError, RefusedError, SparkLlmError, TryAgainError
from spark_llm.reason import Reason

Message = dict[str, Any]
"""One line of ``spark_llm.store.hub``; its key ``event`` names its kind."""
_LONGEST_WAIT_S = 60.0
_REFUSED = {Reason.GATED, Reason.NO_DISK, Reason.MODEL_UNSAFE, Reason.UNWRITABLE_DIRECTORY}


class StalledError(TryAgainError):
    """Nothing came for too long; the process was killed."""


@dataclass(frozen=True)
class RetryPolicy:
    """When to try again.

    Attributes:
        attempts: tries in a row that may bring nothing.
        backoff_s: wait after the first, in seconds; doubles with every fruitless one up to a minute.
        xet: whether the first try may use Xet; later ones never do.
    """

    attempts: int
    backoff_s: float
    xet: bool

    def wait(self, fruitless: int, asked_s: float) -> float:
        """Seconds before the next try, given how many brought nothing and what the hub asked for."""
        return min(max(self.backoff_s * 2.0**fruitless, asked_s), _LONGEST_WAIT_S)


class Talk(Protocol):
    """The signature of ``messages``."""

    def __call__(  # noqa: D102  see the class
        self, request: Message, *, stall_timeout_s: float, xet: bool, keep_open: int
    ) -> Iterator[Message]: ...


def messages(
    request: Message, *, stall_timeout_s: float, xet: bool, keep_open: int
) -> Iterator[Message]:
    """Messages of one hub process, started for ``request`` and gone when the iterator is.

    Args:
        request: see ``hub.main``.
        stall_timeout_s: silence after which it is killed, in seconds.
        xet: whether it may use Xet.
        keep_open: the lock's descriptor: the child holds the lock too, so nobody else begins while it still writes.

    Raises:
        StalledError: silence for too long, or an end without a last word.
    """
    complaints = tempfile.TemporaryFile()  # noqa: SIM115  closed below; not a pipe, which could fill up
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "spark_llm.store.hub"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=complaints,
        env=environment(stall_timeout_s, xet=xet),
        pass_fds=[keep_open],
    )
    assert process.stdin is not None  # noqa: S101  for the type checker: both are pipes
    assert process.stdout is not None  # noqa: S101
    try:
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
        last: Message = {"event": "none"}
        for line in _lines(process.stdout.fileno(), stall_timeout_s):
            last = json.loads(line)
            if last["event"] == "end":
                return
            yield last
        if last["event"] != "failed" or last["path"]:
            raise _died(process.wait(), complaints)
    except BrokenPipeError:
        raise _died(process.wait(), complaints) from None
    finally:
        process.kill()
        process.stdin.close()
        process.stdout.close()
        process.wait()
        complaints.close()


def _died(status: int, complaints: IO[bytes]) -> SparkLlmError:
    """The error for a hub process that ended without a last word."""
    if status < 0:
        name = signal.Signals(-status).name
        return StalledError(f"the transfer was killed by {name}", reason=Reason.ABORTED)
    complaints.seek(0)
    lines = complaints.read().decode(errors="replace").strip().splitlines() or ["no message"]
    return SparkLlmError(
        f"the transfer could not run: {lines[-1]}",
        reason=Reason.INTERNAL,
        hint="The installation is damaged: install spark-llm again.",
    )


def environment(stall_timeout_s: float, *, xet: bool) -> dict[str, str]:
    """The hub process's variables. The library reads them when it is imported."""
    read_timeout = max(
        1, min(10, int(stall_timeout_s / 3))
    )  # the library's own retry comes before our kill
    settings = {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_VERBOSITY": "error",
        "HF_HUB_DOWNLOAD_TIMEOUT": str(read_timeout),
        "HF_HUB_ETAG_TIMEOUT": str(read_timeout),
    }
    off = {} if xet else {"HF_HUB_DISABLE_XET": "1"}
    return {**os.environ, **settings, **off}


def retrying(
    attempt: Callable[[bool], Iterator[Message]],
    policy: RetryPolicy,
    warn: Callable[[str, str], None],
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Message]:
    """Messages of as many tries as it takes.

    Args:
        attempt: one try; its argument says whether Xet may be used.
        policy: when to give up.
        warn: called with a sentence and a reason before each wait.
        sleep: waits; seconds.

    Raises:
        SparkLlmError: a cause that no retry mends, or too many tries in a row that brought nothing.
    """
    fruitless, tries = 0, 0
    while True:
        failures: list[Message] = []
        moved = xet = False
        try:
            for message in attempt(policy.xet and tries == 0):
                xet = xet or message["event"] == "xet"
                moved = moved or message["event"] in ("bytes", "verified")
                if message["event"] in ("failed", "corrupt"):
                    failures.append(message)
                yield message
        except StalledError as stall:
            failures.append({"retry": True, "reason": stall.reason, "message": stall.message})
        if not failures:
            return
        final = next((failure for failure in failures if not failure.get("retry", True)), None)
        fruitless = 0 if moved else fruitless + 1
        tries += 1
        if final or fruitless >= policy.attempts:
            raise error_of(final or failures[-1])
        wait = policy.wait(fruitless, max(failure.get("wait_s", 0.0) for failure in failures))
        said = failures[-1].get("message", "a file had wrong content")
        warn(
            f"{said}; trying again in {wait:.0f} s{', without Xet' if xet else ''}",
            failures[-1].get("reason", ""),
        )
        sleep(wait)


def error_of(failure: Message) -> SparkLlmError:
    """The exception for a ``failed`` message."""
    reason = Reason(failure["reason"])
    kind: type[SparkLlmError] = SparkLlmError
    if reason in _REFUSED:
        kind = RefusedError
    elif reason in (Reason.NETWORK, Reason.STALLED):
        kind = TryAgainError
    elif reason is Reason.NOT_FOUND:
        kind = ConfigError
    return kind(failure["message"], reason=reason, hint=failure.get("hint", ""))


def _lines(descriptor: int, timeout_s: float) -> Iterator[bytes]:
    """Lines of a pipe until its end.

    Raises:
        StalledError: nothing came for ``timeout_s`` seconds.
    """
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while True:
            if not selector.select(timeout_s):
                raise StalledError(f"nothing moved for {timeout_s:.0f} s", reason=Reason.STALLED)
            block = os.read(descriptor, 2**16)
            if not block:
                return
            *lines, rest = (rest + block).split(b"\n")
            yield from lines
