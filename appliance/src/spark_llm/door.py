"""The door of an engine that serves: open while memory is fine and the last canary was right."""

from spark_llm.admission_queue import AdmissionQueue
from spark_llm.reason import Reason
from spark_llm.status import SERVING, State, StatusBoard
from spark_llm.watchman import Level

_CLOSED = {
    Reason.MEMORY: "",  # it comes back by itself
    Reason.CANARY: "Restart, or go back to the last build or profile that passed; POST /api/v1/canary asks again.",
}
"""Causes for which it is closed, with the hint for each."""
_OPEN_AGAIN = {
    Reason.MEMORY: "memory is back",
    Reason.CANARY: "the canary's answer is right again",
}


def judge(*, low: bool, wrong: str) -> tuple[Reason, str]:
    """Why the door is closed, with the sentence to show; ``Reason.OK`` where it is open. Pure.

    Args:
        low: the guard says that memory is.
        wrong: what was wrong with the last canary's answer; empty if nothing.
    """
    if low:
        return Reason.MEMORY, "memory is low; no new requests are taken"
    if wrong:
        return Reason.CANARY, f"{wrong}; no new requests are taken"
    return Reason.OK, ""


class Door:
    """Opens and closes the queue of one engine, and says so on its board."""

    def __init__(self, board: StatusBoard, queue: AdmissionQueue) -> None:
        self._board = board
        self._queue = queue
        self._low = False
        self._wrong = ""

    def open(self, memory: Level) -> None:
        """The engine has just become ready; what the guard said while it loaded counts now."""
        self._wrong = ""
        self._queue.open()
        self.on_memory(memory)

    def on_memory(self, level: Level) -> None:
        """The guard has spoken: a soft alarm closes the door until memory is back."""
        if level is not Level.HARD:  # that is the engine's end
            self._low = level is Level.SOFT
            self._settle()

    def on_canary(self, wrong: str) -> None:
        """The canary has answered: a wrong answer closes the door until a right one."""
        if self._board.now.state in SERVING:
            self._wrong = wrong
            self._board.progress(proven="" if wrong else self._board.now.manifest)
            self._settle()

    def _settle(self) -> None:
        before = self._board.now
        reason, message = judge(low=self._low, wrong=self._wrong)
        if before.state not in SERVING or reason is before.reason:
            return
        if reason is Reason.OK:
            self._queue.open()
            self._board.enter(State.READY, message=_OPEN_AGAIN[before.reason], percent=100)
        else:
            self._queue.close(reason)
            self._board.enter(State.DEGRADED, reason, message, hint=_CLOSED[reason], percent=100)
