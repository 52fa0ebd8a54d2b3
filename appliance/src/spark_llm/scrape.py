"""The few numbers that decisions need, out of the engine's Prometheus text. Pure."""

import re

from spark_llm.policy import Sample

_LINE = re.compile(
    r"^(vllm:num_requests_running|vllm:iteration_tokens_total_count)(?:\{[^}]*\})? ([0-9.eE+-]+)$",
    re.MULTILINE,
)


def parse_sample(text: str, at: float) -> Sample | None:
    """A reading; None if the text lacks one of the numbers. Values of several engines are added up."""
    sums: dict[str, float] = {}
    for name, value in _LINE.findall(text):
        sums[name] = sums.get(name, 0.0) + float(value)
    if len(sums) != 2:  # noqa: PLR2004  both names above
        return None
    return Sample(
        at,
        running=round(sums["vllm:num_requests_running"]),
        iterations=round(sums["vllm:iteration_tokens_total_count"]),
    )
