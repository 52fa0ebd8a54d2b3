"""Takes files that are already on this machine: from a Hugging Face cache or any folder, by link, never by copy.

Every adopted file is hashed against the hub's own hashes, so it does not matter how it came here. A hard link keeps the
content even if the other place is cleared; across file systems it is a symbolic link, and the other place must stay.
"""

import errno
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from spark_llm.errors import ConfigError
from spark_llm.reason import Reason
from spark_llm.store import durable, plan
from spark_llm.store.hashing import Digests, hash_files
from spark_llm.store.layout import Incoming, folder_name
from spark_llm.store.receipt import RemoteFile
from spark_llm.store.request import Request
from spark_llm.store.snapshots import note
from spark_llm.store.stamp import Stamp


def cache_folder(request: Request) -> Path | None:
    """The model's folder in the hub cache that ``request.adopt`` names; None if that is no cache with this model.

    Raises:
        ConfigError: there is no such folder at all.
    """
    given = Path(request.adopt).expanduser()
    if not given.is_dir():
        raise ConfigError(
            f"there is no folder {given} to adopt",
            reason=Reason.MODEL_MISSING,
            hint="Give the folder of the cache or of the model.",
        )
    name = f"models--{folder_name(request.model)}"
    for folder in (given, given / name, given / "hub" / name, given / "huggingface" / "hub" / name):
        if folder.name == name and (folder / "snapshots").is_dir():
            return folder
    return None


def cached_tree(request: Request) -> tuple[str, tuple[RemoteFile, ...]] | None:
    """Commit and files as a hub cache knows them, without a network; None where it does not know.

    The cache keeps the hub's listing of each commit since huggingface_hub 2 (``trees/<commit>.json``).
    """
    folder = cache_folder(request)
    if folder is None:
        return None
    commit = request.branch
    if not plan.is_commit(commit):
        try:
            commit = (folder / "refs" / commit).read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            return None
    listing: Any = durable.read_json(folder / "trees" / f"{commit}.json")
    if not plan.is_commit(commit) or not isinstance(listing, dict):
        return None
    try:
        return commit, tuple(_remote_file(path, entry) for path, entry in listing["files"].items())
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _remote_file(path: str, entry: Mapping[str, Any]) -> RemoteFile:
    if entry.get("lfs_sha256"):
        return RemoteFile.from_json(
            {"path": path, "size": entry["lfs_size"], "sha256": entry["lfs_sha256"]}
        )
    return RemoteFile.from_json({"path": path, "size": entry["size"], "git_sha1": entry["blob_id"]})


def cached_indexes(
    request: Request, commit: str, tree: Iterable[RemoteFile]
) -> dict[str, list[str]]:
    """What the safetensors indexes in the cache name."""
    folder = cache_folder(request)
    indexes: dict[str, list[str]] = {}
    for file in tree:
        if folder is not None and file.path.endswith(".safetensors.index.json"):
            value = durable.read_json(folder / "snapshots" / commit / file.path)
            weight_map = value.get("weight_map", {}) if isinstance(value, dict) else {}
            indexes[file.path] = sorted({str(shard) for shard in weight_map.values()})
    return indexes


def candidates(request: Request, commit: str, wanted: Iterable[RemoteFile]) -> dict[str, Path]:
    """For each of ``wanted`` a file of the right size that may be it."""
    if not request.adopt:
        return {}
    cache = cache_folder(request)
    base = Path(request.adopt).expanduser()
    found: dict[str, Path] = {}
    for file in wanted:
        places = (
            [
                cache / "snapshots" / commit / file.path,
                cache / "blobs" / (file.sha256 or file.git_sha1),
            ]
            if cache
            else [base / file.path]
        )
        for place in places:
            real = place.resolve()
            if real.is_file() and real.stat().st_size == file.size:
                found[file.path] = real
                break
    return found


def link(
    found: Mapping[str, Path], incoming: Incoming, wanted: Iterable[RemoteFile]
) -> dict[str, Stamp]:
    """Link those of ``found`` whose content is right into ``incoming``; their stamps."""
    before = {path: Stamp.of(path) for path in found.values()}
    digests = dict(hash_files(before))
    stamps: dict[str, Stamp] = {}
    for file in wanted:
        source = found.get(file.path)
        read = digests[source] if source else None
        if source is None or not isinstance(read, Digests) or not file.accepts(read):
            continue
        target = incoming.path / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        _link(source, target)
        if before[source].matches(stamp := Stamp.of(target)):
            stamps[file.path] = replace(stamp, sha256=read.sha256)
    note(incoming, stamps)
    return stamps


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
            raise
        target.symlink_to(source)
