"""Run by test_plugin_engine.py in the engine's environment: greedy tokens of a model, and what the plugin did.

python engine_tokens.py MODEL  ->  one JSON line on stdout
"""

import json
import sys
from importlib.metadata import entry_points
from typing import Any


def main() -> None:
    """Generate in this process and print what came out."""
    from vllm.model_executor.layers import linear

    untouched = linear.UnquantizedLinearMethod.process_weights_after_loading
    from vllm import LLM, SamplingParams

    llm = LLM(
        sys.argv[1],
        skip_tokenizer_init=True,
        max_model_len=256,
        max_num_seqs=4,
        kv_cache_memory_bytes=64 << 20,
        enforce_eager=True,
        disable_log_stats=True,
    )
    params = SamplingParams(
        temperature=0, max_tokens=24, ignore_eos=True, detokenize=False, logprobs=3
    )
    prompts: list[Any] = [
        {"prompt_token_ids": [5 + 7 * i + j for j in range(12)]} for i in range(3)
    ]
    outputs = [o.outputs[0] for o in llm.generate(prompts, params, use_tqdm=False)]
    found = {
        "tokens": [list(o.token_ids) for o in outputs],
        "logprobs": [
            [sorted((t, p.logprob) for t, p in step.items()) for step in o.logprobs]
            for o in outputs
        ],
        "entry_points": [
            e.value for e in entry_points(group="vllm.general_plugins") if e.name == "spark_kernels"
        ],
        "plugin_ran": "spark_kernels.plugin" in sys.modules,
        "hooks_loaded": "spark_kernels.vllm_hooks" in sys.modules,
        "untouched": linear.UnquantizedLinearMethod.process_weights_after_loading is untouched,
    }
    print("RESULT " + json.dumps(found))


if __name__ == "__main__":
    main()
