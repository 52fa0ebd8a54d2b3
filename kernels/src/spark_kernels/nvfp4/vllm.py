"""nvfp4 in vLLM 0.32.0: weight-only NVFP4 layers, in the place that vLLM gives to Marlin.

``init_nvfp4_linear_kernel(use_a16=True)`` names its kernels in a literal tuple and forces Marlin
outside SM 10.x, so a registered class is never asked. The name it looks up is rebound instead: to a
subclass of Marlin's that takes the layers it can and leaves the others to Marlin.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.kernels import linear as registry
from vllm.model_executor.kernels.linear.nvfp4.marlin import MarlinNvFp4LinearKernel
from vllm.platforms import PlatformEnum

from spark_kernels import build, vllm_hooks
from spark_kernels.nvfp4 import api
from spark_kernels.nvfp4.packing import GROUP

if TYPE_CHECKING:
    from collections.abc import Mapping

logger = logging.getLogger("vllm.spark_kernels")


def why_not(layer: torch.nn.Module) -> str | None:
    """Say why a loaded layer stays with Marlin; None if it need not."""
    weight, scale = layer.weight, layer.weight_scale
    if layer.params_dtype not in {torch.bfloat16, torch.float16}:
        return f"activations are {layer.params_dtype}"
    if not weight.is_cuda or weight.dtype is not torch.uint8 or weight.dim() != 2:  # noqa: PLR2004
        return f"weight is {weight.dtype} {tuple(weight.shape)} on {weight.device}"
    if weight.shape[1] * 2 % GROUP or tuple(scale.shape) != (
        weight.shape[0],
        weight.shape[1] * 2 // GROUP,
    ):
        return f"scales {tuple(scale.shape)} do not fit weight {tuple(weight.shape)}"
    return None


class SparkNvFp4LinearKernel(MarlinNvFp4LinearKernel):  # type: ignore[misc]
    """Weight-only NVFP4 GEMM of this package; Marlin for layers that it does not take."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Pack the layer's weight and free the checkpoint's copy."""
        if reason := why_not(layer):
            logger.info("nvfp4: a layer stays with Marlin: %s", reason)
            super().process_weights_after_loading(layer)
            return
        packed = api.prepare(
            layer.weight.data,
            layer.weight_scale.data,
            float(layer.weight_global_scale),
            layer.params_dtype,
        )
        layer.register_buffer("nvfp4_packed", packed.packed, persistent=False)
        layer.register_buffer("nvfp4_arrivals", packed.arrivals, persistent=False)
        layer.nvfp4_global_scale, layer.nvfp4_n, layer.nvfp4_grid = (
            packed.global_scale,
            packed.n,
            packed.grid,
        )
        vllm_hooks.graph_depends_on("nvfp4", packed.global_scale, packed.n, packed.grid)
        for name in ("weight", "weight_scale"):
            empty = getattr(layer, name).new_empty(0)
            setattr(layer, name, torch.nn.Parameter(empty, requires_grad=False))

    def apply_weights(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return ``x @ W.T + bias``."""
        if not hasattr(layer, "nvfp4_packed"):
            result: torch.Tensor = super().apply_weights(layer, x, bias)
            return result
        out: torch.Tensor = torch.ops.spark_kernels.nvfp4_linear(
            x.reshape(-1, x.shape[-1]),
            layer.nvfp4_packed,
            layer.nvfp4_arrivals,
            layer.nvfp4_global_scale,
            layer.nvfp4_n,
            layer.nvfp4_grid,
            True,  # noqa: FBT003 - the operator's pdl
        )
        if bias is not None:
            out = out + bias
        return out.reshape(*x.shape[:-1], layer.nvfp4_n)


def register(options: Mapping[str, Any]) -> None:
    """Take Marlin's place for weight-only NVFP4 layers, from the next model load on.

    ``--linear-backend marlin`` then means this class too; ``SPARK_KERNELS=-nvfp4`` gives Marlin back.

    Raises:
        LibraryMissingError: the kernel's library is not there.
        LookupError: vLLM's registry is not laid out as in 0.32.0.
    """
    del options
    build.load("nvfp4")
    ours, theirs = SparkNvFp4LinearKernel, MarlinNvFp4LinearKernel
    if registry.MarlinNvFp4LinearKernel is ours:
        return
    # No public seam, see above. The CUDA list is ordered by preference, the map by backend holds sets.
    order = registry._POSSIBLE_NVFP4_KERNELS[PlatformEnum.CUDA]  # noqa: SLF001
    named = registry._LINEAR_BACKEND_KERNEL_MAP["marlin"]  # noqa: SLF001
    if theirs not in order or theirs not in named:
        raise LookupError("vLLM's NVFP4 kernel lists hold no Marlin: not the registry of 0.32.0")
    order[order.index(theirs)] = ours
    named.discard(theirs)
    named.add(ours)
    registry.MarlinNvFp4LinearKernel = ours
