"""nvfp4 without programmatic dependent launch against Marlin; see ``bench_nvfp4``."""

import functools

import bench_nvfp4

CASES = bench_nvfp4.CASES
providers = functools.partial(bench_nvfp4.providers, pdl=False)
