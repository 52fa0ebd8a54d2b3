"""Times vLLM 0.32.0's Triton MoE on this device for ``tune``."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

import torch
import triton
from vllm.model_executor.layers.fused_moe import config as moe_config
from vllm.model_executor.layers.fused_moe import fused_moe, override_config

from spark_kernels.tune import BLOCK

if TYPE_CHECKING:
    from spark_kernels.tune import Config, Layer

ROUNDS = 5
CALLS = 20


class Bench:
    """A layer of random weights and a timer over tiles.

    Raises:
        RuntimeError: no CUDA device.
    """

    triton_version: str = triton.__version__

    def __init__(self, layer: Layer) -> None:
        if not torch.cuda.is_available():
            raise RuntimeError("no CUDA device")
        self._layer = layer
        up, down = (2 * layer.width, layer.hidden), (layer.hidden, layer.width)
        self._w1, w1_scale = self._weight(*up)
        self._w2, w2_scale = self._weight(*down)
        block = [BLOCK, BLOCK] if layer.block_scaled else None
        self._quant = (
            moe_config.fp8_w8a8_moe_quant_config(w1_scale, w2_scale, block_shape=block)
            if w1_scale is not None and w2_scale is not None
            else None
        )
        name = "fp8_w8a8" if self._quant else None
        self.file_name = fused_moe.get_config_file_name(layer.experts, layer.width, name, block)
        self._expected: dict[int, torch.Tensor] = {}

    def _weight(self, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return random weights of every expert and their scales (None for bf16)."""
        layer = self._layer
        weight = torch.empty(layer.experts, rows, columns, dtype=torch.bfloat16, device="cuda")
        weight.normal_(std=columns**-0.5)
        if layer.dtype != "fp8_w8a8":
            return weight, None
        if not layer.block_scaled:
            return weight.to(torch.float8_e4m3fn), torch.ones(layer.experts, device="cuda")
        shape = (layer.experts, -(-rows // BLOCK), -(-columns // BLOCK))
        return weight.to(torch.float8_e4m3fn), torch.ones(shape, device="cuda")

    def time_us(self, batch: int, config: Config | None) -> float | None:
        """Return the median microseconds of a call; None if the tile fails or changes the result."""
        layer = self._layer
        generator = torch.Generator("cuda").manual_seed(batch)
        x = torch.randn(batch, layer.hidden, device="cuda", generator=generator).bfloat16()
        score = torch.rand(batch, layer.experts, device="cuda", generator=generator)
        weights, ids = score.softmax(-1).topk(layer.top_k)

        def call() -> torch.Tensor:
            return fused_moe.fused_experts(
                x, self._w1, self._w2, weights, ids.to(torch.int32), quant_config=self._quant
            )

        with override_config(config):  # None: vLLM's own choice
            try:
                result = call()
                torch.cuda.synchronize()
                expected = self._expected.setdefault(batch, result)
                if not torch.allclose(
                    result, expected, rtol=0.05, atol=0.05 * float(expected.std())
                ):
                    return None
                return self._median_us(call)
            except (RuntimeError, triton.runtime.errors.OutOfResources, triton.CompilationError):
                return None

    @staticmethod
    def _median_us(call: object) -> float:
        """Return the median over rounds of CUDA-graph replays of ``CALLS`` calls each."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(CALLS):
                call()  # type: ignore[operator]
        times = []
        for _ in range(ROUNDS + 1):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / CALLS)
        return statistics.median(times[1:])
