"""What config.json says about memory."""

import json
from pathlib import Path
from typing import Any

import pytest
from spark_llm.architecture import Attention, Experts, State, read_architecture
from spark_llm.errors import ConfigError

TINY: dict[str, Any] = {
    name: case["config"]
    for name, case in json.loads(
        (Path(__file__).parents[1] / "e2e" / "tiny_models.json").read_text()
    ).items()
}


def test_dense() -> None:
    """Grouped-query attention is counted by its KV heads, not by its query heads."""
    assert read_architecture(TINY["dense"]).layers == ((Attention(2, 32, 32), 3),)


def test_window() -> None:
    """Sliding-window and full layers are told apart, each with its number."""
    layers = dict(read_architecture(TINY["window"]).layers)
    assert layers == {Attention(2, 32, 32, window=64): 6, Attention(2, 32, 32): 2}


def test_hybrid() -> None:
    """Gated delta net layers keep a state and no KV cache."""
    layers = dict(read_architecture(TINY["hybrid"]).layers)
    assert layers == {State(256, 3, 4096): 3, Attention(2, 32, 32): 1}


def test_mamba2() -> None:
    """Nemotron's pattern letters are read; MLP layers keep nothing."""
    architecture = read_architecture(TINY["mamba2"])
    assert dict(architecture.layers) == {
        State(256, 3, 4096, checkpoints=1): 2,
        Attention(2, 32, 32): 1,
    }
    assert architecture.state_dtype == "float32", "Nemotron-H's default"


def test_mla() -> None:
    """MLA keeps one latent vector for K and V."""
    assert read_architecture(TINY["mla"]).layers == ((Attention(1, 576, 0), 2),)


def test_interval_without_layer_types() -> None:
    """Qwen3-Next's older files give an interval instead of a list."""
    config = {key: value for key, value in TINY["hybrid"].items() if key != "layer_types"}
    assert read_architecture(config).layers == read_architecture(TINY["hybrid"]).layers


def test_nested_text_config() -> None:
    """Vision models keep the language model's settings in text_config."""
    nested = {"model_type": "some_vl", "dtype": "bfloat16", "text_config": TINY["moe"]}
    architecture = read_architecture(nested)
    assert architecture.layers == read_architecture(TINY["moe"]).layers
    assert architecture.experts == Experts(4, 2)


def test_gemma4_global_layers() -> None:
    """Full-attention layers have a head size of their own, and a number of heads where K and V are one."""
    window = Attention(4, 32, 32, window=64)
    plain = dict(read_architecture(TINY["mixed_heads"]).layers)
    shared = dict(read_architecture(TINY["mixed_heads_shared"]).layers)
    assert plain == {window: 6, Attention(4, 64, 64): 2}
    assert shared == {window: 6, Attention(1, 64, 64): 2}


def test_gemma4_layers_as_exceptions() -> None:
    """What transformers 5 writes instead of two keys of the global layers is read as the same model."""
    config = TINY["mixed_heads_shared"]
    own = {"head_dim": config["global_head_dim"], "num_key_value_heads": 1}
    rewritten = {key: value for key, value in config.items() if "global" not in key}
    rewritten["per_layer_config"] = {"03": own, "7": own}
    assert read_architecture(rewritten).layers == read_architecture(config).layers


def test_gemma4_experts() -> None:
    """Gemma 4 calls its active experts by a name of its own, which counts for the widest layer too."""
    named = {"num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704}
    architecture = read_architecture(TINY["mixed_heads"] | named)
    assert architecture.experts == Experts(128, 8)
    assert architecture.widest == 8 * 704


@pytest.mark.parametrize("shared", [0, 4])
def test_gemma4_assistant_keeps_no_cache(shared: int) -> None:
    """A draft that reads its target's cache has no layers to count; as a served model it would be refused."""
    text = {"model_type": "gemma4_text", "num_hidden_layers": 4, "num_kv_shared_layers": shared}
    config = {"model_type": "gemma4_assistant", "text_config": text}
    assert read_architecture(config, draft=True).layers == ()
    with pytest.raises(ConfigError, match="names no layers"):
        read_architecture(config)


def test_shared_cache() -> None:
    """Layers that read an earlier layer's cache keep none."""
    layers = dict(read_architecture(TINY["window"] | {"num_kv_shared_layers": 4}).layers)
    assert sum(layers.values()) == 4


def test_mtp_module() -> None:
    """An MTP module brings one more full-attention layer."""
    config = TINY["hybrid"] | {"num_nextn_predict_layers": 1}
    read = read_architecture(config)
    assert read.draft_layers == ((Attention(2, 32, 32), 1),)
    assert read.numbered_draft
    assert not read_architecture(TINY["hybrid"] | {"mtp_num_hidden_layers": 1}).numbered_draft


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"model_type": "mystery"}, "mystery"),
        (TINY["dense"] | {"layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
        (TINY["mla"] | {"index_topk": 2048}, "indexer"),
        ({"model_type": "m", "layer_types": ["mamba"]}, "recurrent"),
        (TINY["dense"] | {"num_experts": 8}, "num_experts_per_tok"),
        ({"model_type": "m", "num_hidden_layers": 2}, "hidden_size"),
    ],
)
def test_unknown_is_refused(config: dict[str, Any], word: str) -> None:
    """A kind of layer that cannot be counted is named, not guessed."""
    with pytest.raises(ConfigError, match=word):
        read_architecture(config)
