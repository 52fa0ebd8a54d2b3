"""Residual add + RMSNorm + NVFP4 quantisation, operation by operation, in NumPy.

The kernel does the same float32 operations in the same order, so results are compared for equality.
The norm follows vLLM's ``ir.ops.fused_add_rms_norm``: the sum of x and the residual enters the norm
before it is rounded to bfloat16, and the norm's result is rounded to bfloat16 before it is quantised.
The quantisation is ``scaled_fp4_quant``'s with correctly rounded divisions in place of its
approximate reciprocals.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np

GROUP: Final = 16
WARP: Final = 32
# The points between two neighbouring E2M1 magnitudes; at one, the even code wins.
_E2M1_MIDDLES: Final = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], np.float32)
_E4M3: Final = np.array(
    [np.ldexp(m, -9) if e == 0 else np.ldexp(1 + m / 8, e - 7) for e in range(16) for m in range(8)]
)[:-1]  # the last pattern is NaN


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Round float32 to bfloat16, nearest even; the result is float32 with bfloat16 values."""
    bits = x.astype(np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    quiet = (bits | np.uint32(0x400000)) & np.uint32(0xFFFF0000)
    out = np.where(np.isnan(x), quiet, rounded & np.uint32(0xFFFF0000))
    return out.astype(np.uint32).view(np.float32)


def to_e2m1(x: np.ndarray) -> np.ndarray:
    """Round to E2M1 codes (uint8 0..15): nearest, ties to even, saturating; NaN becomes +6."""
    magnitude = np.abs(x.astype(np.float32))
    code = np.zeros(x.shape, np.uint8)
    with np.errstate(invalid="ignore"):  # signalling NaNs compare false, which is meant
        for below, middle in enumerate(_E2M1_MIDDLES):
            code += (magnitude >= middle) if below % 2 else (magnitude > middle)
    nan = np.isnan(x)
    return np.where(nan, 7, code | (np.signbit(x) & ~nan).astype(np.uint8) << 3).astype(np.uint8)


def to_e4m3(x: np.ndarray) -> np.ndarray:
    """Round non-negative float32 to E4M3 bit patterns: nearest even, saturating at 448."""
    middles = (_E4M3[:-1] + _E4M3[1:]) / 2
    low = np.searchsorted(middles, x.astype(np.float64), side="left")
    high = np.searchsorted(middles, x.astype(np.float64), side="right")
    even = np.where(low % 2 == 0, low, high)
    return np.where(np.isnan(x), 127, even).astype(np.uint8)


def swizzle(scales: np.ndarray) -> np.ndarray:
    """Rearrange scales [M, G] into tensor-core tiles of 128 rows x 4 groups, zero-padded; flat.

    Inside a tile, row r and group g are at byte ``(r % 32) * 16 + (r // 32) * 4 + g``.
    """
    rows, groups = -(-scales.shape[0] // 128) * 128, -(-scales.shape[1] // 4) * 4
    padded = np.zeros((rows, groups), np.uint8)
    padded[: scales.shape[0], : scales.shape[1]] = scales
    tiles = padded.reshape(rows // 128, 4, 32, groups // 4, 4)
    return np.ascontiguousarray(tiles.transpose(0, 3, 2, 1, 4)).reshape(-1)


def sum_of_squares(v: np.ndarray) -> np.ndarray:
    """Sum v * v over the last axis in the kernel's order; float32 [M].

    A thread adds its 16 elements in turn, a warp adds in a butterfly (16, 8, 4, 2, 1), and the warps'
    sums are added in turn.
    """
    rows = v.shape[0]
    squares = (v * v).astype(np.float32).reshape(rows, -1, GROUP)
    partial = np.zeros(squares.shape[:2], np.float32)
    for i in range(GROUP):
        partial = partial + squares[:, :, i]
    warps = -(-partial.shape[1] // WARP)
    lanes = np.zeros((rows, warps * WARP), np.float32)
    lanes[:, : partial.shape[1]] = partial
    lanes = lanes.reshape(rows, warps, WARP)
    for distance in (16, 8, 4, 2, 1):
        lanes = lanes + lanes[:, :, np.arange(WARP) ^ distance]
    total = np.zeros(rows, np.float32)
    for warp in range(warps):
        total = total + lanes[:, warp, 0]
    return total


@dataclass(frozen=True)
class Quantized:
    """``codes`` uint8 [M, H/2], ``scales`` E4M3 bits [M, H/16], ``residual`` float32 of bfloat16 values."""

    codes: np.ndarray
    scales: np.ndarray
    residual: np.ndarray


def add_rmsnorm_fp4_ref(  # noqa: PLR0913 - the operation's own arguments
    x: np.ndarray,
    residual: np.ndarray | None,
    weight: np.ndarray,
    *,
    eps: float,
    global_scale: float,
    weight_offset: float = 1.0,
) -> Quantized:
    """Return what the kernel must write.

    Args:
        x: float32 [M, H] of bfloat16 values, H a multiple of 16.
        residual: as x, or None.
        weight: float32 [H]; ``weight_offset`` is added to it (1 for GemmaRMSNorm).
        eps: added to the mean square.
        global_scale: of the quantisation; block scales are multiplied by it.
        weight_offset: see weight.
    """
    f32 = np.float32
    v = x.astype(f32) if residual is None else (x.astype(f32) + residual.astype(f32))
    mean = sum_of_squares(v) / f32(v.shape[1])
    inverse = f32(1) / np.sqrt(mean + f32(eps))
    y = to_bf16((v * inverse[:, None]) * (weight.astype(f32) + f32(weight_offset)))
    groups = y.reshape(y.shape[0], -1, GROUP)
    # fmaxf passes over NaN, as does fmax.
    largest = np.fmax.reduce(np.abs(groups), axis=-1, initial=f32(0))
    scales = to_e4m3(f32(global_scale) * (largest * (f32(1) / f32(6))))
    value = np.append(_E4M3, np.nan)[scales].astype(f32)
    multiplier = np.where(
        value == 0, f32(0), f32(global_scale) / np.where(value == 0, f32(1), value)
    )
    codes = to_e2m1((groups * multiplier[:, :, None]).astype(f32)).reshape(y.shape)
    return Quantized(codes[:, ::2] | codes[:, 1::2] << 4, scales, to_bf16(v))
