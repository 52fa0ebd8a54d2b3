"""The screened LM head against cuBLAS followed by argmax, on normal weights and hidden states.

Normal logits are the screen's worst realistic case: a trained model's winner stands out further, and fewer
rows are rescored.
"""

import functools

import torch
from run import Case, Provider
from spark_kernels.lm_head import api

CASES = [Case(n, k, m) for n, k in [(248320, 5120), (151936, 4096)] for m in (1, 4, 8, 16)]


@functools.cache
def head(n: int, k: int) -> api.Head:
    """Return a prepared head; the last shape's alone is kept."""
    return api.prepare((torch.randn(n, k, device="cuda") * k**-0.5).bfloat16())


def providers(case: Case) -> dict[str, Provider]:
    """Return the screened head (token and -inf-filled logits), and cuBLAS with argmax."""
    if case.m == 1:
        head.cache_clear()
    screened = head(case.n, case.k)
    x = torch.randn(case.m, case.k, device="cuda").bfloat16()
    rescored = int(api.greedy(screened, x).rescored.sum())
    coarse = case.n * (case.k + 16) + 2 * case.k * rescored
    full = 2 * case.n * (case.k + case.m)
    return {
        "screened": Provider(
            [functools.partial(api.greedy, screened, x)], coarse + 8 * case.n * case.m
        ),
        "cuBLAS + argmax": Provider(
            [lambda: torch.nn.functional.linear(x, screened.weight).argmax(-1)], full
        ),
        "screened logits, top 1": Provider(
            [functools.partial(api.top_logits, screened, x, 1)],
            coarse + 10 * case.n * case.m,
            peer=False,
        ),
        "screened logits, top 50": Provider(
            [functools.partial(api.top_logits, screened, x, 50)],
            coarse + 14 * case.n * case.m,
            peer=False,
        ),
    }
