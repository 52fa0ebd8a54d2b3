"""The gateway's listening sockets: passed on by systemd (sd_listen_fds(3)), else opened here."""

import contextlib
import ipaddress
import os
import socket
from collections.abc import Iterator, Mapping

from spark_llm import config
from spark_llm.errors import ConfigError
from spark_llm.reason import Reason

NAME = "http"
"""``FileDescriptorName=`` of spark-llm.socket."""
_BACKLOG = 2048


@contextlib.contextmanager
def listening(gateway: config.Gateway) -> Iterator[tuple[tuple[socket.socket, ...], bool]]:
    """The sockets to listen on, and whether they outlive this process because systemd holds them.

    Raises:
        ConfigError: the port is taken, the address is not ours, or systemd passed something else.
    """
    with contextlib.ExitStack() as stack:
        passed = inherited()
        for listener in passed:
            stack.enter_context(listener)
        yield (passed, True) if passed else ((stack.enter_context(bind(gateway)),), False)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bind(gateway: config.Gateway) -> socket.socket:
    """Open the configured address and port.

    Raises:
        ConfigError: the port is taken or the address is not ours.
    """
    host, port = gateway.host, gateway.port
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}: {error.strerror}") from error
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {host} port {port}: {os.strerror(error.errno or 0)}",
            reason=Reason.PORT_IN_USE,
            hint="Stop what uses it (`ss -ltnp` shows it), or set gateway.port or --port.",
        ) from error
    listener.setblocking(False)  # noqa: FBT003  the socket API
    return listener


def inherited(environ: Mapping[str, str] = os.environ) -> tuple[socket.socket, ...]:
    """The gateway's sockets as systemd passed them; empty where it passed none.

    Raises:
        ConfigError: one of them is not a listening stream socket, or has a name that nothing here answers to.
    """
    if environ.get("LISTEN_PID") != str(os.getpid()):
        return ()
    try:
        from systemd import daemon  # noqa: PLC0415  an optional extra; only needed here
    except ImportError as error:
        raise ConfigError(
            "systemd passed a socket (LISTEN_FDS), but systemd-python is not installed",
            hint="Install the extra: pip install 'spark-llm[systemd]', or `make systemd` in a checkout.",
        ) from error
    named: dict[int, str] = daemon.listen_fds_with_names(unset_environment=True)
    return tuple(_checked(descriptor, name) for descriptor, name in sorted(named.items()))


def _checked(descriptor: int, name: str) -> socket.socket:
    if name != NAME:
        raise ConfigError(
            f"systemd passed a socket named {name!r}",
            hint=f"The socket unit must say FileDescriptorName={NAME}.",
        )
    listener = socket.socket(fileno=descriptor)
    if (
        listener.family not in {socket.AF_INET, socket.AF_INET6}
        or listener.type != socket.SOCK_STREAM
        or not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    ):
        listener.close()
        raise ConfigError(
            f"the socket {name!r} that systemd passed does not listen for TCP streams",
            hint="The socket unit must say ListenStream=ADDRESS:PORT and Accept=no.",
        )
    listener.setblocking(False)  # noqa: FBT003  the socket API
    return listener
