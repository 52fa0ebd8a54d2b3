"""The engine's command line and environment, from a profile. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from spark_llm.errors import ConfigError
from spark_llm.profile import Profile
from spark_llm.reason import Reason

SOCKET_PATH_LIMIT = 107
"""Longest path of a Unix socket in bytes: ``sun_path`` has 108, one for the final NUL (unix(7))."""

_PASSED_ON = ("PATH", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES")

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
    # The compiled-artifact load of 0.32.0 fails ("'function' object has no attribute 'finalize_loading'",
    # compilation/decorators.py:315) and then compiles everything again, at every start.
    "VLLM_USE_AOT_COMPILE": "0",
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

    Raises:
        ConfigError: the socket's path is too long for the kernel.
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
        "-m",
        "vllm.entrypoints.cli.main",
        "serve",
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
        *profile.flags,
    )
    environment = {name: inherited[name] for name in _PASSED_ON if name in inherited}
    environment |= {"HOME": str(home), **_ALWAYS, **caches, **profile.environment}
    return Argv(args, environment)


def served_names(profile: Profile) -> tuple[str, ...]:
    """Names the model answers to; the first is the one that answers carry."""
    return tuple(dict.fromkeys((profile.name, *profile.aliases, profile.model, "default")))
