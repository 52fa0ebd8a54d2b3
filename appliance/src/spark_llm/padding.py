"""How much larger the engine holds routed experts than their file does. Pure.

A kernel for MXFP4 works on whole tiles, so vLLM 0.32.0 rounds both sides of an expert up
(``fused_moe/oracle/mxfp4.py``, ``mxfp4_round_up_hidden_size_and_intermediate_size``). gpt-oss has
2880 x 2880, of which Marlin makes 3072 x 2944: 9 % more.
"""

from math import ceil

from spark_llm.architecture import Architecture

_TILES = {"flashinfer_cutlass": (128, 128), "triton": (1, 64)}
"""``--moe-backend`` to what hidden size and an expert's width are multiples of."""
_MARLIN = (256, 128)
"""The same of Marlin, and taken for any other: none of a CUDA build has larger tiles."""


def expert_growth(architecture: Architecture, backend: str, nodes: int) -> float:
    """Bytes of the routed experts in memory over those in the file, at least 1; 1 for other formats than MXFP4.

    Args:
        architecture: sizes and format of the experts.
        backend: ``--moe-backend``.
        nodes: that share each expert's width.
    """
    hidden, width = architecture.hidden, architecture.expert_width // nodes
    if architecture.quantization != "mxfp4" or not (hidden and width):
        return 1.0
    across, along = _TILES.get(backend, _MARLIN)
    return _up(hidden, across) * _up(width, along) / (hidden * width)


def _up(size: int, step: int) -> int:
    return ceil(size / step) * step
