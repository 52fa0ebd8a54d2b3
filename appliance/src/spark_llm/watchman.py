"""The controller's end of the memory guard: keeps the guard process running and hears what it says."""

import asyncio
import contextlib
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path

from spark_llm import cgroup
from spark_llm.config import Memory

_UNIT_REPORT = Path("/run/spark-llm-guard/report.json")
_UNIT_REPORT_AGE_S = 10.0
_LAST_WORDS_S = 1.0
"""The guard ends within one poll of its engine's end, and its pipe with it."""
_RESTART_S = 1.0
"""Before a guard that died takes up its work again, so that one which cannot start costs little."""

log = logging.getLogger("spark_llm.guard")


class Level(StrEnum):
    """What the guard reports: memory is fine, low, or so low that it killed the engine."""

    OK = "ok"
    SOFT = "soft"
    HARD = "hard"


class Watchman:
    """A guard process for one engine; where it dies before its engine, another follows.

    Attributes:
        level: what it said last.
        killed: the guard has killed the engine.
    """

    def __init__(
        self,
        settings: Memory,
        group: int,
        report: Path,
        on_level: Callable[[Level], None],
    ) -> None:
        self.level = Level.OK
        self.killed = False
        self._on_level = on_level
        self._command = [
            sys.executable,
            "-P",  # nothing is imported from the folder where the service was called
            "-m",
            "spark_llm.guard",
            *_arguments(settings, group, report),
        ]
        self._over = asyncio.Event()
        self._process = self._start()
        self._task = asyncio.create_task(self._keep(), name="guard")

    @property
    def pid(self) -> int:
        """Of the guard process that is at work."""
        return self._process.pid

    async def heard(self) -> None:
        """The engine is gone: wait until all that the guard said is taken in; it says why before it kills."""
        self._over.set()
        await asyncio.wait((self._task,), timeout=_LAST_WORDS_S)
        self.killed = self.killed or _killed_by_unit()

    async def close(self) -> None:
        """Stop the guard; its engine is gone."""
        self._over.set()
        self._process.terminate()
        await asyncio.to_thread(self._process.wait)
        await asyncio.wait((self._task,), timeout=1.0)
        self._task.cancel()

    def _start(self) -> "subprocess.Popen[bytes]":
        process = subprocess.Popen(  # noqa: S603  our own module
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            env={name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
            start_new_session=True,  # it ends after its engine, not with it
        )
        if (tree := cgroup.current()) is not None:
            with contextlib.suppress(OSError):  # it has ended already: the engine died at once
                cgroup.enter(tree.guard, process.pid)
        return process

    async def _keep(self) -> None:
        while True:
            await self._listen()
            code = await asyncio.to_thread(self._process.wait)
            if code == 0 or self.killed or self._over.is_set():  # 0: its engine is gone
                return
            log.error("the memory guard died (%d) before its engine; another is started", code)
            if not await self._replace():
                return

    async def _replace(self) -> bool:
        """Start another guard, however often that takes; False once the engine is gone."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_RESTART_S):
                    await self._over.wait()
                return False
            try:
                self._process = self._start()
            except OSError as error:  # memory is short, which is when a guard is needed most
                log.error("no memory guard can be started yet: %s", error)  # noqa: TRY400  for a person
            else:
                return True

    async def _listen(self) -> None:
        assert self._process.stdout is not None  # noqa: S101  for the type checker: PIPE was asked for
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), self._process.stdout
        )
        try:
            while line := await reader.readline():
                self._take(line)
        finally:
            transport.close()

    def _take(self, line: bytes) -> None:
        try:
            said = json.loads(line)
            level = Level(said["level"])
        except (ValueError, KeyError, TypeError):
            log.warning("the guard said %r", line)
            return
        if level is not Level.OK:
            log.warning("memory is %s: %s", level, line.decode().strip())
        self.killed = self.killed or level is Level.HARD
        self.level = level
        self._on_level(level)


def _killed_by_unit(report: Path = _UNIT_REPORT) -> bool:
    """Whether spark-llm-guard.service, the second guard, has just killed the engine."""
    try:
        fresh = time.time() - report.stat().st_mtime < _UNIT_REPORT_AGE_S
        return fresh and json.loads(report.read_bytes())["level"] == Level.HARD
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _arguments(settings: Memory, group: int, report: Path) -> list[str]:
    tree = cgroup.current()
    target = (
        ["--cgroup", str(tree.engine / report.stem)]  # which systemd empties
        if tree
        else ["--process-group", str(group), "--controller", str(os.getpid())]
    )
    floors = {
        "--soft-bytes": settings.soft_floor_bytes,
        "--hard-bytes": settings.hard_floor_bytes,
        "--free-bytes": settings.free_floor_bytes,
    }
    given = [part for name, value in floors.items() if value for part in (name, str(value))]
    return [*target, "--report", str(report), *given]
