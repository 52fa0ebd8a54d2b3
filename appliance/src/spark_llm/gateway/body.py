"""Reading a request's body, bounded in size and in time: whoever sends it may be slow, or mean harm."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from spark_llm.reason import Reason
from spark_llm.reply import Reply
from spark_llm.upstream import Headers
from spark_llm.validation import explain

T = TypeVar("T", bound=BaseModel)
_LARGEST_JSON = 4096
"""Largest body of the operator's API, in bytes: a few names and numbers."""
_RETRY_S = 5


class BodyBudget:
    """The memory of all bodies that are held at once: while they arrive, wait for a place and are answered.

    Args:
        limit: in bytes.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.held = 0

    @contextmanager
    def account(self) -> Iterator[Callable[[int], None]]:
        """A function that takes bytes for one request; they are given back at the end of the block.

        Raises:
            Reply: 503, by that function, when there are none left.
        """
        taken = 0

        def take(size: int) -> None:
            nonlocal taken
            if self.held + size > self._limit:
                raise Reply(
                    503,
                    Reason.QUEUE_FULL,
                    "too many large requests at once (gateway.max_bodies_bytes)",
                    retry_after_s=_RETRY_S,
                )
            self.held += size
            taken += size

        try:
            yield take
        finally:
            self.held -= taken


async def read_body(  # noqa: PLR0913  three bounds, each with its own error
    headers: Headers,
    receive: Callable[[], Awaitable[MutableMapping[str, Any]]],
    *,
    limit: int,
    timeout_s: float,
    setting: str = "",
    take: Callable[[int], None] = lambda _: None,
) -> bytes:
    """The whole body.

    Args:
        headers: of the request; a length that it declares is believed when it is too large.
        receive: as ASGI gives it.
        limit: largest size, in bytes.
        timeout_s: longest time until its end, in seconds.
        setting: what the limit is called, for the message; empty if nobody can change it.
        take: of a :class:`BodyBudget`.

    Raises:
        Reply: 413 when it is too large, 408 when it takes too long, and what ``take`` raises.
        ClientDisconnect: the client left.
    """
    named = f" ({setting})" if setting else ""
    too_large = Reply(
        413, Reason.BODY_TOO_LARGE, f"the request's body exceeds {limit} bytes{named}"
    )
    for name, value in headers:
        if name == b"content-length" and int(value) > limit:
            raise too_large
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                take(len(parts[-1]))
                if size > limit:
                    raise too_large
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        raise Reply(
            408, Reason.TIMEOUT, f"the request's body did not arrive within {timeout_s:g} s"
        ) from None


async def read_json(request: Request, kind: type[T], timeout_s: float) -> T:
    """The body of a request to the operator's API as ``kind``; no body counts as an empty object.

    Args:
        request: whose body it is.
        kind: refuses what it does not know.
        timeout_s: longest time until its end, in seconds.

    Raises:
        Reply: 400 when it is something else, else as :func:`read_body`.
    """
    try:
        body = await read_body(
            request.scope["headers"], request.receive, limit=_LARGEST_JSON, timeout_s=timeout_s
        )
        return kind.model_validate_json(body or b"{}")
    except ClientDisconnect:  # an answer to nobody, but not an error of ours that fills the log
        raise Reply(499, Reason.ABORTED, "the client left") from None
    except ValidationError as error:
        raise Reply(400, Reason.BAD_REQUEST, explain(error, kind)) from None
