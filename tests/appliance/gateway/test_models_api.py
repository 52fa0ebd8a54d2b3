"""The API's jobs: started, followed, cancelled and refused over real HTTP routes with real fetching processes."""

import json
from collections.abc import AsyncIterator
from dataclasses import replace

import anyio
import httpx2
import pytest
from spark_llm.errors import SparkLlmError
from spark_llm.gateway.app import _answer_error, _answer_reply
from spark_llm.gateway.models_api import routes
from spark_llm.reply import Reply
from spark_llm.store.jobs import Jobs
from starlette.applications import Starlette

from tests.hub.pulls import FILES, MODEL, Puller

pytestmark = pytest.mark.anyio


@pytest.fixture
async def jobs(pull: Puller) -> AsyncIterator[Jobs]:
    jobs = Jobs(
        pull.store, lambda model, revision: replace(pull.request, model=model, revision=revision)
    )
    yield jobs
    await jobs.close()


@pytest.fixture
async def client(jobs: Jobs) -> AsyncIterator[httpx2.AsyncClient]:
    app = Starlette(
        routes=routes(jobs, body_timeout_s=10),
        exception_handlers={Reply: _answer_reply, SparkLlmError: _answer_error},
    )
    transport = httpx2.ASGITransport(app=app)
    async with httpx2.AsyncClient(
        transport=transport, base_url="http://local", timeout=30
    ) as client:
        yield client


async def events(client: httpx2.AsyncClient, job: str, after: int = 0) -> list[dict[str, object]]:
    """All events of a job until it ends."""
    answer = await client.get(f"/api/v1/jobs/{job}/events", headers={"Last-Event-ID": str(after)})
    assert answer.headers["content-type"].startswith("text/event-stream")
    blocks = [
        block.split("\n")
        for block in answer.text.strip().split("\n\n")
        if not block.startswith(":")
    ]
    return [json.loads(lines[2].removeprefix("data: ")) for lines in blocks if len(lines) == 3]


async def test_a_fetch_is_a_job_with_events(pull: Puller, client: httpx2.AsyncClient) -> None:
    """POST answers at once; the events end with the result, and the model is listed."""
    commit = pull.hub.add(MODEL, FILES)
    started = await client.post(f"/api/v1/models/{MODEL}/fetch")
    assert started.status_code == 202
    job = started.json()
    assert started.headers["location"] == f"/api/v1/jobs/{job['id']}"
    seen = await events(client, job["id"])
    assert seen[-1]["event"] == "result"
    assert seen[-1]["commit"] == commit
    done = (await client.get(f"/api/v1/jobs/{job['id']}")).json()
    assert (done["state"], done["outcome"]["files"]) == ("succeeded", 3)
    assert await events(client, job["id"], after=len(seen) - 1) == seen[-1:]
    listed = (await client.get("/api/v1/models")).json()["models"]
    assert [(model["model"], model["state"]) for model in listed] == [(MODEL, "ready")]


async def test_the_same_fetch_twice_is_one_job(pull: Puller, client: httpx2.AsyncClient) -> None:
    """A second click on the button follows the first."""
    pull.hub.add(MODEL, FILES)
    pull.hub.fault("trickle")
    first = (await client.post(f"/api/v1/models/{MODEL}/fetch")).json()
    second = (await client.post(f"/api/v1/models/{MODEL}/fetch")).json()
    assert first["id"] == second["id"]
    await events(client, first["id"])
    assert len(pull.hub.downloads("model.safetensors")) == 1


async def test_a_failure_is_the_last_event(client: httpx2.AsyncClient) -> None:
    """A model that is not there ends its job with reason, sentence and hint."""
    job = (await client.post("/api/v1/models/org/nothing/fetch")).json()
    last = (await events(client, job["id"]))[-1]
    assert (last["event"], last["reason"]) == ("failure", "not_found")
    assert (await client.get(f"/api/v1/jobs/{job['id']}")).json()["state"] == "failed"


async def test_a_cancelled_job_stops_its_process(pull: Puller, client: httpx2.AsyncClient) -> None:
    """DELETE ends the transfer; the lock is free and the next pull goes on."""
    pull.hub.add(MODEL, FILES)
    pull.hub.fault("stall", after=1_500_000)
    job = (await client.post(f"/api/v1/models/{MODEL}/fetch")).json()
    await anyio.to_thread.run_sync(pull.hub.wait_for, "model.safetensors")
    cancelled = await client.delete(f"/api/v1/jobs/{job['id']}")
    assert cancelled.json()["state"] == "cancelled"
    pull.hub.released.set()
    assert (await anyio.to_thread.run_sync(pull)).result.files == 3


async def test_a_verification_is_a_job(pull: Puller, client: httpx2.AsyncClient) -> None:
    """Verify reads every byte and says which file is damaged."""
    pull.hub.add(MODEL, FILES)
    await anyio.to_thread.run_sync(pull)
    job = (await client.post(f"/api/v1/models/{MODEL}/verify", json={"full": True})).json()
    assert (await events(client, job["id"]))[-1]["event"] == "result"
    weights = pull.store.locate(MODEL)
    assert weights is not None
    (weights / "config.json").write_bytes(b"{}")
    job = (await client.post(f"/api/v1/models/{MODEL}/verify")).json()
    last = (await events(client, job["id"]))[-1]
    assert last["reason"] == "model_corrupt"
    assert "config.json" in str(last["message"])


async def test_a_model_is_removed_unless_it_is_served(
    pull: Puller, client: httpx2.AsyncClient
) -> None:
    """DELETE frees the space, or answers 409 with who uses it."""
    pull.hub.add(MODEL, FILES)
    await anyio.to_thread.run_sync(pull)
    with pull.store.reading(MODEL, "serving"):
        busy = await client.delete(f"/api/v1/models/{MODEL}")
        assert (busy.status_code, busy.json()["error"]["code"]) == (409, "model_busy")
    assert (await client.delete(f"/api/v1/models/{MODEL}")).json()["freed_bytes"] > 0
    assert (await client.delete(f"/api/v1/models/{MODEL}")).status_code == 404


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/api/v1/models/..%2F..%2Fetc/fetch", b"", 404),
        ("POST", "/api/v1/models/a/b/c/fetch", b"", 404),
        ("POST", "/api/v1/models/org/name/fetch", b"{", 400),
        ("POST", "/api/v1/models/org/name/fetch", b"[]", 400),
        ("POST", "/api/v1/models/org/name/fetch", b'{"adopt": "/etc"}', 400),
        ("POST", "/api/v1/models/org/name/fetch", b'{"endpoint": "http://evil"}', 400),
        ("POST", "/api/v1/models/org/name/fetch", b'{"revision": 1}', 400),
        ("POST", "/api/v1/models/org/name/fetch", b'{"revision": "../x"}', 404),
        ("POST", "/api/v1/models/org/name/fetch", b"{" + b" " * 5000 + b"}", 413),
        ("GET", "/api/v1/jobs/none", b"", 404),
        ("GET", "/api/v1/jobs/none/events", b"", 404),
        ("DELETE", "/api/v1/jobs/none", b"", 404),
        ("DELETE", "/api/v1/models/org/name?revision=v9", b"", 404),
    ],
)
async def test_bad_requests_are_refused(  # noqa: PLR0913, PLR0917  one case, all its parts
    pull: Puller, client: httpx2.AsyncClient, method: str, path: str, body: bytes, status: int
) -> None:
    """No path, address or option of the fetching process comes in through the network."""
    answer = await client.request(method, path, content=body)
    assert answer.status_code == status
    assert answer.json()["error"]["code"]
    assert pull.hub.seen == []
    assert pull.store.models() == []
