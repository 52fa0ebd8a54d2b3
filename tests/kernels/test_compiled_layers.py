"""Our layers under torch.compile, as vLLM compiles a model unless it is told not to."""

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(scope="module")
def layers(in_engine: Callable[..., Any]) -> dict[str, Any]:
    """What was compiled for 3, 40 and 2048 tokens, by kernel."""
    found: dict[str, Any] = in_engine("compiled_layers.py")
    return found


@pytest.mark.parametrize("kernel", ["bf16x", "nvfp4"])
def test_a_layer_is_one_graph_for_every_number_of_tokens(
    kernel: str, layers: dict[str, Any]
) -> None:
    """One graph with our operator in it serves decode and prefill: which of the two it is stays inside the operator."""
    assert layers[kernel]["graphs"] == 1
    operators = layers[kernel]["operators"]
    assert [name for name in operators if "spark_kernels" in name] == [
        f"spark_kernels.{kernel}_linear"
    ]


LAYERS = ("nvfp4 1.0 96", "bf16x q_proj 64")


def test_a_compiled_graph_is_found_again_by_the_layers_it_was_made_of(
    in_engine: Callable[..., Any],
) -> None:
    """The key by which vLLM finds a compiled graph is the same for the same layers of ours, another for any other."""
    keys = [
        in_engine("compile_key.py", *layers)
        for layers in ((), LAYERS, LAYERS, LAYERS[:1], ("nvfp4 1.5 96", LAYERS[1]))
    ]
    none, first, again, fewer, other_scale = keys
    assert first == again
    assert len({none, first, fewer, other_scale}) == 4
