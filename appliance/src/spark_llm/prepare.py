"""Everything between "serve this profile" and "start this command line": model, memory, caches."""

import asyncio
import contextlib
import errno
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from spark_llm import argv, gate, host, ledger, manifest, model_facts
from spark_llm.argv import Argv
from spark_llm.caches import CacheRoot, Namespace
from spark_llm.config import Settings
from spark_llm.demo_model import SEED, write_demo_model
from spark_llm.engine import engine_missing, engine_python, need_interpreter
from spark_llm.errors import RefusedError
from spark_llm.folders import Folders
from spark_llm.high_water import HighWater, build_of
from spark_llm.manifest import Manifest
from spark_llm.model_folder import check_model_folder
from spark_llm.preflight import named_models, on_hub, refusal, refuse_wrong_machine
from spark_llm.profile import DEMO_MODEL, DEMOS, Engine, Profile
from spark_llm.promises import Promises
from spark_llm.reason import Reason
from spark_llm.status import State, StatusBoard
from spark_llm.store import Failure, Note, Progress, Request, Result, Store
from spark_llm.store.process import fetch
from spark_llm.store.progress import Event
from spark_llm.store.store import missing_model as store_missing

log = logging.getLogger("spark_llm.prepare")

_GATE_POLL_S = 0.5
_TICK_S = 1.0


@dataclass(frozen=True)
class Prepared:
    """What a run needs.

    Attributes:
        profile: what is served.
        command: program, arguments and environment.
        socket: where the engine will listen.
        manifest: the exact bits.
        namespace: its compile caches, checked.
        account: the memory ledger, with what was available before the start.
        memory_build: what a measurement of its memory holds for, see :func:`spark_llm.high_water.build_of`.
        model: facts of the model, for the roofline; None if they could not be read.
    """

    profile: Profile
    command: Argv
    socket: Path
    manifest: Manifest
    namespace: Namespace
    account: ledger.Ledger
    memory_build: str
    model: ledger.Model | None


class Preparation:
    """Brings, checks and decides; all waiting ticks.

    Args:
        settings: of the service.
        folders: of the service.
        board: shows the progress.
        tick: called at least once a second.
        promises: memory that engines were promised.
        make_room: called when memory is short; True if it freed some.
        has_turn: whether it may pass the start gate; False while another goes first.
    """

    def __init__(  # noqa: PLR0913  the parts it is made of
        self,
        settings: Settings,
        folders: Folders,
        board: StatusBoard,
        tick: Callable[[], None],
        promises: Promises,
        *,
        make_room: Callable[[], bool] = lambda: False,
        has_turn: Callable[[], bool] = lambda: True,
    ) -> None:
        self._settings = settings
        self._folders = folders
        self._board = board
        self._tick = tick
        self._promises = promises
        self._make_room = make_room
        self._has_turn = has_turn
        self._store = Store(folders.models)

    async def prepare(self, profile: Profile, holding: ExitStack) -> Prepared:
        """All steps in order.

        Args:
            profile: what to serve.
            holding: gets the locks on the model and the caches, for as long as the engine runs.

        Raises:
            SparkLlmError: what is in the way, and what to do.
        """
        with _full_disk_refused():
            return await self._steps(profile, holding)

    async def _steps(self, profile: Profile, holding: ExitStack) -> Prepared:
        self._board.enter(State.PREFLIGHT)
        self._tick()
        self._folders.make()
        refuse_wrong_machine(profile, engine_python(self._settings))
        model = await self._bring(profile.model, profile.revision, holding)
        draft = None
        if profile.speculative is not None and profile.speculative.model:
            speculative = profile.speculative
            draft = await self._bring(speculative.model, speculative.revision, holding)
        facts = await asyncio.to_thread(model_facts.known_model, profile, model, draft)
        build = await asyncio.to_thread(build_of, engine_python(self._settings))
        account = await self._wait_for_memory(profile, facts, build)
        await asyncio.to_thread(host.drop_page_cache, model)
        return await self._command(profile, model, draft, facts, account, build, holding)

    def lacking(self, profile: Profile) -> int:
        """How many of the hub's models that ``profile`` names the store lacks; a folder may still be being copied."""
        return sum(
            on_hub(model) and self._store.locate(model, revision) is None
            for model, revision in named_models(profile)
        )

    async def _bring(self, model: str, revision: str, holding: ExitStack) -> Path:
        """The folder of a complete, verified model; fetched if the store lacks it."""
        if model == DEMO_MODEL:
            folder = self._folders.models / DEMO_MODEL
            await asyncio.to_thread(write_demo_model, folder)
        elif Path(model).is_absolute():
            folder = Path(model)
        else:
            if await asyncio.to_thread(self._store.locate, model, revision) is None:
                await self._fetch(model, revision)
            # `rm` and repairs stay away from here on; what was there a moment ago is looked up again under the lock.
            holding.enter_context(self._store.reading(model, "served"))
            found = await asyncio.to_thread(self._store.locate, model, revision)
            if found is None:
                raise store_missing(model, revision)
            folder = found
        check_model_folder(folder)
        return folder

    async def _fetch(self, model: str, revision: str) -> None:
        """Run the fetching process and show its progress."""
        self._board.enter(State.FETCHING, message=f"fetching {model}")
        request = fetch_request(self._settings, self._folders.models, model, revision)
        async with contextlib.aclosing(fetch(request)) as events:
            while True:
                event = await self._ticking(asyncio.ensure_future(anext(events)))
                if isinstance(event, Result):
                    return
                if isinstance(event, Failure):
                    raise event.error()
                self._show(model, event)

    def _show(self, model: str, event: Event) -> None:
        if isinstance(event, Note):
            self._board.progress(message=event.message)
        elif isinstance(event, Progress):
            state = State.VERIFYING if event.phase == "verifying" else State.FETCHING
            if self._board.now.state is not state:
                self._board.enter(state, message=f"{state} {model}")
            percent = 100 * event.bytes // event.total if event.total else 100
            self._board.progress(phase=event.status_line(), percent=percent, eta_s=event.eta_s)

    async def _wait_for_memory(
        self, profile: Profile, facts: ledger.Model | None, build: str
    ) -> ledger.Ledger:
        """Wait until the ledger's need is really available, and have it promised; refuse what can never fit."""
        memory = self._settings.memory
        kernels = host.kernels_of(engine_python(self._settings))
        measured, word = HighWater(self._folders.high_water).recall(profile, build)
        if word:
            log.warning("%s", word)
        started = time.monotonic()
        while True:
            self._tick()
            if not self._has_turn():
                started = time.monotonic()  # the limit is for memory, not for the turn
                self._show_waiting(Reason.MEMORY, "the first model has its memory first")
                await asyncio.sleep(_GATE_POLL_S)
                continue
            machine = host.machine(reserve_bytes=memory.reserve_bytes, kernels=kernels)
            account = ledger.account(profile, machine, facts, measured)
            verdict = gate.decide(
                gate.GateFacts(
                    need_bytes=account.need_bytes,
                    reserve_bytes=machine.reserve,
                    available_bytes=machine.available,
                    promised_bytes=self._promises.outstanding(profile.name),
                    total_bytes=machine.total,
                    waited_s=time.monotonic() - started,
                    timeout_s=memory.gate_timeout_s,
                    driver=host.driver_version(),
                    drivers=memory.drivers,
                )
            )
            if verdict.action is gate.Action.GO:
                # In the same breath as the look at what is available: nobody comes between.
                self._promises.make(profile.name, account.need_bytes)
                for warning in (*verdict.warnings, *account.notes):
                    log.warning("%s", warning)
                    self._board.bus.publish("warning", message=warning)
                return account
            if verdict.action is gate.Action.REFUSE:
                raise refusal(verdict, account)
            self._show_waiting(verdict.reason, verdict.message, verdict.hint)
            if verdict.reason is Reason.MEMORY:
                self._make_room()
            await asyncio.sleep(_GATE_POLL_S)

    def _show_waiting(self, reason: Reason, message: str, hint: str = "") -> None:
        if self._board.now.state is State.WAITING_MEMORY:
            self._board.progress(reason=reason, message=message, hint=hint)
        else:
            log.info("waiting: %s", message)
            self._board.enter(State.WAITING_MEMORY, reason, message, hint=hint)

    async def _command(  # noqa: PLR0913, PLR0917  what the steps before have found
        self,
        profile: Profile,
        model: Path,
        draft: Path | None,
        facts: ledger.Model | None,
        account: ledger.Ledger,
        memory_build: str,
        holding: ExitStack,
    ) -> Prepared:
        python = engine_python(self._settings)
        socket = self._folders.runtime / f"{profile.name}.sock"

        def build(caches: dict[str, str], draft: Path | None) -> Argv:
            cuda = profile.engine is Engine.CUDA
            return argv.build(
                profile,
                python=python,
                model=model,
                socket=socket,
                home=self._folders.cache,
                shutdown_timeout_s=self._settings.engine.drain_timeout_s,
                inherited=os.environ,
                caches=caches,
                gpu_memory_utilization=account.gpu_memory_utilization if cuda else None,
                draft=draft,
            )

        # Which model and draft these are, their identities say; where they lie is nothing to the caches.
        bare = build({}, draft and Path("draft"))
        need_interpreter(python)
        speculative = profile.speculative
        bits = manifest.build(
            engine=await asyncio.to_thread(_engine_build, python),
            kernels=manifest.kernels_build(python),
            model=profile.model,
            model_commit=await asyncio.to_thread(
                self._identity, profile.model, profile.revision, model
            ),
            draft=speculative.model if speculative else "",
            draft_commit=await asyncio.to_thread(
                self._identity, speculative.model, speculative.revision, draft
            )
            if speculative and draft
            else "",
            flags=bare.flags,
            environment=bare.environment,
            gpu=host.gpu_name() or "cpu",
            driver=host.driver_version(),
        )
        caches = CacheRoot(self._folders.cache)
        namespace = caches.namespace(bits)
        verdict = await asyncio.to_thread(
            holding.enter_context, namespace.hold(f"serving {profile.name}")
        )
        cache = self._settings.cache
        await asyncio.to_thread(caches.prune, max_bytes=cache.max_bytes, keep=cache.keep)
        self._board.bus.publish("cache", verdict=verdict.state, message=verdict.message)
        command = build(namespace.environment(), draft)
        return Prepared(profile, command, socket, bits, namespace, account, memory_build, facts)

    def _identity(self, model: str, revision: str, folder: Path) -> str:
        """The commit of a hub model; of a local folder, a digest of its files' names, sizes and times."""
        if on_hub(model):
            return self._store.commit(model, revision)
        if model == DEMO_MODEL:
            return str(SEED)
        digest = hashlib.sha256()
        for path in sorted(folder.iterdir()):
            found = path.stat()
            digest.update(f"{path.name}\0{found.st_size}\0{found.st_mtime_ns}\0".encode())
        return f"local:{digest.hexdigest()}"

    async def _ticking(self, work: "asyncio.Future[Event]") -> Event:
        try:
            while not work.done():
                self._tick()
                await asyncio.wait((work,), timeout=_TICK_S)
            return work.result()
        finally:
            if work.cancel():  # who cancels us waits until nothing of it runs
                await asyncio.wait((work,))


def fetch_request(settings: Settings, models: Path, model: str, revision: str) -> Request:
    """A request to the store with the service's settings."""
    return Request(root=str(models), model=model, revision=revision, **settings.store.model_dump())


@contextlib.contextmanager
def _full_disk_refused() -> Iterator[None]:
    """Name a full disk, or a quota that is used up, as what it is."""
    try:
        yield
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        where = f" for {error.filename}" if error.filename else ""
        raise RefusedError(
            f"there is no room{where}: {error.strerror}",
            reason=Reason.NO_DISK,
            hint="Free space, e.g. with `spark-llm cache clear` or `spark-llm rm`, then start again.",
        ) from error


def _engine_build(python: Path) -> str:
    try:
        return manifest.engine_build(python)
    except OSError as error:
        raise engine_missing(str(error)) from error


def default_profile(settings: Settings) -> str:
    """What is served when nobody says: the demo for the build of vLLM that is there."""
    return DEMOS[manifest.engine_kind(engine_python(settings)) or Engine.CPU]
