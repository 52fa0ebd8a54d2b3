"""Phases, vitals and model folders: what a start is judged by."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from spark_llm import phases
from spark_llm.demo_model import write_demo_model
from spark_llm.errors import RefusedError
from spark_llm.model_folder import check_model_folder
from spark_llm.phases import Phase
from spark_llm.scrape import parse_counters
from spark_llm.vitals import LoadWatch, Vitals, read_vitals, stalled, watch

from tests.stub_engine import LOAD_LINES


def test_phase_goes_from_start_to_api() -> None:
    """The lines of a start move the phase from its beginning to the open API, never back."""
    phase = phases.STARTED
    percents = []
    for line in LOAD_LINES:
        phase = phases.advance(phase, line)
        percents.append(phase.percent)
    assert percents == sorted(percents)
    assert phase.name == "opening the API"


@pytest.mark.parametrize(
    ("line", "percent"),
    [
        ("Loading safetensors checkpoint shards:  50% Completed | 2/4 [00:10<00:10]", 55),
        ("Capturing CUDA graphs (mixed prefill-decode, PIECEWISE):  50%|#####", 87),
    ],
)
def test_phase_follows_progress_bars(line: str, percent: int) -> None:
    """Bars of shards and graphs move the percentage between two phases."""
    assert phases.advance(Phase("x", 41), line).percent == percent


@given(st.text())
def test_any_line_is_harmless(line: str) -> None:
    """No log line makes the phase go back or fail."""
    assert phases.advance(Phase("x", 50), line).percent >= 50


def test_vitals_sum_a_process_group() -> None:
    """The vitals of our own group hold at least ourselves."""
    found = read_vitals(os.getpgrp())
    assert found.processes >= 1
    assert found.io_bytes > 0


BUSY = Vitals(cpu_ticks=1000, io_bytes=10**9, processes=3)


@pytest.mark.parametrize(
    ("change", "lines", "seconds", "hung"),
    [
        ({}, 0, 119.0, False),
        ({}, 0, 120.0, True),
        ({}, 1, 120.0, False),
        ({"io_bytes": 10**9 + 100_000}, 0, 120.0, False),
        ({"processes": 4}, 0, 120.0, False),
        ({"cpu_ticks": 2000}, 0, 120.0, False),
        ({"cpu_ticks": 2000}, 0, 1200.0, True),
        ({"cpu_ticks": 1001, "io_bytes": 10**9 + 100}, 0, 120.0, True),
    ],
)
def test_stall_rule(change: dict[str, int], lines: int, seconds: float, hung: bool) -> None:
    """Lines, bytes or processes are progress; CPU time alone counts for ten times the limit; polling is none."""
    before = watch(None, BUSY, 0, 0.0)
    after = watch(before, replace(BUSY, **change), lines, seconds)
    assert stalled(after, seconds, 120.0) is hung


def test_watch_remembers_the_last_movement() -> None:
    """Standing still later does not move the mark."""
    first = watch(None, BUSY, 0, 0.0)
    moved = watch(first, BUSY, 1, 5.0)
    still = watch(moved, BUSY, 1, 9.0)
    assert still == LoadWatch(BUSY, 1, 5.0, 5.0)


def test_whole_model_passes(tmp_path: Path) -> None:
    """The demo model is whole."""
    write_demo_model(tmp_path / "m")
    check_model_folder(tmp_path / "m")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("config.json", "config.json"),
        ("tokenizer.json", "a tokenizer"),
        ("model.safetensors", "model.safetensors"),
    ],
)
def test_missing_file_is_named(tmp_path: Path, name: str, said: str) -> None:
    """A model that lacks a file is refused with its name; an empty file counts as missing."""
    write_demo_model(tmp_path / "m")
    if name == "model.safetensors":
        (tmp_path / "m" / name).write_bytes(b"")
    else:
        (tmp_path / "m" / name).unlink()
    with pytest.raises(RefusedError, match=said):
        check_model_folder(tmp_path / "m")


def test_shard_that_the_index_names_must_be_there(tmp_path: Path) -> None:
    """A shard named by the index and missing on disk is refused by name."""
    write_demo_model(tmp_path / "m")
    index = '{"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}'
    (tmp_path / "m" / "model.safetensors.index.json").write_text(index)
    with pytest.raises(RefusedError, match=r"lacks model-2\.safetensors"):
        check_model_folder(tmp_path / "m")


SCRAPE = """# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="demo"} 2.0
vllm:num_requests_running{engine="1",model_name="demo"} 1.0
vllm:iteration_tokens_total_count{engine="0",model_name="demo"} 24.0
vllm:generation_tokens_total{engine="0",model_name="demo"} 1e3
vllm:prompt_tokens_total{engine="0",model_name="demo"} 7.0
vllm:kv_cache_usage_perc{engine="0",model_name="demo"} 0.25
"""


def test_counters_are_read_and_added_up() -> None:
    """A scrape gives the five numbers, engines added up."""
    found = parse_counters(SCRAPE, 5.0)
    assert found is not None
    assert (found.at, found.running, found.iterations) == (5.0, 3, 24)
    assert (found.generated, found.prompt, found.cache_used) == (1000, 7, 0.25)


@pytest.mark.parametrize("text", ["", "vllm:num_requests_running 1", "<html>"])
def test_scrape_that_lacks_liveness_is_none(text: str) -> None:
    """Without both numbers of liveness there is no reading, rather than a zero."""
    assert parse_counters(text, 0.0) is None
