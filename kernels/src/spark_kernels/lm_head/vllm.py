"""The screened LM head in vLLM 0.32.0: steps whose requests need only the top logits use it.

The GPU model runner's ``sample`` computes logits and samples from them. Around it, the plugin works
out from the requests' sampling parameters how many top logits they need; within it, the LM head
returns logits that are exact for every row that can be among those and -inf for the rest, so the
sampler's own code picks the token.
"""

# ruff: noqa: ANN401 - vLLM's own types, and functions that stand in for its methods
from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers import vocab_parallel_embedding as vllm_embedding
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.v1.worker.gpu import model_runner as vllm_runner
from vllm.v1.worker.gpu.sample import sampler as vllm_sampler

from spark_kernels import build, vllm_hooks
from spark_kernels.lm_head import api
from spark_kernels.lm_head.request import FULL, batch_top_k, request_top_k

if TYPE_CHECKING:
    from collections.abc import Mapping

logger = logging.getLogger("vllm.spark_kernels")


class _Step:
    """How many top logits the step under way needs; FULL outside a step and whenever in doubt."""

    top_k = FULL


class ScreenedHeadMethod(vllm_embedding.UnquantizedEmbeddingMethod):  # type: ignore[misc]
    """The unquantised head, screened when the step allows it."""

    def __init__(self, head: api.Head) -> None:
        self.head = head

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return (m, rows) logits; see ``api.top_logits`` for a screened step."""
        tokens = self.head.scratch.upper.shape[0]
        if _Step.top_k == FULL or bias is not None or x.dim() != 2 or not 1 <= x.shape[0] <= tokens:  # noqa: PLR2004
            full: torch.Tensor = super().apply(layer, x, bias)
            return full
        logits = api.top_logits(self.head, x, _Step.top_k)
        missing = (
            layer.weight.shape[0] - logits.shape[1]
        )  # padding rows, cut off by the logits processor
        return (
            torch.nn.functional.pad(logits, (0, missing), value=float("-inf"))
            if missing
            else logits
        )


def _prepare(layer: torch.nn.Module, options: Mapping[str, Any]) -> None:
    shard = layer.shard_indices
    rows, weight = int(shard.num_org_elements), layer.weight
    if (
        not weight.is_cuda
        or weight.dtype != torch.bfloat16
        or rows < int(options["min_rows"])
        or shard.num_added_elements
    ):
        return
    head = api.prepare(weight.data[:rows], int(options["max_tokens"]))
    layer.register_buffer("screen_codes", head.codes, persistent=False)  # seen by memory accounting
    layer.register_buffer("screen_rows", head.rows, persistent=False)
    layer.quant_method = ScreenedHeadMethod(head)
    logger.info(
        "lm_head: %d rows screened, %.2f GB beside the weight", rows, head.extra_bytes / 1e9
    )


def _plain_logits(model: torch.nn.Module) -> bool:
    """Say whether every logits processor keeps order and -inf: no soft cap, no scale but a positive one."""
    found = [m for m in model.modules() if isinstance(m, LogitsProcessor)]
    return bool(found) and all(
        m.soft_cap is None
        and m.scale > 0
        and not m.logits_as_input
        and m.head_dtype in {None, torch.bfloat16}
        for m in found
    )


def register(options: Mapping[str, Any]) -> None:
    """Hook the head's weight loading, the sampler's requests and the runner's sampling.

    Raises:
        LibraryMissingError: the kernel's library is not there.
    """
    build.load("lm_head")
    max_top_k = int(options["max_top_k"])
    add_request = vllm_sampler.Sampler.add_request
    sample = vllm_runner.GPUModelRunner.sample

    def take(layer: torch.nn.Module) -> None:
        if vllm_hooks.is_head(layer):
            _prepare(layer, options)

    def remember_request(self: Any, req_idx: int, sampling_params: Any) -> None:
        add_request(self, req_idx, sampling_params)
        if not hasattr(self, "spark_top_k"):
            self.spark_top_k = {}
        self.spark_top_k[req_idx] = request_top_k(sampling_params, max_top_k)

    def screened_sample(
        self: Any, hidden_states: torch.Tensor, input_batch: Any, grammar_output: Any
    ) -> Any:
        if not hasattr(self, "spark_plain_logits"):
            self.spark_plain_logits = _plain_logits(self.model)
        sampler = self.sampler
        simple = (
            self.spark_plain_logits
            and grammar_output is None
            and self.batch_sharder is None
            and input_batch.num_draft_tokens == 0
            and type(sampler) is vllm_sampler.Sampler
            and not sampler.compute_nans
            and not sampler.return_sampling_mask
            and sampler.trace_replay_state is None
        )
        known = getattr(sampler, "spark_top_k", {})
        _Step.top_k = (
            batch_top_k(known.get(int(i), FULL) for i in input_batch.idx_mapping_np)
            if simple
            else FULL
        )
        try:
            return sample(self, hidden_states, input_batch, grammar_output)
        finally:
            _Step.top_k = FULL

    vllm_hooks.after_loading(take)
    vllm_sampler.Sampler.add_request = remember_request
    vllm_runner.GPUModelRunner.sample = screened_sample
