"""One run of the engine: start it, follow its load, prove its tokens, watch it."""

import asyncio
import json
import logging
import secrets
from collections.abc import Awaitable, Callable, Coroutine
from http import HTTPStatus
from typing import Any, TypeVar

from spark_llm import canary, host, phases, policy, roofline
from spark_llm.config import Settings
from spark_llm.engine import EngineProcess
from spark_llm.errors import SparkLlmError
from spark_llm.footprint import weigh
from spark_llm.high_water import Mark
from spark_llm.prepare import Prepared
from spark_llm.profile import Engine
from spark_llm.reason import Reason
from spark_llm.scrape import parse_counters
from spark_llm.status import StatusBoard
from spark_llm.upstream import NobodyListensError, Upstream, UpstreamError
from spark_llm.vitals import LoadWatch, stalled, watch
from spark_llm.watchman import Level, Watchman

_POLL_S = 0.25
_TICK_S = 1.0
_PROBE_TIMEOUT_S = 2.0
_DYING_S = 10.0
"""From a broken answer to an engine that is wholly gone, with all its memory given back."""
_WEIGH_LOADING_S = 1.0
_WEIGH_READY_S = 10.0
"""Between two looks at its memory, which changes fast only while it loads."""

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
        speed: what decoding reached between the last two scrapes that had any; None before.
        held: memory that it holds now, in bytes; as much as is known of it.
    """

    def __init__(  # noqa: PLR0913, PLR0917  what it reports to
        self,
        settings: Settings,
        prepared: Prepared,
        board: StatusBoard,
        tick: Callable[[], None],
        on_memory: Callable[[Level], None],
        on_weight: Callable[[], Awaitable[None]],
    ) -> None:
        self.id = secrets.token_hex(4)
        self.upstream = Upstream(prepared.socket)
        self.progress: policy.Progress | None = None
        self.speed: roofline.Achieved | None = None
        self.held = 0
        self._peak = 0
        self._lowest = prepared.account.machine.available
        self._attributed = prepared.profile.engine is Engine.CPU
        self._on_weight = on_weight
        self._settings = settings.engine
        self._prepared = prepared
        self._board = board
        self._tick = tick
        self._lines = 0
        self._cause: policy.Cause | None = None
        self._phase = phases.STARTED
        self._was_ready = False
        self._counters: roofline.Counters | None = None
        self._bandwidth = 0.0
        self._process = EngineProcess.start(
            prepared.command,
            socket=prepared.socket,
            on_line=self._take_line,
        )
        try:
            self._watchman = Watchman(
                settings.memory,
                self._process.pid,
                prepared.socket.with_suffix(".guard"),
                on_memory,
            )
        except BaseException:
            self._process.strike()  # whoever asked gets no run to stop, and nobody guards it
            raise
        self._weighing = asyncio.create_task(self._weigh_often(), name="weighing")
        board.progress(run_id=self.id, engine_pid=self._process.pid, phase=self._phase.name)

    @property
    def pid(self) -> int:
        """Of the API process, which leads the group."""
        return self._process.pid

    @property
    def last_log(self) -> tuple[str, ...]:
        """The line that says why it ended, if one does, and then its last ones."""
        tail = tuple(self._process.tail)
        if self._cause is None or not self._cause.line:
            return tail
        return (self._cause.line, *(line for line in tail if line != self._cause.line))

    @property
    def memory(self) -> Level:
        """What the guard said last."""
        return self._watchman.level

    @property
    def mark(self) -> Mark:
        """The most memory it has held so far."""
        if self._attributed:
            return Mark(self.id, self._peak)
        fall = self._prepared.account.machine.available - self._lowest
        return Mark(self.id, max(self._peak, fall), whole=True)

    @property
    def alive(self) -> bool:
        """Whether any process of it is left."""
        return not self._process.exited.is_set()

    async def load(self, expected_s: float | None = None) -> None:
        """Wait until the engine answers; bounded by progress, not by a clock.

        Args:
            expected_s: how long the last start took, for the time left that is shown; None if unknown.

        Raises:
            EngineFailedError: it exited, or nothing about it moved for ``stall_timeout_s``.
        """
        loop = asyncio.get_running_loop()
        seen: LoadWatch | None = None
        started = next_look = loop.time()
        while not await self._answers():
            self._tick()
            now = loop.time()
            if now >= next_look:
                next_look = now + _TICK_S
                if expected_s is not None:
                    self._board.progress(eta_s=max(0.0, expected_s - (now - started)))
                seen = self._moved(seen)
            await self._exit_within(_POLL_S)

    async def prove(self) -> str:
        """Ask the canary before the engine is ready; bounded by progress as :meth:`load`, for kernels may be compiled.

        Returns:
            The answer's text.

        Raises:
            EngineFailedError: a wrong answer or none, or the engine exited or does not move.
        """
        self._enter(phases.PROVING)
        try:
            text = await self._while_alive(self.ask_canary())
        except UpstreamError as error:
            await self._exit_within(_DYING_S)  # an exit explains a broken answer better
            raise EngineFailedError(
                f"the canary got no answer: {error}", reason=Reason.ENGINE_UNREACHABLE
            ) from error
        await self._while_alive(self._scrape())  # readiness asks for a heartbeat
        self._was_ready = True
        self._bandwidth, _ = await asyncio.to_thread(host.memory_bandwidth)
        return text

    async def ask_canary(self, timeout_s: float | None = None) -> str:
        """Ask the canary's questions, all at once; returns the first answer's text.

        Raises:
            EngineFailedError: an answer is wrong.
            UpstreamError: there is none; a status of 500 and above is none, for a dying engine still says so much.
            TimeoutError: nor is there one within ``timeout_s`` seconds.
        """
        questions = canary.questions(self._prepared.profile)
        answers = await asyncio.gather(
            *(
                self.upstream.post_json(canary.PATH, question.body, timeout_s)
                for question in questions
            )
        )
        read = [canary.read(status, body) for status, body in answers]
        for status, answer in read:
            if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
                raise UpstreamError(f"{status} {json.dumps(answer)[:300]}")
        for question, (status, answer) in zip(questions, read, strict=True):
            fault = canary.judge(self._prepared.profile, question, status, answer)
            if fault:
                raise EngineFailedError(f"the canary failed: {fault}", reason=Reason.CANARY)
        return str(read[0][1]["choices"][0]["message"].get("content") or "")

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
                power_w=host.gpu_power_w(),
            )
            if (reason := policy.liveness(seen, rules)) is not None:
                await self._exit_within(_POLL_S)  # an exit explains a refused socket better
                raise EngineFailedError(_LIVENESS[reason], reason=reason)
            await self._exit_within(self._settings.scrape_interval_s)

    async def weigh(self) -> None:
        """Look what memory it holds now."""
        found = await asyncio.to_thread(weigh, self.pid)
        self.held = found.size
        self._attributed = self._attributed or found.gpu is not None
        self._peak = max(self._peak, found.size)
        self._lowest = min(self._lowest, host.machine().available)
        await self._on_weight()

    async def stop(self, grace_s: float, hurry: asyncio.Event) -> None:
        """Stop the engine and wait until nothing of it is left.

        Args:
            grace_s: after that many seconds, by force.
            hurry: once it is set, by force at once.
        """
        stopping = asyncio.create_task(self._process.stop(grace_s))
        hurrying = asyncio.create_task(self._kill_when(hurry))
        while not stopping.done():
            self._tick()
            await asyncio.wait((stopping,), timeout=_TICK_S)
        hurrying.cancel()
        await self._close()

    async def kill(self) -> None:
        """As :meth:`stop`, at once."""
        await self._process.kill()
        await self._close()

    async def _kill_when(self, hurry: asyncio.Event) -> None:
        await hurry.wait()
        await self._process.kill()

    async def _weigh_often(self) -> None:
        while self.alive:
            await self.weigh()
            await asyncio.sleep(_WEIGH_READY_S if self._was_ready else _WEIGH_LOADING_S)

    async def _close(self) -> None:
        self._weighing.cancel()
        await asyncio.wait((self._weighing,))
        await self._watchman.close()
        await self.upstream.close()

    def _take_line(self, line: str) -> None:
        self._lines += 1
        self._cause = policy.name_cause(self._cause, line, asyncio.get_running_loop().time())
        log.info("%s", line)
        self._enter(phases.advance(self._phase, line))

    def _enter(self, phase: phases.Phase) -> None:
        if phase is not self._phase:
            self._phase = phase
            self._board.progress(phase=phase.name, percent=phase.percent)

    async def _answers(self) -> bool:
        try:
            status, _ = await self.upstream.get("/health", _PROBE_TIMEOUT_S)
        except (UpstreamError, TimeoutError):
            return False
        return status == HTTPStatus.OK

    async def _scrape(self) -> policy.Socket:
        try:
            _, body = await self.upstream.get("/metrics", _PROBE_TIMEOUT_S)
        except NobodyListensError:
            return policy.Socket.REFUSED
        except TimeoutError:
            return policy.Socket.TIMED_OUT
        except UpstreamError:
            return policy.Socket.UNKNOWN
        counters = parse_counters(body.decode(), asyncio.get_running_loop().time())
        if counters is not None:
            waiting = self.upstream.waiting(counters.at - self._settings.scrape_interval_s)
            sample = policy.Sample(
                counters.at, round(counters.running) + waiting, round(counters.iterations)
            )
            self.progress = policy.follow(self.progress, sample)
            self._measure(counters)
        return policy.Socket.ACCEPTED

    def _measure(self, counters: roofline.Counters) -> None:
        before, self._counters = self._counters, counters
        model = self._prepared.model
        if before is None or model is None or not self._bandwidth:
            return
        reached = roofline.achieved(
            before,
            counters,
            self._prepared.profile,
            model,
            self._bandwidth,
            presence=self._prepared.account.machine.kernels,
        )
        if reached is not None:
            self.speed = reached
            self._board.progress(speed=str(reached))

    def _moved(self, seen: LoadWatch | None) -> LoadWatch:
        """One more look whether a start moves.

        Raises:
            EngineFailedError: nothing about it has moved for ``stall_timeout_s``.
        """
        now = asyncio.get_running_loop().time()
        seen = watch(seen, self._process.vitals(), self._lines, now)
        if stalled(seen, now, self._settings.stall_timeout_s):
            raise EngineFailedError(
                f"nothing about the engine moved for {self._settings.stall_timeout_s:g} s "
                f"while it was {self._phase.name}",
                reason=Reason.ENGINE_STALLED,
                hint="The last log lines say where; engine.stall_timeout_s sets the limit.",
            )
        return seen

    async def _exit_within(self, seconds: float) -> None:
        """Wait ``seconds``, or raise as soon as the engine is gone."""
        try:
            async with asyncio.timeout(seconds):
                await self._process.exited.wait()
        except TimeoutError:
            return
        raise await self._gone()

    async def _while_alive(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of ``work``, ticking meanwhile; raises if the engine goes or stops to move first."""
        seen: LoadWatch | None = None
        task = asyncio.create_task(work)
        gone = asyncio.create_task(self._process.exited.wait())
        try:
            while not task.done():
                self._tick()
                seen = self._moved(seen)
                await asyncio.wait(
                    (task, gone), timeout=_TICK_S, return_when=asyncio.FIRST_COMPLETED
                )
                if gone.done() and not task.done():
                    raise await self._gone()
            return task.result()
        finally:
            task.cancel()
            gone.cancel()

    async def _gone(self) -> EngineFailedError:
        await self._watchman.heard()
        now = asyncio.get_running_loop().time()
        cause = self._cause = policy.exit_cause(
            self._cause, now, killed_by_guard=self._watchman.killed
        )
        code = self._process.returncode
        how = f"signal {-code}" if code is not None and code < 0 else f"code {code}"
        when = "" if self._was_ready else f" while {self._phase.name}"
        why = f": {cause.sentence}" if cause.line else ""
        return EngineFailedError(f"the engine exited with {how}{when}{why}", reason=cause.reason)


_LIVENESS = {
    Reason.ENGINE_EXITED: "the engine exited",
    Reason.ENGINE_UNREACHABLE: "the engine's socket refuses connections",
    Reason.ENGINE_STALLED: "requests run, but the engine has not made a step for too long",
}
