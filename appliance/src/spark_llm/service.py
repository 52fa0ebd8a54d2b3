"""The service: one process that holds the port, the controller and the gateway."""

import asyncio
import contextlib
import faulthandler
import fcntl
import logging
import os
import resource
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import uvloop

from spark_llm import cgroup, keys, logs, notify, reload, sockets, tls
from spark_llm.config import Settings
from spark_llm.controller import TICK_LIMIT_S, Controller
from spark_llm.errors import TryAgainError
from spark_llm.folders import Folders
from spark_llm.gateway.app import Gateway
from spark_llm.notify import Notifier
from spark_llm.profile import Profile
from spark_llm.reason import Reason
from spark_llm.server import Server
from spark_llm.status import TERMINAL, State

_ENDING = frozenset({State.DRAINING, State.STOPPING})

log = logging.getLogger("spark_llm")


@dataclass(frozen=True)
class _Door:
    """What is listened on.

    Attributes:
        listeners: the sockets.
        held: systemd keeps them open when this process ends.
        hosts: their addresses.
        accepted: API keys.
    """

    listeners: tuple[socket.socket, ...]
    held: bool
    hosts: tuple[str, ...]
    accepted: tuple[keys.Key, ...]


def serve(
    settings: Settings,
    profile: Profile,
    folders: Folders,
    reread: Callable[[], Settings] | None = None,
) -> int:
    """Serve until told to stop; returns the exit code.

    Args:
        settings: what to run with.
        profile: what to serve.
        folders: where things lie.
        reread: reads the settings again on SIGHUP; None leaves them as they are.

    Raises:
        ConfigError: the address cannot be bound, or is open to the network without keys.
        TryAgainError: another instance uses the same folders.
    """
    notifier = notify.connect()
    faulthandler.enable()  # the watchdog ends a stuck controller with SIGABRT: say where it was stuck
    _raise_descriptor_limit()
    cgroup.divide()
    folders.make()
    accepted = reload.accepted_keys(folders)
    with (
        _only_instance(folders.runtime / "lock"),
        sockets.listening(settings.gateway) as (listeners, held),
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        hosts = tuple(str(listener.getsockname()[0]) for listener in listeners)
        reload.refuse_open_door(settings, hosts, accepted)
        door = _Door(listeners, held, hosts, accepted)
        return runner.run(
            _serve(settings, profile, folders, door, notifier, reread or (lambda: settings))
        )


async def _serve(  # noqa: PLR0913, PLR0917  the parts a service is made of
    settings: Settings,
    profile: Profile,
    folders: Folders,
    door: _Door,
    notifier: Notifier,
    reread: Callable[[], Settings],
) -> int:
    controller = Controller(settings, profile, folders, reload.limits(settings))
    logs.set_fields(lambda: controller.board.journal_fields())  # noqa: PLW0108  a switch brings a new board
    gateway = Gateway(controller, door.accepted)
    files = tls.files(settings.gateway, os.environ)
    context = tls.context(files) if files else None

    def started() -> None:
        notifier.status(notify.status_line(controller.board.now))
        notifier.ready()

    server = Server(gateway, settings.gateway, context, started)
    reloader = reload.Reloader(settings, reread, folders, door.hosts, gateway, controller, context)

    def stop() -> None:
        notifier.stopping()
        if door.held:  # the next process takes those that come from now on
            server.stop_accepting()
        controller.request_stop()

    def hang_up() -> None:
        log.info("the terminal was closed: stopping")
        # Shell and kernel both say so, and a second stop would cut off the requests that still run.
        loop.add_signal_handler(signal.SIGHUP, lambda: None)
        stop()

    loop = asyncio.get_running_loop()
    stops = _hangup_stops(
        supervised="NOTIFY_SOCKET" in os.environ,
        terminal=_has_terminal(),
        ignored=signal.getsignal(signal.SIGHUP) is signal.SIG_IGN,
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    loop.add_signal_handler(
        signal.SIGHUP, hang_up if stops else lambda: _take_up(reloader, notifier)
    )
    serving = asyncio.create_task(server.serve(list(door.listeners)))
    telling = [
        asyncio.create_task(_tell(controller, notifier)),
        asyncio.create_task(_feed(controller, notifier)),
    ]
    _say_where(door, encrypted=context is not None, settings=settings)
    try:
        await controller.serve()
    finally:
        server.should_exit = True
        await serving
        await gateway.close()
        for task in telling:
            task.cancel()
        await asyncio.wait(telling)
    # For systemd, a stop that was asked for is no failure, whatever state it ended.
    return 1 if controller.ended in TERMINAL and not door.held else 0


def _hangup_stops(*, supervised: bool, terminal: bool, ignored: bool) -> bool:
    """Whether SIGHUP means that the terminal was closed, and not "reload". Pure.

    Args:
        supervised: a service manager started this.
        terminal: this has a controlling terminal.
        ignored: SIGHUP was ignored when this started (nohup): it shall outlast the terminal.
    """
    return terminal and not supervised and not ignored


def _has_terminal() -> bool:
    """Whether there is a controlling terminal: it sends SIGHUP at its end, wherever input and output go."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def _take_up(reloader: reload.Reloader, notifier: Notifier) -> None:
    notifier.reloading()
    try:
        notifier.status(reloader.reload())
    finally:  # whatever went wrong: what runs goes on, and systemd waits for this
        notifier.ready()


async def _tell(controller: Controller, notifier: Notifier) -> None:
    """Keep systemd's status line current."""
    async for _ in controller.board.bus.follow():
        notifier.status(notify.status_line(controller.board.now))


async def _feed(controller: Controller, notifier: Notifier) -> None:
    """Feed the watchdog as long as the controller's loop comes round."""
    while True:
        if controller.tick_age_s() < TICK_LIMIT_S:
            notifier.tick(ending=controller.board.now.state in _ENDING)
        await asyncio.sleep(notify.TICK_S)


def _say_where(door: _Door, *, encrypted: bool, settings: Settings) -> None:
    scheme = "https" if encrypted else "http"
    wanted = "127.0.0.1" if settings.gateway.host == "localhost" else settings.gateway.host
    for listener in door.listeners:
        host, port = listener.getsockname()[:2]
        log.info("listening on %s://%s:%d", scheme, f"[{host}]" if ":" in host else host, port)
        if not encrypted and not sockets.is_loopback(host):
            log.warning("keys and prompts cross the network unencrypted: set gateway.tls_*")
        if door.held and (host, port) != (wanted, settings.gateway.port):
            log.warning(
                "spark-llm.socket decides where to listen; gateway.host = %r and gateway.port = %d are not used. "
                "`sudo spark-llm install` and `systemctl restart spark-llm.target` bring both together.",
                settings.gateway.host,
                settings.gateway.port,
            )


def _raise_descriptor_limit() -> None:
    """Take all descriptors that are allowed: a shell gives 1024, and every client needs two.

    The engine inherits it, as it does under systemd; vLLM raises its own limit anyhow (``set_ulimit``).
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@contextlib.contextmanager
def _only_instance(path: Path) -> Iterator[None]:
    """Two instances in the same folders would unlink each other's engine socket."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
            raise TryAgainError(
                f"another spark-llm (process {owner or 'unknown'}) uses {path.parent}",
                reason=Reason.PORT_IN_USE,
                hint="Stop it first, or set paths.runtime to another folder.",
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)
