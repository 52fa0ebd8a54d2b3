"""What to fetch of a repository, and whether to fetch it at all. Pure."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from spark_llm.errors import ConfigError, RefusedError
from spark_llm.reason import Reason
from spark_llm.store.receipt import OWN_FOLDER, RemoteFile

_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}")
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.safetensors")
_MAX_PATH_BYTES = 1024
_MAX_NAME_BYTES = 255
_MAX_FILES = 100_000

WEIGHTS = (".safetensors", ".gguf")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
"""Files whose loading runs code of their author's choice (docs.python.org/3/library/pickle.html)."""
COPIES = ("original/", "metal/")
"""Folders in which publishers keep a second copy of the weights, for other programs."""
FOREIGN = (".h5", ".msgpack", ".onnx", ".onnx_data", ".ot", ".tflite", ".mlmodel", ".mlpackage")
"""Weights of other frameworks; vLLM reads none of them, so nobody waits for them."""
CONFIGS = ("config.json", "params.json")


@dataclass(frozen=True)
class Selection:
    """What a fetch brings.

    Attributes:
        files: to be fetched, largest first.
    """

    files: tuple[RemoteFile, ...]

    @property
    def size(self) -> int:
        """All files together, in bytes."""
        return sum(file.size for file in self.files)


def check_model_name(model: str) -> str:
    """``model`` if it can name a repository.

    Raises:
        ConfigError: it cannot; also for anything that could leave the store's folder.
    """
    parts = model.split("/")
    if len(parts) in (1, 2) and all(
        _PART.fullmatch(part) and ".." not in part and "--" not in part for part in parts
    ):
        return model
    raise ConfigError(
        f"{model!r} is not the name of a model",
        reason=Reason.NOT_FOUND,
        hint="A name looks like ORG/NAME, a revision is added as ORG/NAME@REVISION.",
    )


def check_revision(revision: str) -> str:
    """``revision`` if it can name a branch, tag or commit.

    Raises:
        ConfigError: it cannot.
    """
    if _REVISION.fullmatch(revision) and ".." not in revision and not revision.endswith("/"):
        return revision
    raise ConfigError(
        f"{revision!r} is not a revision",
        reason=Reason.NOT_FOUND,
        hint="A revision is a branch, a tag or a 40-digit commit.",
    )


def split_name(text: str) -> tuple[str, str]:
    """``ORG/NAME[@REVISION]`` as model and revision; without one the revision is empty.

    Raises:
        ConfigError: not such a text.
    """
    model, separator, revision = text.partition("@")
    check_model_name(model)
    return model, check_revision(revision) if separator else ""


def is_commit(revision: str) -> bool:
    """Whether ``revision`` is a full commit, which never moves."""
    return _COMMIT.fullmatch(revision) is not None


def check_paths(files: Iterable[RemoteFile]) -> None:
    """Refuse names that would leave the folder, hide in it or hit each other.

    Raises:
        RefusedError: names the file.
    """
    seen: set[str] = set()
    for file in files:
        parts = file.path.split("/")
        if (
            len(file.path.encode()) > _MAX_PATH_BYTES
            or any(
                part in ("", ".", "..") or len(part.encode()) > _MAX_NAME_BYTES for part in parts
            )
            or "\\" in file.path
            or not file.path.isprintable()
            or parts[0] == OWN_FOLDER
        ):
            raise _unsafe(f"the file name {file.path!r} is not safe to write")
        if file.path in seen:
            raise _unsafe(f"the file name {file.path!r} comes twice")
        seen.add(file.path)
    if len(seen) > _MAX_FILES:
        raise _unsafe(f"{len(seen)} files are more than any model has")
    folders = {
        path.rsplit("/", depth)[0] for path in seen for depth in range(1, path.count("/") + 1)
    }
    if both := sorted(folders & seen):
        raise _unsafe(f"{both[0]!r} is a file and a folder at once")


def select(model: str, tree: Iterable[RemoteFile], *, allow_pickle: bool = False) -> Selection:
    """Which files of ``tree`` vLLM needs.

    Args:
        model: for messages.
        tree: all files of the commit.
        allow_pickle: fetch pickles where there are no safetensors.

    Raises:
        RefusedError: unsafe names; only pickles; no weights; no configuration; shards without index or incomplete.
    """
    files = tuple(tree)
    check_paths(files)
    weights = [file for file in files if file.path.endswith(WEIGHTS)]
    pickles = [file for file in files if file.path.endswith(PICKLES)]
    if not weights and pickles and not allow_pickle:
        raise RefusedError(
            f"{model} has its weights as pickles only ({pickles[0].path}); loading them runs code its author chose",
            reason=Reason.MODEL_UNSAFE,
            hint="Look for a safetensors version; if you trust the author, add --allow-pickle.",
        )
    if not weights and not pickles:
        raise _incomplete(
            f"{model} has no weights: neither safetensors nor GGUF",
            "Check the name and the revision.",
        )
    names = {file.path for file in files}
    if not names & set(CONFIGS) and not any(file.path.endswith(".gguf") for file in weights):
        raise _incomplete(f"{model} has no config.json", "This is no model that vLLM can serve.")
    check_shards(model, names)
    endings = tuple(set(FOREIGN) | (set(PICKLES) if weights else set()))
    # gpt-oss carries its weights three times: for vLLM at the root, for others below these folders.
    copies = COPIES if any("/" not in file.path for file in weights) else ()

    def skipped(file: RemoteFile) -> bool:
        return file.path.endswith(endings) or file.path.startswith(copies)

    kept = [file for file in files if not skipped(file)]
    return Selection(tuple(sorted(kept, key=lambda file: (-file.size, file.path))))


def check_shards(model: str, names: set[str]) -> None:
    """Numbered shards must all be there, with their index.

    Raises:
        RefusedError: names the missing file.
    """
    for match in filter(None, map(_SHARD.fullmatch, sorted(names))):
        stem, total = match["stem"], int(match["total"])
        for number in range(1, total + 1):
            shard = f"{stem}-{number:05}-of-{total:05}.safetensors"
            if shard not in names:
                raise _incomplete(
                    f"{model} lacks {shard}", "The upload is incomplete; try another revision."
                )
        if total > 1 and f"{stem}.safetensors.index.json" not in names:
            raise _incomplete(
                f"{model} has {total} shards but no {stem}.safetensors.index.json",
                "The upload is incomplete; try another revision.",
            )


def check_indexes(model: str, names: set[str], indexes: Mapping[str, Iterable[str]]) -> None:
    """Every shard that an index names must be in the repository.

    Args:
        model: for messages.
        names: all files of the commit.
        indexes: path of each index, and the shards in its ``weight_map``, relative to its folder.

    Raises:
        RefusedError: names index and shard.
    """
    for index, shards in sorted(indexes.items()):
        folder = index.rpartition("/")[0]
        for shard in sorted(set(shards)):
            path = f"{folder}/{shard}" if folder else shard
            if path not in names:
                raise _incomplete(
                    f"{index} of {model} names {shard}, which is not there",
                    "The upload is incomplete; try another revision.",
                )


def check_disk(model: str, *, needed: int, free: int, reserve: int) -> None:
    """Room for ``needed`` bytes beside the reserve?

    Raises:
        RefusedError: the numbers, and how much to free.
    """
    short = needed + reserve - free
    if needed and short > 0:
        raise RefusedError(
            f"{model} needs {gigabytes(needed)} more, {gigabytes(free)} are free and {gigabytes(reserve)} stay"
            f" reserved: {gigabytes(short)} short",
            reason=Reason.NO_DISK,
            hint="`spark-llm models` shows what takes space, `spark-llm rm` and `spark-llm cache prune` free it.",
        )


def gigabytes(count: int) -> str:
    """Bytes for people: decimal units, as disks and the hub count."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if abs(value) < 1000:  # noqa: PLR2004  the next SI prefix
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def _unsafe(message: str) -> RefusedError:
    return RefusedError(
        message, reason=Reason.MODEL_UNSAFE, hint="Nothing was written. Do not use this source."
    )


def _incomplete(message: str, hint: str) -> RefusedError:
    return RefusedError(message, reason=Reason.MODEL_INCOMPLETE, hint=hint)
