"""rmsnorm_fp4's graph pass, matched by vLLM 0.32.0's own pattern matcher on a traced layer."""

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(scope="module")
def graphs(in_engine: Callable[..., Any]) -> dict[str, list[str]]:
    """The operators of three traced layers after the pass, by case."""
    found: dict[str, list[str]] = in_engine("rmsnorm_fusion.py")
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
