"""Engine flags that a profile may not set, because the appliance sets or counts them itself. Pure.

The last of two equal flags wins in vLLM, so one more of them in ``flags`` would silently replace
what the ledger counted. Its parser (``vllm/utils/argparse_utils.py``) takes a flag in many
spellings: with underscores, with ``=``, as one key of a table
(``--speculative-config.num_speculative_tokens``), and, like every argparse, by its beginning.
"""

import re

_OWN_KEYS = {
    "--model": "model",
    "--revision": "revision",
    "--served-model-name": "aliases",
    "--max-model-len": "context",
    "--max-num-seqs": "max_num_seqs",
    "--max-num-batched-tokens": "max_num_batched_tokens",
    "--kv-cache-dtype": "kv_cache_dtype",
    "--kv-cache-dtype-skip-layers": "kv_cache_dtype",
    "--kv-cache-memory-bytes": "kv_cache_bytes",
    "--num-gpu-blocks-override": "kv_cache_bytes",
    "--gpu-memory-utilization": "kv_cache_bytes",
    "--device-memory-utilization": "kv_cache_bytes",
    "--block-size": "block_size",
    "--mamba-cache-dtype": "state_dtype",
    "--mamba-ssm-cache-dtype": "state_dtype",
    "--enable-prefix-caching": "prefix_caching",
    "--no-enable-prefix-caching": "prefix_caching",
    "--enforce-eager": "eager",
    "--no-enforce-eager": "eager",
    "--load-format": "load_format",
    "--tool-call-parser": "tool_parser",
    "--enable-auto-tool-choice": "tool_parser",
    "--no-enable-auto-tool-choice": "tool_parser",
    "--reasoning-parser": "reasoning_parser",
    "--attention-backend": "backends.attention",
    "--linear-backend": "backends.linear",
    "--moe-backend": "backends.moe",
    "--speculative-config": "speculative",
    "--spec-method": "speculative",
    "--spec-model": "speculative",
    "--spec-tokens": "speculative",
    "-sc": "speculative",
    "-s": "speculative",  # the beginning of -sc alone
    "--tensor-parallel-size": "nodes",
    "--pipeline-parallel-size": "nodes",
    "--data-parallel-size": "nodes",
    "--decode-context-parallel-size": "nodes",
    "--prefill-context-parallel-size": "nodes",
    "--nnodes": "nodes",
    "-tp": "nodes",
    "-t": "nodes",  # the beginning of -tp alone
    "-pp": "nodes",
    "-dp": "nodes",
    "-dcp": "nodes",
    "-pcp": "nodes",
    "-n": "nodes",
    "--host": "gateway.host",
    "--port": "gateway.port",
    "--uds": "gateway.port",
    "--grpc": "gateway.port",
    "--api-key": "spark-llm keys",
    "--shutdown-timeout": "engine.drain_timeout_s",
}
"""Flags that contradict a key of the profile or the appliance, and that key."""

_OFFLOAD = "memory is unified: what is offloaded takes as much of it, and is not counted"
_UNCOUNTED = {
    "--config": "name its flags one by one, so that they can be checked",
    "--dtype": "weights and KV cache are counted in the model's own dtype",
    "--disable-hybrid-kv-cache-manager": "the KV cache is counted in groups of layers",
    "--cpu-offload-gb": _OFFLOAD,
    "--cpu-offload-params": _OFFLOAD,
    "--kv-offloading-backend": _OFFLOAD,
    "--kv-offloading-size": _OFFLOAD,
    "--kv-transfer-config": _OFFLOAD,
    "--offload-backend": _OFFLOAD,
    "--offload-group-size": _OFFLOAD,
    "--offload-num-in-group": _OFFLOAD,
    "--offload-params": _OFFLOAD,
    "--offload-prefetch-step": _OFFLOAD,
}
"""Flags that no key stands for and that the ledger cannot follow, and why."""

REFUSED = {flag: f"use the key {key!r}" for flag, key in _OWN_KEYS.items()} | _UNCOUNTED
"""All of them, and what to do instead."""


def refusal(argument: str) -> str:
    """Why ``argument`` cannot stand in a profile's ``flags``; empty if it can.

    Args:
        argument: a flag in any spelling that vLLM 0.32.0 takes, or the value of one.
    """
    name = re.split(r"[.=]", argument, maxsplit=1)[0].replace("_", "-")
    if name.startswith("--"):
        found = [flag for flag in REFUSED if flag.startswith(name)]
    elif name.startswith("-"):
        found = [flag for flag in (name, name[:2]) if flag in REFUSED]  # -n2 is -n 2
    else:
        found = []
    # Of several that begin so, the flag itself if it is one: --kv-cache-dtype begins two.
    return REFUSED[min(found, key=len)] if found else ""
