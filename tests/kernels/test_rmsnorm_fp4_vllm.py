"""rmsnorm_fp4's graph pass, matched by vLLM 0.32.0's own pattern matcher on a traced layer."""

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENGINE = ROOT / ".venv-engine" / "bin" / "python"


@pytest.fixture(scope="module")
def graphs() -> dict[str, list[str]]:
    """The operators of three traced layers after the pass, by case."""
    if not ENGINE.is_file():
        pytest.skip("needs the engine's environment: make engine")
    script = Path(__file__).with_name("rmsnorm_fusion.py")
    environ = os.environ | {"PYTHONPATH": str(ROOT / "kernels/src"), "VLLM_NO_USAGE_STATS": "1"}
    done = subprocess.run(
        [ENGINE, script], env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_gemma_norm_and_its_quantisation_become_one_operator(
    graphs: dict[str, list[str]],
) -> None:
    """Add, 1 + w, norm and quantisation are gone; one call of ours and a view of its scales remain."""
    operators = [name for name in graphs["plain"] if "getitem" not in name]
    assert operators == ["spark_kernels.add_rmsnorm_fp4.default", "aten.view.dtype"]


@pytest.mark.parametrize("case", ["padded", "float32"])
def test_other_layers_are_left_as_they_are(case: str, graphs: dict[str, list[str]]) -> None:
    """An output padded for CUTLASS, or a weight that is float32 already, keeps vLLM's operators."""
    assert "vllm_ir.fused_add_rms_norm.default" in graphs[case]
    assert "auto_functionalized" in graphs[case]
    assert not any("spark_kernels" in name for name in graphs[case])
