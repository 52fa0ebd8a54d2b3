"""The few numbers that decisions need, out of the engine's Prometheus text. Pure."""

import re

from spark_llm.roofline import Counters

_NAMES = {
    "vllm:num_requests_running": "running",
    "vllm:iteration_tokens_total_count": "iterations",
    "vllm:generation_tokens_total": "generated",
    "vllm:prompt_tokens_total": "prompt",
    "vllm:kv_cache_usage_perc": "cache_used",
}
_NEEDED = {"running", "iterations"}
_LINE = re.compile(
    rf"^({'|'.join(_NAMES)})(?:\{{[^}}]*\}})? ([0-9.eE+-]+)$",
    re.MULTILINE,
)


def parse_counters(text: str, at: float) -> Counters | None:
    """A reading; None if the text lacks what liveness needs. Values of several engines are added up.

    Args:
        text: Prometheus text format.
        at: monotonic clock when it was read, in seconds.
    """
    sums = dict.fromkeys(_NAMES.values(), 0.0)
    found = set()
    for name, value in _LINE.findall(text):
        sums[_NAMES[name]] += float(value)
        found.add(_NAMES[name])
    return Counters(at=at, **sums) if found >= _NEEDED else None
