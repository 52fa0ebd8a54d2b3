"""The data path: an allow-listed request to the engine, its answer back, byte for byte.

A stream is passed on in whole events. That costs no latency, because part of an event is of no use to a client, and it
lets an answer that the engine cut off be told from a finished one before its bytes have left.
"""

import asyncio
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import nullcontext
from http import HTTPStatus
from typing import Any, Protocol

from starlette.requests import ClientDisconnect

from spark_llm.admission_queue import CUT, AdmissionQueue
from spark_llm.config import Gateway
from spark_llm.gateway.body import BodyBudget, read_body
from spark_llm.gateway.metrics import Metrics
from spark_llm.gateway.protocol import CLIENT, Client
from spark_llm.gateway.scheduling import Scheduling
from spark_llm.gateway.wire import aborted, aborted_in, error_body, error_event
from spark_llm.reason import Reason
from spark_llm.reply import Reply
from spark_llm.upstream import Headers, Response, UnreachableError, Upstream, UpstreamError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

ROUTES = {
    "/v1/chat/completions": "POST",
    "/v1/completions": "POST",
    "/v1/responses": "POST",
    "/v1/embeddings": "POST",
    "/v1/models": "GET",
    "/v1/messages": "POST",
    "/v1/messages/count_tokens": "POST",
}
"""All that reaches the engine. Its other routes (/invocations, /tokenize, /collective_rpc, /sleep, ...) never do."""
_NO_SEQUENCE = frozenset({"/v1/models", "/v1/messages/count_tokens"})
"""Answered without the model, in no time: they neither wait behind generations nor tell how long those take."""

_HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer"
    b" transfer-encoding upgrade".split()
)
_NOT_FORWARDED = _HOP_BY_HOP | frozenset(
    b"host content-length expect accept-encoding authorization x-api-key cookie x-request-id".split()
)
_NOT_RETURNED = _HOP_BY_HOP | frozenset((b"content-length", b"x-request-id"))
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
_LARGE_JSON = 256 * 1024
_GONE = "gone"
"""Why a request's task is cancelled: its client left."""
_EMPTY_STREAM = b"data: [DONE]\n\n"
"""All that a draining vLLM may send of a stream, with status 200."""

log = logging.getLogger("spark_llm.gateway")


class Seat(Protocol):
    """One engine, as the data path sees it."""

    queue: AdmissionQueue

    def upstream(self) -> Upstream:
        """The engine, if it is ready.

        Raises:
            Reply: 503 while it is not.
        """

    def touch(self) -> None:
        """A request goes to it now."""


class Engines(Protocol):
    """What the data path asks of the controller."""

    async def load(self, model: str, patience_s: float | None = None) -> Seat:
        """The engine for a model; waits while it is loaded on demand, no longer than ``patience_s`` seconds.

        Raises:
            Reply: it cannot be had.
        """


class Proxy:
    """An ASGI application for the paths in ``ROUTES``.

    Attributes:
        bodies: what requests' bodies take of memory now.
    """

    def __init__(self, engines: Engines, metrics: Metrics, settings: Gateway) -> None:
        self._engines = engines
        self._metrics = metrics
        self._settings = settings
        self.bodies = BodyBudget(max(settings.max_bodies_bytes, settings.max_body_bytes))
        self._scheduling = Scheduling(len(os.sched_getaffinity(0)))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        exchange = _Exchange(scope, send, self._settings.send_timeout_s)
        try:
            exchange.check_method()
            with self.bodies.account() as take:
                body, exchange.model = await self._body(scope, receive, take)
                await self._run(exchange, body)
        except Reply as reply:
            exchange.reason = reply.reason
            await exchange.refuse(reply)
        except _ClientGone as gone:
            exchange.status, exchange.reason = 499, gone.reason
            self._metrics.disconnects.inc()
        finally:
            self._metrics.requests.labels(
                exchange.path, str(exchange.status), exchange.reason
            ).inc()
            log.info(
                "%s %s %d %s %.0f ms %s",
                scope["method"],
                exchange.path,
                exchange.status,
                exchange.reason,
                1e3 * (time.perf_counter() - exchange.started),
                exchange.request_id.decode(),
            )

    async def _body(
        self, scope: Scope, receive: Receive, take: Callable[[int], None]
    ) -> tuple[bytes, str]:
        """The whole body, which must be a JSON object where there is one, and the model that it names."""
        try:
            body = await read_body(
                scope["headers"],
                receive,
                limit=self._settings.max_body_bytes,
                timeout_s=self._settings.header_timeout_s,
                setting="gateway.max_body_bytes",
                take=take,
            )
        except ClientDisconnect:
            raise _ClientGone from None
        return body, await _model_named(body) if scope["method"] == "POST" else ""

    async def _run(self, exchange: "_Exchange", body: bytes) -> None:
        """Forward, and give up as soon as the client does or the drain cuts."""
        task = asyncio.current_task()
        assert task is not None  # noqa: S101  for the type checker: this is a coroutine
        try:
            with exchange.client.watched(lambda: task.cancel(_GONE)):
                await self._forward(exchange, body)
        except asyncio.CancelledError as cancelled:
            if cancelled.args not in {(_GONE,), (CUT,)}:
                raise
            task.uncancel()
            if cancelled.args == (_GONE,):
                raise _ClientGone from None
            await exchange.break_off(Reason.DRAINING, "the service stops; try again later")

    async def _forward(self, exchange: "_Exchange", body: bytes) -> None:
        seat = await self._engines.load(exchange.model, exchange.patience_s)
        seat.upstream()  # no place in the queue while nothing is ready
        place = (
            nullcontext()
            if exchange.path in _NO_SEQUENCE
            else seat.queue.place(exchange.client_key, exchange.patience_s)
        )
        async with place:
            upstream = seat.upstream()
            seat.touch()
            with self._scheduling:
                await self._ask(exchange, upstream, body)

    async def _ask(self, exchange: "_Exchange", upstream: Upstream, body: bytes) -> None:
        waiting = time.perf_counter()
        try:
            async with upstream.request(
                exchange.method, exchange.target, exchange.forwarded_headers(), body
            ) as response:
                if response.content_type == b"text/event-stream":
                    await self._stream(exchange, response, waiting)
                else:
                    await self._whole(exchange, response, waiting)
        except UnreachableError as error:
            raise Reply(
                503, Reason.ENGINE_UNREACHABLE, "the engine cannot be reached", retry_after_s=5
            ) from error
        except UpstreamError as error:
            # It died or was killed in the middle of the answer.
            await exchange.break_off(Reason.ENGINE_EXITED, "the engine broke off")
            log.warning("the engine broke off: %s", error)

    async def _whole(self, exchange: "_Exchange", response: Response, waiting: float) -> None:
        body = await response.read()
        self._metrics.first_byte.observe(time.perf_counter() - waiting)
        if response.status == HTTPStatus.OK and aborted(body):
            raise _aborted()
        headers = [*_returned(response), (b"content-length", str(len(body)).encode())]
        await exchange.start(response.status, headers)
        await exchange.send_body(body, more=False)

    async def _stream(self, exchange: "_Exchange", response: Response, waiting: float) -> None:
        rest = b""
        while chunk := await response.read_some(exchange.pass_on if not rest else None):
            data = rest + chunk if rest else chunk
            end = data.rfind(b"\n\n") + 2
            if end == 1:
                rest = data
                continue
            events, rest = data[:end], data[end:]
            if aborted_in(events) or (not exchange.is_started and events == _EMPTY_STREAM):
                await exchange.break_off(Reason.ABORTED, "the engine aborted the request")
                return
            if not exchange.is_started:
                self._metrics.first_byte.observe(time.perf_counter() - waiting)
                await exchange.start(response.status, _returned(response))
            await exchange.send_body(events, more=True)
        if not exchange.is_started:
            await exchange.start(response.status, _returned(response))
        await exchange.send_body(rest, more=False)


class _ClientGone(Exception):  # noqa: N818  not an error: the client left, or takes nothing any more
    def __init__(self, reason: Reason = Reason.ABORTED) -> None:
        super().__init__(reason)
        self.reason = reason


def _aborted() -> Reply:
    return Reply(503, Reason.ABORTED, "the engine aborted the request", retry_after_s=5)


def _returned(response: Response) -> Headers:
    named = _connection_named(response.headers)
    return [
        (name, value)
        for name, value in response.headers
        if name not in _NOT_RETURNED and name not in named
    ]


def _connection_named(headers: Headers) -> set[bytes]:
    """Headers that a ``Connection`` header declares hop-by-hop (RFC 9110, 7.6.1)."""
    return {
        token.strip().lower()
        for name, value in headers
        if name == b"connection"
        for token in value.split(b",")
    }


async def _model_named(body: bytes) -> str:
    """The ``model`` of a request's body; empty if it names none."""
    try:
        # A large body (images) takes milliseconds to parse; other streams should not wait for it.
        value = (
            await asyncio.to_thread(json.loads, body)
            if len(body) > _LARGE_JSON
            else json.loads(body)
        )
    except (ValueError, RecursionError) as error:
        raise Reply(400, Reason.BAD_REQUEST, f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise Reply(400, Reason.BAD_REQUEST, "the body must be a JSON object")
    model = value.get("model")
    return model if isinstance(model, str) else ""


class _Exchange:
    """One request and the state of its answer."""

    def __init__(self, scope: Scope, send: Send, send_timeout_s: float) -> None:
        self.path: str = scope["path"]
        self.model = ""
        self.method: str = scope["method"]
        query: bytes = scope["query_string"]
        self.target = self.path.encode() + (b"?" + query if query else b"")
        self.headers: Headers = scope["headers"]
        self.request_id = _given(self.headers, b"x-request-id", _REQUEST_ID) or (
            secrets.token_hex(16).encode()
        )
        self.client_key: str = scope.get("spark_llm.key", "")
        self.started = time.perf_counter()
        self.is_started = False
        self.status = 0
        self.reason = Reason.OK
        self._send = send
        self._send_timeout_s = send_timeout_s
        self.client: Client = scope[CLIENT]

    @property
    def patience_s(self) -> float | None:
        """How long the client's library will still wait, where it says so (OpenAI's and Anthropic's do), in seconds."""
        for name, value in self.headers:
            if name in {b"x-stainless-timeout", b"x-request-timeout"}:
                try:
                    return max(0.0, float(value) - (time.perf_counter() - self.started))
                except ValueError:
                    return None
        return None

    def check_method(self) -> None:
        if self.method != ROUTES[self.path]:
            raise Reply(405, Reason.BAD_REQUEST, f"{self.path} takes {ROUTES[self.path]}")

    def forwarded_headers(self) -> Headers:
        named = _connection_named(self.headers)
        kept = [
            (name, value)
            for name, value in self.headers
            if name not in _NOT_FORWARDED and name not in named
        ]
        return [*kept, (b"x-request-id", self.request_id)]

    async def start(self, status: int, headers: Headers) -> None:
        self.is_started = True
        self.status = status
        headers = [*headers, (b"x-request-id", self.request_id)]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    def pass_on(self, events: bytes) -> bool:
        """Write whole events of a stream that has begun; False if they need a closer look or the client is slow."""
        return (
            self.is_started
            and events.endswith(b"\n\n")
            and not aborted_in(events)
            and self.client.write_event(events)
        )

    async def send_body(self, data: bytes, *, more: bool) -> None:
        message = {"type": "http.response.body", "body": data, "more_body": more}
        if not self.client.slow:
            await self._send(message)
            return
        try:
            async with asyncio.timeout(self._send_timeout_s):
                await self._send(message)
        except (
            TimeoutError
        ):  # it would keep its place at the engine for as long as its connection lasts
            self.client.drop()
            raise _ClientGone(Reason.TIMEOUT) from None

    async def refuse(self, reply: Reply) -> None:
        body = error_body(self.path, reply.status, reply.reason, reply.message)
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        headers += [(name.encode(), value.encode()) for name, value in reply.headers().items()]
        await self.start(reply.status, headers)
        await self.send_body(body, more=False)

    async def break_off(self, reason: Reason, message: str) -> None:
        """End an answer that cannot be finished: an error status, or an error event if it has begun."""
        if not self.is_started:
            raise Reply(503, reason, message, retry_after_s=5)
        self.reason = reason
        await self.send_body(error_event(self.path, 503, reason, message), more=False)


def _given(headers: Headers, name: bytes, pattern: re.Pattern[bytes]) -> bytes | None:
    for key, value in headers:
        if key == name and pattern.fullmatch(value):
            return value
    return None
