"""nvfp4 against Marlin from one row to prefill: where one launch, several, and unpacking with cuBLAS stand."""

import bench_nvfp4
from run import Case

SHAPES = [(34816, 5120), (5120, 6144)]
CASES = [Case(n, k, m) for n, k in SHAPES for m in (1, 2, 12, 16, 24, 32, 64, 128, 256, 2048)]
providers = bench_nvfp4.providers
