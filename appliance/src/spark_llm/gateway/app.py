"""The gateway as one ASGI application."""

import contextlib
import json
import logging
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from spark_llm import keys
from spark_llm.controller import TICK_LIMIT_S, Controller
from spark_llm.errors import SparkLlmError
from spark_llm.gateway import access
from spark_llm.gateway.metrics import Metrics
from spark_llm.gateway.operator import Operator
from spark_llm.gateway.proxy import ROUTES, Proxy, Receive, Scope, Send
from spark_llm.gateway.wire import error_body
from spark_llm.reason import Reason
from spark_llm.reply import Reply, reply_of
from spark_llm.upstream import UpstreamError

_SCRAPE_TIMEOUT_S = 5.0

log = logging.getLogger("spark_llm.gateway")


class Gateway:
    """Looks at the key, then hands ``/v1`` requests to the proxy and all others to small handlers.

    Attributes:
        keys: accepted API keys; none means that everybody is let in. Replaced as a whole on reload.
    """

    def __init__(self, controller: Controller, accepted: tuple[keys.Key, ...]) -> None:
        settings = controller.settings.gateway
        self.keys = accepted
        self._controller = controller
        self._metrics = Metrics()
        self._proxy = Proxy(controller, self._metrics, settings)
        self._operator = Operator(controller, lambda: self.keys)
        self._small = Starlette(
            routes=self._routes(),
            exception_handlers={
                404: _not_found,
                Reply: _answer_reply,
                SparkLlmError: _answer_error,
            },
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        path = scope["path"]
        if path not in ROUTES and not path.startswith("/api/"):
            await self._small(scope, receive, send)
            return
        change = path not in ROUTES and scope["method"] not in {"GET", "HEAD"}
        try:
            scope["spark_llm.key"] = access.check(self.keys, scope, change=change)
        except Reply as reply:
            self._count_refusal(path, scope, reply)
            await _refusal(path, reply)(scope, receive, send)
            return
        if path == "/v1/models" and self._controller.others:
            await self._all_models(scope, receive, send)
        elif path in ROUTES:
            await self._proxy(scope, receive, send)
        else:
            await self._small(scope, receive, send)

    async def close(self) -> None:
        """End what runs besides requests."""
        await self._operator.close()

    def _count_refusal(self, path: str, scope: Scope, reply: Reply) -> None:
        """Somebody who tries keys should be seen."""
        known = path if path in ROUTES else "/api"
        self._metrics.requests.labels(known, str(reply.status), reply.reason).inc()
        peer = (scope.get("client") or ("?",))[0]
        log.warning(
            "%s %s from %s: %d, %s", scope["method"], path, peer, reply.status, reply.message
        )

    def _routes(self) -> list[Route]:
        return [
            Route("/livez", self._livez),
            Route("/startupz", self._startupz),
            Route("/readyz", self._readyz),
            Route("/health", self._readyz),
            Route("/v1/health/live", self._livez),
            Route("/v1/health/ready", self._readyz),
            Route("/metrics", self._metrics_text),
            *self._operator.routes(),
        ]

    async def _all_models(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The lists of all engines that are ready, as one."""
        listed: list[Any] = []
        for keeper in self._controller.keepers():
            with contextlib.suppress(Reply, UpstreamError, TimeoutError, ValueError, LookupError):
                _, body = await keeper.upstream().get("/v1/models", _SCRAPE_TIMEOUT_S)
                listed += json.loads(body)["data"]
        await JSONResponse({"object": "list", "data": listed})(scope, receive, send)

    async def _livez(self, _: Request) -> Response:
        age = self._controller.tick_age_s()
        alive = age < TICK_LIMIT_S
        body = {"live": alive, "tick_age_s": round(age, 3)}
        return JSONResponse(body, 200 if alive else 503)

    async def _startupz(self, _: Request) -> Response:
        if self._controller.board.was_ready:
            return JSONResponse({"started": True})
        now = self._controller.board.now
        body = {
            "started": False,
            "state": now.state,
            "phase": now.phase,
            "percent": now.percent,
            "eta_s": now.eta_s,
            "reason": now.reason,
            "message": now.message,
            "hint": now.hint,
        }
        return JSONResponse(body, 503, headers=self._retry_after())

    async def _readyz(self, request: Request) -> Response:
        checks = self._controller.primary.checks()
        now = self._controller.board.now
        ready = all(check.ok for check in checks)
        body: dict[str, Any] = {
            "ready": ready,
            "state": now.state,
            "reason": now.reason,
            "message": now.message,
            "hint": now.hint,
        }
        if "verbose" in request.query_params:
            body["checks"] = [
                {
                    "name": c.name,
                    "ok": c.ok,
                    "reason": Reason.OK if c.ok else c.reason,
                    "detail": c.detail,
                }
                for c in checks
            ]
        return JSONResponse(
            body, 200 if ready else 503, headers={} if ready else self._retry_after()
        )

    async def _metrics_text(self, _: Request) -> Response:
        own = self._metrics.text(
            self._controller.board.now,
            running=sum(keeper.queue.running for keeper in self._controller.keepers()),
            waiting=sum(keeper.queue.waiting for keeper in self._controller.keepers()),
        )
        return Response(own + await self._engine_metrics(), media_type="text/plain; version=0.0.4")

    async def _engine_metrics(self) -> bytes:
        """The engine's own, or nothing while it cannot be asked: a scrape must not fail with the engine."""
        try:
            status, body = await self._controller.primary.upstream().get(
                "/metrics", _SCRAPE_TIMEOUT_S
            )
        except (Reply, UpstreamError, TimeoutError):
            return b""
        return body if status == 200 else b""  # noqa: PLR2004  HTTP

    def _retry_after(self) -> dict[str, str]:
        return {"retry-after": str(self._controller.primary.retry_after_s())}


async def _answer_reply(request: Request, error: Exception) -> Response:
    assert isinstance(error, Reply)  # noqa: S101  registered for it
    return _refusal(request.url.path, error)


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, SparkLlmError)  # noqa: S101  registered for it
    return _refusal(request.url.path, reply_of(error))


def _refusal(path: str, reply: Reply) -> Response:
    body = error_body(path, reply.status, reply.reason, reply.message)
    return Response(body, reply.status, reply.headers(), media_type="application/json")


async def _not_found(request: Request, _: Exception) -> Response:
    path = request.url.path
    return _refusal(path, Reply(404, Reason.UNKNOWN_PATH, f"there is nothing at {path}"))
