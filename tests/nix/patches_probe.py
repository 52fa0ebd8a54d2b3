"""Ask one vLLM tree what it would do on a GB10, and print the answers as JSON.

Run by test_patches.py with the engine's Python and PYTHONPATH=<tree>, once for the tree as shipped
and once for the patched one. Everything is vLLM's own code but for the facts of the device: NVML's
answers, the device properties, the CUDA extension modules (empty) and what the compiled kernels
say they support.
"""

# vLLM and torch are in the engine's environment, not in the one that is type-checked.
# mypy: disable-error-code="import-not-found,unused-ignore"

import importlib
import json
import os
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from queue import Queue
from typing import Any

import torch
from vllm import platforms
from vllm.third_party import pynvml

GB10_BYTES = 128_524_550_144  # 119.7 GiB, as the CUDA runtime reports it on a DGX Spark
GB10, H100 = (12, 1), (9, 0)
# What the compiled kernels of the CUDA wheel answer on 12.1 (csrc/quantization/w8a8/cutlass/scaled_mm_entry.cu).
KERNEL_ANSWERS = {
    "cutlass_scaled_mm_supports_fp8": True,
    "cutlass_scaled_mm_supports_block_fp8": True,
    "cutlass_group_gemm_supported": False,
}

KERNELS = torch.library.Library("_C", "FRAGMENT")  # its operators live as long as it does


class Device:
    """The GPU that NVML and the CUDA runtime will describe."""

    capability = GB10
    nvml_bytes: int | None = None  # None: NVML answers NOT_SUPPORTED, as on GB10

    @classmethod
    def memory_info(cls, _handle: int) -> types.SimpleNamespace:
        if cls.nvml_bytes is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return types.SimpleNamespace(total=cls.nvml_bytes)

    @classmethod
    def become(cls, capability: tuple[int, int], nvml_bytes: int | None = None) -> None:
        cls.capability, cls.nvml_bytes = capability, nvml_bytes
        from vllm.platforms.cuda import NvmlCudaPlatform
        from vllm.utils import deep_gemm

        vars(NvmlCudaPlatform)["get_device_capability"].__func__.cache_clear()
        deep_gemm.is_deep_gemm_supported.cache_clear()


def fake_device() -> None:
    """Make this process believe in a GPU, before anything asks for the platform."""
    pynvml.nvmlInit = pynvml.nvmlShutdown = lambda: None
    pynvml.nvmlDeviceGetCount = lambda: 1
    pynvml.nvmlDeviceGetHandleByIndex = lambda index: index
    pynvml.nvmlDeviceGetName = lambda _handle: "NVIDIA GB10"
    pynvml.nvmlDeviceGetCudaComputeCapability = lambda _handle: Device.capability
    pynvml.nvmlDeviceGetMemoryInfo = Device.memory_info
    torch.cuda.get_device_properties = lambda _device=0: types.SimpleNamespace(
        total_memory=GB10_BYTES, is_integrated=1, multi_processor_count=48
    )
    for name in ("_C", "_C_stable_libtorch", "_moe_C", "vllm_flash_attn._vllm_fa2_C"):
        sys.modules[f"vllm.{name}"] = types.ModuleType(f"vllm.{name}")
    for name, answer in KERNEL_ANSWERS.items():
        KERNELS.define(f"{name}(int capability) -> bool")
        KERNELS.impl(name, lambda _capability, it=answer: it, "CompositeExplicitAutograd")
    # has_deep_gemm() looks for a package; the CUDA wheel carries one, the CPU wheel does not.
    packages = tempfile.mkdtemp(dir=os.environ["PROBE_TMP"])
    Path(packages, "deep_gemm.py").touch()
    sys.path.append(packages)
    cuda = importlib.import_module("vllm.platforms.cuda")
    platforms._current_platform = cuda.CudaPlatform()


def outcome(question: Callable[[], Any]) -> Any:  # noqa: ANN401  JSON
    """The answer, or the name of what was raised instead."""
    try:
        return question()
    except Exception as error:  # noqa: BLE001  any failure is an answer here
        return type(error).__name__


def total_memory() -> int:
    return int(platforms.current_platform.get_device_total_memory())


def plan_fingerprint_length() -> int:
    from vllm.config import VllmConfig
    from vllm.v1.worker.startup_plan import compute_plan_fingerprint

    return len(compute_plan_fingerprint(VllmConfig(), 0, 1))


def server_defaults() -> list[int]:
    """Default batched tokens and sequences of the API server."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    tokens, sequences = EngineArgs.get_batch_defaults(world_size=1)
    return [tokens[UsageContext.OPENAI_API_SERVER], sequences[UsageContext.OPENAI_API_SERVER]]


def int8_kernel(*, symmetric: bool = True) -> str:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.kernels import linear

    config = linear.Int8ScaledMMLinearLayerConfig(
        is_static_input_scheme=False, is_channelwise=True, input_symmetric=symmetric
    )
    with set_current_vllm_config(VllmConfig()):
        kernel = linear.choose_scaled_mm_linear_kernel(
            config, linear._POSSIBLE_INT8_KERNELS, quantization="int8"
        )
    return str(kernel.__name__)


def fp8_moe_backend(model_type: str) -> str:
    """The backend that block-128 FP8 experts of a model get."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.fused_moe import config as moe
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.oracle.fp8 import select_fp8_moe_backend
    from vllm.model_executor.layers.quantization.utils import quant_utils

    config = VllmConfig()
    config.model_config = types.SimpleNamespace(
        hf_text_config=types.SimpleNamespace(model_type=model_type), dtype=torch.bfloat16
    )
    parallel = moe.FusedMoEParallelConfig(
        **dict.fromkeys(("tp_size", "pcp_size", "dp_size", "ep_size", "sp_size"), 1),
        **dict.fromkeys(("tp_rank", "pcp_rank", "dp_rank", "ep_rank"), 0),
        use_ep=False,
        all2all_backend="allgather_reducescatter",
        enable_eplb=False,
    )
    with set_current_vllm_config(config):
        experts = moe.FusedMoEConfig(
            num_experts=8,
            num_local_experts=8,
            num_logical_experts=8,
            experts_per_token=2,
            hidden_dim=1024,
            intermediate_size=512,
            activation=MoEActivation.SILU,
            device="cpu",
            routing_method=moe.RoutingMethodType.Renormalize,
            moe_parallel_config=parallel,
            in_dtype=torch.bfloat16,
        )
        backend, _ = select_fp8_moe_backend(
            experts, quant_utils.kFp8Static128BlockSym, quant_utils.kFp8Dynamic128Sym
        )
    return str(backend.value)


def modelopt_excludes(**keys: list[str]) -> list[str]:
    from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config

    config = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, **keys}
    return list(ModelOptNvFp4Config.from_config(config).exclude_modules)


def late_refusal() -> str:
    """How the engine core refuses a request that reaches it after the signal."""
    from vllm.v1.engine.core import EngineCoreProc, EngineShutdownState

    core = EngineCoreProc.__new__(EngineCoreProc)
    core.shutdown_state = EngineShutdownState.SHUTTING_DOWN
    core.output_queue = Queue()
    core._reject_add_in_shutdown(types.SimpleNamespace(request_id="late", client_index=0))
    _, outputs = core.output_queue.get_nowait()
    return str(outputs.outputs[0].finish_reason)


def late_refusal_status() -> int:
    """The HTTP status that the API server makes of that refusal."""
    from vllm.entrypoints.generate.base.serving import GenerateBaseServing
    from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

    serving = GenerateBaseServing.__new__(GenerateBaseServing)
    serving.engine_client = types.SimpleNamespace(shutting_down=True)
    try:
        serving._raise_if_error(late_refusal(), "late")
    except Exception as error:  # noqa: BLE001  whatever is raised becomes the response
        return int(create_error_response(error).error.code)
    return 200


def main() -> None:
    fake_device()
    answers: dict[str, Any] = {"tree": str(Path(platforms.__file__).parents[2])}

    Device.become(GB10)
    answers["memory: NVML silent"] = outcome(total_memory)
    answers["startup plan: NVML silent"] = outcome(plan_fingerprint_length)
    answers["defaults: NVML silent"] = outcome(server_defaults)
    answers["int8"] = outcome(int8_kernel)
    answers["int8 asymmetric"] = outcome(lambda: int8_kernel(symmetric=False))
    answers["moe: qwen3_5"] = outcome(lambda: fp8_moe_backend("qwen3_5_moe_text"))
    answers["moe: another model"] = outcome(lambda: fp8_moe_backend("qwen3_moe"))
    os.environ["VLLM_USE_DEEP_GEMM"] = "1"
    answers["moe: qwen3_5, asked for"] = outcome(lambda: fp8_moe_backend("qwen3_5_moe_text"))
    del os.environ["VLLM_USE_DEEP_GEMM"]
    Device.become(GB10, nvml_bytes=GB10_BYTES)
    answers["memory: NVML answers"] = outcome(total_memory)
    answers["defaults: NVML answers"] = outcome(server_defaults)
    Device.become(H100, nvml_bytes=80 << 30)
    answers["defaults: H100"] = outcome(server_defaults)
    answers["int8: H100"] = outcome(int8_kernel)

    answers["modelopt: exclude_modules"] = outcome(
        lambda: modelopt_excludes(exclude_modules=["mtp*"])
    )
    answers["modelopt: ignore"] = outcome(lambda: modelopt_excludes(ignore=["lm_head"]))
    answers["modelopt: both"] = outcome(
        lambda: modelopt_excludes(ignore=["lm_head"], exclude_modules=["mtp*"])
    )
    answers["drain: late refusal"] = outcome(late_refusal)
    answers["drain: its status"] = outcome(late_refusal_status)
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
