"""bf16x against cuBLAS on layers too small for bandwidth alone to decide: what a call costs beside its bytes."""

import functools

import torch
from run import Case, Provider, rotations
from spark_kernels.bf16x import api

SMALL = [(6144, 4096), (4096, 4096), (1024, 5120), (96, 5120)]
CASES = [Case(n, k, m) for n, k in SMALL for m in (1, 8)]


@functools.cache
def weights(n: int, k: int) -> tuple[list[torch.Tensor], list[api.Coded]]:
    """Return copies of an (n, k) normal weight, plain and coded; the last shape's alone are kept."""
    plain = [
        (torch.randn(n, k, device="cuda") * k**-0.5).bfloat16() for _ in range(rotations(2 * n * k))
    ]
    return plain, [api.encode(w) for w in plain]


def providers(case: Case) -> dict[str, Provider]:
    """Return bf16x and cuBLAS (torch.nn.functional.linear) on the same weights."""
    if case.m == 1:
        weights.cache_clear()
    plain, coded = weights(case.n, case.k)
    x = torch.randn(case.m, case.k, device="cuda").bfloat16()
    activations = 2 * case.m * (case.n + case.k)
    ours = [functools.partial(api.linear, x, c) for c in coded]
    cublas = [functools.partial(torch.nn.functional.linear, x, w) for w in plain]
    return {
        "bf16x": Provider(ours, coded[0].nbytes + activations),
        "cuBLAS": Provider(cublas, 2 * case.n * case.k + activations),
    }
