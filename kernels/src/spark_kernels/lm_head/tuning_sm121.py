"""Launch parameters of the screened LM head.

GB10's ring follows from its 99 KiB of shared memory a block and was not run on hardware.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Launch:
    """Warps a block and 4 KiB tiles in a warp's ring for the coarse pass; rescoring blocks a multiprocessor."""

    warps: int
    stages: int
    rescore_blocks: int = 4


# By compute capability major.
LAUNCHES = {9: Launch(12, 3), 12: Launch(6, 3)}


def launch(major: int) -> Launch:
    """Return the launch for a device of this compute capability."""
    return LAUNCHES.get(major, LAUNCHES[12])


def capacity(vocabulary: int) -> int:
    """Candidates a token may have before all rows are rescored: 1/16 of them.

    Rescoring that many reads 1/8 of the int8 pass's bytes; beyond it the bound tells too little.
    """
    return max(256, vocabulary // 16)
