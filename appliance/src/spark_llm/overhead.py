"""What an engine takes beside weights and KV cache: the figures of memory.toml, per build."""

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from spark_llm.profile import Engine


@dataclass(frozen=True)
class Overhead:
    """What an engine takes beside weights and KV cache, in bytes; numbers and sources in memory.toml."""

    runtime_bytes: int
    runtime_source: str
    graph_bytes: int
    graph_source: str
    shared_bytes: int
    shared_source: str
    block_size: int
    load_factor: float
    margin_share: float
    margin_bytes: int


@cache
def overhead(engine: Engine) -> Overhead:
    """Overhead of one build of the engine, from memory.toml."""
    table = tomllib.loads(files("spark_llm").joinpath("memory.toml").read_text(encoding="utf-8"))
    return Overhead(**table[engine.value])
