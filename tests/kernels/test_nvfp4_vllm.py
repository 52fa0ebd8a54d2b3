"""nvfp4's place in vLLM 0.32.0's kernel registry, in the real engine's environment."""

from collections.abc import Callable
from typing import Any

import pytest
from spark_kernels import build


@pytest.fixture(scope="module")
def registered(
    nvcc: str, in_engine: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, object]:
    """What the registry holds after registering twice; the library is compiled, no GPU is used."""
    del nvcc
    folder = tmp_path_factory.mktemp("lib")
    build.compile_library("nvfp4", ["120f"], folder / "nvfp4.so")
    found: dict[str, object] = in_engine("nvfp4_registry.py", SPARK_KERNELS_LIB_DIR=str(folder))
    return found


def test_marlins_place_is_taken_once(registered: dict[str, object]) -> None:
    """Registering, twice even, puts our class exactly where Marlin was, in the order and by name."""
    assert registered["same_place"] is True
    assert registered["by_name"] is True


def test_weight_only_layers_get_our_kernel(registered: dict[str, object]) -> None:
    """The selection of vLLM for W4A16, which forces Marlin by name, returns our subclass of it."""
    assert registered["weight_only"] == "SparkNvFp4LinearKernel"
    assert registered["is_marlin"] is True


def test_layers_that_do_not_fit_stay_with_marlin(registered: dict[str, object]) -> None:
    """A layer on the CPU or with other activations is declined with a reason."""
    assert "on cpu" in str(registered["on_cpu"])
    assert "float32" in str(registered["float32"])
