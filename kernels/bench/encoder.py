"""Times the bf16x host encoder on one core: gigabytes of bf16 read a second of processor time.

spark-kernels build bf16x && python kernels/bench/encoder.py
"""

import statistics
import time

import numpy as np
from spark_kernels.bf16x.host import encode_host

ROWS, COLUMNS, ROUNDS = 4096, 5120, 9


def main() -> None:
    """Encode normal weights, the same with rows of different size, and weights that cannot be coded."""
    rng = np.random.default_rng(20261121)
    normal = rng.standard_normal((ROWS, COLUMNS), dtype=np.float32) * np.float32(0.02)
    scaled = normal * np.exp2(rng.integers(-12, 12, (ROWS, 1))).astype(np.float32)
    kinds = {
        "normal": (normal.view(np.uint32) >> 16).astype(np.uint16),
        "row scales": (scaled.view(np.uint32) >> 16).astype(np.uint16),
        "any pattern": rng.integers(0, 65536, (ROWS, COLUMNS)).astype(np.uint16),
    }
    for kind, weight in kinds.items():
        rates = []
        for _ in range(ROUNDS):
            start = time.process_time()
            coded = encode_host(weight)
            rates.append(weight.nbytes / (time.process_time() - start) / 1e9)
        bits = 8 * (coded.stream.nbytes + coded.side.nbytes) / weight.size
        print(
            f"{kind:>12}: {statistics.median(rates):.2f} GB/s ({min(rates):.2f}-{max(rates):.2f}), "
            f"{bits:.3f} bits a weight, {coded.escapes} escapes, {coded.plain_tiles} tiles plain"
        )


if __name__ == "__main__":
    main()
