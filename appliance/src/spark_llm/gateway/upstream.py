"""The HTTP client side of the gateway: one engine behind a Unix socket."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp

_READ_LIMIT = 256 * 1024
"""Bytes read ahead of a slow client before the engine is made to wait (back-pressure)."""


class Upstream:
    """Connections to one engine, kept open between requests."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self._session = aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(path=str(socket), limit=0, keepalive_timeout=4.0),
            auto_decompress=False,  # byte for byte
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=5.0),
            read_bufsize=_READ_LIMIT,
            skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
        )

    @asynccontextmanager
    async def request(
        self, method: str, target: str, headers: list[tuple[str, str]], body: bytes
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send a request; leaving the block before the answer's end closes the connection, which aborts it.

        Raises:
            aiohttp.ClientError: the engine cannot be reached or broke off.
        """
        async with self._session.request(
            method,
            f"http://engine{target}",
            headers=headers,
            data=body if body or method == "POST" else None,
            allow_redirects=False,
        ) as response:
            yield response

    async def get(self, path: str, timeout_s: float) -> tuple[int, bytes]:
        """Status and body of a small GET.

        Raises:
            aiohttp.ClientError: the engine cannot be reached.
            TimeoutError: no whole answer within ``timeout_s`` seconds.
        """
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        async with self._session.get(f"http://engine{path}", timeout=timeout) as response:
            return response.status, await response.read()

    async def post_json(self, path: str, value: object, timeout_s: float) -> tuple[int, bytes]:
        """Status and body of a POST of ``value`` as JSON; errors as :meth:`get`."""
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        headers = {"content-type": "application/json"}
        async with self._session.post(
            f"http://engine{path}", json=value, headers=headers, timeout=timeout
        ) as response:
            return response.status, await response.read()

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()
