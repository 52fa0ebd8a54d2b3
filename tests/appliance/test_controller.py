"""The controller and its keepers without engines: who may be started, unloaded, counted."""

import asyncio
import threading
from pathlib import Path

import pytest
from spark_llm import reload
from spark_llm.admission import Limits
from spark_llm.config import Gateway, Models, Settings
from spark_llm.controller import Controller
from spark_llm.folders import Folders
from spark_llm.keeper import Keeper
from spark_llm.policy import Failure
from spark_llm.prepare import Preparation
from spark_llm.profile import Profile, load_profile, shipped_folder
from spark_llm.reason import Reason
from spark_llm.reply import Reply
from spark_llm.starts import Starts
from spark_llm.status import State

pytestmark = pytest.mark.anyio


class _Settled(Keeper):
    """A keeper without an engine, which is ready as soon as it is started."""

    def start(self) -> None:
        self.board.enter(State.READY)
        self.settled.set()


def _profile(name: str, sequences: int = 64) -> Profile:
    demo = load_profile("demo", (shipped_folder(),))
    return demo.model_copy(update={"name": name, "aliases": (), "max_num_seqs": sequences})


def _controller(
    folder: Path, models: Models | None = None, limits: Limits | None = None
) -> Controller:
    settings = Settings(models=models or Models())
    return Controller(
        settings,
        _profile("first"),
        Folders(folder, folder, folder, (folder, shipped_folder())),
        limits or Limits(),
    )


async def test_stopped_keeper_is_not_started_because_its_model_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A switch that comes while the store is looked at has the last word: no second engine beside the new one."""
    monkeypatch.setattr("spark_llm.controller.Keeper", _Settled)
    controller = _controller(tmp_path)
    keeper = controller.primary
    keeper.board.enter(State.BLOCKED, Reason.MODEL_MISSING)
    looking, looked = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def lacking(*_: object) -> int:
        loop.call_soon_threadsafe(looking.set)
        looked.wait(10)
        return -1

    monkeypatch.setattr(Preparation, "lacking", lacking)
    look = asyncio.create_task(keeper.start_if_model_came())
    await looking.wait()
    await keeper.stop(asyncio.Event(), Reason.OK)
    looked.set()
    await look
    assert keeper.state is State.STOPPED


async def test_keeper_is_started_because_its_model_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing came between, a model that another process has brought starts the engine."""
    monkeypatch.setattr("spark_llm.controller.Keeper", _Settled)
    keeper = _controller(tmp_path).primary
    keeper.board.enter(State.BLOCKED, Reason.MODEL_MISSING)
    monkeypatch.setattr(Preparation, "lacking", lambda *_: -1)
    await keeper.start_if_model_came()
    assert keeper.state is State.READY


async def test_asking_for_the_engine_is_not_using_it(tmp_path: Path) -> None:
    """To be listed, scraped or turned away does not put off unloading; to be forwarded to does."""
    keeper = _controller(tmp_path).primary
    keeper.used_at = 1.0
    with pytest.raises(Reply):
        keeper.upstream()
    assert keeper.used_at == 1.0
    keeper.touch()
    assert keeper.used_at > 1.0


async def test_retry_of_a_failed_model_takes_its_own_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request for a model that failed starts it anew where it was: no healthy model is unloaded for it."""
    monkeypatch.setattr("spark_llm.controller.Keeper", _Settled)
    controller = _controller(tmp_path, Models(on_demand=True, max_loaded=3))
    for name, state, used_at in (("b", State.READY, 1.0), ("a", State.FAILED, 2.0)):
        keeper = controller.others[name] = controller._keeper(_profile(name))
        keeper.board.enter(state)
        keeper.used_at = used_at
    failed = controller.others["a"]
    again = await controller._load_beside(_profile("a"))
    assert again is not failed
    assert again.profile.name == "a"
    assert {name: keeper.state for name, keeper in controller.others.items()} == {
        "a": State.READY,
        "b": State.READY,
    }


async def test_model_that_is_waited_for_is_not_unloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests that waited for a load longer than the model's time to live still find it loaded."""
    monkeypatch.setattr("spark_llm.controller.Keeper", _Settled)
    controller = _controller(tmp_path, Models(on_demand=True, max_loaded=3, ttl_s=1e-3))
    for name, waiting in (("awaited", 1), ("idle", 0)):
        keeper = controller.others[name] = controller._keeper(_profile(name))
        keeper.start()
        keeper.used_at = 0.0
        keeper.waiting_to_load = waiting
    tidy = asyncio.create_task(controller._unload_idle())
    while "idle" in controller.others:
        await asyncio.sleep(0)
    tidy.cancel()
    assert list(controller.others) == ["awaited"]
    await asyncio.wait(controller._unloading.values())


async def test_request_does_not_read_profiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names that requests ask for are looked up in what was read at the start and at each reload."""
    monkeypatch.setattr("spark_llm.controller.Keeper", _Settled)
    for name in ("a", "b"):
        (tmp_path / f"{name}.toml").write_text('extends = "demo"\n')
    controller = _controller(tmp_path, Models(on_demand=True, max_loaded=3))
    (tmp_path / "a.toml").unlink()
    assert (await controller.load("a")).profile.name == "a"
    assert (await controller.load("no-such-model")).profile.name == "first"
    (tmp_path / "c.toml").write_text('extends = "demo"\n')
    assert (await controller.load("c")).profile.name == "first"
    controller.read_profiles()
    assert (await controller.load("c")).profile.name == "c"


async def _running_of_many(keeper: Keeper) -> int:
    """How many of twenty requests the keeper lets to its engine."""
    ended = asyncio.Event()

    async def ask() -> None:
        async with keeper.queue.place(""):
            await ended.wait()

    async with asyncio.TaskGroup() as group:
        for _ in range(20):
            group.create_task(ask())
        while keeper.queue.running + keeper.queue.waiting < 20:
            await asyncio.sleep(0)
        running = keeper.queue.running
        ended.set()
    return running


async def test_places_are_those_of_each_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each engine gets the sequences of its own profile and two more, after a switch and a reload, too."""
    monkeypatch.setattr("spark_llm.controller.Keeper", _Settled)
    (tmp_path / "eight.toml").write_text('extends = "demo"\nmax_num_seqs = 8\n')
    controller = _controller(tmp_path)
    controller.primary = controller._keeper(_profile("first", sequences=4))
    controller.others["other"] = controller._keeper(_profile("other", sequences=2))
    controller.set_limits(reload.limits(Settings()))
    assert [await _running_of_many(keeper) for keeper in controller.keepers()] == [6, 4]
    monkeypatch.setattr("spark_llm.controller.refuse_hopeless", lambda *_: None)
    await controller.switch("eight")
    await controller.primary.settled.wait()
    assert controller._switching is not None
    await controller._switching
    assert [await _running_of_many(keeper) for keeper in controller.keepers()] == [10, 4]


@pytest.mark.parametrize(("max_running", "places"), [(0, 6), (3, 3), (256, 6)])
def test_owner_can_lower_the_places(max_running: int, places: int) -> None:
    """gateway.max_running counts where it is lower than what the engine takes, and 0 leaves it to the engine."""
    settings = Settings(gateway=Gateway(max_running=max_running))
    assert reload.limits(settings).for_engine(4).max_running == places


class _Failing(Keeper):
    """A keeper whose model fails its canary as soon as it is started."""

    def start(self) -> None:
        self._note_failure(Reason.CANARY)
        self.board.enter(State.FAILED, Reason.CANARY, "an empty answer")
        self.settled.set()


class _Loading(Keeper):
    """A keeper that loads until somebody says that it is settled."""

    def start(self) -> None:
        self.board.enter(State.LOADING)


def _on_demand(folder: Path, limits: Limits | None = None, ttl_s: float = 0.0) -> Controller:
    """A controller that knows the profile ``a`` and may load it."""
    (folder / "a.toml").write_text('extends = "demo"\n')
    return _controller(folder, Models(on_demand=True, max_loaded=3, ttl_s=ttl_s), limits)


def _let_pass(controller: Controller, seconds: float) -> None:
    """As if the failures of ``a`` were ``seconds`` older."""
    account = controller._retries.account("a")
    account[:] = [Failure(item.at - seconds, item.reason) for item in account]


async def test_failed_model_is_loaded_again_when_it_is_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that failed is refused until the time that Retry-After names, and then loaded anew."""
    monkeypatch.setattr("spark_llm.controller.Keeper", _Failing)
    controller = _on_demand(tmp_path)
    for _ in range(2):
        with pytest.raises(Reply, match="an empty answer") as refused:
            await controller.load("a")
        assert (refused.value.status, refused.value.reason) == (503, Reason.CANARY)
        assert refused.value.retry_after_s == 2
        assert len(controller._retries.account("a")) == 1, "a request too early started an engine"
    monkeypatch.setattr("spark_llm.controller.Keeper", _Settled)
    _let_pass(controller, 2)
    assert (await controller.load("a")).state is State.READY


async def test_requests_cannot_start_engines_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However patiently clients come back, a model that fails is started no more often than the budget allows."""
    monkeypatch.setattr("spark_llm.controller.Keeper", _Failing)
    controller = _on_demand(tmp_path)
    window = Settings().engine.restart_window_s
    passed, starts = 0.0, []
    while passed < 2 * window:
        before = controller.others.get("a")
        with pytest.raises(Reply) as refused:
            await controller.load("a")
        if controller.others["a"] is not before:
            starts.append(passed)
        assert refused.value.retry_after_s is not None
        passed += refused.value.retry_after_s
        _let_pass(controller, refused.value.retry_after_s)
    budget = Settings().engine.restart_budget
    assert len([at for at in starts if at < window]) == budget + 1
    assert len(starts) > budget + 1, "it is tried again after the window"


async def test_failed_model_is_unloaded_and_its_failures_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What failed leaves its place after the time to live, too, and is started again no sooner for that."""
    monkeypatch.setattr("spark_llm.controller.Keeper", _Failing)
    controller = _on_demand(tmp_path, ttl_s=1e-3)
    with pytest.raises(Reply):
        await controller.load("a")
    controller.others["a"].used_at = 0.0
    tidy = asyncio.create_task(controller._unload_idle())
    while controller.others:
        await asyncio.sleep(0)
    tidy.cancel()
    with pytest.raises(Reply) as refused:
        await controller.load("a")
    assert refused.value.retry_after_s == 2
    assert controller.others == {}


async def test_all_requests_wait_for_a_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that comes while its model is being loaded waits like the one that began it."""
    monkeypatch.setattr("spark_llm.controller.Keeper", _Loading)
    controller = _on_demand(tmp_path)
    loads = [asyncio.create_task(controller.load("a")) for _ in range(3)]
    while "a" not in controller.others or controller.others["a"].waiting_to_load < len(loads):
        await asyncio.sleep(0)
    keeper = controller.others["a"]
    keeper.board.enter(State.READY)
    keeper.settled.set()
    assert await asyncio.gather(*loads) == [keeper] * len(loads)


@pytest.mark.parametrize(("limit_s", "patience_s"), [(600.0, 1e-3), (1e-3, None), (1e-3, 60.0)])
async def test_wait_for_a_load_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit_s: float, patience_s: float | None
) -> None:
    """Nobody waits for a load longer than the client does or the queue's limit says; the load goes on."""
    monkeypatch.setattr("spark_llm.controller.Keeper", _Loading)
    controller = _on_demand(tmp_path, Limits(queue_timeout_s=limit_s))
    with pytest.raises(Reply) as refused:
        await controller.load("a", patience_s)
    assert (refused.value.status, refused.value.reason) == (503, Reason.DEADLINE)
    assert refused.value.retry_after_s == 30
    assert controller.others["a"].state is State.LOADING
    assert controller.others["a"].waiting_to_load == 0


async def test_load_that_takes_too_long_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who will not wait as long as the load is expected to take is told so at once, and when to come back."""
    monkeypatch.setattr("spark_llm.controller.Keeper", _Loading)
    Starts(tmp_path / "starts.json").took("a", 40.0)
    controller = _on_demand(tmp_path)
    with pytest.raises(Reply) as refused:
        await controller.load("a", 39.0)
    assert (refused.value.reason, refused.value.retry_after_s) == (Reason.DEADLINE, 40)
    controller.others["a"].board.progress(eta_s=60.5)
    with pytest.raises(Reply) as refused:
        await controller.load("a", 41.0)
    assert refused.value.retry_after_s == 61
