"""Launch parameters of the bf16x linear kernel: how a matrix is dealt to the multiprocessors.

The loop is bound by memory on GB10 (SM 12.1) and H100 alike; what is left to choose is how many bytes
are in flight and how evenly the tiles fall. GB10's values follow from its limits (99 KiB of shared
memory a block, 48 multiprocessors) and were not run on hardware.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Launch:
    """A launch: ``parts`` of K a strip, blocks in the grid, warps a block, tiles in a warp's ring."""

    parts: int
    grid: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class Ring:
    """A block's ring of 6,176-byte tiles, and how many in flight a multiprocessor needs.

    ``needed`` is bandwidth times latency over the tile size: on an H100 3 TB/s * 2 us / 132 / 6 KiB,
    on GB10 273 GB/s * 1.5 us / 48 / 6 KiB, rounded up.
    """

    warps: int
    stages: int
    needed: int


RINGS = {9: Ring(12, 2, 10), 12: Ring(6, 2, 2)}  # by compute capability major


def launch(strips: int, tiles: int, sms: int, major: int) -> Launch:
    """Choose the split of K: even over the multiprocessors, with enough in flight, in few parts.

    A unit is one part of one strip, done by one warp: a multiprocessor gets ``ceil(units / sms)`` of
    up to ``ceil(tiles / parts)`` tiles. The cost is the busiest multiprocessor's tiles, stretched
    when its units keep fewer in flight than needed, plus 1 % a part for the partial sums.
    """
    ring = RINGS.get(major, RINGS[12])

    def cost(parts: int) -> tuple[float, int]:
        units = -(-strips * parts // sms)
        in_flight = min(units, ring.warps) * min(ring.stages, -(-tiles // parts))
        stretch = max(1.0, ring.needed / in_flight)
        return units * -(-tiles // parts) * stretch * (1 + 0.01 * parts), parts

    parts = min(range(1, tiles + 1), key=cost)
    return Launch(parts, min(sms, strips * parts), ring.warps, ring.stages)
