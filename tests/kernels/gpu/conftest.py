"""Tests that run kernels: skipped, saying so, where there is no GPU."""

import importlib.util

import pytest


@pytest.fixture(scope="session")
def requires_gpu() -> None:
    """Skip without an NVIDIA GPU that torch can use."""
    if importlib.util.find_spec("torch") is None:
        pytest.skip("needs an NVIDIA GPU and torch")
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
