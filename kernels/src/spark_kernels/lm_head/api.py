"""The screened LM head in torch: quantise once after loading, then greedy or top-k at every step."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch

from spark_kernels import build
from spark_kernels.launch import check, pointer, stream
from spark_kernels.lm_head.tuning_sm121 import Launch, capacity, launch

MAX_TOKENS = 16
MAX_TOP_K = 1024


class UnsupportedHeadError(ValueError):
    """The weight or the activations are not what the screened head takes."""


@dataclass(frozen=True, slots=True)
class Scratch:
    """Buffers of one step, allocated once so that a captured graph keeps its addresses."""

    limbs: torch.Tensor
    tokens: torch.Tensor
    upper: torch.Tensor
    lower: torch.Tensor
    listed: torch.Tensor


@dataclass(frozen=True, slots=True)
class Head:
    """An (n, k) bfloat16 weight with its int8 codes and the (n, 4) float rows of the bound."""

    weight: torch.Tensor
    codes: torch.Tensor
    rows: torch.Tensor
    scratch: Scratch

    @property
    def extra_bytes(self) -> int:
        """Bytes resident beside the bfloat16 weight."""
        step = self.scratch
        tensors = (
            self.codes,
            self.rows,
            step.limbs,
            step.tokens,
            step.upper,
            step.lower,
            step.listed,
        )
        return sum(t.numel() * t.element_size() for t in tensors)


@dataclass(frozen=True, slots=True)
class Screened:
    """A step's result: (m,) int64 ``winners`` and (m,) int32 ``rescored`` row counts (n: all rows)."""

    winners: torch.Tensor
    rescored: torch.Tensor


@functools.cache
def _lib() -> ctypes.CDLL:
    lib = build.load("lm_head")
    void, i64, i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    lib.sk_lm_head_quantise.argtypes = [void, i64, i32, i32, void, void, void]
    lib.sk_lm_head_coarse.argtypes = [void, void, void, i64, *[void] * 4, *[i32] * 6, void]
    lib.sk_lm_head_finish.argtypes = [
        void,
        i64,
        void,
        i64,
        *[void] * 4,
        i32,
        *[void] * 3,
        *[i32] * 4,
        void,
    ]
    return lib


@functools.cache
def _launch(device: int) -> tuple[Launch, int]:
    properties = torch.cuda.get_device_properties(device)
    return launch(properties.major), properties.multi_processor_count


def prepare(weight: torch.Tensor, max_tokens: int = MAX_TOKENS) -> Head:
    """Quantise an (n, k) bfloat16 weight on its GPU; the weight itself is kept for rescoring.

    Raises:
        UnsupportedHeadError: not a bfloat16 matrix with contiguous rows and k a multiple of 8.
    """
    if weight.dtype != torch.bfloat16 or weight.dim() != 2 or weight.stride(1) != 1:  # noqa: PLR2004
        raise UnsupportedHeadError(
            f"the screened head takes a bfloat16 matrix, not {weight.dtype} {tuple(weight.shape)}"
        )
    n, k = weight.shape
    if k % 8 or weight.stride(0) % 8 or not 1 <= max_tokens <= MAX_TOKENS:
        raise UnsupportedHeadError(
            f"k must be a multiple of 8 (is {k}) and tokens 1..{MAX_TOKENS} (is {max_tokens})"
        )
    strips, blocks, device = -(-n // 16), -(-k // 64), weight.device
    codes = torch.empty(strips * blocks * 1024, dtype=torch.int8, device=device)
    rows = torch.empty((strips * 16, 4), dtype=torch.float32, device=device)
    code = _lib().sk_lm_head_quantise(
        pointer(weight), weight.stride(0), n, k, pointer(codes), pointer(rows), stream(weight)
    )
    check(code, "lm_head quantise")
    scratch = Scratch(
        torch.empty(max_tokens * 2 * blocks * 64, dtype=torch.int8, device=device),
        torch.empty(max_tokens * _lib().sk_lm_head_token_bytes(), dtype=torch.uint8, device=device),
        torch.empty((max_tokens, n), dtype=torch.float32, device=device),
        torch.empty((max_tokens, n), dtype=torch.float32, device=device),
        torch.empty(max_tokens * capacity(n), dtype=torch.int32, device=device),
    )
    return Head(weight, codes, rows, scratch)


def _run(head: Head, hidden: torch.Tensor, top_k: int, logits: torch.Tensor | None) -> Screened:
    n, k = head.weight.shape
    m = hidden.shape[0]
    if hidden.dtype != torch.bfloat16 or hidden.dim() != 2 or hidden.shape[1] != k:  # noqa: PLR2004
        raise UnsupportedHeadError(
            f"hidden states must be bfloat16 (m, {k}), not {hidden.dtype} {tuple(hidden.shape)}"
        )
    if not 1 <= m <= head.scratch.upper.shape[0] or not 1 <= top_k <= min(MAX_TOP_K, n):
        raise UnsupportedHeadError(
            f"{m} tokens or top-{top_k} is more than this head was prepared for"
        )
    if hidden.stride(1) != 1 or hidden.stride(0) % 8 or hidden.data_ptr() % 16:
        hidden = hidden.contiguous()
    chosen, sms = _launch(hidden.device.index or 0)
    step, lib = head.scratch, _lib()
    lower = step.lower if top_k > 1 else None
    code = lib.sk_lm_head_coarse(
        pointer(head.codes), pointer(head.rows), pointer(hidden), hidden.stride(0),
        pointer(step.limbs), pointer(step.tokens), pointer(step.upper), pointer(lower),
        m, n, k, sms, chosen.warps, chosen.stages, stream(hidden),
    )  # fmt: skip
    check(code, "lm_head coarse")
    threshold = (
        None if lower is None else lower[:m].topk(top_k, sorted=True).values[:, -1].contiguous()
    )
    winners = torch.empty(m, dtype=torch.int64, device=hidden.device)
    rescored = torch.empty(m, dtype=torch.int32, device=hidden.device)
    code = lib.sk_lm_head_finish(
        pointer(head.weight), head.weight.stride(0), pointer(hidden), hidden.stride(0),
        pointer(step.upper), pointer(threshold), pointer(step.tokens), pointer(step.listed), capacity(n),
        pointer(logits), pointer(winners), pointer(rescored), m, n, k,
        sms * chosen.rescore_blocks, stream(hidden),
    )  # fmt: skip
    check(code, "lm_head rescore")
    return Screened(winners, rescored)


def greedy(head: Head, hidden: torch.Tensor) -> Screened:
    """Return the argmax of the bf16 logits (lowest index first) of (m, k) bfloat16 hidden states.

    Raises:
        UnsupportedHeadError: dtype, shape, or more tokens than prepared for.
    """
    return _run(head, hidden, 1, None)


def top_logits(head: Head, hidden: torch.Tensor, top_k: int = 1) -> torch.Tensor:
    """Return (m, n) bfloat16 logits, exact for every row that can be in the top k, else -inf.

    Raises:
        UnsupportedHeadError: as for ``greedy``, or top_k over 1,024.
    """
    logits = torch.empty(
        (hidden.shape[0], head.weight.shape[0]), dtype=torch.bfloat16, device=hidden.device
    )
    _run(head, hidden, top_k, logits)
    return logits
