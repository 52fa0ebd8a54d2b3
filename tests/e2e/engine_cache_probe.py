"""Starts real vLLM engines, one after another, and writes down what each reports of its KV cache.

Run by the engine's own interpreter: ``python engine_cache_probe.py CASES.json FOLDER``.
"""

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

# vLLM looks at each model class in a new process of 10 s; here this one may import them all.
registry._run_in_subprocess = lambda inspect: inspect()


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
        }
        del engine
        gc.collect()
        cleanup_dist_env_and_memory()
    (Path(sys.argv[2]) / "reported.json").write_text(json.dumps(reported))


main()
