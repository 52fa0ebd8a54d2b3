"""The operator's API over real connections."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import anyio
import pytest
from spark_llm import keys
from spark_llm.errors import ConfigError, RefusedError, SparkLlmError, TryAgainError
from spark_llm.gateway.body import read_json
from spark_llm.gateway.operator import SwitchRequest
from spark_llm.reason import Reason
from spark_llm.reply import Reply, reply_of
from spark_llm.store import BusyError
from starlette.requests import Request
from starlette.types import Message

from tests.appliance.gateway.conftest import Running

pytestmark = pytest.mark.anyio


@pytest.fixture
async def client(running: Running) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(running.url) as session:
        yield session


async def test_keys_are_those_that_open_the_door(
    running: Running, client: aiohttp.ClientSession, tmp_path: Path
) -> None:
    """The list has the keys of a systemd credential too, not only those of the file."""
    key, token = keys.add(tmp_path / "credential", "boss", keys.ADMIN)
    running.gateway.keys = keys.load(tmp_path / "credential")
    async with client.get("/api/v1/keys", headers={"x-api-key": token}) as answer:
        assert await answer.json() == {"keys": [key.public()]}


POSTS = ["/api/v1/switch", "/api/v1/fit", "/api/v1/models/org/name/fetch"]


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("declared", [False, True])
async def test_a_body_is_bounded_in_size(running: Running, path: str, declared: bool) -> None:
    """What is too large is answered 413 before its end came, and the connection is closed instead of read."""
    reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
    length = b"Content-Length: 268435456" if declared else b"Transfer-Encoding: chunked"
    writer.write(b"POST %b HTTP/1.1\r\nHost: localhost\r\n%b\r\n\r\n" % (path.encode(), length))
    if not declared:
        writer.write(b"2000\r\n" + b" " * 0x2000 + b"\r\n")  # and no last chunk
    with anyio.fail_after(30):
        answer = await reader.read()
    writer.close()
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"body_too_large" in answer


@pytest.mark.parametrize("path", POSTS)
async def test_a_body_is_bounded_in_time(running: Running, path: str) -> None:
    """Who sends the head and then nothing gets 408 after ``gateway.header_timeout_s``, and holds nothing any more."""
    reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
    head = b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: 20\r\n\r\n{" % path.encode()
    writer.write(head)
    with anyio.fail_after(30):
        answer = await reader.read()
    writer.close()
    assert answer.startswith(b"HTTP/1.1 408 ")


async def test_a_client_that_leaves_in_its_body_is_no_error() -> None:
    """Half a request ends as an answer to nobody, not as an error with a traceback in the log."""

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    request = Request({"type": "http", "method": "POST", "headers": []}, receive)
    with pytest.raises(Reply) as left:
        await read_json(request, SwitchRequest, 1.0)
    assert left.value.status == 499


@pytest.mark.parametrize(
    "body",
    [
        b"x" * 4000,
        b'{"profile": "demo", "context": "%b"}' % (b"1x" * 1000),
        b'{"%b": 1}' % (b"k" * 4000),
    ],
)
async def test_what_was_sent_is_quoted_briefly(client: aiohttp.ClientSession, body: bytes) -> None:
    """The sentence that refuses a body quotes a little of it, for it goes to logs and terminals."""
    async with client.post("/api/v1/fit", data=body) as answer:
        assert answer.status == 400
        assert len((await answer.json())["error"]["message"]) < 500


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError("m"), 400),
        (ConfigError("m", reason=Reason.MODEL_MISSING), 404),
        (RefusedError("m", reason=Reason.DOES_NOT_FIT), 409),
        (RefusedError("m", reason=Reason.NOT_FOUND), 404),
        (TryAgainError("m", reason=Reason.NETWORK), 503),
        (BusyError("org/name", None), 409),
        (SparkLlmError("m", reason=Reason.INTERNAL), 500),
    ],
)
def test_an_error_has_one_status(error: SparkLlmError, status: int) -> None:
    """The same error is the same answer in every part of the API; what may pass says when to ask again."""
    reply = reply_of(error)
    assert reply.status == status
    assert ("retry-after" in reply.headers()) == (status == 503)
