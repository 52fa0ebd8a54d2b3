import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import aiohttp
import anyio
import pytest
from spark_llm import keys
from spark_llm.gateway.proxy import ROUTES

from tests.appliance.gateway.conftest import LIMITS, Running
from tests.stub_engine import DEMO_ANSWER, FLOOD_EVENTS

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"


@pytest.fixture
async def client(running: Running) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(running.url) as session:
        yield session


async def test_stream_is_passed_on_byte_for_byte(client: aiohttp.ClientSession) -> None:
    """A streamed answer reaches the client with the very bytes of the engine."""
    async with client.post(CHAT, json={"model": "pieces", "stream": True}) as answer:
        body = await answer.read()
    words = b"".join(
        b'data: {"choices":[{"delta":{"content":"w%d "}}]}\n\n' % index for index in range(3)
    )
    assert body == words + b"data: [DONE]\n\n"


async def test_first_event_is_not_held_back(
    running: Running, client: aiohttp.ClientSession
) -> None:
    """An event reaches the client while the engine still works on the next."""
    async with client.post(CHAT, json={"model": "held", "stream": True}) as answer:
        first = await answer.content.readuntil(b"\n\n")
        assert b"w0" in first
        assert not running.stub.proceed.is_set()
        running.stub.proceed.set()
        assert (await answer.read()).endswith(b"data: [DONE]\n\n")


async def test_whole_answer_is_passed_on(client: aiohttp.ClientSession) -> None:
    """An answer that is not streamed keeps its status and body."""
    async with client.post(CHAT, json={"model": "demo"}) as answer:
        assert answer.status == 200
        assert (await answer.json())["choices"][0]["message"]["content"] == DEMO_ANSWER


@pytest.mark.parametrize("stream", [False, True])
async def test_aborted_answer_is_an_error(client: aiohttp.ClientSession, stream: bool) -> None:
    """An answer with status 200 that the engine aborted is answered 503 with Retry-After."""
    model = "abort-first" if stream else "abort"
    async with client.post(CHAT, json={"model": model, "stream": stream}) as answer:
        assert answer.status == 503
        assert "Retry-After" in answer.headers
        assert (await answer.json())["error"]["code"] == "aborted"


@pytest.mark.parametrize(("model", "code"), [("abort-later", "aborted"), ("cut", "engine_exited")])
async def test_stream_that_breaks_ends_with_an_error_event(
    running: Running, client: aiohttp.ClientSession, model: str, code: str
) -> None:
    """A stream that breaks after its first events ends with an error event, never with [DONE]."""
    async with client.post(CHAT, json={"model": model, "stream": True}) as answer:
        assert b"w0" in await answer.content.readuntil(b"\n\n")
        running.stub.proceed.set()
        events = (await answer.read()).split(b"\n\n")
    assert json.loads(events[-2].removeprefix(b"data: "))["error"]["code"] == code
    assert b"[DONE]" not in b"".join(events)


async def test_disconnect_aborts_the_engines_request(
    running: Running, client: aiohttp.ClientSession
) -> None:
    """A client that leaves mid-stream makes the gateway close its connection to the engine."""
    async with client.post(CHAT, json={"model": "endless", "stream": True}) as answer:
        await answer.content.readuntil(b"\n\n")
        answer.close()
    with anyio.fail_after(30):
        await running.stub.aborted.wait()
        await running.queue.idle.wait()


async def test_disconnect_before_the_answer_frees_the_place(
    running: Running, client: aiohttp.ClientSession
) -> None:
    """A client that leaves before the first byte makes room for others."""
    request = asyncio.create_task(client.post(CHAT, json={"model": "held"}))
    with anyio.fail_after(30):
        while not running.stub.seen:
            await asyncio.sleep(0.01)
        request.cancel()
        await running.stub.aborted.wait()
        await running.queue.idle.wait()


async def test_disconnect_in_the_queue_frees_the_place(
    running: Running, client: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture
) -> None:
    """A client that leaves while it waits for a place makes room, and nothing is logged as an error."""
    held = [asyncio.create_task(client.post(CHAT, json={"model": "held"})) for _ in range(8)]
    with anyio.fail_after(30):
        while running.queue.running < 8:
            await asyncio.sleep(0.01)
        waits = asyncio.create_task(client.post(CHAT, json={"model": "held"}))
        while not running.queue.waiting:
            await asyncio.sleep(0.01)
        waits.cancel()
        while running.queue.waiting:
            await asyncio.sleep(0.01)
        running.stub.proceed.set()
        assert [(await answer).status for answer in held] == [200] * 8
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def test_cut_of_a_client_that_does_not_read_ends_when_it_leaves(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    """A cut that cannot be told to a slow client ends when the client leaves, and nothing is logged as an error."""
    caplog.set_level("INFO", "spark_llm.gateway")
    writer = await _client_that_does_not_read(running)
    running.queue.cut()
    with anyio.fail_after(30):
        await running.queue.idle.wait()
        writer.transport.abort()
        while not any("draining" in record.getMessage() for record in caplog.records):
            await asyncio.sleep(0.01)
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def test_slow_client_slows_the_engine(running: Running) -> None:
    """A client that does not read makes the engine wait instead of filling memory."""
    writer = await _client_that_does_not_read(running)
    assert 0 < running.stub.flooded < FLOOD_EVENTS / 2
    writer.transport.abort()


async def test_client_that_takes_nothing_gives_its_place_back(
    running: Running, client: aiohttp.ClientSession
) -> None:
    """A client that does not read for the whole send timeout is cut off, and the engine's request ends."""
    running.gateway._proxy._settings = LIMITS.model_copy(update={"send_timeout_s": 0.2})
    writer = await _client_that_does_not_read(running)
    with anyio.fail_after(30):
        await running.stub.aborted.wait()
        await running.queue.idle.wait()
        async with client.get("/metrics") as answer:
            assert 'reason="timeout",status="499"' in await answer.text()
    writer.close()


async def test_hop_by_hop_headers_stay_on_their_hop(
    running: Running, client: aiohttp.ClientSession
) -> None:
    """Hop-by-hop headers, those a Connection header names, and credentials are not passed on; others are."""
    headers = {
        "Connection": "X-Secret-Hop",
        "X-Secret-Hop": "1",
        "Authorization": "Bearer x",
        "X-Api-Key": "y",
        "Cookie": "a=b",
        "Anthropic-Version": "2023-06-01",
    }
    async with client.post(CHAT, json={"model": "demo"}, headers=headers) as answer:
        assert "X-Inner" not in answer.headers
    seen = {name.lower() for name, _ in running.stub.headers}
    assert "anthropic-version" in seen
    assert not seen & {"x-secret-hop", "authorization", "x-api-key", "cookie"}


async def test_request_id_goes_in_and_out(running: Running, client: aiohttp.ClientSession) -> None:
    """A given X-Request-Id reaches the engine and comes back; without one, the gateway makes it."""
    async with client.post(CHAT, json={"model": "demo"}, headers={"X-Request-Id": "abc"}) as answer:
        assert answer.headers["X-Request-Id"] == "abc"
    assert ("x-request-id", "abc") in [(n.lower(), v) for n, v in running.stub.headers]
    async with client.post(CHAT, json={"model": "demo"}) as answer:
        assert len(answer.headers["X-Request-Id"]) == 32


@pytest.mark.parametrize(
    "path",
    [
        "/invocations",
        "/tokenize",
        "/collective_rpc",
        "/sleep",
        "/v1/load_lora_adapter",
        "/docs",
        "/v1",
    ],
)
async def test_other_paths_never_reach_the_engine(
    running: Running, client: aiohttp.ClientSession, path: str
) -> None:
    """Every path that is not on the list is 404 and the engine does not hear of it."""
    for method in ("GET", "POST"):
        async with client.request(method, path, json={}) as answer:
            assert answer.status == 404
            assert (await answer.json())["error"]["code"] == "unknown_path"
    assert running.stub.seen == []


async def test_paths_with_tricks_never_reach_the_engine(running: Running) -> None:
    """Dots, double slashes and percent signs in a path lead nowhere."""
    for path in ("/v1/../invocations", "//invocations", "/v1/%2e%2e/tokenize", "/v1/models/"):
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        status = await reader.readline()
        writer.close()
        await writer.wait_closed()
        assert status.split()[1] in {b"404", b"307"}


async def test_wrong_method_is_refused(client: aiohttp.ClientSession) -> None:
    """A GET on a POST route is 405."""
    async with client.get(CHAT) as answer:
        assert answer.status == 405


@pytest.mark.parametrize("body", [b"{", b"", b"[1]", b"\xff", b"[" * 50_000])
@pytest.mark.parametrize(
    "path", sorted(path for path, method in ROUTES.items() if method == "POST")
)
async def test_malformed_body_is_a_400(
    client: aiohttp.ClientSession, path: str, body: bytes
) -> None:
    """A body that is no JSON object is 400, in the shape of the path's API, and costs the engine nothing."""
    async with client.post(path, data=body) as answer:
        assert answer.status == 400
        error = (await answer.json())["error"]
    assert error["type"] == "invalid_request_error"
    assert error["code"] == "bad_request"


async def test_unknown_model_is_the_engines_answer(client: aiohttp.ClientSession) -> None:
    """The engine's own 404 for an unknown model is passed on."""
    async with client.post(CHAT, json={"model": "missing"}) as answer:
        assert answer.status == 404
        assert (await answer.json())["error"]["message"] == "no such model"


@pytest.mark.parametrize("chunked", [False, True])
async def test_oversized_body_is_a_413(client: aiohttp.ClientSession, chunked: bool) -> None:
    """A body above the limit is 413, with or without a declared length."""
    body = b'{"x":"' + b"a" * LIMITS.max_body_bytes + b'"}'

    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(body), 10_000):
            yield body[at : at + 10_000]

    async with client.post(CHAT, data=pieces() if chunked else body) as answer:
        assert answer.status == 413
        assert (await answer.json())["error"]["code"] == "body_too_large"


async def test_bodies_share_a_bounded_memory(
    running: Running, client: aiohttp.ClientSession
) -> None:
    """Requests whose bodies together exceed the budget are told to come again; what has ended gives its share back."""
    bodies = running.gateway._proxy.bodies
    pad = "x" * (LIMITS.max_body_bytes // 2)
    held = [
        asyncio.create_task(client.post(CHAT, json={"model": "held", "pad": pad}))
        for _ in range(LIMITS.max_bodies_bytes // len(pad))
    ]
    with anyio.fail_after(30):
        while running.stub.running < len(held) - 1:
            await asyncio.sleep(0.01)
        async with client.post(CHAT, json={"model": "demo", "pad": pad}) as answer:
            assert answer.status == 503
            assert int(answer.headers["Retry-After"]) >= 1
            assert "max_bodies_bytes" in (await answer.json())["error"]["message"]
        running.stub.proceed.set()
        for task in held:
            (await task).close()
        async with client.post(CHAT, json={"model": "demo", "pad": pad}) as answer:
            assert answer.status == 200
    assert bodies.held == 0


async def test_not_ready_is_a_503_with_retry_after(
    running: Running, client: aiohttp.ClientSession
) -> None:
    """While nothing is ready, OpenAI and Anthropic clients get 503 in their own shape, with Retry-After."""
    await running.keeper.upstream().close()
    running.keeper.stub_upstream = None
    async with client.post(CHAT, json={"model": "demo"}) as answer:
        assert (answer.status, answer.headers["Retry-After"]) == (503, "7")
        assert (await answer.json())["error"]["type"] == "service_unavailable_error"
    async with client.post("/v1/messages", json={"model": "demo"}) as answer:
        assert (answer.status, answer.headers["Retry-After"]) == (503, "7")
        body = await answer.json()
    assert (body["type"], body["error"]["type"]) == ("error", "overloaded_error")


async def test_cut_ends_streams_with_an_error(
    running: Running, client: aiohttp.ClientSession
) -> None:
    """When the drain's time is up, a running stream ends with an error event."""
    async with client.post(CHAT, json={"model": "held", "stream": True}) as answer:
        await answer.content.readuntil(b"\n\n")
        running.queue.cut()
        assert b'"code": "draining"' in await answer.read()


async def test_keys_are_asked_for(
    running: Running, client: aiohttp.ClientSession, tmp_path: Path
) -> None:
    """With keys configured, only a known key gets in, in either header; probes stay open."""
    _, token = keys.add(tmp_path / "keys.json", "laptop", keys.INFERENCE)
    running.gateway.keys = keys.load(tmp_path / "keys.json")
    for headers, status in (
        ({}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Authorization": f"Bearer {token}"}, 200),
        ({"x-api-key": token}, 200),
    ):
        async with client.post(CHAT, json={"model": "demo"}, headers=headers) as answer:
            assert answer.status == status
        async with client.get("/api/v1/status", headers=headers) as answer:
            assert answer.status == status
        async with client.get("/readyz", headers=headers) as answer:
            assert answer.status != 401
    async with client.post("/v1/messages", json={}, headers={}) as answer:
        assert (await answer.json())["error"]["type"] == "authentication_error"


async def test_engine_that_dies_before_answering_is_a_503(
    running: Running, client: aiohttp.ClientSession
) -> None:
    """An engine socket that nobody listens on is 503 with Retry-After."""
    running.keeper.upstream().socket.unlink()
    async with client.post(CHAT, json={"model": "demo"}) as answer:
        assert answer.status == 503
        assert (await answer.json())["error"]["code"] == "engine_unreachable"


async def _client_that_does_not_read(running: Running) -> asyncio.StreamWriter:
    """A request for more than all buffers hold, once the engine has stopped writing."""
    reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
    body = b'{"model":"flood","stream":true}'
    writer.write(
        b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s"
        % (CHAT.encode(), len(body), body)
    )
    await reader.readuntil(b"pad")
    await _still(lambda: running.stub.flooded)
    return writer


async def _still(count: Callable[[], int]) -> None:
    """Return once ``count`` has not changed in 50 turns of the loop that client, gateway and engine share.

    Turns, not seconds: whoever of them can go on does so in a turn, however long that waited for a core.
    """
    before, turns = count(), 0
    while turns < 50:
        await asyncio.sleep(0.01)
        now = count()
        before, turns = now, turns + 1 if now == before else 0


async def test_forwarded_requests_count_as_use(
    running: Running, client: aiohttp.ClientSession
) -> None:
    """A request that is forwarded puts off unloading its engine; a list of all models does not."""
    running.keeper.used_at = 0.0
    running.gateway._controller.others["other"] = running.keeper
    async with client.get("/v1/models") as answer:
        assert len((await answer.json())["data"]) == 2
    assert running.keeper.used_at == 0.0
    async with client.post(CHAT, json={"model": "demo"}) as answer:
        assert answer.status == 200
    assert running.keeper.used_at > 0.0
