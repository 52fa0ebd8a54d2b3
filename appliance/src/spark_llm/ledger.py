"""Does it fit? Every byte the engine will take, line by line, against what the machine has. Pure.

Unified memory leaves no room for guesses: what does not fit does not fail, it freezes the host. So
each line names where its number comes from, and what is not known is rounded up.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil

from spark_llm import kernels, kv_cache
from spark_llm.architecture import DTYPE_BYTES, Architecture
from spark_llm.errors import ConfigError
from spark_llm.kernels import Presence
from spark_llm.overhead import Overhead, overhead
from spark_llm.padding import expert_growth
from spark_llm.profile import Engine, Profile
from spark_llm.reason import Reason
from spark_llm.weights import Part, Weights

GIB = 2**30


@dataclass(frozen=True)
class Model:
    """What is known of a model without loading it. Attributes: draft, draft_weights: of a draft model of its own."""

    architecture: Architecture
    weights: Weights
    draft: Architecture | None = None
    draft_weights: Weights | None = None


@dataclass(frozen=True)
class Machine:
    """Memory of one node, in bytes.

    Attributes:
        total: ``MemTotal``.
        available: what can be had now (meters.py); equal to ``total`` for a machine that is only imagined.
        reserve: kept for the host.
        kernels: whether its engine has our kernels.
    """

    total: int
    available: int
    reserve: int
    kernels: Presence = Presence.NONE


@dataclass(frozen=True)
class Line:
    """One entry. Attributes: name: what; size: bytes; source: where the number comes from."""

    name: str
    size: int
    source: str


@dataclass(frozen=True)
class Measured:
    """What earlier runs of the same profile and engine took on this machine.

    Attributes:
        size: all of it at the highest, in bytes.
        runs: how many runs say so.
        whole: as the fall of the machine's available memory, not from the engine's own processes.
    """

    size: int
    runs: int
    whole: bool = False


@dataclass(frozen=True)
class Ledger:
    """The whole account of one node.

    Attributes:
        lines: what the engine takes.
        machine: what there is.
        kv_cache_bytes: size of the KV cache.
        tokens: tokens that the cache holds in sequences of ``context``; 0 if the model is not known.
        sequences: sequences of ``context`` that fit the cache at once, as vLLM will report it; 0 if the model
            is not known.
        context: longest sequence, in tokens.
        longest_context: largest context that would fit this machine for one sequence, with all
            memory that is left as KV
            cache, in tokens; None if the model is not known.
        notes: what a reader should know beside the lines.
    """

    lines: tuple[Line, ...]
    machine: Machine
    kv_cache_bytes: int
    tokens: int
    sequences: float
    context: int
    longest_context: int | None
    notes: tuple[str, ...] = ()

    @property
    def need_bytes(self) -> int:
        """Sum of all lines."""
        return _total(self.lines)

    @property
    def itemised(self) -> str:
        """The lines in one sentence's part, largest first, in GiB; what rounds to nothing is left out."""
        largest = sorted(self.lines, key=lambda line: line.size, reverse=True)
        return ", ".join(
            f"{line.name} {line.size / GIB:.1f} GiB" for line in largest if line.size >= GIB / 20
        )

    @property
    def fits_now(self) -> bool:
        """Whether it fits what is available now."""
        return self.need_bytes <= self.machine.available - self.machine.reserve

    @property
    def fits_machine(self) -> bool:
        """Whether it would fit an otherwise idle machine."""
        return self.need_bytes <= self.machine.total - self.machine.reserve

    @property
    def gpu_memory_utilization(self) -> float:
        """``--gpu-memory-utilization``: our need as a share of the machine, and no more.

        vLLM sizes nothing by it once the KV cache is given in bytes, but refuses to start with less
        free memory than this (``v1/worker/utils.py``).
        """
        return min(0.99, max(0.01, ceil(self.need_bytes / self.machine.total * 100) / 100))


def account(
    profile: Profile, machine: Machine, model: Model | None, measured: Measured | None = None
) -> Ledger:
    """The ledger of ``profile`` on one node.

    Args:
        profile: what is to be served; its KV cache is taken as given.
        machine: memory of the node.
        model: None if neither config.json nor headers could be read; the profile's own figures are used then.
        measured: what earlier runs took; takes the place of the estimates, never of weights and KV cache.

    Raises:
        ConfigError: the cache cannot hold one sequence, the context is above the model's, the draft
            does not match, or nothing
            is known of the weights.
    """
    if model is not None:
        check(profile, model)
    extra = overhead(profile.engine)
    layout = None
    if model is not None:
        layout = kv_cache.layout(model.architecture, cache_options(profile), model.draft)
        _check_cache(profile, layout)
    ours = own_kernels(profile, machine.kernels)
    weights = _weights(profile, model, extra, ours)
    cache = Line("KV cache", profile.kv_cache_bytes, "the profile's kv_cache_bytes")
    known = (*weights, cache)
    estimated = (
        Line("activations", _activations(profile, model), _ACTIVATION_SOURCE),
        Line("CUDA graphs", 0 if profile.eager else extra.graph_bytes, extra.graph_source),
        Line("runtime", extra.runtime_bytes, extra.runtime_source),
        Line("shared memory", extra.shared_bytes * profile.nodes, extra.shared_source),
        Line("screened LM head", _screened(profile, model, ours), _SCREENED_SOURCE),
    )
    # The weights' lines are rounded up by the load factor; what the headers say is the least there can be.
    least = int(_total(weights) / extra.load_factor) + cache.size
    beside: tuple[Line, ...] = estimated
    notes: tuple[str, ...] = ()
    if model is None and measured is None:
        notes = ("the model's layers are not known: activations are not counted",)
    if measured is not None and measured.size < least:
        notes = (_not_believed(measured, least),)
    elif measured is not None:
        beside = (_learned(measured, _total(known), _total(estimated), extra),)
    lines = tuple(line for line in (*known, *beside) if line.size)
    others = _total(lines) - profile.kv_cache_bytes
    room = max(machine.total - machine.reserve - others, 0)
    longest = None
    sequences = 0.0
    if model is not None and layout is not None:
        limit = model.architecture.max_context or 2**24
        longest = layout.longest(room, limit=limit)
        sequences = layout.sequences(profile.kv_cache_bytes, profile.context)
    return Ledger(
        lines=lines,
        machine=machine,
        kv_cache_bytes=profile.kv_cache_bytes,
        tokens=int(sequences * profile.context),
        sequences=sequences,
        context=profile.context,
        longest_context=longest,
        notes=notes,
    )


def _learned(measured: Measured, known: int, estimated: int, extra: Overhead) -> Line:
    """What is taken beside the ``known`` bytes, as measured, in place of the ``estimated`` bytes."""
    rest = max(measured.size - known, 0)
    margin = max(extra.margin_bytes, ceil(rest * extra.margin_share))
    how = "measured on this machine" + (" by its available memory" if measured.whole else "")
    source = (
        f"{how}, {_runs(measured)}: {_gib(measured.size)} in all, and a margin of {_gib(margin)}; "
        f"estimated: {_gib(estimated)}"
    )
    return Line("all else", rest + margin, source)


def _not_believed(measured: Measured, least: int) -> str:
    return (
        f"{_gib(measured.size)} measured in {_runs(measured)} is less than weights and KV cache, "
        f"{_gib(least)}: not used"
    )


def _runs(measured: Measured) -> str:
    return f"{measured.runs} run{'s' if measured.runs > 1 else ''}"


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"


def _total(lines: Iterable[Line]) -> int:
    return sum(line.size for line in lines)


def kv_cache_bytes_for(profile: Profile, model: Model, sequences: int) -> int:
    """KV cache in bytes that holds ``sequences`` of the profile's context at once, and vLLM's one spare block."""
    layout = kv_cache.layout(model.architecture, cache_options(profile), model.draft)
    return layout.bytes_for(profile.context, sequences)


def cache_options(profile: Profile) -> kv_cache.CacheOptions:
    """The engine settings that decide the cache's layout."""
    speculative = profile.speculative
    return kv_cache.CacheOptions(
        kv_dtype=profile.kv_cache_dtype,
        block_size=profile.block_size or overhead(profile.engine).block_size,
        max_num_batched_tokens=profile.max_num_batched_tokens,
        speculative_tokens=speculative.tokens if speculative else 0,
        draft_in_model=bool(speculative and speculative.in_model),
        state_dtype=profile.state_dtype,
        prefix_caching=profile.prefix_caching,
        tensor_parallel=profile.nodes,
        # TurboQuantConfig.get_boundary_skip_layers, vLLM's turboquant/config.py
        plain_ends=2 if profile.kv_cache_dtype.startswith("turboquant_") else 0,
    )


def check(profile: Profile, model: Model) -> None:
    """Refuse a profile that contradicts its model.

    Raises:
        ConfigError: context above the model's; a draft with another vocabulary; MTP where the checkpoint has none.
    """
    architecture = model.architecture
    if architecture.max_context and profile.context > architecture.max_context:
        raise ConfigError(
            f"context = {profile.context} is above the {architecture.max_context} tokens {profile.model} was made for",
            reason=Reason.BAD_PROFILE,
            hint=f"Set context to {architecture.max_context} or less.",
        )
    speculative = profile.speculative
    if speculative is None:
        return
    own = model.weights.size(Part.DRAFT) or model.weights.size(Part.DRAFT_EXPERTS)
    if speculative.in_model and not (own or architecture.numbered_draft):
        raise ConfigError(
            f"{profile.model} has no MTP module: no tensor of it is named mtp or nextn",
            reason=Reason.BAD_PROFILE,
            hint="Remove [speculative], or serve it with --no-mtp.",
        )
    if model.draft and model.draft.vocabulary != architecture.vocabulary:
        raise ConfigError(
            f"draft {speculative.model} has {model.draft.vocabulary} tokens, {profile.model} has "
            f"{architecture.vocabulary}: their tokenizers do not match",
            reason=Reason.BAD_PROFILE,
            hint="Use the draft made for this model, or remove [speculative].",
        )


def _check_cache(profile: Profile, layout: kv_cache.Layout) -> None:
    needed = layout.bytes_for(profile.context)
    if profile.kv_cache_bytes < layout.block_bytes:
        raise ConfigError(
            f"kv_cache_bytes = {profile.kv_cache_bytes} is less than one block ({layout.block_bytes} bytes)",
            reason=Reason.BAD_PROFILE,
            hint=f"One sequence of {profile.context} tokens needs {needed}.",
        )
    if profile.kv_cache_bytes < needed:
        raise ConfigError(
            f"kv_cache_bytes = {profile.kv_cache_bytes} holds no sequence of {profile.context} "
            f"tokens, which needs {needed}",
            reason=Reason.DOES_NOT_FIT,
            hint=f"Raise it, or set context to {layout.longest(profile.kv_cache_bytes)} or less.",
        )


def own_kernels(profile: Profile, presence: Presence) -> frozenset[str]:
    """Those of our kernels that change what is held or read of the weights, as ``profile`` switches them."""
    if profile.engine is Engine.CPU:
        return frozenset()
    return kernels.active(presence, profile.environment.get(kernels.VARIABLE, ""))


_SCREENED_SOURCE = (
    f"INT8 copy and bounds beside the BF16 head; {kernels.VARIABLE}=-lm_head is without"
)


def _screened(profile: Profile, model: Model | None, ours: frozenset[str]) -> int:
    """What screening takes for the model's head and a draft's own; nothing for one that is quantised."""
    if model is None or kernels.LM_HEAD not in ours:
        return 0
    heads = [(model.architecture, model.weights)]
    if model.draft and model.draft_weights:
        heads.append((model.draft, model.draft_weights))
    return sum(screened_bytes(profile, *head) for head in heads)


def screened_bytes(profile: Profile, architecture: Architecture, weights: Weights) -> int:
    """What screening keeps beside one BF16 head on each node; 0 for a head that cannot be screened."""
    plain = architecture.vocabulary * architecture.hidden * DTYPE_BYTES["bfloat16"]
    tied = architecture.tied_embeddings or not weights.size(Part.LM_HEAD)
    head = weights.size(Part.EMBEDDING if tied else Part.LM_HEAD)
    if head < plain or architecture.dtype != "bfloat16":
        return 0
    rows = ceil(architecture.vocabulary / profile.nodes)
    return kernels.screened_head_bytes(rows, architecture.hidden)


_PADDING_SOURCE = "MXFP4 experts on whole tiles of the kernel (vLLM's oracle/mxfp4.py)"


def _weights(
    profile: Profile, model: Model | None, extra: Overhead, ours: frozenset[str]
) -> list[Line]:
    if model is None:
        if not profile.memory.weights_bytes:
            raise ConfigError(
                f"nothing is known of the weights of {profile.model}",
                reason=Reason.MODEL_MISSING,
                hint="Fetch it with `spark-llm pull`, or connect to the hub: the headers alone are enough.",
            )
        share = ceil(profile.memory.weights_bytes * extra.load_factor / profile.nodes)
        return [Line("weights", share, profile.memory.weights_source)]
    speculative = profile.speculative
    loaded = model.weights.loaded(
        draft=bool(speculative and speculative.in_model), tied=model.architecture.tied_embeddings
    )
    source = "safetensors headers + 2 %"
    if kernels.BF16X in ours and model.weights.coded:
        # All weights lie there plain before the first is coded, so what coding gives back lowers no peak of the load.
        back = int(model.weights.coded * (1 - kernels.CODED_SHARE) / profile.nodes)
        source += f"; bf16x gives back about {_gib(back)} after the load, not counted"
    lines = [Line("weights", _held(loaded, profile, extra), source)]
    growth = expert_growth(model.architecture, profile.backends.moe, profile.nodes)
    padding = ceil(model.weights.size(Part.EXPERTS) * (growth - 1))
    lines.append(Line("padding of experts", padding // profile.nodes, _PADDING_SOURCE))
    if model.draft_weights and model.draft:
        tied = model.draft.tied_embeddings
        own = model.draft_weights.loaded(draft=True, tied=tied)
        lines.append(Line("draft weights", _held(own, profile, extra), "safetensors headers + 2 %"))
    return lines


def _held(size: int, profile: Profile, extra: Overhead) -> int:
    return ceil(size * extra.load_factor / profile.nodes)


_ACTIVATION_SOURCE = (
    "largest step: batched tokens x (4 hidden + 2 widest layer), and float32 logits"
)


def _activations(profile: Profile, model: Model | None) -> int:
    """Peak of one step's intermediate tensors; an upper estimate, since vLLM reuses buffers."""
    if model is None:
        return 0
    architecture = model.architecture
    width = 4 * architecture.hidden + 2 * architecture.widest
    element = DTYPE_BYTES.get(architecture.dtype, 2)
    drafted = profile.speculative.tokens if profile.speculative else 0
    rows = profile.max_num_seqs * (1 + drafted)
    logits = rows * architecture.vocabulary * 4 * 2
    return profile.max_num_batched_tokens * width * element + logits
