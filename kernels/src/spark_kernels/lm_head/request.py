"""How many top logits a request needs: a pure reading of vLLM's sampling parameters."""

from collections.abc import Iterable
from typing import Protocol

FULL = 0  # all logits


class Sampling(Protocol):
    """The fields of vLLM 0.32.0's SamplingParams that change which logits matter."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logprobs: int | None
    logprob_token_ids: object
    min_tokens: int
    logit_bias: object
    allowed_token_ids: object
    bad_words: object
    extra_args: object
    thinking_token_budget: object


def request_top_k(params: Sampling, limit: int) -> int:
    """Return 1 for greedy, k for sampling from the top k alone, FULL for everything else.

    Penalties, biases, token lists, log probabilities and custom processors see the whole
    vocabulary; so do nucleus and min-p sampling, whose cut depends on the sum over all rows.
    """
    touched = (
        params.presence_penalty != 0
        or params.frequency_penalty != 0
        or params.repetition_penalty != 1
        or params.min_tokens > 0
        or any(
            (
                params.logit_bias,
                params.allowed_token_ids,
                params.bad_words,
                params.extra_args,
                getattr(params, "thinking_token_budget", None) is not None,
                params.logprobs is not None,
                getattr(params, "logprob_token_ids", None),
            )
        )
    )
    if touched:
        return FULL
    if params.temperature == 0:
        return 1
    only_top_k = 1 <= params.top_k <= limit and params.top_p == 1 and params.min_p == 0
    return params.top_k if only_top_k else FULL


def batch_top_k(requests: Iterable[int]) -> int:
    """Return the largest need of a step's requests; FULL if one needs all, or there are none."""
    needs = list(requests)
    return FULL if not needs or FULL in needs else max(needs)
