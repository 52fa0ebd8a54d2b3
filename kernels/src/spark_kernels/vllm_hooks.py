"""The seams in vLLM 0.32.0 that several kernels share: a layer once it is loaded, and the key of the compile cache."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from vllm import envs
from vllm.model_executor.layers import linear, vocab_parallel_embedding

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

COMPILE_FACTOR = "SPARK_KERNELS_GRAPH"
UNQUANTISED = (linear.UnquantizedLinearMethod, vocab_parallel_embedding.UnquantizedEmbeddingMethod)

_graph_facts: list[str] = []


def graph_depends_on(*facts: object) -> None:
    """Make compiled graphs with other facts than these be compiled anew.

    vLLM finds a compiled graph again by its configuration and its environment (``envs.compile_factors``), which name
    neither what replaced a layer's kernel nor the numbers of a layer that the graph holds as constants, such as the
    global scale of its weights: it would run the graph of other kernels, or of other weights, on these. Whoever puts an
    operator into the graph says here what the operator's constants are. The factors are read at the first forward
    pass, after all layers were loaded.
    """
    _graph_facts.append(repr(facts))
    envs.environment_variables[COMPILE_FACTOR] = _graph_digest


def _graph_digest() -> str:
    return hashlib.sha256("\n".join(_graph_facts).encode()).hexdigest()


def after_loading(take: Callable[[torch.nn.Module], object]) -> None:
    """Call ``take`` on every layer that vLLM leaves unquantised, after its own post-processing.

    Several callers are called in the order they came; one may replace the layer's quant_method.
    """
    for method in UNQUANTISED:
        _wrap(method, take)


def _wrap(method: type, take: Callable[[torch.nn.Module], object]) -> None:
    inner = method.process_weights_after_loading  # type: ignore[attr-defined]

    def process_weights_after_loading(self: object, layer: torch.nn.Module) -> None:
        inner(self, layer)
        if type(self) is method and layer.quant_method is self:
            take(layer)

    method.process_weights_after_loading = process_weights_after_loading  # type: ignore[attr-defined]


def is_head(layer: torch.nn.Module) -> bool:
    """Say whether a layer is an LM head."""
    return isinstance(layer, vocab_parallel_embedding.ParallelLMHead)


def is_tied(layer: torch.nn.Module) -> bool:
    """Say whether a head's weight is the input embedding's, which looks up its rows.

    vLLM ties by assigning the embedding's parameter: the head's own weight loader is then not the
    one that the parameter carries.
    """
    loader = getattr(layer.weight, "weight_loader", None)
    return getattr(loader, "__self__", layer) is not layer
