"""How much memory there is, and how hard it is to get: /proc, added up. Standard library only, for the guard.

What is free is more than ``MemFree`` and ``MemAvailable`` say. Since Linux 6.7 a process that ends leaves its pages on
per-CPU lists, an eighth of the memory in all, which those counters leave out and the kernel takes back some 8 MB a
second and CPU: by that, 15 GiB of a Spark for a minute and a half after an engine has ended. An allocation gets them
at once (Linux commits 90b41691b988, 51a755c56dc0 and 57c0419c5f0e), so they are counted here.
"""

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_LISTED = re.compile(rb"^\s+count:\s+(\d+)$", re.MULTILINE)
_CHUNK = 65536


@dataclass(frozen=True)
class Memory:
    """The machine's memory, in bytes.

    Attributes:
        total: ``MemTotal``.
        available: ``MemAvailable`` and the pages on per-CPU lists: what can be had without swapping.
        free: ``MemFree`` and those pages: what holds nothing, not even page cache.
    """

    total: int
    available: int
    free: int


@dataclass(frozen=True)
class Reading:
    """One look at the machine.

    Attributes:
        at: monotonic clock, in seconds.
        available: see :class:`Memory`.
        free: see :class:`Memory`.
        stalled: share of the last 10 s in which every task waited for memory, 0 to 1 (PSI ``full avg10``).
    """

    at: float
    available: int
    free: int
    stalled: float = 0.0


class Meters:
    """The files of /proc, held open: opening them later may need memory that is gone.

    Args:
        folder: stands in for /proc in tests.
    """

    def __init__(self, folder: Path = _PROC) -> None:
        self._meminfo = os.open(folder / "meminfo", os.O_RDONLY)
        self._zoneinfo = _optional(folder / "zoneinfo")
        self._pressure = _optional(folder / "pressure" / "memory")

    def close(self) -> None:
        """Let go of the files."""
        for file in (self._meminfo, self._zoneinfo, self._pressure):
            if file >= 0:
                os.close(file)

    def memory(self) -> Memory:
        """The memory now."""
        return memory(_content(self._meminfo), _content(self._zoneinfo), os.sysconf("SC_PAGE_SIZE"))

    def read(self) -> Reading:
        """The machine now."""
        now = self.memory()
        stalled = parse_full_avg10(_content(self._pressure))
        return Reading(time.monotonic(), now.available, now.free, stalled)


def _optional(path: Path) -> int:
    """A file that a kernel may lack (PSI switched off) or a container hide; -1 then."""
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        return -1
    try:
        os.pread(file, 1, 0)
    except OSError:
        os.close(file)
        return -1
    return file


def _content(file: int) -> bytes:
    """All of it; nothing for -1. With several NUMA nodes /proc/zoneinfo comes in pieces."""
    content = b""
    while file >= 0 and (piece := os.pread(file, _CHUNK, len(content))):
        content += piece
    return content


def memory(meminfo: bytes, zoneinfo: bytes, page_bytes: int) -> Memory:
    """The memory that /proc/meminfo and /proc/zoneinfo tell of; an empty ``zoneinfo`` adds nothing.

    Raises:
        KeyError: the kernel has no ``MemAvailable`` (before 3.14).
    """
    fields = parse_meminfo(meminfo)
    total = fields["MemTotal"]
    listed = page_bytes * sum(int(pages) for pages in _LISTED.findall(zoneinfo))
    # A container may see its own share in meminfo and the whole host's zones.
    return Memory(
        total, min(total, fields["MemAvailable"] + listed), min(total, fields["MemFree"] + listed)
    )


def parse_meminfo(raw: bytes) -> dict[str, int]:
    """Fields of /proc/meminfo in bytes."""
    values = {}
    for line in raw.splitlines():
        name, _, rest = line.partition(b":")
        words = rest.split()
        if words:
            values[name.decode()] = int(words[0]) * (1024 if len(words) > 1 else 1)
    return values


def parse_full_avg10(raw: bytes) -> float:
    """``full avg10`` of a PSI file as a share, 0 to 1; 0 where it is missing."""
    for line in raw.splitlines():
        if line.startswith(b"full avg10="):
            return float(line.split()[1].removeprefix(b"avg10=")) / 100
    return 0.0
