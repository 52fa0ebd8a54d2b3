"""What a model must contain, and the proof that this copy does.

A snapshot's receipt lies inside it, so that one rename makes model and receipt visible together. It keeps the hub's own
hashes, so ``verify`` needs no network, now or in ten years.
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spark_llm.store import durable
from spark_llm.store.hashing import Digests
from spark_llm.store.stamp import Stamp

OWN_FOLDER = ".spark-llm"
"""Our files inside a snapshot; a repository that has this name is refused."""
RECEIPT = f"{OWN_FOLDER}/receipt.json"
FORMAT = 1


@dataclass(frozen=True)
class RemoteFile:
    """One file of a commit, as the hub describes it.

    Attributes:
        path: relative, with ``/``.
        size: in bytes.
        sha256: the hub's hash of an LFS file; empty for others.
        git_sha1: the git blob id of a file that is no LFS file; empty for LFS files (theirs is of the pointer).
    """

    path: str
    size: int
    sha256: str = ""
    git_sha1: str = ""

    def accepts(self, digests: Digests) -> bool:
        """Whether a file with ``digests`` is this one."""
        if digests.size != self.size:
            return False
        return digests.sha256 == self.sha256 if self.sha256 else digests.git_sha1 == self.git_sha1

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "RemoteFile":
        """Inverse of ``to_json``.

        Raises:
            KeyError, TypeError, ValueError: not a file with a size and one hash.
        """
        file = cls(
            str(value["path"]),
            int(value["size"]),
            str(value.get("sha256", "")),
            str(value.get("git_sha1", "")),
        )
        if file.size < 0 or (len(file.sha256), len(file.git_sha1)) not in {(64, 0), (0, 40)}:
            raise ValueError(f"{file.path!r} needs a size and one hash")
        return file

    def to_json(self) -> dict[str, Any]:
        """For receipts, requests and bundles."""
        named = {"sha256": self.sha256} if self.sha256 else {"git_sha1": self.git_sha1}
        return {"path": self.path, "size": self.size, **named}


@dataclass(frozen=True)
class Receipt:
    """The proof that a snapshot was complete and right.

    Attributes:
        model: ``ORG/NAME``.
        commit: 40-hex commit.
        revision: what was asked for: a branch, a tag or the commit itself.
        source: ``hub``, ``adopted`` or ``bundle``.
        verified_at: Unix time of the last look at every byte, in seconds.
        files: everything the snapshot must contain.
        stamps: what the files looked like when they were verified; a file without one is not trusted.
    """

    model: str
    commit: str
    revision: str
    source: str
    verified_at: float
    files: tuple[RemoteFile, ...]
    stamps: Mapping[str, Stamp]

    @property
    def size(self) -> int:
        """All files together, in bytes."""
        return sum(file.size for file in self.files)

    def suspects(self, snapshot: Path) -> list[RemoteFile]:
        """Files of ``snapshot`` that are missing or no longer as they were when verified. Reads no content."""
        return [file for file in self.files if not self._trusts(snapshot, file)]

    def _trusts(self, snapshot: Path, file: RemoteFile) -> bool:
        stamp = self.stamps.get(file.path)
        try:
            return (
                stamp is not None
                and stamp.size == file.size
                and stamp.matches(Stamp.of(snapshot / file.path))
            )
        except OSError:
            return False

    def stamped(self, fresh: Mapping[str, Stamp], *, distrusted: Iterable[str] = ()) -> "Receipt":
        """This receipt with ``fresh`` stamps added and those of ``distrusted`` files removed."""
        gone = set(distrusted)
        stamps = {
            path: stamp for path, stamp in {**self.stamps, **fresh}.items() if path not in gone
        }
        return replace(self, stamps=stamps, verified_at=time.time())

    def to_json(self) -> dict[str, Any]:
        """For the file in the snapshot."""
        return {
            "format": FORMAT,
            "model": self.model,
            "commit": self.commit,
            "revision": self.revision,
            "source": self.source,
            "verified_at": self.verified_at,
            "files": [file.to_json() for file in self.files],
            "stamps": {path: stamp.to_json() for path, stamp in sorted(self.stamps.items())},
        }


def parse(value: Any) -> Receipt | None:  # noqa: ANN401  whatever the file held
    """Receipt from JSON; None for anything that is not one of this format."""
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        return None
    try:
        return Receipt(
            model=str(value["model"]),
            commit=str(value["commit"]),
            revision=str(value["revision"]),
            source=str(value["source"]),
            verified_at=float(value["verified_at"]),
            files=tuple(RemoteFile.from_json(item) for item in value["files"]),
            stamps={str(path): Stamp.from_json(item) for path, item in value["stamps"].items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def read(snapshot: Path) -> Receipt | None:
    """The receipt of ``snapshot``; None where it has none that can be read."""
    return parse(durable.read_json(snapshot / RECEIPT))


def write(snapshot: Path, receipt: Receipt) -> None:
    """Replace the receipt of ``snapshot``, durably.

    Raises:
        OSError: the store cannot be written.
    """
    (snapshot / OWN_FOLDER).mkdir(exist_ok=True)
    durable.write_json(snapshot / RECEIPT, receipt.to_json())
