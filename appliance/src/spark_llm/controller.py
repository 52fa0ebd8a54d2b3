"""The state machine that ties facts, decisions and acts together."""

import asyncio
import logging
import os
import time
from pathlib import Path

from spark_llm import argv, policy
from spark_llm.config import Settings
from spark_llm.demo_model import write_demo_model
from spark_llm.errors import SparkLlmError
from spark_llm.folders import Folders
from spark_llm.gateway.queue import AdmissionQueue
from spark_llm.gateway.reply import Reply
from spark_llm.gateway.upstream import Upstream
from spark_llm.model_folder import check_model_folder
from spark_llm.profile import DEMO_MODEL, Profile
from spark_llm.reason import Reason
from spark_llm.run import EngineFailedError, EngineRun
from spark_llm.status import SERVING, TERMINAL, Bus, State, Status, StatusBoard

_TICK_S = 1.0
TICK_LIMIT_S = 5.0
"""A controller loop that has not come round for this long is stuck."""

log = logging.getLogger("spark_llm.controller")


class Controller:
    """Keeps one engine serving one profile.

    Attributes:
        board: the status and its events.
        run: the engine's current run; None between runs.
        ended: the state in which it was told to stop.
    """

    def __init__(
        self, settings: Settings, profile: Profile, folders: Folders, queue: AdmissionQueue
    ) -> None:
        self.settings = settings
        self.profile = profile
        self.folders = folders
        self.board = StatusBoard(Bus(), Status(profile=profile.name, model=profile.model))
        self.run: EngineRun | None = None
        self.ended = State.STOPPED
        self._queue = queue
        self._failures: list[policy.Failure] = []
        self._ticked_at = time.monotonic()
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()

    # what the gateway asks

    def upstream(self) -> Upstream:
        """The engine, while it is ready.

        Raises:
            Reply: 503 with the phase otherwise.
        """
        now = self.board.now
        if now.state in SERVING and self.run is not None:
            return self.run.upstream
        if now.state in {State.DRAINING, State.STOPPING, State.STOPPED}:
            raise Reply(503, Reason.DRAINING, "the service stops", retry_after_s=10)
        detail = now.message or now.phase
        raise Reply(
            503,
            Reason.NOT_READY if now.state not in TERMINAL else now.reason,
            f"not ready: {now.state}" + (f", {detail}" if detail else ""),
            retry_after_s=self.retry_after_s(),
        )

    def retry_after_s(self) -> int:
        """When asking again is worth it, in seconds."""
        now = self.board.now
        if now.state in TERMINAL:
            return 60
        return max(1, min(60, round(now.eta_s))) if now.eta_s is not None else 5

    def tick_age_s(self) -> float:
        """Time since the controller's loop last came round, in seconds."""
        return time.monotonic() - self._ticked_at

    def checks(self) -> tuple[policy.Check, ...]:
        """The named conditions of readiness."""
        now = self.board.now
        proven = now.manifest if now.state in SERVING else ""
        progress = self.run.progress if self.run else None
        facts = policy.ReadyFacts(
            engine_up=self.run is not None and self.run.alive and now.state in SERVING,
            canary_manifest=proven,
            manifest=now.manifest,
            heartbeat_age_s=time.monotonic() - progress.sample.at if progress else None,
            memory_ok=now.reason is not Reason.MEMORY,
            draining=now.state in {State.DRAINING, State.STOPPING},
        )
        return policy.readiness(facts, self._rules())

    # life

    def request_stop(self) -> None:
        """Drain and stop; asked a second time, stop at once."""
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    async def serve(self) -> None:
        """Keep the engine running until :meth:`request_stop`; returns once nothing of it is left."""
        work = asyncio.create_task(self._keep_running())
        stop = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait((work, stop), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()  # an error of ours, never of the engine
            self.ended = self.board.now.state
            await self._drain()
        finally:
            work.cancel()
            stop.cancel()
            await asyncio.wait((work, stop))
            if self.run is not None:
                await self._end_run(grace_s=0 if self._hurry.is_set() else None)
            self.board.enter(State.STOPPED, Reason.STOPPED_BY_USER)

    async def _keep_running(self) -> None:
        while True:
            try:
                await self._one_run()
            except EngineFailedError as error:
                if not await self._after_failure(error):
                    break
            except SparkLlmError as error:
                log.error("%s %s", error.message, error.hint)  # noqa: TRY400  for a person, no traceback
                self.board.enter(State.BLOCKED, error.reason, error.message, hint=error.hint)
                break
        await self._idle()

    async def _one_run(self) -> None:
        """From preflight to the end of one engine run, which is always an error."""
        self.board.enter(State.PREFLIGHT)
        self._tick()
        model = await self._model()
        self.folders.make()
        socket = self.folders.runtime / "engine.sock"
        command = argv.build(
            self.profile,
            python=engine_python(self.settings),
            model=model,
            socket=socket,
            home=self.folders.cache,
            shutdown_timeout_s=self.settings.engine.drain_timeout_s,
            inherited=os.environ,
            caches={"VLLM_CACHE_ROOT": str(self.folders.cache / "vllm")},
        )
        started = time.monotonic()
        self.board.enter(State.LOADING, percent=2)
        self.run = EngineRun(
            self.settings.engine, self.profile, command, socket, self.board, self._tick
        )
        try:
            await self.run.load()
            self.board.enter(State.WARMING)
            answer = await self.run.prove()
            log.info("the canary answered %r", answer)
            took = time.monotonic() - started
            self.board.enter(
                State.READY,
                message=f"ready after {took:.1f} s",
                percent=100,
                manifest=self.run.id,
                restarts=len(self._failures),
                restarts_left=self.settings.engine.restart_budget - len(self._failures),
            )
            log.info("ready after %.1f s", took)
            await self.run.watch()
        except EngineFailedError:
            await self.run.kill()
            raise

    async def _model(self) -> Path:
        """The folder of the model, complete."""
        if self.profile.model == DEMO_MODEL:
            folder = self.folders.models / DEMO_MODEL
            await asyncio.to_thread(write_demo_model, folder)
        else:
            folder = Path(self.profile.model)
        check_model_folder(folder)
        return folder

    async def _after_failure(self, error: EngineFailedError) -> bool:
        """Apply the restart policy; False when it says to stay down."""
        run, self.run = self.run, None
        tail = run.tail if run else ()
        now = time.monotonic()
        rules = self._rules()
        self._failures.append(policy.Failure(now, error.reason))
        self._failures = [
            item for item in self._failures if now - item.at <= rules.restart_window_s
        ]
        verdict = policy.after_failure(self._failures, now, rules)
        log.error("%s (%s)", error.message, error.reason)
        details = {
            "last_log": tail,
            "restarts": len(self._failures),
            "restarts_left": verdict.left,
            "engine_pid": None,
            "run_id": "",
            "manifest": "",
            "percent": 0,
        }
        if verdict.action is policy.Action.FAIL:
            self.board.enter(
                State.FAILED,
                verdict.reason,
                error.message,
                hint=verdict.hint or error.hint,
                **details,
            )
            return False
        self.board.enter(
            State.PREFLIGHT,
            error.reason,
            f"{error.message}; restarting in {verdict.delay_s:.0f} s",
            **details,
        )
        await self._pause(verdict.delay_s)
        return True

    async def _drain(self) -> None:
        """Stop admitting, let running requests end, cut those that do not, stop the engine."""
        limit = self.settings.engine.drain_timeout_s
        self.board.enter(
            State.DRAINING, Reason.STOPPED_BY_USER, f"{self._queue.running} requests still run"
        )
        self._queue.close(Reason.DRAINING)
        idle = asyncio.create_task(self._queue.idle.wait())
        hurry = asyncio.create_task(self._hurry.wait())
        deadline = time.monotonic() + limit
        try:
            while not idle.done() and not hurry.done() and time.monotonic() < deadline:
                self._tick()
                await asyncio.wait(
                    (idle, hurry),
                    timeout=min(_TICK_S, max(0.0, deadline - time.monotonic())),
                    return_when=asyncio.FIRST_COMPLETED,
                )
            if not idle.done():
                log.warning("cutting %d requests", self._queue.running)
                self._queue.cut()
                await asyncio.wait((idle,), timeout=_TICK_S)
        finally:
            idle.cancel()
            hurry.cancel()
        self.board.enter(State.STOPPING, Reason.STOPPED_BY_USER)

    async def _end_run(self, grace_s: float | None) -> None:
        run, self.run = self.run, None
        if run is None:
            return
        grace = self.settings.engine.stop_timeout_s if grace_s is None else grace_s
        stopping = asyncio.create_task(run.stop(grace) if grace else run.kill())
        hurry = asyncio.create_task(self._hurry.wait())
        await asyncio.wait((stopping, hurry), return_when=asyncio.FIRST_COMPLETED)
        if not stopping.done():
            await run.kill()
        await stopping
        hurry.cancel()

    async def _idle(self) -> None:
        while True:
            await self._pause(_TICK_S)

    async def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._tick()
            await asyncio.sleep(min(left, _TICK_S))

    def _tick(self) -> None:
        self._ticked_at = time.monotonic()

    def _rules(self) -> policy.Rules:
        engine = self.settings.engine
        return policy.Rules(
            freeze_timeout_s=engine.freeze_timeout_s,
            restart_budget=engine.restart_budget,
            restart_window_s=engine.restart_window_s,
        )


def engine_python(settings: Settings) -> Path:
    """The interpreter that has vLLM: as configured, else ``.venv-engine`` of the checkout this runs from."""
    if settings.engine.python:
        return Path(settings.engine.python)
    return Path(__file__).parents[3] / ".venv-engine" / "bin" / "python"
