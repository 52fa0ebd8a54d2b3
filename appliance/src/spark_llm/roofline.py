"""How fast this memory allows decoding to be, and how near the engine comes. Pure.

A decode step at small batch does little arithmetic and has to read every active weight once; bytes moved
per step over bytes per second is therefore the floor of its duration.
"""

import math
from dataclasses import dataclass, replace

from spark_llm import kernels
from spark_llm.architecture import DTYPE_BYTES, Architecture, Attention, State
from spark_llm.kernels import Presence
from spark_llm.kv_cache import bytes_per_head, layout
from spark_llm.ledger import Model, cache_options, own_kernels, screened_bytes
from spark_llm.padding import expert_growth
from spark_llm.profile import Profile
from spark_llm.weights import Part, Weights


@dataclass(frozen=True)
class Step:
    """Bytes that one decode step moves on one node.

    Attributes:
        body: attention, dense MLP, norms, routers: read whole.
        experts: routed experts that the step's tokens need.
        lm_head: output projection.
        draft: draft passes, each with its own LM head.
        kv: keys and values of all sequences.
        state: recurrent states, read and written.
    """

    body: float
    experts: float
    lm_head: float
    draft: float
    kv: float
    state: float

    @property
    def total(self) -> float:
        """All of it, in bytes."""
        return self.body + self.experts + self.lm_head + self.draft + self.kv + self.state


def step(
    profile: Profile,
    model: Model,
    *,
    context: float,
    sequences: float = 1,
    presence: Presence = Presence.NONE,
) -> Step:
    """Bytes of one step: the least there can be.

    Experts are picked at random. Where our LM head is in the engine, requests are taken to be such as it screens
    (greedy, or from the top 64 alone); others read the whole head.

    Args:
        profile: KV dtype, speculation and nodes.
        model: the served model.
        context: mean length of the sequences, in tokens.
        sequences: decoded together.
        presence: whether the engine has our kernels.
    """
    architecture, weights = model.architecture, model.weights
    drafted = profile.speculative.tokens if profile.speculative else 0
    tokens = sequences * (1 + drafted)
    ours = own_kernels(profile, presence)
    body = float(weights.size(Part.BODY))
    if kernels.BF16X in ours:
        body -= weights.coded * (1 - kernels.CODED_SHARE)
    experts = weights.size(Part.EXPERTS) * expert_growth(
        architecture, profile.backends.moe, profile.nodes
    )
    share = profile.nodes
    return Step(
        body=body / share,
        experts=experts * _touched(architecture, tokens) / share,
        lm_head=_screened(profile, model, ours, tokens) or _head(architecture, weights) / share,
        draft=drafted * _draft_pass(profile, model, sequences) / share,
        kv=sequences * _kv_bytes(profile, model, context) / share,
        state=sequences * _state_bytes(profile, model) / share,
    )


def expected_share(total: int, active: int, tokens: float) -> float:
    """Share of a layer's experts that ``tokens`` tokens touch, if each picks ``active`` of ``total`` at random."""
    return 1 - math.pow(1 - active / total, tokens)


def _touched(architecture: Architecture, tokens: float) -> float:
    experts = architecture.experts
    return expected_share(experts.total, experts.active, tokens) if experts else 1.0


def _head(architecture: Architecture, weights: Weights) -> int:
    """Output projection: a tensor of its own, or the embedding."""
    own = 0 if architecture.tied_embeddings else weights.size(Part.LM_HEAD)
    return own or weights.size(Part.EMBEDDING)


def _screened(profile: Profile, model: Model, ours: frozenset[str], tokens: float) -> float:
    """What our head reads on one node, 0 where the engine takes the whole one: always where drafts are verified."""
    if profile.speculative or kernels.LM_HEAD not in ours or tokens > kernels.MAX_TOKENS:
        return 0
    architecture = model.architecture
    if not screened_bytes(profile, architecture, model.weights):
        return 0
    rows = math.ceil(architecture.vocabulary / profile.nodes)
    return kernels.screened_step_bytes(rows, architecture.hidden, tokens)


def _draft_pass(profile: Profile, model: Model, sequences: float) -> float:
    speculative = profile.speculative
    if speculative is None or speculative.method == "ngram":
        return 0.0
    head = _head(model.architecture, model.weights)
    if model.draft is not None and model.draft_weights is not None:
        own = model.draft_weights
        body = own.size(Part.BODY) + own.size(Part.DRAFT)
        routed = own.size(Part.EXPERTS) + own.size(Part.DRAFT_EXPERTS)
        # Without a head of its own a draft uses its target's, unless its embedding is one.
        mine = own.size(Part.LM_HEAD) or model.draft.tied_embeddings * own.size(Part.EMBEDDING)
        # Block drafters (DFlash, DSpark) propose all tokens in one pass.
        block = speculative.method in {"dflash", "dspark"}
        passes, tokens = (1 / speculative.tokens, speculative.tokens) if block else (1.0, 1)
        return passes * (body + routed * _touched(model.draft, sequences * tokens) + (mine or head))
    routed = model.weights.size(Part.DRAFT_EXPERTS)
    return model.weights.size(Part.DRAFT) + routed * _touched(model.architecture, sequences) + head


def _kv_bytes(profile: Profile, model: Model, context: float) -> float:
    element = DTYPE_BYTES.get(model.architecture.dtype, 2)
    total = 0.0
    for layer, count in model.architecture.layers:
        if isinstance(layer, Attention):
            seen = min(layer.window, context) if layer.window else context
            size = bytes_per_head(layer, profile.kv_cache_dtype, element)
            total += count * layer.kv_heads * size * seen
    return total


def _state_bytes(profile: Profile, model: Model) -> float:
    element = DTYPE_BYTES.get(model.architecture.dtype, 2)
    state = DTYPE_BYTES.get(profile.state_dtype or model.architecture.state_dtype, element)
    total = 0
    for layer, count in model.architecture.layers:
        if isinstance(layer, State):
            total += (
                count
                * 2
                * (layer.state_elements * state + layer.conv_width * layer.conv_rows * element)
            )
    return total


@dataclass(frozen=True)
class Counters:
    """The engine's counters at one moment.

    Attributes:
        at: monotonic clock, in seconds.
        generated: ``vllm:generation_tokens_total``.
        iterations: ``vllm:iteration_tokens_total_count``.
        running: ``vllm:num_requests_running``.
        prompt: ``vllm:prompt_tokens_total``.
        cache_used: ``vllm:kv_cache_usage_perc``, which is a share, 0 to 1.
    """

    at: float
    generated: float
    iterations: float
    running: float
    prompt: float
    cache_used: float = 0.0


@dataclass(frozen=True)
class Achieved:
    """What the engine does, against what the memory allows.

    Attributes:
        tokens_per_second: generated, of all sequences together.
        share: of the bandwidth that decoding uses, 0 to 1.
        limit: tokens per second if that share were 1.
    """

    tokens_per_second: float
    share: float
    limit: float

    def __str__(self) -> str:
        """E.g. ``38.2 tok/s, 71 % of what this memory allows``."""
        return f"{self.tokens_per_second:.1f} tok/s, {self.share:.0%} of what this memory allows".replace(
            "%", " %", 1
        )


def achieved(  # noqa: PLR0913  two readings, and what they are judged by
    before: Counters,
    after: Counters,
    profile: Profile,
    model: Model,
    bandwidth: float,
    *,
    presence: Presence = Presence.NONE,
) -> Achieved | None:
    """How near the engine came between two readings.

    None if nothing was generated, or if prompts were processed in between: prefill is bound by arithmetic, and its
    steps would be counted as slow decoding.

    Args:
        before: the earlier reading.
        after: the later reading.
        profile: as served.
        model: as served.
        bandwidth: of the memory, in bytes per second.
        presence: whether the engine has our kernels.
    """
    seconds = after.at - before.at
    tokens = after.generated - before.generated
    steps = after.iterations - before.iterations
    if seconds <= 0 or tokens <= 0 or steps <= 0 or after.prompt > before.prompt:
        return None
    sequences = max((before.running + after.running) / 2, 1.0)
    context = live_context(before, after, profile, model)
    moved = step(profile, model, context=context, sequences=sequences, presence=presence)
    share = moved.total * steps / seconds / bandwidth
    rate = tokens / seconds
    return Achieved(rate, share, rate / share)


def live_context(before: Counters, after: Counters, profile: Profile, model: Model) -> int:
    """Mean length in tokens of the running sequences, from the blocks of the KV cache that they hold.

    Right to a few blocks; a prompt that sequences share is counted once. 0 where none was running.
    """
    running = before.running + after.running
    if running <= 0:
        return 0
    cache = layout(model.architecture, cache_options(profile), model.draft)
    drafted = profile.speculative.tokens if profile.speculative else 0
    # A sequence that decodes has no more than a step's tokens in flight.
    decoding = replace(cache, in_flight=1 + drafted)
    # The share is of all blocks but vLLM's own (block_pool.py, get_usage).
    each = (
        (before.cache_used + after.cache_used)
        / running
        * (cache.blocks(profile.kv_cache_bytes) - 1)
    )
    return decoding.longest((round(each) + 1) * cache.block_bytes, limit=profile.context)
