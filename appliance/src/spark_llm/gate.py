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
        disk_free_bytes: free space where caches go, in bytes.
        disk_need_bytes: what the caches may take, in bytes.
        driver: version of the NVIDIA driver; empty where there is none.
        drivers: prefixes of driver versions known to work, e.g. ``("580.",)``; empty allows any.
        nodes: machines the profile needs.
        peers_ready: other machines that have joined.
    """

    need_bytes: int
    reserve_bytes: int
    available_bytes: int
    total_bytes: int
    promised_bytes: int = 0
    waited_s: float = 0.0
    timeout_s: float = 300.0
    disk_free_bytes: int = 0
    disk_need_bytes: int = 0
    driver: str = ""
    drivers: tuple[str, ...] = ()
    nodes: int = 1
    peers_ready: int = 0


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
    if facts.disk_free_bytes < facts.disk_need_bytes:
        return GateVerdict(
            Action.REFUSE,
            Reason.NO_DISK,
            f"{_gib(facts.disk_free_bytes)} free for caches, {_gib(facts.disk_need_bytes)} needed",
            "`spark-llm cache prune` removes old compile caches.",
            warnings,
        )
    if facts.peers_ready < facts.nodes - 1:
        return _wait(
            facts,
            Reason.PEERS,
            f"{facts.peers_ready + 1} of {facts.nodes} nodes are there",
            "Start `spark-llm worker` on the other node.",
            warnings,
        )
    short = facts.need_bytes + facts.reserve_bytes + facts.promised_bytes - facts.available_bytes
    if short > 0:
        promised = f", {_gib(facts.promised_bytes)} of it promised to other engines"
        return _wait(
            facts,
            Reason.MEMORY,
            f"{_gib(facts.need_bytes)} needed and {_gib(facts.reserve_bytes)} kept for the host, "
            f"{_gib(facts.available_bytes)} available{promised if facts.promised_bytes else ''}: "
            f"{_gib(short)} short",
            "Stop what else uses memory, or lower the context.",
            warnings,
        )
    return GateVerdict(Action.GO, warnings=warnings)


def _wait(
    facts: GateFacts, reason: Reason, message: str, hint: str, warnings: tuple[str, ...]
) -> GateVerdict:
    late = facts.waited_s >= facts.timeout_s
    if late:
        message = f"{message}, after {facts.waited_s:.0f} s"
    return GateVerdict(Action.REFUSE if late else Action.WAIT, reason, message, hint, warnings)


def _warnings(facts: GateFacts) -> tuple[str, ...]:
    if facts.driver and facts.drivers and not facts.driver.startswith(facts.drivers):
        known = ", ".join(f"{prefix}x" for prefix in facts.drivers)
        return (f"driver {facts.driver} is not among those known to work ({known})",)
    return ()


def _gib(count: int) -> str:
    return f"{count / GIB:.1f} GiB"
