"""When an engine that serves lets requests in."""

from collections.abc import Callable

import pytest
from spark_llm.admission import Limits
from spark_llm.admission_queue import AdmissionQueue
from spark_llm.door import Door
from spark_llm.keeper import Keeper
from spark_llm.reason import Reason
from spark_llm.reply import Reply
from spark_llm.status import Bus, State, Status, StatusBoard
from spark_llm.upstream import UpstreamError
from spark_llm.watchman import Level

pytestmark = pytest.mark.anyio

SOFT: Callable[[Door], None] = lambda door: door.on_memory(Level.SOFT)  # noqa: E731
FINE: Callable[[Door], None] = lambda door: door.on_memory(Level.OK)  # noqa: E731
WRONG: Callable[[Door], None] = lambda door: door.on_canary("wrong")  # noqa: E731
RIGHT: Callable[[Door], None] = lambda door: door.on_canary("")  # noqa: E731

STORIES = [
    ([], Reason.OK, True),
    ([SOFT], Reason.MEMORY, True),
    ([SOFT, FINE], Reason.OK, True),
    ([WRONG], Reason.CANARY, False),
    ([WRONG, RIGHT], Reason.OK, True),
    ([WRONG, SOFT], Reason.MEMORY, False),
    ([WRONG, SOFT, FINE], Reason.CANARY, False),
    ([SOFT, WRONG, RIGHT], Reason.MEMORY, True),
    ([SOFT, WRONG, FINE, RIGHT], Reason.OK, True),
]


def board(state: State) -> StatusBoard:
    return StatusBoard(Bus(), Status(state, manifest="abc", proven="abc", percent=100))


async def admitted(queue: AdmissionQueue) -> bool:
    try:
        async with queue.place("somebody"):
            return True
    except Reply:
        return False


@pytest.mark.parametrize(("story", "reason", "proven"), STORIES)
async def test_door(story: list[Callable[[Door], None]], reason: Reason, proven: bool) -> None:
    """Each of both causes keeps the door closed for itself, and only the canary decides what is proven."""
    shown, queue = board(State.READY), AdmissionQueue(Limits())
    door = Door(shown, queue)
    door.open(Level.OK)
    for event in story:
        event(door)
    assert shown.now.reason is reason
    assert shown.now.state is (State.READY if reason is Reason.OK else State.DEGRADED)
    assert bool(shown.now.proven) == proven
    assert shown.now.percent == 100
    assert await admitted(queue) == (reason is Reason.OK)


async def test_next_engine_starts_with_an_open_door() -> None:
    """What was said of an engine that is gone does not count against the next one; an alarm during its load does."""
    shown, queue = board(State.READY), AdmissionQueue(Limits())
    door = Door(shown, queue)
    door.open(Level.OK)
    WRONG(door)
    SOFT(door)
    shown.enter(State.READY)
    door.open(Level.OK)
    assert await admitted(queue)
    shown.enter(State.LOADING)
    SOFT(door)
    assert shown.now.state is State.LOADING
    shown.enter(State.READY)
    door.open(Level.SOFT)
    assert shown.now.reason is Reason.MEMORY


@pytest.mark.parametrize("error", [TimeoutError(), UpstreamError("broke off")])
async def test_canary_without_an_answer_changes_nothing(error: Exception) -> None:
    """A saturated engine that does not answer in time is told to who asked; it stays ready."""

    class Silent:
        upstream = None

        async def ask_canary(self, _: float) -> str:
            raise error

    keeper = Keeper.__new__(Keeper)  # the question needs nothing else of it
    keeper.board = board(State.READY)
    keeper.run = Silent()  # type: ignore[assignment]
    before = keeper.board.now
    with pytest.raises(Reply) as caught:
        await keeper.ask_canary()
    assert caught.value.reason is Reason.TIMEOUT
    assert keeper.board.now is before
