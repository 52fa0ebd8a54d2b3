"""How the gateway shares processors with the engine: few requests are hurried, many are passed on in turn."""

import contextlib
import os


class Scheduling:
    """Switches the calling thread, the event loop's, between Linux's ordinary and its batch policy (sched(7)).

    A thread of the batch policy interrupts nobody when something comes in: it waits for a free core, or for its turn.
    Where more requests run than there are cores, every token would otherwise stop the engine to be passed on alone, and
    so the tokens of a step go together: with 64 streams on 2 cores 92 instead of 86 % of a direct connection. A single
    client would wait up to a millisecond longer for it, and gains nothing. Both in docs/reference/benchmarks.md.

    Args:
        cores: that this process may use.
    """

    def __init__(self, cores: int) -> None:
        self._cores = cores
        self._running = 0
        self._batch = False

    def __enter__(self) -> None:
        """One more request runs."""
        self._running += 1
        self._adapt()

    def __exit__(self, *_: object) -> None:
        """One has ended."""
        self._running -= 1
        self._adapt()

    def _adapt(self) -> None:
        batch = self._running > self._cores
        if batch is not self._batch:
            self._batch = batch
            policy = os.SCHED_BATCH if batch else os.SCHED_OTHER
            with contextlib.suppress(
                OSError
            ):  # a sandbox that forbids it costs some speed, no more
                os.sched_setscheduler(0, policy, os.sched_param(0))
