"""What earlier runs took, and how the ledger learns from it."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from spark_llm import host
from spark_llm.footprint import Footprint, weigh
from spark_llm.high_water import HighWater, Mark, Recording, build_of, key, learned
from spark_llm.ledger import GIB, Ledger, Measured, account
from spark_llm.overhead import overhead
from spark_llm.profile import Engine, Profile, load_profile, shipped_folder
from spark_llm.promises import Promises
from spark_llm.starts import Starts
from spark_llm.switches import adjust

from tests.appliance.service import stub_python, stub_service, wait_for
from tests.appliance.test_ledger import MODEL, PROFILE, SPARK, size

ESTIMATE = account(PROFILE, SPARK, MODEL)
KNOWN = size(ESTIMATE, "weights") + size(ESTIMATE, "KV cache")
LEAST = 17 * GIB + 8 * GIB
MARGIN = overhead(Engine.CUDA).margin_bytes


def _need(measured: int) -> Ledger:
    return account(PROFILE, SPARK, MODEL, Measured(measured, 3))


@pytest.mark.parametrize(
    ("measured", "need"),
    [
        (KNOWN + 4 * GIB, KNOWN + 4 * GIB + MARGIN),  # less than the estimate
        (KNOWN + 40 * GIB, KNOWN + 44 * GIB),  # more: a tenth of the rest is the larger margin
        (KNOWN, KNOWN + MARGIN),
        (LEAST, KNOWN + MARGIN),  # never below weights and KV cache
        (LEAST - 1, ESTIMATE.need_bytes),  # not believed
    ],
)
def test_measurement_takes_the_estimates_place(measured: int, need: int) -> None:
    """The need is what was measured and a margin, above what is unavoidable; an impossible measurement is not used."""
    assert _need(measured).need_bytes == need


def test_ledger_names_the_measurement() -> None:
    """The line says how often it was measured and what the estimate was; the rest of the table stays."""
    ledger = _need(KNOWN + 4 * GIB)
    assert [line.name for line in ledger.lines] == ["weights", "KV cache", "all else"]
    assert "measured on this machine, 3 runs" in ledger.lines[-1].source
    assert "estimated: " in ledger.lines[-1].source
    assert ledger.notes == ()
    assert ledger.gpu_memory_utilization < ESTIMATE.gpu_memory_utilization


def test_impossible_measurement_is_named() -> None:
    """A measurement below weights and KV cache leaves the estimate and is mentioned."""
    ledger = _need(GIB)
    assert ledger.lines == ESTIMATE.lines
    assert "1.0 GiB measured in 3 runs is less than weights and KV cache" in ledger.notes[0]


@pytest.mark.parametrize(
    ("marks", "expected"),
    [
        ([], None),
        ([Mark("a", 5)], Measured(5, 1)),
        ([Mark("a", 5), Mark("b", 7), Mark("c", 6)], Measured(7, 3)),
        ([Mark("a", 90, whole=True), Mark("b", 7)], Measured(7, 1)),
        (
            [Mark("a", 90, whole=True), Mark("b", 7, whole=True), Mark("c", 8, whole=True)],
            Measured(8, 3, whole=True),
        ),
    ],
)
def test_marks_are_read_together(marks: list[Mark], expected: Measured | None) -> None:
    """The highest of what was the engine's own counts; of falls of available memory, the middle one."""
    assert learned(marks) == expected


def _changed(**update: object) -> Profile:
    return PROFILE.model_copy(update=update)


@pytest.mark.parametrize(
    ("profile", "same"),
    [
        (_changed(name="x", description="y", aliases=("z",)), True),
        (_changed(context=16384), False),
        (_changed(max_num_seqs=5), False),
        (_changed(kv_cache_bytes=9 * GIB), False),
        (_changed(environment={"SPARK_KERNELS": "off"}), False),
        (adjust(PROFILE, debug=True), False),
    ],
)
def test_marks_hold_for_equal_profiles(profile: Profile, same: bool) -> None:
    """A mark counts for every profile that takes the same memory, whatever its name, and for no other."""
    assert (key(profile) == key(PROFILE)) == same


@pytest.fixture
def marks(tmp_path: Path) -> HighWater:
    """An empty record."""
    return HighWater(tmp_path / "high-water.json")


def test_marks_are_kept(marks: HighWater, tmp_path: Path) -> None:
    """The newest mark of each of the newest five runs counts, also for the next process."""
    for index in range(7):
        marks.remember(PROFILE, "build", Mark(str(index), 100 - index))
    marks.remember(PROFILE, "build", Mark("6", 96))
    assert HighWater(tmp_path / "high-water.json").recall(PROFILE, "build") == (
        Measured(98, 5),
        "",
    )
    assert marks.recall(_changed(context=16384), "build") == (None, "")


def test_marks_of_another_build_are_not_used(marks: HighWater) -> None:
    """After the engine, kernels or driver changed, old marks are left out with a word, then replaced."""
    marks.remember(PROFILE, "old", Mark("a", 5))
    measured, word = marks.recall(PROFILE, "new")
    assert measured is None
    assert "another engine" in word
    marks.remember(PROFILE, "new", Mark("b", 6))
    assert marks.recall(PROFILE, "new") == (Measured(6, 1), "")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "7",
        '{"format": 1}',
        '{"format": 9, "profiles": {}}',
        '{"format": 1, "profiles": {"KEY": {"build": "build", "runs": [{"run": "a"}]}}}',
        '{"format": 1, "profiles": {"KEY": {"build": "build", "runs": [{"run": "a", "size": "9", "whole": 0}]}}}',
        '{"format": 1, "profiles": {"KEY": {"build": "build", "runs": [{"run": "a", "size": -9, "whole": 0}]}}}',
        '{"format": 1, "profiles": {"KEY": 3}}',
    ],
)
def test_corrupt_record_is_ignored(marks: HighWater, tmp_path: Path, text: str) -> None:
    """A record that cannot be read costs the measurement, with a word, and is written anew by the next run."""
    (tmp_path / "high-water.json").write_text(text.replace("KEY", key(PROFILE)))
    measured, word = marks.recall(PROFILE, "build")
    assert measured is None
    assert "not used" in word
    marks.remember(PROFILE, "build", Mark("a", 5))
    assert marks.recall(PROFILE, "build") == (Measured(5, 1), "")


def test_record_that_cannot_be_written_is_harmless(tmp_path: Path) -> None:
    """Without its folder nothing is kept and nothing is raised."""
    marks = HighWater(tmp_path / "none" / "high-water.json")
    marks.remember(PROFILE, "build", Mark("a", 5))
    assert marks.recall(PROFILE, "build") == (None, "")


def test_engines_beside_each_other_keep_each_others_marks(tmp_path: Path) -> None:
    """Writes that come at once, from the threads of several engines, lose nothing that another has written."""
    profiles = [_changed(context=1024 * (index + 1)) for index in range(8)]
    with ThreadPoolExecutor(8) as threads:
        for profile in profiles:
            mark = Mark("a", profile.context)
            threads.submit(HighWater(tmp_path / "marks").remember, profile, "build", mark)
            threads.submit(Starts(tmp_path / "starts").took, str(profile.context), 2.0)
    marks, starts = HighWater(tmp_path / "marks"), Starts(tmp_path / "starts")
    assert [marks.recall(profile, "build")[0] for profile in profiles] == [
        Measured(profile.context, 1) for profile in profiles
    ]
    assert {starts.expected_s(str(profile.context)) for profile in profiles} == {2.0}


class _Record(HighWater):
    """Says what is written, and in which thread."""

    def __init__(self) -> None:
        self.written: list[tuple[int, bool]] = []

    def remember(self, profile: Profile, build: str, mark: Mark) -> None:
        del profile, build
        self.written.append((mark.size, threading.current_thread() is threading.main_thread()))


@pytest.mark.anyio
async def test_mark_is_written_as_it_grows_beside_the_event_loop() -> None:
    """The first mark and each that grew by 64 MiB are written, in a thread: the disk must not stop the requests."""
    record = _Record()
    recording = Recording(record, PROFILE, "build")
    for taken in (GIB, GIB + 2**20, GIB + 2**26, GIB):
        await recording.note(Mark("a", taken))
    assert record.written == [(GIB, False), (GIB + 2**26, False)]
    await Recording(record, PROFILE, "").note(Mark("a", GIB))
    assert len(record.written) == 2


def test_build_changes_with_the_engine(tmp_path: Path) -> None:
    """The build is empty without an engine, and another one for other files."""
    assert build_of(tmp_path / "bin" / "python") == ""
    python = stub_python(tmp_path)
    before = build_of(python)
    next((tmp_path / "stub").rglob("RECORD")).write_text("changed")
    assert "" != before != build_of(python) != ""


def test_footprint_is_what_a_process_fills() -> None:
    """Pages that a process of the group fills are counted, those it only maps are not."""
    code = (
        "import mmap, sys; filled = bytearray(64 << 20); empty = mmap.mmap(-1, 256 << 20);"
        "print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        found = weigh(process.pid, gpu={process.pid: 5, os.getpid(): 7})
        process.communicate()
    assert 64 << 20 < found.processes < 128 << 20
    assert found.gpu == 5
    assert found.size == found.processes + 5
    assert weigh(process.pid, gpu={}) == Footprint(0, None)


def test_gpu_processes_are_asked_of_the_driver() -> None:
    """Without a driver no process has device memory; with one, each size is a plausible number."""
    found = host.gpu_processes()
    assert bool(host.driver_version()) or found == {}
    assert all(0 <= held < 2**48 for held in found.values())


def test_promises_are_what_was_not_taken_yet() -> None:
    """Others' promises count less what they hold; one that is released, or our own, counts nothing."""
    promises = Promises()
    promises.make("a", 10)
    assert (promises.outstanding("b"), promises.outstanding("a")) == (10, 0)
    promises.took("a", 4)
    promises.make("b", 5)
    assert promises.outstanding("c") == 11
    promises.took("a", 40)
    assert promises.outstanding("c") == 5, "more than was promised is not a promise"
    promises.took("a", 0)
    assert promises.outstanding("c") == 15, "its engine died and will be started again"
    promises.release("a")
    promises.took("a", 3)
    assert promises.outstanding("c") == 5


def test_run_leaves_its_mark(short_path: Path) -> None:
    """A run that became ready is weighed, shown in the status and remembered for the next start."""
    with stub_service(short_path) as running:
        running.listening()
        running.wait_state("ready")
        path = short_path / "state" / "high-water.json"
        wait_for(path.exists, 30, running.text)
        status = running.status()
        assert 0 < status["memory_bytes"] <= status["memory_peak_bytes"]
        assert running.stop() == 0
    profile = load_profile("stub", (short_path / "profiles", shipped_folder()))
    measured, word = HighWater(path).recall(profile, build_of(stub_python(short_path)))
    assert word == ""
    assert measured is not None
    assert measured == replace(measured, runs=1, whole=False)
    assert 2**20 < measured.size < GIB
