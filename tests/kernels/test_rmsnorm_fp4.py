"""The reference of add + RMSNorm + NVFP4 quantisation, checked against independent arithmetic."""

import itertools
import math

import numpy as np
from spark_kernels.rmsnorm_fp4 import reference

CODES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def test_e2m1_ties_go_to_even_codes_and_overflow_saturates() -> None:
    """Every middle of two values rounds to the even code, beyond 6 stays 6, NaN is +6, -0 keeps its sign."""
    middles = np.array([(a + b) / 2 for a, b in itertools.pairwise(CODES)], np.float32)
    assert reference.to_e2m1(middles).tolist() == [0, 2, 2, 4, 4, 6, 6]
    above = np.nextafter(middles, np.float32(np.inf))
    assert reference.to_e2m1(above).tolist() == list(range(1, 8))
    edge = np.array([np.inf, -np.inf, np.nan, -np.nan, -0.0, 1e30], np.float32)
    assert reference.to_e2m1(edge).tolist() == [7, 15, 7, 7, 8, 7]


def test_e4m3_rounds_to_nearest_even_and_saturates() -> None:
    """Every E4M3 value maps to itself, every middle to its even neighbour, and 464 up to 448."""
    values = reference._E4M3
    assert np.array_equal(reference.to_e4m3(values.astype(np.float32)), np.arange(127))
    middles = ((values[:-1] + values[1:]) / 2).astype(np.float32)
    even = np.arange(126) + np.arange(126) % 2
    assert np.array_equal(reference.to_e4m3(middles), even)
    assert reference.to_e4m3(np.array([464, np.inf, np.nan], np.float32)).tolist() == [
        126,
        126,
        127,
    ]


def test_bf16_rounding_is_nearest_even() -> None:
    """Rounding to bfloat16 is exact on representable values, ties to even between, and keeps NaN a NaN."""
    f = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, np.inf], np.float32)
    assert reference.to_bf16(f).tolist() == [1.0, 1.0, 1 + 2**-6, -1.0, math.inf]
    assert np.isnan(reference.to_bf16(np.array([np.nan], np.float32))).all()


def test_sum_of_squares_is_a_sum() -> None:
    """The fixed-order float32 sum agrees with float64 to float32 accuracy at ragged widths."""
    rng = np.random.default_rng(5)
    for hidden in (16, 64, 528, 5120, 16384):
        v = rng.standard_normal((3, hidden)).astype(np.float32)
        want = (v.astype(np.float64) ** 2).sum(axis=1)
        assert np.allclose(reference.sum_of_squares(v), want, rtol=3e-6)


def test_quantised_norm_is_close_to_the_norm() -> None:
    """Decoding codes and scales gives the float64 norm within half a step of each block."""
    rng = np.random.default_rng(6)
    x, residual = (
        reference.to_bf16(rng.standard_normal((5, 512)).astype(np.float32)) for _ in "xr"
    )
    weight = (rng.standard_normal(512) * 0.2).astype(np.float32)
    got = reference.add_rmsnorm_fp4_ref(x, residual, weight, eps=1e-6, global_scale=448 * 6 / 8)
    v = x.astype(np.float64) + residual
    norm = v / np.sqrt((v**2).mean(axis=1, keepdims=True) + 1e-6) * (1 + weight)
    codes = np.stack([got.codes & 15, got.codes >> 4], axis=-1).reshape(5, -1)
    signed = np.array([*CODES, *(-c for c in CODES)])[codes]
    step = np.repeat(reference._E4M3[got.scales] / (448 * 6 / 8), 16, axis=1)
    # Half the widest gap of E2M1 (4 to 6), plus the rounding of the scale and of bf16.
    assert (np.abs(signed * step - norm) <= step * 1.0 + np.abs(norm) * 2**-4).all()
    assert np.array_equal(got.residual, reference.to_bf16((x + residual).astype(np.float32)))


def test_a_row_of_zeros_quantises_to_zeros() -> None:
    """An all-zero row has zero scales and codes rather than a division by zero."""
    zero = np.zeros((1, 64), np.float32)
    got = reference.add_rmsnorm_fp4_ref(zero, None, zero[0], eps=1e-6, global_scale=100.0)
    assert not got.codes.any()
    assert not got.scales.any()


def test_swizzle_places_each_scale_in_its_tile() -> None:
    """Scale (row, group) lands at the byte that the tensor core layout names, and the rest is zero."""
    scales = np.arange(1, 130 * 6 + 1).reshape(130, 6).astype(np.uint8) | 1
    flat = reference.swizzle(scales)
    assert flat.size == 256 * 8
    for row, group in ((0, 0), (31, 3), (32, 0), (127, 5), (129, 4)):
        tile = (row // 128) * 2 + group // 4
        at = tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + group % 4
        assert flat[at] == scales[row, group]
    assert np.count_nonzero(flat) == scales.size
