"""nvfp4 against vLLM's Marlin on the layers of Qwen3.5-27B and one small shared expert.

``bench_nvfp4_ordered`` is the same without programmatic dependent launch: what the kernel does when the
kernel before it does not let it start early.
"""

import functools

import peers
import torch
from run import Case, Provider
from spark_kernels.nvfp4 import api

NAMED = [(34816, 5120), (5120, 17408), (16384, 5120), (5120, 6144), (2048, 512)]
CASES = [Case(n, k, m) for n, k in NAMED for m in (1, 4, 8)]
GLOBAL_SCALE = 1e-3


def copies(n: int, k: int) -> int:
    """Return how many weights pass three L2 caches (at most 300: the smallest shape takes 180 MB so)."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return min(300, 3 * cache // (n * k * 9 // 16) + 2)


@functools.cache
def weights(n: int, k: int) -> tuple[list[api.Weight], list[peers.Linear]]:
    """Return copies of a random [N, K] weight, ours and Marlin's; the last shape's alone are kept."""
    ours, marlin, have = [], [], peers.load_vllm()
    for _ in range(copies(n, k)):
        codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
        scales = torch.randint(40, 127, (n, k // 16), dtype=torch.uint8, device="cuda")
        ours.append(api.prepare(codes, scales, GLOBAL_SCALE))
        if have:
            marlin.append(peers.marlin_nvfp4(codes, scales, GLOBAL_SCALE))
    if have:  # the peer does the same work
        x = torch.randn(8, k, device="cuda").bfloat16()
        torch.testing.assert_close(api.linear(x, ours[-1]), marlin[-1](x), rtol=2e-2, atol=0.5)
    return ours, marlin


def providers(case: Case, *, pdl: bool = True) -> dict[str, Provider]:
    """Return ours and Marlin on the same weights."""
    if case.m == 1:
        weights.cache_clear()
    ours, marlin = weights(case.n, case.k)
    x = torch.randn(case.m, case.k, device="cuda").bfloat16()
    nbytes = case.n * case.k * 9 // 16 + 2 * case.m * (case.n + case.k)
    found = {
        "nvfp4": Provider([functools.partial(api.linear, x, w, pdl=pdl) for w in ours], nbytes)
    }
    if marlin:
        found["Marlin"] = Provider([functools.partial(call, x) for call in marlin], nbytes)
    return found
