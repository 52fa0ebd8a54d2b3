"""The HTTP client side of the gateway: one engine behind a Unix socket.

httptools' parser under a small protocol of our own: a general client library takes two to ten times the CPU time per
answer (docs/reference/benchmarks.md), and of what it offers only this much is needed. What the engine sends must have
a length or be chunked, as all that vLLM (uvicorn) sends is.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import httptools

Headers = list[tuple[bytes, bytes]]
"""Names in lower case, in the order in which they came."""
_READ_AHEAD = 256 * 1024
"""Bytes read ahead of a slow client before the engine is made to wait (back-pressure)."""
_IDLE_LIMIT_S = 4.0
"""How long an unused connection is kept; vLLM closes its own after 5 s (VLLM_HTTP_TIMEOUT_KEEP_ALIVE)."""
_CONNECT_TIMEOUT_S = 5.0


Sink = Callable[[bytes], bool]
"""Takes a piece of a body; False if it does not want it."""


class UpstreamError(Exception):
    """The engine broke off its answer, or what it sent is not HTTP."""


class UnreachableError(UpstreamError):
    """No connection to the engine could be made; whether the engine is to blame is open."""


class NobodyListensError(UnreachableError):
    """The engine's socket is gone, or nobody accepts on it."""


class Response:
    """An answer as it comes in; also the target of the parser's callbacks.

    Attributes:
        status: of HTTP.
        headers: names in lower case, in the engine's order.
        ended: all of the body is here.
        keep_alive: the connection may be used again after the end.
        unread: bytes of the body that wait for :meth:`read_some`.
        waits_since: since when a reader waits for more, on the loop's clock; None while none does.
    """

    def __init__(self, resume_reading: Callable[[], None]) -> None:
        self.status = 0
        self.headers: Headers = []
        self.ended = False
        self.keep_alive = False
        self.unread = 0
        self.waits_since: float | None = None
        self.parser = httptools.HttpResponseParser(self)
        self._resume_reading = resume_reading
        self._has_head = False
        self._parts: list[bytes] = []
        self._sink: Sink | None = None
        self._error: UpstreamError | None = None
        self._news: asyncio.Future[None] | None = None

    @property
    def content_type(self) -> bytes:
        """Media type without parameters, in lower case; empty if the engine named none."""
        for name, value in self.headers:
            if name == b"content-type":
                return value.partition(b";")[0].strip().lower()
        return b""

    async def head(self) -> None:
        """Wait for status and headers.

        Raises:
            UpstreamError: the engine broke off.
        """
        while not self._has_head:
            await self._more()

    async def read_some(self, sink: Sink | None = None) -> bytes:
        """What has come of the body since the last call, at least one byte; empty at the body's end.

        Args:
            sink: what comes while this waits is offered to it first, from within the event loop's read callback: waking
                the reader would cost more than passing on the event that an engine makes of one token.

        Raises:
            UpstreamError: the engine broke off.
        """
        self._sink = sink
        try:
            while not self._parts:
                if self.ended:
                    return b""
                await self._more()
        finally:
            self._sink = None
        data = self._take()
        self._resume_reading()
        return data

    def _take(self) -> bytes:
        data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts.clear()
        self.unread = 0
        return data

    async def read(self) -> bytes:
        """The rest of the body; errors as :meth:`read_some`."""
        parts = []
        while part := await self.read_some():
            parts.append(part)
        return b"".join(parts)

    async def _more(self) -> None:
        if self._error is not None:
            raise self._error
        loop = asyncio.get_running_loop()
        self._news = loop.create_future()
        self.waits_since = loop.time()
        try:
            await self._news
        finally:
            self.waits_since = None

    def wake(self) -> None:
        """Let the reader look again, unless its sink takes what is here and more will come."""
        if self._sink is not None and self._parts:
            data = self._take()
            if not self._sink(data):
                self._parts.append(data)
                self._sink = None  # the reader has its turn first
            elif not self.ended and self._error is None:
                return
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    def fail(self, error: UpstreamError) -> None:
        """No more will come; bytes already here can still be read."""
        if not self.ended and self._error is None:
            self._error = error
            self.wake()

    # The parser's callbacks, named by httptools.

    def on_message_begin(self) -> None:
        """A second answer must not become the next client's."""
        if self._has_head:
            raise UpstreamError("the engine sent more than one answer")

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header."""
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """Status and headers are there."""
        self.status = self.parser.get_status_code()
        self._has_head = True

    def on_body(self, data: bytes) -> None:
        """A piece of the body, without its chunk's frame."""
        self._parts.append(data)
        self.unread += len(data)

    def on_message_complete(self) -> None:
        """The body has ended as its framing says."""
        self.ended = True
        self.keep_alive = self.parser.should_keep_alive()  # the parser forgets it after this call


class _Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self, on_lost: Callable[["_Connection"], None]) -> None:
        self.idle_since = 0.0
        self._on_lost = on_lost
        self._response: Response | None = None
        self._paused = False

    def send(self, request: bytes) -> Response:
        self._response = Response(self._resume)
        self._transport.write(request)
        return self._response

    def waits_since(self, since: float) -> bool:
        """Whether somebody has waited for the engine at least since ``since``."""
        response = self._response
        return (
            response is not None
            and response.waits_since is not None
            and response.waits_since <= since
        )

    @property
    def reusable(self) -> bool:
        """Whether the answer is over, and so is the request: an engine may answer before it has read all of it."""
        return (
            self._response is not None
            and self._response.ended
            and self._response.keep_alive
            and not self._paused
            and not self._transport.is_closing()
            and self._transport.get_write_buffer_size() == 0
        )

    def rest(self, now: float) -> None:
        self._response = None
        self.idle_since = now

    def abort(self) -> None:
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's does not derive from it

    def data_received(self, data: bytes) -> None:
        response = self._response
        if response is None:
            self.abort()  # bytes that nobody asked for
            return
        try:
            response.parser.feed_data(data)
        except httptools.HttpParserError as error:
            response.keep_alive = False
            response.fail(UpstreamError(f"not HTTP: {error}"))
            response.wake()
            self.abort()
            return
        response.wake()
        if response.unread > _READ_AHEAD and not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._response is not None:
            self._response.fail(UpstreamError(str(exc or "the engine closed the connection")))
        self._on_lost(self)

    def _resume(self) -> None:
        if self._paused:
            self._paused = False
            self._transport.resume_reading()


class Upstream:
    """Connections to one engine, kept open between requests."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self._open: set[_Connection] = set()
        self._idle: list[_Connection] = []

    @asynccontextmanager
    async def request(
        self, method: str, target: bytes, headers: Headers, body: bytes
    ) -> AsyncIterator[Response]:
        """Send a request; leaving the block before the answer's end closes the connection, which aborts it.

        Args:
            method: of HTTP.
            target: path and query as they go on the wire.
            headers: all but ``host`` and ``content-length``.
            body: may be empty.

        Raises:
            NobodyListensError: the engine is not there.
            UnreachableError: it cannot be reached.
            UpstreamError: it broke off.
        """
        connection = self._take_idle() or await self._connect()
        try:
            response = connection.send(_encode(method, target, headers, body))
            await response.head()
            yield response
        finally:
            if connection.reusable:
                connection.rest(asyncio.get_running_loop().time())
                self._idle.append(connection)
            else:
                connection.abort()

    def waiting(self, since: float) -> int:
        """Requests that wait for the engine, and have waited for its next byte since ``since`` on the loop's clock.

        Not those whose client is slow: what the engine has sent for them lies here unread.
        """
        return sum(connection.waits_since(since) for connection in self._open)

    async def get(self, path: str, timeout_s: float) -> tuple[int, bytes]:
        """Status and body of a small GET.

        Raises:
            UpstreamError: the engine cannot be reached or broke off.
            TimeoutError: no whole answer within ``timeout_s`` seconds.
        """
        return await self._exchange("GET", path, [], b"", timeout_s)

    async def post_json(
        self, path: str, value: object, timeout_s: float | None
    ) -> tuple[int, bytes]:
        """Status and body of a POST of ``value`` as JSON; errors as :meth:`get`."""
        headers = [(b"content-type", b"application/json")]
        return await self._exchange("POST", path, headers, json.dumps(value).encode(), timeout_s)

    async def close(self) -> None:
        """Close all connections, those in use too."""
        for connection in tuple(self._open):
            connection.abort()

    async def _exchange(
        self, method: str, path: str, headers: Headers, body: bytes, timeout_s: float | None
    ) -> tuple[int, bytes]:
        async with (
            asyncio.timeout(timeout_s),
            self.request(method, path.encode(), headers, body) as response,
        ):
            return response.status, await response.read()

    def _take_idle(self) -> _Connection | None:
        """The connection used last: the others grow old and are closed by the engine."""
        if not self._idle:
            return None
        connection = self._idle.pop()
        if asyncio.get_running_loop().time() - connection.idle_since <= _IDLE_LIMIT_S:
            return connection
        for old in (connection, *self._idle):
            old.abort()
        self._idle.clear()
        return None

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                _, connection = await loop.create_unix_connection(
                    lambda: _Connection(self._forget), str(self.socket)
                )
        except (ConnectionRefusedError, FileNotFoundError) as error:
            raise NobodyListensError(str(error)) from error
        except (
            OSError
        ) as error:  # our own want of descriptors, a full queue of connections, a timeout
            raise UnreachableError(str(error) or "timeout") from error
        self._open.add(connection)
        return connection

    def _forget(self, connection: _Connection) -> None:
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)


def _encode(method: str, target: bytes, headers: Headers, body: bytes) -> bytes:
    lines = [b"%s %s HTTP/1.1\r\nhost: engine" % (method.encode(), target)]
    lines += [b"%s: %s" % header for header in headers]
    if body or method == "POST":
        lines.append(b"content-length: %d" % len(body))
    return b"\r\n".join((*lines, b"", body))
