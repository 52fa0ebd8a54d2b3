"""What the NVFP4 W4A16 GEMM must compute, in NumPy and double precision.

A weight is ``E2M1 code * E4M3 block scale * fp32 global scale``; blocks are 16 columns of one row
(NVIDIA, "Introducing NVFP4"; OCP MX v1.0 for the two element formats).
"""

from typing import Final

import numpy as np

from spark_kernels.nvfp4 import packing

E2M1: Final = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def decode_e4m3(bits: np.ndarray) -> np.ndarray:
    """Return the values of E4M3 (finite variant, ``fn``) bit patterns: float64, NaN for 0x7F and 0xFF."""
    bits = np.asarray(bits, np.uint8)
    exponent, mantissa = (bits >> 3) & 15, (bits & 7).astype(np.float64)
    value = np.where(
        exponent == 0,
        np.ldexp(mantissa, -9),
        np.ldexp(1 + mantissa / 8, exponent.astype(np.int64) - 7),
    )
    value = np.where((bits & 127) == packing.E4M3_NAN, np.nan, value)
    signed: np.ndarray = np.where(bits >> 7, -value, value)
    return signed


def unpack_codes(codes: np.ndarray) -> np.ndarray:
    """Return one E2M1 code an element, uint8 [N, K], from two a byte (even column in the low nibble)."""
    return np.stack([codes & 15, codes >> 4], axis=-1).reshape(codes.shape[0], -1)


def dequantize(codes: np.ndarray, scales: np.ndarray, global_scale: float = 1.0) -> np.ndarray:
    """Return the weight, float64 [N, K]: exact before the global scale is applied."""
    block = np.repeat(decode_e4m3(scales), packing.GROUP, axis=1)
    return E2M1[unpack_codes(codes)] * block * global_scale


def linear_ref(
    x: np.ndarray, codes: np.ndarray, scales: np.ndarray, global_scale: float
) -> np.ndarray:
    """Return ``x @ W.T`` in float64 [M, N]; x is [M, K] in any float type."""
    product: np.ndarray = x.astype(np.float64) @ dequantize(codes, scales).T
    return product * global_scale


def decode_word(word: np.ndarray) -> np.ndarray:
    """Decode bf16-layout words as kernel.cu does, with the same three operations.

    Returns:
        uint32 [..., 4]: the pairs a0..a3 as two bf16 bit patterns each (weight * 2**-126).
    """
    word = word.astype(np.uint32)
    mask = np.uint32(0x81C081C0)

    def rotate_right(by: int) -> np.ndarray:
        return (word >> np.uint32(by)) | (word << np.uint32(32 - by))

    gathered = (word & np.uint32(0x001B001B)) * np.uint32(0x4108)
    return np.stack([word, rotate_right(3), rotate_right(6), gathered], axis=-1) & mask


def _bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)


def unpack_bf16(packed: np.ndarray, n: int, k: int) -> np.ndarray:
    """Return the weight without its global scale, float64 [N, K], from the packed bf16 layout.

    The kernel's own route: decoded bits times the scale pair ``byte * 16 + 0x7000``, times 2**7.
    """
    tiles, blocks, rows, _ = packed.shape
    words = (
        np.ascontiguousarray(packed[..., :512]).view("<u4").reshape(tiles, blocks, rows, 8, 4, 4)
    )
    scales = packed[..., 512:].reshape(tiles, blocks, rows, 8, 4, 2).astype(np.uint32)
    scale = _bf16(scales * np.uint32(16) + np.uint32(0x7000))
    pairs = decode_word(words)  # [..., g, t, q, a]
    out = np.zeros((tiles * rows * 16, blocks * packing.BLOCK_K))
    view = out.reshape(tiles, rows, 2, 8, blocks, 4, 4, 2, 2)  # half, g, block, t, q, pair, column
    for a in range(4):
        for column in range(2):
            bits = (pairs[..., a] >> np.uint32(16 * column)) & np.uint32(0xFFFF)
            value = _bf16(bits) * scale[..., a & 1][..., None] * 2.0**7
            # [tile, block, sub, g, t, q] -> [tile, sub, g, block, t, q]
            view[:, :, a & 1, :, :, :, :, a >> 1, column] = value.transpose(0, 2, 3, 1, 4, 5)
    return out[:n, :k]
