"""Is this folder a whole model? Names and sizes only; checksums are the store's."""

import json
from pathlib import Path

from spark_llm.errors import RefusedError
from spark_llm.reason import Reason

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json")


def check_model_folder(folder: Path) -> None:
    """Raise unless ``folder`` holds a configuration, a tokenizer and every safetensors file it names.

    Raises:
        RefusedError: what is missing, by name.
    """
    if not folder.is_dir():
        raise RefusedError(
            f"there is no model folder {folder}",
            reason=Reason.MODEL_MISSING,
            hint="Check the profile's `model`; `spark-llm pull` fetches one from the hub.",
        )
    missing = _missing(folder)
    if missing:
        raise RefusedError(
            f"{folder} lacks {', '.join(missing)}",
            reason=Reason.MODEL_INCOMPLETE,
            hint="Fetch it again with `spark-llm pull`, or copy the missing files.",
        )


def _missing(folder: Path) -> list[str]:
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        missing.append(f"a tokenizer ({' or '.join(_TOKENIZERS)})")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = set(json.loads(index.read_bytes())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            return [*missing, f"a readable {index.name}"]
        missing += sorted(shard for shard in shards if not _has_bytes(folder / shard))
    elif not any(_has_bytes(path) for path in folder.glob("*.safetensors")):
        missing.append("model.safetensors")
    return missing


def _has_bytes(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0
