"""Run by test_compiled_layers.py in the engine's environment: the key by which vLLM finds a compiled graph again.

Arguments: what each layer of ours said the graph depends on; none is an engine without our kernels.
"""

import json
import sys

from vllm.compilation.caching import aot_compile_hash_factors
from vllm.config import VllmConfig


def main() -> None:
    """Print the factors that vLLM hashes before it looks for a compiled graph."""
    if facts := sys.argv[1:]:
        from spark_kernels import vllm_hooks

        for fact in facts:
            vllm_hooks.graph_depends_on(*fact.split())
    json.dump(str(aot_compile_hash_factors(VllmConfig())), sys.stdout)


if __name__ == "__main__":
    main()
