"""From an empty machine to ready, and what stands in the way: hub, disk, memory. Only the engine is a stub."""

import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from spark_llm import host
from spark_llm.demo_model import write_demo_model
from spark_llm.ledger import account
from spark_llm.model_facts import local_model
from spark_llm.profile import parse_profile

from tests.appliance.service import Service, environment, service, stub_profile, stub_python
from tests.hub.server import LocalHub, local_hub

MODEL = "acme/tiny"
CHAT = "/v1/chat/completions"


@pytest.fixture
def hub(short_path: Path) -> Iterator[LocalHub]:
    """A hub that has the demo model under a name of its own."""
    write_demo_model(short_path / "source")
    files: dict[str, bytes | Path] = {
        entry.name: entry.read_bytes() for entry in (short_path / "source").iterdir()
    }
    with local_hub() as running:
        running.add(MODEL, files)
        yield running


@contextmanager
def _serving(
    folder: Path, endpoint: str = "", model: str = MODEL, kv_cache_bytes: int = 2**20, **more: str
) -> Iterator[Service]:
    """A service with an empty state folder whose profile names ``model``."""
    (folder / "profiles").mkdir()
    text = stub_profile(model=model, kv_cache_bytes=kv_cache_bytes)
    (folder / "profiles" / "far.toml").write_text(text)
    env = environment(
        folder,
        SPARK_LLM_PROFILE="far",
        SPARK_LLM_ENGINE__PYTHON=str(stub_python(folder)),
        SPARK_LLM_STORE__ENDPOINT=endpoint,
        SPARK_LLM_STORE__ATTEMPTS="2",
        SPARK_LLM_STORE__BACKOFF_S="0.01",
        **{"SPARK_LLM_STORE__RESERVE_BYTES": "0", **more},
    )
    with service(folder, env=env) as running:
        yield running.listening()


def test_cold_start_without_a_model(short_path: Path, hub: LocalHub) -> None:
    """An empty machine fetches, verifies, loads and becomes ready; a second start fetches nothing."""
    with _serving(short_path, hub.endpoint) as running:
        status = running.wait_state("ready", "blocked", "failed", timeout_s=60)
        assert status["state"] == "ready", status
        assert running.stop() == 0
    before = len(hub.downloads("model.safetensors"))
    (short_path / "profiles" / "far.toml").unlink()
    (short_path / "profiles").rmdir()
    with _serving(short_path, "http://127.0.0.1:9") as running:
        running.wait_state("ready", timeout_s=60)
    assert len(hub.downloads("model.safetensors")) == before


def test_model_that_another_process_fetches_is_served(short_path: Path, hub: LocalHub) -> None:
    """A service that may not fetch says so, and starts by itself once somebody else has brought the model."""
    with _serving(short_path, hub.endpoint, HF_HUB_OFFLINE="1") as running:
        status = running.wait_state("blocked", "failed", "ready")
        assert (status["state"], status["reason"]) == ("blocked", "model_missing")
        assert "spark-llm-fetch@" in status["hint"]
        done = subprocess.run(
            [sys.executable, "-m", "spark_llm.cli", "pull", MODEL],
            env=environment(
                short_path,
                SPARK_LLM_STORE__ENDPOINT=hub.endpoint,
                SPARK_LLM_STORE__RESERVE_BYTES="0",
            ),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        running.wait_state("ready", timeout_s=60)
        assert running.post(CHAT, {"model": "default"})[0] == 200


def test_phases_of_a_fetch_are_events(short_path: Path, hub: LocalHub) -> None:
    """The states of a cold start are events, in order; a megabyte is verified between two reports or is reported."""
    with _serving(short_path, hub.endpoint) as running:
        running.wait_state("ready", timeout_s=60)
        url = f"http://127.0.0.1:{running.port}/api/v1/events"
        states: list[str] = []
        with urllib.request.urlopen(url, timeout=30) as stream:
            for line in stream:
                if b'"state": ' in line:
                    states.append(line.split(b'"state": "')[1].split(b'"')[0].decode())
                    if states[-1] == "ready":
                        break
    order = [state for state in dict.fromkeys(states) if state != "verifying"]
    assert order == ["preflight", "fetching", "loading", "warming", "ready"]


def test_gated_model_blocks_with_the_page_to_accept(short_path: Path, hub: LocalHub) -> None:
    """A gated model is blocked with the address where its licence is accepted."""
    hub.models[MODEL].gated = True
    with _serving(short_path, hub.endpoint) as running:
        status = running.wait_state("blocked", timeout_s=60)
    assert status["reason"] == "gated"
    assert MODEL in status["message"] + status["hint"]


def test_unknown_model_blocks(short_path: Path, hub: LocalHub) -> None:
    """A model that the hub does not have is blocked as not found."""
    with _serving(short_path, hub.endpoint, model="acme/none") as running:
        status = running.wait_state("blocked", timeout_s=60)
    assert status["reason"] == "not_found"


def test_full_disk_blocks_before_the_first_byte(short_path: Path, hub: LocalHub) -> None:
    """A reserve that the disk cannot keep is blocked with the numbers, and no weights are asked for."""
    with _serving(short_path, hub.endpoint, SPARK_LLM_STORE__RESERVE_BYTES=str(2**60)) as running:
        status = running.wait_state("blocked", timeout_s=60)
    assert status["reason"] == "no_disk"
    assert hub.downloads("model.safetensors") == []


def test_model_that_cannot_fit_is_refused_with_the_ledger(short_path: Path) -> None:
    """A KV cache larger than the machine is blocked before anything starts, with what is needed for what."""
    with _serving(short_path, model="demo", kv_cache_bytes=2**45) as running:
        status = running.wait_state("blocked", timeout_s=60)
    assert status["reason"] == "does_not_fit"
    assert "needed for KV cache 32768.0 GiB, runtime 1.9 GiB" in status["message"]
    assert "exceed this machine's" in status["message"]
    assert "spark-llm fit" in status["hint"]


def test_memory_that_returns_is_waited_for(short_path: Path) -> None:
    """With another program in the way the start waits and says what is short; once that has ended, it goes on."""
    held = 3 * 2**30  # a neighbour may take or give back half of it meanwhile
    code = f"held = bytearray({held}); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as hog:
        assert hog.stdout is not None
        hog.stdout.readline()
        profile = parse_profile("far", stub_profile(), "the test")
        need = account(profile, host.machine(), local_model(profile, short_path)).need_bytes
        reserve = host.machine().available - need + held // 2
        with _serving(
            short_path, model="demo", SPARK_LLM_MEMORY__RESERVE_BYTES=str(reserve)
        ) as running:
            status = running.wait_state("waiting_memory", timeout_s=30)
            assert status["reason"] == "memory"
            assert "short" in status["message"]
            assert status["engine_pid"] is None
            running.wait_log(r"waiting: .*GiB short")
            hog.communicate()
            running.wait_state("ready", timeout_s=60)


def test_soft_floor_closes_the_door(short_path: Path) -> None:
    """Below the soft floor the service is degraded and refuses new requests, with the reason; the engine stays."""
    floor = str(2**50)
    with _serving(short_path, model="demo", SPARK_LLM_MEMORY__SOFT_FLOOR_BYTES=floor) as running:
        status = running.wait_state("degraded", timeout_s=60)
        assert status["reason"] == "memory"
        code, body = running.post(CHAT, {"model": "default"})
        assert (code, body["error"]["code"]) == (503, "memory")
        assert running.get("/readyz")[0] == 503
        assert running.status()["engine_pid"] == status["engine_pid"]


def test_hard_floor_kills_the_engine_and_nothing_else(short_path: Path) -> None:
    """Below the hard floor the guard kills the engine; after the second time the service stays down and says why."""
    floor = str(2**50)
    with _serving(short_path, model="demo", SPARK_LLM_MEMORY__HARD_FLOOR_BYTES=floor) as running:
        status = running.wait_state("failed", timeout_s=90)
        assert status["reason"] == "memory"
        assert "twice" in status["hint"]
        assert running.get("/livez")[0] == 200


def test_cuda_profile_without_a_gpu_is_blocked(short_path: Path) -> None:
    """A profile for the GPU on a machine without one is blocked as no_gpu, with what to do."""
    env = environment(short_path, SPARK_LLM_PROFILE="qwen3.6-35b-a3b-nvfp4")
    with service(short_path, env=env) as running:
        status = running.listening().wait_state("blocked", timeout_s=60)
    assert status["reason"] == "no_gpu"
    assert "nvidia-smi" in status["hint"]


def test_two_node_profile_on_one_is_refused(short_path: Path) -> None:
    """A profile for two nodes is refused by name on one."""
    env = environment(short_path, SPARK_LLM_PROFILE="minimax-m2.7-nvfp4")
    with service(short_path, env=env) as running:
        status = running.listening().wait_state("blocked", timeout_s=60)
    assert status["reason"] == "peers"
    assert "minimax-m2.7-nvfp4" in status["message"]
