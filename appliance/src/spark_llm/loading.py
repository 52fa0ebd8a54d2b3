"""Requests that wait while a model is loaded for them: how many, and for how long."""

from math import ceil

from spark_llm.keeper import Keeper
from spark_llm.reason import Reason
from spark_llm.reply import Reply

_UNKNOWN_S = 30


async def wait_settled(keeper: Keeper, *, max_waiting: int, patience_s: float) -> None:
    """Wait until ``keeper`` is ready for the first time, or has failed.

    Args:
        keeper: which loads.
        max_waiting: requests that may wait for it.
        patience_s: how long the caller lets this last, in seconds; a load that will take longer is not waited for.

    Raises:
        Reply: 429 when too many wait already, 503 when the wait would be in vain.
    """
    if keeper.settled.is_set():
        return
    if keeper.waiting_to_load >= max_waiting:
        raise Reply(
            429,
            Reason.QUEUE_FULL,
            f"too many requests wait for {keeper.profile.name}",
            retry_after_s=_retry_after_s(keeper),
        )
    expected = keeper.expected_s()
    if expected is not None and expected > patience_s:
        raise too_late(keeper.profile.name, keeper)
    keeper.waiting_to_load += 1
    try:
        await keeper.settled.wait()
    finally:
        keeper.waiting_to_load -= 1


def too_late(name: str, keeper: Keeper | None) -> Reply:
    """The answer to a request that does not wait, or no longer, for the profile ``name``, which ``keeper`` loads."""
    return Reply(
        503,
        Reason.DEADLINE,
        f"{name} is not loaded in time; its load goes on",
        retry_after_s=_retry_after_s(keeper),
    )


def _retry_after_s(keeper: Keeper | None) -> int:
    expected = keeper.expected_s() if keeper else None
    return _UNKNOWN_S if expected is None else max(1, ceil(expected))
