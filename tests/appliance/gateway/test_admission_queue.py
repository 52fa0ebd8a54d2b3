import asyncio
from pathlib import Path

import aiohttp
import anyio
import pytest
from spark_llm.admission import Limits
from spark_llm.admission_queue import AdmissionQueue
from spark_llm.reason import Reason
from spark_llm.reply import Reply

from tests.appliance.gateway.conftest import running_gateway

pytestmark = pytest.mark.anyio


async def test_full_queue_is_a_429(tmp_path: Path) -> None:
    """Past the places and the queue, a request is 429 with Retry-After; those that wait are answered."""
    async with (
        running_gateway(tmp_path, Limits(max_running=1, max_queue=1)) as running,
        aiohttp.ClientSession(running.url) as client,
    ):
        held = [
            asyncio.create_task(client.post("/v1/chat/completions", json={"model": "held"}))
            for _ in range(2)
        ]
        with anyio.fail_after(30):
            while running.queue.running + running.queue.waiting < 2:
                await asyncio.sleep(0.01)
        async with client.post("/v1/chat/completions", json={"model": "demo"}) as answer:
            assert answer.status == 429
            assert int(answer.headers["Retry-After"]) >= 1
            assert (await answer.json())["error"]["code"] == "queue_full"
        running.stub.proceed.set()
        for task in held:
            async with await task as answer:
                assert answer.status == 200


async def test_lost_wait_is_a_429() -> None:
    """In a full queue, the newest wait of a greedy key ends with 429 as soon as another key comes."""
    queue = AdmissionQueue(Limits(max_running=1, max_queue=2))

    async def ask(key: str) -> str:
        async with queue.place(key):
            return "answered"

    with anyio.fail_after(5):
        async with queue.place("greedy"):
            first, second = (asyncio.create_task(ask("greedy")) for _ in range(2))
            while queue.waiting < 2:
                await asyncio.sleep(0)
            modest = asyncio.create_task(ask("modest"))
            with pytest.raises(Reply, match="full") as lost:
                await second
            assert (lost.value.status, lost.value.reason) == (429, Reason.QUEUE_FULL)
        assert (await first, await modest) == ("answered", "answered")


async def test_what_takes_no_sequence_does_not_wait(tmp_path: Path) -> None:
    """The list of models is answered while all places are taken and the queue is full."""
    async with (
        running_gateway(tmp_path, Limits(max_running=1, max_queue=0)) as running,
        aiohttp.ClientSession(running.url) as client,
    ):
        held = asyncio.create_task(client.post("/v1/chat/completions", json={"model": "held"}))
        with anyio.fail_after(5):
            while not running.queue.running:
                await asyncio.sleep(0.01)
            async with client.get("/v1/models") as answer:
                assert answer.status == 200
        running.stub.proceed.set()
        (await held).close()


async def test_wait_ends_at_the_clients_deadline(tmp_path: Path) -> None:
    """A client that says how long it waits is answered 503 when that time is up."""
    async with (
        running_gateway(tmp_path, Limits(max_running=1, max_queue=4)) as running,
        aiohttp.ClientSession(running.url) as client,
    ):
        held = asyncio.create_task(client.post("/v1/chat/completions", json={"model": "held"}))
        with anyio.fail_after(30):
            while not running.queue.running:
                await asyncio.sleep(0.01)
            headers = {"x-stainless-timeout": "0.2"}
            async with client.post(
                "/v1/chat/completions", json={"model": "demo"}, headers=headers
            ) as answer:
                assert answer.status == 503
                assert (await answer.json())["error"]["code"] == "deadline"
        running.stub.proceed.set()
        (await held).close()


async def test_clients_that_leave_together_give_all_places_back(tmp_path: Path) -> None:
    """When a program with running and waiting requests is killed, every place and every wait ends, and others go on."""
    async with running_gateway(tmp_path, Limits(max_running=2, max_queue=8)) as running:
        body = b'{"model": "held"}'
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
        writers = []
        with anyio.fail_after(10):
            for _ in range(8):
                _, writer = await asyncio.open_connection("127.0.0.1", running.port)
                writer.write(head % len(body) + body)
                writers.append(writer)
            while (running.queue.running, running.queue.waiting) != (2, 6):
                await asyncio.sleep(0.01)
            for writer in writers:
                writer.transport.abort()
            await running.queue.idle.wait()
            while running.queue.waiting:
                await asyncio.sleep(0.01)
            assert running.queue.running == 0
            async with (
                aiohttp.ClientSession(running.url) as client,
                client.post("/v1/chat/completions", json={"model": "demo"}) as answer,
            ):
                assert answer.status == 200
