"""The memory guard: a process of its own that kills the engine before the host wedges.

Run as ``python -m spark_llm.guard``. On a machine whose GPU memory is its main memory, overrunning
it freezes the whole host without an out-of-memory kill (NVIDIA/open-gpu-kernel-modules#1358), and
``MemoryMax=`` does not bound the GPU's share. So a small process, locked into memory and using the
standard library only, reads /proc (meters.py) four times a second and

* reports ``soft`` when memory runs low: the gateway then stops admitting requests;
* reports ``hard`` and kills the engine, and nothing else, when two readings in a row are below
  the hard floor.

It says so in JSON lines on stdout and, for a controller that was restarted meanwhile, in ``--report
FILE``. It ends when the engine is gone; with ``--follow``, as a service of its own, it outlives the
controller and waits for the next engine. One that a controller started (``--controller``) ends the whole
engine when that controller is gone: the engine's first process is killed by the kernel then, but a worker
that asks for no signal at its parent's death would serve on, with nobody to stop it.
"""

import argparse
import contextlib
import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn, Protocol

from spark_llm.meters import Meters, Reading

GIB = 2**30
POLL_S = 0.25
"""One sample of 3 s has hidden a fall of 7.4 GiB (gb10-services): poll fast, it costs three small reads."""
_OOM_SCORE_ADJ = "-900"
CALM_S = 5.0
"""A soft alarm ends when every reading of this time was above ``resume_bytes``, in seconds."""


@dataclass(frozen=True)
class Floors:
    """The limits, in bytes unless said otherwise.

    Attributes:
        soft: stop admitting below this much available memory.
        hard: kill below this much available memory.
        free: kill below this much free memory too, if ``soft`` is crossed as well: page cache alone
            makes free memory low.
        horizon_s: a fall that would reach ``hard`` within this many seconds counts as ``soft``.
        stalled: PSI share that counts as ``soft``.
    """

    soft: int
    hard: int
    free: int
    horizon_s: float = 3.0
    stalled: float = 0.2

    @property
    def resume_bytes(self) -> int:
        """Available memory at which admitting resumes: a fifth above ``soft``, so that it does not flap."""
        return self.soft + self.soft // 5


def floors_for(total: int) -> Floors:
    """Default floors for a machine of ``total`` bytes: 12, 6 and 1.5 GiB on a 128 GB machine, in proportion below.

    The field disagrees on floors (5 GiB was too late for gb10-services, 6 GiB held for MiaAI);
    these have not been tried on a 64 GB machine.
    """
    return Floors(
        soft=min(12 * GIB, total // 10),
        hard=min(6 * GIB, total // 20),
        free=min(3 * GIB // 2, total // 80),
    )


@dataclass(frozen=True)
class State:
    """What the guard remembers.

    Attributes:
        level: ``ok``, ``soft`` or ``hard``.
        below: readings in a row below the hard floor.
        calm: readings in a row well above the soft floor.
        last: the newest reading.
    """

    level: str = "ok"
    below: int = 0
    calm: int = 0
    last: Reading | None = None


def step(state: State, seen: Reading, floors: Floors) -> State:
    """State after one more reading. ``hard`` is final: the engine is killed and this guard is done."""
    if state.level == "hard":
        return state
    critical = seen.available < floors.hard or (
        seen.free < floors.free and seen.available < floors.soft
    )
    below = state.below + 1 if critical else 0
    if below >= 2:  # noqa: PLR2004  one sample alone may be a dip
        return State("hard", below, 0, seen)
    if (
        critical
        or seen.available < floors.soft
        or seen.stalled > floors.stalled
        or _plunging(state.last, seen, floors)
    ):
        return State("soft", below, 0, seen)
    calm = state.calm + 1 if seen.available >= floors.resume_bytes else 0
    level = "soft" if state.level == "soft" and calm * POLL_S < CALM_S else "ok"
    return State(level, 0, calm, seen)


def _plunging(last: Reading | None, seen: Reading, floors: Floors) -> bool:
    if last is None or seen.at <= last.at:
        return False
    rate = (last.available - seen.available) / (seen.at - last.at)
    return rate > 0 and (seen.available - floors.hard) / rate < floors.horizon_s


class Target(Protocol):
    """What is killed."""

    def alive(self) -> bool:
        """Whether anything of it is left."""

    def kill(self) -> None:
        """SIGKILL, no grace."""


class Cgroup:
    """A cgroup v2 folder; its files are opened now, since opening them later may need memory that is gone."""

    def __init__(self, folder: Path) -> None:
        self._events = os.open(folder / "cgroup.events", os.O_RDONLY)
        self._kill = os.open(folder / "cgroup.kill", os.O_WRONLY)

    def close(self) -> None:
        """Let go of its files."""
        os.close(self._events)
        os.close(self._kill)

    def alive(self) -> bool:
        """Whether a process is left in it."""
        try:
            return b"populated 1" in os.pread(self._events, 256, 0)
        except OSError:
            return False

    def kill(self) -> None:
        """SIGKILL to all of it at once."""
        with contextlib.suppress(OSError):
            os.write(self._kill, b"1")


class ProcessGroup:
    """A process group. Its number cannot be given to others while a member lives."""

    def __init__(self, group: int) -> None:
        self._group = group

    def alive(self) -> bool:
        """Whether a member is left; a zombie counts until its parent reaps it."""
        try:
            os.killpg(self._group, 0)
        except OSError:
            return False
        return True

    def kill(self) -> None:
        """SIGKILL to every member."""
        with contextlib.suppress(OSError):
            os.killpg(self._group, signal.SIGKILL)


def watch(
    target: Target,
    floors: Floors,
    read: Callable[[], Reading],
    pause: Callable[[], None],
    tell: Callable[[State], None],
) -> Iterator[State]:
    """Guard ``target`` until it is gone; yields the state after each change of level.

    ``tell`` is called before a kill, so that whoever sees the engine die can already know why.
    """
    state = State()
    while target.alive():
        level = state.level
        state = step(state, read(), floors)
        if state.level != level:
            tell(state)
        if state.level == "hard":
            target.kill()
        if state.level != level:
            yield state
        pause()


def follow(folder: Path, floors: Floors, meters: Meters, report: Path | None) -> NoReturn:
    """Guard every engine that comes to live in the cgroup ``folder``; the cgroup may come and go."""
    from spark_llm import notify  # noqa: PLC0415  only a service needs it

    notifier = notify.connect()

    def pause() -> None:
        notifier.tick()
        time.sleep(POLL_S)

    notifier.ready()
    while True:
        with contextlib.suppress(OSError), contextlib.closing(Cgroup(folder)) as target:
            for state in watch(target, floors, meters.read, pause, _tell):
                _record(_line(state), report)
        pause()


def _lock_memory() -> dict[str, bool]:
    """Keep this process resident and last in line for the OOM killer; says what was allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    mcl_current, mcl_future = 1, 2
    locked = libc.mlockall(mcl_current | mcl_future) == 0
    try:
        Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE_ADJ, encoding="ascii")
        adjusted = True
    except OSError:  # needs CAP_SYS_RESOURCE; under systemd OOMScoreAdjust= does it
        adjusted = False
    return {"mlockall": locked, "oom_score_adj": adjusted}


def _line(state: State) -> str:
    return json.dumps({"level": state.level, **(asdict(state.last) if state.last else {})})


def _tell(state: State) -> None:
    _write(_line(state))


def _write(line: str) -> None:
    """To the controller. Never blocks: one that hangs or is gone must not keep a kill waiting."""
    with contextlib.suppress(OSError):
        os.write(sys.stdout.fileno(), line.encode() + b"\n")


def _record(line: str, report: Path | None) -> None:
    """For a controller that was restarted meanwhile. A file may need memory, so this comes after a kill."""
    if report is None:
        return
    with contextlib.suppress(OSError):
        temporary = report.with_suffix(".new")
        temporary.write_text(line, encoding="utf-8")
        temporary.replace(report)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="spark_llm.guard", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--cgroup", type=Path, help="cgroup v2 folder of the engine")
    what.add_argument("--process-group", type=int, help="process group of the engine")
    parser.add_argument("--soft-bytes", type=int, help="default: from the machine's size")
    parser.add_argument("--hard-bytes", type=int, help="default: from the machine's size")
    parser.add_argument("--free-bytes", type=int, help="default: from the machine's size")
    parser.add_argument("--follow", action="store_true", help="with --cgroup: never end")
    parser.add_argument(
        "--controller", type=int, help="parent of this process; the engine ends with it"
    )
    parser.add_argument("--report", type=Path, help="file that holds the last line")
    parser.add_argument("--proc", type=Path, default=Path("/proc"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Guard one engine until it is gone; exit status 1 if it had to be killed."""
    arguments = _arguments(argv)
    # The controller's ^C or stop is not the guard's: it goes when the engine goes.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if os.sched_getscheduler(0) == os.SCHED_BATCH:  # the controller's, who may wait for a core
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    meters = Meters(arguments.proc)
    default = floors_for(meters.memory().total)
    floors = Floors(
        soft=default.soft if arguments.soft_bytes is None else arguments.soft_bytes,
        hard=default.hard if arguments.hard_bytes is None else arguments.hard_bytes,
        free=default.free if arguments.free_bytes is None else arguments.free_bytes,
    )
    if not sys.stdout.isatty():  # a terminal is shared with the shell
        os.set_blocking(sys.stdout.fileno(), False)
    first = json.dumps({"level": "ok", **_lock_memory(), **asdict(floors)})
    _write(first)
    _record(first, arguments.report)
    if arguments.follow:
        if arguments.cgroup is None:
            sys.exit("spark_llm.guard: --follow needs --cgroup")
        follow(arguments.cgroup, floors, meters, arguments.report)
    target: Target = (
        Cgroup(arguments.cgroup) if arguments.cgroup else ProcessGroup(arguments.process_group)
    )

    def pause() -> None:
        if arguments.controller not in {None, os.getppid()}:
            target.kill()
        time.sleep(POLL_S)

    killed = False
    for state in watch(target, floors, meters.read, pause, _tell):
        killed = killed or state.level == "hard"
        _record(_line(state), arguments.report)
    return 1 if killed else 0


if __name__ == "__main__":
    sys.exit(main())
