"""What the screened LM head must produce, in NumPy, and the bound that makes it exact."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from spark_kernels.bf16x.reference import U16, to_float64

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
COUNTS = 32512  # an activation is an integer in +-32512 = 127 * 256, times max|x| / 32512


@dataclass(frozen=True, slots=True)
class Quantised:
    """An (n, k) weight as int8 ``codes`` times ``scale`` (n,), with norms (n,) that bound the rest."""

    codes: npt.NDArray[np.int8]
    scale: F32
    screen: F64  # |w - scale * codes|
    norm: F64  # at least |w| and |scale * codes|


def bf16_bits(values: F64) -> U16:
    """Round to the nearest bf16, ties to even; finite values (float64 to float32 is rounded first)."""
    u = values.astype(np.float32).view(np.uint32)
    return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)


def quantise(weight: U16) -> Quantised:
    """Quantise rows of bf16 patterns to int8 with the largest magnitude at 127."""
    w = to_float64(weight)
    scale = (np.abs(w).max(axis=1).astype(np.float32) / np.float32(127)).astype(np.float32)
    safe = np.where(scale > 0, scale, 1).astype(np.float32)
    codes = np.clip(np.rint(w.astype(np.float32) / safe[:, None]), -127, 127).astype(np.int8)
    screen = np.linalg.norm(w - scale[:, None].astype(np.float64) * codes, axis=1)
    return Quantised(codes, scale, screen, np.linalg.norm(w, axis=1) + screen)


def coarse(head: Quantised, x: U16) -> tuple[F64, F64]:
    """Return the (n,) coarse logits of one token and a bound on their distance from any float32 sum.

    With w = s q + r and x = u c + d (c integers): w.x - s u (q.c) = r.x + s q.d, so the distance is
    at most |r| |x| + |s q| |d| (Cauchy-Schwarz); k roundings of 2^-24 of |w| |x| stand for the
    float32 sum, in whatever order it is done.
    """
    values = to_float64(x)
    unit = np.float32(np.abs(values).max()) / np.float32(COUNTS)
    counts = np.rint(values / unit) if unit > 0 else np.zeros_like(values)
    logits = head.scale * np.float64(unit) * (head.codes.astype(np.float64) @ counts)
    length = float(np.linalg.norm(values))
    rest = float(np.linalg.norm(values - unit * counts)) + (x.size + 4) * 2.0**-24 * length
    return logits, head.screen * length + head.norm * rest


def candidates(head: Quantised, x: U16, k: int = 1) -> npt.NDArray[np.int64]:
    """Return the rows that can be among the k largest bf16 logits of one token."""
    logits, bound = coarse(head, x)
    floor = np.partition(logits - bound, -k)[-k]
    reaches = to_float64(bf16_bits(logits + bound)) >= to_float64(bf16_bits(np.array([floor])))[0]
    return np.flatnonzero(reaches)


def greedy(weight: U16, x: U16) -> int:
    """Return the first index of the largest bf16 logit of one token: the full head."""
    logits = bf16_bits(to_float64(weight) @ to_float64(x))
    return int(np.argmax(to_float64(logits)))


def screened_greedy(weight: U16, head: Quantised, x: U16) -> int:
    """Return the same index from the rows that the screen leaves."""
    rows = candidates(head, x)
    logits = to_float64(bf16_bits(to_float64(weight[rows]) @ to_float64(x)))
    return int(rows[np.argmax(logits)])
