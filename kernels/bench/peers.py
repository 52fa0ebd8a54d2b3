"""Peers from vLLM's own wheel: its compiled operators, loaded without vLLM's Python.

``SPARK_BENCH_VLLM_LIB`` names ``_C_stable_libtorch.abi3.so`` of vLLM 0.32.0 (x86_64 or aarch64
wheel). It loads beside torch >= 2.11; nothing else of vLLM is needed.
"""

# ruff: noqa: FBT003, PLR2004, SLF001 - vLLM's operators take their arguments by position, from a namespace called _C

import functools
import os
from collections.abc import Callable
from typing import TypeAlias

import torch

Linear: TypeAlias = Callable[[torch.Tensor], torch.Tensor]

FLOAT4_E2M1F = 562949953487106  # the id of vllm.scalar_type's float4_e2m1f
MARLIN_LOCKS_PER_SM = 4


@functools.cache
def load_vllm() -> bool:
    """Load the operators. False (and a line on stdout) if the library is not named."""
    path = os.environ.get("SPARK_BENCH_VLLM_LIB")
    if not path:
        print("SPARK_BENCH_VLLM_LIB is not set: no vLLM peer in this run")
        return False
    torch.ops.load_library(path)
    return True


def _marlin_scales(scales: torch.Tensor) -> tuple[torch.Tensor, float]:
    """E4M3 [N, K/16] -> Marlin's permuted E5M3 bytes [K/16, N] and the factor it wants divided out.

    The layout is the one that vLLM's marlin_utils_fp4 hands its kernel: columns in 8 x 8 transposed
    blocks, then pairs of four interleaved, scales times 2**7 with the half's top byte kept.
    """
    n = scales.shape[0]
    order = [row + 8 * column for row in range(8) for column in range(8)]
    s = scales.view(torch.float8_e4m3fn).t().contiguous().to(torch.bfloat16)
    s = s.reshape(-1, 64)[:, order].reshape(-1, n).to(torch.half)
    s = s.view(-1, 4)[:, [0, 2, 1, 3]].reshape(-1, n)
    largest = s.float().max().item() * 2**7
    factor = 2.0 ** int(torch.tensor(448 * 2**7 / largest).log2().floor())
    s = (s.float() * max(factor, 1.0)).to(torch.half) * 2**7
    s[s < 2] = 0
    s = (s.contiguous().view(torch.int16) << 1).view(torch.float8_e4m3fn)
    return s[:, 1::2].contiguous(), max(factor, 1.0)


def marlin_nvfp4(codes: torch.Tensor, scales: torch.Tensor, global_scale: float) -> Linear:
    """Return vLLM's Marlin for this weight as a function of x [M, K] bfloat16."""
    n, k = codes.shape[0], codes.shape[1] * 2
    columns = codes.view(torch.int32).t().contiguous()
    weight = torch.ops._C.gptq_marlin_repack(columns, k, n, 4, False)
    packed, factor = _marlin_scales(scales)
    # 2**(126 - 7): bf16's exponent bias over E2M1's, less the 2**7 in the scales.
    scale = torch.tensor([global_scale * 2.0**119 / factor], device=codes.device)
    processors = torch.cuda.get_device_properties(codes.device).multi_processor_count
    locks = torch.zeros(processors * MARLIN_LOCKS_PER_SM, dtype=torch.int32, device=codes.device)

    def call(x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.ops._C.marlin_gemm(
            *(x, None, weight, None, packed, None, scale, None, locks, FLOAT4_E2M1F),
            *(x.shape[0], n, k, False, True, False),
        )
        return result

    return call
