"""The service: one process that holds the port, the controller and the gateway."""

import asyncio
import contextlib
import fcntl
import ipaddress
import logging
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import uvicorn
import uvloop

from spark_llm import keys
from spark_llm.admission import Limits
from spark_llm.config import Settings
from spark_llm.controller import Controller
from spark_llm.errors import ConfigError, TryAgainError
from spark_llm.folders import Folders
from spark_llm.gateway.app import Gateway
from spark_llm.gateway.protocol import bounded_protocol
from spark_llm.gateway.queue import AdmissionQueue
from spark_llm.profile import Profile
from spark_llm.reason import Reason
from spark_llm.status import TERMINAL

_BACKLOG = 2048
_CLOSE_TIMEOUT_S = 2
"""Time that idle connections and event streams have after the engine is gone, in seconds."""

log = logging.getLogger("spark_llm")


def serve(settings: Settings, profile: Profile, folders: Folders) -> int:
    """Serve until told to stop; returns the exit code.

    Raises:
        ConfigError: the address cannot be bound, or is open to the network without keys.
        TryAgainError: another instance uses the same folders.
    """
    folders.make()
    accepted = keys.load(folders.keys)
    refuse_open_door(settings, accepted)
    with (
        _only_instance(folders.runtime / "lock"),
        bind(settings) as listener,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        return runner.run(_serve(settings, profile, folders, accepted, listener))


async def _serve(
    settings: Settings,
    profile: Profile,
    folders: Folders,
    accepted: tuple[keys.Key, ...],
    listener: socket.socket,
) -> int:
    queue = AdmissionQueue(
        Limits(
            max_running=settings.gateway.max_running,
            max_queue=settings.gateway.max_queue,
            queue_timeout_s=settings.gateway.queue_timeout_s,
        )
    )
    controller = Controller(settings, profile, folders, queue)
    gateway = Gateway(controller, queue, accepted)
    server = _Server(
        uvicorn.Config(
            gateway,
            http=bounded_protocol(
                settings.gateway.max_header_bytes, settings.gateway.header_timeout_s
            ),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            timeout_graceful_shutdown=_CLOSE_TIMEOUT_S,
        )
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, controller.request_stop)
    serving = asyncio.create_task(server.serve([listener]))
    host, port = listener.getsockname()[:2]
    log.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
    try:
        await controller.serve()
    finally:
        server.should_exit = True
        await serving
    return 1 if controller.ended in TERMINAL else 0


class _Server(uvicorn.Server):
    """Leaves signals to us: a drain comes before the server's own stop."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def refuse_open_door(settings: Settings, accepted: tuple[keys.Key, ...]) -> None:
    """Raise when the network could come in without a key.

    Raises:
        ConfigError: not loopback, no keys, not ``insecure``.
    """
    if accepted or settings.gateway.insecure or _is_loopback(settings.gateway.host):
        return
    raise ConfigError(
        f"{settings.gateway.host} is reachable from the network and no API key is configured",
        reason=Reason.INSECURE_BIND,
        hint="Make one with `spark-llm keys add NAME`, or pass --insecure.",
    )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@contextlib.contextmanager
def bind(settings: Settings) -> Iterator[socket.socket]:
    """The listening socket.

    Raises:
        ConfigError: the port is taken or the address is not ours.
    """
    host, port = settings.gateway.host, settings.gateway.port
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}: {error.strerror}") from error
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(_BACKLOG)
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host} port {port}: {os.strerror(error.errno or 0)}",
                reason=Reason.PORT_IN_USE,
                hint="Stop what uses it (`ss -ltnp` shows it), or set gateway.port or --port.",
            ) from error
        listener.setblocking(False)  # noqa: FBT003  the socket API
        yield listener


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
