"""Takes files that are already on this machine: from a Hugging Face cache or any folder.

Every adopted file is hashed against the hub's own hashes, so it does not matter how it came here. A hard link keeps the
content even if the other place is cleared; across file systems it is a symbolic link, and the other place must stay. It
is copied where neither would do: what is another user's cannot be hard-linked (``fs.protected_hardlinks``), and what is
in a home the service cannot see.
"""

import errno
import os
import shutil
import stat
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from spark_llm.errors import ConfigError, RefusedError
from spark_llm.reason import Reason
from spark_llm.store import durable, plan
from spark_llm.store.hashing import Digests, hash_files
from spark_llm.store.layout import Incoming, folder_name
from spark_llm.store.receipt import RemoteFile
from spark_llm.store.request import Request
from spark_llm.store.snapshots import note
from spark_llm.store.stamp import Stamp

_HIDDEN = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")  # noqa: S108  names to compare with
"""What a unit with ProtectHome= and PrivateTmp= does not see."""
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EOPNOTSUPP)
_NO_RANGE = (errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


def cache_folder(request: Request) -> Path | None:
    """The model's folder in the hub cache that ``request.adopt`` names; None if that is no cache with this model.

    Raises:
        ConfigError: there is no such folder at all.
        RefusedError: it may not be read.
    """
    given = Path(request.adopt).expanduser()
    if not given.is_dir():
        raise ConfigError(
            f"there is no folder {given} to adopt",
            reason=Reason.MODEL_MISSING,
            hint="Give the folder of the cache or of the model.",
        )
    if not os.access(given, os.R_OK | os.X_OK):
        raise _unreadable(given)
    name = f"models--{folder_name(request.model)}"
    for folder in (given, given / name, given / "hub" / name, given / "huggingface" / "hub" / name):
        if name in {folder.name, folder.resolve().name}:  # the latter where a descriptor was given
            status = _status(folder / "snapshots")
            if status and stat.S_ISDIR(status.st_mode):
                return folder
    return None


def cached_tree(request: Request) -> tuple[str, tuple[RemoteFile, ...]] | None:
    """Commit and files as a hub cache knows them, without a network; None where it does not know.

    The cache keeps the hub's listing of each commit since huggingface_hub 2 (``trees/<commit>.json``).

    Raises:
        RefusedError: it may not be read.
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
    if not plan.is_commit(commit):
        return None
    place = folder / "trees" / f"{commit}.json"
    if _status(place) and not os.access(place, os.R_OK):  # huggingface_hub makes it 0600
        raise _unreadable(place)
    listing: Any = durable.read_json(place)
    if not isinstance(listing, dict):
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
    """For each of ``wanted`` a file of the right size that may be it.

    Raises:
        RefusedError: one may not be read.
    """
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
            if _fits(place, file.size):
                found[file.path] = place
                break
    return found


def _fits(place: Path, size: int) -> bool:
    status = _status(place)
    if status is None or not stat.S_ISREG(status.st_mode) or status.st_size != size:
        return False
    if not os.access(place, os.R_OK):
        raise _unreadable(place)
    return True


def _status(path: Path) -> os.stat_result | None:
    """Status of ``path``; None where there is nothing. What may not be seen is an error, not a reason to download."""
    try:
        return path.stat()
    except PermissionError:
        raise _unreadable(path) from None
    except OSError:
        return None


def is_copied(source: Path, root: Path) -> bool:
    """Whether ``take`` needs space for ``source`` in the store ``root``, as far as that can be told before."""
    status = source.stat()
    linkable = os.geteuid() in {0, status.st_uid} and status.st_dev == root.stat().st_dev
    return not linkable and not _is_visible(source.resolve(), root)


def _is_visible(real: Path, root: Path) -> bool:
    """Whether who serves from ``root`` can be expected to see ``real``, too."""
    hidden, own = (any(map(path.is_relative_to, _HIDDEN)) for path in (real, root.resolve()))
    return (own or not hidden) and os.access(real, os.R_OK)


def take(
    found: Mapping[str, Path], root: Path, incoming: Incoming, wanted: Iterable[RemoteFile]
) -> dict[str, Stamp]:
    """Link or copy those of ``found`` whose content is right into ``incoming``, in the store ``root``; their stamps."""
    taken: dict[Path, RemoteFile] = {}
    for file in wanted:
        if source := found.get(file.path):
            target = incoming.path / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            _take(source, target, root)
            durable.sync_file(target)
            taken[target] = file
    # Hashed where they are now: nobody can put another file into the old place in between.
    before = {target: Stamp.of(target) for target in taken}
    stamps: dict[str, Stamp] = {}
    for target, read in hash_files(before):
        file = taken[target]
        if (
            isinstance(read, Digests)
            and file.accepts(read)
            and before[target].matches(Stamp.of(target))
        ):
            stamps[file.path] = replace(before[target], sha256=read.sha256)
        else:
            target.unlink()
    note(incoming, stamps)
    return stamps


def _take(source: Path, target: Path, root: Path) -> None:
    real = source.resolve()
    if is_copied(source, root):
        _copy(source, target)
        return
    try:
        os.link(real, target)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        if _is_visible(real, root):
            target.symlink_to(real)
        else:
            _copy(source, target)


def _copy(source: Path, target: Path) -> None:
    with source.open("rb", buffering=0) as old, target.open("xb", buffering=0) as new:
        try:
            while os.copy_file_range(old.fileno(), new.fileno(), 2**30):  # shares blocks if it can
                pass
        except OSError as error:
            if error.errno not in _NO_RANGE:
                raise
            shutil.copyfileobj(old, new, 4 * 2**20)


def _unreadable(path: Path) -> RefusedError:
    real = path.resolve()
    folder = next((up for up in (real, *real.parents) if up.name.startswith("models--")), real)
    return RefusedError(
        f"cannot adopt {real}: permission denied",
        reason=Reason.UNWRITABLE_DIRECTORY,
        hint=f"The store's user must be able to read it: `sudo chmod -R a+rX {folder}`.",
    )
