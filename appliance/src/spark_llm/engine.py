"""The engine as a process: start, read, stop, and leave nothing behind.

The engine runs in a session of its own, so that a signal to its process group reaches vLLM's engine core and workers
too. This process makes itself their reaper (``PR_SET_CHILD_SUBREAPER``): when the API process dies first, its children
become ours, and "the group is empty" is something waited for, not hoped for.
"""

import asyncio
import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path

from spark_llm import cgroup, launch
from spark_llm.argv import Argv
from spark_llm.config import Settings
from spark_llm.errors import RefusedError
from spark_llm.reason import Reason
from spark_llm.vitals import Vitals, read_vitals

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_TAIL_LINES = 40
_LINE_LIMIT = 16 * 1024
_REAP_INTERVAL_S = 0.05


class EngineProcess:
    """One run of vLLM.

    Attributes:
        pid: of the API process, which leads the group.
        tail: its last log lines.
        exited: set once every process of the group is gone.
    """

    def __init__(
        self,
        process: "subprocess.Popen[bytes]",
        on_line: Callable[[str], None],
        folder: Path | None = None,
    ) -> None:
        self.pid = process.pid
        self.tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self.exited = asyncio.Event()
        self.returncode: int | None = None
        self._process = process
        self._on_line = on_line
        self._cgroup = folder
        self._tasks = (
            asyncio.create_task(self._read(), name="engine-log"),
            asyncio.create_task(self._reap(), name="engine-reaper"),
        )

    @classmethod
    def start(
        cls,
        argv: Argv,
        *,
        socket: Path,
        on_line: Callable[[str], None],
    ) -> "EngineProcess":
        """Start the engine, in its own cgroup where systemd delegated one.

        A socket left by an earlier engine is removed, since vLLM would refuse to bind it.

        Raises:
            RefusedError: the program is not there.
        """
        need_interpreter(Path(argv.args[0]))
        socket.unlink(missing_ok=True)
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        tree = cgroup.current()
        folder = tree.engine / socket.stem if tree else None  # several engines: one each
        if folder is not None:
            folder.mkdir(exist_ok=True)
        process = subprocess.Popen(  # noqa: S603  the arguments are ours
            [
                sys.executable,
                "-IS",
                launch.__file__,
                str(os.getpid()),
                str(folder or ""),
                *argv.args,
            ],
            env=argv.environment,
            cwd=argv.environment["HOME"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        if folder is not None:
            # The launcher enters it too, before it starts anything. But a guard that looks before that would
            # find nobody to guard, and end.
            with contextlib.suppress(OSError):
                cgroup.enter(folder, process.pid)
        return cls(process, on_line, folder)

    async def stop(self, grace_s: float) -> None:
        """SIGTERM, wait ``grace_s`` seconds for the whole group, then SIGKILL; returns when it is empty."""
        self._signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(grace_s):
                await self.exited.wait()
        except TimeoutError:
            await self.kill()

    async def kill(self) -> None:
        """SIGKILL to every process of the group; returns when it is empty."""
        self.strike()
        await self.exited.wait()

    def strike(self) -> None:
        """As :meth:`kill`, but does not wait for the end."""
        self._signal(signal.SIGKILL)
        if self._cgroup is not None:
            cgroup.kill(self._cgroup)

    def vitals(self) -> Vitals:
        """What the group has consumed so far."""
        return read_vitals(self.pid)

    def _signal(self, number: signal.Signals) -> None:
        if not self.exited.is_set():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    async def _read(self) -> None:
        assert self._process.stdout is not None  # noqa: S101  for the type checker: PIPE was asked for
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), self._process.stdout
        )
        rest = b""
        try:
            while chunk := await reader.read(_LINE_LIMIT):
                # Progress bars end their lines with a return. A line longer than the limit comes in pieces.
                *lines, rest = re.split(rb"[\r\n]", rest + chunk)
                if len(rest) > _LINE_LIMIT:
                    lines.append(rest)
                    rest = b""
                for line in lines:
                    self._take(line)
            self._take(rest)
        finally:
            transport.close()

    def _take(self, raw: bytes) -> None:
        if line := raw.decode(errors="replace").rstrip():
            self.tail.append(line)
            self._on_line(line)

    async def _reap(self) -> None:
        """Wait for the API process, kill what it left, and reap the group until it is empty."""
        pidfd = os.pidfd_open(self.pid)
        try:
            await _readable(pidfd)
        finally:
            os.close(pidfd)
        self.returncode = self._process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        if self._cgroup is not None:  # those that left the group, too
            cgroup.kill(self._cgroup)
        while _group_lives(self.pid) or (self._cgroup and cgroup.populated(self._cgroup)):  # noqa: ASYNC110  no event tells that a group became empty
            await asyncio.sleep(_REAP_INTERVAL_S)
        await asyncio.wait({self._tasks[0]}, timeout=1.0)  # the last lines say why it died
        self.exited.set()


def engine_python(settings: Settings) -> Path:
    """The interpreter that has vLLM: as configured, else ``.venv-engine`` of the checkout this runs from."""
    if settings.engine.python:
        return Path(settings.engine.python)
    return Path(__file__).parents[3] / ".venv-engine" / "bin" / "python"


def need_interpreter(python: Path) -> None:
    """Refuse what cannot be started.

    Raises:
        RefusedError: ``python`` is not there, or may not be executed.
    """
    if not (python.is_file() and os.access(python, os.X_OK)):
        raise engine_missing(f"the engine's interpreter {python} is not there")


def engine_missing(message: str) -> RefusedError:
    """The error for an engine that is not there, or not whole."""
    return RefusedError(
        message,
        reason=Reason.ENGINE_MISSING,
        hint="In a checkout, `make engine` installs it; engine.python names another.",
    )


async def _readable(fd: int) -> None:
    loop = asyncio.get_running_loop()
    event = asyncio.Event()
    loop.add_reader(fd, event.set)
    try:
        await event.wait()
    finally:
        loop.remove_reader(fd)


def _group_lives(group: int) -> bool:
    """Reap what can be reaped of ``group``; True while a process of it is left."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-group, os.WNOHANG)[0]:
            pass
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
