"""How much memory there is, by the real /proc and by what other kernels and containers show."""

import subprocess
import sys
from contextlib import closing
from pathlib import Path
from statistics import median

from spark_llm.meters import Memory, Meters, memory, parse_full_avg10, parse_meminfo

MEMINFO = b"MemTotal: 1000 kB\nMemFree: 300 kB\nMemAvailable: 500 kB\n"
ZONEINFO = b"""Node 0, zone   Normal
  pages free     75
        high     10
  pagesets
    cpu: 0
              count:    20
              high:     30
              batch:    3
              high_min: 6
              high_max: 240
    cpu: 1
              count:    5
              high:     30
"""


def test_this_machine() -> None:
    """The real /proc is read: less is available than there is in total, and no more is free than is available."""
    with closing(Meters()) as meters:
        now = meters.memory()
        reading = meters.read()
    assert 0 < now.free <= now.available < now.total
    assert 0 < reading.available < now.total
    assert 0 <= reading.stalled <= 1


def test_ended_program_gives_back_at_once() -> None:
    """Memory of a program that has ended counts as available with the next look, wherever the kernel keeps it."""
    size = 2**30
    with closing(Meters()) as meters:
        # Neighbours take and give back memory too, some hundred MB at a time.
        rises = [min(_given_back(meters, size)) for _ in range(5)]
    assert median(rises) > 0.6 * size


def _given_back(meters: Meters, size: int) -> tuple[int, int]:
    """By how much available and free memory rise when a program with ``size`` bytes ends."""
    code = f"held = bytearray({size}); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as hog:
        assert hog.stdout is not None
        hog.stdout.readline()
        held = meters.memory()
        hog.communicate(b"\n")
    given = meters.memory()
    return given.available - held.available, given.free - held.free


def test_per_cpu_lists_count() -> None:
    """Pages on per-CPU lists are available and free; limits of those lists are not counted."""
    assert memory(MEMINFO, ZONEINFO, 4096) == Memory(1_024_000, 614_400, 409_600)
    assert memory(MEMINFO, b"", 4096) == Memory(1_024_000, 512_000, 307_200)


def test_never_more_than_there_is() -> None:
    """A container that sees its own share beside the whole host's lists has no more than its share."""
    assert memory(MEMINFO, ZONEINFO, 65536) == Memory(1_024_000, 1_024_000, 1_024_000)


def test_files_that_a_kernel_lacks(tmp_path: Path) -> None:
    """Without PSI and without /proc/zoneinfo the rest is read."""
    (tmp_path / "meminfo").write_bytes(MEMINFO)
    with closing(Meters(tmp_path)) as meters:
        reading = meters.read()
    assert (reading.available, reading.free, reading.stalled) == (512_000, 307_200, 0)


def test_parsers() -> None:
    """Both formats are parsed as the kernel documents them."""
    assert parse_meminfo(b"MemTotal:  100 kB\nHugePages_Total:   3\n") == {
        "MemTotal": 102400,
        "HugePages_Total": 3,
    }
    assert parse_full_avg10(b"some avg10=1.00 a\nfull avg10=25.50 avg60=0.00\n") == 0.255
