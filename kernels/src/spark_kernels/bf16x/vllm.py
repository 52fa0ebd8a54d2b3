"""bf16x in vLLM 0.32.0: unquantised linear layers are encoded once their weights are loaded."""

from __future__ import annotations

import itertools
import logging
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers import linear as vllm_linear

from spark_kernels import build, vllm_hooks
from spark_kernels.bf16x import api
from spark_kernels.bf16x.selection import Selection

if TYPE_CHECKING:
    from collections.abc import Mapping

logger = logging.getLogger("vllm.spark_kernels")
_heads = itertools.count(1)

# Exactly these forwards pass through quant_method.apply; a subclass with its own (GateLinear, LoRA's)
# may read `weight` itself.
_PLAIN_FORWARDS = frozenset(
    getattr(vllm_linear, name).forward
    for name in (
        "ColumnParallelLinear",
        "MergedColumnParallelLinear",
        "QKVParallelLinear",
        "RowParallelLinear",
        "ReplicatedLinear",
    )
)


class CodedLinearMethod(vllm_linear.LinearMethodBase):  # type: ignore[misc]
    """Applies a layer whose weight was encoded; a stand-in holds its parameter's place."""

    supports_pre_processed_weights = False

    def create_weights(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - vLLM's signature
        """Never called: the unquantised method made the weight."""
        raise NotImplementedError

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return ``x @ w.T + bias``."""
        out: torch.Tensor = torch.ops.spark_kernels.bf16x_linear(
            x, layer.bf16x_stream, layer.bf16x_side, layer.bf16x_arrivals, layer.bf16x_rows, bias
        )
        return out


def encode_layer(layer: torch.nn.Module, selection: Selection, *, is_head: bool) -> bool:
    """Encode one loaded layer in place if the selection takes it; say so in the log."""
    name = "lm_head" if is_head else getattr(layer, "prefix", "")
    weight = getattr(layer, "weight", None)
    if weight is None or not weight.is_cuda or weight.dtype != torch.bfloat16 or weight.dim() != 2:  # noqa: PLR2004
        return False
    if not selection.takes(name, tuple(weight.shape)):
        return False
    coded = api.encode(weight.data)
    if not selection.worth(coded.nbytes, weight.numel() * 2):
        logger.info("bf16x: %s stays bf16, %s", name, coded.describe())
        return False
    layer.register_buffer("bf16x_stream", coded.stream, persistent=False)
    layer.register_buffer("bf16x_side", coded.side, persistent=False)
    layer.register_buffer("bf16x_arrivals", coded.arrivals, persistent=False)
    layer.bf16x_rows = coded.n
    # Not empty: vLLM shares a target's head with a drafter when their weights are equal, and two empty
    # tensors are. Each coded head's stand-in is a number of its own.
    stand_in = weight.new_full((1,), float(next(_heads)) if is_head else 0.0)
    layer.weight = torch.nn.Parameter(stand_in, requires_grad=False)
    layer.quant_method = CodedLinearMethod()
    vllm_hooks.graph_depends_on("bf16x", name, coded.n)
    logger.info("bf16x: %s %s", name, coded.describe())
    return True


def register(options: Mapping[str, Any]) -> None:
    """Encode the layers that the options select, from the next model load on.

    Raises:
        LibraryMissingError: the kernel's library is not there.
    """
    build.load("bf16x")
    selection = Selection.from_options(options)

    def take(layer: torch.nn.Module) -> None:
        head = vllm_hooks.is_head(layer)
        if (head and not vllm_hooks.is_tied(layer)) or type(layer).forward in _PLAIN_FORWARDS:
            encode_layer(layer, selection, is_head=head)

    vllm_hooks.after_loading(take)
