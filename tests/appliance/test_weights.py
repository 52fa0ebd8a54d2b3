"""Bytes of a checkpoint from its headers."""

import json
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from spark_llm.demo_model import write_demo_model
from spark_llm.errors import SparkLlmError
from spark_llm.reason import Reason
from spark_llm.weights import INDEX, Part, Tensor, part_of, read_folder, read_header, sum_up

NAMES = [
    ("model.embed_tokens.weight", Part.EMBEDDING),
    ("lm_head.weight", Part.LM_HEAD),
    ("model.layers.3.mlp.experts.7.down_proj.weight", Part.EXPERTS),
    ("model.layers.3.mlp.experts.gate_up_proj", Part.EXPERTS),
    ("model.layers.3.mlp.shared_expert.up_proj.weight", Part.BODY),
    ("model.layers.3.mlp.gate.weight", Part.BODY),
    ("backbone.layers.3.mixer.experts.7.up_proj.weight", Part.EXPERTS),
    ("mtp.layers.0.mlp.experts.7.up_proj.weight", Part.DRAFT_EXPERTS),
    ("mtp.layers.0.mlp.shared_expert.up_proj.weight", Part.DRAFT),
    ("mtp.layers.0.self_attn.q_proj.weight", Part.DRAFT),
    ("model.visual.blocks.0.attn.qkv.weight", Part.VISION),
    ("model.vision_tower.encoder.layers.0.weight", Part.VISION),
    ("model.layers.0.self_attn.q_proj.weight", Part.BODY),
]


@pytest.mark.parametrize(("name", "part"), NAMES)
def test_part(name: str, part: Part) -> None:
    """Tensors are sorted by name into what they are for."""
    assert part_of(name) is part


def test_skipped_tensors() -> None:
    """An unused MTP module and a tied LM head's copy are not loaded, so not counted."""
    weights = sum_up(
        [
            Tensor("model.embed_tokens.weight", "BF16", 100),
            Tensor("lm_head.weight", "BF16", 100),
            Tensor("mtp.fc.weight", "BF16", 6),
            Tensor("mtp.layers.0.mlp.experts.0.up_proj.weight", "BF16", 4),
            Tensor("model.norm.weight", "BF16", 1),
        ]
    )
    assert weights.loaded(draft=False, tied=False) == 201
    assert weights.loaded(draft=False, tied=True) == 101
    assert weights.loaded(draft=True, tied=False) == 211


def test_coded_is_of_the_body() -> None:
    """What bf16x codes is told for the layers that every step reads, not for a draft that may not be loaded."""
    weights = sum_up(
        [
            Tensor("model.layers.0.self_attn.q_proj.weight", "BF16", 100),
            Tensor("mtp.layers.0.self_attn.q_proj.weight", "BF16", 10),
        ]
    )
    assert weights.coded == 100


def test_real_checkpoint(tmp_path: Path) -> None:
    """The sum over headers is the size of the file's data."""
    folder = tmp_path / "demo"
    write_demo_model(folder)
    (file,) = folder.glob("*.safetensors")
    header = int.from_bytes(file.read_bytes()[:8], "little")
    weights = read_folder(folder)
    assert sum(size for _, size in weights.parts) == file.stat().st_size - 8 - header


def header_of(tensors: dict[str, object]) -> bytes:
    raw = json.dumps(tensors).encode()
    return len(raw).to_bytes(8, "little") + raw


def test_index_decides_the_files(tmp_path: Path) -> None:
    """Copies in other layouts that lie beside the indexed shards are not counted twice."""
    one = header_of({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}) + b"1234"
    (tmp_path / "model-1.safetensors").write_bytes(one)
    (tmp_path / "consolidated.safetensors").write_bytes(one)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    assert read_folder(tmp_path).size(Part.BODY) == 4


DAMAGED = {
    "empty": b"",
    "half a length": b"\x08\x00\x00",
    "no header": (0).to_bytes(8, "little"),
    "endless header": (2**60).to_bytes(8, "little"),
    "header cut off": (100).to_bytes(8, "little") + b"{}",
    "no JSON": (4).to_bytes(8, "little") + b"abcd",
    "no object": (2).to_bytes(8, "little") + b"[]",
    "no offsets": header_of({"a": {"dtype": "U8"}}),
    "wrong type": header_of({"a": {"dtype": "U8", "data_offsets": "xy"}}),
    "negative": header_of({"a": {"dtype": "U8", "data_offsets": [4, 0]}}),
    "data cut off": header_of({"a": {"dtype": "U8", "data_offsets": [0, 100]}}) + b"1234",
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    """A file that is no whole safetensors file is an error with its name, and no traceback."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(SparkLlmError, match=r"model\.safetensors") as caught:
        read_folder(tmp_path)
    assert caught.value.reason is Reason.MODEL_CORRUPT


def test_missing_shard_is_named(tmp_path: Path) -> None:
    """A shard that the index names and the folder lacks is an error with its name."""
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "model-9.safetensors"}}))
    with pytest.raises(SparkLlmError, match=r"model-9\.safetensors"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    "index", ["[]", "{}", "nonsense", '{"weight_map": {"a": "../../etc/passwd"}}']
)
def test_bad_index_is_named(tmp_path: Path, index: str) -> None:
    """An index that is none, or that leads out of the folder, is an error with its name."""
    (tmp_path / INDEX).write_text(index)
    with pytest.raises(SparkLlmError, match=INDEX):
        read_folder(tmp_path)


def test_folder_without_weights(tmp_path: Path) -> None:
    """A folder without safetensors says so."""
    with pytest.raises(SparkLlmError, match="no safetensors"):
        read_folder(tmp_path)


@given(st.binary(max_size=200))
def test_noise_never_escapes(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    """Whatever a file holds, reading its header gives tensors or a named error."""
    path = tmp_path_factory.mktemp("noise") / "model.safetensors"
    path.write_bytes(content)
    with suppress(SparkLlmError):
        assert all(tensor.size >= 0 for tensor in read_header(path))
