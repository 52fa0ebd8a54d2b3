"""Facts of this machine: memory, driver, GPU, bandwidth. All reading, no deciding."""

import contextlib
import ctypes
import functools
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from spark_llm.kernels import Presence
from spark_llm.ledger import Machine
from spark_llm.meters import Meters
from spark_llm.store.hashing import drop_pages

GB10_BANDWIDTH = 273e9
"""Bytes per second of a GB10's LPDDR5X, nominal (NVIDIA's data sheet). Reads of 231 to 250 GB/s
have been published."""
_ROOT = Path("/")


def machine(
    *,
    reserve_bytes: int = 0,
    total_bytes: int = 0,
    kernels: Presence = Presence.NONE,
    proc: Path = Path("/proc"),
) -> Machine:
    """This machine's memory, for the ledger and the start gate.

    Args:
        reserve_bytes: kept for the host; 0 takes :func:`default_reserve`.
        total_bytes: imagine an idle machine of this size instead; 0 for the real one.
        kernels: whether its engine has ours, see :func:`kernels_of`.
        proc: stands in for /proc in tests.
    """
    if total_bytes:
        total = available = total_bytes
    else:
        with contextlib.closing(Meters(proc)) as meters:
            now = meters.memory()
        total, available = now.total, now.available
    return Machine(total, available, reserve_bytes or default_reserve(total), kernels)


def kernels_of(python: Path, root: Path = _ROOT) -> Presence:
    """Whether the engine that ``python`` runs has our kernels, and a GPU that they are for."""
    if not any((python.parent.parent / "lib").glob("python3*/site-packages/spark_kernels*")):
        return Presence.NONE
    return Presence.GB10 if "GB10" in gpu_name(root) else Presence.OTHER_GPU


def default_reserve(total: int) -> int:
    """What stays free for the host at a start: an eighth, 16 GiB at most.

    16 GiB were crossed in the warm-up of one model on a 128 GB machine (MiaAI DeepSeek-V4#32), so it is no
    luxury; the guard's floors lie below it.
    """
    return min(16 * 2**30, total // 8)


def driver_version(root: Path = _ROOT) -> str:
    """Version of the loaded NVIDIA driver, e.g. ``580.159.03``; empty where none is loaded."""
    try:
        return (root / "sys/module/nvidia/version").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def gpu_name(root: Path = _ROOT) -> str:
    """Name of the first GPU as the driver gives it, e.g. ``NVIDIA GB10``; empty without a driver."""
    for path in sorted((root / "proc/driver/nvidia/gpus").glob("*/information")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name == "Model":
                return value.strip()
    return ""


def gpu_power_w() -> float | None:
    """Draw of the first GPU in watts through NVML; None where there is no NVML or it does not say."""
    with _nvml() as nvml:
        if nvml is None:
            return None
        device = ctypes.c_void_p()
        milliwatts = ctypes.c_uint()
        if nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device)) != 0:
            return None
        if nvml.nvmlDeviceGetPowerUsage(device, ctypes.byref(milliwatts)) != 0:
            return None
        return milliwatts.value / 1000


class _ProcessInfo(ctypes.Structure):
    """``nvmlProcessInfo_t`` of nvml.h."""

    _fields_ = (
        ("pid", ctypes.c_uint),
        ("used", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    )


_NOT_AVAILABLE = 2**64 - 1  # NVML_VALUE_NOT_AVAILABLE
_MOST_PROCESSES = 256


def gpu_processes() -> dict[int, int]:
    """Device memory of each process that computes on the GPUs, in bytes, through NVML; empty where it does not say.

    On a GB10, where NVML does not know the GPU's memory as a whole, it does know this (llama-swap#782).
    """
    found: dict[int, int] = {}
    with _nvml() as nvml:
        count = ctypes.c_uint()
        if nvml is None or not hasattr(nvml, "nvmlDeviceGetComputeRunningProcesses_v3"):
            return found  # drivers before 510
        if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
            return found
        for index in range(count.value):
            device = ctypes.c_void_p()
            size = ctypes.c_uint(_MOST_PROCESSES)
            table = (_ProcessInfo * _MOST_PROCESSES)()
            if (
                nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)) != 0
                or nvml.nvmlDeviceGetComputeRunningProcesses_v3(device, ctypes.byref(size), table)
                != 0
            ):
                continue
            for item in table[: size.value]:
                if item.used != _NOT_AVAILABLE:
                    found[item.pid] = found.get(item.pid, 0) + item.used
    return found


@contextlib.contextmanager
def _nvml() -> Iterator[ctypes.CDLL | None]:
    """The driver's management library, initialised; None without a driver."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        yield None
        return
    if nvml.nvmlInit_v2() != 0:
        yield None
        return
    try:
        yield nvml
    finally:
        nvml.nvmlShutdown()


def memory_bandwidth(root: Path = _ROOT) -> tuple[float, str]:
    """Bytes per second that memory moves, and where the number comes from."""
    if "GB10" in gpu_name(root):
        return GB10_BANDWIDTH, "nominal for GB10"
    return measure_copy(), "copy test on this machine"


@functools.cache
def measure_copy(total: int = 256 * 2**20, rounds: int = 3) -> float:
    """Best of ``rounds`` copies by all cores at once, in bytes read and written per second; takes about 0.1 s.

    It is measured once per process: memory does not change, and each time takes ``total`` of it beside an engine.

    Args:
        total: bytes that all cores together read and write; far above the caches.
        rounds: copies; the first pays for page faults.
    """
    cores = len(os.sched_getaffinity(0))
    size = total // (2 * cores)
    pairs = [((ctypes.c_char * size)(), (ctypes.c_char * size)()) for _ in range(cores)]

    def copy(pair: tuple[ctypes.Array[ctypes.c_char], ctypes.Array[ctypes.c_char]]) -> None:
        ctypes.memmove(pair[0], pair[1], size)  # releases the interpreter lock

    best = 0.0
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(rounds):
            start = time.perf_counter()
            list(pool.map(copy, pairs))
            best = max(best, 2 * size * cores / (time.perf_counter() - start))
    return best


def drop_page_cache(folder: Path) -> None:
    """Let the kernel forget the cached pages of ``folder``'s weights.

    On unified memory the cached copy of a checkpoint takes the place of the loaded one: CUDA then
    reports 2.8 GiB free where 52 GiB are available (vllm#48140). Needs no rights, unlike
    ``drop_caches``; pages that are dirty or mapped stay.
    """
    for path in folder.rglob("*.safetensors"):
        drop_pages(path)
