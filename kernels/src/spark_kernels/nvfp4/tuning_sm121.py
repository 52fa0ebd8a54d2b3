"""Launch parameters of the skinny GEMM: how many rows a tile has and how many thread blocks run.

They depend on (N, K) and the device alone, never on M: the order of every sum, and with it every
bit of the result, is the same for a row whether it is computed alone or with others.
"""

from dataclasses import dataclass
from typing import Final

from spark_kernels.nvfp4.packing import BLOCK_K

WARPS: Final = 8


@dataclass(frozen=True, slots=True)
class Plan:
    """``rows``: 16-row sub-tiles of a tile (1, 2 or 4). ``grid``: thread blocks of a launch."""

    rows: int
    grid: int


def plan(n: int, k: int, multiprocessors: int) -> Plan:
    """Choose the launch of an [N, K] weight.

    Larger tiles read the activations less often; smaller ones spread a small matrix over more
    multiprocessors. A thread block wants at least one (tile, K block) unit for each of its warps.
    """
    blocks = -(-k // BLOCK_K)
    for rows in (4, 2, 1):
        units = -(-n // (16 * rows)) * blocks
        if units >= 4 * WARPS * multiprocessors or rows == 1:
            break
    return Plan(rows, max(1, min(multiprocessors, units // WARPS)))
