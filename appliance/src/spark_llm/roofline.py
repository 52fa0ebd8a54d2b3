"""How fast this memory allows decoding to be, and how near the engine comes. Pure.

A decode step at small batch does little arithmetic and has to read every active weight once; bytes moved
per step over bytes per second is therefore the floor of its duration.
"""

import math
from dataclasses import dataclass

from spark_llm.architecture import DTYPE_BYTES, Attention, State
from spark_llm.kv_cache import bytes_per_head
from spark_llm.ledger import Model
from spark_llm.padding import expert_growth
from spark_llm.profile import Profile
from spark_llm.weights import Part


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


def step(profile: Profile, model: Model, *, sequences: float = 1, context: int = 1024) -> Step:
    """Bytes of one step.

    Args:
        profile: KV dtype, speculation and nodes.
        model: the served model.
        sequences: decoded together.
        context: mean length of them, in tokens.
    """
    architecture, weights = model.architecture, model.weights
    drafted = profile.speculative.tokens if profile.speculative else 0
    head = weights.size(Part.LM_HEAD)
    if architecture.tied_embeddings or not head:
        head = weights.size(Part.EMBEDDING)
    experts = weights.size(Part.EXPERTS) * expert_growth(
        architecture, profile.backends.moe, profile.nodes
    )
    if architecture.experts:
        tokens = sequences * (1 + drafted)
        experts *= expected_share(architecture.experts.total, architecture.experts.active, tokens)
    share = profile.nodes
    return Step(
        body=weights.size(Part.BODY) / share,
        experts=experts / share,
        lm_head=head / share,
        draft=drafted * _draft_pass(profile, model, head) / share,
        kv=sequences * _kv_bytes(profile, model, context) / share,
        state=sequences * _state_bytes(profile, model) / share,
    )


def expected_share(total: int, active: int, tokens: float) -> float:
    """Share of a layer's experts that ``tokens`` tokens touch, if each picks ``active`` of ``total`` at random."""
    return 1 - math.pow(1 - active / total, tokens)


def _draft_pass(profile: Profile, model: Model, head: int) -> float:
    speculative = profile.speculative
    if speculative is None or speculative.method == "ngram":
        return 0.0
    if model.draft_weights is not None:
        own = model.draft_weights
        body = own.size(Part.BODY) + own.size(Part.EXPERTS) + own.size(Part.DRAFT)
        # Block drafters (DFlash, DSpark) propose all tokens in one pass.
        passes = 1 / speculative.tokens if speculative.method in {"dflash", "dspark"} else 1.0
        return passes * (body + (own.size(Part.LM_HEAD) or head))
    draft = float(model.weights.size(Part.DRAFT))
    if experts := model.architecture.experts:
        draft *= experts.active / experts.total
    return draft + head


def _kv_bytes(profile: Profile, model: Model, context: int) -> float:
    element = DTYPE_BYTES.get(model.architecture.dtype, 2)
    total = 0
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
    """

    at: float
    generated: float
    iterations: float
    running: float
    prompt: float


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


def achieved(
    before: Counters, after: Counters, profile: Profile, model: Model, bandwidth: float
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
    """
    seconds = after.at - before.at
    tokens = after.generated - before.generated
    steps = after.iterations - before.iterations
    if seconds <= 0 or tokens <= 0 or steps <= 0 or after.prompt > before.prompt:
        return None
    sequences = max((before.running + after.running) / 2, 1.0)
    share = step(profile, model, sequences=sequences).total * steps / seconds / bandwidth
    rate = tokens / seconds
    return Achieved(rate, share, rate / share)
