"""What an engine really holds in memory: its processes' own pages, and what the driver says they have on the GPU."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from spark_llm import host
from spark_llm.vitals import members


@dataclass(frozen=True)
class Footprint:
    """Memory of a process group, in bytes.

    Attributes:
        processes: anonymous and shared-memory pages, each shared page counted once (PSS). Mapped files are left out:
            they are page cache, which the kernel gives back.
        gpu: device memory of these processes; None where the driver does not say, as in a container with process
            numbers of its own. On a GB10 it is the same memory, and in no process's pages.
    """

    processes: int
    gpu: int | None

    @property
    def size(self) -> int:
        """All that is known of, in bytes."""
        return self.processes + (self.gpu or 0)


def weigh(
    group: int, proc: Path = Path("/proc"), gpu: Mapping[int, int] | None = None
) -> Footprint:
    """What the living processes of ``group`` hold now. Walks their page tables: call it from a thread.

    Args:
        group: number of the process group.
        proc: stands in for /proc in tests.
        gpu: device memory by process; None asks the driver.
    """
    device = host.gpu_processes() if gpu is None else gpu
    size = 0
    on_gpu: int | None = None
    for entry, _ in members(group, proc):
        if (held := device.get(int(entry.name))) is not None:
            on_gpu = (on_gpu or 0) + held
        with contextlib.suppress(OSError):  # it has ended, or may not be looked into
            size += _own_pages((entry / "smaps_rollup").read_text(encoding="ascii"))
    return Footprint(size, on_gpu)


def _own_pages(rollup: str) -> int:
    """``Pss_Anon`` and ``Pss_Shmem`` of /proc/PID/smaps_rollup (Linux ≥ 5.9), in bytes."""
    fields = (line.split() for line in rollup.splitlines())
    return sum(
        int(words[1]) * 1024
        for words in fields
        if words and words[0] in {"Pss_Anon:", "Pss_Shmem:"}
    )
