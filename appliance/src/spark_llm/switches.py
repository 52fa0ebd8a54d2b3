"""The switches of the command line that change a profile for one run. Pure."""

from typing import Any

from spark_llm.errors import ConfigError
from spark_llm.profile import Profile, validate
from spark_llm.reason import Reason

TURBOQUANT = "turboquant_4bit_nc"
"""What ``--tq`` means: 4-bit K and V, half the bytes of fp8. Its authors give +2.7 % perplexity
(vLLM's turboquant/config.py)."""


def adjust(  # noqa: PLR0913  one keyword per switch of the command line
    profile: Profile,
    *,
    context: int | None = None,
    max_num_seqs: int | None = None,
    kv_cache_bytes: int | None = None,
    turboquant: bool = False,
    debug: bool = False,
    mtp: bool | None = None,
) -> Profile:
    """``profile`` with a person's switches applied.

    Args:
        profile: as read.
        context: ``--context``.
        max_num_seqs: ``--seqs``.
        kv_cache_bytes: ``--kv-cache-bytes``.
        turboquant: ``--tq``, a compressed KV cache.
        debug: ``--debug``, eager mode.
        mtp: ``--no-mtp`` (False) removes speculative decoding; ``--mtp`` (True) demands it.

    Raises:
        ConfigError: the switch contradicts the profile.
    """
    changes: dict[str, Any] = {}
    if context is not None:
        changes["context"] = context
    if max_num_seqs is not None:
        changes["max_num_seqs"] = max_num_seqs
    if kv_cache_bytes is not None:
        changes["kv_cache_bytes"] = kv_cache_bytes
    if debug:
        changes["eager"] = True
    if turboquant:
        changes["kv_cache_dtype"] = TURBOQUANT
        changes["backends"] = {**profile.backends.model_dump(), "attention": "TURBOQUANT"}
    if mtp is False:
        changes["speculative"] = None
    if mtp and profile.speculative is None:
        raise ConfigError(
            f"profile {profile.name} has no [speculative] table, so --mtp has nothing to switch on",
            reason=Reason.BAD_PROFILE,
            hint="`spark-llm profiles` shows which profiles speculate.",
        )
    return validate(profile.name, {**profile.model_dump(), **changes}, f"profile {profile.name}")
