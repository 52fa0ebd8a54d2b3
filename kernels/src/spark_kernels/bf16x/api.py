"""The bf16x linear layer in torch: encode once after loading, then apply at every step."""

# ruff: noqa: PLR0913, PLR0917 - torch operators take their tensors one by one, in order
from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch

from spark_kernels import build
from spark_kernels.bf16x.reference import Shape
from spark_kernels.bf16x.tuning_sm121 import Launch, launch
from spark_kernels.launch import check, pointer, stream

DECODE_TOKENS = 32  # up to here the fused kernel reads each weight once
PANEL_BYTES = 64 << 20  # scratch for one decoded panel during prefill


class UnsupportedWeightError(ValueError):
    """The weight cannot be encoded: wrong dtype, layout or shape."""


@dataclass(frozen=True, slots=True)
class Coded:
    """An encoded (n, k) bf16 weight on one device: ``stream`` uint8, ``side`` int32.

    ``arrivals`` (strips,) int32 counts the parts of a strip that are done; it is zero between
    calls. It belongs to the weight, so layers may run on several streams at once, but one layer
    may not run beside itself.
    """

    n: int
    k: int
    stream: torch.Tensor
    side: torch.Tensor
    arrivals: torch.Tensor
    escapes: int
    plain_tiles: int

    @property
    def nbytes(self) -> int:
        """Bytes resident on the device."""
        return int(self.stream.numel() + 4 * (self.side.numel() + self.arrivals.numel()))

    @property
    def bits_per_weight(self) -> float:
        """Resident bits a weight; 16 is what bf16 takes."""
        return 8 * self.nbytes / (self.n * self.k)

    def describe(self) -> str:
        """Return one line for the log: size, escapes, plain tiles."""
        shape = Shape(self.n, self.k)
        return (
            f"{self.n}x{self.k}: {self.bits_per_weight:.3f} bits/weight, "
            f"{self.escapes} escapes, {self.plain_tiles} of {shape.strips * shape.tiles} tiles plain"
        )


def _checked(weight: torch.Tensor) -> torch.Tensor:
    if weight.dtype != torch.bfloat16 or weight.dim() != 2:  # noqa: PLR2004 - a matrix
        raise UnsupportedWeightError(
            f"bf16x takes a bfloat16 matrix, not {weight.dtype} {tuple(weight.shape)}"
        )
    if weight.shape[1] % 8 or min(weight.shape) == 0:
        raise UnsupportedWeightError(
            f"bf16x takes a K that is a multiple of 8, not {tuple(weight.shape)}"
        )
    return weight if weight.stride(1) == 1 else weight.contiguous()


def encode(weight: torch.Tensor, *, force_plain: bool = False) -> Coded:
    """Encode an (n, k) bfloat16 weight where it lies: on its GPU, or with the host encoder.

    Args:
        weight: (n, k), k a multiple of 8; any bit pattern is kept.
        force_plain: store every tile as plain bf16: the same kernel and sums without the code.

    Raises:
        UnsupportedWeightError: dtype or shape.
    """
    weight = _checked(weight)
    if weight.is_cuda:
        return _encode_cuda(weight, force_plain=force_plain)
    if force_plain:
        raise UnsupportedWeightError("force_plain is for weights on a GPU; the host encoder codes")
    return _encode_host(weight)


def _encode_cuda(weight: torch.Tensor, *, force_plain: bool) -> Coded:
    n, k = weight.shape
    shape = Shape(n, k)
    lib, device = build.load("bf16x"), weight.device
    words = torch.empty(shape.strips * shape.tiles, dtype=torch.int32, device=device)
    escapes = torch.empty_like(words)

    def run(out: torch.Tensor | None, side: torch.Tensor | None, at: torch.Tensor | None) -> None:
        code = lib.sk_bf16x_encode(
            pointer(weight), ctypes.c_int64(weight.stride(0)), n, k, int(force_plain),
            pointer(out), pointer(side), pointer(at), pointer(words), pointer(escapes), stream(weight),
        )  # fmt: skip
        check(code, "bf16x encode")

    run(None, None, None)
    ends = words.cumsum(0, dtype=torch.int64)
    coded = torch.empty(shape.stream_bytes, dtype=torch.uint8, device=device)
    side = torch.zeros(max(4, int(ends[-1])), dtype=torch.int32, device=device)
    run(coded, side, ends - words)
    arrivals = torch.zeros(shape.strips, dtype=torch.int32, device=device)
    return Coded(
        n, k, coded, side, arrivals, int(escapes.clamp(min=0).sum()), int((escapes < 0).sum())
    )


def _encode_host(weight: torch.Tensor) -> Coded:
    from spark_kernels.bf16x.host import encode_host  # noqa: PLC0415 - needs its own library

    done = encode_host(weight.view(torch.uint16).numpy())
    side = torch.from_numpy(done.side.view("int32"))
    arrivals = torch.zeros(done.shape.strips, dtype=torch.int32)
    codes = torch.from_numpy(done.stream)
    n, k = done.shape.n, done.shape.k
    return Coded(n, k, codes, side, arrivals, done.escapes, done.plain_tiles)


@functools.cache
def _launch(n: int, k: int, device: int) -> Launch:
    shape, properties = Shape(n, k), torch.cuda.get_device_properties(device)
    return launch(shape.strips, shape.tiles, properties.multi_processor_count, properties.major)


@functools.cache
def _lib() -> ctypes.CDLL:
    lib = build.load("bf16x")
    void, i64, i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    lib.sk_bf16x_linear.argtypes = [*[void] * 7, i64, i64, *[i32] * 7, void]
    lib.sk_bf16x_decode.argtypes = [*[void] * 3, i64, *[i32] * 4, void]
    return lib


def _decode_step(x: torch.Tensor, coded: torch.Tensor, side: torch.Tensor, arrivals: torch.Tensor, n: int,
                 bias: torch.Tensor | None, chosen: Launch | None = None) -> torch.Tensor:  # fmt: skip
    m, k = x.shape
    chosen = chosen or _launch(n, k, x.device.index or 0)
    parts = chosen.parts if chosen.parts > 1 else 0
    partial = torch.empty(parts * Shape(n, k).strips * 16 * m, dtype=torch.float32, device=x.device)
    out = torch.empty((m, n), dtype=torch.bfloat16, device=x.device)
    code = _lib().sk_bf16x_linear(
        coded.data_ptr(), side.data_ptr(), x.data_ptr(), None if bias is None else bias.data_ptr(),
        out.data_ptr(), partial.data_ptr(), arrivals.data_ptr(), x.stride(0), out.stride(0), m, n, k,
        chosen.parts, chosen.grid, chosen.warps, chosen.stages, stream(x),
    )  # fmt: skip
    check(code, "bf16x linear")
    return out


def decode_rows(
    coded: torch.Tensor, side: torch.Tensor, n: int, k: int, first_strip: int, panel: torch.Tensor
) -> torch.Tensor:
    """Decode strips from ``first_strip`` on into ``panel`` (16 rows each, k); return the rows that exist."""
    strips = min(panel.shape[0] // 16, Shape(n, k).strips - first_strip)
    code = _lib().sk_bf16x_decode(
        coded.data_ptr(),
        side.data_ptr(),
        panel.data_ptr(),
        panel.stride(0),
        n,
        k,
        first_strip,
        strips,
        stream(panel),
    )
    check(code, "bf16x decode")
    return panel[: min(strips * 16, n - first_strip * 16)]


def decode(coded: Coded) -> torch.Tensor:
    """Return the (n, k) weight, bit for bit as it was encoded (device copies only)."""
    out = torch.empty(
        (Shape(coded.n, coded.k).strips * 16, coded.k),
        dtype=torch.bfloat16,
        device=coded.stream.device,
    )
    return decode_rows(coded.stream, coded.side, coded.n, coded.k, 0, out)


def _prefill(
    x: torch.Tensor, coded: torch.Tensor, side: torch.Tensor, n: int, bias: torch.Tensor | None
) -> torch.Tensor:
    m, k = x.shape
    out = torch.empty((m, n), dtype=torch.bfloat16, device=x.device)
    rows = min(Shape(n, k).strips * 16, max(16, PANEL_BYTES // (2 * k) // 16 * 16))
    panel = torch.empty((rows, k), dtype=torch.bfloat16, device=x.device)
    for first in range(0, n, rows):
        weight = decode_rows(coded, side, n, k, first // 16, panel)
        part = slice(first, first + weight.shape[0])
        if bias is None:
            torch.mm(x, weight.t(), out=out[:, part])
        else:
            torch.addmm(bias[part], x, weight.t(), out=out[:, part])
    return out


@torch.library.custom_op("spark_kernels::bf16x_linear", mutates_args=(), device_types="cuda")
def bf16x_linear(
    x: torch.Tensor,
    coded: torch.Tensor,
    side: torch.Tensor,
    arrivals: torch.Tensor,
    n: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Return ``x @ w.T + bias`` in bfloat16, accumulated in float32.

    Args:
        x: (..., k) bfloat16 activations.
        coded: the stream of ``Coded``, uint8.
        side: its side array, int32.
        arrivals: its counters, int32, zero before and after.
        n: rows of the weight.
        bias: (n,) bfloat16, added in float32 before rounding, or None.

    For up to 32 tokens a row's result does not depend on how many tokens stand beside it.
    """
    flat = x.reshape(-1, x.shape[-1])
    if flat.stride(1) != 1 or flat.stride(0) % 8 or flat.data_ptr() % 16:
        flat = flat.contiguous()
    if flat.shape[0] == 0:
        out = flat.new_empty((0, n))
    elif flat.shape[0] <= DECODE_TOKENS:
        out = _decode_step(flat, coded, side, arrivals, n, bias)
    else:
        out = _prefill(flat, coded, side, n, bias)
    return out.view(*x.shape[:-1], n)


@bf16x_linear.register_fake
def _(
    x: torch.Tensor,
    coded: torch.Tensor,
    side: torch.Tensor,
    arrivals: torch.Tensor,
    n: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    del coded, side, arrivals, bias
    return x.new_empty((*x.shape[:-1], n))


def linear(x: torch.Tensor, weight: Coded, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Apply an encoded weight to (..., k) activations; see ``bf16x_linear``."""
    out: torch.Tensor = torch.ops.spark_kernels.bf16x_linear(
        x, weight.stream, weight.side, weight.arrivals, weight.n, bias
    )
    return out
