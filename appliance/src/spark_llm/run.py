"""One run of the engine: start it, follow its load, prove its tokens, watch it."""

import asyncio
import json
import logging
import re
import secrets
from collections.abc import Callable, Coroutine
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar

import aiohttp

from spark_llm import phases, policy
from spark_llm.argv import Argv
from spark_llm.config import Engine as EngineSettings
from spark_llm.engine import EngineProcess
from spark_llm.errors import SparkLlmError
from spark_llm.gateway.upstream import Upstream
from spark_llm.profile import Profile
from spark_llm.reason import Reason
from spark_llm.scrape import parse_sample
from spark_llm.status import StatusBoard
from spark_llm.vitals import LoadWatch, stalled, watch

_POLL_S = 0.25
_TICK_S = 1.0
_PROBE_TIMEOUT_S = 2.0
_CANARY_TIMEOUT_S = 180.0
_WARMING_PERCENT = 98

log = logging.getLogger("spark_llm.engine")
T = TypeVar("T")


class EngineFailedError(SparkLlmError):
    """This run is over; the restart policy decides what follows."""


class EngineRun:
    """The engine from its start to its end.

    Attributes:
        id: names the run in events, logs and metrics.
        upstream: connections to its socket.
        progress: heartbeat of its iteration counter; None before the first scrape.
    """

    def __init__(  # noqa: PLR0913, PLR0917  the parts a run is made of
        self,
        settings: EngineSettings,
        profile: Profile,
        argv: Argv,
        socket: Path,
        board: StatusBoard,
        tick: Callable[[], None],
    ) -> None:
        self.id = secrets.token_hex(4)
        self.upstream = Upstream(socket)
        self.progress: policy.Progress | None = None
        self._settings = settings
        self._profile = profile
        self._board = board
        self._tick = tick
        self._lines = 0
        self._phase = phases.STARTED
        self._was_ready = False
        self._process = EngineProcess.start(argv, socket=socket, on_line=self._take_line)
        board.progress(run_id=self.id, engine_pid=self._process.pid, phase=self._phase.name)

    @property
    def pid(self) -> int:
        """Of the API process, which leads the group."""
        return self._process.pid

    @property
    def tail(self) -> tuple[str, ...]:
        """Its last log lines."""
        return tuple(self._process.tail)

    @property
    def alive(self) -> bool:
        """Whether any process of it is left."""
        return not self._process.exited.is_set()

    async def load(self) -> None:
        """Wait until the engine answers; bounded by progress, not by a clock.

        Raises:
            EngineFailedError: it exited, or nothing about it moved for ``stall_timeout_s``.
        """
        loop = asyncio.get_running_loop()
        seen: LoadWatch | None = None
        next_look = loop.time()
        while not await self._answers():
            self._tick()
            now = loop.time()
            if now >= next_look:
                next_look = now + _TICK_S
                seen = watch(seen, self._process.vitals(), self._lines, now)
                if stalled(seen, now, self._settings.stall_timeout_s):
                    raise EngineFailedError(
                        f"nothing about the engine moved for {self._settings.stall_timeout_s:g} s "
                        f"while it was {self._phase.name}",
                        reason=Reason.ENGINE_STALLED,
                        hint="The last log lines say where; engine.stall_timeout_s sets the limit.",
                    )
            await self._exit_within(_POLL_S)

    async def prove(self) -> str:
        """Ask the canary question; returns the answer.

        Raises:
            EngineFailedError: a wrong answer, none in time, or the engine exited.
        """
        self._board.progress(phase="asking the canary", percent=_WARMING_PERCENT)
        canary = self._profile.canary
        question = {
            "model": "default",
            "messages": [{"role": "user", "content": canary.prompt}],
            "max_tokens": canary.max_tokens,
            "temperature": 0,
            "seed": 0,
        }
        try:
            status, body = await self._while_alive(
                self.upstream.post_json("/v1/chat/completions", question, _CANARY_TIMEOUT_S)
            )
        except (aiohttp.ClientError, TimeoutError) as error:
            raise EngineFailedError(
                f"the canary got no answer: {error or 'timeout'}", reason=Reason.CANARY
            ) from error
        problem = _judge(canary.pattern, canary.text, status, body)
        if problem:
            raise EngineFailedError(f"the canary failed: {problem}", reason=Reason.CANARY)
        await self._while_alive(self._scrape())  # readiness asks for a heartbeat
        self._was_ready = True
        return _text(body)

    async def watch(self) -> None:
        """Scrape and judge until the engine must be restarted.

        Raises:
            EngineFailedError: why.
        """
        rules = policy.Rules(
            freeze_timeout_s=self._settings.freeze_timeout_s,
            fresh_s=max(10.0, 3 * self._settings.scrape_interval_s),
        )
        loop = asyncio.get_running_loop()
        while True:
            socket = await self._scrape()
            self._tick()
            seen = policy.Observation(
                now=loop.time(),
                exited=not self.alive,
                was_ready=self._was_ready,
                socket=socket,
                progress=self.progress,
            )
            if (reason := policy.liveness(seen, rules)) is not None:
                await self._exit_within(_POLL_S)  # an exit explains a refused socket better
                raise EngineFailedError(_LIVENESS[reason], reason=reason)
            await self._exit_within(self._settings.scrape_interval_s)

    async def stop(self, grace_s: float) -> None:
        """Stop the engine, by force after ``grace_s`` seconds, and wait until nothing of it is left."""
        stopping = asyncio.create_task(self._process.stop(grace_s))
        while not stopping.done():
            self._tick()
            await asyncio.wait((stopping,), timeout=_TICK_S)
        await self.upstream.close()

    async def kill(self) -> None:
        """As :meth:`stop`, at once."""
        await self._process.kill()
        await self.upstream.close()

    def _take_line(self, line: str) -> None:
        self._lines += 1
        log.info("%s", line)
        phase = phases.advance(self._phase, line)
        if phase is not self._phase:
            self._phase = phase
            self._board.progress(phase=phase.name, percent=phase.percent)

    async def _answers(self) -> bool:
        try:
            status, _ = await self.upstream.get("/health", _PROBE_TIMEOUT_S)
        except (aiohttp.ClientError, TimeoutError):
            return False
        return status == HTTPStatus.OK

    async def _scrape(self) -> policy.Socket:
        try:
            _, body = await self.upstream.get("/metrics", _PROBE_TIMEOUT_S)
        except aiohttp.ClientConnectorError:
            return policy.Socket.REFUSED
        except TimeoutError:
            return policy.Socket.TIMED_OUT
        except aiohttp.ClientError:
            return policy.Socket.UNKNOWN
        sample = parse_sample(body.decode(), asyncio.get_running_loop().time())
        if sample is not None:
            self.progress = policy.follow(self.progress, sample)
        return policy.Socket.ACCEPTED

    async def _exit_within(self, seconds: float) -> None:
        """Wait ``seconds``, or raise as soon as the engine is gone."""
        try:
            async with asyncio.timeout(seconds):
                await self._process.exited.wait()
        except TimeoutError:
            return
        raise self._gone()

    async def _while_alive(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of ``work``, ticking meanwhile; raises if the engine goes first."""
        task = asyncio.create_task(work)
        gone = asyncio.create_task(self._process.exited.wait())
        try:
            while not task.done():
                self._tick()
                await asyncio.wait(
                    (task, gone), timeout=_TICK_S, return_when=asyncio.FIRST_COMPLETED
                )
                if gone.done() and not task.done():
                    raise self._gone()
            return task.result()
        finally:
            task.cancel()
            gone.cancel()

    def _gone(self) -> EngineFailedError:
        reason = policy.exit_cause(self.tail, killed_by_guard=False)
        code = self._process.returncode
        how = f"signal {-code}" if code is not None and code < 0 else f"code {code}"
        return EngineFailedError(
            f"the engine exited with {how} while {self._phase.name}"
            if not self._was_ready
            else f"the engine exited with {how}",
            reason=reason,
        )


_LIVENESS = {
    Reason.ENGINE_EXITED: "the engine exited",
    Reason.ENGINE_UNREACHABLE: "the engine's socket refuses connections",
    Reason.ENGINE_STALLED: "requests run, but the engine has not made a step for too long",
}


def _judge(pattern: str, text: str, status: int, body: bytes) -> str:
    """What is wrong with an answer; empty if nothing."""
    if status != HTTPStatus.OK:
        return f"status {status}: {body[:200].decode(errors='replace')}"
    answer = _text(body)
    if not answer.strip():
        return "an empty answer"
    if text and answer != text:
        return f"{answer!r} is not {text!r}"
    if pattern and not re.search(pattern, answer):
        return f"{answer!r} does not match {pattern!r}"
    return ""


def _text(body: bytes) -> str:
    try:
        return str(json.loads(body)["choices"][0]["message"]["content"] or "")
    except (ValueError, LookupError, TypeError):
        return ""
