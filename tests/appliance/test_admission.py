"""Who may go next, and what the others are told."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from spark_llm import guard
from spark_llm.admission import MEMORY_AT_LEAST_S, Admission, Limits, Rejected, Ticket
from spark_llm.reason import Reason


def offer(queue: Admission, key: str, now: float = 0.0, timeout_s: float | None = None) -> Ticket:
    ticket = queue.offer(key, now, timeout_s)
    assert isinstance(ticket, Ticket)
    return ticket


def refuse(
    queue: Admission, key: str, now: float = 0.0, timeout_s: float | None = None
) -> Rejected:
    answer = queue.offer(key, now, timeout_s)
    assert isinstance(answer, Rejected)
    return answer


def test_free_places_are_given_at_once() -> None:
    """With room at the engine a request goes straight through."""
    queue = Admission(Limits(max_running=2))
    ticket = offer(queue, "a")
    assert queue.admit(0) == [ticket]
    assert (queue.running, queue.waiting) == (1, 0)


def test_order_is_fair_by_key() -> None:
    """A key that has asked a hundred times waits behind one that asked once."""
    queue = Admission(Limits(max_running=2))
    for at in range(100):
        offer(queue, "greedy", at)
    late = offer(queue, "modest", 100)
    first = queue.admit(0)
    assert [ticket.key for ticket in first] == ["greedy", "modest"]
    assert first[1] is late


def test_equal_keys_go_by_arrival() -> None:
    """Among keys that have had no turn yet the longest wait goes first."""
    queue = Admission(Limits(max_running=1))
    for at, key in enumerate("abc"):
        offer(queue, key, at)
    order = []
    for at in range(3):
        (ticket,) = queue.admit(0)
        order.append(ticket.key)
        queue.leave(ticket, 10 + at)
    assert order == ["a", "b", "c"]


def test_equal_keys_take_turns() -> None:
    """With one place, too, a key that asked a hundred times waits behind one that asks once, and is not starved."""
    queue = Admission(Limits(max_running=1))
    for at in range(100):
        offer(queue, "greedy", at)
    (ticket,) = queue.admit(100)
    order = []
    for at in range(100, 106):
        if at % 2 == 0:
            offer(queue, "modest", at)
        queue.leave(ticket, at)
        (ticket,) = queue.admit(at)
        order.append(ticket.key)
    assert order == ["modest", "greedy"] * 3


def test_key_has_its_own_limits() -> None:
    """One key can neither hold all places nor fill the queue."""
    queue = Admission(Limits(max_running=4, max_running_per_key=1, max_queue_per_key=2))
    offer(queue, "a")
    offer(queue, "a")
    assert refuse(queue, "a").status == 429
    other = offer(queue, "b")
    assert {ticket.key for ticket in queue.admit(0)} == {"a", "b"}
    assert queue.admit(0) == [], "the second of a has to wait for the first"
    queue.leave(other, 1)
    assert queue.admit(0) == []


def test_full_queue_is_refused() -> None:
    """One more than fits is answered 429, and the queue stays as it was."""
    queue = Admission(Limits(max_running=1, max_queue=2))
    for _ in range(3):
        offer(queue, "a")
    answer = refuse(queue, "a")
    assert (answer.status, answer.reason) == (429, Reason.QUEUE_FULL)
    assert queue.waiting == 3


def test_longest_line_makes_room() -> None:
    """In a full queue, the newest wait of the longest line ends for a key that has a shorter one."""
    queue = Admission(Limits(max_running=1, max_queue=4))
    offer(queue, "greedy")
    queue.admit(0)
    greedy = [offer(queue, "greedy") for _ in range(4)]
    modest = [offer(queue, "modest")]
    assert queue.displaced() == [greedy[3]]
    modest.append(offer(queue, "modest"))
    assert queue.displaced() == [greedy[2]]
    refuse(queue, "modest")
    refuse(queue, "greedy")
    assert (queue.displaced(), queue.waiting) == ([], 4)
    for key in ("third", "fourth"):
        offer(queue, key)
        assert len(queue.displaced()) == 1
    refuse(queue, "fifth")
    assert queue.displaced() == [], "each waits once: two would only change places"


def measured(limits: Limits, duration: float) -> tuple[Admission, float]:
    """A queue that has seen requests of ``duration`` seconds, one at a time and rarely; and the time."""
    queue, now = Admission(limits), 0.0
    for _ in range(10):
        now += 100
        offer(queue, "a", now)
        for ticket in queue.admit(now):
            queue.leave(ticket, now + duration)
    return queue, now + 100


def test_retry_after_comes_from_measured_durations() -> None:
    """Two places, ten seconds each, four of the key waiting and one more that asks: a place for it in 25 s."""
    queue, now = measured(Limits(max_running=2, max_queue=4), duration=10)
    for _ in range(6):
        offer(queue, "a", now)
    assert len(queue.admit(now)) == 2
    assert refuse(queue, "a", now).retry_after_s == 25


def test_light_load_is_not_a_slow_engine() -> None:
    """Requests that came rarely do not make the next burst look hopeless."""
    queue, now = measured(Limits(max_running=1), duration=0.5)
    for _ in range(20):
        offer(queue, "a", now)
        queue.admit(now)


def test_slowing_engine_is_noticed_before_anything_ends() -> None:
    """Requests that already run longer than the mean raise the expected wait."""
    queue, now = measured(Limits(max_running=1), duration=1)
    offer(queue, "a", now)
    queue.admit(now)
    assert queue.expected_wait_s("a", now) == 1
    later = queue.expected_wait_s("a", now + 23)
    assert later == 3, "mean of ten times 1 s and once 23 s"


def test_vain_wait_is_refused_at_once() -> None:
    """A client that would time out in the queue is told 503 now, with the time it would have needed."""
    queue, now = measured(Limits(max_running=1), duration=2)
    for _ in range(11):
        offer(queue, "a", now)
    queue.admit(now)
    answer = refuse(queue, "a", now, timeout_s=5)
    assert (answer.status, answer.reason, answer.retry_after_s) == (503, Reason.DEADLINE, 22)
    assert isinstance(queue.offer("a", now, timeout_s=30), Ticket)


def test_wait_is_that_of_the_fair_place() -> None:
    """A key that goes next is not refused for the other keys' backlog, nor for one that its own limit holds back."""
    queue, now = measured(Limits(max_running=4, max_running_per_key=3), duration=10)
    for _ in range(50):
        queue.offer("greedy", now)
        queue.admit(now)
    assert queue.waiting > 10
    assert queue.expected_wait_s("modest", now) == 0
    offer(queue, "modest", now)
    queue.admit(now)
    assert queue.expected_wait_s("third", now) == 2.5
    offer(queue, "third", now, timeout_s=5)


def test_key_at_its_own_limit_waits_for_its_own_places() -> None:
    """Where a key may run one request of 60 s at a time, its next is told 60 s however many places are free."""
    limits = Limits(max_running=256, max_running_per_key=1, max_queue_per_key=1)
    queue, now = measured(limits, duration=60)
    offer(queue, "a", now)
    queue.admit(now)
    assert refuse(queue, "a", now, timeout_s=5).reason is Reason.DEADLINE
    offer(queue, "a", now)
    answer = refuse(queue, "a", now)
    assert (answer.reason, answer.retry_after_s) == (Reason.QUEUE_FULL, 120)
    offer(queue, "b", now, timeout_s=5)


def test_low_memory_lasts_as_long_as_the_guard_waits() -> None:
    """While memory is low, nobody is told to come back before the guard can have found calm."""
    queue = Admission(Limits())
    queue.close(Reason.MEMORY)
    assert refuse(queue, "a").retry_after_s == MEMORY_AT_LEAST_S == guard.CALM_S


@given(
    places=st.integers(1, 8),
    before=st.lists(st.sampled_from("aaaabbcd"), max_size=40),
    key=st.sampled_from("abce"),
)
def test_expected_wait_is_near_the_truth(places: int, before: list[str], key: str) -> None:
    """Where requests end in the order they began, a newcomer waits as long as was expected, to within one round."""
    queue, now = measured(Limits(max_running=places, queue_timeout_s=1e9), duration=places)
    running: list[Ticket] = []
    for other in before:
        now += 1e-6
        offer(queue, other, now)
        running += queue.admit(now)
    expected = queue.expected_wait_s(key, now)
    assert expected is not None
    newcomer = offer(queue, key, now)
    running += queue.admit(now)
    ended = 0  # one in a second
    while newcomer not in running:
        queue.leave(running.pop(0), now, served=False)
        running += queue.admit(now)
        ended += 1
    assert abs(ended - expected) <= places


def test_unknown_rate_admits() -> None:
    """Before anything was measured nobody is refused for an expected wait."""
    queue = Admission(Limits(max_running=1, queue_timeout_s=7))
    offer(queue, "a")
    queue.admit(0)
    offer(queue, "b", timeout_s=0.001)
    assert queue.retry_after_s("a", 0) == 7, "the queue's own limit stands in for a measurement"
    queue.limits = Limits(max_running=1, queue_timeout_s=600)
    assert queue.retry_after_s("a", 0) == 60, "or a minute: ten would be a guess that costs much"


def test_waiting_ends_at_the_deadline() -> None:
    """Late tickets come back for their 503 and no longer count."""
    queue = Admission(Limits(max_running=1, queue_timeout_s=60))
    queue.offer("a", 0)
    queue.admit(0)
    early, late = offer(queue, "a", 0, timeout_s=5), offer(queue, "b", 0)
    assert queue.next_deadline() == 5
    assert queue.expire(4.9) == []
    assert queue.expire(5) == [early]
    assert queue.next_deadline() == late.deadline == 60
    assert queue.waiting == 1


def test_closing_turns_the_queue_away() -> None:
    """Draining answers those that wait, refuses new ones with its reason, and lets running ones end."""
    queue = Admission(Limits(max_running=1))
    running = offer(queue, "a")
    queue.admit(0)
    waiting = offer(queue, "b")
    assert queue.close(Reason.DRAINING) == [waiting]
    answer = refuse(queue, "c")
    assert (answer.status, answer.reason) == (503, Reason.DRAINING)
    queue.leave(running, 1)
    assert (queue.running, queue.waiting, queue.admit(0)) == (0, 0, [])
    queue.open()
    offer(queue, "c")
    assert len(queue.admit(0)) == 1


def test_gone_client_leaves_the_queue() -> None:
    """A ticket that left is never admitted, and leaving twice changes nothing."""
    queue = Admission(Limits(max_running=1))
    first, second = offer(queue, "a"), offer(queue, "a")
    assert queue.admit(0) == [first]
    assert queue.leave(second, 1)
    assert queue.leave(first, 1)
    assert not queue.leave(first, 1)
    assert (queue.admit(0), queue.running, queue.waiting) == ([], 0, 0)


def test_admitted_but_not_served_says_nothing_of_the_pace() -> None:
    """A request whose client left as it was admitted does not make the engine look fast."""
    queue, now = measured(Limits(max_running=1), 10)
    ticket = offer(queue, "a", now)
    queue.admit(now)
    queue.leave(ticket, now, served=False)
    offer(queue, "a", now)
    queue.admit(now)
    assert queue.expected_wait_s("a", now) == 10


@given(st.lists(st.floats(0, 1e5), max_size=40))
def test_retry_after_stays_in_bounds(durations: list[float]) -> None:
    """Whatever was measured, the header is a whole number of seconds from one to six hundred."""
    queue = Admission(Limits(max_running=1))
    for duration in durations:
        offer(queue, "a", 0, timeout_s=1e9)
        for ticket in queue.admit(0):
            queue.leave(ticket, duration)
    offer(queue, "a", 0)
    queue.admit(0)
    assert 1 <= queue.retry_after_s("a", 0) <= 600


class Life(RuleBasedStateMachine):
    """Any sequence of calls keeps the counts right."""

    @initialize(running=st.integers(1, 4), queue=st.integers(0, 5), per_key=st.integers(0, 3))
    def start(self, running: int, queue: int, per_key: int) -> None:
        self.limits = Limits(running, queue, max_running_per_key=per_key, queue_timeout_s=10)
        self.queue = Admission(self.limits)
        self.at = 0.0
        self.inside: list[Ticket] = []
        self.outside: list[Ticket] = []

    @rule(key=st.sampled_from("abc"), timeout=st.none() | st.floats(0.1, 20))
    def come(self, key: str, timeout: float | None) -> None:
        lines = self.lines()
        answer = self.queue.offer(key, self.at, timeout)
        displaced = self.queue.displaced()
        if isinstance(answer, Ticket):
            self.outside.append(answer)
        for ticket in displaced:
            assert isinstance(answer, Ticket), "nobody makes room for one that is turned away"
            assert lines[key] + 1 < lines[ticket.key] == max(lines.values())
            assert all(self.outside.index(ticket) >= i for i in self.places_of(ticket.key))
            self.outside.remove(ticket)
        if isinstance(answer, Rejected) and answer.reason is Reason.QUEUE_FULL:
            assert max(lines.values(), default=0) <= lines[key] + 1
        self.take()

    def lines(self) -> Counter[str]:
        return Counter(ticket.key for ticket in self.outside)

    def places_of(self, key: str) -> list[int]:
        return [place for place, ticket in enumerate(self.outside) if ticket.key == key]

    @rule(index=st.integers(0, 20))
    def end(self, index: int) -> None:
        if self.inside:
            self.queue.leave(self.inside.pop(index % len(self.inside)), self.at)
        self.take()

    @rule(index=st.integers(0, 20))
    def leave(self, index: int) -> None:
        if self.outside:
            assert self.queue.leave(self.outside.pop(index % len(self.outside)), self.at)
        self.take()

    @rule(seconds=st.floats(0.1, 15))
    def wait(self, seconds: float) -> None:
        self.at += seconds
        late = self.queue.expire(self.at)
        assert all(ticket in self.outside for ticket in late)
        self.outside = [ticket for ticket in self.outside if ticket not in late]
        self.take()

    def take(self) -> None:
        for ticket in self.queue.admit(self.at):
            self.outside.remove(ticket)
            self.inside.append(ticket)

    @invariant()
    def counts(self) -> None:
        if not hasattr(self, "queue"):
            return
        assert self.queue.running == len(self.inside) <= self.limits.max_running
        assert self.queue.waiting == len(self.outside)
        free = self.limits.max_running - len(self.inside)
        assert len(self.outside) <= self.limits.max_queue + free
        per_key = self.limits.max_running_per_key
        for key in "abc":
            held = sum(ticket.key == key for ticket in self.inside)
            assert not per_key or held <= per_key
        if not per_key and self.outside:
            assert len(self.inside) == self.limits.max_running, "nobody waits beside a free place"


TestLife = Life.TestCase
TestLife.runTest.__doc__ = "Any sequence of offers, ends, cancels and time keeps limits and counts."
