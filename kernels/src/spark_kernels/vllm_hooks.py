"""The seams in vLLM 0.32.0 that several kernels share: what happens to a layer once it is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.model_executor.layers import linear, vocab_parallel_embedding

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

UNQUANTISED = (linear.UnquantizedLinearMethod, vocab_parallel_embedding.UnquantizedEmbeddingMethod)


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
