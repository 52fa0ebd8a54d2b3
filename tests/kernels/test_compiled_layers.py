"""Our layers under torch.compile, as vLLM compiles a model unless it is told not to."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
ENGINE = ROOT / ".venv-engine" / "bin" / "python"


@pytest.fixture(scope="module")
def layers() -> dict[str, Any]:
    """What was compiled for 3, 40 and 2048 tokens, by kernel."""
    if not ENGINE.is_file():
        pytest.skip("needs the engine's environment: make engine")
    script = Path(__file__).with_name("compiled_layers.py")
    environ = os.environ | {"PYTHONPATH": str(ROOT / "kernels/src"), "VLLM_NO_USAGE_STATS": "1"}
    done = subprocess.run(
        [ENGINE, script], env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("kernel", ["bf16x", "nvfp4"])
def test_a_layer_is_one_graph_for_every_number_of_tokens(
    kernel: str, layers: dict[str, Any]
) -> None:
    """One graph with our operator in it serves decode and prefill: which of the two it is stays inside the operator."""
    assert layers[kernel]["graphs"] == 1
    operators = layers[kernel]["operators"]
    assert [name for name in operators if "spark_kernels" in name] == [
        f"spark_kernels.{kernel}_linear"
    ]
