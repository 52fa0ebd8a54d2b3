"""uvicorn's HTTP protocol with bounds on a request's head, and two short ways between application and client.

The bounds are its size and the time a client may take to send it. uvicorn 0.54 has neither: with httptools a header of
any length is collected, and a client that sends a byte a minute holds its connection for ever.

The short ways are those of ``Client``, which the application finds in the scope under ``CLIENT``. ASGI has the same,
but a stream would wake a task for every event, and need a task of its own that waits for the client to leave.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from spark_llm.gateway.upgrade_header import UpgradeFilter
from spark_llm.gateway.wire import error_body
from spark_llm.reason import Reason

CLIENT = "spark_llm.client"
"""Key of the ASGI scope; its value is a ``Client``."""


class Client(Protocol):
    """The connection that a request came on."""

    def write_event(self, data: bytes) -> bool:
        """Write ``data`` as one chunk of a chunked answer that has begun, without a turn of the event loop.

        False if nothing was written, because the client is slow or gone: ``send`` waits, or finds out.
        """

    def watched(self, leave: Callable[[], object]) -> AbstractContextManager[None]:
        """Within the block, call ``leave`` when the client closes the connection, at once if it has done so already."""

    @property
    def slow(self) -> bool:
        """Whether so much waits for the client that the next ``send`` waits too."""

    def drop(self) -> None:
        """Close the connection at once; what was not sent yet is lost."""


def bounded_protocol(  # noqa: C901  one class, many small methods
    max_header_bytes: int, header_timeout_s: float
) -> type[asyncio.Protocol]:
    """A protocol class for ``uvicorn.Config(http=...)`` with these bounds."""

    class BoundedProtocol(HttpToolsProtocol):
        _head_bytes = 0
        _in_head = True
        _head_timer: asyncio.TimerHandle | None = None
        _lost = False
        _leave: Callable[[], object] | None = None

        def __init__(self, *arguments: Any, **named: Any) -> None:  # noqa: ANN401  as in uvicorn
            super().__init__(*arguments, **named)
            self._lines = UpgradeFilter()

        def connection_made(self, transport: Any) -> None:  # noqa: ANN401  as in uvicorn
            super().connection_made(transport)
            self._await_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._cancel_head_timer()
            super().connection_lost(exc)
            self._lost = True
            if self._leave is not None:
                self._leave()

        def data_received(self, data: bytes) -> None:
            if self._in_head:
                self._head_bytes += len(data)
                if (
                    self._head_bytes > max_header_bytes
                    and b"\r\n\r\n" not in data[:max_header_bytes]
                ):
                    self._refuse(
                        431,
                        b"Request Header Fields Too Large",
                        Reason.HEADER_TOO_LARGE,
                        f"the request's head exceeds {max_header_bytes} bytes",
                    )
                    return
                if self._head_timer is None:  # a blank line before the next head begins no message
                    self._await_head()
                data = self._lines.feed(data)
            if data:
                super().data_received(data)

        def on_message_begin(self) -> None:
            self._in_head = True
            if self._head_timer is None:
                self._await_head()
            super().on_message_begin()
            self.scope[CLIENT] = self  # type: ignore[literal-required]

        def write_event(self, data: bytes) -> bool:
            if self.slow or self.transport.is_closing():
                return False
            self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))
            return True

        @contextmanager
        def watched(self, leave: Callable[[], object]) -> Iterator[None]:
            self._leave = leave  # one at a time: a connection's next request begins when this one has been answered
            if self._lost:
                leave()
            try:
                yield
            finally:
                self._leave = None

        def on_headers_complete(self) -> None:
            self._in_head = False
            self._head_bytes = 0
            self._cancel_head_timer()
            super().on_headers_complete()

        def on_message_complete(self) -> None:
            # From here, and not from the answer's end: a pipelined request may come while this one is answered.
            self._in_head = True
            super().on_message_complete()

        @property
        def slow(self) -> bool:
            return self.flow.write_paused

        def drop(self) -> None:
            self.transport.abort()

        @property
        def _answering(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

        def _await_head(self) -> None:
            self._head_timer = self.loop.call_later(header_timeout_s, self._too_slow)

        def _cancel_head_timer(self) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

        def _too_slow(self) -> None:
            self._head_timer = None
            if self._answering:  # the head of the next request has its time after this answer
                self._await_head()
                return
            self._refuse(
                408,
                b"Request Timeout",
                Reason.TIMEOUT,
                f"the request's head did not arrive within {header_timeout_s:g} s",
            )

        def _refuse(self, status: int, phrase: bytes, reason: Reason, message: str) -> None:
            if self.transport.is_closing():
                return
            if self._answering:  # an error within the answer to another request would garble it
                self.transport.close()
                return
            body = error_body("", status, reason, message)
            self.transport.write(
                b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
                b"connection: close\r\n\r\n%s" % (status, phrase, len(body), body)
            )
            self.transport.close()

    return BoundedProtocol
