"""KV cache arithmetic: what must hold for any model. tests/e2e compares the numbers with real engines."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from spark_llm.architecture import Architecture, Attention, Layer, State
from spark_llm.errors import ConfigError
from spark_llm.kv_cache import KV_DTYPES, CacheOptions, bytes_per_head, layout

attentions = st.builds(
    Attention,
    kv_heads=st.sampled_from([1, 2, 4, 8]),
    key_size=st.sampled_from([64, 128, 256]),
    value_size=st.sampled_from([64, 128, 256]),
    window=st.sampled_from([0, 0, 128, 1024]),
)
states = st.builds(
    State,
    conv_width=st.integers(1, 64).map(lambda n: n * 128),
    conv_rows=st.just(3),
    state_elements=st.integers(1, 64).map(lambda n: n * 4096),
)
layer_counts = st.dictionaries(
    st.one_of(attentions, states), st.integers(1, 40), min_size=1, max_size=3
)


def model(layers: dict[Layer, int]) -> Architecture:
    return Architecture(
        model_type="test",
        order=tuple(layer for layer, count in layers.items() for _ in range(count)),
        draft_layers=(),
        dtype="bfloat16",
        state_dtype="",
        max_context=2**20,
        tied_embeddings=False,
        experts=None,
        vocabulary=1000,
        hidden=64,
        widest=128,
    )


options = st.builds(
    CacheOptions,
    kv_dtype=st.sampled_from(["auto", "fp8"]),
    block_size=st.sampled_from([16, 128]),
    max_num_batched_tokens=st.sampled_from([512, 8192]),
    speculative_tokens=st.integers(0, 5),
    prefix_caching=st.booleans(),
)


@given(layer_counts, options, st.integers(1, 10**6), st.integers(0, 10**6))
def test_longer_never_takes_less(
    layers: dict[Layer, int], chosen: CacheOptions, tokens: int, more: int
) -> None:
    """Blocks of a sequence grow with its length, or stay."""
    cache = layout(model(layers), chosen)
    assert cache.blocks_per_sequence(tokens) <= cache.blocks_per_sequence(tokens + more)


@given(layer_counts, options, st.integers(1, 2**38), st.integers(1, 8))
def test_longest_is_the_longest(
    layers: dict[Layer, int], chosen: CacheOptions, size: int, sequences: int
) -> None:
    """The largest context fits beside vLLM's own block, and one token more does not."""
    cache = layout(model(layers), chosen)
    longest = cache.longest(size, sequences, limit=2**20)
    room = cache.blocks(size) - 1
    if longest:
        assert cache.blocks_per_sequence(longest) * sequences <= room
    if longest < 2**20:
        assert cache.blocks_per_sequence(longest + 1) * sequences > room


@given(layer_counts, options)
def test_block_holds_every_layer_group(layers: dict[Layer, int], chosen: CacheOptions) -> None:
    """Groups cover all layers, and a block has room for every page of a group."""
    cache = layout(model(layers), chosen)
    widest = max(group.layers for group in cache.groups)
    assert sum(group.layers for group in cache.groups) >= sum(layers.values())
    assert cache.page_bytes <= cache.block_bytes <= cache.page_bytes * widest
    if len(cache.groups) > 1:
        assert cache.block_bytes == cache.page_bytes * widest


@given(attentions, st.sampled_from(KV_DTYPES))
def test_quantised_is_smaller(layer: Attention, dtype: str) -> None:
    """Every compressed dtype takes less than 16 bits an element, and float32 more."""
    plain = bytes_per_head(layer, "bfloat16", 2)
    size = bytes_per_head(layer, dtype, 2)
    if dtype == "float32":
        assert size == 2 * plain
    elif dtype in {"auto", "float16", "bfloat16"}:
        assert size == plain
    else:
        assert 0 < size < plain


HEAD_256 = [
    ("fp8", 512),
    ("nvfp4", 288),  # 2 x (128 + 16)
    ("turboquant_k8v4", 388),  # 256 + 128 + 4
    ("turboquant_4bit_nc", 262),  # 128 + 2 + 128 + 4
    ("turboquant_3bit_nc", 198),  # 96 + 2 + 96 + 4
    ("int4_per_token_head", 264),  # 256 + 8
]


@pytest.mark.parametrize(("dtype", "size"), HEAD_256)
def test_bytes_per_head(dtype: str, size: int) -> None:
    """A head of 256 takes what vLLM's own formulas give."""
    assert bytes_per_head(Attention(4, 256, 256), dtype, 2) == size


def test_unknown_dtype_is_refused() -> None:
    """An unknown KV dtype is named, with those that are known."""
    with pytest.raises(ConfigError, match="fp7"):
        bytes_per_head(Attention(1, 64, 64), "fp7", 2)


def test_known_model_by_hand() -> None:
    """Qwen3-Next 80B with fp8 KV at 64K: the block size that vLLM aligns to, and 0.9 GB a sequence."""
    layers: dict[Layer, int] = {
        State(conv_width=8192, conv_rows=3, state_elements=32 * 128 * 128): 36,
        Attention(2, 256, 256): 12,
    }
    cache = layout(model(layers), CacheOptions(kv_dtype="fp8"))
    state = 8192 * 3 * 2 + 32 * 128 * 128 * 2
    block = 16 * -(-state // (16 * 1024))
    assert [group.block_size for group in cache.groups if not group.states] == [block]
    assert cache.block_bytes == 12 * block * 1024
    assert cache.blocks_per_sequence(65536) == -(-65536 // block) + 3 * 2


def test_ends_in_the_models_dtype() -> None:
    """TurboQuant leaves two layers at either end in BF16; hybrid models have no such ends."""
    chosen = CacheOptions(kv_dtype="turboquant_4bit_nc", plain_ends=2)
    full = Attention(4, 128, 128)
    # vLLM's own page sizes per token: 2048 bytes of BF16, 536 of TurboQuant (turboquant_attn.py, customize_spec).
    assert layout(model({full: 48}), chosen).block_bytes == 16 * (4 * 2048 + 44 * 536)
    assert layout(model({full: 3}), chosen).block_bytes == 16 * (2 * 2048 + 536)
    hybrid = layout(model({State(8192, 3, 32 * 128 * 128): 12, full: 4}), chosen)
    assert hybrid == layout(
        model({State(8192, 3, 32 * 128 * 128): 12, full: 4}), replace(chosen, plain_ends=0)
    )


def test_ends_between_windows() -> None:
    """Which layers are the ends is told by their order: here a window and a full layer at either end."""
    chosen = CacheOptions(kv_dtype="turboquant_4bit_nc", plain_ends=2)
    window, full = Attention(4, 128, 128, window=128), Attention(4, 128, 128)
    alternating = replace(model({full: 1}), order=(window, full) * 4)
    groups = layout(alternating, chosen).groups
    assert sorted((group.window, group.layers) for group in groups) == [(0, 2)] * 2 + [(128, 2)] * 2


def test_one_kind_of_attention_is_one_group() -> None:
    """A draft of another shape joins the group of a model without windows and states, at its own size."""
    draft = model({Attention(8, 64, 64): 1})
    cache = layout(model({Attention(8, 128, 128): 32}), CacheOptions(), draft)
    assert [(group.layers, group.block_size) for group in cache.groups] == [(33, 16)]
    assert cache.block_bytes == 16 * 2 * 2 * 8 * (32 * 128 + 64)


def test_draft_wider_than_its_hybrid_target() -> None:
    """The target alone aligns the block; the draft's wider page then pads every other layer's.

    Page, block and sequence are what vLLM 0.32.0's ``get_kv_cache_groups`` makes of these layers: Qwen3.8-27B's with a
    draft of five, and Qwen3.6-35B-A3B's with a draft of three.
    """
    fp8 = CacheOptions(kv_dtype="fp8", max_num_batched_tokens=8192, state_dtype="float32")
    gated: dict[Layer, int] = {State(10240, 3, 48 * 128 * 128): 48, Attention(4, 256, 256): 16}
    draft = model({Attention(8, 128, 128): 5})
    even = layout(model(gated), replace(fp8, speculative_tokens=8), draft)
    assert (even.page_bytes, even.block_bytes) == (3375104, 16875520)
    assert even.blocks_per_sequence(131072) * even.block_bytes / 2**30 == 7.8582763671875
    gated = {State(8192, 3, 32 * 128 * 128): 30, Attention(2, 256, 256): 10}
    draft = model({Attention(8, 128, 128): 3})
    wider = layout(model(gated), replace(fp8, speculative_tokens=3), draft)
    assert (wider.page_bytes, wider.block_bytes) == (4390912, 13172736)
    assert wider.blocks_per_sequence(262144) * wider.block_bytes / 2**30 == 5.16485595703125


def test_two_nodes_halve_the_heads() -> None:
    """Tensor parallelism splits KV heads, never below one."""
    layers: dict[Layer, int] = {Attention(8, 128, 128): 4}
    one, two = (
        layout(model(layers), replace(CacheOptions(), tensor_parallel=n)).block_bytes
        for n in (1, 2)
    )
    assert two * 2 == one
    single: dict[Layer, int] = {Attention(1, 128, 128): 4}
    assert layout(model(single), CacheOptions(tensor_parallel=2)).block_bytes == one // 8
