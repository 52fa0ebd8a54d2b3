"""NVFP4 W4A16 linear layers for decode: ``prepare`` once after loading, then ``linear``."""

# ruff: noqa: ARG001, FBT001, PLR0913, PLR0917 - torch.library schemas are positional; fakes take what ops take

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch

from spark_kernels import build, launch
from spark_kernels.nvfp4 import packing
from spark_kernels.nvfp4.tuning_sm121 import Plan, plan

MAX_M = 32  # of one launch
# Rows up to which several launches (0.56 B a weight each) beat unpacking (0.56 + 2 written + 2 read).
MAX_SKINNY_M = 4 * MAX_M
PANEL_BYTES = 64 << 20  # scratch for unpacked rows during prefill
_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
_BF16_UNSCALE = 2.0**7  # unpacked bf16 weights are the true ones times 2**-7


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def _library() -> ctypes.CDLL:
    lib = build.load("nvfp4")
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    lib.sk_nvfp4_gemm.argtypes = [
        *(pointer, integer, pointer, pointer, ctypes.c_float, pointer, pointer),
        *([integer] * 7),
        pointer,
    ]
    lib.sk_nvfp4_unpack.argtypes = [pointer, pointer, *([integer] * 4), pointer]
    return lib


@dataclass(frozen=True)
class Weight:
    """A packed NVFP4 weight [N, K] on its device.

    Attributes:
        packed: uint8 [row tiles, K blocks, rows, 576], see ``packing``.
        arrivals: int32 [row tiles], zero between launches. Calls with one weight must be ordered
            (one stream); calls with different weights may overlap.
        global_scale: multiplies every weight.
        grid: thread blocks of a launch.
    """

    packed: torch.Tensor
    arrivals: torch.Tensor
    global_scale: float
    n: int
    k: int
    grid: int

    @property
    def nbytes(self) -> int:
        """Bytes that one skinny launch reads of it."""
        return self.packed.numel()


def prepare(
    codes: torch.Tensor,
    scales: torch.Tensor,
    global_scale: float,
    dtype: torch.dtype = torch.bfloat16,
    *,
    launch_plan: Plan | None = None,
) -> Weight:
    """Pack a checkpoint's weight for this device.

    Args:
        codes: uint8 [N, K/2] on the GPU, two E2M1 codes a byte, the even column in the low nibble.
        scales: float8_e4m3fn or uint8 [N, K/16].
        global_scale: finite; multiplies every weight.
        dtype: of the activations, bfloat16 or float16.
        launch_plan: instead of the one that ``tuning_sm121`` chooses.

    Raises:
        ValueError: shapes, a NaN scale, a dtype without a layout (see ``packing.pack``).
    """
    if dtype not in _DTYPES:
        raise ValueError(f"NVFP4 W4A16 takes bfloat16 or float16 activations, not {dtype}")
    bits = scales.view(torch.uint8)
    n, k = packing.check(codes, bits)
    chosen = launch_plan or plan(n, k, _multiprocessors(codes.device))
    packed = packing.pack(codes, bits, rows=chosen.rows, dtype=_DTYPES[dtype])
    arrivals = torch.zeros(packed.shape[0], dtype=torch.int32, device=codes.device)
    return Weight(packed, arrivals, float(global_scale), n, k, chosen.grid)


# ``arrivals`` is zero again when the kernel ends, so nothing that torch could observe is mutated.
@torch.library.custom_op("spark_kernels::nvfp4_linear", mutates_args=())
def _linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    arrivals: torch.Tensor,
    global_scale: float,
    n: int,
    grid: int,
    pdl: bool,
) -> torch.Tensor:
    m, k = x.shape
    if x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    if m == 0:
        return out
    rows, fp16 = packed.shape[2], int(x.dtype is torch.float16)
    lib, stream = _library(), launch.stream(x)
    if m > MAX_SKINNY_M:
        # The global scale goes through the GEMM's fp32 epilogue, so nothing is rounded twice.
        alpha = global_scale if fp16 else global_scale * _BF16_UNSCALE
        tiles = max(1, PANEL_BYTES // (2 * k * 16 * rows))
        panel = torch.empty((min(n, tiles * 16 * rows), k), dtype=x.dtype, device=x.device)
        for tile in range(0, packed.shape[0], tiles):
            start = tile * 16 * rows
            part = panel[: n - start]
            code = lib.sk_nvfp4_unpack(
                launch.pointer(packed[tile:]),
                launch.pointer(part),
                *(part.shape[0], k, rows, fp16),
                stream,
            )
            launch.check(code, f"unpacking an NVFP4 weight [{n}, {k}]")
            columns = out[:, start : start + part.shape[0]]
            torch.addmm(columns, x, part.t(), beta=0, alpha=alpha, out=columns)
        return out
    slots = next(size for size in (8, 16, MAX_M) if size >= min(m, MAX_M))
    partial = torch.empty(grid * rows * 16 * slots, dtype=torch.float32, device=x.device)
    for start in range(0, m, MAX_M):
        part = x[start : start + MAX_M]
        code = lib.sk_nvfp4_gemm(
            launch.pointer(part),
            x.stride(0),
            launch.pointer(packed),
            launch.pointer(out[start:]),
            global_scale,
            launch.pointer(partial),
            launch.pointer(arrivals),
            *(part.shape[0], n, k, rows, fp16, grid, int(pdl)),
            stream,
        )
        launch.check(code, f"the NVFP4 GEMM [{part.shape[0]}, {k}] x [{n}, {k}]")
    return out


@_linear.register_fake
def _(
    x: torch.Tensor,
    packed: torch.Tensor,
    arrivals: torch.Tensor,
    global_scale: float,
    n: int,
    grid: int,
    pdl: bool,
) -> torch.Tensor:
    return x.new_empty((x.shape[0], n))


def linear(x: torch.Tensor, weight: Weight, *, pdl: bool = True) -> torch.Tensor:
    """Return ``x @ W.T``: [M, N] of x's type, every product exact, sums in fp32.

    M <= 32 reads the weight once (0.5625 B a weight); up to 128, once for every 32 rows; above, it
    is unpacked to a scratch of 64 MiB, panel by panel, and multiplied by cuBLAS.

    Args:
        x: [M, K], bfloat16 or float16, the type that ``prepare`` was given.
        weight: from ``prepare``.
        pdl: programmatic dependent launch: this kernel's weight reads start while the previous
            kernel of the stream ends.

    Raises:
        ValueError: x is not [M, K] of the prepared weight.
        LaunchError: CUDA refused the launch.
    """
    if x.dim() != 2 or x.shape[1] != weight.k:  # noqa: PLR2004 - a matrix
        raise ValueError(f"x must be [M, {weight.k}], not {tuple(x.shape)}")
    result: torch.Tensor = _linear(
        x, weight.packed, weight.arrivals, weight.global_scale, weight.n, weight.grid, pdl
    )
    return result
