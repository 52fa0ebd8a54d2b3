"""What the appliance is doing: states, the current status, and the events that led there."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

from spark_llm.reason import Reason


class State(StrEnum):
    """The controller's states, in the order of a start; ``failed`` and ``blocked`` end it."""

    STOPPED = "stopped"
    PREFLIGHT = "preflight"
    FETCHING = "fetching"
    VERIFYING = "verifying"
    WAITING_MEMORY = "waiting_memory"
    LOADING = "loading"
    WARMING = "warming"
    READY = "ready"
    DEGRADED = "degraded"
    DRAINING = "draining"
    STOPPING = "stopping"
    FAILED = "failed"
    BLOCKED = "blocked"


SERVING = frozenset({State.READY, State.DEGRADED})
TERMINAL = frozenset({State.FAILED, State.BLOCKED})


@dataclass(frozen=True)
class Status:
    """A moment of the appliance.

    Attributes:
        state: where the controller is.
        reason: why, as a code.
        message: why, as a sentence.
        hint: what a person can do about it.
        phase: the step within the state, in words.
        percent: of the whole start, 0 to 100.
        eta_s: expected time to ready, in seconds; None where unknown.
        since: when the state was entered, Unix time in seconds.
        profile: name of the profile.
        model: what it serves.
        run_id: of the engine's current run; empty without one.
        manifest: digest of the exact bits that are served; empty before they are known.
        proven: digest for which the canary passed; empty if for none.
        speed: what decoding reached last, e.g. "38.2 tok/s, 71 % of what this memory allows"; empty before.
        memory_bytes: what the engine holds of the machine's memory, as far as it is known; 0 without one.
        memory_peak_bytes: the most it has held in this run.
        engine_pid: process id of the engine; None without one.
        restarts: engine restarts within the budget's window.
        restarts_left: how many the budget still allows.
        last_log: of the last engine that failed: the line that says why, if one does, then its last ones.
    """

    state: State = State.STOPPED
    reason: Reason = Reason.OK
    message: str = ""
    hint: str = ""
    phase: str = ""
    percent: int = 0
    eta_s: float | None = None
    since: float = 0.0
    profile: str = ""
    model: str = ""
    run_id: str = ""
    manifest: str = ""
    proven: str = ""
    speed: str = ""
    memory_bytes: int = 0
    memory_peak_bytes: int = 0
    engine_pid: int | None = None
    restarts: int = 0
    restarts_left: int = 0
    last_log: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


NO_ENGINE: dict[str, Any] = {
    "engine_pid": None,
    "run_id": "",
    "speed": "",
    "memory_bytes": 0,
    "memory_peak_bytes": 0,
}
"""Fields of the status that belong to a run."""


@dataclass(frozen=True)
class Event:
    """One thing that happened.

    Attributes:
        id: counts up from 1.
        at: Unix time, in seconds.
        kind: ``state``, ``phase``, ...
        data: what it was, for JSON.
    """

    id: int
    at: float
    kind: str
    data: dict[str, Any]


@dataclass
class Bus:
    """The last events, and those who wait for the next."""

    _events: deque[Event] = field(default_factory=lambda: deque(maxlen=500))
    _count: int = 0
    _news: asyncio.Condition = field(default_factory=asyncio.Condition)
    _waking: set[asyncio.Task[None]] = field(default_factory=set)

    def publish(self, kind: str, **data: Any) -> Event:  # noqa: ANN401  any JSON value
        """Add an event and wake those who follow."""
        self._count += 1
        event = Event(self._count, time.time(), kind, data)
        self._events.append(event)
        task = asyncio.get_running_loop().create_task(self._wake())
        self._waking.add(task)
        task.add_done_callback(self._waking.discard)
        return event

    def after(self, last: int) -> list[Event]:
        """Events newer than the one with id ``last``, as far as they are kept."""
        return [event for event in self._events if event.id > last]

    async def follow(self, last: int = 0) -> AsyncIterator[Event]:
        """Events after ``last``, for ever."""
        while True:
            async with self._news:
                while self._count <= last:
                    await self._news.wait()
            for event in self.after(last):
                last = event.id
                yield event

    async def _wake(self) -> None:
        async with self._news:
            self._news.notify_all()


class StatusBoard:
    """Holds the status; every change of state or phase is an event."""

    def __init__(self, bus: Bus, status: Status, *, was_ready: bool = False) -> None:
        self.bus = bus
        self.now = status
        self.was_ready = was_ready

    def enter(
        self,
        state: State,
        reason: Reason = Reason.OK,
        message: str = "",
        **more: Any,  # noqa: ANN401  fields of Status
    ) -> None:
        """Change state; phase and hint start anew unless given."""
        fresh = {"phase": "", "hint": "", "eta_s": None, **more}
        self.now = replace(
            self.now, state=state, reason=reason, message=message, since=time.time(), **fresh
        )
        self.was_ready = self.was_ready or state is State.READY
        self.bus.publish("state", **self.brief())

    def progress(self, **more: Any) -> None:  # noqa: ANN401  fields of Status
        """Change details within the state."""
        before = (self.now.phase, self.now.percent)
        self.now = replace(self.now, **more)
        if (self.now.phase, self.now.percent) != before:
            self.bus.publish("phase", **self.brief())

    def journal_fields(self) -> dict[str, str]:
        """What every log line carries in systemd's journal."""
        now = self.now
        return {
            "state": now.state,
            "reason": now.reason,
            "run_id": now.run_id,
            "manifest": now.manifest,
            "profile": now.profile,
        }

    def brief(self) -> dict[str, Any]:
        """What an event or a probe says of the status."""
        now = self.now
        return {
            "state": now.state,
            "reason": now.reason,
            "message": now.message,
            "hint": now.hint,
            "phase": now.phase,
            "percent": now.percent,
            "eta_s": now.eta_s,
            "profile": now.profile,
            "run_id": now.run_id,
        }
