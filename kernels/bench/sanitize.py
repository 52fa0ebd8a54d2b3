"""Small calls of bf16x and lm_head for compute-sanitizer: every code path, a second or two of work.

compute-sanitizer --tool memcheck python kernels/bench/sanitize.py
"""

import torch
from spark_kernels.bf16x import api as bf16x
from spark_kernels.lm_head import api as lm_head


def main() -> None:
    """Run ragged, split, escaped and plain layers at 1, 9 and 40 tokens, and both ends of a head."""
    for n, k in [(40, 264), (96, 1088), (33, 72)]:
        w = (torch.randn(n, k, device="cuda") * 0.02).bfloat16()
        w[5, 3:7] = torch.tensor([0.0, 1e-30, float("inf"), 1e30])
        for plain in (False, True):
            coded = bf16x.encode(w, force_plain=plain)
            bf16x.decode(coded)
            for m in (1, 9, 20, 40):
                bf16x.linear(
                    torch.randn(m, k, device="cuda").bfloat16(), coded, w[:, 0].contiguous()
                )
    w = (torch.randn(1000, 136, device="cuda") * 0.02).bfloat16()
    head = lm_head.prepare(w)
    for m in (1, 7, 16):
        x = torch.randn(m, 136, device="cuda").bfloat16()
        lm_head.greedy(head, x)
        lm_head.top_logits(head, x, 5)
        lm_head.greedy(head, torch.zeros_like(x))
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
