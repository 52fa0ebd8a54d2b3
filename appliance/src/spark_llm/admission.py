"""Who may go next: a bounded queue, fair by key, with a ``Retry-After`` that comes from what was measured. No I/O.

Fair means: of the keys that wait, the one with the fewest running requests goes next; among equals the
one whose last turn is longest ago. A full queue turns away the newest of the longest line for a newcomer whose
line is shorter. A client that sends a thousand requests then delays itself, not the others. Requests without a key
are one client.
"""

from collections import Counter, deque
from dataclasses import dataclass, replace
from itertools import count
from math import ceil, inf

from spark_llm.reason import Reason

_MEASURED = 64
"""Ended requests that the expected wait is taken from."""
HEAD_START = 2
"""Requests at the engine beyond the sequences it decodes together, so that none of those stands empty for a round trip.

The engine takes those that wait there by arrival, not by key, so each is a wait for the other keys. Measured with 4
sequences and requests of 50 ms: with none, 5 % fewer requests a second than with 252; with one, as many; the second is
for two sequences that end in the same step.
"""
_UNMEASURED_S = 60.0
MEMORY_AT_LEAST_S = 5
"""Low memory lasts at least this long, in seconds: the guard waits for as much calm before it ends the alarm."""


@dataclass(frozen=True)
class Limits:
    """How much is let in.

    Attributes:
        max_running: requests at the engine at once.
        max_queue: requests that wait.
        max_running_per_key: of one key at the engine; 0 means no limit of its own.
        max_queue_per_key: of one key that wait; 0 means no limit of its own.
        queue_timeout_s: longest wait, in seconds.
    """

    max_running: int = 256
    max_queue: int = 256
    max_running_per_key: int = 0
    max_queue_per_key: int = 0
    queue_timeout_s: float = 600.0

    def for_engine(self, sequences: int) -> "Limits":
        """These limits for an engine that decodes ``sequences`` together: what is more would wait there, unfairly."""
        return replace(self, max_running=min(self.max_running, sequences + HEAD_START))


@dataclass(frozen=True, eq=False)
class Ticket:
    """A request's place. Attributes: deadline: latest time it may be admitted, monotonic, in seconds."""

    key: str
    arrived: float
    deadline: float


@dataclass(frozen=True)
class Rejected:
    """Why a request was not let in.

    Attributes:
        status: 429 if the caller is the cause (its own limit or a full queue), 503 if the wait would be in vain.
        reason: the cause.
        retry_after_s: when a place is expected for this key, in whole seconds; see :meth:`Admission.retry_after_s`.
    """

    status: int
    reason: Reason
    retry_after_s: int


class Admission:
    """The queue. All times are the caller's monotonic clock, in seconds; nothing here waits.

    The caller asks with :meth:`offer`, then turns away those that :meth:`displaced` returns, calls :meth:`admit`
    after each offer or leave and wakes those it returns, and calls :meth:`expire` when a deadline passes
    (:meth:`next_deadline`).
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.closed: Reason | None = None
        self._durations: deque[float] = deque(maxlen=_MEASURED)
        self._admitted: dict[Ticket, float] = {}
        self._waiting: dict[str, deque[Ticket]] = {}
        self._displaced: list[Ticket] = []
        self._running: Counter[str] = Counter()
        self._turns = count(1)
        self._last_turn: dict[
            str, int
        ] = {}  # of every key that ever had one: as many as there are keys

    @property
    def running(self) -> int:
        """Requests at the engine."""
        return self._running.total()

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return sum(map(len, self._waiting.values()))

    def offer(self, key: str, now: float, timeout_s: float | None = None) -> Ticket | Rejected:
        """Ask for a place.

        Args:
            key: who asks; any stable name of the API key, never the key itself.
            now: the time.
            timeout_s: how long this client is ready to wait; None takes the queue's own limit.
        """
        if self.closed is not None:
            return Rejected(503, self.closed, self.retry_after_s(key, now))
        mine = len(self._waiting.get(key, ()))
        if self.limits.max_queue_per_key and mine >= self.limits.max_queue_per_key:
            return Rejected(429, Reason.QUEUE_FULL, self.retry_after_s(key, now))
        free = self.limits.max_running - self.running
        full = self.waiting >= self.limits.max_queue + max(free, 0)
        longest = max(self._waiting.values(), key=len, default=deque[Ticket]())
        if full and len(longest) <= mine + 1:  # at one more, the two would only change places
            return Rejected(429, Reason.QUEUE_FULL, self.retry_after_s(key, now))
        patience = self.limits.queue_timeout_s
        if timeout_s is not None:
            patience = min(patience, timeout_s)
        expected = self.expected_wait_s(key, now)
        if expected is not None and expected > patience:
            # Waiting would only end in a timeout; saying so now is kinder than in a minute.
            return Rejected(503, Reason.DEADLINE, self.retry_after_s(key, now))
        if full:
            self._displaced.append(
                longest.pop()
            )  # it waited least of those whose own key is in their way
        ticket = Ticket(key, now, now + patience)
        self._waiting.setdefault(key, deque()).append(ticket)
        return ticket

    def displaced(self) -> list[Ticket]:
        """Tickets that lost their wait to another key's since the last call; they are answered 429 ``queue_full``."""
        displaced, self._displaced = self._displaced, []
        return displaced

    def admit(self, now: float) -> list[Ticket]:
        """Tickets that may go now; each counts as running until :meth:`leave`."""
        admitted = []
        while self.closed is None and self.running < self.limits.max_running:
            ticket = self._next()
            if ticket is None:
                break
            self._running[ticket.key] += 1
            self._last_turn[ticket.key] = next(self._turns)
            self._admitted[ticket] = now
            admitted.append(ticket)
        return admitted

    def leave(self, ticket: Ticket, now: float, *, served: bool = True) -> bool:
        """A request has ended, well or badly, or its client has gone, wherever its ticket was.

        Args:
            ticket: of an earlier :meth:`offer`.
            now: the time.
            served: it was at the engine, and not only admitted: how long it took tells the engine's pace.

        Returns:
            Whether a place or a wait has ended; False if the ticket was turned away before.
        """
        if (admitted := self._admitted.pop(ticket, None)) is None:
            return self._leave_line(ticket)
        self._running[ticket.key] -= 1
        if self._running[ticket.key] <= 0:
            del self._running[ticket.key]
        if served:
            self._durations.append(now - admitted)
        return True

    def _leave_line(self, ticket: Ticket) -> bool:
        line = self._waiting.get(ticket.key)
        if line is None or ticket not in line:
            return False
        line.remove(ticket)
        if not line:
            del self._waiting[ticket.key]
        return True

    def expire(self, now: float) -> list[Ticket]:
        """Tickets whose deadline has passed; they are no longer waiting and are answered 503 ``deadline``."""
        late = [item for line in self._waiting.values() for item in line if item.deadline <= now]
        for ticket in late:
            self._leave_line(ticket)
        return late

    def next_deadline(self) -> float | None:
        """When :meth:`expire` is next worth calling."""
        return min(
            (item.deadline for line in self._waiting.values() for item in line), default=None
        )

    def close(self, reason: Reason) -> list[Ticket]:
        """Let nobody in any more (draining, memory); returns those that waited, to be answered 503 ``reason``."""
        self.closed = reason
        turned_away = [item for line in self._waiting.values() for item in line]
        self._waiting.clear()
        return turned_away

    def open(self) -> None:
        """Let requests in again."""
        self.closed = None

    def expected_wait_s(self, key: str, now: float) -> float | None:
        """Time until a request of ``key`` that comes now would be admitted, in seconds; None if nothing was measured.

        By Little's law: with every place taken, one comes free each mean duration over places. A count of
        completions would do only under full load; at light load it measures how few came, not how fast they went.
        """
        places = self.limits.max_running
        rounds = (self.running + self._ahead(key) + 1 - places) / places
        if own := self.limits.max_running_per_key:
            asked = self._running[key] + len(self._waiting.get(key, ())) + 1
            rounds = max(rounds, (asked - own) / own)
        if rounds <= 0:
            return 0.0
        durations = [*self._durations, *self._overdue(now)]
        if not durations:
            return None
        return rounds * sum(durations) / len(durations)

    def _ahead(self, key: str) -> int:
        """Tickets that go before one of ``key`` that comes now.

        All of its own key, and of each other key one before each of those and itself, less what that key is ahead
        already: more at the engine, or a turn after its own.
        """
        mine = self._precedence(key)
        turns = len(self._waiting.get(key, ())) + 1
        ahead = turns - 1
        for other, line in self._waiting.items():
            if other != key:
                theirs = self._precedence(other)
                lead = max(theirs[0] - mine[0], int(theirs > mine))
                ahead += min(len(line), max(turns - lead, 0))
        return ahead

    def _overdue(self, now: float) -> list[float]:
        """Ages of running requests that already last longer than the mean: the engine is getting slower."""
        if not self._durations:
            return []
        mean = sum(self._durations) / len(self._durations)
        return [age for start in self._admitted.values() if (age := now - start) > mean]

    def retry_after_s(self, key: str, now: float) -> int:
        """For the ``Retry-After`` header of a request of ``key``, in whole seconds, at most 10 min.

        The expected wait, else the queue's limit or a minute; at least 1 s, and 5 s while memory is low.
        """
        expected = self.expected_wait_s(key, now)
        if expected is None:
            expected = min(self.limits.queue_timeout_s, _UNMEASURED_S)
        at_least = MEMORY_AT_LEAST_S if self.closed is Reason.MEMORY else 1
        return min(max(ceil(expected), at_least), 600)

    def _next(self) -> Ticket | None:
        limit = self.limits.max_running_per_key
        may = [key for key in self._waiting if not limit or self._running[key] < limit]
        if not may:
            return None
        ticket = self._waiting[min(may, key=self._precedence)][0]
        self._leave_line(ticket)
        return ticket

    def _precedence(self, key: str) -> tuple[int, int, float]:
        # By arrival alone, keys with a backlog would share one line, and a newcomer stand behind all of it.
        line = self._waiting.get(key)
        return self._running[key], self._last_turn.get(key, 0), line[0].arrived if line else inf
