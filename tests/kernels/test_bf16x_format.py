"""The bf16x code: every bf16 pattern comes back, and the two encoders write the same bytes."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from spark_kernels import build
from spark_kernels.bf16x import host, reference

U16 = npt.NDArray[np.uint16]
SHAPES = [(16, 64), (1, 8), (17, 72), (33, 264), (40, 1000), (48, 512)]


def normal(rng: np.random.Generator, n: int, k: int, scale: float = 0.02) -> U16:
    """Return the bf16 patterns (truncated) of normal weights."""
    values = rng.standard_normal((n, k), dtype=np.float32) * np.float32(scale)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def weights(kind: str, n: int, k: int) -> U16:
    """Return weights that code well, badly, or not at all."""
    rng = np.random.default_rng([n, k, len(kind)])
    if kind == "any pattern":
        return rng.integers(0, 65536, (n, k)).astype(np.uint16)
    w = normal(rng, n, k)
    match kind:
        case "zeros":
            w[:] = 0
            w[0, 0] = 0x8000
        case "some of anything":
            at = rng.random((n, k)) < 0.01
            w[at] = rng.integers(0, 65536, at.sum())
        case "NaN payloads and infinities":
            w[0, :4] = [0x7FC1, 0xFF81, 0x7F80, 0xFF80]
        case "denormals":
            w[:] = rng.integers(0, 128, (n, k))
        case "one huge row":
            w[n // 2] = normal(rng, 1, k, 1e30)[0]
    return w


KINDS = [
    "normal", "zeros", "some of anything", "NaN payloads and infinities", "denormals", "one huge row", "any pattern",
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_encoded_comes_back(kind: str, shape: tuple[int, int]) -> None:
    """Decoding returns every bit, whatever the weights and however ragged the shape."""
    w = weights(kind, *shape)
    np.testing.assert_array_equal(reference.decode(reference.encode(w)), w)


def test_all_patterns_come_back() -> None:
    """Each of the 65,536 bf16 patterns survives, in coded and in plain tiles alike."""
    every = np.arange(65536, dtype=np.uint16)
    by_exponent = every[np.argsort(every >> 7 & 0xFF, kind="stable")].reshape(256, 256)
    coded = reference.encode(by_exponent)
    assert 0 < coded.plain_tiles < coded.shape.strips * coded.shape.tiles
    np.testing.assert_array_equal(reference.decode(coded), by_exponent)
    np.testing.assert_array_equal(
        reference.decode(reference.encode(by_exponent, force_plain=True)), by_exponent
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("host_libraries")
def test_the_host_encoder_writes_the_references_bytes(kind: str, shape: tuple[int, int]) -> None:
    """The vectorised encoder's stream, side array and counts equal the plain Python ones."""
    w = weights(kind, *shape)
    want, got = reference.encode(w), host.encode_host(w)
    np.testing.assert_array_equal(got.stream, want.stream)
    np.testing.assert_array_equal(got.side, want.side)
    assert (got.escapes, got.plain_tiles) == (want.escapes, want.plain_tiles)


@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 2**32 - 1), st.floats(0, 0.2))
@settings(max_examples=40, deadline=None)
def test_round_trip_of_arbitrary_mixtures(n: int, groups: int, seed: int, odd: float) -> None:
    """Any mixture of normal weights and arbitrary patterns comes back."""
    rng = np.random.default_rng(seed)
    w = normal(rng, n, 8 * groups)
    at = rng.random(w.shape) < odd
    w[at] = rng.integers(0, 65536, at.sum())
    np.testing.assert_array_equal(reference.decode(reference.encode(w)), w)


@pytest.mark.usefixtures("host_libraries")
def test_normal_weights_take_twelve_bits() -> None:
    """Normal weights cost 12 bits, the tile headers' 1/16, and next to nothing for escapes."""
    w = normal(np.random.default_rng(7), 512, 4096)
    coded = host.encode_host(w)
    bits = 8 * (coded.stream.size + 4 * coded.side.size) / w.size
    assert 12.0625 <= bits < 12.0635
    assert coded.plain_tiles == 0
    assert coded.escapes < 1e-4 * w.size


@pytest.mark.usefixtures("host_libraries")
def test_a_side_array_that_grows_loses_nothing() -> None:
    """Weights that all fall back to plain tiles outgrow the first side array and still come back."""
    w = np.random.default_rng(1).integers(0, 65536, (1040, 320)).astype(np.uint16)
    coded = host.encode_host(w)
    assert coded.plain_tiles == coded.shape.strips * coded.shape.tiles
    np.testing.assert_array_equal(reference.decode(coded), w)


@pytest.mark.usefixtures("host_libraries")
def test_the_host_encoder_refuses_what_it_cannot_read() -> None:
    """A wrong dtype or transposed rows are an error, not a wrong code."""
    with pytest.raises(ValueError, match="uint16"):
        host.encode_host(np.zeros((16, 64), np.float32))
    with pytest.raises(ValueError, match="uint16"):
        host.encode_host(np.zeros((64, 16), np.uint16).T)


def test_a_missing_library_says_what_to_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the built library the error names the file and the command that makes it."""
    monkeypatch.setenv("SPARK_KERNELS_LIB_DIR", str(tmp_path))
    with pytest.raises(build.LibraryMissingError, match="spark-kernels build nothing"):
        build.load("nothing")


def test_linear_reference_adds_the_bias() -> None:
    """The reference is x @ w.T + bias in float64 over bf16 values."""
    one, two = np.uint16(0x3F80), np.uint16(0x4000)
    x, w = np.full((1, 8), two, np.uint16), np.full((3, 8), one, np.uint16)
    np.testing.assert_array_equal(reference.linear(x, w), np.full((1, 3), 16.0))
    np.testing.assert_array_equal(
        reference.linear(x, w, np.full(3, one, np.uint16)), np.full((1, 3), 17.0)
    )
