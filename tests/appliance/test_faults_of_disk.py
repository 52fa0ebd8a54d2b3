"""What the service does when the disk does not take what it writes."""

import asyncio
import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from spark_llm.admission import Limits
from spark_llm.config import Engine, Settings
from spark_llm.controller import Controller
from spark_llm.errors import RefusedError
from spark_llm.folders import Folders
from spark_llm.keeper import Keeper
from spark_llm.prepare import Preparation
from spark_llm.profile import Profile, load_profile, shipped_folder
from spark_llm.promises import Promises
from spark_llm.reason import Reason
from spark_llm.status import Bus, State, Status, StatusBoard

from tests.appliance.service import Service, stub_service, wait_for


@contextmanager
def _unsealable(folder: Path) -> Iterator[Service]:
    """A service that is ready, and whose compile caches cannot be sealed: a folder lies in the seal's place."""
    (folder / "profiles").mkdir()
    (folder / "profiles" / "other.toml").write_text('extends = "stub"\n')
    with stub_service(folder) as first:
        first.listening().wait_state("ready")
        assert first.stop() == 0
    (seal,) = (folder / "cache").glob("*/seal.json")
    seal.unlink()
    seal.mkdir()
    with stub_service(folder) as running:
        running.listening().wait_state("ready")
        yield running


def test_seal_that_cannot_be_written_costs_the_seal_alone(short_path: Path) -> None:
    """Without a seal an engine still becomes ready, is switched and stopped; the log says what was not kept."""
    with _unsealable(short_path) as running:
        assert "cannot be sealed" in running.text()
        for name in ("other", "stub"):
            assert running.post("/api/v1/switch", {"profile": name})[0] == 202
            wait_for(
                lambda: running.get("/api/v1/switch")[1]["switch"]["outcome"] == "done",
                30,
                running.text,
            )
        assert running.post("/v1/chat/completions", {"model": "default"})[0] == 200
        assert running.stop() == 0
        assert "Traceback" not in running.text()


def _demo() -> Profile:
    return load_profile("demo", (shipped_folder(),))


def _folders(folder: Path) -> Folders:
    return Folders(folder, folder, folder, (shipped_folder(),))


@pytest.mark.anyio
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
async def test_full_disk_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A disk or quota that is full before the engine starts is no_disk with what to do, not a fault of ours."""

    def full(_: Folders) -> Folders:
        raise OSError(number, os.strerror(number), "/cache/x")

    monkeypatch.setattr(Folders, "make", full)
    preparation = Preparation(
        Settings(),
        _folders(tmp_path),
        StatusBoard(Bus(), Status()),
        lambda: None,
        Promises(),
    )
    with ExitStack() as holding, pytest.raises(RefusedError, match="/cache/x") as refused:
        await preparation.prepare(_demo(), holding)
    assert refused.value.reason is Reason.NO_DISK
    assert "spark-llm cache" in refused.value.hint


class _Settled(Keeper):
    """A keeper without an engine, which is ready as soon as it is started."""

    def start(self) -> None:
        self.board.enter(State.READY)
        self.settled.set()


@pytest.mark.anyio
async def test_switch_that_breaks_off_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault of ours ends the switch as failed with its cause, and the next switch is let in and done."""
    monkeypatch.setattr("spark_llm.controller.Keeper", _Settled)
    monkeypatch.setattr("spark_llm.controller.refuse_hopeless", lambda *_: None)
    controller = Controller(Settings(), _demo(), _folders(tmp_path), Limits())

    async def broken(*_: object) -> None:
        raise OSError(errno.EIO, "no answer")

    with monkeypatch.context() as patched:
        patched.setattr(_Settled, "stop", broken)
        assert (await controller.switch("demo-gpu")).running
        assert controller._switching is not None
        await controller._switching
    assert controller.last_switch is not None
    assert (controller.last_switch.outcome, controller.last_switch.reason) == ("failed", "internal")
    assert "no answer" in controller.last_switch.message
    await controller.switch("demo-gpu")
    await controller._switching
    assert controller.last_switch.outcome == "done"


@pytest.mark.anyio
async def test_stop_that_fails_leaves_no_other_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end every engine is drained and stopped, also when that of one of them fails."""
    monkeypatch.setattr("spark_llm.controller.Keeper", _Settled)
    controller = Controller(Settings(), _demo(), _folders(tmp_path), Limits())
    other = controller.others["other"] = controller._keeper(_demo())

    async def broken(*_: object) -> None:
        raise OSError(errno.EIO, "no answer")

    monkeypatch.setattr(controller.primary, "drain", broken)
    monkeypatch.setattr(controller.primary, "stop", broken)
    controller.request_stop()
    await controller.serve()
    assert other.state is State.STOPPED


@pytest.mark.anyio
async def test_block_that_cannot_be_told_is_still_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the store cannot be read after a refusal, whoever waits for the start hears of it all the same."""

    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "no answer")

    monkeypatch.setattr(Preparation, "lacking", broken)
    settings = Settings(engine=Engine(python=str(tmp_path / "no-python")))
    keeper = Controller(settings, _demo(), _folders(tmp_path), Limits()).primary
    keeper.start()
    async with asyncio.timeout(10):
        await keeper.settled.wait()
    assert (keeper.state, keeper.board.now.reason) == (State.FAILED, Reason.INTERNAL)


@pytest.mark.anyio
async def test_stop_that_broke_off_is_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop that failed is not the last one: asked again, it stops the engine that is still there."""
    keeper = Controller(Settings(), _demo(), _folders(tmp_path), Limits()).primary
    stops = []

    class Run:
        async def stop(self, *_: object) -> None:
            stops.append(self)
            if len(stops) == 1:
                raise OSError(errno.EIO, "no answer")

    monkeypatch.setattr(keeper, "run", Run())
    with pytest.raises(OSError, match="no answer"):
        await keeper.stop(asyncio.Event())
    await keeper.stop(asyncio.Event())
    assert len(stops) == 2
    assert keeper.state is State.STOPPED
