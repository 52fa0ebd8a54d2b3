"""The client side against scripted bytes: what a real engine sends only when something is wrong."""

import asyncio
import os
import resource
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import anyio
import pytest
from spark_llm import policy
from spark_llm.run import EngineRun
from spark_llm.upstream import (
    NobodyListensError,
    Response,
    UnreachableError,
    Upstream,
    UpstreamError,
)

pytestmark = pytest.mark.anyio

SIZED = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    """Production runs on uvloop, whose transports differ in detail."""
    return "asyncio", {"use_uvloop": request.param}


@contextmanager
def no_descriptors() -> Iterator[None]:
    """Within the block, this process can open nothing."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open(os.devnull, os.O_RDONLY)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


class Script:
    """A server that answers every request with the same bytes.

    Attributes:
        connections: accepted so far.
        requests: their bytes, newest last.
        lost: set when a client's connection ended.
    """

    def __init__(self, answer: bytes, *, close: bool = False) -> None:
        self.answer = answer
        self.close = close
        self.connections = 0
        self.requests: list[bytes] = []
        self.lost = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while data := await reader.read(65536):
                self.requests.append(data)
                writer.write(self.answer)
                if self.close:
                    break
        except ConnectionError:
            pass
        finally:
            self.lost.set()
            writer.close()


@asynccontextmanager
async def engine(folder: Path, script: Script) -> AsyncIterator[Upstream]:
    server = await asyncio.start_unix_server(script.serve, folder / "e.sock")
    upstream = Upstream(folder / "e.sock")
    try:
        yield upstream
    finally:
        await upstream.close()
        server.close()
        await asyncio.wait_for(script.lost.wait(), 30)


@pytest.mark.parametrize("answer", [SIZED, CHUNKED], ids=["sized", "chunked"])
async def test_connection_is_used_again(short_path: Path, answer: bytes) -> None:
    """Requests one after the other share a connection, whatever frames the body."""
    script = Script(answer)
    async with engine(short_path, script) as upstream:
        for _ in range(3):
            assert await upstream.get("/health", 30) == (200, b"ok")
    assert (script.connections, len(script.requests)) == (1, 3)


@pytest.mark.parametrize(
    "answer",
    [
        SIZED.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"),
        SIZED + SIZED,
        SIZED + b"rubbish",
    ],
    ids=["close", "two answers", "rubbish"],
)
async def test_connection_in_doubt_is_not_used_again(short_path: Path, answer: bytes) -> None:
    """What follows an answer never becomes the answer to the next request."""
    script = Script(answer)
    async with engine(short_path, script) as upstream:
        for _ in range(2):
            assert await upstream.get("/health", 30) == (200, b"ok")
    assert script.connections == 2


async def test_connection_that_the_engine_closed_is_replaced(short_path: Path) -> None:
    """A connection that ended while nobody used it costs no request."""
    script = Script(SIZED, close=True)
    async with engine(short_path, script) as upstream:
        assert await upstream.get("/health", 30) == (200, b"ok")
        with anyio.fail_after(30):
            while upstream._idle:
                await asyncio.sleep(0.01)
        assert await upstream.get("/health", 30) == (200, b"ok")
    assert script.connections == 2


async def test_old_connection_is_replaced(
    short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that the engine is about to close is not used again."""
    monkeypatch.setattr("spark_llm.upstream._IDLE_LIMIT_S", -1.0)
    script = Script(SIZED)
    async with engine(short_path, script) as upstream:
        for _ in range(2):
            assert await upstream.get("/health", 30) == (200, b"ok")
    assert script.connections == 2


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nok", "closed the connection"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n", "closed"),
        (b"HTTP/1.1 200 OK\r\ncont", "closed"),
        (b"", "closed"),
        (b"220 smtp ready\r\n", "not HTTP"),
    ],
    ids=["short body", "no last chunk", "half a head", "nothing", "another protocol"],
)
async def test_answer_that_breaks_is_an_error(
    short_path: Path, answer: bytes, message: str
) -> None:
    """An answer without its end is an error, never a short answer."""
    async with engine(short_path, Script(answer, close=True)) as upstream:
        with pytest.raises(UpstreamError, match=message):
            await upstream.get("/health", 30)


async def test_silence_is_a_timeout(short_path: Path) -> None:
    """An engine that accepts and says nothing is a timeout, and its connection is closed."""
    script = Script(b"")
    async with engine(short_path, script) as upstream:
        with pytest.raises(TimeoutError):
            await upstream.get("/health", 0.05)
        with anyio.fail_after(30):
            await script.lost.wait()


async def test_nobody_there_is_told(short_path: Path) -> None:
    """A socket that is missing, or that nobody listens on, is told from an engine that broke off."""
    upstream = Upstream(short_path / "e.sock")
    with pytest.raises(NobodyListensError):
        await upstream.get("/health", 30)
    (short_path / "e.sock").touch()
    with pytest.raises(NobodyListensError):
        await upstream.get("/health", 30)


async def test_own_want_of_descriptors_is_not_the_engines_fault(short_path: Path) -> None:
    """A connection that this process could not make says nothing about who listens, and the next one goes through."""
    async with engine(short_path, Script(SIZED)) as upstream:
        with no_descriptors(), pytest.raises(UnreachableError) as caught:
            await upstream.get("/health", 30)
        assert not isinstance(caught.value, NobodyListensError)
        assert await upstream.get("/health", 30) == (200, b"ok")


async def test_only_a_refusal_counts_against_the_engine(short_path: Path) -> None:
    """A scrape that lacks a descriptor of ours leaves open whether the engine lives; a refused one does not."""
    run = EngineRun.__new__(EngineRun)  # a scrape needs nothing else of a run
    run.upstream = Upstream(short_path / "e.sock")
    assert await run._scrape() is policy.Socket.REFUSED
    async with engine(short_path, Script(SIZED)) as run.upstream:
        with no_descriptors():
            assert await run._scrape() is policy.Socket.UNKNOWN
        assert await run._scrape() is policy.Socket.ACCEPTED


async def test_unread_answer_stops_the_engine_and_is_dropped(short_path: Path) -> None:
    """Of an answer that is not read only so much is held; leaving it closes the connection."""
    size = 64 * 2**20
    script = Script(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (size, bytes(size)))
    async with engine(short_path, script) as upstream:
        async with upstream.request("GET", b"/v1/models", [], b"") as response:
            await _until(lambda: response.unread > 0)
            seen = await _settled(response)
            assert 0 < seen < size / 8
            assert await response.read_some()
            await _until(lambda: response.unread > 0)
        with anyio.fail_after(30):
            await script.lost.wait()


async def test_who_waits_for_the_engine(short_path: Path) -> None:
    """A request that the engine leaves without a byte waits for it; one that has just come, or has gone, does not."""
    loop = asyncio.get_running_loop()
    async with engine(short_path, Script(b"")) as upstream:
        before = loop.time()
        asking = asyncio.create_task(upstream.get("/health", 30))
        await _until(lambda: upstream.waiting(loop.time()) == 1)
        assert upstream.waiting(before - 1) == 0  # uvloop's clock stands still for a millisecond
        asking.cancel()
        await asyncio.wait((asking,))
        assert upstream.waiting(loop.time()) == 0


async def test_slow_client_does_not_wait_for_the_engine(short_path: Path) -> None:
    """An answer that lies here unread is no request that the engine has to work on, however long it lies."""
    loop = asyncio.get_running_loop()
    script = Script(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nok")
    async with (
        engine(short_path, script) as upstream,
        upstream.request("GET", b"/v1/models", [], b"") as response,
    ):
        await _until(lambda: response.unread == len(b"ok"))
        assert upstream.waiting(loop.time()) == 0
        rest = asyncio.create_task(response.read())
        await _until(lambda: upstream.waiting(loop.time()) == 1)
        rest.cancel()


async def test_head_goes_as_given(short_path: Path) -> None:
    """Headers reach the engine as they are, with the body's true length."""
    script = Script(SIZED)
    async with engine(short_path, script) as upstream:
        headers = [(b"x-a", b"1"), (b"x-a", b"\xe4")]
        async with upstream.request("POST", b"/v1/x?q=1", headers, b"{}") as response:
            assert (response.status, await response.read()) == (200, b"ok")
    assert b"".join(script.requests) == (
        b"POST /v1/x?q=1 HTTP/1.1\r\nhost: engine\r\nx-a: 1\r\nx-a: \xe4\r\n"
        b"content-length: 2\r\n\r\n{}"
    )


async def _until(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(30):
        while not condition():
            await asyncio.sleep(0.01)


async def _settled(response: Response) -> int:
    before, turns = response.unread, 0
    while turns < 20:  # of the loop that engine and gateway share
        await asyncio.sleep(0.01)
        now = response.unread
        before, turns = now, turns + 1 if now == before else 0
    return before


async def test_sink_takes_what_comes_and_the_reader_gets_the_rest() -> None:
    """Pieces go to the sink as they come; from the first that it declines, all is the reader's, in order."""
    response = Response(lambda: None)
    taken: list[bytes] = []

    def sink(data: bytes) -> bool:
        if data == b"two":
            return False
        taken.append(data)
        return True

    def comes(data: bytes) -> None:
        response.parser.feed_data(b"%x\r\n%b\r\n" % (len(data), data) if data else b"0\r\n\r\n")
        response.wake()

    response.parser.feed_data(CHUNKED[: CHUNKED.index(b"2\r\n")])
    reading = asyncio.create_task(response.read_some(sink))
    await asyncio.sleep(0)
    comes(b"one")
    await asyncio.sleep(0)
    assert (taken, reading.done()) == ([b"one"], False)
    comes(b"two")
    comes(b"three")
    assert await reading == b"twothree"
    reading = asyncio.create_task(response.read_some(sink))
    await asyncio.sleep(0)
    comes(b"four")
    comes(b"")
    assert await reading == b""
    assert taken == [b"one", b"four"]
