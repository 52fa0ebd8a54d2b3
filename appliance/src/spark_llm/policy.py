"""Is the engine alive, should it be restarted, may the door say ready? Pure: facts in, a decision out.

The rule that shapes this module: a timeout alone never restarts. A saturated engine answers its
probes late (users lost eight engines a day to a 2 s probe, gonka#1421), while a frozen one answers
``/health`` with 200 for minutes (eugr/spark-vllm-docker#260). What tells them apart is the
iteration counter.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from spark_llm.reason import Reason


class Socket(StrEnum):
    """What the last connection to the engine's socket met."""

    ACCEPTED = "accepted"
    REFUSED = "refused"
    TIMED_OUT = "timed_out"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Sample:
    """One reading of the engine's metrics.

    Attributes:
        at: when it was read, on the monotonic clock, in seconds.
        running: ``vllm:num_requests_running``.
        iterations: ``vllm:iteration_tokens_total_count``, engine steps so far.
    """

    at: float
    running: int
    iterations: int


@dataclass(frozen=True)
class Progress:
    """How long the iteration counter has stood still while requests ran.

    Attributes:
        sample: the newest reading.
        moved_at: when the counter last moved or nothing was running, in seconds.
    """

    sample: Sample
    moved_at: float


@dataclass(frozen=True)
class Observation:
    """What is known of the engine now.

    Attributes:
        now: monotonic clock, in seconds.
        exited: the process is gone.
        was_ready: this engine process has been ready before.
        socket: the last connection attempt.
        progress: None until the first scrape.
        power_w: draw of the GPU in watts; None where it cannot be read.
    """

    now: float
    exited: bool = False
    was_ready: bool = False
    socket: Socket = Socket.UNKNOWN
    progress: Progress | None = None
    power_w: float | None = None


@dataclass(frozen=True)
class Rules:
    """Attributes: see ``Engine`` in config.py; ``idle_power_w``: a GB10 that computes draws more (eugr#260)."""

    freeze_timeout_s: float = 120.0
    fresh_s: float = 10.0
    restart_budget: int = 3
    restart_window_s: float = 1800.0
    first_delay_s: float = 2.0
    idle_power_w: float = 30.0


def follow(progress: Progress | None, sample: Sample) -> Progress:
    """``progress`` after one more reading."""
    moved = (
        progress is None
        or sample.running == 0
        or progress.sample.running == 0
        or sample.iterations != progress.sample.iterations
    )
    if progress is None or moved:
        return Progress(sample, sample.at)
    return replace(progress, sample=sample)


def liveness(seen: Observation, rules: Rules) -> Reason | None:
    """The cause for which the engine must be restarted, or None while it counts as alive."""
    if seen.exited:
        return Reason.ENGINE_EXITED
    if seen.was_ready and seen.socket is Socket.REFUSED:
        return Reason.ENGINE_UNREACHABLE
    if seen.progress is None:
        return None
    fresh = seen.now - seen.progress.sample.at <= rules.fresh_s
    still = seen.now - seen.progress.moved_at >= rules.freeze_timeout_s
    busy = seen.progress.sample.running > 0
    computing = seen.power_w is not None and seen.power_w >= rules.idle_power_w
    if fresh and still and busy and not computing:
        return Reason.ENGINE_STALLED
    return None


class Action(StrEnum):
    """What to do about an engine that is gone or must go."""

    RESTART = "restart"
    RESTART_WHEN_MEMORY = "restart_when_memory"
    FAIL = "fail"


@dataclass(frozen=True)
class Failure:
    """One death of the engine. Attributes: at: monotonic clock, in seconds; reason: its cause."""

    at: float
    reason: Reason


@dataclass(frozen=True)
class Verdict:
    """What follows from a death.

    Attributes:
        action: restart now, restart through the start gate, or stay down.
        reason: the cause to show.
        delay_s: wait before restarting, in seconds.
        left: restarts that the budget still has after this one.
        hint: what a person can do; empty for a plain restart.
    """

    action: Action
    reason: Reason
    delay_s: float
    left: int
    hint: str = ""


_NO_RETRY = {
    Reason.BAD_PROFILE: "The engine refuses these settings; `spark-llm fit` and the journal say which.",
    Reason.DOES_NOT_FIT: "Lower the context or the KV cache; `spark-llm fit` shows what fits.",
    Reason.DRIVER: "`spark-llm doctor` checks the driver.",
    Reason.ENGINE_MISSING: "Install the engine; `spark-llm doctor` says what is missing.",
    Reason.MODEL_CORRUPT: "`spark-llm verify` finds the bad file, `spark-llm pull` fetches it again.",
    Reason.MODEL_MISSING: "`spark-llm pull` fetches it.",
    Reason.CANARY: "The engine gives wrong tokens; go back to the last build or profile that passed.",
    Reason.NO_GPU: "`spark-llm doctor` checks the GPU.",
}
"""Causes that a restart cannot cure, with the hint for each."""


def after_failure(failures: Sequence[Failure], now: float, rules: Rules) -> Verdict:
    """What to do after ``failures[-1]``.

    A memory death goes back through the start gate once; a second one within the window means that
    the plan was wrong, and trying again would only wear the host down: about 35 automatic restarts
    cost one user a power cycle (eugr#257).

    Args:
        failures: deaths of this profile's engine, oldest first; at least one.
        now: monotonic clock, in seconds.
        rules: budget and window.
    """
    recent = [item for item in failures if now - item.at <= rules.restart_window_s]
    last = failures[-1]
    left = max(rules.restart_budget - len(recent), 0)
    delay = rules.first_delay_s * 3 ** max(len(recent) - 1, 0)
    if (hint := _NO_RETRY.get(last.reason)) is not None:
        return Verdict(Action.FAIL, last.reason, 0.0, left, hint)
    if last.reason is Reason.MEMORY and sum(item.reason is Reason.MEMORY for item in recent) > 1:
        return Verdict(
            Action.FAIL,
            Reason.MEMORY,
            0.0,
            left,
            "Memory ran out twice: lower the context or KV cache, or free memory, then start again.",
        )
    if len(recent) > rules.restart_budget:
        causes = ", ".join(sorted({item.reason for item in recent}))
        return Verdict(
            Action.FAIL,
            Reason.RESTART_BUDGET,
            0.0,
            0,
            f"{len(recent)} failures in {rules.restart_window_s / 60:.0f} min ({causes}); "
            "read the journal, then start again.",
        )
    if last.reason is Reason.MEMORY:
        return Verdict(Action.RESTART_WHEN_MEMORY, Reason.MEMORY, delay, left)
    return Verdict(Action.RESTART, last.reason, delay, left)


_EXIT_PATTERNS: tuple[tuple[re.Pattern[str], Reason], ...] = (
    (re.compile(r"CUDA out of memory|OutOfMemoryError|std::bad_alloc|MemoryError"), Reason.MEMORY),
    (re.compile(r"Free memory on device .* is less than"), Reason.MEMORY),
    (
        re.compile(
            r"No available memory for the cache blocks|larger than the available KV cache memory"
        ),
        Reason.DOES_NOT_FIT,
    ),
    (re.compile(r"KV cache is needed, which is larger than"), Reason.DOES_NOT_FIT),
    (re.compile(r"Cannot auto-fit max_model_len"), Reason.DOES_NOT_FIT),
    (re.compile(r"driver version is insufficient|no kernel image is available"), Reason.DRIVER),
    (
        re.compile(r"No CUDA GPUs are available|NVML: Driver/library version mismatch"),
        Reason.NO_GPU,
    ),
    (
        re.compile(r"SafetensorError|HeaderTooLarge|Error while deserializing header"),
        Reason.MODEL_CORRUPT,
    ),
    (re.compile(r"No module named '?vllm"), Reason.ENGINE_MISSING),
    (
        re.compile(r"unrecognized arguments|error: argument |Unknown vLLM environment variable"),
        Reason.BAD_PROFILE,
    ),
)
"""Lines of vLLM 0.32.0, torch and safetensors that name a cause; ``NV_ERR_NO_MEMORY`` is left out
on purpose: good starts log it too (vllm#56824)."""


def exit_cause(log_tail: Iterable[str], *, killed_by_guard: bool) -> Reason:
    """Why an engine process ended, from the last lines it wrote.

    Args:
        log_tail: its last lines, oldest first.
        killed_by_guard: the memory guard reported a kill.
    """
    if killed_by_guard:
        return Reason.MEMORY
    for line in log_tail:
        for pattern, reason in _EXIT_PATTERNS:
            if pattern.search(line):
                return reason
    return Reason.ENGINE_EXITED


@dataclass(frozen=True)
class Check:
    """One named condition of readiness. Attributes: reason: the cause where ``ok`` is False."""

    name: str
    ok: bool
    reason: Reason
    detail: str = ""


@dataclass(frozen=True)
class ReadyFacts:
    """What readiness is decided from.

    Attributes:
        engine_up: its process runs and its socket accepts.
        canary_manifest: manifest for which the canary passed; empty if for none.
        manifest: manifest of the running engine.
        heartbeat_age_s: time since the last good scrape, in seconds; None if there was none.
        memory_ok: the guard reports no floor crossed.
        draining: no new requests are wanted.
        peers_missing: nodes that should be there and are not.
    """

    engine_up: bool
    canary_manifest: str
    manifest: str
    heartbeat_age_s: float | None
    memory_ok: bool
    draining: bool
    peers_missing: tuple[str, ...] = ()


def readiness(facts: ReadyFacts, rules: Rules) -> tuple[Check, ...]:
    """All named checks, in the order they are shown; ready means that each is ok."""
    age = facts.heartbeat_age_s
    # A busy engine may leave some scrapes unanswered; it is unready only as late as it could count as frozen.
    heartbeat = age is not None and age < rules.freeze_timeout_s
    proven = bool(facts.manifest) and facts.canary_manifest == facts.manifest
    return (
        Check("engine", facts.engine_up, Reason.NOT_READY),
        Check("canary", proven, Reason.CANARY),
        Check(
            "heartbeat",
            heartbeat,
            Reason.ENGINE_STALLED,
            "no scrape yet" if age is None else f"{age:.1f} s old",
        ),
        Check("memory", facts.memory_ok, Reason.MEMORY),
        Check("admitting", not facts.draining, Reason.DRAINING),
        Check("peers", not facts.peers_missing, Reason.PEERS, ", ".join(facts.peers_missing)),
    )
