"""Run by test_rmsnorm_fp4_vllm.py in the engine's environment: what the pass makes of a traced layer.

vLLM's CPU build has no scaled_fp4_quant; an operator of its schema stands in, as the graph alone is
looked at. The pattern matcher, the norm's operator and the pass base are vLLM's.
"""

# ruff: noqa: FBT003 - operators take their arguments by position

import json
import sys

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from vllm import _custom_ops  # noqa: F401 - before the stand-in: it registers fakes for whatever there is

library = torch.library.Library("_C", "FRAGMENT")
library.define(
    "scaled_fp4_quant.out(Tensor input, Tensor input_scale, bool is_sf_swizzled_layout, *, "
    "Tensor(a!) output, Tensor(b!) output_scale) -> ()"
)


@torch.library.register_fake("_C::scaled_fp4_quant.out", lib=library)
def _(input, input_scale, is_sf_swizzled_layout, *, output, output_scale):  # noqa: A002, ANN001, ANN202, ARG001
    return None


def traced(*, pad: int = 0, weight_dtype: torch.dtype = torch.bfloat16) -> list[str]:
    """Return the operators of add + norm + quantisation after the pass, hidden size 64."""
    import vllm.ir
    from spark_kernels.rmsnorm_fp4.vllm import GemmaNormNvFp4FusionPass
    from vllm.config import VllmConfig, set_current_vllm_config

    with set_current_vllm_config(VllmConfig()) as _:
        fusion = GemmaNormNvFp4FusionPass(VllmConfig())
    targets: list[str] = []

    def layer(x, residual, weight, scale):  # noqa: ANN001, ANN202
        norm, added = vllm.ir.ops.fused_add_rms_norm(x, residual, weight.float() + 1.0, 1e-6)
        codes = torch.empty((x.shape[0], 32 + pad), dtype=torch.uint8)
        blocks = torch.empty((128, 1), dtype=torch.int32)
        torch.ops._C.scaled_fp4_quant.out(norm, scale, True, output=codes, output_scale=blocks)
        return codes, blocks, added

    def compiler(module, _inputs):  # noqa: ANN001, ANN202
        fusion.patterns.apply(module.graph)
        module.graph.eliminate_dead_code()
        targets.extend(str(n.target) for n in module.graph.nodes if n.op == "call_function")
        raise KeyboardInterrupt  # the graph is all that is wanted

    arguments = (
        torch.zeros(5, 64, dtype=torch.bfloat16),
        torch.zeros(5, 64, dtype=torch.bfloat16),
        torch.zeros(64, dtype=weight_dtype),
        torch.zeros(1),
    )
    backend = aot_autograd(fw_compiler=compiler, decompositions=select_decomp_table())
    torch._dynamo.reset()
    with (
        torch._inductor.config.patch(enable_auto_functionalized_v2=False),
        vllm.ir.enable_torch_wrap(True),
        torch.no_grad(),
    ):
        try:
            torch.compile(layer, backend=backend)(*arguments)
        except KeyboardInterrupt:
            return targets
    raise AssertionError("the compiler was not reached")


if __name__ == "__main__":
    found = {
        "plain": traced(),
        "padded": traced(pad=32),
        "float32": traced(weight_dtype=torch.float32),
    }
    json.dump(found, sys.stdout)
