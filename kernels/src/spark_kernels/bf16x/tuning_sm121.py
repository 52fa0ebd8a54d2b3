"""Launch parameters of the bf16x linear kernel: how a matrix is dealt to the multiprocessors.

The loop is bound by memory on GB10 (SM 12.1) and H100 alike; what is left to choose is how many bytes
are in flight and how evenly the tiles fall. GB10's values follow from its limits (99 KiB of shared
memory a block, 48 multiprocessors) and were not run on hardware; `spark-kernels tune` measures them.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Launch:
    """A launch: ``parts`` of K per strip, blocks in the grid, warps a block, tiles in a warp's ring."""

    parts: int
    grid: int
    warps: int
    stages: int


# (warps, stages) by compute capability major; 6,176 bytes a tile.
RINGS = {9: (12, 2), 12: (6, 2)}


def launch(strips: int, tiles: int, sms: int, major: int) -> Launch:
    """Choose the split of K that loads the multiprocessors most evenly; ties go to the fewest parts.

    A unit is one part of one strip; a multiprocessor gets ``ceil(units / sms)`` of at most
    ``ceil(tiles / parts)`` tiles. 1 % a part stands for its partial sums.
    """
    warps, stages = RINGS.get(major, RINGS[12])

    def cost(parts: int) -> tuple[float, int]:
        units = -(-strips * parts // sms)
        return units * (-(-tiles // parts)) * (1 + 0.01 * parts), parts

    parts = min(range(1, tiles + 1), key=cost)
    return Launch(parts, min(sms, strips * parts), warps, stages)
