"""The operator's API below ``/api/v1``: what is served, what could be, and how to change it."""

import json
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from typing import Any

from pydantic import BaseModel, ConfigDict
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from spark_llm import catalogue, fit, keys
from spark_llm.controller import Controller
from spark_llm.gateway import models_api
from spark_llm.gateway.body import read_json
from spark_llm.prepare import fetch_request
from spark_llm.profile import load_profile
from spark_llm.run import EngineFailedError
from spark_llm.status import State
from spark_llm.store import Store
from spark_llm.store.jobs import Jobs
from spark_llm.switches import adjust


class SwitchRequest(BaseModel):
    """Attributes: profile: name of the profile to serve; dry_run: only say what would be done."""

    model_config = ConfigDict(extra="forbid")

    profile: str
    dry_run: bool = False


class FitRequest(BaseModel):
    """Attributes: profile: its name; context: in tokens; sequences: whole ones at once; memory: e.g. ``64G``."""

    model_config = ConfigDict(extra="forbid")

    profile: str
    context: int | None = None
    sequences: int | None = None
    memory: str | None = None


class Operator:
    """Handlers; keys and scopes are looked at before they are reached.

    Args:
        controller: what is asked and told.
        accepted: gives the API keys that count now, wherever they come from.
    """

    def __init__(
        self, controller: Controller, accepted: Callable[[], tuple[keys.Key, ...]]
    ) -> None:
        self._controller = controller
        self._accepted = accepted
        self._body_timeout_s = controller.settings.gateway.header_timeout_s
        store = Store(controller.folders.models)
        self._jobs = Jobs(
            store,
            lambda model, revision: fetch_request(
                controller.settings, controller.folders.models, model, revision
            ),
        )

    async def close(self) -> None:
        """End all jobs."""
        await self._jobs.close()

    def routes(self) -> list[Route]:
        """All routes below ``/api/v1``."""
        return [
            Route("/api/v1/status", self._status),
            Route("/api/v1/events", self._events),
            Route("/api/v1/profiles", self._profiles),
            Route("/api/v1/fit", self._fit, methods=["POST"]),
            Route("/api/v1/switch", self._last_switch, methods=["GET"]),
            Route("/api/v1/switch", self._switch, methods=["POST"]),
            Route("/api/v1/canary", self._canary, methods=["POST"]),
            Route("/api/v1/keys", self._keys),
            *models_api.routes(self._jobs, self._body_timeout_s),
        ]

    async def _status(self, _: Request) -> Response:
        status = self._controller.board.now.as_dict()
        others = [keeper.board.brief() for keeper in self._controller.others.values()]
        return JSONResponse({**status, "others": others})

    async def _events(self, request: Request) -> Response:
        last = request.headers.get("last-event-id", "0")
        after = int(last) if last.isascii() and last.isdigit() else 0
        return StreamingResponse(self._event_stream(after), media_type="text/event-stream")

    async def _event_stream(self, after: int) -> AsyncIterator[str]:
        bus = self._controller.board.bus
        async for event in bus.follow(after):
            data = json.dumps({"at": event.at, **event.data})
            yield f"id: {event.id}\nevent: {event.kind}\ndata: {data}\n\n"
            if event.data.get("state") == State.STOPPED and self._controller.stopping:
                return

    async def _profiles(self, _: Request) -> Response:
        found = await run_in_threadpool(catalogue.read, self._controller.folders.profiles)
        listed = [item.model_dump(mode="json") for item in found.profiles]
        broken = {name: error.message for name, error in found.faults.items()}
        return JSONResponse({"profiles": listed, "broken": broken})

    async def _fit(self, request: Request) -> Response:
        asked = await read_json(request, FitRequest, self._body_timeout_s)
        settings, folders = self._controller.settings, self._controller.folders

        def account() -> dict[str, Any]:
            profile = adjust(load_profile(asked.profile, folders.profiles), context=asked.context)
            model = fit.find_model(profile, settings, folders.models, os.environ, offline=True)
            machine = fit.machine(settings, asked.memory)
            planned, ledger = fit.plan(
                profile,
                model,
                machine,
                sequences=asked.sequences,
                widen=asked.context is not None,
                recall=fit.measurements(settings, folders, imagined=asked.memory is not None),
            )
            return fit.as_json(planned, ledger)

        return JSONResponse(await run_in_threadpool(account))

    async def _last_switch(self, _: Request) -> Response:
        last = self._controller.last_switch
        return JSONResponse({"switch": None if last is None else asdict(last)})

    async def _switch(self, request: Request) -> Response:
        asked = await read_json(request, SwitchRequest, self._body_timeout_s)
        if asked.dry_run:
            return JSONResponse({"steps": await self._controller.plan_switch(asked.profile)})
        return JSONResponse({"switch": asdict(await self._controller.switch(asked.profile))}, 202)

    async def _canary(self, _: Request) -> Response:
        try:
            answer = await self._controller.primary.ask_canary()
        except EngineFailedError as error:
            body = {"passed": False, "reason": error.reason, "message": error.message}
            return JSONResponse(body, 503)
        return JSONResponse({"passed": True, "answer": answer})

    async def _keys(self, _: Request) -> Response:
        return JSONResponse({"keys": [key.public() for key in self._accepted()]})
