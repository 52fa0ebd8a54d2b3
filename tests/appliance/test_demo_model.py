import hashlib
import itertools
import json
import struct
from pathlib import Path

import pytest
from spark_llm.demo_model import write_demo_model
from spark_llm.errors import RefusedError
from tokenizers import Tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "demo"
    write_demo_model(folder)
    return folder


def test_same_bytes_on_every_run(model: Path) -> None:
    """The weights are the ones of the recorded seed, on every machine and Python."""
    digest = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    assert digest == "475a5a08138186b0d9cbd310b13273db695aaa3a6991313943e3a4edc4bf88a7"


def test_again_is_no_error_and_changes_nothing(model: Path) -> None:
    """Writing it where it is already leaves it alone."""
    before = (model / "model.safetensors").stat().st_mtime_ns
    write_demo_model(model)
    assert (model / "model.safetensors").stat().st_mtime_ns == before


def test_other_content_is_not_overwritten(tmp_path: Path) -> None:
    """A folder that holds something else is refused and left as it is."""
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine").write_text("mine")
    with pytest.raises(RefusedError, match="exists and is not the demo model"):
        write_demo_model(tmp_path / "x")
    assert [entry.name for entry in (tmp_path / "x").iterdir()] == ["mine"]


def test_weights_match_the_configuration(model: Path) -> None:
    """The safetensors header lists the tensors that the configuration asks for, without gaps."""
    raw = (model / "model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    config = json.loads((model / "config.json").read_bytes())
    assert header["model.embed_tokens.weight"]["shape"] == [
        config["vocab_size"],
        config["hidden_size"],
    ]
    ends = sorted(item["data_offsets"] for name, item in header.items() if name[0] != "_")
    assert ends[0][0] == 0
    assert all(left[1] == right[0] for left, right in itertools.pairwise(ends))
    assert ends[-1][1] == len(raw) - 8 - size


@pytest.mark.parametrize("text", ["the spark of memory", "Grüße, 世界 🚀\n\t{}", "a" * 1000])
def test_tokenizer_returns_every_text(model: Path, text: str) -> None:
    """Encoding and decoding gives the text back, whatever its bytes."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_words_are_single_tokens(model: Path) -> None:
    """The merges build whole words."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    assert tokenizer.encode(" spark memory kernel").tokens == ["Ġspark", "Ġmemory", "Ġkernel"]
