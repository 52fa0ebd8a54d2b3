"""The controller's end of the memory guard, with real guards and a process group to look after."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from spark_llm import watchman
from spark_llm.config import Memory
from spark_llm.watchman import Level, Watchman

pytestmark = pytest.mark.anyio


def waiting_program() -> "subprocess.Popen[bytes]":
    """A process group that does nothing."""
    return subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True
    )


@asynccontextmanager
async def watched(
    folder: Path, heard: "asyncio.Queue[Level]"
) -> AsyncIterator[tuple[Watchman, "subprocess.Popen[bytes]"]]:
    """A watchman and the process group that its guard looks after; both are gone afterwards."""
    engine = waiting_program()
    floors = Memory(hard_floor_bytes=1, soft_floor_bytes=2)
    keeper = Watchman(floors, engine.pid, folder / "report.json", heard.put_nowait)
    try:
        yield keeper, engine
    finally:
        await keeper.close()
        engine.kill()
        engine.communicate()


async def test_a_killed_guard_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After ``kill -9`` of the guard another one looks after the same engine, and the engine lives."""
    monkeypatch.setattr(watchman, "_RESTART_S", 0.01)
    heard: asyncio.Queue[Level] = asyncio.Queue()
    async with asyncio.timeout(30), watched(tmp_path, heard) as (keeper, engine):
        assert await heard.get() is Level.OK
        first = keeper.pid
        os.kill(first, signal.SIGKILL)
        assert await heard.get() is Level.OK
        assert keeper.pid != first
        assert engine.poll() is None


async def test_a_guard_that_cannot_be_started_at_once_is_started_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fork that fails for want of memory leaves the engine unguarded only until the next one."""
    monkeypatch.setattr(watchman, "_RESTART_S", 0.01)
    heard: asyncio.Queue[Level] = asyncio.Queue()
    async with asyncio.timeout(30), watched(tmp_path, heard) as (keeper, _):
        assert await heard.get() is Level.OK
        start, refused = Watchman._start, iter([OSError(12, "Cannot allocate memory")])

        def scarce(self: Watchman) -> "subprocess.Popen[bytes]":
            for error in refused:
                raise error
            return start(self)

        monkeypatch.setattr(Watchman, "_start", scarce)
        first = keeper.pid
        os.kill(first, signal.SIGKILL)
        assert await heard.get() is Level.OK
        assert keeper.pid != first


async def test_no_guard_follows_an_engine_that_is_gone(tmp_path: Path) -> None:
    """A guard that dies around its engine's end is not replaced, and nobody waits for one."""
    heard: asyncio.Queue[Level] = asyncio.Queue()
    async with asyncio.timeout(30), watched(tmp_path, heard) as (keeper, _):
        assert await heard.get() is Level.OK
        first = keeper.pid
        os.kill(first, signal.SIGKILL)
        await keeper.heard()
        assert keeper.pid == first
        assert not keeper.killed
        assert heard.empty()
