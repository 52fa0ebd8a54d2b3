"""A stand-in for vLLM that shows faults on demand. Never the only proof: tests/e2e has the real engine.

As a program it takes the place of the engine's interpreter (``stub_engine.py -m vllm... serve MODEL --uds PATH``) and
misbehaves as ``STUB_FAULT`` says; SIGUSR1 releases its answers to ``held``. As a module it is the same HTTP side for
tests of the gateway.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from aiohttp import web

FLOOD_EVENTS = 2000
LOAD_LINES = (
    "(APIServer pid=1) INFO non-default args: {}",
    "(EngineCore pid=2) INFO Initializing a V1 LLM engine (v0.32.0)",
    "(Worker pid=3) INFO Starting to load model /x...",
    "Loading safetensors checkpoint shards:  50% Completed | 1/2",
    "(Worker pid=3) INFO Loading weights took 0.01 seconds",
    "(EngineCore pid=2) INFO CPU KV cache size: 1,000 tokens",
    "(APIServer pid=1) INFO Starting vLLM server on unix:/x",
)
DEMO_ANSWER = " own it two so been an we with"
"""To the canary of the profile ``demo``."""
NO_CACHE = (
    "(EngineCore pid=2) ERROR 11-21 12:02:47 [core.py:1510] ValueError: 0.5 GiB KV cache is needed, "
    "which is larger than the available KV cache memory (0.2 GiB)."
)


class Stub:
    """The HTTP side. A request's ``model`` chooses what happens to it.

    Attributes:
        running: requests being answered.
        seen: bodies of all requests, newest last.
        headers: headers of the last request.
        aborted: set when a client's connection was closed before its answer ended.
        proceed: answers to ``held`` wait for it, streams after their first event.
        canary: how it answers now, where the fault is ``canary:FILE``: what the file says, ``wrong`` or ``error``.
        flooded: events of 60 kB that ``flood`` has written so far, of ``FLOOD_EVENTS``.
        iterations: of the fake scheduler; does not move while ``frozen``, once a second while ``crawling``.
        started: when it began, on the monotonic clock.
    """

    def __init__(self, fault: str = "") -> None:
        self.fault = fault
        self.canary = ""
        self.running = 0
        self.seen: list[dict[str, object]] = []
        self.headers: list[tuple[str, str]] = []
        self.aborted = asyncio.Event()
        self.proceed = asyncio.Event()
        self.flooded = 0
        self.iterations = 0
        self.started = time.monotonic()
        self.app = web.Application(client_max_size=2**30)
        self.app.router.add_get("/health", self._health)
        self.app.router.add_get("/metrics", self._metrics)
        self.app.router.add_get("/v1/models", self._models)
        for path in ("chat/completions", "completions", "messages", "responses", "embeddings"):
            self.app.router.add_post(f"/v1/{path}", self._answer)
        self.app.router.add_route("*", "/{rest:.*}", self._anything)

    async def start(self, socket: Path) -> web.AppRunner:
        runner = web.AppRunner(self.app, handler_cancellation=True)
        await runner.setup()
        await web.UnixSite(runner, str(socket)).start()
        return runner

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _anything(self, request: web.Request) -> web.Response:
        return web.json_response({"leaked": request.path})

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "demo", "object": "model"}]})

    async def _metrics(self, _: web.Request) -> web.Response:
        if self.fault == "crawling":
            self.iterations = int(time.monotonic() - self.started)
        elif self.fault not in {"frozen", "frozen-idle"}:
            self.iterations += 1
        running = max(self.running, 1 if self.fault in {"frozen", "crawling"} else 0)
        if self.fault == "frozen-idle":
            running = 0
            print("scraped", flush=True)
        return web.Response(
            text=f'vllm:num_requests_running{{engine="0"}} {running}.0\n'
            f'vllm:iteration_tokens_total_count{{engine="0"}} {self.iterations}.0\n'
        )

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read())
        self.seen.append(body)
        self.headers = list(request.headers.items())
        self.running += 1
        if self.fault.startswith("canary:"):
            self.canary = _content(self.fault.partition(":")[2])
        if self.fault.endswith("-in-canary"):
            await self._fail_in_canary()
        try:
            if body.get("logprobs"):  # as only the canary asks
                return self._canary_stream()
            return await self._by_model(request, str(body.get("model")), bool(body.get("stream")))
        except asyncio.CancelledError:
            self.aborted.set()
            raise
        finally:
            self.running -= 1

    async def _fail_in_canary(self) -> None:
        """As vLLM does when its core dies: a broken connection, or 500 and the end soon after; or not a word."""
        if self.fault == "mute-in-canary":
            await asyncio.Event().wait()
        print("(EngineCore pid=2) ERROR 1 2 [x.py:1] torch.OutOfMemoryError: 2 GiB", flush=True)
        if self.fault == "reset-in-canary":
            os._exit(1)
        asyncio.get_running_loop().call_later(0.3, os._exit, 1)
        raise web.HTTPInternalServerError

    async def _by_model(self, request: web.Request, model: str, stream: bool) -> web.StreamResponse:
        if model == "missing":
            return web.json_response({"error": {"message": "no such model"}}, status=404)
        if model == "die":
            os._exit(0)
        if not stream:
            if model == "held":
                await self.proceed.wait()
            return web.json_response(
                self._message(model),
                headers={"Connection": "X-Inner", "X-Inner": "hop"},
                dumps=_dump,
            )
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        if model == "flood":
            for _ in range(FLOOD_EVENTS):
                await response.write(_event({"pad": "x" * 60_000}))
                self.flooded += 1
        for index in range(3):
            if index == 1 and model in {"abort-later", "cut", "held"}:
                await self.proceed.wait()
            if model == "abort-first" or (model == "abort-later" and index == 1):
                await response.write(_event({"choices": [{"finish_reason": "abort"}]}))
                break
            if model == "cut" and index == 1:
                assert request.transport is not None
                request.transport.abort()
                return response
            event = _event({"choices": [{"delta": {"content": f"w{index} "}}]})
            if model == "pieces":
                await response.write(event[:10])
                await asyncio.sleep(0)
                event = event[10:]
            await response.write(event)
            if model == "endless":
                while True:
                    await response.write(event)
                    await asyncio.sleep(0.005)
        await response.write(b"data: [DONE]\n\n")
        return response

    def _canary_stream(self) -> web.Response:
        if self.canary == "error":
            raise web.HTTPInternalServerError
        message = self._message("default")["choices"][0]
        pieces = [*message["message"]["content"], ""]  # letters do for tokens
        events = [
            _event({"choices": [{"delta": {"content": piece}, "finish_reason": None}]})
            for piece in pieces
        ]
        end = _event({"choices": [{"delta": {}, "finish_reason": message["finish_reason"]}]})
        return web.Response(
            body=b"".join((*events, end, b"data: [DONE]\n\n")), content_type="text/event-stream"
        )

    def _message(self, model: str) -> dict[str, Any]:
        wrong = "wrong" in {self.fault.removesuffix("-canary"), self.canary}
        finish = "abort" if model == "abort" else "stop"
        message = {"role": "assistant", "content": "" if wrong else DEMO_ANSWER}
        return {"choices": [{"message": message, "finish_reason": finish}], "usage": {}}


def _content(path: str) -> str:
    return Path(path).read_text()


def _dump(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def _event(value: object) -> bytes:
    return f"data: {_dump(value)}\n\n".encode()


async def _serve(socket: Path, fault: str) -> None:
    stub = Stub(fault)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set if fault != "deaf" else lambda: None)
    loop.add_signal_handler(signal.SIGUSR1, stub.proceed.set)
    runner = await stub.start(socket)
    if fault == "crash-later":
        loop.call_later(0.5, os._exit, 0)
    await stop.wait()
    await runner.cleanup()


def main() -> None:
    """Log as vLLM does, fail as told, serve."""
    arguments = sys.argv
    socket = Path(arguments[arguments.index("--uds") + 1])
    fault = os.environ.get("STUB_FAULT", "")
    # A worker that outlives its parent, as vLLM's do.
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    for line in LOAD_LINES:
        print(line, flush=True)
        if fault == "exit-at-load":
            print("ValueError: the weights are wrong", flush=True)
            sys.exit(0)
        if fault == "no-cache-at-load":
            print(NO_CACHE, *["  a line of the API process's traceback"] * 60, sep="\n", flush=True)
            sys.exit(1)
        if fault == "hang-at-load":
            signal.pause()
    asyncio.run(_serve(socket, fault))


if __name__ == "__main__":
    main()
