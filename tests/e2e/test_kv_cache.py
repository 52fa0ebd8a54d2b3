"""The ledger's KV arithmetic against what real engines report, for every kind of layer it knows."""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from spark_llm.architecture import read_architecture
from spark_llm.demo_model import write_demo_model
from spark_llm.host import machine
from spark_llm.kv_cache import CacheOptions, Layout, layout
from spark_llm.ledger import account, cache_options
from spark_llm.model_facts import read_model
from spark_llm.profile import load_profile, shipped_folder

from tests.appliance.service import Service

ROOT = Path(__file__).parents[2]
ENGINE = ROOT / ".venv-engine" / "bin" / "python"
CASES: dict[str, Any] = json.loads((Path(__file__).parent / "tiny_models.json").read_text())


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What vLLM says of each model in tiny_models.json."""
    folder = tmp_path_factory.mktemp("models")
    probe = Path(__file__).parent / "engine_cache_probe.py"
    done = subprocess.run(
        [ENGINE, probe, Path(__file__).parent / "tiny_models.json", folder],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_HOST_IP": "127.0.0.1",
            "GLOO_SOCKET_IFNAME": "lo",
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, Any] = json.loads((folder / "reported.json").read_text())
    return answer


def ours(name: str, in_flight: int) -> Layout:
    engine = CASES[name]["engine"]
    architecture = read_architecture(CASES[name]["config"])
    latent = architecture.model_type == "deepseek_v2"
    options = CacheOptions(
        kv_dtype=engine.get("kv_cache_dtype", "auto"),
        block_size=16 if latent else 128,  # what the CPU platform sets; 16 on CUDA
        max_num_batched_tokens=in_flight,
        concurrent_batches=1,
        state_dtype="float32",  # the CPU platform sets it, whatever the model says
        prefix_caching=engine.get("enable_prefix_caching", True),
        speculative_tokens=engine.get("speculative_config", {}).get("num_speculative_tokens", 0),
        draft_in_model="speculative_config" in engine,
        plain_ends=len(engine.get("kv_cache_dtype_skip_layers", ())) // 2,
    )
    return layout(architecture, options)


@pytest.mark.parametrize("name", CASES)
def test_cache_is_counted_as_the_engine_counts_it(name: str, reported: dict[str, Any]) -> None:
    """Blocks, tokens and concurrency are exactly those that vLLM reports for the same bytes."""
    engine = CASES[name]["engine"]
    seen = reported[name]
    counted = ours(name, seen["in_flight"])
    sequences = counted.sequences(engine["kv_cache_memory_bytes"], engine["max_model_len"])
    assert counted.blocks(engine["kv_cache_memory_bytes"]) == seen["blocks"]
    assert sequences == pytest.approx(seen["sequences"])
    assert int(sequences * engine["max_model_len"]) == seen["tokens"]


@pytest.mark.parametrize("name", CASES)
def test_smallest_cache_is_the_engines_own(name: str, reported: dict[str, Any]) -> None:
    """The least that the ledger accepts for one whole context is, to the byte, the least that vLLM accepts."""
    counted = ours(name, reported[name]["in_flight"])
    needed = counted.bytes_for(CASES[name]["engine"]["max_model_len"])
    assert needed == reported[name]["least_bytes"]


def test_served_demo_has_the_cache_the_ledger_says(demo: Service, tmp_path: Path) -> None:
    """The engine behind a running service reports the blocks and the context that ``spark-llm fit demo`` counts."""
    profile = load_profile("demo", (shipped_folder(),))
    write_demo_model(tmp_path / "model")
    model = read_model(tmp_path / "model")
    counted = layout(model.architecture, cache_options(profile))
    status, metrics = demo.get("/metrics")
    assert status == 200
    found = re.search(r'vllm:cache_config_info\{[^}]*num_gpu_blocks="(\d+)"', metrics)
    assert found, "the engine reports its cache configuration"
    assert int(found[1]) == counted.blocks(profile.kv_cache_bytes)
    assert account(profile, machine(), model).tokens == 262144, "as the profile's comment says"
