"""Facts of the machine, from the real one and from stand-ins for /proc and /sys."""

import subprocess
import sys
from pathlib import Path

import pytest
from spark_llm import host
from spark_llm.ledger import GIB


def test_this_machine() -> None:
    """The real machine has memory, some of it available, and a reserve below both."""
    machine = host.machine()
    assert 0 < machine.reserve < machine.available < machine.total


def test_stand_in(tmp_path: Path) -> None:
    """Total and available memory of a Spark are read in bytes; a configured reserve wins."""
    (tmp_path / "meminfo").write_text(
        "MemTotal: 127602688 kB\nMemFree: 1 kB\nMemAvailable: 120000000 kB\n"
    )
    machine = host.machine(proc=tmp_path)
    assert machine.total == 127602688 * 1024
    assert machine.available == 120000000 * 1024
    assert machine.reserve == pytest.approx(15.2 * GIB, rel=0.01)
    assert host.machine(proc=tmp_path, reserve_bytes=5).reserve == 5


@pytest.mark.parametrize(("total", "reserve"), [(16, 2), (61, 7.625), (128, 16), (512, 16)])
def test_reserve_scales(total: int, reserve: float) -> None:
    """An eighth, but no more than 16 GiB."""
    assert host.machine(total_bytes=total * GIB).reserve == reserve * GIB


def test_driver_and_gpu(tmp_path: Path) -> None:
    """Driver version and GPU name are read where NVIDIA's driver puts them; without it both are empty."""
    assert host.driver_version(tmp_path) == host.gpu_name(tmp_path) == ""
    (tmp_path / "sys/module/nvidia").mkdir(parents=True)
    (tmp_path / "sys/module/nvidia/version").write_text("580.159.03\n")
    gpu = tmp_path / "proc/driver/nvidia/gpus/000f:01:00.0"
    gpu.mkdir(parents=True)
    (gpu / "information").write_text("Model: \t\t NVIDIA GB10\nIRQ:   \t\t 71\n")
    assert host.driver_version(tmp_path) == "580.159.03"
    assert host.gpu_name(tmp_path) == "NVIDIA GB10"
    assert host.memory_bandwidth(tmp_path) == (273e9, "nominal for GB10")


def test_power_is_a_number_or_unknown() -> None:
    """Without NVML the power is unknown, never an error."""
    power = host.gpu_power_w()
    assert power is None or power > 0


def test_copy_moves_bytes() -> None:
    """The copy test gives a rate that any memory reaches and none exceeds."""
    assert 1e8 < host.measure_copy(2**23) < 1e13


def test_copy_is_measured_once(tmp_path: Path) -> None:
    """Each canary asks for the bandwidth; only the first of a process pays for it."""
    host.measure_copy.cache_clear()
    assert host.memory_bandwidth(tmp_path) == host.memory_bandwidth(tmp_path)
    assert host.measure_copy.cache_info().misses == 1


def test_copy_takes_as_much_memory_on_any_machine() -> None:
    """The copies of many cores together stay within 256 MiB beside an engine."""
    code = """if True:
        import os
        from pathlib import Path
        from spark_llm import host

        def most() -> int:
            return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

        os.sched_getaffinity = lambda _: range(12)
        before = most()
        host.measure_copy(rounds=1)
        print(most() - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert 200 * 1024 < int(done.stdout) < 300 * 1024  # in kB


def test_dropping_keeps_the_files(tmp_path: Path) -> None:
    """Dropping cached pages changes nothing in the files."""
    (tmp_path / "a.safetensors").write_bytes(b"x" * 2**20)
    host.drop_page_cache(tmp_path)
    assert (tmp_path / "a.safetensors").read_bytes() == b"x" * 2**20
