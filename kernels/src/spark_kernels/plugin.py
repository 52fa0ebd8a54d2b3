"""The vLLM plugin: registers the kernels that the policy turns on, and never breaks the engine.

vLLM calls ``register`` in every process (API, engine core, workers), perhaps more than once. It must
not initialise CUDA: the platform's capability comes from NVML.
"""

import importlib
import logging
import os
from collections.abc import Mapping

from spark_kernels import __version__, policy

logger = logging.getLogger("vllm.spark_kernels")  # below vLLM's logger: its handlers, its level
_registered: set[str] = set()


def _capability() -> tuple[int, int] | None:
    from vllm.platforms import current_platform  # noqa: PLC0415 - vLLM is optional for this package

    if not current_platform.is_cuda():
        return None
    found = current_platform.get_device_capability()
    return None if found is None else (found.major, found.minor)


def _announce_later(lines: list[str]) -> None:
    """Log ``lines`` when the first layer is loaded: vLLM sets up its log only after its plugins ran."""
    try:
        from spark_kernels import vllm_hooks  # noqa: PLC0415 - as above
    except Exception as error:  # noqa: BLE001 - another vLLM: the kernels that need the hooks say so too
        logger.warning("spark_kernels: no hooks into this vLLM: %s", error)
        return

    def announce(_: object) -> None:
        while lines:
            logger.info(lines.pop(0))

    vllm_hooks.after_loading(announce)


def _register_row(decision: policy.Decision, lines: list[str]) -> None:
    row = decision.row
    if row.kernel is None or row.entry is None or row.kernel in _registered:
        return
    module, function = row.entry.split(":")
    try:
        getattr(importlib.import_module(module), function)(row.options)
    except Exception as error:  # noqa: BLE001 - whatever is missing, the engine goes on without it
        logger.warning(
            "spark_kernels: %s stays off: %s: %s", row.kernel, type(error).__name__, error
        )
        return
    _registered.add(row.kernel)
    served = f"{row.kernel} serves {row.operation} ({decision.reason})"
    lines.append(f"spark_kernels {__version__}: {served}")


def register(environ: Mapping[str, str] = os.environ) -> None:
    """Entry point ``vllm.general_plugins``: register what the policy turns on for this machine."""
    try:
        capability = _capability()
        if capability is None:
            return
        rows = policy.load_rows()
        switches = policy.parse_switches(environ.get(policy.VARIABLE, ""), policy.kernels(rows))
    except Exception as error:  # noqa: BLE001 - as above
        logger.warning("spark_kernels is off: %s", error)
        return
    decisions = [policy.decide(row, switches, capability) for row in rows]
    on = [d for d in decisions if d.on and d.row.kernel not in _registered]
    lines: list[str] = []
    if on:
        _announce_later(lines)
    for decision in on:
        _register_row(decision, lines)
