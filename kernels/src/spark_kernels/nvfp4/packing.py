"""The packed weight layout of the skinny GEMM, and the way into it.

A *block* is 16 rows x 64 columns in 576 bytes, the same 4.5 bits a weight as the checkpoint: 32 lanes
x 16 bytes of codes, then 32 lanes x 2 bytes of scales. Lane ``4 * g + t`` holds rows ``g`` and
``g + 8``, columns ``16 * t .. 16 * t + 15``: exactly one quantisation group of each row, so a lane
needs one scale a row. Word ``q`` of a lane feeds the ``q``-th ``mma.m16n8k16`` of the block, whose K
slots ``2t, 2t + 1, 2t + 8, 2t + 9`` stand for columns ``16t + 4q .. 16t + 4q + 3``; the activations
are read in the same order, 32 contiguous bytes a lane, so the permutation costs nothing.

Blocks lie ``[row tile][K block][row sub-tile]``; a row tile has ``rows`` sub-tiles of 16 rows. N is
padded to ``16 * rows`` and K to 64 with zero codes.

Scales are stored as E5M3, ``half(scale * 2**7) >> 7``: E4M3 without subnormals, so that one
multiply-add makes a bf16 or fp16 pair of it. A zero scale becomes zero codes, a negative one flips
the codes' signs: the value of every weight is kept.

The functions take NumPy arrays or torch tensors (on any device) and return the same kind.
"""

from __future__ import annotations

from typing import Any, Final, TypeAlias

import numpy as np

Array: TypeAlias = Any  # numpy.ndarray or torch.Tensor, and the same kind out

GROUP: Final = 16
BLOCK_K: Final = 64
BLOCK_BYTES: Final = 576
E4M3_NAN: Final = 127

# Bit positions of a pair (columns 2i, 2i + 1) inside the low half of a word; the pair's second code
# is 16 bits above, and bits that a rotation carries over the edge wrap around. Sign, then the three
# magnitude bits from the top. kernel.cu gathers pair p by rotating right 0, 3 or 6 (p < 3) or by one
# multiplication with 0x4108 (p = 3).
_FIELDS: Final = ((15, 8, 7, 6), (18, 11, 10, 9), (21, 14, 13, 12), (1, 0, 4, 3))


def _bf16_table() -> np.ndarray:
    """Word bits of every byte (two codes) at each of the four pair positions: int32 [4, 256]."""
    codes = np.arange(256, dtype=np.uint32)
    table = np.zeros((4, 256), np.uint32)
    for pair, positions in enumerate(_FIELDS):
        for half in (0, 1):
            code = (codes >> np.uint32(4 * half)) & np.uint32(15)
            for bit, position in zip((3, 2, 1, 0), positions, strict=True):
                at = np.uint32((position + 16 * half) % 32)
                table[pair] |= ((code >> np.uint32(bit)) & np.uint32(1)) << at
    return table.view(np.int32)


def _fp16_table() -> np.ndarray:
    """As above for fp16: pair p is byte p, as ``cvt.rn.f16x2.e2m1x2`` reads it."""
    shifts = (np.arange(4, dtype=np.uint32) * np.uint32(8))[:, None]
    return (np.arange(256, dtype=np.uint32)[None, :] << shifts).view(np.int32)


def _scale_table() -> np.ndarray:
    """E5M3 byte of every E4M3 magnitude (sign bit ignored): uint8 [256]. Zero and NaN map to 104."""
    byte = np.arange(256, dtype=np.int64) & 127
    exponent, mantissa = byte >> 3, byte & 7
    normal = byte + (15 << 3)
    # Subnormal m * 2**-9 = 1.xxx * 2**(floor(log2 m) - 9)
    log = np.floor(np.log2(np.maximum(mantissa, 1))).astype(np.int64)
    subnormal = ((log - 9 + 7 + 15) << 3) | (((mantissa << 3) >> log) & 7)
    out = np.where(exponent > 0, normal, subnormal)
    return np.where((byte == 0) | (byte == E4M3_NAN), 13 << 3, out).astype(np.uint8)


TABLES: Final = {"bfloat16": _bf16_table(), "float16": _fp16_table()}
SCALES: Final = _scale_table()


def _take(table: np.ndarray, index: Array) -> Array:
    """``table[index]`` for a NumPy or torch index of unsigned bytes."""
    if isinstance(index, np.ndarray):
        return table[index]
    import torch  # noqa: PLC0415 - only when the caller already has it

    return torch.from_numpy(table).to(index.device)[index.to(torch.int64)]


def _pad(array: Array, rows: int, columns: int) -> Array:
    """Zero-pad a matrix of bytes at the bottom and the right."""
    if tuple(array.shape) == (rows, columns):
        return array
    if isinstance(array, np.ndarray):
        out: Array = np.zeros((rows, columns), np.uint8)
    else:
        out = array.new_zeros((rows, columns))
    out[: array.shape[0], : array.shape[1]] = array
    return out


def _as_bytes(array: Array) -> Array:
    if isinstance(array, np.ndarray):
        return np.ascontiguousarray(array).view(np.uint8)
    import torch  # noqa: PLC0415 - as above

    return array.contiguous().view(torch.uint8)


def _permute(array: Array, axes: tuple[int, ...]) -> Array:
    return array.transpose(axes) if isinstance(array, np.ndarray) else array.permute(axes)


def _concatenate(parts: list[Array]) -> Array:
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts, axis=-1)
    import torch  # noqa: PLC0415 - as above

    return torch.cat(parts, dim=-1)


def check(codes: Array, scales: Array) -> tuple[int, int]:
    """Return (N, K) of a checkpoint's pair of weight tensors.

    Raises:
        ValueError: shapes that do not belong together, K not a multiple of 16, or a NaN scale.
    """
    n, half_k = codes.shape
    k = 2 * half_k
    if k % GROUP or tuple(scales.shape) != (n, k // GROUP):
        raise ValueError(
            f"codes [N, K/2] = {tuple(codes.shape)} need scales [N, K/16] with K a multiple of 16; "
            f"got {tuple(scales.shape)}"
        )
    if bool(((scales & 127) == E4M3_NAN).any()):
        raise ValueError("a block scale is NaN: the checkpoint is damaged")
    return n, k


def pack(codes: Array, scales: Array, *, rows: int, dtype: str) -> Array:
    """Rearrange a checkpoint's NVFP4 weight for ``sk_nvfp4_gemm``.

    Args:
        codes: uint8 [N, K/2], two E2M1 codes a byte, the even column in the low nibble.
        scales: uint8 [N, K/16], E4M3 bit patterns.
        rows: 16-row sub-tiles of a row tile: 1, 2 or 4.
        dtype: the activations' type, ``bfloat16`` or ``float16``; they differ in the codes' bits.

    Returns:
        uint8 [row tiles, K blocks, rows, 576].

    Raises:
        ValueError: as ``check``; unknown dtype or rows.
    """
    if dtype not in TABLES or rows not in {1, 2, 4}:
        raise ValueError(f"no packed layout for dtype {dtype!r} with rows = {rows}")
    n, k = check(codes, scales)
    tiles, blocks = -(-n // (16 * rows)), -(-k // BLOCK_K)
    codes = _pad(codes, tiles * rows * 16, blocks * BLOCK_K // 2)
    scales = _pad(scales, tiles * rows * 16, blocks * BLOCK_K // GROUP)

    # One group of 16 codes (8 bytes) a scale: drop the codes of zero scales, move signs into codes.
    grouped = codes.reshape(scales.shape[0], -1, 8)
    flip = (scales >> 7) * 0x88
    keep = ((scales & 127) != 0) * 1
    # 0 or 255: as bytes, because a comparison is a boolean in both libraries.
    grouped = (grouped ^ flip[:, :, None]) & _take(np.array([0, 255], np.uint8), keep)[:, :, None]

    # [tile, sub-tile, half (row + 8), g, K block, t, q, column pair]
    axes = grouped.reshape(tiles, rows, 2, 8, blocks, 4, 4, 2)
    words: Array = None
    for pair in range(4):
        part = _take(TABLES[dtype][pair], axes[:, :, pair & 1, :, :, :, :, pair >> 1])
        words = part if words is None else words | part
    # [tile, sub, g, block, t, q] -> [tile, block, sub, g, t, q]
    words = _permute(words, (0, 3, 1, 2, 4, 5))
    # [tile, sub, half, g, block, t] -> [tile, block, sub, g, t, half]
    e5m3 = _take(SCALES, scales.reshape(tiles, rows, 2, 8, blocks, 4))
    e5m3 = _permute(e5m3, (0, 4, 1, 3, 5, 2))
    shape = (tiles, blocks, rows)
    return _concatenate(
        [_as_bytes(words).reshape(*shape, 512), _as_bytes(e5m3).reshape(*shape, 64)]
    )
