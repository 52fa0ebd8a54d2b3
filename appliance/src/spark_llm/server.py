"""uvicorn, told when to start answering, when to stop accepting and when to go."""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable, Iterator

import uvicorn

from spark_llm.config import Gateway as GatewaySettings
from spark_llm.gateway.app import Gateway
from spark_llm.gateway.protocol import bounded_protocol

_CLOSE_TIMEOUT_S = 2
"""Time that idle connections and event streams have after the engine is gone, in seconds."""
_FIRST_REQUEST_S = 0.5
"""Time that a connection accepted just before the end has to send its request, in seconds."""
_LOOK_S = 0.02


class Server(uvicorn.Server):
    """Leaves signals to the service: a drain comes before the server's own stop.

    Args:
        gateway: the application.
        settings: bounds on requests.
        tls: context of a TLS server; None for plain HTTP.
        on_started: called once requests are answered.
    """

    def __init__(
        self,
        gateway: Gateway,
        settings: GatewaySettings,
        tls: ssl.SSLContext | None,
        on_started: Callable[[], None],
    ) -> None:
        super().__init__(
            uvicorn.Config(
                gateway,
                http=bounded_protocol(settings.max_header_bytes, settings.header_timeout_s),
                ws="none",
                lifespan="off",
                proxy_headers=False,  # the peer decides who may change things, not a header
                log_config=None,
                access_log=False,
                server_header=False,
                date_header=False,
                timeout_keep_alive=settings.keep_alive_s,
                timeout_graceful_shutdown=_CLOSE_TIMEOUT_S,
                ssl_context_factory=None if tls is None else lambda *_: tls,
            )
        )
        self._on_started = on_started

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Nothing: the service has handlers of its own."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, then say so."""
        await super().startup(sockets)
        self._on_started()

    def stop_accepting(self) -> None:
        """Leave new connections in the kernel's queue, for the next process that has the socket."""
        for server in self.servers if self.started else ():
            server.close()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, but a connection that was just accepted is heard first: closing it would lose its request."""
        self.stop_accepting()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FIRST_REQUEST_S):
                while any(_unheard(item) for item in self.server_state.connections):  # noqa: ASYNC110  no event
                    await asyncio.sleep(_LOOK_S)
        await super().shutdown(sockets)


def _unheard(connection: object) -> bool:
    return getattr(connection, "cycle", None) is None
