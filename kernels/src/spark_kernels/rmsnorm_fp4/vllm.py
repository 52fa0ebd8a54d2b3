"""rmsnorm_fp4 in vLLM 0.32.0: a graph pass that fuses GemmaRMSNorm's add, norm and NVFP4 quantisation.

vLLM's own pass declines where the norm's weight is not of the input's type, which is every
GemmaRMSNorm: it passes ``weight.float() + 1.0``. This one matches that addition too and hands the
bfloat16 parameter to the kernel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch._inductor.pattern_matcher as pm
import vllm.ir.ops
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from vllm.compilation.passes.inductor_pass import enable_fake_mode
from vllm.compilation.passes.pass_manager import PostGradPassManager
from vllm.compilation.passes.vllm_inductor_pass import VllmInductorPass, VllmPatternMatcherPass
from vllm.platforms import current_platform

from spark_kernels import __version__, build, vllm_hooks
from spark_kernels.rmsnorm_fp4 import api

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import fx
    from vllm.config import VllmConfig

EPSILONS = (1e-6, 1e-5)  # as in vLLM's own fusion


def _supported(match: pm.Match) -> bool:
    """Say whether a match's shapes are the kernel's: bfloat16, width in range, no padded output."""
    x, weight, result = (match.kwargs[name].meta["val"] for name in ("x", "weight", "result"))
    hidden = x.shape[-1]
    return (
        x.dtype is torch.bfloat16
        and weight.dtype is torch.bfloat16
        and x.dim() == 2  # noqa: PLR2004 - tokens by hidden
        and hidden % api.GROUP == 0
        and hidden <= api.MAX_HIDDEN
        and result.shape[-1] * 2 == hidden
    )


def _register_pattern(patterns: pm.PatternMatcherPass, epsilon: float, *, swizzled: bool) -> None:
    """Add one pattern: this epsilon, this layout of the scales."""

    def pattern(  # noqa: PLR0913, PLR0917 - the graph's inputs
        result: torch.Tensor,
        block_scale: torch.Tensor,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        global_scale: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        norm, added = vllm.ir.ops.fused_add_rms_norm(x, residual, weight.float() + 1.0, epsilon)
        quantised = auto_functionalized(
            torch.ops._C.scaled_fp4_quant.out,  # noqa: SLF001 - vLLM's namespace
            input=norm,
            input_scale=global_scale,
            is_sf_swizzled_layout=swizzled,
            output=result,
            output_scale=block_scale,
        )
        return quantised[1], added, quantised[2]

    def replacement(  # noqa: PLR0913, PLR0917 - as above
        result: torch.Tensor,  # noqa: ARG001 - as above
        block_scale: torch.Tensor,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        global_scale: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        codes, scales, added = torch.ops.spark_kernels.add_rmsnorm_fp4(
            x,
            residual,
            weight,
            global_scale,
            epsilon,
            1.0,
            swizzled,
            True,  # noqa: FBT003 - pdl
        )
        return codes, added, scales.view(block_scale.dtype)

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=current_platform.device_type)

    scale = empty(128, 1, dtype=torch.int32) if swizzled else empty(5, 4, dtype=torch.uint8)
    inputs = [
        empty(5, 32, dtype=torch.uint8),
        scale,
        empty(5, 64),
        empty(5, 64),
        empty(64),
        empty(1, dtype=torch.float32),
    ]
    pm.register_replacement(
        pattern, replacement, inputs, pm.fwd_only, patterns, extra_check=_supported
    )


class GemmaNormNvFp4FusionPass(VllmPatternMatcherPass):  # type: ignore[misc]
    """Replaces add + GemmaRMSNorm + NVFP4 quantisation by this package's operator."""

    @enable_fake_mode  # type: ignore[untyped-decorator]
    def __init__(self, config: VllmConfig) -> None:
        super().__init__(config)
        self.patterns = pm.PatternMatcherPass("spark_gemma_norm_nvfp4")
        for epsilon in EPSILONS:
            for swizzled in (True, False):
                _register_pattern(self.patterns, epsilon, swizzled=swizzled)
        self.dump_patterns(config, self.patterns)

    @VllmInductorPass.time_and_log  # type: ignore[untyped-decorator]
    def __call__(self, graph: fx.Graph) -> None:
        """Apply the patterns."""
        self.matched_count = self.patterns.apply(graph)

    def uuid(self) -> str:
        """Return what vLLM keys its compile cache by."""
        source: str = self.hash_source(self, _register_pattern, _supported)
        return source


def register(options: Mapping[str, Any]) -> None:
    """Run the pass wherever vLLM's own norm and quantisation fusion is on (``fuse_norm_quant``).

    Raises:
        LibraryMissingError: the kernel's library is not there.
    """
    del options
    build.load("rmsnorm_fp4")
    inner = PostGradPassManager.configure
    if getattr(inner, "spark_kernels", False):
        return

    def configure(self: PostGradPassManager, config: VllmConfig) -> None:
        inner(self, config)
        if config.compilation_config.pass_config.fuse_norm_quant:
            self.passes.append(GemmaNormNvFp4FusionPass(config))

    configure.spark_kernels = True  # type: ignore[attr-defined]
    vllm_hooks.graph_depends_on("rmsnorm_fp4", __version__)
    PostGradPassManager.configure = configure
