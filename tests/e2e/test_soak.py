from pathlib import Path

from tests.e2e.soak import growth, soak


def test_short_soak(engine_cache: Path) -> None:
    """Load with a kill, a freeze and a switch: every answer whole, every error well-formed, nothing left."""
    tally = soak(20, seed=7, squeeze=False, between_s=4, cache=engine_cache)
    assert tally.violations == []
    assert tally.outcomes["whole answer"] > 10
    assert set(tally.faults) == {"engine killed", "engine frozen for 5 s", "switched"}
    assert growth(tally.fds) < 1.5
