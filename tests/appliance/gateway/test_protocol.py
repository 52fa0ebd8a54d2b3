import asyncio

import anyio
import pytest

from tests.appliance.gateway.conftest import LIMITS, Running

pytestmark = pytest.mark.anyio


async def _talk(port: int, *parts: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
        return await reader.read()
    except ConnectionError:
        return b"reset"
    finally:
        writer.close()


async def test_huge_header_is_a_431(running: Running) -> None:
    """A megabyte of header is refused with 431 and the connection is closed."""
    head = b"GET /livez HTTP/1.1\r\nHost: x\r\nX-Big: "
    with anyio.fail_after(10):
        answer = await _talk(running.port, head, *[b"a" * 16_384] * 64)
    assert answer == b"reset" or answer.startswith(b"HTTP/1.1 431 ")


async def test_many_headers_are_a_431(running: Running) -> None:
    """Many small headers count like a large one."""
    lines = b"".join(b"X-%d: y\r\n" % index for index in range(4000))
    with anyio.fail_after(10):
        answer = await _talk(running.port, b"GET /livez HTTP/1.1\r\nHost: x\r\n", lines, b"\r\n")
    assert answer == b"reset" or answer.startswith(b"HTTP/1.1 431 ")


@pytest.mark.parametrize("start", [b"", b"GET /liv", b"GET /livez HTTP/1.1\r\nHost: x\r\n"])
async def test_slow_head_is_a_408(running: Running, start: bytes) -> None:
    """A client that does not finish its head within the limit is answered 408 and cut off."""
    with anyio.fail_after(LIMITS.header_timeout_s + 10):
        answer = await _talk(running.port, start)
    assert answer.startswith(b"HTTP/1.1 408 ")


async def test_slow_body_is_a_408(running: Running) -> None:
    """A client that does not finish its body within the limit is answered 408."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"
    with anyio.fail_after(LIMITS.header_timeout_s + 10):
        answer = await _talk(running.port, head)
    assert answer.startswith(b"HTTP/1.1 408 ")


async def test_connection_is_kept_for_a_second_request(running: Running) -> None:
    """The bounds apply to each request of a connection anew."""
    one = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
    last = b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    with anyio.fail_after(10):
        answer = await _talk(running.port, one, one, last)
    assert answer.count(b"HTTP/1.1 200") == 3


async def test_garbage_is_a_400(running: Running) -> None:
    """Bytes that are no HTTP are answered 400."""
    with anyio.fail_after(10):
        answer = await _talk(running.port, b"\x16\x03\x01 not http\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("cut", [0, 70, 90])
async def test_wish_for_another_protocol_is_ignored(running: Running, cut: int) -> None:
    """A POST that offers h2c, as Java's HttpClient sends it, is answered like any other, body and all."""
    body = b'{"model": "demo"}'
    request = (
        b"POST /v1/chat/completions HTTP/1.1\r\nConnection: Upgrade, HTTP2-Settings, close\r\n"
        b"Upgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\n"
        b"Host: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    )
    with anyio.fail_after(10):
        answer = await _talk(running.port, request[:cut], request[cut:])
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert running.stub.seen == [{"model": "demo"}]


async def test_blank_line_does_not_keep_a_connection(running: Running) -> None:
    """A client that sends a blank line after its answer, and nothing more, is cut off like any that is slow."""
    with anyio.fail_after(LIMITS.header_timeout_s + 10):
        answer = await _talk(running.port, b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n", b"\r\n")
    assert answer.startswith(b"HTTP/1.1 200 ")


async def test_pipelined_body_is_no_head(running: Running) -> None:
    """The bound on heads does not count the body of a request that was sent before the last one was answered."""
    body = b'{"model": "demo", "pad": "%b"}' % (b"x" * 2 * LIMITS.max_header_bytes)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n%bContent-Length: %d\r\n\r\n"
    held = b'{"model": "held"}'
    reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
    with anyio.fail_after(10):
        writer.write(head % (b"", len(held)) + held)
        while not running.stub.running:
            await asyncio.sleep(0.01)
        request = head % (b"Connection: close\r\n", len(body)) + body
        writer.write(request[:1000])
        await asyncio.sleep(0)
        running.stub.proceed.set()
        await reader.readuntil(b"\r\n\r\n")
        writer.write(request[1000:])
        answer = await reader.read()
    writer.close()
    assert b"431" not in answer
    assert answer.count(b"HTTP/1.1 200 ") == 1
