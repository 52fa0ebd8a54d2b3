"""The memory ledger: sums, verdicts and refusals.

Over 400 lines because all of it shares one machine, one profile and one model, changed by a key at a time.
"""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from spark_llm import fit
from spark_llm.architecture import Architecture, Attention, read_architecture
from spark_llm.config import Settings
from spark_llm.errors import ConfigError
from spark_llm.kernels import Presence, screened_head_bytes
from spark_llm.ledger import GIB, Ledger, Machine, Model, account, kv_cache_bytes_for
from spark_llm.profile import (
    Memory,
    Profile,
    Speculative,
    load_profile,
    profile_names,
    shipped_folder,
)
from spark_llm.reason import Reason
from spark_llm.switches import adjust
from spark_llm.weights import Part, Weights

DENSE = read_architecture(
    {
        "model_type": "qwen3",
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "dtype": "bfloat16",
    }
)
MODEL = Model(DENSE, Weights(((Part.BODY, 16 * GIB), (Part.DRAFT, GIB), (Part.VISION, GIB))))
SPARK = Machine(int(121.69 * GIB), 118 * GIB, 16 * GIB)
PROFILE = Profile.model_validate(
    {
        "name": "test",
        "description": "d",
        "model": "org/name",
        "context": 32768,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 2048,
        "kv_cache_bytes": 8 * GIB,
        "backends": {"attention": "FLASH_ATTN", "linear": "torch"},
    }
)


def size(ledger: Ledger, name: str) -> int:
    return {line.name: line.size for line in ledger.lines}.get(name, 0)


def test_lines_add_up() -> None:
    """The need is the sum of the lines, each of which names its source."""
    ledger = account(PROFILE, SPARK, MODEL)
    assert ledger.need_bytes == sum(line.size for line in ledger.lines)
    assert all(line.source for line in ledger.lines)
    assert size(ledger, "KV cache") == 8 * GIB
    assert size(ledger, "weights") == pytest.approx(17 * GIB * 1.02, abs=2), "no draft without MTP"
    assert ledger.fits_now


def test_mtp_loads_its_module() -> None:
    """With the built-in draft its tensors are counted, and its layer gets a cache."""
    speculative = Speculative(method="mtp", tokens=2)
    with_mtp = PROFILE.model_copy(update={"speculative": speculative})
    ledger = account(with_mtp, SPARK, MODEL)
    assert size(ledger, "weights") == pytest.approx(18 * GIB * 1.02, abs=2)
    assert ledger.sequences < account(PROFILE, SPARK, MODEL).sequences


def test_draft_model_is_a_line_of_its_own() -> None:
    """A separate draft brings weights and KV layers."""
    speculative = Speculative(method="eagle3", tokens=2, model="org/draft")
    profile = PROFILE.model_copy(update={"speculative": speculative})
    draft = replace(DENSE, order=(Attention(8, 128, 128),))
    model = replace(MODEL, draft=draft, draft_weights=Weights(((Part.BODY, GIB),)))
    assert size(account(profile, SPARK, model), "draft weights") == pytest.approx(1.02 * GIB, abs=2)


def test_eager_needs_no_graphs() -> None:
    """Eager mode captures no CUDA graphs."""
    eager = account(adjust(PROFILE, debug=True), SPARK, MODEL)
    assert size(account(PROFILE, SPARK, MODEL), "CUDA graphs") > size(eager, "CUDA graphs") == 0


GB10 = replace(SPARK, kernels=Presence.GB10)
BF16_HEAD = replace(
    MODEL,
    weights=Weights(
        (
            (Part.BODY, 16 * GIB),
            (Part.EMBEDDING, 151936 * 4096 * 2),
            (Part.LM_HEAD, 151936 * 4096 * 2),
        ),
        coded=4 * GIB,
    ),
)


@pytest.mark.parametrize(
    ("machine", "switches", "screened", "coded"),
    [
        (SPARK, "", False, False),
        (GB10, "", True, True),
        (GB10, "-lm_head", False, True),
        (GB10, "lm_head", True, False),
        (GB10, "off", False, False),
        (replace(SPARK, kernels=Presence.OTHER_GPU), "", False, False),
        (replace(SPARK, kernels=Presence.OTHER_GPU), "force", True, True),
    ],
)
def test_our_kernels_are_counted(
    machine: Machine, switches: str, screened: bool, coded: bool
) -> None:
    """A screened head is a line where the plugin switches it on; what bf16x gives back is named and not counted."""
    profile = PROFILE.model_copy(update={"environment": {"SPARK_KERNELS": switches}})
    ledger = account(profile, machine, BF16_HEAD)
    expected = screened_head_bytes(151936, 4096) if screened else 0
    assert size(ledger, "screened LM head") == expected
    assert ledger.need_bytes - expected == account(PROFILE, SPARK, BF16_HEAD).need_bytes
    assert ("bf16x gives back about 1.0 GiB" in ledger.lines[0].source) == coded


def test_head_that_is_quantised_is_not_screened() -> None:
    """A head of fewer than 16 bits a weight stays as it is; a tied one is screened on the embedding's rows."""
    half = Weights(((Part.BODY, 16 * GIB), (Part.LM_HEAD, 151936 * 4096)))
    assert size(account(PROFILE, GB10, replace(MODEL, weights=half)), "screened LM head") == 0
    tied = replace(
        BF16_HEAD,
        architecture=replace(DENSE, tied_embeddings=True),
        weights=Weights(((Part.EMBEDDING, 151936 * 4096 * 2),)),
    )
    assert size(account(PROFILE, GB10, tied), "screened LM head") > 0


def test_turboquant_leaves_the_ends() -> None:
    """With --tq four layers of a model without states keep BF16, and the cache holds fewer sequences for it."""
    packed = adjust(PROFILE, turboquant=True)
    block = 16 * (
        4 * 8 * 512 + 28 * 8 * 134
    )  # a block of 16: 4 and 28 of 32 layers, 8 heads of 128
    assert kv_cache_bytes_for(packed, MODEL, 1) == (32768 // 16 + 1) * block


def test_two_nodes_share() -> None:
    """On two machines each holds half of the weights."""
    ledger = account(PROFILE.model_copy(update={"nodes": 2}), SPARK, MODEL)
    assert size(ledger, "weights") == pytest.approx(17 * GIB * 1.02 / 2, abs=2)


@pytest.mark.parametrize(
    ("available", "reserve", "now", "machine"),
    [(118, 16, True, True), (50, 16, False, True), (118, 90, False, False)],
)
def test_verdict(available: int, reserve: int, now: bool, machine: bool) -> None:
    """What fits an idle machine may not fit now, and what does not fit at all is told apart."""
    ledger = account(PROFILE, Machine(SPARK.total, available * GIB, reserve * GIB), MODEL)
    assert (ledger.fits_now, ledger.fits_machine) == (now, machine)


@given(st.integers(2048, 40960), st.integers(1, 8))
def test_cache_for_sequences_holds_them(context: int, sequences: int) -> None:
    """A cache sized for some sequences holds at least those, and less than one more."""
    profile = PROFILE.model_copy(update={"context": context})
    needed = kv_cache_bytes_for(profile, MODEL, sequences)
    ledger = account(profile.model_copy(update={"kv_cache_bytes": needed}), SPARK, MODEL)
    assert sequences <= ledger.sequences < sequences + 1


def test_longest_context_is_bounded_by_model_and_memory() -> None:
    """With room to spare the model's own limit counts; on a small machine memory does."""
    assert account(PROFILE, SPARK, MODEL).longest_context == 40960
    small = account(PROFILE, Machine(35 * GIB, 35 * GIB, 6 * GIB), MODEL)
    assert small.longest_context is not None
    assert 0 < small.longest_context < 40960


def test_utilization_is_the_need() -> None:
    """The engine's own start check asks for what the ledger counted, rounded up to a hundredth."""
    ledger = account(PROFILE, SPARK, MODEL)
    share = ledger.need_bytes / SPARK.total
    assert share <= ledger.gpu_memory_utilization < share + 0.01


def test_context_above_the_model() -> None:
    """A context that the model was not made for is refused with the largest one."""
    with pytest.raises(ConfigError, match="40960") as caught:
        account(PROFILE.model_copy(update={"context": 40961}), SPARK, MODEL)
    assert caught.value.reason is Reason.BAD_PROFILE


def test_mtp_that_the_checkpoint_lacks() -> None:
    """MTP without its tensors is refused, unless the model's layers are numbered so that names do not tell."""
    profile = PROFILE.model_copy(update={"speculative": Speculative(method="mtp", tokens=2)})
    without = replace(MODEL, weights=Weights(((Part.BODY, 16 * GIB),)))
    with pytest.raises(ConfigError, match="org/name has no MTP module") as caught:
        account(profile, SPARK, without)
    assert caught.value.reason is Reason.BAD_PROFILE
    assert account(adjust(profile, mtp=False), SPARK, without).fits_now
    numbered = replace(without, architecture=replace(DENSE, numbered_draft=True))
    assert account(profile, SPARK, numbered).fits_now


def test_draft_of_another_tokenizer() -> None:
    """A draft with another vocabulary is refused by name."""
    speculative = Speculative(method="draft_model", tokens=2, model="org/draft")
    profile = PROFILE.model_copy(update={"speculative": speculative})
    model = replace(MODEL, draft=replace(DENSE, vocabulary=32000), draft_weights=Weights(()))
    with pytest.raises(ConfigError, match="org/draft has 32000 tokens"):
        account(profile, SPARK, model)


@pytest.mark.parametrize(
    ("kv", "says"), [(1000, "less than one block"), (GIB, "holds no sequence")]
)
def test_cache_too_small(kv: int, says: str) -> None:
    """A cache below one block, or below one sequence, is refused with what is needed."""
    with pytest.raises(ConfigError, match=says):
        account(PROFILE.model_copy(update={"kv_cache_bytes": kv}), SPARK, MODEL)


def test_cache_of_exactly_one_sequence() -> None:
    """One block is vLLM's own, so a cache without it is refused, and the hint's size is accepted."""
    needed = kv_cache_bytes_for(PROFILE, MODEL, 1)
    with pytest.raises(ConfigError, match="holds no sequence") as caught:
        account(adjust(PROFILE, kv_cache_bytes=needed - 1), SPARK, MODEL)
    proposed = int(re.findall(r"needs (\d+)", caught.value.message)[0])
    assert proposed == needed
    assert account(adjust(PROFILE, kv_cache_bytes=proposed), SPARK, MODEL).sequences > 1


def test_hint_gives_a_context_that_fits() -> None:
    """The context that the refusal proposes is accepted."""
    small = PROFILE.model_copy(update={"kv_cache_bytes": GIB})
    with pytest.raises(ConfigError) as caught:
        account(small, SPARK, MODEL)
    proposed = int(caught.value.hint.split("context to ")[1].split()[0])
    assert account(adjust(small, context=proposed), SPARK, MODEL).sequences >= 1


def test_without_files_the_published_size_counts() -> None:
    """Before the model is there, the profile's own figure is used; without one the answer is an error."""
    profile = load_profile("qwen3.6-35b-a3b-nvfp4", (shipped_folder(),))
    ledger = account(profile, SPARK, None)
    assert size(ledger, "weights") == pytest.approx(23424338320 * 1.02, abs=2)
    assert ledger.longest_context is None
    with pytest.raises(ConfigError, match="nothing is known"):
        account(PROFILE, SPARK, None)


def _qwen3(
    kind: str, layers: int, heads: tuple[int, int, int], hidden: int, **more: int
) -> Architecture:
    """Shapes of a Qwen3 model; ``heads``: query heads, KV heads, size."""
    query, key_value, head = heads
    return read_architecture(
        {
            "model_type": kind,
            "num_hidden_layers": layers,
            "num_attention_heads": query,
            "num_key_value_heads": key_value,
            "head_dim": head,
            "hidden_size": hidden,
            "dtype": "bfloat16",
            **more,
        }
    )


_GDN = {
    "full_attention_interval": 4,
    "linear_num_key_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}


def _gpt_oss(layers: int, experts: int) -> Architecture:
    return read_architecture(
        {
            "model_type": "gpt_oss",
            "num_hidden_layers": layers,
            "layer_types": ["sliding_attention", "full_attention"] * (layers // 2),
            "sliding_window": 128,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_local_experts": experts,
            "num_experts_per_tok": 4,
            "vocab_size": 201088,
            "quantization_config": {"quant_method": "mxfp4"},
        }
    )


def _gemma(layers: int, heads: tuple[int, int, int], hidden: int, **more: int) -> Architecture:
    """Shapes of a Gemma 4 model; ``heads``: query heads, KV heads, KV heads of the global layers."""
    query, key_value, of_global = heads
    return read_architecture(
        {
            "model_type": "gemma4",
            "text_config": {
                "model_type": "gemma4_text",
                "num_hidden_layers": layers,
                "layer_types": [*["sliding_attention"] * 5, "full_attention"] * (layers // 6),
                "sliding_window": 1024,
                "num_attention_heads": query,
                "num_key_value_heads": key_value,
                "num_global_key_value_heads": of_global,
                "attention_k_eq_v": True,
                "head_dim": 256,
                "global_head_dim": 512,
                "hidden_size": hidden,
                "vocab_size": 262144,
                **more,
            },
        }
    )


GEMMA_DRAFT = read_architecture(
    {
        "model_type": "gemma4_assistant",
        "text_config": {
            "model_type": "gemma4_text",
            "layer_types": [*["sliding_attention"] * 3, "full_attention"],
            "num_kv_shared_layers": 4,
            "vocab_size": 262144,
        },
    },
    draft=True,
)
QWEN_27 = _qwen3(
    "qwen3_5_text", 64, (24, 4, 256), 5120, intermediate_size=17408, vocab_size=248320,
    linear_num_value_heads=48, **_GDN,
)  # fmt: skip
QWEN_35 = _qwen3(
    "qwen3_5_moe_text", 40, (16, 2, 256), 2048, moe_intermediate_size=512, num_experts=256,
    num_experts_per_tok=8, vocab_size=248320, linear_num_value_heads=32, mtp_num_hidden_layers=1, **_GDN,
)  # fmt: skip
QWEN_80 = _qwen3(
    "qwen3_next", 48, (16, 2, 256), 2048, moe_intermediate_size=512, num_experts=512,
    num_experts_per_tok=10, vocab_size=151936, linear_num_value_heads=32, **_GDN,
)  # fmt: skip
QWEN_30 = _qwen3(
    "qwen3_moe", 48, (32, 4, 128), 2048, moe_intermediate_size=768, num_experts=128,
    num_experts_per_tok=8, vocab_size=151936,
)  # fmt: skip
KNOWN: dict[str, Architecture] = {
    # Shapes: defaults of transformers 5.19.0 for the model type or its named checkpoint; Qwen3.5-27B as in
    # docs/explanation/kernels.md; Qwen3.6 as Qwen3.5 of the same size; Qwen3-30B-A3B and gpt-oss-20b have the depth
    # and experts of their model cards (48 of 128; 24 of 32). Gemma 4: google-deepmind/gemma, gm/nn/gemma4/_gemma4.py.
    "gemma-4-26b-a4b-nvfp4": _gemma(
        30,
        (16, 8, 2),
        2816,
        intermediate_size=2112,
        moe_intermediate_size=704,
        num_experts=128,
        top_k_experts=8,
    ),
    "gemma-4-31b-it-nvfp4": _gemma(60, (32, 16, 4), 5376, intermediate_size=21504),
    "gpt-oss-120b": _gpt_oss(36, 128),
    "gpt-oss-20b": _gpt_oss(24, 32),
    "minimax-m2.7-nvfp4": read_architecture(
        {
            "model_type": "minimax_m2",
            "num_hidden_layers": 62,
            "num_attention_heads": 48,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "hidden_size": 3072,
            "intermediate_size": 1536,
            "num_local_experts": 256,
            "num_experts_per_tok": 8,
            "vocab_size": 200064,
        }
    ),
    "qwen3-30b-a3b-nvfp4": QWEN_30,
    "qwen3-next-80b-a3b-fp8": QWEN_80,
    "qwen3-next-80b-a3b-nvfp4": QWEN_80,
    "qwen3-next-80b-a3b-nvfp4-mtp": QWEN_80,
    "qwen3-vl-30b-a3b-fp8": QWEN_30,
    "qwen3.5-27b-nvfp4": QWEN_27,
    "qwen3.5-27b-nvfp4-eager": QWEN_27,
    "qwen3.5-27b-nvfp4-tq": QWEN_27,
    "qwen3.6-27b-nvfp4": QWEN_27,
    "qwen3.6-35b-a3b-nvfp4": QWEN_35,
}
SHIPPED = [
    name for name in profile_names((shipped_folder(),)) if name != "demo"
]  # which tests/e2e runs
COUNTS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "sixteen")


@pytest.mark.parametrize(
    ("name", "experts", "more"),
    [("gpt-oss-120b", 56.73065, 5.12677), ("gpt-oss-20b", 9.45511, 0.85446)],
)
def test_padded_experts_are_counted(name: str, experts: float, more: float) -> None:
    """What vLLM's own shapes for Marlin take beyond the file (sizes in GiB, from its oracle/mxfp4.py) is a line."""
    profile = load_profile(name, (shipped_folder(),))
    parts = ((Part.BODY, GIB), (Part.EXPERTS, int(experts * GIB)))
    padded = account(profile, SPARK, Model(KNOWN[name], Weights(parts)))
    assert size(padded, "padding of experts") / GIB == pytest.approx(more, rel=1e-4)
    other = replace(KNOWN[name], quantization="fp8")
    plain = account(profile, SPARK, Model(other, Weights(parts)))
    assert padded.need_bytes - plain.need_bytes == size(padded, "padding of experts")


def _smallest(profile: Profile) -> Machine:
    """The smallest machine that the profile is for, idle."""
    return fit.machine(Settings(), f"{profile.memory.minimum_gb}G")


@pytest.mark.parametrize("name", KNOWN)
def test_shipped_cache_holds_what_its_profile_says(name: str) -> None:
    """A shipped profile's KV cache holds a whole context, as often as the comment beside it promises."""
    profile = load_profile(name, (shipped_folder(),))
    weights = Weights(((Part.BODY, profile.memory.weights_bytes or GIB), (Part.DRAFT, 1)))
    draft = GEMMA_DRAFT if name.startswith("gemma-4") else None
    model = Model(KNOWN[name], weights, draft, Weights(()) if draft else None)
    ledger = account(profile, _smallest(profile), model)
    text = (shipped_folder() / f"{name}.toml").read_text()
    promised = re.search(r"kv_cache_bytes = .*?(\w+) sequences? of the whole context", text)
    least = 1
    if promised:
        least = next(
            n for word, n in zip(COUNTS, (*range(1, 9), 16), strict=True) if word == promised[1]
        )
    assert profile.kv_cache_bytes >= kv_cache_bytes_for(profile, model, least)
    assert ledger.fits_now


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_profile_fits_its_smallest_machine(name: str) -> None:
    """By its own figures a profile fits the machine it is for; without one, a third of that is left for weights."""
    profile = load_profile(name, (shipped_folder(),))
    machine = _smallest(profile)
    assert profile.memory.minimum_gb in {64, 128}
    if profile.memory.weights_bytes:
        assert account(profile, machine, None).fits_now
    else:
        unknown = Memory(weights_bytes=machine.total * profile.nodes // 3, weights_source="a guess")
        assert account(profile.model_copy(update={"memory": unknown}), machine, None).fits_now
