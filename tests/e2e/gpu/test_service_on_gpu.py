"""The service with vLLM's CUDA build, where there is a GPU: start, tokens, memory by the driver's count, death, end."""

import os
import signal
from pathlib import Path

import openai
import pytest
from spark_llm import host
from spark_llm.vitals import members

from tests.appliance.service import (
    Service,
    environment,
    processes_below,
    processes_of,
    service,
    wait_for,
)

ENGINE = "GPU_ENGINE_PYTHON"
START_TIMEOUT_S = 500
"""A first start compiles the model and captures its graphs."""
TOKENS = 64


@pytest.fixture
def gpu_engine() -> str:
    """Interpreter that has vLLM's CUDA build."""
    if not host.driver_version() or ENGINE not in os.environ:
        pytest.skip(
            f"needs an NVIDIA GPU, and {ENGINE} that names an interpreter with vLLM's CUDA build"
        )
    return os.environ[ENGINE]


def _streamed(running: Service) -> int:
    """Tokens of a streamed answer, as its last event counts them."""
    with openai.OpenAI(
        base_url=f"http://127.0.0.1:{running.port}/v1", api_key="none", max_retries=0
    ) as client:
        chunks = client.completions.create(
            model="demo-gpu",
            prompt="the",
            max_tokens=TOKENS,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        return sum(chunk.usage.completion_tokens for chunk in chunks if chunk.usage)


def _on_gpu(group: int) -> int:
    """Device memory of a process group as the driver counts it, in bytes."""
    held = host.gpu_processes()
    return sum(held.get(int(entry.name), 0) for entry, _ in members(group, Path("/proc")))


def test_gpu_serves_and_lets_go(short_path: Path, gpu_engine: str) -> None:
    """Ready after the canary, whole streams, memory as the driver counts it, back after SIGKILL; at the end nothing."""
    env = environment(short_path, SPARK_LLM_PROFILE="demo-gpu", SPARK_LLM_ENGINE__PYTHON=gpu_engine)
    with service(short_path, env=env) as running:
        first = running.listening().wait_state("ready", "failed", timeout_s=START_TIMEOUT_S)
        assert first["state"] == "ready", running.text()[-4000:]
        assert _streamed(running) == TOKENS

        held = _on_gpu(first["engine_pid"])
        assert held > 0, "the driver names the engine's processes"
        wait_for(lambda: running.status()["memory_bytes"] > held // 2, 30, running.text)
        assert running.status()["memory_peak_bytes"] >= held // 2

        os.kill(first["engine_pid"], signal.SIGKILL)
        wait_for(lambda: running.status()["run_id"] != first["run_id"], 60, running.text)
        second = running.wait_state("ready", timeout_s=START_TIMEOUT_S)
        assert second["restarts"] == 1
        assert _on_gpu(first["engine_pid"]) == 0
        assert _streamed(running) == TOKENS
        assert running.stop() == 0
    for run in (first, second):
        assert processes_of(run["engine_pid"]) == []
        assert _on_gpu(run["engine_pid"]) == 0
    assert processes_below(short_path) == []
