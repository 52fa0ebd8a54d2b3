"""How vLLM 0.32.0 cuts KV cache memory into blocks, and what follows for context and concurrency. Pure.

vLLM gives all layers blocks of one size. Layers of one kind form groups of equally many layers; a
block holds one page of each layer of a group; a sequence takes blocks from every group. Sources:
``vllm/v1/kv_cache_interface.py`` (page sizes), ``vllm/v1/core/kv_cache_utils.py`` (groups,
capacity), ``vllm/platforms/interface.py`` (``_align_hybrid_block_size``). The tests compare each
number with what a real engine reports.
"""

from collections import Counter
from dataclasses import dataclass
from math import ceil

from spark_llm.architecture import DTYPE_BYTES, Architecture, Attention, Layer, State
from spark_llm.errors import ConfigError
from spark_llm.reason import Reason


@dataclass(frozen=True)
class CacheOptions:
    """Engine settings that decide the cache's layout.

    Attributes:
        kv_dtype: ``--kv-cache-dtype``.
        block_size: tokens per block before alignment; vLLM's default is 16 on CUDA and 128 on CPU.
        max_num_batched_tokens: tokens in one engine step.
        concurrent_batches: steps in flight; 2 with async scheduling, vLLM's default where it is supported.
        speculative_tokens: draft tokens per step; 0 without speculation.
        draft_in_model: the draft is the model's own MTP module.
        state_dtype: ``--mamba-ssm-cache-dtype``; empty takes the model's.
        prefix_caching: states are kept at block boundaries too (``mamba_cache_mode=align``).
        tensor_parallel: GPUs that share each layer.
        plain_ends: layers at either end that keep the model's own dtype; hybrid models have none.
    """

    kv_dtype: str = "auto"
    block_size: int = 16
    max_num_batched_tokens: int = 2048
    concurrent_batches: int = 2
    speculative_tokens: int = 0
    draft_in_model: bool = False
    state_dtype: str = ""
    prefix_caching: bool = True
    tensor_parallel: int = 1
    plain_ends: int = 0


@dataclass(frozen=True)
class Group:
    """Layers that share a block table.

    Attributes:
        layers: how many, padding included.
        block_size: tokens per block.
        window: sliding window in tokens; 0 for full attention.
        states: blocks per sequence if the group holds states; 0 for attention.
    """

    layers: int
    block_size: int
    window: int = 0
    states: int = 0


@dataclass(frozen=True)
class Layout:
    """The cache's geometry.

    Attributes:
        groups: see :class:`Group`.
        page_bytes: the largest share of one layer in a block.
        block_bytes: one block; the unit of allocation.
        in_flight: tokens scheduled and not yet settled, which a sliding window has to keep too.
    """

    groups: tuple[Group, ...]
    page_bytes: int
    block_bytes: int
    in_flight: int

    def blocks_per_sequence(self, tokens: int) -> int:
        """Blocks that a sequence of ``tokens`` holds at most."""
        return sum(self._blocks(group, tokens) for group in self.groups)

    def bytes_for(self, tokens: int, sequences: int = 1) -> int:
        """Smallest cache in bytes that holds ``sequences`` of ``tokens`` at once.

        vLLM keeps one block to itself (``BlockPool``'s null block) and starts with no less than one sequence
        beside it (``kv_cache_utils.py``, ``get_kv_cache_configs``).
        """
        return (self.blocks_per_sequence(tokens) * sequences + 1) * self.block_bytes

    def blocks(self, cache_bytes: int) -> int:
        """Blocks that fit into ``cache_bytes``, with the one that vLLM keeps to itself."""
        return cache_bytes // self.block_bytes

    def sequences(self, cache_bytes: int, tokens: int) -> float:
        """Sequences of ``tokens`` that fit at once: vLLM's "maximum concurrency", which counts its own block too."""
        return self.blocks(cache_bytes) / self.blocks_per_sequence(tokens)

    def longest(self, cache_bytes: int, sequences: int = 1, limit: int = 2**24) -> int:
        """Largest context in tokens of which ``sequences`` fit at once; 0 if not even one token does."""
        low, high = 0, limit
        while low < high:
            middle = (low + high + 1) // 2
            if self.bytes_for(middle, sequences) <= cache_bytes:
                low = middle
            else:
                high = middle - 1
        return low

    def _blocks(self, group: Group, tokens: int) -> int:
        if group.states:
            return group.states
        if group.window:
            kept = min(group.window - 1 + self.in_flight, tokens)
            return ceil(kept / group.block_size) + 1
        return ceil(tokens / group.block_size)


def layout(
    architecture: Architecture, options: CacheOptions, draft: Architecture | None = None
) -> Layout:
    """How vLLM lays out the cache for ``architecture``.

    Args:
        architecture: the served model.
        options: engine settings.
        draft: a draft model of its own, whose layers get a cache too.

    Raises:
        ConfigError: a KV dtype this does not know.
    """
    counted = _stored(architecture, options, draft)
    sizes: dict[tuple[Layer, str], int] = {
        (layer, dtype): _page_per_token(layer, dtype, architecture, options)
        for layer, dtype in counted
        if isinstance(layer, Attention)
    }
    states = [
        _state_bytes(layer, architecture, options)
        for layer, _ in counted
        if isinstance(layer, State)
    ]
    block = options.block_size
    own_sizes = [size for (layer, _), size in sizes.items() if layer in architecture.order]
    if states and own_sizes:
        # Hybrid: the attention block grows until its page holds a state. Only the model's own layers are asked
        # (_align_hybrid_block_size); a draft's wider page pads all others afterwards (unify_kv_cache_spec_page_size).
        block *= ceil(max(states) / (block * max(own_sizes)))
    page = max([block * size for size in sizes.values()] + states)
    in_flight = options.max_num_batched_tokens * options.concurrent_batches
    windows = {layer.window for layer, _ in counted if isinstance(layer, Attention)}
    if not states and len(windows) == 1:
        # One kind of attention: one group, in which each layer has a page of its own size (UniformTypeKVCacheSpecs).
        whole = sum(count * block * sizes[kind] for kind, count in counted.items())
        group = Group(sum(counted.values()), block, window=windows.pop())
        return Layout((group,), page, whole, in_flight)
    width = _group_width(list(counted.values()))
    groups = []
    for (layer, dtype), count in counted.items():
        if isinstance(layer, State):
            copies = 1 + layer.checkpoints if options.prefix_caching else 0
            prototype = Group(width, 0, states=1 + options.speculative_tokens + copies)
        else:
            own = block * sizes[layer, dtype]
            # A smaller page gets more tokens where that comes out even; else it is padded.
            tokens = block * (page // own) if page % own == 0 else block
            prototype = Group(width, tokens, window=layer.window)
        groups += [prototype] * ceil(count / width)
    return Layout(tuple(groups), page, page * width, in_flight)


def _stored(
    architecture: Architecture, options: CacheOptions, draft: Architecture | None
) -> dict[tuple[Layer, str], int]:
    """Each distinct layer with the dtype that its cache has, and how many there are of it."""
    order = architecture.order
    ends = min(options.plain_ends, len(order) // 2)
    if any(isinstance(layer, State) for layer in order):
        ends = 0
    counted = Counter(
        (layer, options.kv_dtype if ends <= index < len(order) - ends else "auto")
        for index, layer in enumerate(order)
    )
    extra = draft.layers if draft else architecture.draft_layers if options.draft_in_model else ()
    for layer, count in extra:
        counted[layer, options.kv_dtype] += count
    return counted


def _group_width(counts: list[int]) -> int:
    """Layers per group: the smallest kind's count, or the largest's when they are close (vLLM's heuristic)."""
    smallest, largest = min(counts), max(counts)
    return largest if largest < smallest * 1.5 else smallest


def _state_bytes(layer: State, architecture: Architecture, options: CacheOptions) -> int:
    model = DTYPE_BYTES.get(architecture.dtype, 2)
    state = DTYPE_BYTES.get(options.state_dtype or architecture.state_dtype, model)
    rows = layer.conv_rows + options.speculative_tokens
    share = options.tensor_parallel
    return layer.conv_width // share * rows * model + layer.state_elements // share * state


_FORMATS: dict[str, tuple[float, float, int]] = {
    "float32": (32, 32, 0),
    "float16": (16, 16, 0),
    "bfloat16": (16, 16, 0),
    "fp8": (8, 8, 0),
    "fp8_e4m3": (8, 8, 0),
    "fp8_e5m2": (8, 8, 0),
    # one float32 scale each for K and V (triton_attn.py)
    "fp8_per_token_head": (8, 8, 8),
    "int8_per_token_head": (8, 8, 8),
    "int4_per_token_head": (4, 4, 8),
    # one FP8 scale per 16 values (flashinfer.py)
    "nvfp4": (4.5, 4.5, 0),
    "nvfp4_4over6": (4.5, 4.5, 0),
    # float16 scale and zero point for V; float16 norm for K unless it is FP8 (turboquant/config.py)
    "turboquant_k8v4": (8, 4, 4),
    "turboquant_4bit_nc": (4, 4, 6),
    "turboquant_k3v4_nc": (3, 4, 6),
    "turboquant_3bit_nc": (3, 3, 6),
}
"""KV dtype to bits per K element, bits per V element, further bytes per head and token."""
KV_DTYPES = ("auto", *_FORMATS)


def _page_per_token(
    layer: Attention, dtype: str, architecture: Architecture, options: CacheOptions
) -> int:
    """Bytes of one token in one layer."""
    heads = max(1, layer.kv_heads // options.tensor_parallel)
    return heads * bytes_per_head(layer, dtype, DTYPE_BYTES.get(architecture.dtype, 2))


def bytes_per_head(layer: Attention, kv_dtype: str, model_bytes: int) -> int:
    """Bytes of K and V of one head and token.

    Args:
        layer: head sizes.
        kv_dtype: ``--kv-cache-dtype`` of vLLM 0.32.0.
        model_bytes: bytes per element of the model's own dtype, for ``auto``.

    Raises:
        ConfigError: an unknown dtype.
    """
    if kv_dtype == "auto":
        return (layer.key_size + layer.value_size) * model_bytes
    if kv_dtype not in _FORMATS:
        raise ConfigError(
            f"KV cache dtype {kv_dtype!r} has no known size",
            reason=Reason.BAD_PROFILE,
            hint=f"Known: {', '.join(KV_DTYPES)}.",
        )
    key_bits, value_bits, more = _FORMATS[kv_dtype]
    packed = ceil(layer.key_size * key_bits / 8) + ceil(layer.value_size * value_bits / 8) + more
    return packed + packed % 2 if kv_dtype.startswith("turboquant") else packed
