"""The host encoder: `encode.cpp` through ctypes, over NumPy arrays of bf16 bit patterns."""

import ctypes

import numpy as np

from spark_kernels import build
from spark_kernels.bf16x.reference import U16, Encoded, Shape


def encode_host(weight: U16) -> Encoded:
    """Encode an (n, k) matrix of bf16 bit patterns on one core; the same bits as the reference.

    Raises:
        LibraryMissingError: the host library was not built.
        ValueError: the matrix is not two-dimensional uint16 with contiguous rows.
    """
    if weight.dtype != np.uint16 or weight.ndim != 2 or weight.strides[1] != 2:  # noqa: PLR2004
        raise ValueError(f"expected uint16 rows, not {weight.dtype} of shape {weight.shape}")
    function = build.load_host("bf16x").sk_bf16x_encode_host
    function.restype = ctypes.c_int64
    shape = Shape(*weight.shape)
    stream = np.empty(shape.stream_bytes, np.uint8)
    side = np.empty(max(1024, weight.size // 1024), np.uint32)
    stats = np.zeros(2, np.int64)
    used = strip = 0
    while strip < shape.strips:
        count = min(64, shape.strips - strip)
        before = stats.copy()
        words = function(
            weight.ctypes.data_as(ctypes.c_void_p), shape.n, shape.k, ctypes.c_int64(weight.strides[0] // 2),
            strip, strip + count, stream.ctypes.data_as(ctypes.c_void_p), side.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_int64(used), ctypes.c_int64(side.size), stats.ctypes.data_as(ctypes.c_void_p),
        )  # fmt: skip
        if words < 0:  # the side array is full: double it and code these strips again
            side = np.concatenate([side, np.empty(max(side.size, -words), np.uint32)])
            stats = before
            continue
        used += words
        strip += count
    return Encoded(shape, stream, side[:used], int(stats[0]), int(stats[1]))
