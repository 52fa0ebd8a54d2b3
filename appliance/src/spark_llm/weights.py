"""How many bytes a checkpoint's weights take, from safetensors headers alone: no tensor is read."""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from spark_llm import kernels
from spark_llm.errors import SparkLlmError
from spark_llm.reason import Reason

_HEADER_LIMIT = 100_000_000
"""Largest header in bytes that the safetensors library itself accepts."""
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Tensor:
    """One entry of a header.

    Attributes:
        name: e.g. ``model.layers.0.mlp.up_proj.weight``.
        dtype: safetensors' own name, e.g. ``BF16``, ``F8_E4M3``, ``U8`` (two FP4 values).
        size: bytes.
    """

    name: str
    dtype: str
    size: int


class Part(StrEnum):
    """What a tensor is for; parts differ in whether they are loaded and how often they are read."""

    EMBEDDING = "embedding"
    LM_HEAD = "lm_head"
    EXPERTS = "experts"
    VISION = "vision"
    DRAFT = "draft"
    DRAFT_EXPERTS = "draft_experts"
    BODY = "body"


_PARTS = (
    (re.compile(r"(^|\.)(mtp|nextn)(\.|_)(.*\.)?experts\."), Part.DRAFT_EXPERTS),
    (re.compile(r"(^|\.)(mtp|nextn)(\.|_)"), Part.DRAFT),
    (
        re.compile(r"(^|\.)(visual|vision_tower|vision_model|vision_embed\w*|multi_modal\w*)\."),
        Part.VISION,
    ),
    (re.compile(r"(^|\.)(embed_tokens|embeddings|wte|word_embeddings)\."), Part.EMBEDDING),
    (re.compile(r"(^|\.)lm_head\."), Part.LM_HEAD),
    # Routed experts: numbered (experts.7.) or stacked (experts.gate_up_proj); shared_experts is no match.
    (re.compile(r"(^|\.)experts\."), Part.EXPERTS),
)


@dataclass(frozen=True)
class Weights:
    """Bytes per part of one checkpoint. Attributes: coded: of the body, what bf16x would code, in bytes."""

    parts: tuple[tuple[Part, int], ...]
    coded: int = 0

    def size(self, part: Part) -> int:
        """Bytes of one part; 0 where there is none."""
        return dict(self.parts).get(part, 0)

    def loaded(self, *, draft: bool, tied: bool) -> int:
        """Bytes that the engine loads.

        Args:
            draft: the built-in draft (MTP) module is used; else vLLM skips its tensors.
            tied: embedding and LM head are one tensor; a copy in the file is skipped.
        """
        skipped = set() if draft else {Part.DRAFT, Part.DRAFT_EXPERTS}
        if tied and self.size(Part.EMBEDDING):
            skipped.add(Part.LM_HEAD)
        return sum(size for part, size in self.parts if part not in skipped)


def part_of(name: str) -> Part:
    """What the tensor ``name`` is for."""
    return next((part for pattern, part in _PARTS if pattern.search(name)), Part.BODY)


def sum_up(tensors: Iterable[Tensor]) -> Weights:
    """Weights from all tensors of a checkpoint."""
    sizes = dict.fromkeys(Part, 0)
    coded = 0
    for tensor in tensors:
        part = part_of(tensor.name)
        sizes[part] += tensor.size
        if part is Part.BODY and kernels.is_coded(tensor.name, tensor.dtype):
            coded += tensor.size
    return Weights(tuple(sizes.items()), coded)


def read_folder(folder: Path) -> Weights:
    """Weights of the checkpoint in ``folder``.

    Raises:
        SparkLlmError: no safetensors there, or a damaged one; names the file.
    """
    return sum_up(tensor for path in _files(folder) for tensor in read_header(path))


def _files(folder: Path) -> Iterator[Path]:
    """The files vLLM would load: those of the index, if there is one (consolidated copies lie beside them)."""
    index = folder / INDEX
    if index.is_file():
        try:
            names = set(json.loads(index.read_bytes())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _damaged(index, "an unreadable index") from error
        if any(Path(name).name != name for name in names):
            raise _damaged(index, "it names files elsewhere")
    else:
        names = {path.name for path in folder.glob("*.safetensors")}
    if not names:
        raise SparkLlmError(
            f"{folder} has no safetensors files",
            reason=Reason.MODEL_INCOMPLETE,
            hint="`spark-llm pull` fetches the model.",
        )
    for name in sorted(names):
        yield folder / name


def read_header(path: Path) -> list[Tensor]:
    """Tensors of one file. Reads the header only: 8 bytes of length, then JSON.

    Raises:
        SparkLlmError: missing, truncated or no safetensors file.
    """
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 0 < length <= _HEADER_LIMIT:
                raise _damaged(path, f"a header of {length} bytes")
            raw = stream.read(length)
            size = stream.seek(0, 2)
    except OSError as error:
        raise _damaged(path, error.strerror or str(error)) from error
    try:
        header: dict[str, Any] = json.loads(raw)
        tensors = [
            Tensor(name, entry["dtype"], entry["data_offsets"][1] - entry["data_offsets"][0])
            for name, entry in header.items()
            if name != "__metadata__"
        ]
        end = max((header[item.name]["data_offsets"][1] for item in tensors), default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise _damaged(path, "an unreadable header") from error
    if 8 + length + end > size or any(item.size < 0 for item in tensors):
        raise _damaged(path, f"{size} bytes where its header asks for {8 + length + end}")
    return tensors


def _damaged(path: Path, what: str) -> SparkLlmError:
    return SparkLlmError(
        f"{path} is damaged: {what}",
        reason=Reason.MODEL_CORRUPT,
        hint="`spark-llm verify` checks all files, `spark-llm pull` fetches bad ones again.",
    )
