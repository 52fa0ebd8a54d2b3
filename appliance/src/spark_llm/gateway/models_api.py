"""Routes of ``/api/v1/models`` and ``/api/v1/jobs``; who may call them is decided before they are reached."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import asdict

from pydantic import BaseModel, ConfigDict
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from spark_llm.gateway.body import read_json
from spark_llm.store.jobs import Job, Jobs


class FetchRequest(BaseModel):
    """Attributes: revision: branch, tag or commit; allow_pickle: accept weights whose loading runs code."""

    model_config = ConfigDict(extra="forbid")

    revision: str = ""
    allow_pickle: bool = False


class VerifyRequest(BaseModel):
    """Attributes: revision: branch, tag or commit; full: read every byte, not only files that changed."""

    model_config = ConfigDict(extra="forbid")

    revision: str = ""
    full: bool = True


def routes(jobs: Jobs, body_timeout_s: float) -> list[Route]:
    """The routes.

    Args:
        jobs: what they start, show and stop.
        body_timeout_s: time a client has to send a body, in seconds.
    """
    api = _Api(jobs, body_timeout_s)
    return [
        Route("/api/v1/models", api.models),
        Route("/api/v1/models/{model:path}/fetch", api.fetch, methods=["POST"]),
        Route("/api/v1/models/{model:path}/verify", api.verify, methods=["POST"]),
        Route("/api/v1/models/{model:path}", api.remove, methods=["DELETE"]),
        Route("/api/v1/jobs", api.jobs),
        Route("/api/v1/jobs/{id}", api.job),
        Route("/api/v1/jobs/{id}", api.cancel, methods=["DELETE"]),
        Route("/api/v1/jobs/{id}/events", api.events),
    ]


class _Api:
    def __init__(self, jobs: Jobs, body_timeout_s: float) -> None:
        self._jobs = jobs
        self._body_timeout_s = body_timeout_s

    async def models(self, _: Request) -> Response:
        stored = await asyncio.to_thread(self._jobs.store.models)
        return JSONResponse(
            {"models": [{**asdict(model), "path": str(model.path)} for model in stored]}
        )

    async def fetch(self, request: Request) -> Response:
        asked = await read_json(request, FetchRequest, self._body_timeout_s)
        return self._started("fetch", request, asked)

    async def verify(self, request: Request) -> Response:
        asked = await read_json(request, VerifyRequest, self._body_timeout_s)
        return self._started("verify", request, asked)

    def _started(
        self, kind: str, request: Request, asked: FetchRequest | VerifyRequest
    ) -> Response:
        job = self._jobs.start(kind, request.path_params["model"], **asked.model_dump())
        return JSONResponse(job.to_json(), 202, headers={"Location": f"/api/v1/jobs/{job.id}"})

    async def remove(self, request: Request) -> Response:
        model, revision = request.path_params["model"], request.query_params.get("revision", "")
        freed = await asyncio.to_thread(self._jobs.store.remove, model, revision)
        return JSONResponse({"model": model, "revision": revision, "freed_bytes": freed})

    async def jobs(self, _: Request) -> Response:
        return JSONResponse({"jobs": [job.to_json() for job in self._jobs.all()]})

    async def job(self, request: Request) -> Response:
        return JSONResponse(self._job(request).to_json())

    async def cancel(self, request: Request) -> Response:
        job = self._job(request)
        await self._jobs.cancel(job)
        return JSONResponse(job.to_json())

    async def events(self, request: Request) -> Response:
        job = self._job(request)
        last = request.headers.get("last-event-id", "0")
        after = int(last) if last.isascii() and last.isdigit() else 0
        return StreamingResponse(
            _stream(job, after),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store"},
        )

    def _job(self, request: Request) -> Job:
        return self._jobs.get(request.path_params["id"])


async def _stream(job: Job, after: int) -> AsyncIterator[str]:
    async for item in job.follow(after):
        if item is None:
            yield ": still here\n\n"
        else:
            number, value = item
            yield f"id: {number}\nevent: {value['event']}\ndata: {json.dumps(value)}\n\n"
