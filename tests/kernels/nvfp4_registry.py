"""Run by test_nvfp4_vllm.py in the engine's environment: what nvfp4's registration changes in vLLM."""

import json
import sys
import types

import torch
from vllm.model_executor.kernels import linear as registry
from vllm.platforms import PlatformEnum


def layer(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> types.SimpleNamespace:
    """Return what the hook reads of a loaded layer."""
    return types.SimpleNamespace(weight=weight, weight_scale=scale, params_dtype=dtype)


def main() -> None:
    """Register twice and print what vLLM then holds."""
    from spark_kernels.nvfp4 import vllm as hook

    marlin = hook.MarlinNvFp4LinearKernel
    order_before = list(registry._POSSIBLE_NVFP4_KERNELS[PlatformEnum.CUDA])
    hook.register({})
    hook.register({})
    ours = hook.SparkNvFp4LinearKernel
    order = registry._POSSIBLE_NVFP4_KERNELS[PlatformEnum.CUDA]
    # vLLM refuses Marlin without a GPU; the selection itself is what is asked here.
    ours.is_supported = classmethod(lambda _cls, _capability=None: (True, None))
    codes, scale = torch.zeros(64, 32, dtype=torch.uint8), torch.zeros(64, 4, dtype=torch.uint8)
    found = {
        "same_place": [ours if k is marlin else k for k in order_before] == order,
        "by_name": registry._LINEAR_BACKEND_KERNEL_MAP["marlin"] >= {ours}
        and marlin not in registry._LINEAR_BACKEND_KERNEL_MAP["marlin"],
        "weight_only": type(registry.init_nvfp4_linear_kernel(use_a16=True)).__name__,
        "is_marlin": issubclass(ours, marlin),
        "on_cpu": hook.why_not(layer(codes, scale, torch.bfloat16)),
        "float32": hook.why_not(layer(codes, scale, torch.float32)),
    }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
