"""The memory guard: its decision on recorded and invented series, and for real against a memory hog."""

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from spark_llm.guard import (
    GIB,
    POLL_S,
    Floors,
    State,
    floors_for,
    step,
    watch,
)
from spark_llm.meters import Meters, Reading

SPARK = floors_for(int(121.69 * GIB))
RECORDED = Path(__file__).parent / "data" / "meminfo_hog.csv"


def series(available: Sequence[float], free: Sequence[float] | None = None) -> list[Reading]:
    """Readings 250 ms apart, from GiB."""
    free = free or [20.0] * len(available)
    return [
        Reading(index * POLL_S, int(a * GIB), int(f * GIB))
        for index, (a, f) in enumerate(zip(available, free, strict=True))
    ]


def levels(readings: list[Reading], floors: Floors = SPARK) -> list[str]:
    state = State()
    seen = []
    for reading in readings:
        state = step(state, reading, floors)
        seen.append(state.level)
    return seen


SERIES = [
    ("calm", series([60, 60, 60]), ["ok", "ok", "ok"]),
    ("low", series([11, 11]), ["soft", "soft"]),
    ("a dip of one sample is no kill", series([60, 5, 60]), ["ok", "soft", "soft"]),
    ("two samples below the floor kill", series([20, 5, 5]), ["ok", "soft", "hard"]),
    ("hard is final", series([5, 5, 60]), ["soft", "hard", "hard"]),
    # the fall of 7.4 GiB inside 3 s that a slower guard slept through
    ("a plunge is seen coming", series([30, 24, 18]), ["ok", "soft", "soft"]),
    ("a slow fall far above the floor is none", series([60, 59.8, 59.6]), ["ok", "ok", "ok"]),
    ("page cache makes free memory low", series([60, 60], [0.2, 0.2]), ["ok", "ok"]),
    ("no free memory and little available", series([10, 10], [1, 1]), ["soft", "hard"]),
]


@pytest.mark.parametrize(
    ("readings", "expected"), [row[1:] for row in SERIES], ids=[row[0] for row in SERIES]
)
def test_levels(readings: list[Reading], expected: list[str]) -> None:
    """The level after each reading is the one the floors ask for."""
    assert levels(readings) == expected


def test_stall_is_soft() -> None:
    """Memory pressure above the limit stops admission even with memory left."""
    reading = replace(series([60])[0], stalled=0.5)
    assert step(State(), reading, SPARK).level == "soft"


def test_alarm_ends_after_calm() -> None:
    """Admission resumes after five seconds well above the floor, not at the first reading above it."""
    seen = levels(series([11] + [60] * 25))
    assert seen.index("ok") == 20
    assert levels(series([11] + [12.5] * 40))[-1] == "soft", "just above the floor is not calm"


@given(st.lists(st.floats(0, 121), min_size=2, max_size=60))
def test_kill_needs_two_readings_below_the_floor(available: list[float]) -> None:
    """No series without two neighbours below the hard floor ever kills, and every one with them does."""
    readings = series(available)
    below = [reading.available < SPARK.hard for reading in readings]
    assert ("hard" in levels(readings)) == any(a and b for a, b in pairwise(below))


@pytest.mark.parametrize("gib", [8, 16, 24, 60, 121.69, 512])
def test_floors_scale(gib: float) -> None:
    """Floors grow with the machine up to those of 128 GB, and keep their order."""
    floors = floors_for(int(gib * GIB))
    assert 0 < floors.free < floors.hard < floors.soft <= 12 * GIB
    assert floors.hard <= 6 * GIB


def recorded() -> tuple[int, list[Reading]]:
    lines = RECORDED.read_text().splitlines()
    total = int(lines[0].split()[2]) * 1024
    return total, [
        Reading(
            float(row["at_s"]),
            int(row["available_kb"]) * 1024,
            int(row["free_kb"]) * 1024,
            float(row["full_avg10"]) / 100,
        )
        for row in csv.DictReader(lines[1:])
    ]


def test_recorded_series_under_default_floors() -> None:
    """Four of 24 GiB taken and given back by a program is no reason to do anything."""
    total, readings = recorded()
    assert set(levels(readings, floors_for(total))) == {"ok"}


def test_recorded_series_under_tight_floors() -> None:
    """With floors inside the recorded fall, admission stops before the kill, in that order."""
    _, readings = recorded()
    top, bottom = max(r.available for r in readings), min(r.available for r in readings)
    floors = Floors(soft=(top + bottom) // 2, hard=bottom + (top - bottom) // 5, free=0)
    seen = levels(readings, floors)
    assert seen.index("ok") < seen.index("soft") < seen.index("hard")


# It may take 4 GiB at most, so that a broken guard cannot hurt the machine that runs the tests.
HOG = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
blocks = []
for _ in range(int(sys.argv[1])):
    block = bytearray(64 << 20)
    block[::4096] = b"x" * len(block[::4096])
    blocks.append(block)
    print(len(blocks), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    """A process that must survive."""
    with subprocess.Popen(["sleep", "300"], start_new_session=True) as process:
        yield process
        process.kill()


def run_guard(target: list[str], report: Path, hard: int) -> subprocess.Popen[str]:
    arguments = [
        *target,
        "--soft-bytes",
        str(hard + 2**27),
        "--hard-bytes",
        str(hard),
        "--free-bytes",
        "0",
    ]
    return subprocess.Popen(
        [sys.executable, "-m", "spark_llm.guard", *arguments, "--report", report],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_real_hog_is_killed_and_nothing_else(
    tmp_path: Path, bystander: subprocess.Popen[bytes]
) -> None:
    """A program that eats memory below the floor dies by SIGKILL within its group; others live; both reports say so."""
    hard = Meters().read().available - 768 * 2**20
    hog = subprocess.Popen(
        [sys.executable, "-c", HOG, "48"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    guard = run_guard(["--process-group", str(hog.pid)], tmp_path / "report.json", hard)
    assert hog.stdin
    assert hog.stdout
    assert guard.stdout
    assert hog.wait(timeout=60) == -signal.SIGKILL
    said = [json.loads(line) for line in guard.stdout]
    assert guard.wait(timeout=10) == 1
    assert [line["level"] for line in said][-1] == "hard"
    assert said[-1]["available"] < hard
    assert json.loads((tmp_path / "report.json").read_text()) == said[-1]
    assert bystander.poll() is None
    hog.stdin.close()
    hog.stdout.close()
    guard.stdout.close()


class Recorder:
    """A target that notes what happens to it."""

    def __init__(self, events: list[str]) -> None:
        self.events = events

    def alive(self) -> bool:
        return "kill" not in self.events

    def kill(self) -> None:
        self.events.append("kill")


def test_reason_is_told_before_the_kill() -> None:
    """Whoever sees the engine die can already have read why."""
    events: list[str] = []
    readings = iter(series([20, 5, 5]))
    states = watch(
        Recorder(events),
        SPARK,
        lambda: next(readings),
        lambda: None,
        lambda s: events.append(s.level),
    )
    assert [state.level for state in states] == ["soft", "hard"]
    assert events == ["soft", "hard", "kill"]


def test_hanging_controller_does_not_keep_a_kill_waiting(tmp_path: Path) -> None:
    """With nobody reading and its pipe full, the guard kills all the same."""
    engine = subprocess.Popen(["sleep", "300"], start_new_session=True)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writing, b"x" * 4096)
    os.set_blocking(writing, True)
    guard = subprocess.Popen(
        [
            *(sys.executable, "-m", "spark_llm.guard", "--process-group", str(engine.pid)),
            *("--hard-bytes", str(2**60), "--report", tmp_path / "report.json"),
        ],
        stdout=writing,
        start_new_session=True,
    )
    assert engine.wait(timeout=10) == -signal.SIGKILL
    assert guard.wait(timeout=10) == 1
    os.close(reading)
    os.close(writing)


def test_guard_ends_with_its_engine(tmp_path: Path) -> None:
    """A guard whose engine ends by itself ends too, without having killed anything."""
    engine = subprocess.Popen(["sleep", "300"], start_new_session=True)
    guard = run_guard(["--process-group", str(engine.pid)], tmp_path / "report.json", 1)
    assert guard.stdout
    assert json.loads(guard.stdout.readline())["level"] == "ok"
    engine.terminate()
    engine.wait(timeout=10)
    assert guard.wait(timeout=10) == 0
    guard.stdout.close()


def test_guard_outlives_a_closed_pipe(tmp_path: Path) -> None:
    """With its controller gone and its pipe closed, the guard still kills."""
    engine = subprocess.Popen(["sleep", "300"], start_new_session=True)
    guard = run_guard(["--process-group", str(engine.pid)], tmp_path / "report.json", 2**60)
    assert guard.stdout
    guard.stdout.close()
    assert engine.wait(timeout=10) == -signal.SIGKILL
    assert guard.wait(timeout=10) == 1
    assert json.loads((tmp_path / "report.json").read_text())["level"] == "hard"


def cgroup2() -> Path | None:
    """A place where this user may make a cgroup, if there is one."""
    for line in Path("/proc/mounts").read_text().splitlines():
        _, path, kind, *_ = line.split()
        if kind == "cgroup2" and os.access(path, os.W_OK):
            return Path(path)
    return None


@pytest.mark.skipif(cgroup2() is None, reason="no cgroup v2 that this user may write")
def test_whole_cgroup_is_killed(tmp_path: Path) -> None:
    """Processes that left the engine's process group die with it when it has a cgroup."""
    root = cgroup2()
    assert root is not None
    folder = root / f"spark-llm-test-{os.getpid()}"
    folder.mkdir()
    try:
        engine, worker = (
            subprocess.Popen(["sleep", "300"], start_new_session=True) for _ in range(2)
        )
        for process in (engine, worker):
            (folder / "cgroup.procs").write_text(str(process.pid))
        guard = run_guard(["--cgroup", str(folder)], tmp_path / "report.json", 2**60)
        assert guard.stdout
        assert engine.wait(timeout=10) == worker.wait(timeout=10) == -signal.SIGKILL
        assert guard.wait(timeout=10) == 1
        guard.stdout.close()
    finally:
        folder.rmdir()


def test_guard_is_small() -> None:
    """The guard imports its meters and otherwise nothing outside the standard library: little can go wrong in it."""
    code = """
import sys
before = set(sys.modules)
import spark_llm.guard
new = set(sys.modules) - before
print(*sorted(name for name in new if name.partition(".")[0] not in sys.stdlib_module_names))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["spark_llm", "spark_llm.guard", "spark_llm.meters"]
