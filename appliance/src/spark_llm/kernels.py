"""Memory that our kernels take beside a checkpoint, and what they give back of it. Pure.

``spark_kernels`` runs in the engine, not here; the tests hold these formulas against its own code.
"""

import re
from enum import StrEnum

VARIABLE = "SPARK_KERNELS"
LM_HEAD = "lm_head"
BF16X = "bf16x"


class Presence(StrEnum):
    """Whether the engine has our kernels: not at all, on a GPU that they are not tuned for, on a GB10."""

    NONE = "none"
    OTHER_GPU = "other_gpu"
    GB10 = "gb10"


def active(presence: Presence, switches: str) -> frozenset[str]:
    """Those of ``lm_head`` and ``bf16x`` that the plugin registers (``spark_kernels/policy.py``).

    Args:
        presence: what the engine has and runs on.
        switches: value of ``SPARK_KERNELS``; terms the plugin would refuse turn everything off, as there.
    """
    terms = {term.strip().lower() for term in switches.split(",")} - {"", "auto"}
    forced = "force" in terms
    if presence is Presence.NONE or terms & {"off", "0"}:
        return frozenset()
    if presence is Presence.OTHER_GPU and not forced:
        return frozenset()
    names = terms - {"force"}
    if not {name.removeprefix("-") for name in names} <= _KERNELS:
        return frozenset()
    only = {name for name in names if not name.startswith("-")}
    without = {name[1:] for name in names if name.startswith("-")}
    return frozenset(((only or _KERNELS) - without) & {LM_HEAD, BF16X})


_KERNELS = frozenset({LM_HEAD, BF16X, "nvfp4", "rmsnorm_fp4", "tuned"})
_MIN_ROWS = 65_536  # policy.toml, row lm_head
MAX_TOKENS = 16
"""Tokens of one step up to which the LM head is screened."""
_TOKEN_BYTES = 64  # at least sizeof(Token) of lm_head/kernel.cu


def screened_head_bytes(rows: int, width: int) -> int:
    """What the screened LM head keeps beside the BF16 one (``lm_head/api.py``, ``prepare``), in bytes.

    Args:
        rows: of the vocabulary on this node; below 65,536 the plugin leaves the head alone.
        width: hidden size.
    """
    if rows < _MIN_ROWS or width % 8:
        return 0
    strips, blocks = -(-rows // 16), -(-width // 64)
    codes, bounds = strips * blocks * 1024, strips * 16 * 4 * 4
    limbs, tokens = 2 * blocks * 64, _TOKEN_BYTES
    logits, listed = 2 * rows * 4, max(256, rows // 16) * 4
    return codes + bounds + MAX_TOKENS * (limbs + tokens + logits + listed)


def screened_step_bytes(rows: int, width: int, tokens: float) -> float:
    """What the screened LM head reads in one step, without the few rows that it rescores (``lm_head/README.md``).

    Args:
        rows: of the vocabulary on this node.
        width: hidden size.
        tokens: in the step; above 16 the plugin takes the full head.
    """
    return rows * (width + 16 + 8 * tokens)


def coded_bytes(rows: int, width: int) -> int:
    """A BF16 matrix in bf16x's format without escapes: 12 bits a weight, 32 bytes of header a tile, counters."""
    strips, blocks, tiles = -(-rows // 16), -(-width // 64), -(-width // 256)
    return strips * (tiles * 32 + blocks * 1536) + 4 * strips + 16


CODED_SHARE = (1536 * 4 + 32) / (16 * 256 * 2)
"""What coding leaves of a large BF16 matrix without escapes."""

_CODED = re.compile(
    r"(^|\.)(qkv_proj|qkvz_proj|q_proj|k_proj|v_proj|o_proj|in_proj|in_proj_qkv|in_proj_qkvz|in_proj_z|in_proj_ba|"
    r"out_proj|gate_up_proj|down_proj|gate_proj|up_proj)\.weight$"
)
_NOT_CODED = re.compile(r"visual|vision|audio|(^|\.)experts\.")


def is_coded(name: str, dtype: str) -> bool:
    """Whether bf16x takes the tensor ``name`` of a checkpoint, as far as a name says (policy.toml, row bf16_linear)."""
    return dtype == "BF16" and bool(_CODED.search(name)) and not _NOT_CODED.search(name)
