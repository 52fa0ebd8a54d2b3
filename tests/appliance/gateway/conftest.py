"""A gateway on a real port over a stub engine on a real Unix socket."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import uvicorn
from spark_llm.admission import Limits
from spark_llm.admission_queue import AdmissionQueue
from spark_llm.config import Gateway as GatewaySettings
from spark_llm.config import Settings
from spark_llm.controller import Controller
from spark_llm.folders import Folders
from spark_llm.gateway.app import Gateway
from spark_llm.gateway.protocol import bounded_protocol
from spark_llm.keeper import Keeper
from spark_llm.profile import Profile, load_profile, shipped_folder
from spark_llm.promises import Promises
from spark_llm.reason import Reason
from spark_llm.reply import Reply
from spark_llm.status import State
from spark_llm.upstream import Upstream

from tests.stub_engine import Stub

LIMITS = GatewaySettings(
    max_body_bytes=100_000,
    max_bodies_bytes=200_000,
    max_header_bytes=16_384,
    header_timeout_s=1.0,
    queue_timeout_s=60.0,
)


@dataclass
class Running:
    """A gateway that runs."""

    port: int
    stub: Stub
    queue: AdmissionQueue
    keeper: "ReadyKeeper"
    gateway: Gateway

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


class ReadyKeeper(Keeper):
    """A keeper whose engine is the stub; ready until told otherwise."""

    stub_upstream: Upstream | None = None

    def upstream(self) -> Upstream:
        if self.stub_upstream is None:
            raise Reply(503, Reason.NOT_READY, "not ready: loading", retry_after_s=7)
        return self.stub_upstream


def demo_profile() -> Profile:
    return load_profile("demo", (shipped_folder(),))


@asynccontextmanager
async def running_gateway(folder: Path, limits: Limits | None = None) -> AsyncIterator[Running]:
    settings = Settings(gateway=LIMITS)
    folders = Folders(folder, folder, folder, ())
    limits = limits or Limits(max_running=8, max_queue=8)
    controller = Controller(settings, demo_profile(), folders, limits)
    keeper = ReadyKeeper(
        settings,
        demo_profile(),
        folders,
        controller.board,
        AdmissionQueue(limits),
        controller._tick,
        Promises(),
    )
    controller.primary = keeper
    keeper.board.enter(State.READY)
    gateway = Gateway(controller, ())
    protocol = bounded_protocol(LIMITS.max_header_bytes, LIMITS.header_timeout_s)
    server = uvicorn.Server(
        uvicorn.Config(
            gateway,
            http=protocol,
            ws="none",
            lifespan="off",
            proxy_headers=False,
            log_config=None,
            timeout_graceful_shutdown=1,
        )
    )
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        stub = Stub()
        runner = await stub.start(folder / "e.sock")
        keeper.stub_upstream = Upstream(folder / "e.sock")
        serving = asyncio.create_task(server._serve([listener]))
        while not server.started:
            await asyncio.sleep(0.01)
        try:
            yield Running(listener.getsockname()[1], stub, keeper.queue, keeper, gateway)
        finally:
            stub.proceed.set()
            keeper.queue.cut()
            server.should_exit = True
            await serving
            if keeper.stub_upstream is not None:
                await keeper.stub_upstream.close()
            await runner.cleanup()


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    async with running_gateway(tmp_path) as gateway:
        yield gateway


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, bool]]:
    """The service runs on uvloop, whose transports are not asyncio's."""
    return "asyncio", {"use_uvloop": True}
