"""What a model's config.json says about memory: which layers keep what per token or per sequence. Pure.

Every layer that keeps something between engine steps becomes one :class:`Attention` or one
:class:`State`; models differ only in which they mix. Reading follows vLLM 0.32.0
(``transformers_utils/model_arch_config_convertor.py``,
``model_executor/layers/mamba/mamba_utils.py``).
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spark_llm.errors import ConfigError
from spark_llm.reason import Reason

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Attention:
    """A layer with a KV cache.

    Attributes:
        kv_heads: heads of K and V.
        key_size: elements of one K head.
        value_size: elements of one V head; 0 for MLA, which stores one latent vector instead of K and V.
        window: tokens a sliding-window layer looks back; 0 for full attention.
    """

    kv_heads: int
    key_size: int
    value_size: int
    window: int = 0


@dataclass(frozen=True)
class State:
    """A recurrent layer (gated delta net, Mamba 2): fixed size per sequence, whatever its length.

    Attributes:
        conv_width: channels of the convolution's state.
        conv_rows: rows of that state without speculation (kernel size minus one); one more per draft token.
        state_elements: elements of the recurrent state.
        checkpoints: further copies of it per sequence while prefixes are cached (Mamba 2, ``mamba_mixer2.py``).
    """

    conv_width: int
    conv_rows: int
    state_elements: int
    checkpoints: int = 0


Layer = Attention | State


@dataclass(frozen=True)
class Experts:
    """Attributes: total: routed experts per layer; active: of them used by one token."""

    total: int
    active: int


@dataclass(frozen=True)
class Architecture:
    """A model, as far as memory is concerned.

    Attributes:
        model_type: ``model_type`` of config.json.
        order: all layers that keep something, as they follow each other.
        draft_layers: distinct attention layers of the built-in MTP module and how many; kept only with speculation.
        dtype: the model's own, e.g. ``bfloat16``.
        state_dtype: of the recurrent state where config.json names one, else empty.
        max_context: longest context the model was made for, in tokens.
        tied_embeddings: input embedding and LM head are one tensor.
        experts: None for a dense model.
        vocabulary: tokens; a draft model must have the same.
        hidden: width of the residual stream.
        widest: width of the widest layer that one token passes: MLP, or its active experts together.
        expert_width: of one routed expert; 0 for a dense model.
        quantization: of the weights, ``quant_method`` of config.json; empty where it names none.
        numbered_draft: its MTP layers are numbered on after its own (``num_nextn_predict_layers``, as DeepSeek's), so
            no tensor's name tells whether the checkpoint has them.
    """

    model_type: str
    order: tuple[Layer, ...]
    draft_layers: tuple[tuple[Layer, int], ...]
    dtype: str
    state_dtype: str
    max_context: int
    tied_embeddings: bool
    experts: Experts | None
    vocabulary: int
    hidden: int
    widest: int
    expert_width: int = 0
    quantization: str = ""
    numbered_draft: bool = False

    @property
    def layers(self) -> tuple[tuple[Layer, int], ...]:
        """Each distinct layer and how many there are of it."""
        return tuple(Counter(self.order).items())


def read_architecture(config: Mapping[str, Any], *, draft: bool = False) -> Architecture:
    """Architecture from a parsed config.json.

    Args:
        config: as in the file.
        draft: of a draft model, which may keep no cache of its own (Gemma 4's assistant reads the target's).

    Raises:
        ConfigError: a kind of layer that this cannot count, or a key that is missing; guessing would
            defeat the ledger.
    """
    text: Mapping[str, Any] = config.get("text_config") or config.get("llm_config") or config
    try:
        return _read(config, text, draft=draft)
    except KeyError as error:
        raise _unknown(text, f"config.json has no {error.args[0]!r}") from error


def _read(config: Mapping[str, Any], text: Mapping[str, Any], *, draft: bool) -> Architecture:
    kinds = _kinds(text, int(text.get("num_hidden_layers") or 0))
    # vLLM gives no layer of Gemma 4's assistant a cache, whatever its file says (gemma4_mtp.py).
    shares_all = config.get("model_type") == "gemma4_assistant"
    layers = [] if shares_all else _layers(text, kinds)
    if not layers and not (draft and kinds):
        raise _unknown(text, "it names no layers")
    heads = [layer for layer in layers if isinstance(layer, Attention) and not layer.window]
    drafts = int(_first(text, "mtp_num_hidden_layers", "num_nextn_predict_layers") or 0)
    experts = _experts(text)
    quantization = _first(config, "quantization_config") or _first(text, "quantization_config")
    dtype = _first(config, "dtype", "torch_dtype") or _first(text, "dtype", "torch_dtype")
    return Architecture(
        model_type=str(text.get("model_type", "")),
        order=tuple(layers),
        draft_layers=((heads[0], drafts or 1),) if heads else (),
        dtype=str(dtype or "bfloat16").removeprefix("torch."),
        state_dtype=_state_dtype(text),
        max_context=int(text.get("max_position_embeddings") or 0),
        tied_embeddings=bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings"))),
        experts=experts,
        vocabulary=int(text.get("vocab_size") or 0),
        hidden=int(text.get("hidden_size") or 0),
        widest=_widest(text),
        expert_width=_expert_width(text) if experts else 0,
        quantization=str((quantization or {}).get("quant_method") or ""),
        numbered_draft=bool(text.get("num_nextn_predict_layers")),
    )


_ACTIVE = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k")
"""Names of an MoE's active experts, in vLLM's order (``get_num_experts_per_token``)."""


def _experts(text: Mapping[str, Any]) -> Experts | None:
    total = int(_first(text, "num_experts", "num_local_experts", "n_routed_experts") or 0)
    if not total:
        return None
    active = _first(text, *_ACTIVE)
    if active is None:
        raise KeyError(_ACTIVE[0])
    return Experts(total, int(active))


def _widest(text: Mapping[str, Any]) -> int:
    dense = int(text.get("intermediate_size") or 0)
    routed = _expert_width(text) * int(_first(text, *_ACTIVE) or 0)
    shared = int(text.get("shared_expert_intermediate_size") or 0)
    return max(dense, routed + shared)


def _expert_width(text: Mapping[str, Any]) -> int:
    # gpt-oss and MiniMax call an expert's width intermediate_size.
    return int(text.get("moe_intermediate_size") or text.get("intermediate_size") or 0)


def _layers(text: Mapping[str, Any], kinds: list[str]) -> list[Layer]:
    # Gemma 3n and 4 let the last layers read the cache of earlier ones.
    shared = int(text.get("num_kv_shared_layers") or 0)
    kept = kinds[: len(kinds) - shared] if shared else kinds
    # transformers 5 writes Gemma 4's global heads as exceptions of single layers (configuration_gemma4.py).
    exceptions = {int(at): keys for at, keys in (text.get("per_layer_config") or {}).items()}
    built: list[Layer] = []
    for index, kind in enumerate(kept):
        own = {**text, **exceptions.get(index, {})}
        if kind == "full_attention":
            built.append(_full(own))
        elif kind == "sliding_attention":
            built.append(_sliding(own))
        elif kind == "state":
            built.append(_state(own))
        elif kind != "none":
            raise _unknown(text, f"layer type {kind!r}")
    return built


_KIND_NAMES = {
    "full_attention": "full_attention",
    "attention": "full_attention",
    "sliding_attention": "sliding_attention",
    "linear_attention": "state",
    "mamba": "state",
    "mamba2": "state",
    "moe": "none",
    "mlp": "none",
}
_NEMOTRON_LETTERS = {"M": "state", "*": "full_attention", "-": "none", "E": "none"}


def _kinds(text: Mapping[str, Any], count: int) -> list[str]:
    """Kind of each layer: ``full_attention``, ``sliding_attention``, ``state`` or ``none``."""
    if pattern := text.get("hybrid_override_pattern"):
        return [_NEMOTRON_LETTERS.get(letter, letter) for letter in pattern]
    if types := _first(text, "layer_types", "layers_block_type"):
        return [_KIND_NAMES.get(kind, kind) for kind in types]
    if interval := text.get("full_attention_interval"):
        return ["state" if (index + 1) % interval else "full_attention" for index in range(count)]
    windowed = text.get("sliding_window") and text.get("use_sliding_window", True)
    return ["sliding_attention" if windowed else "full_attention"] * count


def _head_size(text: Mapping[str, Any]) -> int:
    return int(text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"])


def _full(text: Mapping[str, Any]) -> Attention:
    if rank := text.get("kv_lora_rank"):
        if text.get("index_topk"):
            raise _unknown(text, "sparse MLA with an indexer")
        return Attention(1, int(rank) + int(text["qk_rope_head_dim"]), 0)
    # Gemma 4's full-attention layers have a head size of their own, and a number where K and V are one.
    size = int(text.get("global_head_dim") or _head_size(text))
    names = ("num_global_key_value_heads", "num_key_value_heads")
    heads = _first(text, *names[0 if text.get("attention_k_eq_v") else 1 :])
    return Attention(
        int(heads or text["num_attention_heads"]), size, int(text.get("v_head_dim") or size)
    )


def _sliding(text: Mapping[str, Any]) -> Attention:
    size = _head_size(text)
    heads = int(text.get("num_key_value_heads") or text["num_attention_heads"])
    return Attention(heads, size, size, int(text["sliding_window"]))


def _state(text: Mapping[str, Any]) -> State:
    if "linear_num_value_heads" in text:
        keys = text["linear_num_key_heads"] * text["linear_key_head_dim"]
        values = text["linear_num_value_heads"] * text["linear_value_head_dim"]
        return State(
            conv_width=2 * keys + values,
            conv_rows=text["linear_conv_kernel_dim"] - 1,
            state_elements=values * text["linear_key_head_dim"],
        )
    if "ssm_state_size" in text:
        inner = text["mamba_num_heads"] * text["mamba_head_dim"]
        return State(
            conv_width=inner + 2 * text["n_groups"] * text["ssm_state_size"],
            conv_rows=text["conv_kernel"] - 1,
            state_elements=inner * text["ssm_state_size"],
            checkpoints=1,
        )
    raise _unknown(text, "a recurrent layer of unknown shape")


def _state_dtype(text: Mapping[str, Any]) -> str:
    """What vLLM's ``auto`` means: config.json's value, float32 for Nemotron-H without one."""
    named = _first(text, "mamba_ssm_dtype", "mamba_ssm_cache_dtype")
    if named:
        return str(named)
    return "float32" if "ssm_state_size" in text else ""


def _first(mapping: Mapping[str, Any], *names: str) -> Any:  # noqa: ANN401  JSON values
    return next((mapping[name] for name in names if mapping.get(name) is not None), None)


def _unknown(text: Mapping[str, Any], what: str) -> ConfigError:
    return ConfigError(
        f"cannot count the memory of model type {text.get('model_type')!r}: {what}",
        reason=Reason.BAD_PROFILE,
        hint="Such a model can be served with kv_cache_bytes and memory.weights_bytes set in its profile.",
    )
