"""The engine's command line and environment, from a profile. Pure."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from spark_llm.errors import ConfigError
from spark_llm.profile import Engine, Profile
from spark_llm.reason import Reason

SOCKET_PATH_LIMIT = 107
"""Longest path of a Unix socket in bytes: ``sun_path`` has 108, one for the final NUL (unix(7))."""

_PASSED_ON = ("PATH", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES")

_COMMAND = ("-m", "vllm.entrypoints.cli.main", "serve")
"""Between the interpreter and the model's folder."""

_ALWAYS = {
    "HF_HUB_OFFLINE": "1",  # only `spark-llm pull` talks to the hub
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "PYTHONUNBUFFERED": "1",  # phases are read from its log as they happen
    "VLLM_LOGGING_COLOR": "0",
    "NO_COLOR": "1",
    "VLLM_HOST_IP": "127.0.0.1",  # its message queues would otherwise bind the machine's first address
}

_CPU = {
    # On the CPU platform the compiled-artifact load of 0.32.0 fails ("'function' object has no attribute
    # 'finalize_loading'", compilation/decorators.py:315) and everything is compiled again, at every start.
    "VLLM_USE_AOT_COMPILE": "0",
}

_CUDA = {
    # Without it FlashInfer's fast decode (XQA) hangs on a probe of the vendor's server, and is lost offline
    # (vllm/utils/flashinfer.py, has_nvidia_artifactory).
    "VLLM_HAS_FLASHINFER_CUBIN": "1",
    # DeepGEMM compiles its kernels with nvcc at run time, and an unpatched 0.32.0 does not keep block-FP8 MoE off it,
    # where it loses accuracy (fused_moe/oracle/fp8.py; patch 0003 of vllm-gb10).
    "VLLM_USE_DEEP_GEMM": "0",
    "MAX_JOBS": "4",  # a first start's compilers share the memory with the model
}


@dataclass(frozen=True)
class Argv:
    """What to execute.

    Attributes:
        args: program and arguments.
        environment: the whole environment; nothing else is inherited.
    """

    args: tuple[str, ...]
    environment: dict[str, str]

    @property
    def flags(self) -> tuple[str, ...]:
        """What follows the command and the model's folder."""
        return self.args[len(_COMMAND) + 2 :]


def build(  # noqa: PLR0913  one argument per fact that the command line is made of
    profile: Profile,
    *,
    python: Path,
    model: Path,
    socket: Path,
    home: Path,
    shutdown_timeout_s: float,
    inherited: Mapping[str, str],
    caches: Mapping[str, str],
    gpu_memory_utilization: float | None = None,
    draft: Path | None = None,
) -> Argv:
    """Command line and environment of the engine.

    Args:
        profile: what to serve.
        python: interpreter that has vLLM.
        model: folder of the verified model.
        socket: Unix socket the engine shall listen on.
        home: folder the engine may write to; its HOME.
        shutdown_timeout_s: time running requests have when the engine itself is told to stop, in seconds. vLLM's own
            default is 0, which aborts them.
        inherited: the caller's environment; only a few harmless names are passed on, so no token or key can be.
        caches: variables that send every cache below one namespace.
        gpu_memory_utilization: the ledger's share for the engine's own start check; None leaves it to vLLM.
        draft: folder of the verified draft model, where the profile has one.

    Raises:
        ConfigError: the socket's path is too long for the kernel, or the draft's folder is missing.
    """
    if len(str(socket).encode()) > SOCKET_PATH_LIMIT:
        raise ConfigError(
            f"the engine's socket path is too long ({len(str(socket).encode())} bytes, the limit is "
            f"{SOCKET_PATH_LIMIT}): {socket}",
            reason=Reason.SOCKET_PATH_TOO_LONG,
            hint="Set paths.runtime to a shorter folder.",
        )
    args = (
        str(python),
        *_COMMAND,
        str(model),
        "--served-model-name",
        *served_names(profile),
        "--uds",
        str(socket),
        "--max-model-len",
        str(profile.context),
        "--max-num-seqs",
        str(profile.max_num_seqs),
        "--max-num-batched-tokens",
        str(profile.max_num_batched_tokens),
        "--kv-cache-dtype",
        profile.kv_cache_dtype,
        "--kv-cache-memory-bytes",
        str(profile.kv_cache_bytes),
        "--shutdown-timeout",
        str(round(shutdown_timeout_s)),
        "--disable-uvicorn-access-log",  # the gateway writes one line per request already
        *_options(profile, draft),
        *(
            ("--gpu-memory-utilization", str(gpu_memory_utilization))
            if gpu_memory_utilization is not None
            else ()
        ),
        *profile.flags,
    )
    environment = {name: inherited[name] for name in _PASSED_ON if name in inherited}
    platform = _CUDA if profile.engine is Engine.CUDA else _CPU
    environment |= {"HOME": str(home), **_ALWAYS, **platform, **caches, **profile.environment}
    return Argv(args, environment)


def _options(profile: Profile, draft: Path | None) -> list[str]:
    """Flags of the profile's optional keys; a key at its default adds none."""
    valued = {
        "--block-size": profile.block_size or "",
        "--mamba-ssm-cache-dtype": profile.state_dtype,
        "--load-format": profile.load_format,
        "--tool-call-parser": profile.tool_parser,
        "--reasoning-parser": profile.reasoning_parser,
        "--attention-backend": profile.backends.attention,
        "--linear-backend": profile.backends.linear,
        "--moe-backend": profile.backends.moe,
        "--tensor-parallel-size": profile.nodes if profile.nodes > 1 else "",
        "--speculative-config": _speculative_config(profile, draft),
    }
    switched = {
        "--enable-auto-tool-choice": bool(profile.tool_parser),
        "--enforce-eager": profile.eager,
        "--enable-prefix-caching": profile.prefix_caching,
        "--no-enable-prefix-caching": not profile.prefix_caching,
    }
    options = [item for name, value in valued.items() if value != "" for item in (name, str(value))]
    return options + [name for name, on in switched.items() if on]


def _speculative_config(profile: Profile, draft: Path | None) -> str:
    speculative = profile.speculative
    if speculative is None:
        return ""
    if speculative.model and draft is None:
        raise ConfigError(
            f"the draft model {speculative.model} of profile {profile.name} is not there",
            reason=Reason.MODEL_MISSING,
            hint="`spark-llm pull` fetches it; `--no-mtp` serves without it.",
        )
    config: dict[str, str | int] = {"method": speculative.method}
    if draft is not None and speculative.model:
        config["model"] = str(draft)
    config["num_speculative_tokens"] = speculative.tokens
    if speculative.moe_backend:
        config["moe_backend"] = speculative.moe_backend
    return json.dumps(config, separators=(",", ":"))


def served_names(profile: Profile) -> tuple[str, ...]:
    """Names the model answers to; the first is the one that answers carry."""
    return tuple(dict.fromkeys((profile.name, *profile.aliases, profile.model, "default")))
