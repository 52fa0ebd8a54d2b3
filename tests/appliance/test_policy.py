"""Liveness, restarts and readiness, as tables."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from spark_llm.policy import (
    Action,
    Cause,
    Failure,
    Observation,
    Progress,
    ReadyFacts,
    Rules,
    Sample,
    Socket,
    after_failure,
    exit_cause,
    follow,
    liveness,
    name_cause,
    next_try,
    readiness,
)
from spark_llm.reason import Reason

RULES = Rules()


def stuck(since: float, *, now: float, running: int = 1, sampled: float | None = None) -> Progress:
    """An iteration counter that has stood still since ``since``."""
    return Progress(Sample(now if sampled is None else sampled, running, 7), since)


NOW = 1000.0
HEALTHY = Observation(NOW, was_ready=True, socket=Socket.ACCEPTED, progress=stuck(NOW, now=NOW))

LIVENESS = [
    ("healthy", HEALTHY, None),
    ("process gone", replace(HEALTHY, exited=True), Reason.ENGINE_EXITED),
    ("gone before ready", replace(HEALTHY, exited=True, was_ready=False), Reason.ENGINE_EXITED),
    ("refuses after ready", replace(HEALTHY, socket=Socket.REFUSED), Reason.ENGINE_UNREACHABLE),
    ("refuses while loading", replace(HEALTHY, socket=Socket.REFUSED, was_ready=False), None),
    ("times out", replace(HEALTHY, socket=Socket.TIMED_OUT), None),
    (
        "frozen for 120 s",
        replace(HEALTHY, progress=stuck(NOW - 120, now=NOW)),
        Reason.ENGINE_STALLED,
    ),
    ("still for 119 s", replace(HEALTHY, progress=stuck(NOW - 119, now=NOW)), None),
    ("idle for an hour", replace(HEALTHY, progress=stuck(NOW - 3600, now=NOW, running=0)), None),
    (
        "frozen, but the scrape is old",
        replace(HEALTHY, progress=stuck(NOW - 300, now=NOW, sampled=NOW - 60)),
        None,
    ),
    (
        "frozen and times out",
        replace(HEALTHY, socket=Socket.TIMED_OUT, progress=stuck(NOW - 300, now=NOW)),
        Reason.ENGINE_STALLED,
    ),
    (
        "long prefill that computes",
        replace(HEALTHY, progress=stuck(NOW - 300, now=NOW), power_w=64.0),
        None,
    ),
    (
        "frozen at idle power",
        replace(HEALTHY, progress=stuck(NOW - 300, now=NOW), power_w=22.0),
        Reason.ENGINE_STALLED,
    ),
    ("nothing scraped yet", replace(HEALTHY, progress=None), None),
]


@pytest.mark.parametrize(
    ("seen", "expected"), [row[1:] for row in LIVENESS], ids=[row[0] for row in LIVENESS]
)
def test_liveness(seen: Observation, expected: Reason | None) -> None:
    """Only a gone process, a refusing socket or a frozen counter is a reason to restart."""
    assert liveness(seen, RULES) is expected


@given(st.floats(0, 1e6), st.sampled_from(list(Socket)), st.booleans())
def test_moving_engine_is_never_restarted(now: float, socket: Socket, ready: bool) -> None:
    """Whatever else is seen, an engine whose counter just moved is left alone unless it refuses."""
    seen = Observation(now, was_ready=ready, socket=socket, progress=stuck(now, now=now))
    refused = ready and socket is Socket.REFUSED
    assert liveness(seen, RULES) is (Reason.ENGINE_UNREACHABLE if refused else None)


def test_progress_follows_the_counter() -> None:
    """A moving counter and an idle engine reset the clock; a busy engine that stands still does not."""
    progress = follow(None, Sample(0, 1, 5))
    progress = follow(progress, Sample(10, 1, 6))
    assert progress.moved_at == 10
    progress = follow(progress, Sample(20, 2, 6))
    assert progress.moved_at == 10
    progress = follow(progress, Sample(30, 0, 6))
    assert progress.moved_at == 30
    progress = follow(progress, Sample(130, 1, 6))
    assert progress.moved_at == 130, "it was idle until now"


def failures(*reasons: Reason, every: float = 10.0) -> list[Failure]:
    return [
        Failure(NOW - every * (len(reasons) - 1 - i), reason) for i, reason in enumerate(reasons)
    ]


X, M = Reason.ENGINE_EXITED, Reason.MEMORY
RESTARTS = [
    ("first", failures(X), Action.RESTART, X, 2),
    ("third", failures(X, X, X), Action.RESTART, X, 0),
    ("fourth within the window", failures(X, X, X, X), Action.FAIL, Reason.RESTART_BUDGET, 0),
    ("fourth over hours", failures(X, X, X, X, every=1000), Action.RESTART, X, 1),
    ("memory once", failures(M), Action.RESTART, M, 2),
    ("memory twice", failures(M, M), Action.FAIL, M, 1),
    ("memory twice, hours apart", failures(M, M, every=7200), Action.RESTART, M, 2),
    ("bad flags", failures(Reason.BAD_PROFILE), Action.FAIL, Reason.BAD_PROFILE, 2),
    ("does not fit", failures(Reason.DOES_NOT_FIT), Action.FAIL, Reason.DOES_NOT_FIT, 2),
    ("wrong tokens", failures(Reason.CANARY), Action.FAIL, Reason.CANARY, 2),
]


@pytest.mark.parametrize(
    ("history", "action", "reason", "left"),
    [row[1:] for row in RESTARTS],
    ids=[row[0] for row in RESTARTS],
)
def test_restart(history: list[Failure], action: Action, reason: Reason, left: int) -> None:
    """Crashes are restarted within the budget; what a restart cannot cure is not tried again."""
    verdict = after_failure(history, NOW, RULES)
    assert (verdict.action, verdict.reason, verdict.left) == (action, reason, left)
    assert bool(verdict.hint) == (action is Action.FAIL), (
        "a person is told what to do, and only then"
    )


@given(st.lists(st.sampled_from(list(Reason)), min_size=1, max_size=12))
def test_budget_is_never_exceeded(reasons: list[Reason]) -> None:
    """However engines die, no more than the budget's restarts happen within the window."""
    history: list[Failure] = []
    restarts = 0
    for index, reason in enumerate(reasons):
        history.append(Failure(float(index), reason))
        if after_failure(history, float(index), RULES).action is Action.FAIL:
            break
        restarts += 1
    assert restarts <= RULES.restart_budget


def test_delay_grows() -> None:
    """Each restart waits longer than the one before."""
    delays = [after_failure(failures(*[X] * count), NOW, RULES).delay_s for count in (1, 2, 3)]
    assert delays == sorted(set(delays))


CAUSES = [
    ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate", Reason.MEMORY),
    (
        "ValueError: Free memory on device cuda:0 (40/121 GiB) on startup is less than desired",
        Reason.MEMORY,
    ),
    (
        "To serve at least one request, 4.0 GiB KV cache is needed, which is larger than",
        Reason.DOES_NOT_FIT,
    ),
    ("RuntimeError: CUDA error: out of memory", Reason.MEMORY),
    ("RuntimeError: Found no NVIDIA driver on your system.", Reason.DRIVER),
    ("RuntimeError: Failed to infer device type, please set", Reason.NO_GPU),
    ("vllm serve: error: unrecognized arguments: --modle", Reason.BAD_PROFILE),
    ("ValueError: Unknown vLLM environment variable detected: VLLM_X", Reason.BAD_PROFILE),
    ("safetensors_rust.SafetensorError: Error while deserializing header", Reason.MODEL_CORRUPT),
    ("WARNING [interface.py:1458] Unknown vLLM environment variable detected: X", None),
    ("ModuleNotFoundError: No module named 'vllm'", Reason.ENGINE_MISSING),
    ("Failed to import from vllm._C: No module named 'vllm._C'", None),
    ("NVRM: NV_ERR_NO_MEMORY logged by good starts too", None),
    ("Segmentation fault", None),
]


@pytest.mark.parametrize(("line", "reason"), CAUSES)
def test_exit_cause(line: str, reason: Reason | None) -> None:
    """What the engine logs names the cause of its end, however much it logs afterwards."""
    cause = exit_cause(
        cause_named("starting", line, *["  traceback"] * 99), NOW, killed_by_guard=False
    )
    assert cause.reason is (reason or Reason.ENGINE_EXITED)
    assert cause.line == (line if reason else "")


def cause_named(*lines: str) -> Cause | None:
    named = None
    for line in lines:
        named = name_cause(named, line, NOW)
    return named


def test_first_cause_counts() -> None:
    """What the engine names first is the cause, since later lines tell its consequences; a person sees no prefix."""
    first = (
        "(EngineCore pid=20082) ERROR 11-21 12:02:47 [core.py:1510] torch.OutOfMemoryError: 2 GiB"
    )
    named = cause_named(first, "Cannot auto-fit max_model_len")
    assert named is not None
    assert named.reason is Reason.MEMORY
    assert named.sentence == "torch.OutOfMemoryError: 2 GiB"


def test_cause_that_was_survived() -> None:
    """A line that the engine has outlived by minutes neither explains its end nor hides what does."""
    named = cause_named("MemoryError in a request")
    later = NOW + 3600
    assert exit_cause(named, later, killed_by_guard=False).reason is Reason.ENGINE_EXITED
    named = name_cause(named, "SafetensorError", later)
    assert exit_cause(named, later, killed_by_guard=False).reason is Reason.MODEL_CORRUPT


def test_guard_kill_is_a_memory_death() -> None:
    """A kill by the guard is a memory death, whatever the log says."""
    named = cause_named("SafetensorError")
    assert exit_cause(named, NOW, killed_by_guard=True).reason is Reason.MEMORY


READY = ReadyFacts(
    engine_up=True,
    canary_manifest="abc",
    manifest="abc",
    heartbeat_age_s=1.0,
    memory_ok=True,
    draining=False,
)
UNREADY = [
    (replace(READY, engine_up=False), "engine"),
    (replace(READY, canary_manifest="another build"), "canary"),
    (replace(READY, canary_manifest="", manifest=""), "canary"),
    (replace(READY, heartbeat_age_s=None), "heartbeat"),
    (replace(READY, heartbeat_age_s=121.0), "heartbeat"),
    (replace(READY, memory_ok=False), "memory"),
    (replace(READY, draining=True), "admitting"),
]


@pytest.mark.parametrize(("facts", "failing"), UNREADY)
def test_each_check_alone_makes_unready(facts: ReadyFacts, failing: str) -> None:
    """Readiness names the one check that fails."""
    assert [check.name for check in readiness(facts, RULES) if not check.ok] == [failing]


def test_ready() -> None:
    """With every check passed there is nothing left to name."""
    assert all(check.ok for check in readiness(READY, RULES))


def _died(*at: float) -> list[Failure]:
    return [Failure(when, Reason.CANARY) for when in at]


def test_next_try_backs_off_within_the_budget() -> None:
    """Each failure within the window makes the next try wait longer, whatever its cause; none, and it may be now."""
    assert next_try([], 100.0, RULES) == 100.0
    assert next_try(_died(100.0), 100.0, RULES) == 102.0
    assert next_try(_died(90.0, 100.0), 100.0, RULES) == 106.0
    assert next_try(_died(90.0, 100.0), 5000.0, RULES) == 5000.0


def test_next_try_after_the_budget_waits_for_the_window() -> None:
    """With the budget used up, the next try waits until the oldest failure that is too many has left the window."""
    failures = _died(0.0, 2.0, 8.0, 26.0)
    assert next_try(failures[:3], 8.0, RULES) == 26.0
    assert next_try(failures, 26.0, RULES) == RULES.restart_window_s
    assert next_try(_died(5.0), 5.0, Rules(restart_budget=0)) == 5.0 + RULES.restart_window_s
