"""Residual add + RMSNorm + NVFP4 quantisation in one pass, for decode and prefill."""

# ruff: noqa: ARG001, FBT001, PLR0913, PLR0917 - torch.library schemas are positional; fakes take what ops take

from __future__ import annotations

import ctypes
import functools

import torch

from spark_kernels import build, launch

GROUP = 16
MAX_HIDDEN = 16384
_WEIGHTS = (torch.float32, torch.bfloat16)
# Thread blocks a multiprocessor: rows beyond that are walked by the same blocks, weights kept in registers.
BLOCKS_PER_PROCESSOR = 4


@functools.cache
def _library() -> ctypes.CDLL:
    lib = build.load("rmsnorm_fp4")
    pointer, integer, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
    lib.sk_rmsnorm_fp4.argtypes = [*([pointer] * 7), real, real, *([integer] * 6), pointer]
    return lib


@functools.cache
def _resident_blocks(device: torch.device) -> int:
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return int(processors) * BLOCKS_PER_PROCESSOR


def scale_shape(rows: int, hidden: int, *, swizzled: bool) -> tuple[int, int]:
    """Return the shape of the block scales: [M, H/16], or whole 128 x 4 tiles as [M', G']."""
    groups = hidden // GROUP
    return (-(-rows // 128) * 128, -(-groups // 4) * 4) if swizzled else (rows, groups)


@torch.library.custom_op("spark_kernels::add_rmsnorm_fp4", mutates_args=())
def _add_rmsnorm_fp4(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    global_scale: torch.Tensor,
    eps: float,
    weight_offset: float,
    swizzled: bool,
    pdl: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, hidden = x.shape
    codes, scales, residual_out = _outputs(x, residual, swizzled=swizzled)
    if rows:
        blocks = min(scales.shape[0], _resident_blocks(x.device))
        code = _library().sk_rmsnorm_fp4(
            *map(launch.pointer, (x, residual, weight, global_scale)),
            launch.pointer(residual_out if residual is not None else None),
            *map(launch.pointer, (codes, scales)),
            *(eps, weight_offset, rows, hidden, int(swizzled)),
            *(int(weight.dtype is torch.bfloat16), blocks, int(pdl)),
            launch.stream(x),
        )
        launch.check(code, f"add + RMSNorm + NVFP4 [{rows}, {hidden}]")
    return codes, scales, residual_out


def _outputs(
    x: torch.Tensor, residual: torch.Tensor | None, *, swizzled: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, hidden = x.shape
    codes = x.new_empty((rows, hidden // 2), dtype=torch.uint8)
    scales = x.new_empty(scale_shape(rows, hidden, swizzled=swizzled), dtype=torch.uint8)
    return codes, scales, torch.empty_like(x) if residual is not None else x.new_empty(0)


@_add_rmsnorm_fp4.register_fake
def _(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    global_scale: torch.Tensor,
    eps: float,
    weight_offset: float,
    swizzled: bool,
    pdl: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _outputs(x, residual, swizzled=swizzled)


def add_rmsnorm_fp4(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    global_scale: torch.Tensor,
    *,
    eps: float = 1e-6,
    weight_offset: float = 1.0,
    swizzled: bool = True,
    pdl: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return (codes, scales, new residual) of ``quantize(rms_norm(x + residual) * (offset + weight))``.

    Args:
        x: bfloat16 [M, H], contiguous; H a multiple of 16, at most 16384.
        residual: as x, or None for a norm without an addition.
        weight: float32 or bfloat16 [H]; widened before the offset is added.
        global_scale: float32, one element on the device; block scales are multiplied by it
            (vLLM's ``input_global_scale``).
        eps: added to the mean square.
        weight_offset: added to the weight: 1 for GemmaRMSNorm, 0 for RMSNorm.
        swizzled: scales in 128 x 4 tiles for tensor cores (padding zeroed), else row-major.
        pdl: allow programmatic dependent launch.

    Returns:
        uint8 [M, H/2] (even column in the low nibble), E4M3 scales (``scale_shape``), and the sum
        rounded to bfloat16 (None without a residual).

    Raises:
        ValueError: a shape or dtype that is not the above.
        LaunchError: CUDA refused the launch.
    """
    hidden = x.shape[-1]
    if x.dim() != 2 or x.dtype is not torch.bfloat16 or hidden % GROUP or hidden > MAX_HIDDEN:  # noqa: PLR2004
        raise ValueError(
            f"x must be bfloat16 [M, H], H a multiple of 16 up to {MAX_HIDDEN}; "
            f"got {x.dtype} {tuple(x.shape)}"
        )
    if residual is not None and (residual.shape != x.shape or residual.dtype is not x.dtype):
        raise ValueError(f"residual must match x, got {residual.dtype} {tuple(residual.shape)}")
    if weight.dtype not in _WEIGHTS or weight.shape != (hidden,) or global_scale.numel() != 1:
        raise ValueError(f"weight must be float32 or bfloat16 [{hidden}], global_scale one float32")
    codes, scales, added = _add_rmsnorm_fp4(
        x.contiguous(),
        None if residual is None else residual.contiguous(),
        weight,
        global_scale.float(),
        eps,
        weight_offset,
        swizzled,
        pdl,
    )
    return codes, scales.view(torch.float8_e4m3fn), added if residual is not None else None
