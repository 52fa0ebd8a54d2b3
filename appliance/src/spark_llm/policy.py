"""Is the engine alive, should it be restarted, may the door say ready? Pure: facts in, a decision out.

The rule that shapes this module: a timeout alone never restarts. A saturated engine answers its
probes late (users lost eight engines a day to a 2 s probe, gonka#1421), while a frozen one answers
``/health`` with 200 for minutes (eugr/spark-vllm-docker#260). What tells them apart is the
iteration counter.
"""

import re
from collections.abc import Sequence
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
        running: requests that the engine has to work on: ``vllm:num_requests_running``, and those that wait for it
            at the gateway. The gauge alone is not enough, as only a finished step sets it (``Scheduler.make_stats``): a
            core that freezes while idle never counts what came since.
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
        action: restart, or stay down.
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

    Every restart goes through the start gate, so after a memory death it waits for memory. A second one
    within the window means that the plan was wrong, and trying again would only wear the host down:
    about 35 automatic restarts cost one user a power cycle (eugr#257).

    Args:
        failures: deaths of this profile's engine, oldest first; at least one.
        now: monotonic clock, in seconds.
        rules: budget and window.
    """
    recent = _recent(failures, now, rules)
    last = failures[-1]
    left = max(rules.restart_budget - len(recent), 0)
    delay = _delay_s(recent, rules)
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
    return Verdict(Action.RESTART, last.reason, delay, left)


def next_try(failures: Sequence[Failure], now: float, rules: Rules) -> float:
    """When requests may start a profile anew that was given up, on the monotonic clock, in seconds.

    Whatever the cause was, somebody may have cured it: so there is always a next try, but within the window no more of
    them than the budget has restarts.

    Args:
        failures: of this profile, oldest first.
        now: monotonic clock, in seconds.
        rules: budget and window.
    """
    recent = _recent(failures, now, rules)
    if not recent:
        return now
    due = recent[-1].at + _delay_s(recent, rules)
    if len(recent) > rules.restart_budget:
        due = max(due, recent[-1 - rules.restart_budget].at + rules.restart_window_s)
    return due


def _recent(failures: Sequence[Failure], now: float, rules: Rules) -> list[Failure]:
    return [item for item in failures if now - item.at <= rules.restart_window_s]


def _delay_s(recent: Sequence[Failure], rules: Rules) -> float:
    delay: float = rules.first_delay_s * 3 ** max(len(recent) - 1, 0)
    return min(delay, rules.restart_window_s)


_SURVIVED_S = 120.0
"""An engine that lives so long after a line did not die of it: vLLM's API process follows its core within seconds, at
most ``--shutdown-timeout`` later."""

_PREFIX = re.compile(r"^\(\S.*? pid=\d+\) [A-Z]+ \S+ \S+ \[[^\]]*\]\s*")
"""Of a line of vLLM's (vllm/logger.py); what follows is for a person."""

_LONGEST_CAUSE = 400

_EXIT_PATTERNS: tuple[tuple[re.Pattern[str], Reason], ...] = (
    (
        re.compile(r"CUDA (driver )?(error: )?out of memory|std::bad_alloc|MemoryError"),
        Reason.MEMORY,
    ),
    (re.compile(r"Free memory on device .* is less than"), Reason.MEMORY),
    (
        re.compile(
            r"No available memory for the cache blocks|larger than the available KV cache memory"
        ),
        Reason.DOES_NOT_FIT,
    ),
    (re.compile(r"KV cache is needed, which is larger than"), Reason.DOES_NOT_FIT),
    (re.compile(r"Cannot auto-fit max_model_len"), Reason.DOES_NOT_FIT),
    (
        re.compile(
            r"driver version is insufficient|no kernel image is available|Found no NVIDIA driver"
        ),
        Reason.DRIVER,
    ),
    (
        re.compile(
            r"No CUDA GPUs are available|NVML: Driver/library version mismatch"
            r"|Failed to infer device type"
        ),
        Reason.NO_GPU,
    ),
    (
        re.compile(r"SafetensorError|HeaderTooLarge|Error while deserializing header"),
        Reason.MODEL_CORRUPT,
    ),
    (re.compile(r"No module named '?vllm'?(?![\w.'])"), Reason.ENGINE_MISSING),
    (
        re.compile(
            r"unrecognized arguments|error: argument "
            r"|ValueError: Unknown vLLM environment variable"  # else only a warning (platforms/interface.py)
        ),
        Reason.BAD_PROFILE,
    ),
)
"""Lines of vLLM 0.32.0, torch and safetensors that name a cause; ``NV_ERR_NO_MEMORY`` is left out
on purpose: good starts log it too (vllm#56824)."""


@dataclass(frozen=True)
class Cause:
    """Why an engine ends, and the log line that says so.

    Attributes:
        at: when it was known, on the monotonic clock, in seconds.
        reason: the cause.
        line: as the engine wrote it; empty where no line told.
    """

    at: float
    reason: Reason
    line: str = ""

    @property
    def sentence(self) -> str:
        """The line without vLLM's prefix, and no longer than a person reads."""
        return _PREFIX.sub("", self.line)[:_LONGEST_CAUSE]


def name_cause(named: Cause | None, line: str, at: float) -> Cause | None:
    """The first cause that the log names, after one more line.

    The first, and kept from when it comes: a core that fails to start is followed by a traceback of the API process,
    longer than any tail, which only says that the core failed (vllm/v1/engine/utils.py).

    Args:
        named: the cause so far; one that the engine has survived makes room for another.
        line: what it wrote now.
        at: monotonic clock, in seconds.
    """
    if named is not None and at - named.at < _SURVIVED_S:
        return named
    for pattern, reason in _EXIT_PATTERNS:
        if pattern.search(line):
            return Cause(at, reason, line)
    return named


def exit_cause(named: Cause | None, now: float, *, killed_by_guard: bool) -> Cause:
    """Why an engine process ended.

    Args:
        named: the first cause that its log named, if any.
        now: monotonic clock, in seconds.
        killed_by_guard: the memory guard reported a kill.
    """
    if killed_by_guard:
        return Cause(now, Reason.MEMORY)
    if named is not None and now - named.at < _SURVIVED_S:
        return named
    return Cause(now, Reason.ENGINE_EXITED)


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
    """

    engine_up: bool
    canary_manifest: str
    manifest: str
    heartbeat_age_s: float | None
    memory_ok: bool
    draining: bool


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
    )
