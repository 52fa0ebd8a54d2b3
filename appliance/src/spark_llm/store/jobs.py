"""Downloads and verifications as jobs, with progress to follow; ``spark_llm.gateway.models_api`` is their face.

A job takes a model's name only: no path, no address and no token comes in through the network.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from spark_llm.errors import ConfigError, SparkLlmError
from spark_llm.reason import Reason
from spark_llm.store import plan
from spark_llm.store.process import fetch
from spark_llm.store.progress import Event, Failure, Progress, Result, to_json
from spark_llm.store.request import Request
from spark_llm.store.store import Store

_KEPT = 100
"""Finished jobs that are remembered."""
_KEPT_EVENTS = 500
_KEEPALIVE_S = 15.0
MakeRequest = Callable[[str, str], Request]
"""Model and revision to a request with the service's settings."""


@dataclass
class Job:
    """One download or verification.

    Attributes:
        id: twelve hex digits.
        kind: ``fetch`` or ``verify``.
        model: ``ORG/NAME``.
        revision: as asked for; empty means the default branch.
        state: ``running``, ``succeeded``, ``failed`` or ``cancelled``.
        created_at: Unix time, in seconds.
        finished_at: Unix time, in seconds; None while it runs.
        progress: the last progress event.
        outcome: the result or the failure.
    """

    id: str
    kind: str
    model: str
    revision: str
    state: str = "running"
    created_at: float = field(default_factory=time.time)
    finished_at: float | None = None
    progress: dict[str, Any] | None = None
    outcome: dict[str, Any] | None = None
    _events: list[tuple[int, dict[str, Any]]] = field(default_factory=list, repr=False)
    _next: int = 1
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition, repr=False)

    def to_json(self) -> dict[str, Any]:
        """For the API."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    async def add(self, event: Event) -> None:
        """Record an event and wake those who follow."""
        value = to_json(event)
        async with self._changed:
            if isinstance(event, Progress):
                self.progress = value
            elif isinstance(event, Result | Failure):
                self.outcome = value
                self.finish("succeeded" if isinstance(event, Result) else "failed")
            self._events.append((self._next, value))
            self._next += 1
            del self._events[:-_KEPT_EVENTS]
            self._changed.notify_all()

    def finish(self, state: str) -> None:
        """Set the last state."""
        self.state, self.finished_at = state, time.time()

    async def end(self, state: str) -> None:
        """Finish without an event."""
        async with self._changed:
            self.finish(state)
            self._changed.notify_all()

    async def follow(self, after: int) -> AsyncIterator[tuple[int, dict[str, Any]] | None]:
        """Events with a number above ``after`` until the job ends; None as a sign of life."""
        while True:
            async with self._changed:
                news = [item for item in self._events if item[0] > after]
                if not news:
                    if self.state != "running":
                        return
                    try:
                        await asyncio.wait_for(self._changed.wait(), _KEEPALIVE_S)
                    except TimeoutError:
                        news = []
            if not news:
                yield None
            for item in news:
                after = item[0]
                yield item


class Jobs:
    """All jobs of this process.

    Args:
        store: the models.
        make_request: adds the service's settings to a model's name.
    """

    def __init__(self, store: Store, make_request: MakeRequest) -> None:
        self.store = store
        self._make_request = make_request
        self._jobs: dict[str, Job] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def all(self) -> list[Job]:
        """All that are remembered, the newest first."""
        return sorted(self._jobs.values(), key=lambda job: job.created_at, reverse=True)

    def get(self, job_id: str) -> Job:
        """The job of that id.

        Raises:
            ConfigError: there is none.
        """
        if (job := self._jobs.get(job_id)) is None:
            raise ConfigError("there is no such job", reason=Reason.NOT_FOUND)
        return job

    def start(self, kind: str, model: str, revision: str, **options: bool) -> Job:
        """Start a job, or give the one that already does this.

        Raises:
            ConfigError: not a model's name or not a revision.
        """
        plan.check_model_name(model)
        if revision:
            plan.check_revision(revision)
        for job in self._jobs.values():
            if (job.kind, job.model, job.revision, job.state) == (kind, model, revision, "running"):
                return job
        job = Job(uuid.uuid4().hex[:12], kind, model, revision)
        self._jobs[job.id] = job
        work = self._fetch(job, **options) if kind == "fetch" else self._verify(job, **options)
        task = self._tasks[job.id] = asyncio.create_task(self._run(job, work))
        task.add_done_callback(lambda _: self._tasks.pop(job.id, None))
        for old in self.all()[_KEPT:]:
            if old.state != "running":
                del self._jobs[old.id]
        return job

    async def cancel(self, job: Job) -> None:
        """Stop a job; what it fetched stays for the next one."""
        if task := self._tasks.get(job.id):
            task.cancel()
            await asyncio.wait([task])

    async def close(self) -> None:
        """Stop all jobs."""
        for job in self.all():
            await self.cancel(job)

    async def _run(self, job: Job, work: Any) -> None:  # noqa: ANN401  a coroutine
        try:
            await work
        except asyncio.CancelledError:
            await job.end("cancelled")
            raise
        except SparkLlmError as error:
            await job.add(Failure.of(error))
        except Exception as error:  # noqa: BLE001  a job must end with a word
            await job.add(Failure(Reason.INTERNAL, f"{type(error).__name__}: {error}", "", 1))

    async def _fetch(self, job: Job, *, allow_pickle: bool = False) -> None:
        request = replace(
            self._make_request(job.model, job.revision), refresh=True, allow_pickle=allow_pickle
        )
        async with aclosing(fetch(request)) as events:
            async for event in events:
                await job.add(event)

    async def _verify(self, job: Job, *, full: bool = True) -> None:
        found = await asyncio.to_thread(self.store.verify, job.model, job.revision, full=full)
        if found.ok:
            path = str(self.store.locate(job.model, found.commit) or "")
            seconds = round(time.time() - job.created_at, 3)
            await job.add(
                Result(job.model, found.commit, path, found.bytes, found.files, 0, seconds)
            )
        else:
            bad = ", ".join((*found.missing, *found.corrupt, *found.unreadable))
            await job.add(
                Failure(
                    Reason.MODEL_CORRUPT,
                    f"{job.model} is damaged: {bad}",
                    "Fetch it again: only these come.",
                    1,
                )
            )
