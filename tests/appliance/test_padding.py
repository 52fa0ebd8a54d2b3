"""How the engine pads routed experts."""

from dataclasses import replace
from typing import Any

import pytest
from spark_llm.architecture import read_architecture
from spark_llm.padding import expert_growth

GPT_OSS: dict[str, Any] = {
    "model_type": "gpt_oss",
    "num_hidden_layers": 2,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "quantization_config": {"quant_method": "mxfp4"},
}
READ = read_architecture(GPT_OSS)


@pytest.mark.parametrize(
    ("backend", "nodes", "padded"),
    [
        ("marlin", 1, 3072 * 2944),
        ("marlin", 2, 3072 * 2 * 1536),
        ("flashinfer_trtllm", 1, 3072 * 2944),
        ("flashinfer_cutlass", 1, 2944 * 2944),
        ("triton", 1, 2880 * 2880),
    ],
)
def test_growth_is_that_of_the_tiles(backend: str, nodes: int, padded: int) -> None:
    """Both sides of an expert are rounded up as the backend needs it, after its width is split between nodes."""
    assert expert_growth(READ, backend, nodes) == pytest.approx(padded / 2880**2)


def test_nothing_else_grows() -> None:
    """Another format, a dense model and sizes that are whole tiles already keep their size."""
    assert expert_growth(replace(READ, quantization="modelopt"), "marlin", 1) == 1
    dense = {key: value for key, value in GPT_OSS.items() if "experts" not in key}
    assert expert_growth(read_architecture(dense), "marlin", 1) == 1
    even = GPT_OSS | {"hidden_size": 3072, "intermediate_size": 3072}
    assert expert_growth(read_architecture(even), "marlin", 1) == 1
