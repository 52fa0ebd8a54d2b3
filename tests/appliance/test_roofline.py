"""Bytes per decode step against tables worked out by hand, and the achieved share of them."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from spark_llm.architecture import read_architecture
from spark_llm.kernels import Presence
from spark_llm.kv_cache import layout
from spark_llm.ledger import Machine, Model, cache_options
from spark_llm.profile import Profile, Speculative
from spark_llm.roofline import (
    Achieved,
    Counters,
    Step,
    achieved,
    expected_share,
    live_context,
    step,
)
from spark_llm.run import EngineRun
from spark_llm.weights import Part, Weights

GB = 1e9
NVFP4, BF16, FP8 = 0.5625, 2.0, 1.0
"""Bytes per weight; NVFP4 is four bits and one FP8 scale per sixteen."""


def profile(**changes: Any) -> Profile:  # noqa: ANN401  any field
    base = {
        "name": "test",
        "description": "d",
        "model": "org/name",
        "context": 32768,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 2048,
        "kv_cache_bytes": 2**33,
        "kv_cache_dtype": "fp8",
        "state_dtype": "float32",
        "backends": {"attention": "FLASHINFER", "linear": "marlin"},
    }
    return Profile.model_validate(base | changes)


# Qwen3.5-27B: hidden 5120, 48 gated delta net and 16 full-attention layers.
H, INTER, VOCABULARY = 5120, 17408, 248320
MLP = 64 * 3 * H * INTER
ATTENTION = 16 * (H * (24 * 256 * 2 + 2 * 4 * 256) + 24 * 256 * H)
GDN = 48 * (H * (2 * 16 * 128 + 2 * 48 * 128) + 48 * 128 * H)
GDN_SMALL = 48 * H * 96 * BF16
HEAD = VOCABULARY * H
QWEN27 = read_architecture(
    {
        "model_type": "qwen3_5_text",
        "num_hidden_layers": 64,
        "full_attention_interval": 4,
        "num_attention_heads": 24,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_size": H,
        "intermediate_size": INTER,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 48,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "vocab_size": VOCABULARY,
        "dtype": "bfloat16",
    }
)


def qwen27(gdn: float, head: float) -> Model:
    body = MLP * NVFP4 + ATTENTION * NVFP4 + GDN * gdn + GDN_SMALL
    parts = ((Part.BODY, int(body)), (Part.LM_HEAD, int(HEAD * head)), (Part.EMBEDDING, HEAD * 2))
    return Model(QWEN27, Weights(parts))


# Qwen3-Next-80B-A3B: hidden 2048, 36 gated delta net and 12 full-attention layers, 10 of 512 experts.
H80, VOCABULARY80 = 2048, 151936
EXPERT = 3 * H80 * 512
GDN80 = 36 * (H80 * (2 * 16 * 128 + 2 * 32 * 128) + 32 * 128 * H80)
ATTENTION80 = 12 * (H80 * (16 * 256 * 2 + 2 * 2 * 256) + 16 * 256 * H80)
QWEN80 = read_architecture(
    {
        "model_type": "qwen3_next",
        "num_hidden_layers": 48,
        "full_attention_interval": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "hidden_size": H80,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "moe_intermediate_size": 512,
        "vocab_size": VOCABULARY80,
        "dtype": "bfloat16",
    }
)


def qwen80(projections: float, head: float) -> Model:
    shared = 48 * EXPERT * NVFP4 + 48 * 513 * H80 * BF16
    body = shared + (GDN80 + ATTENTION80) * projections + 36 * H80 * 64 * BF16
    parts = (
        (Part.BODY, int(body)),
        (Part.EXPERTS, int(48 * 512 * EXPERT * NVFP4)),
        (Part.LM_HEAD, int(VOCABULARY80 * H80 * head)),
    )
    return Model(QWEN80, Weights(parts))


# Gigabytes per step at 1024 tokens; worked out tensor by tensor, without the convolution's state (below 0.1 %).
TABLE = [
    ("27B, delta net and head BF16", qwen27(BF16, BF16), 1, 24.57),
    ("27B, all linears NVFP4, head BF16", qwen27(NVFP4, BF16), 1, 16.61),
    ("27B, head NVFP4 too", qwen27(NVFP4, NVFP4), 1, 14.78),
    ("27B, delta net and head BF16, four sequences", qwen27(BF16, BF16), 4, 25.6),
    ("80B, attention BF16", qwen80(BF16, BF16), 1, 4.90),
    ("80B, attention NVFP4", qwen80(NVFP4, BF16), 1, 2.69),
    ("80B, attention and head FP8", qwen80(FP8, FP8), 1, 3.05),
]


@pytest.mark.parametrize(
    ("model", "sequences", "gigabytes"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE]
)
def test_bytes_per_step(model: Model, sequences: int, gigabytes: float) -> None:
    """The bytes of a step are those of the hand-made table."""
    moved = step(profile(), model, sequences=sequences, context=1024)
    assert moved.total / GB == pytest.approx(gigabytes, rel=0.005)


def test_parts_of_a_step() -> None:
    """Each part is right by itself, not only the sum."""
    moved = step(profile(), qwen80(BF16, BF16), sequences=1, context=1024)
    assert moved.experts / GB == pytest.approx(0.85, abs=0.005)
    assert moved.lm_head / GB == pytest.approx(0.62, abs=0.005)
    assert moved.state / GB == pytest.approx(0.15, abs=0.005)
    assert moved.kv == 12 * 2 * 512 * 1024
    assert moved.draft == 0


def test_padded_experts_are_read_padded() -> None:
    """Experts that the engine holds padded are counted as it reads them."""
    plain = qwen80(BF16, BF16)
    shapes = replace(plain.architecture, quantization="mxfp4", hidden=2880, expert_width=2880)
    padded = replace(plain, architecture=shapes)
    served = profile(backends={"attention": "FLASHINFER", "linear": "marlin", "moe": "marlin"})
    ratio = step(served, padded, context=0).experts / step(served, plain, context=0).experts
    assert ratio == pytest.approx(3072 * 2944 / 2880**2)


WINDOW = Model(
    read_architecture(
        {
            "model_type": "gpt_oss",
            "num_hidden_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 128,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "hidden_size": 512,
        }
    ),
    Weights(()),
)
GB10 = Presence.GB10


def test_our_kernels_read_less() -> None:
    """With bf16x the coded part of the body is read at 12.06 of 16 bits, with the screened head the head at half."""
    plain = qwen27(BF16, BF16)
    coded = int(GDN * BF16)
    model = replace(plain, weights=replace(plain.weights, coded=coded))
    without = step(profile(), model, context=1024)
    ours = step(profile(), model, context=1024, presence=GB10)
    assert without.body - ours.body == pytest.approx(coded * (1 - 12.0625 / 16))
    assert ours.lm_head == VOCABULARY * (H + 16 + 8)
    assert ours.total / without.total == pytest.approx(0.84, abs=0.01)
    off = profile(environment={"SPARK_KERNELS": "off"})
    assert step(off, model, context=1024, presence=GB10) == without


def test_head_is_whole_where_it_is_not_screened() -> None:
    """Verified drafts, more than 16 sequences, a quantised head and the switch leave the head as it is."""
    model = qwen27(BF16, BF16)
    whole = step(profile(), model, context=1024).lm_head
    drafting = profile(speculative={"method": "ngram", "tokens": 2})
    without = profile(environment={"SPARK_KERNELS": "-lm_head"})
    assert step(drafting, model, context=1024, presence=GB10).lm_head == whole
    assert step(without, model, context=1024, presence=GB10).lm_head == whole
    assert step(profile(), model, context=1024, sequences=17, presence=GB10).lm_head == whole
    packed = qwen27(BF16, NVFP4)
    assert (
        step(profile(), packed, context=0, presence=GB10).lm_head
        == step(profile(), packed, context=0).lm_head
    )


def test_dense_part_of_a_draft_is_read_whole() -> None:
    """Of an MTP module only the experts that the pass's tokens pick are left out."""
    plain = qwen80(BF16, BF16)
    parts = (*plain.weights.parts, (Part.DRAFT, 10**8), (Part.DRAFT_EXPERTS, 10**9))
    model = replace(plain, weights=Weights(parts))
    drafting = profile(speculative={"method": "mtp", "tokens": 2})
    for sequences in (1, 4):
        moved = step(drafting, model, context=0, sequences=sequences)
        touched = 10**9 * expected_share(512, 10, sequences)
        assert moved.draft == pytest.approx(2 * (10**8 + touched + moved.lm_head))


def test_draft_with_a_tied_head_reads_its_own() -> None:
    """A draft whose embedding is its head does not read its target's."""
    speculative = {"method": "mtp", "tokens": 4, "model": "org/draft"}
    tied = replace(QWEN27, tied_embeddings=True)
    own = Weights(((Part.BODY, 10**8), (Part.EMBEDDING, 10**7)))
    model = Model(QWEN27, qwen27(BF16, BF16).weights, tied, own)
    moved = step(profile(speculative=speculative), model, context=0)
    assert moved.draft == pytest.approx(4 * 1.1e8)


def test_limit_of_a_gb10() -> None:
    """At 273 GB/s the 80B's step takes 18.0 ms, so one stream cannot exceed 55.7 tok/s without speculation."""
    moved = step(profile(), qwen80(BF16, BF16), context=1024)
    assert 273 * GB / moved.total == pytest.approx(55.7, rel=0.005)


def test_verifying_drafts_touches_more_experts() -> None:
    """Three tokens a step reach 29 or so distinct experts a layer instead of ten: 1.65 GB more."""
    speculative = Speculative(method="mtp", tokens=2)
    model = qwen80(BF16, BF16)
    plain = step(profile(), model, context=1024)
    drafted = step(profile().model_copy(update={"speculative": speculative}), model, context=1024)
    assert 512 * expected_share(512, 10, 3) == pytest.approx(29.4, abs=0.1)
    assert (drafted.experts - plain.experts) / GB == pytest.approx(1.65, abs=0.02)
    assert drafted.draft == pytest.approx(2 * drafted.lm_head), (
        "two draft passes, each with the head"
    )


def test_block_draft_is_one_pass() -> None:
    """A block drafter reads its weights once for all its tokens."""
    speculative = Speculative(method="dflash", tokens=8, model="org/draft")
    draft = Model(QWEN27, qwen27(BF16, BF16).weights, QWEN27, Weights(((Part.BODY, 10**9),)))
    moved = step(profile().model_copy(update={"speculative": speculative}), draft, context=1024)
    assert moved.draft == pytest.approx(10**9 + moved.lm_head)


def test_window_bounds_the_kv() -> None:
    """Sliding-window layers read no more than their window."""
    moved = step(profile(), WINDOW, context=10_000)
    assert moved.kv == 8 * 128 * (128 + 10_000)


@given(st.integers(2, 512), st.floats(1, 64))
def test_expected_share_is_a_share(total: int, tokens: float) -> None:
    """The expected share lies between one token's and all experts, and grows with tokens."""
    active = max(1, total // 8)
    share = expected_share(total, active, tokens)
    assert active / total <= share + 1e-9
    assert share <= 1
    assert expected_share(total, active, tokens + 1) >= share


def used(model: Model, tokens: int, running: int) -> float:
    """Share of the cache that sequences of ``tokens`` hold while they decode."""
    cache = replace(layout(model.architecture, cache_options(profile())), in_flight=1)
    return running * cache.blocks_per_sequence(tokens) / (cache.blocks(2**33) - 1)


def test_achieved_share() -> None:
    """Forty steps a second of 4.9 GB are 72 % of 273 GB/s; the sentence says so."""
    model, bandwidth = qwen80(BF16, BF16), 273 * GB
    held = used(model, 1024, 1)
    before = Counters(at=0, generated=0, iterations=0, running=1, prompt=10, cache_used=held)
    after = Counters(at=10, generated=400, iterations=400, running=1, prompt=10, cache_used=held)
    result = achieved(before, after, profile(), model, bandwidth)
    assert isinstance(result, Achieved)
    context = live_context(before, after, profile(), model)
    moved = step(profile(), model, context=context)
    assert result.share == pytest.approx(40 * moved.total / bandwidth)
    assert result.limit == pytest.approx(55.7, rel=0.005)
    assert str(result) == "40.0 tok/s, 72 % of what this memory allows"


def test_a_run_knows_its_kernels() -> None:
    """What a run reports of its speed is judged with the kernels that its ledger counted."""
    model, shares = qwen27(BF16, BF16), []
    before = Counters(at=0, generated=0, iterations=0, running=1, prompt=0)
    after = Counters(at=10, generated=100, iterations=100, running=1, prompt=0)
    for presence in (Presence.NONE, GB10):
        account = SimpleNamespace(machine=Machine(2**37, 2**37, 0, presence))
        run: Any = SimpleNamespace(
            _counters=before,
            _prepared=SimpleNamespace(profile=profile(), model=model, account=account),
            _bandwidth=273 * GB,
            _board=SimpleNamespace(progress=lambda **_: None),
        )
        EngineRun._measure(run, after)
        shares.append(run.speed.share)
    assert shares[1] < shares[0]


@pytest.mark.parametrize("tokens", [2000, 20_000, 32_000])
@pytest.mark.parametrize("name", ["27B", "80B", "window"])
def test_context_is_read_from_the_cache(name: str, tokens: int) -> None:
    """The mean length of the running sequences follows from the blocks they hold, up to the profile's context."""
    model = {"27B": qwen27(BF16, BF16), "80B": qwen80(BF16, BF16), "window": WINDOW}[name]
    block = max(
        group.block_size for group in layout(model.architecture, cache_options(profile())).groups
    )
    one, three = (
        Counters(0, 0, 0, running=running, prompt=0, cache_used=used(model, tokens, running))
        for running in (1, 3)
    )
    assert tokens <= live_context(one, three, profile(), model) < tokens + block
    full = replace(one, cache_used=1.0)
    assert live_context(full, full, profile(), model) == profile().context
    idle = replace(one, running=0, cache_used=0.0)
    assert live_context(idle, idle, profile(), model) == 0


def test_long_contexts_lower_the_limit() -> None:
    """Of eight long sequences the cache is read too, so the same steps a second are more of the bandwidth."""
    model = qwen27(BF16, BF16)
    shares = []
    for tokens in (1024, 32_000):
        held = used(model, tokens, 8)
        before = Counters(0, 0, 0, running=8, prompt=0, cache_used=held)
        after = Counters(10, 400, 50, running=8, prompt=0, cache_used=held)
        result = achieved(before, after, profile(), model, 273 * GB)
        assert result is not None
        shares.append(result.share)
    more = 8 * 16 * 4 * 512 * (32_000 - 1024) * 5 / (273 * GB)
    assert shares[1] - shares[0] == pytest.approx(more, rel=0.05)


@pytest.mark.parametrize(
    "after",
    [
        Counters(at=0, generated=5, iterations=5, running=1, prompt=0),
        Counters(at=10, generated=0, iterations=5, running=1, prompt=0),
        Counters(at=10, generated=5, iterations=0, running=1, prompt=0),
        Counters(at=10, generated=5, iterations=5, running=1, prompt=100),
    ],
    ids=["no time", "no tokens", "no steps", "prefill"],
)
def test_nothing_to_say(after: Counters) -> None:
    """Without decoding, or with prefill in between, no share is claimed."""
    before = Counters(at=0, generated=0, iterations=0, running=1, prompt=0)
    assert achieved(before, after, profile(), qwen27(BF16, BF16), 273 * GB) is None


def test_two_nodes_move_half_each() -> None:
    """Each of two machines moves half of a step."""
    model = qwen27(BF16, BF16)
    alone = step(profile(), model, context=1024)
    both = step(profile(nodes=2), model, context=1024)
    assert both == Step(*(getattr(alone, name) / 2 for name in Step.__dataclass_fields__))
