"""Waiting for a place at the engine: the pure queue of ``admission.py`` with an event loop under it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from spark_llm.admission import Admission, Limits, Rejected, Ticket
from spark_llm.reason import Reason
from spark_llm.reply import Reply

CUT = "cut"
"""Why a request's task is cancelled: the drain's time is up."""

_SENTENCES = {
    Reason.QUEUE_FULL: "the queue is full",
    Reason.DEADLINE: "no place came free in time",
    Reason.DRAINING: "the service is draining",
    Reason.MEMORY: "memory is low; no new requests are taken",
    Reason.CANARY: "the engine answered the canary wrongly; no new requests are taken",
}


class AdmissionQueue:
    """Lets requests in, in a fair order.

    Attributes:
        idle: set while nothing runs.
    """

    def __init__(self, limits: Limits) -> None:
        self._admission = Admission(limits)
        self._places: dict[Ticket, asyncio.Future[None]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self.idle = asyncio.Event()
        self.idle.set()
        self._holders: set[asyncio.Task[object]] = set()

    @property
    def running(self) -> int:
        """Requests at the engine."""
        return self._admission.running

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return self._admission.waiting

    def set_limits(self, limits: Limits) -> None:
        """New limits; those already running or waiting keep their place."""
        self._admission.limits = limits
        self._wake()

    @asynccontextmanager
    async def place(self, key: str, timeout_s: float | None = None) -> AsyncIterator[None]:
        """Hold a place within the block.

        Args:
            key: who asks, for fairness; never the API key itself.
            timeout_s: how long the client waits at most, in seconds; None if it did not say.

        Raises:
            Reply: 429 when the queue or the key's share is full, 503 when the wait would be or was in vain.
        """
        loop = asyncio.get_running_loop()
        ticket = self._admission.offer(key, loop.time(), timeout_s)
        if isinstance(ticket, Rejected):
            raise _reply(ticket.status, ticket.reason, ticket.retry_after_s)
        place = self._places[ticket] = loop.create_future()
        served = False
        try:
            self._wake()
            if not place.done():
                await place
            place.result()
            served = True
            if (holder := asyncio.current_task()) is not None:
                self._holders.add(holder)
            yield
        finally:
            if (holder := asyncio.current_task()) is not None:
                self._holders.discard(holder)
            del self._places[ticket]
            self._admission.leave(ticket, loop.time(), served=served)
            self._wake()

    def close(self, reason: Reason) -> None:
        """Turn everybody away from now on, those that wait too."""
        for ticket in self._admission.close(reason):
            self._turn_away(ticket, 503, reason)

    def cut(self) -> None:
        """Cancel the tasks of all running requests, saying ``CUT``."""
        for holder in self._holders:
            holder.cancel(CUT)

    def open(self) -> None:
        """Let requests in again."""
        self._admission.open()
        self._wake()

    def _wake(self) -> None:
        now = asyncio.get_running_loop().time()
        for ticket in self._admission.displaced():
            self._turn_away(ticket, 429, Reason.QUEUE_FULL)
        for ticket in self._admission.expire(now):
            self._turn_away(ticket, 503, Reason.DEADLINE)
        while admitted := self._admission.admit(now):
            for ticket in admitted:
                if self._places[ticket].done():  # its client left in this very turn of the loop
                    self._admission.leave(ticket, now, served=False)
                else:
                    self._places[ticket].set_result(None)
        if self._admission.running:
            self.idle.clear()
        else:
            self.idle.set()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if (deadline := self._admission.next_deadline()) is not None:
            self._timer = asyncio.get_running_loop().call_at(deadline, self._wake)

    def _turn_away(self, ticket: Ticket, status: int, reason: Reason) -> None:
        place = self._places[ticket]
        if not place.done():
            now = asyncio.get_running_loop().time()
            retry_after_s = self._admission.retry_after_s(ticket.key, now)
            place.set_exception(_reply(status, reason, retry_after_s))


def _reply(status: int, reason: Reason, retry_after_s: int) -> Reply:
    return Reply(status, reason, _SENTENCES.get(reason, "not now"), retry_after_s=retry_after_s)
