"""Listening sockets that systemd opened and passed on (sd_listen_fds(3))."""

import os
import socket
from collections.abc import Mapping

from spark_llm.errors import ConfigError

NAME = "http"
"""``FileDescriptorName=`` of spark-llm.socket."""


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
        listener.family not in {socket.AF_INET, socket.AF_INET6, socket.AF_UNIX}
        or listener.type != socket.SOCK_STREAM
        or not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    ):
        listener.close()
        raise ConfigError(
            f"the socket {name!r} that systemd passed does not listen for streams",
            hint="The socket unit must say ListenStream= and Accept=no.",
        )
    listener.setblocking(False)  # noqa: FBT003  the socket API
    return listener
