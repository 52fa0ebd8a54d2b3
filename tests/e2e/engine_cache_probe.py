"""Starts real vLLM engines, one after another, and writes down what each reports of its KV cache.

Run by the engine's own interpreter: ``python engine_cache_probe.py CASES.json FOLDER``.
"""

import copy
import gc
import json
import os
import sys
from pathlib import Path

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # one process: the cache's configuration can be read
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
)

from vllm import LLM
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.model_executor.models import registry
from vllm.v1.core.kv_cache_utils import get_kv_cache_configs

# vLLM looks at each model class in a new process of 10 s; here this one may import them all.
registry._run_in_subprocess = lambda inspect: inspect()


def least_bytes(engine: LLM, high: int) -> int:
    """Smallest cache that vLLM's own check accepts for one sequence of the whole context."""
    core = engine.llm_engine.engine_core.engine_core
    specs = core.model_executor.get_kv_cache_specs()
    low = 0
    while low + 1 < high:
        middle = (low + high) // 2
        config = engine.llm_engine.vllm_config
        try:
            get_kv_cache_configs(config, copy.deepcopy(specs), [middle])
            high = middle
        except ValueError:
            low = middle
    return high


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    reported = {}
    for name, case in cases.items():
        folder = Path(sys.argv[2]) / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(case["config"]))
        engine = LLM(
            model=str(folder),
            load_format="dummy",
            skip_tokenizer_init=True,
            enforce_eager=True,
            **case["engine"],
        )
        config = engine.llm_engine.vllm_config
        reported[name] = {
            "blocks": config.cache_config.num_gpu_blocks,
            "tokens": config.cache_config.kv_cache_size_tokens,
            "sequences": config.cache_config.kv_cache_max_concurrency,
            "in_flight": config.max_in_flight_tokens,
            "least_bytes": least_bytes(engine, case["engine"]["kv_cache_memory_bytes"]),
        }
        del engine
        gc.collect()
        cleanup_dist_env_and_memory()
    (Path(sys.argv[2]) / "reported.json").write_text(json.dumps(reported))


main()
