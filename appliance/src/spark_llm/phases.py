"""How far a start is, read from what vLLM 0.32.0 itself logs. Pure."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Phase:
    """One step of the engine's start. Attributes: percent: of the whole start, 0 to 100."""

    name: str
    percent: int


STARTED = Phase("starting the engine", 2)
PROVING = Phase("asking the canary", 98)

_MARKS: tuple[tuple[re.Pattern[str], Phase], ...] = (
    (re.compile(r"non-default args"), Phase("reading the configuration", 10)),
    (re.compile(r"Resolved architecture"), Phase("resolving the architecture", 20)),
    (re.compile(r"Initializing a V1 LLM engine"), Phase("starting the engine core", 30)),
    (re.compile(r"Starting to load model"), Phase("loading weights", 40)),
    (re.compile(r"Loading weights took"), Phase("weights are loaded", 70)),
    (re.compile(r"Using cache directory|torch\.compile takes"), Phase("compiling", 72)),
    (re.compile(r"KV cache size"), Phase("allocating the KV cache", 82)),
    (re.compile(r"Graph capturing finished"), Phase("CUDA graphs are captured", 92)),
    (re.compile(r"init engine .* took"), Phase("engine core is up", 94)),
    (re.compile(r"Starting vLLM server on"), Phase("opening the API", 96)),
)
_SHARDS = re.compile(r"Loading \w+ checkpoint shards:\s+(\d+)% Completed")
_GRAPHS = re.compile(r"Capturing CUDA graphs.*?:\s+(\d+)%")


def advance(phase: Phase, line: str) -> Phase:
    """``phase`` after one more log line; never goes back."""
    new = _match(line)
    return new if new is not None and new.percent > phase.percent else phase


def _match(line: str) -> Phase | None:
    if shards := _SHARDS.search(line):
        return Phase("loading weights", 40 + int(shards[1]) * 30 // 100)
    if graphs := _GRAPHS.search(line):
        return Phase("capturing CUDA graphs", 83 + int(graphs[1]) * 9 // 100)
    for pattern, phase in _MARKS:
        if pattern.search(line):
            return phase
    return None
