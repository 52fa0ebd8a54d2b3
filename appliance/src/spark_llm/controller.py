"""Which profiles are served: one that ``default`` names, and others beside it while memory allows."""

import asyncio
import logging
import time
from collections.abc import Coroutine, Iterable
from dataclasses import asdict
from math import inf
from typing import Any

from spark_llm.admission import Limits
from spark_llm.admission_queue import AdmissionQueue
from spark_llm.catalogue import Catalogue, read, read_pinned
from spark_llm.config import Settings
from spark_llm.errors import TryAgainError
from spark_llm.folders import Folders
from spark_llm.keeper import Keeper
from spark_llm.loading import too_late, wait_settled
from spark_llm.policy import Failure
from spark_llm.preflight import refuse_hopeless
from spark_llm.profile import Profile, load_profile
from spark_llm.promises import Promises
from spark_llm.reason import Reason
from spark_llm.reply import Reply
from spark_llm.retries import Retries, rules_of
from spark_llm.status import SERVING, TERMINAL, Bus, State, Status, StatusBoard
from spark_llm.switchover import Switch, steps

_TICK_S = 1.0
TICK_LIMIT_S = 5.0
"""A controller loop that has not come round for this long is stuck."""
_UNLOAD_LOOK_S = 5.0

log = logging.getLogger("spark_llm.controller")


class Controller:
    """Keeps engines serving profiles.

    Attributes:
        settings: of the service.
        primary: serves ``default``; its status is the service's.
        others: further engines by profile name, loaded on demand.
        ended: the state in which it was told to stop.
        last_switch: under way or over; None before the first.
    """

    def __init__(
        self,
        settings: Settings,
        profile: Profile,
        folders: Folders,
        limits: Limits,
    ) -> None:
        """Nothing is started yet. Raises ConfigError for pinned profiles that cannot be loaded together."""
        self.settings = settings
        self.folders = folders
        self.others: dict[str, Keeper] = {}
        self.ended = State.STOPPED
        self._bus = Bus()
        self._promises = Promises()
        self._limits = limits
        self._ticked_at = time.monotonic()
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self.last_switch: Switch | None = None
        self._switching: asyncio.Task[None] | None = None
        self._replacing = False
        self._unloading: dict[str, asyncio.Task[None]] = {}
        self._retries = Retries(rules_of(settings))
        self._catalogue = Catalogue()
        self.read_profiles()
        self._pinned = read_pinned(settings.models, profile, folders.profiles)
        self.primary = self._keeper(profile)

    @property
    def stopping(self) -> bool:
        """Whether it was told to stop."""
        return self._stop.is_set()

    @property
    def board(self) -> StatusBoard:
        """The status of the service: the primary's."""
        return self.primary.board

    # what the gateway asks

    def route(self, model: str) -> Keeper:
        """Who answers requests for ``model``; the primary for names that nobody else has."""
        self._refuse_while_stopping()
        for keeper in self.others.values():
            if model in keeper.names and model != "default":
                return keeper
        return self.primary

    async def load(self, model: str, patience_s: float | None = None) -> Keeper:
        """As :meth:`route`, but starts a known profile that is not loaded, where that is allowed, and waits for it.

        Args:
            model: what is asked for.
            patience_s: how long the client waits, in seconds; None if it did not say.

        Raises:
            Reply: 503 when it did not become ready or will not in time, 429 when too many wait for it.
        """
        keeper = self.route(model)
        known = model in keeper.names
        if not self.settings.models.on_demand or (
            known and (keeper is self.primary or keeper.state in SERVING)
        ):
            return keeper
        profile = self._catalogue.serving(keeper.profile.name if known else model)
        if profile is None:
            return keeper
        longest = self._limits.queue_timeout_s
        patience = longest if patience_s is None else min(patience_s, longest)
        try:
            async with asyncio.timeout(patience):
                return await self._load_beside(profile, patience)
        except TimeoutError:
            raise too_late(profile.name, self.others.get(profile.name)) from None

    def keepers(self) -> list[Keeper]:
        """All of them, the primary first."""
        return [self.primary, *self.others.values()]

    def tick_age_s(self) -> float:
        """Time since a loop last came round, in seconds."""
        return time.monotonic() - self._ticked_at

    def set_limits(self, limits: Limits) -> None:
        """New admission limits for all engines."""
        self._limits = limits
        for keeper in self.keepers():
            keeper.queue.set_limits(limits.for_engine(keeper.profile.max_num_seqs))

    def read_profiles(self) -> None:
        """Take up the profiles that can be loaded on demand; a request must not wait for all their files."""
        if self.settings.models.on_demand:
            self._catalogue = read(self.folders.profiles)

    # switching

    async def plan_switch(self, name: str) -> list[str]:
        """What :meth:`switch` would do, in words.

        Raises:
            SparkLlmError: no such profile, or it cannot be served here.
        """
        profile = await asyncio.to_thread(self._servable, name)
        return steps(
            self.primary.profile,
            profile,
            running=self.primary.queue.running,
            drain_timeout_s=self.settings.engine.drain_timeout_s,
        )

    async def switch(self, name: str) -> Switch:
        """Begin to serve another profile as primary; the old one comes back if the new one is not proven.

        Returns:
            the switch, under way; it is also :attr:`last_switch`.

        Raises:
            TryAgainError: another switch is under way.
            SparkLlmError: no such profile, or it cannot be served here; nothing was changed.
        """
        profile = await asyncio.to_thread(self._servable, name)
        if self.last_switch is not None and self.last_switch.running:
            raise TryAgainError("another switch is under way", reason=Reason.NOT_READY)
        self._refuse_while_stopping()
        self.last_switch = Switch(self.primary.profile.name, profile.name)
        self._switching = asyncio.create_task(self._switch(profile, self.last_switch))
        return self.last_switch

    def _servable(self, name: str) -> Profile:
        profile = load_profile(name, self.folders.profiles)
        refuse_hopeless(profile, self.settings, self.folders)
        return profile

    async def _switch(self, profile: Profile, switch: Switch) -> None:
        before = self.primary.profile
        self._bus.publish("switch", **asdict(switch))
        ended = switch.broken_off(Reason.DRAINING, "the service stops")
        try:
            back = None
            failed = await self._replace_primary(profile)
            if failed is not None:
                log.error("%s did not become ready; returning to %s", profile.name, before.name)
                back = await self._replace_primary(before)
            ended = switch.over(failed, back)
        except Exception as error:
            # A fault of ours: who waits for the switch must hear of it, and the next one must not be refused.
            log.exception("internal error")
            hint = "The log has the traceback; please report it."
            ended = switch.broken_off(Reason.INTERNAL, repr(error), hint)
        finally:
            self.last_switch = ended
            self._bus.publish("switch", **asdict(ended))
        self._start_pinned()

    async def _replace_primary(self, profile: Profile) -> Status | None:
        """Stop the primary and start ``profile`` in its place; its status if it is not proven."""
        old = self.primary
        self._replacing = True  # nobody else takes the memory that becomes free
        try:
            await old.drain(self._hurry, Reason.OK, f"switching to {profile.name}")
            await old.stop(self._hurry, Reason.OK)
            await self._unloaded(profile.name)
            board = StatusBoard(self._bus, Status(), was_ready=old.board.was_ready)
            self.primary = self._keeper(profile, board)
            self.primary.start()
        finally:
            self._replacing = False
        await self.primary.settled.wait()
        return None if self.primary.state in SERVING else self.primary.board.now

    # several models

    async def _load_beside(self, profile: Profile, patience_s: float = inf) -> Keeper:
        while leaving := self._unloading.get(profile.name):
            await asyncio.wait((leaving,))  # its socket has one place
        self._refuse_while_stopping()
        if profile.name == self.primary.profile.name:
            return self.primary
        if self.last_switch is not None and self.last_switch.touches(profile.name):
            raise Reply(503, Reason.NOT_READY, "a switch is under way", retry_after_s=5)
        keeper = self.others.get(profile.name)
        if keeper is None or keeper.state in TERMINAL:
            keeper = self._load_anew(profile, keeper)
        await wait_settled(
            keeper, max_waiting=self.settings.models.max_waiting, patience_s=patience_s
        )
        if keeper.state in TERMINAL:
            self._retries.refuse_too_soon(profile.name, keeper.board.now.message)
        return keeper

    def _load_anew(self, profile: Profile, failed: Keeper | None) -> Keeper:
        """Start a keeper for ``profile``, in the place of one that failed if there is one."""
        self._retries.refuse_too_soon(profile.name, failed.board.now.message if failed else "")
        most = self.settings.models.max_loaded
        if failed is not None:
            del self.others[profile.name]  # it has no engine; its place is for its successor
        if len(self.others) + 1 >= most and not self._make_room():
            raise Reply(
                503,
                Reason.DOES_NOT_FIT,
                f"{most} models are loaded and all are in use",
                retry_after_s=30,
            )
        return self._start_beside(profile)

    def _make_room(self) -> bool:
        """Unload the other model that was idle longest; False if all are in use or pinned."""
        idle = [
            keeper
            for keeper in self.others.values()
            if self._spared(keeper) and keeper.state in SERVING | TERMINAL
        ]
        if not idle:
            return False
        self._unload(min(idle, key=lambda keeper: keeper.used_at))
        return True

    def _spared(self, keeper: Keeper) -> bool:
        """Whether nobody uses it, waits for it or has pinned it."""
        return (
            keeper.profile.name not in self.settings.models.pinned
            and keeper.queue.idle.is_set()
            and not keeper.waiting_to_load
        )

    def _unload(self, keeper: Keeper) -> None:
        name = keeper.profile.name
        log.info("unloading %s", name)
        del self.others[name]
        task = asyncio.create_task(keeper.stop(self._hurry, Reason.OK))
        self._unloading[name] = task
        task.add_done_callback(lambda _: self._unloading.pop(name))

    async def _unloaded(self, name: str) -> None:
        """Wait until no engine beside the first serves the profile ``name``."""
        if (keeper := self.others.get(name)) is not None:
            await keeper.drain(self._hurry, Reason.OK, f"{name} becomes the first model")
            if self.others.get(name) is keeper:
                self._unload(keeper)
        if (leaving := self._unloading.get(name)) is not None:
            await asyncio.wait((leaving,))

    def _has_turn(self, name: str) -> bool:
        """Whether the profile ``name`` may pass the start gate: the first model's memory comes before the others'."""
        return self.primary.profile.name == name or (
            not self._replacing and self.primary.admitted.is_set()
        )

    async def _unload_idle(self) -> None:
        """Unload models that nobody asked for within their time to live."""
        ttl = self.settings.models.ttl_s
        while ttl:
            await asyncio.sleep(min(ttl, _UNLOAD_LOOK_S))
            for keeper in list(self.others.values()):
                unused = time.monotonic() - keeper.used_at
                if self._spared(keeper) and keeper.state in SERVING | TERMINAL and unused >= ttl:
                    self._unload(keeper)

    # life

    def request_stop(self) -> None:
        """Drain and stop; asked a second time, stop at once."""
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    async def serve(self) -> None:
        """Keep engines running until :meth:`request_stop`; returns once nothing of them is left."""
        self.primary.start()
        self._start_pinned()
        tidy = asyncio.create_task(self._unload_idle())
        stop = asyncio.create_task(self._stop.wait())
        try:
            while not stop.done():
                self._tick_if_idle()
                await self.primary.start_if_model_came()
                await asyncio.wait((stop,), timeout=_TICK_S)
            self.ended = self.primary.state
        finally:
            for task in (tidy, stop, self._switching):
                if task is not None:
                    task.cancel()
                    await asyncio.wait((task,))
            await _all(
                keeper.drain(
                    self._hurry,
                    Reason.STOPPED_BY_USER,
                    f"{keeper.queue.running} requests still run",
                )
                for keeper in self.keepers()
            )
            await _all(keeper.stop(self._hurry) for keeper in self.keepers())
            if self._unloading:
                await asyncio.wait(self._unloading.values())

    def _start_beside(self, profile: Profile) -> Keeper:
        keeper = self._keeper(profile, failures=self._retries.account(profile.name))
        self.others[profile.name] = keeper
        keeper.start()
        return keeper

    def _start_pinned(self) -> None:
        """Load the pinned models that are not loaded."""
        for profile in self._pinned:
            if profile.name not in {self.primary.profile.name, *self.others}:
                self._start_beside(profile)

    def _keeper(
        self,
        profile: Profile,
        board: StatusBoard | None = None,
        failures: list[Failure] | None = None,
    ) -> Keeper:
        return Keeper(
            self.settings,
            profile,
            self.folders,
            board or StatusBoard(self._bus, Status()),
            AdmissionQueue(self._limits.for_engine(profile.max_num_seqs)),
            self._tick,
            self._promises,
            # One at a time: while an engine stops, its memory is still to come back.
            make_room=lambda: bool(self._unloading) or self._make_room(),
            has_turn=lambda: self._has_turn(profile.name),
            failures=failures,
        )

    def _refuse_while_stopping(self) -> None:
        if self._stop.is_set():
            raise Reply(503, Reason.DRAINING, "the service stops", retry_after_s=10)

    def _tick_if_idle(self) -> None:
        """The loops of working engines tick themselves; a stuck one must not be hidden by this one."""
        if not any(keeper.working for keeper in self.keepers()):
            self._tick()

    def _tick(self) -> None:
        self._ticked_at = time.monotonic()


async def _all(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Wait for all of ``work``; what fails is logged and keeps nothing else from its end."""
    for result in await asyncio.gather(*work, return_exceptions=True):
        if isinstance(result, Exception):
            log.error("internal error", exc_info=result)
