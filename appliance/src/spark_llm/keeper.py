"""Keeps one engine serving one profile: start, prove, watch, restart within a budget, stop."""

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import ExitStack

from spark_llm import policy
from spark_llm.admission_queue import AdmissionQueue
from spark_llm.argv import served_names
from spark_llm.caches import Namespace
from spark_llm.config import Settings
from spark_llm.door import Door
from spark_llm.errors import SparkLlmError
from spark_llm.folders import Folders
from spark_llm.high_water import HighWater, Recording
from spark_llm.prepare import Preparation
from spark_llm.profile import Profile
from spark_llm.promises import Promises
from spark_llm.reason import Reason
from spark_llm.reply import Reply
from spark_llm.retries import rules_of
from spark_llm.run import EngineFailedError, EngineRun
from spark_llm.starts import Starts
from spark_llm.status import NO_ENGINE, SERVING, TERMINAL, State, StatusBoard
from spark_llm.upstream import Upstream, UpstreamError

_TICK_S = 1.0
_CANARY_TIMEOUT_S = 180.0
"""On demand, behind whatever else the engine has to do."""
log = logging.getLogger("spark_llm.keeper")


class Keeper:
    """One profile and its engine.

    Attributes:
        profile: what it serves.
        board: its status.
        queue: who may go to its engine.
        run: the engine's current run; None between runs.
        used_at: when a request was last forwarded to it, on the monotonic clock, in seconds.
        admitted: set once it has passed the start gate, or never will.
        settled: set once it is ready for the first time, or failed or blocked.
        waiting_to_load: requests that wait for that.
    """

    def __init__(  # noqa: PLR0913, PLR0917  the parts it is made of
        self,
        settings: Settings,
        profile: Profile,
        folders: Folders,
        board: StatusBoard,
        queue: AdmissionQueue,
        tick: Callable[[], None],
        promises: Promises,
        *,
        make_room: Callable[[], bool] = lambda: False,
        has_turn: Callable[[], bool] = lambda: True,
        failures: list[policy.Failure] | None = None,
    ) -> None:
        self.profile = profile
        self.board = board
        self.queue = queue
        self.run: EngineRun | None = None
        self.used_at = time.monotonic()
        self._lacked = 0
        self.admitted = asyncio.Event()
        self.settled = asyncio.Event()
        self.waiting_to_load = 0
        self._door = Door(board, queue)
        self._settings = settings
        self._rules = rules_of(settings)
        self._tick = tick
        self._promises = promises
        self._preparation = Preparation(
            settings, folders, board, tick, promises, make_room=make_room, has_turn=has_turn
        )
        self._high_water = HighWater(folders.high_water)
        self._recording: Recording | None = None
        self._need = 0
        self._starts = Starts(folders.state / "starts.json")
        self._last_start_s = self._starts.expected_s(profile.name)
        self._failures = [] if failures is None else failures  # of keepers before it, too
        self._sealed: Namespace | None = None
        self._holding = ExitStack()
        self._stopping: asyncio.Task[None] | None = None
        self._work: asyncio.Task[None] | None = None
        board.progress(profile=profile.name, model=profile.model)

    @property
    def names(self) -> tuple[str, ...]:
        """Names that clients may ask for."""
        return served_names(self.profile)

    @property
    def state(self) -> State:
        """Where it is."""
        return self.board.now.state

    @property
    def working(self) -> bool:
        """Whether its own loop runs."""
        return self._work is not None and not self._work.done()

    def upstream(self) -> Upstream:
        """Its engine, while it is ready.

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
            now.reason if now.state in TERMINAL else Reason.NOT_READY,
            f"not ready: {now.state}" + (f", {detail}" if detail else ""),
            retry_after_s=self.retry_after_s(),
        )

    def touch(self) -> None:
        """It is used: this puts off unloading it."""
        self.used_at = time.monotonic()

    def retry_after_s(self) -> int:
        """When asking again is worth it, in seconds."""
        now = self.board.now
        if now.state in TERMINAL:
            return 60
        return max(1, min(60, round(now.eta_s))) if now.eta_s is not None else 5

    def expected_s(self) -> float | None:
        """Time until it is ready, in seconds: by its progress, else as the last load took; None where nothing tells."""
        eta = self.board.now.eta_s
        return self._last_start_s if eta is None else eta

    def checks(self) -> tuple[policy.Check, ...]:
        """The named conditions of readiness."""
        now = self.board.now
        progress = self.run.progress if self.run else None
        facts = policy.ReadyFacts(
            engine_up=self.run is not None and self.run.alive and now.state in SERVING,
            canary_manifest=now.proven,
            manifest=now.manifest,
            heartbeat_age_s=time.monotonic() - progress.sample.at if progress else None,
            memory_ok=now.reason is not Reason.MEMORY,
            draining=now.state in {State.DRAINING, State.STOPPING},
        )
        return policy.readiness(facts, self._rules)

    def start(self) -> None:
        """Begin, or begin anew after the end; progress is on the board."""
        self.admitted.clear()
        self.settled.clear()
        self._work = asyncio.create_task(self._keep_running(), name=f"keeper-{self.profile.name}")

    async def start_if_model_came(self) -> None:
        """Begin anew if it was blocked for want of a model and another process has brought one since."""
        if not self._waits_for_model():
            return
        lacking = await asyncio.to_thread(self._preparation.lacking, self.profile)
        if lacking < self._lacked and self._waits_for_model():  # it may have been stopped meanwhile
            del self._failures[-1:]  # it is cured
            self.start()

    def _waits_for_model(self) -> bool:
        now = self.board.now
        blocked = (now.state, now.reason) == (State.BLOCKED, Reason.MODEL_MISSING)
        return blocked and not self.working and self._stopping is None

    async def drain(self, hurry: asyncio.Event, reason: Reason, message: str) -> None:
        """Stop admitting, let running requests end within the drain timeout, cut those that do not."""
        self.board.enter(State.DRAINING, reason, message)
        self.queue.close(Reason.DRAINING)
        idle = asyncio.create_task(self.queue.idle.wait())
        hurried = asyncio.create_task(hurry.wait())
        deadline = time.monotonic() + self._settings.engine.drain_timeout_s
        try:
            while not idle.done() and not hurried.done() and time.monotonic() < deadline:
                self._tick()
                await asyncio.wait(
                    (idle, hurried),
                    timeout=min(_TICK_S, max(0.0, deadline - time.monotonic())),
                    return_when=asyncio.FIRST_COMPLETED,
                )
            if not idle.done():
                log.warning("cutting %d requests", self.queue.running)
                self.queue.cut()
                await asyncio.wait((idle,), timeout=_TICK_S)
        finally:
            idle.cancel()
            hurried.cancel()

    async def stop(self, hurry: asyncio.Event, reason: Reason = Reason.STOPPED_BY_USER) -> None:
        """Stop the engine and wait until nothing of it is left; at once when ``hurry`` is set.

        It goes on when its caller is cancelled, and whoever asks again waits for the same stop; one that broke off is
        begun anew.
        """
        stopping = self._stopping
        if stopping is None or (stopping.done() and stopping.exception() is not None):
            self.board.enter(State.STOPPING, reason)
            stopping = self._stopping = asyncio.create_task(self._stop(hurry))
        await asyncio.shield(stopping)
        self.board.enter(State.STOPPED, reason, percent=0, **NO_ENGINE)

    async def _stop(self, hurry: asyncio.Event) -> None:
        if self._work is not None:
            self._work.cancel()
            await asyncio.wait((self._work,))
        with self._holding:  # the model and the caches are its own until it is gone
            if self.run is not None:
                await self.run.stop(self._settings.engine.stop_timeout_s, hurry)
                self.run = None
                if self._sealed is not None:
                    await _seal(self._sealed)  # with what was compiled since it was ready
        self._give_up()

    async def ask_canary(self) -> str:
        """Prove the running engine's tokens again, on demand.

        Raises:
            Reply: it is not ready, or did not answer, which proves nothing and changes nothing.
            EngineFailedError: the answer is wrong; nobody is let in until it is right.
        """
        self.upstream()
        run = self.run
        assert run is not None  # noqa: S101  upstream() said so
        try:
            text = await run.ask_canary(_CANARY_TIMEOUT_S)
        except (UpstreamError, TimeoutError) as error:
            message = f"the canary got no answer: {str(error) or 'timeout'}; nothing has changed"
            raise Reply(503, Reason.TIMEOUT, message, retry_after_s=60) from error
        except EngineFailedError as error:
            if self.run is run:
                self._door.on_canary(error.message)
            raise
        if self.run is run:
            self._door.on_canary("")
        return text

    def _give_up(self) -> None:
        """Nothing more is to be expected of it: others need not wait, nor leave its memory free."""
        self._promises.release(self.profile.name)
        self.admitted.set()
        self.settled.set()

    async def _keep_running(self) -> None:
        try:
            await self._run_while_allowed()
        except Exception as error:
            # A fault of ours: say so everywhere instead of standing still without a word.
            log.exception("internal error")
            self._note_failure(Reason.INTERNAL)
            hint = "The log has the traceback; please report it."
            self.run = None
            self.board.enter(
                State.FAILED, Reason.INTERNAL, repr(error), hint=hint, proven="", **NO_ENGINE
            )
        self._give_up()

    async def _run_while_allowed(self) -> None:
        """Run after run, until the restart policy says to stay down or something is in the way of a start."""
        try:
            while True:
                try:
                    await self._one_run()
                except EngineFailedError as error:
                    if not await self._after_failure(error):
                        break
        except SparkLlmError as error:
            log.error("%s. %s", error.message, error.hint)  # noqa: TRY400  for a person, no traceback
            self._note_failure(error.reason)
            self._lacked = await asyncio.to_thread(self._preparation.lacking, self.profile)
            self.board.enter(State.BLOCKED, error.reason, error.message, hint=error.hint)

    async def _one_run(self) -> None:
        """From preflight to the end of one engine run, which is always an error."""
        with ExitStack() as holding:
            try:
                await self._held_run(holding)
            except asyncio.CancelledError:
                self._holding = holding.pop_all()  # until the engine is stopped
                raise

    async def _held_run(self, holding: ExitStack) -> None:
        prepared = await self._preparation.prepare(self.profile, holding)
        self.admitted.set()
        started = time.monotonic()
        expected_s = self._starts.expected_s(self.profile.name)
        self.board.enter(
            State.LOADING, percent=2, manifest=prepared.manifest.digest, eta_s=expected_s
        )
        self.run = EngineRun(
            self._settings,
            prepared,
            self.board,
            self._tick,
            self._door.on_memory,
            self._on_weight,
        )
        self._recording = Recording(self._high_water, self.profile, prepared.memory_build)
        self._need = prepared.account.need_bytes
        try:
            await self.run.load(expected_s)
            self.board.enter(State.WARMING)
            log.info("the canary answered %r", await self.run.prove())
            await _seal(prepared.namespace)
            self._sealed = prepared.namespace
            took = time.monotonic() - started
            log.info("%s is ready after %.1f s", self.profile.name, took)
            await asyncio.to_thread(self._starts.took, self.profile.name, took)
            self.board.enter(
                State.READY,
                message=f"ready after {took:.1f} s",
                percent=100,
                proven=prepared.manifest.digest,
                restarts=len(self._failures),
                restarts_left=max(0, self._rules.restart_budget - len(self._failures)),
            )
            self._door.open(self.run.memory)
            self.settled.set()
            await self.run.weigh()
            await self.run.watch()
        except Exception:  # a fault of ours, too, must not leave an engine that nobody looks after
            self._sealed = None  # what a dying engine wrote is not trusted
            await self.run.kill()
            self._promises.took(self.profile.name, 0)
            raise

    async def _on_weight(self) -> None:
        """The engine was weighed: keep the account of what it may still take, and its high-water mark."""
        run = self.run
        if run is None:
            return
        serving, mark = self.state in SERVING, run.mark
        # Where nobody can tell what it has on the GPU, a loaded engine counts as having all it was promised.
        held = self._need if mark.whole and serving else run.held
        self._promises.took(self.profile.name, held)
        self.board.progress(
            memory_bytes=run.held,
            memory_peak_bytes=max(mark.size, self.board.now.memory_peak_bytes),
        )
        if serving and self._recording is not None:
            await self._recording.note(mark)

    async def _after_failure(self, error: EngineFailedError) -> bool:
        """Apply the restart policy; False when it says to stay down."""
        run, self.run = self.run, None
        now = self._note_failure(error.reason)
        verdict = policy.after_failure(self._failures, now, self._rules)
        log.error("%s (%s)", error.message, error.reason)
        details = {
            "last_log": run.last_log if run else (),
            "restarts": len(self._failures),
            "restarts_left": verdict.left,
            "manifest": "",
            "proven": "",
            "percent": 0,
            **NO_ENGINE,
        }
        if verdict.action is policy.Action.FAIL:
            hint = verdict.hint or error.hint
            self.board.enter(State.FAILED, verdict.reason, error.message, hint=hint, **details)
            return False
        message = f"{error.message}; restarting in {verdict.delay_s:.0f} s"
        self.board.enter(State.PREFLIGHT, error.reason, message, **details)
        end = now + verdict.delay_s
        while (left := end - time.monotonic()) > 0:
            self._tick()
            await asyncio.sleep(min(left, _TICK_S))
        return True

    def _note_failure(self, reason: Reason) -> float:
        """Keep it among the recent ones; returns the time."""
        now = time.monotonic()
        window = self._rules.restart_window_s
        recent = [item for item in self._failures if now - item.at <= window]
        self._failures[:] = [*recent, policy.Failure(now, reason)]
        return now


async def _seal(namespace: Namespace) -> None:
    """Vouch for the compile caches as they are.

    Where that cannot be written down, the next start compiles again what is new since the last seal; no more is lost.
    """
    try:
        await asyncio.to_thread(namespace.seal)
    except OSError as error:
        log.warning("the compile caches in %s cannot be sealed: %s", namespace.path, error.strerror)
