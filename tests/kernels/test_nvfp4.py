"""The NVFP4 layout and its references, on a CPU."""

import itertools

import numpy as np
import pytest
from spark_kernels.nvfp4 import packing, reference
from spark_kernels.nvfp4.tuning_sm121 import plan

SHAPES = [(16, 64), (96, 5120), (48, 80), (70, 208), (5, 16), (130, 1040)]


def checkpoint(n: int, k: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return random codes and scales of every kind: zero, subnormal, negative, largest; no NaN."""
    rng = np.random.default_rng([n, k, seed])
    codes = rng.integers(0, 256, (n, k // 2), dtype=np.uint8)
    scales = rng.integers(0, 256, (n, k // 16), dtype=np.uint8)
    scales[(scales & 127) == 127] = 126
    return codes, scales


@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packing_keeps_every_weight(shape: tuple[int, int], rows: int) -> None:
    """The packed bytes, decoded as the kernel does, are the checkpoint's weights exactly."""
    codes, scales = checkpoint(*shape)
    packed = packing.pack(codes, scales, rows=rows, dtype="bfloat16")
    decoded = reference.unpack_bf16(packed, *shape)
    assert np.array_equal(decoded, reference.dequantize(codes, scales))


def test_every_code_times_every_scale_is_exact() -> None:
    """All 16 codes times all 254 finite scales survive the bf16 route bit for bit."""
    scales = np.array([s for s in range(256) if s & 127 != 127], np.uint8)
    row = np.arange(0, 16, 2, dtype=np.uint8)
    codes = np.tile(row | (row + 1) << 4, (len(scales), 1))
    packed = packing.pack(codes, scales[:, None], rows=1, dtype="bfloat16")
    decoded = reference.unpack_bf16(packed, len(scales), 16)
    assert np.array_equal(decoded, np.outer(reference.decode_e4m3(scales), reference.E2M1))


def test_packing_adds_no_bytes_but_padding() -> None:
    """A weight whose shape needs no padding packs to 4.5 bits a weight, the checkpoint's own size."""
    codes, scales = checkpoint(128, 256)
    packed = packing.pack(codes, scales, rows=4, dtype="bfloat16")
    assert packed.nbytes == codes.nbytes + scales.nbytes == 128 * 256 * 9 // 16


def test_fp16_layout_keeps_the_bytes_in_conversion_order() -> None:
    """For fp16, byte i of a word is the pair that cvt.rn.f16x2.e2m1x2 turns into fragment i."""
    codes, scales = checkpoint(16, 64)
    scales = scales & 63 | 1  # positive and not zero: codes stay as they are
    packed = packing.pack(codes, scales, rows=1, dtype="float16")
    words = packed[0, 0, 0, :512].reshape(8, 4, 4, 4)  # g, t, q, byte
    for g, t, q, i in itertools.product((0, 5), range(4), range(4), range(4)):
        assert words[g, t, q, i] == codes[g + 8 * (i & 1), (16 * t + 4 * q) // 2 + (i >> 1)]


def test_scale_bytes_order_as_e5m3() -> None:
    """The stored scale is half(scale * 2**7) without its low bits, for every finite E4M3 value."""
    bits = np.arange(1, 127, dtype=np.uint8)
    halves = (reference.decode_e4m3(bits) * 2**7).astype(np.float16).view(np.uint16)
    assert not (halves & 127).any()
    assert np.array_equal(packing.SCALES[bits], halves >> 7)


@pytest.mark.parametrize(
    ("codes", "scales", "message"),
    [
        ((4, 20), (4, 2), "multiple of 16"),
        ((4, 16), (4, 3), r"scales \[N, K/16\]"),
        ((4, 16), (5, 2), r"scales \[N, K/16\]"),
    ],
)
def test_mismatched_shapes_are_refused(
    codes: tuple[int, int], scales: tuple[int, int], message: str
) -> None:
    """Tensors that do not belong together raise an error that names both shapes."""
    with pytest.raises(ValueError, match=message):
        packing.pack(np.zeros(codes, np.uint8), np.ones(scales, np.uint8), rows=1, dtype="bfloat16")


def test_a_nan_scale_is_refused() -> None:
    """A NaN block scale is reported as a damaged checkpoint instead of being served."""
    codes, scales = checkpoint(16, 64)
    scales[3, 2] = 0xFF
    with pytest.raises(ValueError, match="NaN"):
        packing.pack(codes, scales, rows=1, dtype="bfloat16")


def test_an_unknown_layout_is_refused() -> None:
    """Asking for a dtype or tile height without a layout names both."""
    codes, scales = checkpoint(16, 64)
    with pytest.raises(ValueError, match=r"float32.*rows = 3"):
        packing.pack(codes, scales, rows=3, dtype="float32")


@pytest.mark.parametrize("processors", [48, 132])
@pytest.mark.parametrize("shape", [(16, 16), (96, 5120), (2048, 512), (34816, 5120)], ids=str)
def test_plans_fill_the_device_without_idle_blocks(shape: tuple[int, int], processors: int) -> None:
    """A launch has at most one block a multiprocessor, and a unit for every warp where there are so many."""
    chosen = plan(*shape, processors)
    units = -(-shape[0] // (16 * chosen.rows)) * -(-shape[1] // 64)
    assert 1 <= chosen.grid <= processors
    assert units >= 8 * chosen.grid or chosen.grid == 1


def test_reference_matches_a_hand_computed_product() -> None:
    """One row of known codes, scales and activations gives the sum that arithmetic gives."""
    codes = np.full((1, 16), 0x21, np.uint8)  # 0.5, 1.0, 0.5, 1.0, ...
    scales = np.array([[0x38, 0x40]], np.uint8)  # 1.0, 2.0
    x = np.ones((1, 32), np.float32)
    assert reference.linear_ref(x, codes, scales, 0.25)[0, 0] == (8 * 1.5 + 2 * 8 * 1.5) * 0.25
