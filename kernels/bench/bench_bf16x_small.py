"""bf16x against cuBLAS on layers too small for bandwidth alone to decide: what a call costs beside its bytes."""

from bench_bf16x import providers
from run import Case

__all__ = ["CASES", "providers"]

SMALL = [(6144, 4096), (4096, 4096), (1024, 5120), (96, 5120)]
CASES = [Case(n, k, m) for n, k in SMALL for m in (1, 8)]
