"""Compile caches that can be trusted: one namespace per manifest, sealed by checksum once the engine is ready.

::

    <root>/<first 16 hex digits of the manifest's digest>/
        manifest.json   what the namespace is for
        seal.json       every file below data/ with size, mtime, inode and sha256, as the engine had them when ready
        lock            held, shared, while an engine uses the namespace
        data/           everything the engine writes; the folders of caches.toml
        tmp/            its TMPDIR, emptied before each start

The life of a namespace: ``hold`` before the engine starts and as long as it runs (it calls ``prepare``, unless
another engine has the namespace), ``seal`` once it is ready and again after a clean stop. ``check``, a part of
``prepare``, brings the folder back to its last sealed state or throws away what cannot be brought back, and its verdict
says so.
"""

import shutil
import time
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from spark_llm.errors import ConfigError
from spark_llm.manifest import Manifest, to_json
from spark_llm.reason import Reason
from spark_llm.store import durable
from spark_llm.store.lock import BusyError, Lock, take
from spark_llm.store.stamp import Stamp, hash_stamped, stamp_tree

_NAME_LENGTH = 16
SCRATCH_LIMIT = 107 - 1 - 36
"""Longest TMPDIR, in bytes: vLLM puts ``ipc://$TMPDIR/<uuid4>`` there, and sun_path holds 107 (unix(7))."""
_LAYOUT = 1


class State(StrEnum):
    """What a check found."""

    NEW = "new"
    VALID = "valid"
    RESTORED = "restored"
    PARTLY_DISCARDED = "partly_discarded"
    DISCARDED = "discarded"
    SHARED = "shared"


@dataclass(frozen=True)
class Verdict:
    """What a check found and did.

    Attributes:
        state: NEW nothing was there; VALID as sealed; RESTORED files written after the seal were removed;
            PARTLY_DISCARDED whole components went because sealed files had changed; DISCARDED everything went;
            SHARED another engine has it, so nothing was looked at.
        message: one sentence for the journal and ``STATUS=``.
        files: sealed files that are there and right.
        bytes: their size together, in bytes.
        removed: paths below data/ that were removed, at most twenty of them.
    """

    state: State
    message: str
    files: int = 0
    bytes: int = 0
    removed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Entry:
    """One namespace, for ``cache ls``.

    Attributes:
        name: folder name, the manifest's digest cut to 16 digits.
        bytes: what it takes on disk.
        files: number of files.
        used: Unix time of the last start, in seconds.
        sealed: whether an engine ever became ready with it.
        in_use: whether an engine has it now.
        model: from its manifest; empty if that cannot be read.
        engine: as ``model``.
    """

    name: str
    bytes: int
    files: int
    used: float
    sealed: bool
    in_use: bool
    model: str
    engine: str


class Namespace:
    """The cache folder of one manifest.

    Args:
        path: the folder; ``prepare`` makes it.
        manifest: what it is for.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @property
    def data(self) -> Path:
        """Below it lies everything the engine keeps."""
        return self.path / "data"

    def environment(self, scratch: Path | None = None) -> dict[str, str]:
        """Every cache variable, pointing below this namespace.

        Args:
            scratch: TMPDIR; None takes ``tmp`` beside ``data``.

        Raises:
            ConfigError: that folder's name is too long for the engine's sockets.
        """
        scratch = scratch or self.path / "tmp"
        if len(str(scratch).encode()) > SCRATCH_LIMIT:
            raise ConfigError(
                f"the engine's temporary folder {scratch} is longer than {SCRATCH_LIMIT} bytes, so its sockets would"
                " not fit a socket address",
                reason=Reason.SOCKET_PATH_TOO_LONG,
                hint="Set paths.cache to a shorter folder.",
            )
        table = variables()
        return {
            **{name: str(self.data / folder) for name, folder in table["folders"].items()},
            **table["values"],
            **dict.fromkeys(table["scratch"], str(scratch)),
        }

    def prepare(self) -> Verdict:
        """Check the seal, make all folders, empty the scratch folder, note the time of use; for who has it alone.

        Raises:
            OSError: the folder cannot be written.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        verdict = self.check()
        for folder in variables()["scratch"].values():
            shutil.rmtree(self.path / folder, ignore_errors=True)
        self._make_folders()
        return verdict

    @contextmanager
    def hold(self, reason: str) -> Iterator[Verdict]:
        """Prepare it and keep other starts, ``prune`` and ``clear`` away while the engine runs.

        An engine beside it with the same manifest (two profiles may differ in name alone) takes the namespace as it is:
        to check it or to empty its scratch folder would pull files from under the first.

        Raises:
            OSError: the folder cannot be written.
        """
        lock = _lock(self.path)
        with ExitStack() as held:
            try:
                descriptor = held.enter_context(lock.hold(reason))
            except BusyError:
                held.enter_context(lock.hold(reason, shared=True, wait=True))
                self._make_folders()
                verdict = Verdict(State.SHARED, "compile cache shared with an engine that runs")
            else:
                verdict = self.prepare()
                take(descriptor, shared=True)
            yield verdict

    def _make_folders(self) -> None:
        for folder in variables()["folders"].values():
            (self.data / folder).mkdir(parents=True, exist_ok=True)
        for folder in variables()["scratch"].values():
            (self.path / folder).mkdir(mode=0o700, exist_ok=True)
        durable.write_json(
            self.path / "manifest.json", {**to_json(self.manifest), "used": time.time()}
        )

    def seal(self) -> int:
        """Record every file as it is now; the number of files. Unchanged files are not read again."""
        known = _read_seal(self.path) or {}
        stamps = stamp_tree(self.data)
        fresh = {path: stamp for path, stamp in stamps.items() if not _same(known.get(path), stamp)}
        hashed = {
            path: stamp
            for path, stamp in hash_stamped(self.data, fresh).items()
            if stamp is not None
        }
        sealed = {
            path: hashed.get(path, known.get(path))
            for path in stamps
            if path in hashed or path in known
        }
        durable.write_json(
            self.path / "seal.json",
            {
                "layout": _LAYOUT,
                "manifest": self.manifest.digest,
                "files": {
                    path: stamp.to_json() for path, stamp in sealed.items() if stamp is not None
                },
            },
        )
        return len(sealed)

    def check(self, *, full: bool = False) -> Verdict:
        """Compare ``data`` with the seal and remove what does not match.

        Files whose size, mtime and inode are as sealed are taken as unchanged; others are hashed. A file that was
        written after the seal is removed: nobody vouches for it, and without it the folder is as it was when an engine
        was ready. Where a sealed file is missing or has other content its whole component (first folder) goes, because
        its other files may refer to it. Without a seal everything goes.

        Args:
            full: hash every file, whatever its stamp says.
        """
        if not self.data.is_dir() or not any(_files(self.data)):
            return Verdict(
                State.NEW, "no compile cache for this manifest yet: the first start compiles"
            )
        sealed = _read_seal(self.path, self.manifest)
        if sealed is None:
            self._discard()
            return Verdict(
                State.DISCARDED,
                "compile cache discarded: it was never sealed, so the last start did not become ready",
            )
        found = stamp_tree(self.data)
        suspect = {
            path: stamp
            for path, stamp in found.items()
            if path in sealed and (full or not _same(sealed[path], stamp))
        }
        hashed = hash_stamped(self.data, suspect)
        changed = {
            path
            for path, stamp in hashed.items()
            if stamp is None or stamp.sha256 != sealed[path].sha256
        }
        broken = {_component(path) for path in changed | (sealed.keys() - found.keys())}
        extra = found.keys() - sealed.keys()
        for component in broken:
            shutil.rmtree(self.data / component, ignore_errors=True)
            (self.data / component).unlink(missing_ok=True)
        for path in extra:
            (self.data / path).unlink(missing_ok=True)
        kept = [stamp for path, stamp in sealed.items() if _component(path) not in broken]
        removed = tuple(
            sorted(broken | {path for path in extra if _component(path) not in broken})[:20]
        )
        size = sum(stamp.size for stamp in kept)
        if broken:
            names = ", ".join(sorted(broken))
            return Verdict(
                State.PARTLY_DISCARDED,
                f"compile cache of {names} discarded: {len(changed)} files changed and"
                f" {len(sealed.keys() - found.keys())} are missing since it was sealed; it is rebuilt",
                len(kept), size, removed,
            )  # fmt: skip
        if extra:
            message = f"compile cache restored: {len(extra)} files written after it was sealed were removed"
            return Verdict(State.RESTORED, message, len(kept), size, removed)
        return Verdict(State.VALID, f"compile cache valid: {len(kept)} files", len(kept), size)

    def _discard(self) -> None:
        (self.path / "seal.json").unlink(missing_ok=True)
        shutil.rmtree(self.data)


class CacheRoot:
    """All namespaces.

    Args:
        path: made when the first namespace is prepared.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def namespace(self, manifest: Manifest) -> Namespace:
        """The namespace of ``manifest``; nothing is written yet."""
        return Namespace(self.path / manifest.digest[:_NAME_LENGTH], manifest)

    def entries(self) -> list[Entry]:
        """All namespaces, the most recently used first."""
        return sorted(
            (_entry(folder) for folder in self._folders()),
            key=lambda entry: entry.used,
            reverse=True,
        )

    def prune(self, *, max_bytes: int, keep: int = 1) -> list[Entry]:
        """Remove the least recently used namespaces until all together take at most ``max_bytes``.

        Args:
            max_bytes: the limit, in bytes.
            keep: the most recently used ones stay even above the limit; those in use always do.

        Returns:
            What was removed.
        """
        return [
            entry for entry in to_prune(self.entries(), max_bytes, keep) if self.remove(entry.name)
        ]

    def clear(self) -> list[Entry]:
        """Remove every namespace that is not in use; what was removed."""
        return [entry for entry in self.entries() if self.remove(entry.name)]

    def remove(self, name: str) -> bool:
        """Remove one namespace; False if an engine uses it."""
        folder = self.path / name
        try:
            with _lock(folder).hold("remove"):
                durable.remove_tree(folder)
        except BusyError:
            return False
        return True

    def _folders(self) -> Iterator[Path]:
        if self.path.is_dir():
            yield from (folder for folder in self.path.iterdir() if _is_name(folder.name))


def to_prune(entries: list[Entry], max_bytes: int, keep: int) -> list[Entry]:
    """Which of ``entries`` must go, oldest first, so that the rest takes at most ``max_bytes`` (as far as possible)."""
    by_use = sorted(entries, key=lambda entry: entry.used, reverse=True)
    total = sum(entry.bytes for entry in entries)
    going = []
    for entry in reversed(by_use[keep:]):
        if total <= max_bytes:
            break
        if not entry.in_use:
            going.append(entry)
            total -= entry.bytes
    return going


@cache
def variables() -> Mapping[str, Mapping[str, str]]:
    """The table of caches.toml: ``folders``, ``values`` and ``scratch``."""
    text = resources.files("spark_llm").joinpath("caches.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def _is_name(name: str) -> bool:
    return len(name) == _NAME_LENGTH and not set(name) - set("0123456789abcdef")


def _lock(folder: Path) -> Lock:
    return Lock(folder / "lock", f"compile cache {folder.name}")


def _component(path: str) -> str:
    return path.split("/", 1)[0]


def _same(sealed: Stamp | None, found: Stamp) -> bool:
    return sealed is not None and sealed.matches(found)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if not path.is_dir())


def _read_seal(folder: Path, manifest: Manifest | None = None) -> dict[str, Stamp] | None:
    """The sealed files, or None where no readable seal is for this manifest."""
    data = durable.read_json(folder / "seal.json")
    if not isinstance(data, dict) or data.get("layout") != _LAYOUT:
        return None
    if manifest is not None and data.get("manifest") != manifest.digest:
        return None
    try:
        return {path: Stamp.from_json(value) for path, value in data["files"].items()}
    except (KeyError, TypeError, AttributeError):
        return None


def _entry(folder: Path) -> Entry:
    data: Any = durable.read_json(folder / "manifest.json")
    manifest: dict[str, Any] = data if isinstance(data, dict) else {}
    sizes = [path.lstat().st_size for path in _files(folder)]
    return Entry(
        name=folder.name,
        bytes=sum(sizes),
        files=len(sizes),
        used=float(manifest.get("used", 0.0)),
        sealed=(folder / "seal.json").is_file(),
        in_use=_lock(folder).held() is not None,
        model=str(manifest.get("model", "")),
        engine=str(manifest.get("engine", "")),
    )
