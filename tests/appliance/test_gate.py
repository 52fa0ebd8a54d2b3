"""When the engine may start."""

from dataclasses import replace

import pytest
from spark_llm.gate import GIB, Action, GateFacts, decide
from spark_llm.reason import Reason

FACTS = GateFacts(
    need_bytes=50 * GIB,
    reserve_bytes=16 * GIB,
    available_bytes=100 * GIB,
    total_bytes=121 * GIB,
    driver="580.159.03",
    drivers=("580.",),
)
TABLE = [
    (FACTS, Action.GO, Reason.OK),
    (replace(FACTS, available_bytes=66 * GIB), Action.GO, Reason.OK),
    (replace(FACTS, available_bytes=66 * GIB - 1), Action.WAIT, Reason.MEMORY),
    (replace(FACTS, available_bytes=60 * GIB, waited_s=300), Action.REFUSE, Reason.MEMORY),
    (replace(FACTS, need_bytes=106 * GIB), Action.REFUSE, Reason.DOES_NOT_FIT),
]


@pytest.mark.parametrize(("facts", "action", "reason"), TABLE)
def test_decision(facts: GateFacts, action: Action, reason: Reason) -> None:
    """Start only with need and reserve really available; wait for what can come, refuse what cannot."""
    verdict = decide(facts)
    assert (verdict.action, verdict.reason) == (action, reason)
    assert bool(verdict.hint) == (action is not Action.GO)


def test_slow_reclaim_is_waited_for() -> None:
    """Memory that comes back over a minute after a stop delays the start by exactly that, with no fixed sleep."""
    steps = [
        decide(replace(FACTS, available_bytes=(20 + second) * GIB, waited_s=second)).action
        for second in range(61)
    ]
    assert steps == [Action.WAIT] * 46 + [Action.GO] * 15


def test_unknown_driver_warns() -> None:
    """A driver outside the list is named in a warning and does not stop the start."""
    verdict = decide(replace(FACTS, driver="590.44"))
    assert verdict.action is Action.GO
    assert "590.44" in verdict.warnings[0]


def test_message_names_the_gap() -> None:
    """What is missing is said in GiB."""
    assert "6.0 GiB short" in decide(replace(FACTS, available_bytes=60 * GIB)).message


def test_promised_memory_is_not_available() -> None:
    """What another engine was promised and has not taken yet is waited for, and named."""
    free = replace(FACTS, available_bytes=70 * GIB)
    assert decide(free).action is Action.GO
    verdict = decide(replace(free, promised_bytes=5 * GIB))
    assert verdict.action is Action.WAIT
    assert "5.0 GiB of it promised to other engines: 1.0 GiB short" in verdict.message
