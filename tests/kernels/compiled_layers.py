"""Run by test_compiled_layers.py in the engine's environment: what torch.compile makes of a layer of ours.

Operators that need a GPU are traced by their fakes; the compiled function then runs a stand-in, as only the graph and
the guards are looked at.
"""

import json
import sys
from collections.abc import Callable

import torch
from spark_kernels.bf16x.vllm import CodedLinearMethod
from spark_kernels.nvfp4.vllm import SparkNvFp4LinearKernel

ROWS, COLUMNS = 96, 64


def coded_layer(x: torch.Tensor) -> torch.Tensor:
    """A layer with a bf16x weight, as vLLM calls it."""
    return CodedLinearMethod.apply(METHODS, CODED, x, BIAS)


def nvfp4_layer(x: torch.Tensor) -> torch.Tensor:
    """A layer with an NVFP4 weight, as vLLM calls it."""
    return SparkNvFp4LinearKernel.apply_weights(METHODS, PACKED, x, BIAS)


METHODS = torch.nn.Module()
BIAS = torch.zeros(ROWS, dtype=torch.bfloat16)
CODED = torch.nn.Module()
CODED.bf16x_stream = torch.zeros(64, dtype=torch.uint8)
CODED.bf16x_side = torch.zeros(8, dtype=torch.int32)
CODED.bf16x_arrivals = torch.zeros(8, dtype=torch.int32)
CODED.bf16x_rows = ROWS
PACKED = torch.nn.Module()
PACKED.nvfp4_packed = torch.zeros(6, 1, 16, 16, dtype=torch.uint8)
PACKED.nvfp4_arrivals = torch.zeros(8, dtype=torch.int32)
PACKED.nvfp4_global_scale, PACKED.nvfp4_n, PACKED.nvfp4_grid = 1.0, ROWS, 4


def traced(layer: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, object]:
    """Call a compiled layer with a few and with many tokens.

    Returns:
        ``graphs``: how many were compiled; ``operators``: of the first.

    Raises:
        torch._dynamo.exc.Unsupported: the layer is not one graph.
        torch._dynamo.exc.UserError: the graph holds for one number of tokens only.
    """
    graphs: list[list[str]] = []

    def compiler(
        module: torch.fx.GraphModule, _inputs: list[torch.Tensor]
    ) -> Callable[..., tuple[torch.Tensor]]:
        graphs.append([str(n.target) for n in module.graph.nodes if n.op.startswith("call_")])

        def stand_in(*inputs: object) -> tuple[torch.Tensor]:
            tokens = next(
                i for i in inputs if isinstance(i, torch.Tensor) and i.shape[-1] == COLUMNS
            )
            return (tokens.new_zeros(tokens.shape[0], ROWS),)

        return stand_in

    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=compiler, fullgraph=True)
    for count in (3, 40, 2048):
        x = torch.zeros(count, COLUMNS, dtype=torch.bfloat16)
        torch._dynamo.mark_dynamic(x, 0)
        with torch.no_grad():
            assert compiled(x).shape == (count, ROWS)
    return {"graphs": len(graphs), "operators": graphs[0]}


if __name__ == "__main__":
    json.dump({"bf16x": traced(coded_layer), "nvfp4": traced(nvfp4_layer)}, sys.stdout)
