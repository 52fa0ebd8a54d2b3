"""What a process group has consumed, and whether a start that logs nothing still moves."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Vitals:
    """What a process group has used.

    Attributes:
        cpu_ticks: CPU time, in clock ticks.
        io_bytes: bytes read and written, cached or not.
        processes: how many live.
    """

    cpu_ticks: int = 0
    io_bytes: int = 0
    processes: int = 0


def members(group: int, proc: Path = Path("/proc")) -> Iterator[tuple[Path, list[str]]]:
    """Folders of the living processes of ``group``, each with the fields of its ``stat`` from the third on."""
    for entry in proc.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # proc(5): the command may hold spaces and brackets, so fields are counted from its closing one.
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(fields[2]) == group:
                yield entry, fields
        except (OSError, ValueError, IndexError):
            continue  # it has ended meanwhile


def read_vitals(group: int, proc: Path = Path("/proc")) -> Vitals:
    """Sum over all living processes of ``group``; processes that end while it reads count as gone."""
    ticks = io_bytes = processes = 0
    for entry, fields in members(group, proc):
        ticks += int(fields[11]) + int(fields[12])
        processes += 1
        try:
            io = dict(line.split(": ") for line in (entry / "io").read_text().splitlines())
            io_bytes += int(io["rchar"]) + int(io["wchar"])
        except (OSError, ValueError):
            continue
    return Vitals(ticks, io_bytes, processes)


@dataclass(frozen=True)
class LoadWatch:
    """Progress of a start, as last seen.

    Attributes:
        vitals: the newest reading.
        lines: log lines so far.
        moved_at: when a line came, bytes moved or processes changed, on the monotonic clock, in seconds.
        computed_at: as ``moved_at``, but CPU time counts too.
    """

    vitals: Vitals
    lines: int
    moved_at: float
    computed_at: float


_IDLE_TICKS = 2  # a sleeping vLLM still polls: about 1 % of a core between readings a second apart
_POLL_BYTES = 4096
_COMPUTE_ALLOWANCE = 10


def watch(before: LoadWatch | None, vitals: Vitals, lines: int, now: float) -> LoadWatch:
    """``before`` after one more reading."""
    if before is None:
        return LoadWatch(vitals, lines, now, now)
    moved = (
        lines != before.lines
        or vitals.processes != before.vitals.processes
        or vitals.io_bytes - before.vitals.io_bytes > _POLL_BYTES
    )
    computed = moved or vitals.cpu_ticks - before.vitals.cpu_ticks > _IDLE_TICKS
    return LoadWatch(
        vitals,
        lines,
        now if moved else before.moved_at,
        now if computed else before.computed_at,
    )


def stalled(seen: LoadWatch, now: float, timeout_s: float) -> bool:
    """True when a start has hung.

    Nothing at all for ``timeout_s``, or nothing but CPU time for ten times as long: compiling and kernel tuning are
    silent and busy for many minutes, a worker that spins on a lock is so for ever.
    """
    return (
        now - seen.computed_at >= timeout_s or now - seen.moved_at >= _COMPUTE_ALLOWANCE * timeout_s
    )
