"""Fixtures of the Nix tests: the real Nix, bootstrapped once."""

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT / "nix" / "update-pins"), str(ROOT / "pkgs" / "python-env")]


@pytest.fixture(scope="session")
def nix() -> str:
    """The version of the Nix in use; fails, saying what is missing, where none can be had."""
    import flake

    try:
        return flake.run_nix("--bootstrap")
    except flake.NixError as error:
        pytest.fail(f"no Nix to test with: {error}", pytrace=False)
