"""Draining, crashing and dying with a real vLLM: nothing is lost silently and nothing is left behind."""

import concurrent.futures
import os
import signal
from pathlib import Path
from typing import Any

import openai
from spark_llm.demo_model import write_demo_model

from tests.appliance.service import Service, processes_below, processes_of, wait_for
from tests.e2e.conftest import START_TIMEOUT_S, demo_service

TOKENS = 2500
"""Of each stream under which the service is stopped: seconds of decoding."""


def _client(running: Service) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"http://127.0.0.1:{running.port}/v1", api_key="none", max_retries=0
    )


def _no_process_left(folder: Path, *groups: int) -> None:
    def left() -> list[str]:
        members = [member for group in groups for member in processes_of(group)]
        return members + processes_below(folder)

    wait_for(lambda: not left(), 20, lambda: f"left: {left()}")


def _stream(running: Service, tokens: int, started: concurrent.futures.Future[None]) -> int:
    """Tokens of one streamed answer, as its last event counts them; sets ``started`` at the first."""
    with _client(running) as client:
        counted = 0
        for chunk in client.chat.completions.create(
            model="default",
            messages=[{"role": "user", "content": "the"}],
            max_tokens=tokens,
            stream=True,
            stream_options={"include_usage": True},
        ):
            if not started.done():
                started.set_result(None)
            counted = chunk.usage.completion_tokens if chunk.usage else counted
        return counted


def _refusal(running: Service) -> dict[str, Any] | None:
    """The body of a 503; None while requests are still answered, for a moment after the signal."""
    status, body = running.post(
        "/v1/completions", {"model": "default", "prompt": "a", "max_tokens": 1}
    )
    return body if status == 503 else None


def test_drain_under_load(short_path: Path, engine_cache: Path) -> None:
    """SIGTERM under load: running streams end whole, later requests are 503, exit 0, no process is left."""
    with demo_service(short_path, engine_cache, SPARK_LLM_ENGINE__DRAIN_TIMEOUT_S="150") as running:
        engine = running.wait_state("ready", timeout_s=START_TIMEOUT_S)["engine_pid"]
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            started: list[concurrent.futures.Future[None]] = [
                concurrent.futures.Future() for _ in range(4)
            ]
            streams = [pool.submit(_stream, running, TOKENS, begun) for begun in started]
            for begun in started:
                begun.result(60)
            running.process.send_signal(signal.SIGTERM)
            late = wait_for(lambda: _refusal(running), 30, running.text)
            assert late["error"]["code"] == "draining"
            assert [stream.result(180) for stream in streams] == [TOKENS] * 4
        assert running.process.wait(180) == 0
    _no_process_left(short_path, engine)


def test_killed_engine_comes_back_and_killed_controller_leaves_nothing(
    short_path: Path, engine_cache: Path
) -> None:
    """SIGKILL of the engine: an error to the client, then ready again. SIGKILL of the controller: nothing lives on."""
    with demo_service(short_path, engine_cache) as running:
        first = running.wait_state("ready", timeout_s=START_TIMEOUT_S)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            begun: concurrent.futures.Future[None] = concurrent.futures.Future()
            stream = pool.submit(_stream, running, 3000, begun)
            begun.result(60)
            os.kill(first["engine_pid"], signal.SIGKILL)
            assert isinstance(stream.exception(60), openai.APIError)
        wait_for(lambda: running.status()["run_id"] != first["run_id"], 60, running.text)
        second = running.wait_state("ready", timeout_s=START_TIMEOUT_S)
        assert second["restarts"] == 1
        with _client(running) as client:
            assert client.completions.create(model="demo", prompt="the", max_tokens=3).choices
        running.process.kill()
        running.process.wait()
    _no_process_left(short_path, first["engine_pid"], second["engine_pid"])


def test_failed_start_names_its_cause(short_path: Path, engine_cache: Path) -> None:
    """A damaged header fails vLLM's start as a corrupt model, with its own words, and is not tried again."""
    write_demo_model(short_path / "model")
    weights = short_path / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes().replace(b'"shape":[128]', b'"shape":[127]', 1))
    (short_path / "profiles").mkdir()
    (short_path / "profiles/damaged.toml").write_text(
        f'extends = "demo"\naliases = []\nmodel = "{short_path}/model"\n'
    )
    with demo_service(short_path, engine_cache, SPARK_LLM_PROFILE="damaged") as running:
        status = running.wait_state("failed", timeout_s=START_TIMEOUT_S)
        assert (status["reason"], status["restarts"]) == ("model_corrupt", 1)
        assert "SafetensorError: Error while deserializing header" in status["message"]
        assert "SafetensorError" in status["last_log"][0]
        assert running.stop() == 1
    _no_process_left(short_path)
