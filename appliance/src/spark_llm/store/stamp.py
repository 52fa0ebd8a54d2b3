"""Stamps: what stat(2) says of a file, with the hash it had then.

As long as size, mtime and inode are the same the file is taken as unchanged, so a start does not read 60 GB again. Who
wants certainty hashes (``full``).
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spark_llm.store.hashing import hash_files


@dataclass(frozen=True)
class Stamp:
    """A file as it was when it was hashed.

    Attributes:
        size: in bytes.
        mtime_ns: last change of content, in nanoseconds since the epoch.
        inode: number of the file; another one means that the file was replaced.
        sha256: of the content, 64 hex digits; empty where not known yet.
    """

    size: int
    mtime_ns: int
    inode: int
    sha256: str = ""

    @classmethod
    def of(cls, path: Path) -> "Stamp":
        """Stamp of ``path`` without a hash; follows symbolic links, as a reader does."""
        status = path.stat()
        return cls(status.st_size, status.st_mtime_ns, status.st_ino)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Stamp":
        """Inverse of ``to_json``.

        Raises:
            KeyError, TypeError: not a stamp.
        """
        stamp = cls(value["size"], value["mtime_ns"], value["inode"], value["sha256"])
        if not all(isinstance(number, int) for number in (stamp.size, stamp.mtime_ns, stamp.inode)):
            raise TypeError("size, mtime_ns and inode of a stamp are whole numbers")
        return stamp

    def to_json(self) -> dict[str, int | str]:
        """For receipts and seals."""
        return {
            "size": self.size,
            "mtime_ns": self.mtime_ns,
            "inode": self.inode,
            "sha256": self.sha256,
        }

    def matches(self, found: "Stamp") -> bool:
        """Whether ``found`` is the same file with the same content, as far as stat(2) can tell."""
        return (self.size, self.mtime_ns, self.inode) == (found.size, found.mtime_ns, found.inode)


def stamp_tree(folder: Path) -> dict[str, Stamp]:
    """Stamps of all regular files below ``folder`` by relative path with ``/``; links and sockets are left out."""
    found: dict[str, Stamp] = {}
    pending = [str(folder)]
    while pending:
        current = pending.pop()
        with os.scandir(current) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                elif entry.is_file(follow_symlinks=False):
                    status = entry.stat()
                    name = os.path.relpath(entry.path, folder)
                    found[name] = Stamp(status.st_size, status.st_mtime_ns, status.st_ino)
    return found


def hash_stamped(folder: Path, stamps: Mapping[str, Stamp]) -> dict[str, Stamp | None]:
    """``stamps`` with hashes; None for a file that cannot be read or changed while it was."""
    paths = {folder / name: name for name in stamps}
    result: dict[str, Stamp | None] = {}
    for path, digests in hash_files(paths):
        name = paths[path]
        result[name] = None
        if not isinstance(digests, OSError) and _unchanged(path, stamps[name]):
            result[name] = replace(stamps[name], sha256=digests.sha256)
    return result


def _unchanged(path: Path, stamp: Stamp) -> bool:
    try:
        return stamp.matches(Stamp.of(path))
    except OSError:
        return False
