"""The start gate: may the engine be started now, later, or never on this machine? Pure.

Memory comes back slowly after a stop (a minute and more on a GB10), and a start into memory that is
not there yet either fails the engine's own check or, worse, wedges the host. So the gate waits for
the measured amount, never for a fixed time.
"""

from dataclasses import dataclass
from enum import StrEnum

from spark_llm.reason import Reason

GIB = 2**30


class Action(StrEnum):
    """What the caller does next."""

    GO = "go"
    WAIT = "wait"
    REFUSE = "refuse"


@dataclass(frozen=True)
class GateFacts:
    """What the gate looks at.

    Attributes:
        need_bytes: the ledger's need on this node, in bytes.
        reserve_bytes: what must stay free for the host, in bytes.
        available_bytes: what can be had now, in bytes (meters.py).
        promised_bytes: of it, what other engines were promised and have not taken yet, in bytes.
        total_bytes: ``MemTotal``, in bytes.
        waited_s: time spent waiting so far, in seconds.
        timeout_s: longest wait, in seconds.
        driver: version of the NVIDIA driver; empty where there is none.
        drivers: prefixes of driver versions known to work, e.g. ``("580.",)``; empty allows any.
    """

    need_bytes: int
    reserve_bytes: int
    available_bytes: int
    total_bytes: int
    promised_bytes: int = 0
    waited_s: float = 0.0
    timeout_s: float = 300.0
    driver: str = ""
    drivers: tuple[str, ...] = ()


@dataclass(frozen=True)
class GateVerdict:
    """The decision.

    Attributes:
        action: start, ask again in a moment, or give up.
        reason: the cause unless ``action`` is go.
        message: one sentence.
        hint: what a person can do.
        warnings: worth showing, not in the way.
    """

    action: Action
    reason: Reason = Reason.OK
    message: str = ""
    hint: str = ""
    warnings: tuple[str, ...] = ()


def decide(facts: GateFacts) -> GateVerdict:
    """Start, wait or refuse. Refusals that waiting cannot cure come first."""
    warnings = _warnings(facts)
    if facts.need_bytes + facts.reserve_bytes > facts.total_bytes:
        return GateVerdict(
            Action.REFUSE,
            Reason.DOES_NOT_FIT,
            f"{_gib(facts.need_bytes)} needed and {_gib(facts.reserve_bytes)} kept for the host "
            f"exceed this machine's {_gib(facts.total_bytes)}",
            "`spark-llm fit` shows the ledger and the largest context that fits.",
            warnings,
        )
    short = facts.need_bytes + facts.reserve_bytes + facts.promised_bytes - facts.available_bytes
    if short > 0:
        promised = f", {_gib(facts.promised_bytes)} of it promised to other engines"
        late = facts.waited_s >= facts.timeout_s
        after = f", after {facts.waited_s:.0f} s" if late else ""
        return GateVerdict(
            Action.REFUSE if late else Action.WAIT,
            Reason.MEMORY,
            f"{_gib(facts.need_bytes)} needed and {_gib(facts.reserve_bytes)} kept for the host, "
            f"{_gib(facts.available_bytes)} available{promised if facts.promised_bytes else ''}: "
            f"{_gib(short)} short{after}",
            "Stop what else uses memory, or lower the context.",
            warnings,
        )
    return GateVerdict(Action.GO, warnings=warnings)


def _warnings(facts: GateFacts) -> tuple[str, ...]:
    if facts.driver and facts.drivers and not facts.driver.startswith(facts.drivers):
        known = ", ".join(f"{prefix}x" for prefix in facts.drivers)
        return (f"driver {facts.driver} is not among those known to work ({known})",)
    return ()


def _gib(count: int) -> str:
    return f"{count / GIB:.1f} GiB"
