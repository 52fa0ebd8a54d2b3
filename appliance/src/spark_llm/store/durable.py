"""Writes that survive a crash: temporary name, fsync, rename, fsync of the folder."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TEMPORARY_PREFIX = ".tmp-"
"""Every temporary name begins with this, so that leftovers of a crash can be told from data."""


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:  # noqa: ANN401  any JSON value
    """Replace ``path`` by ``value`` as JSON; readers see the old or the new content, never a part.

    Args:
        path: its folder must exist.
        value: what ``json.dumps`` takes.
        durable: wait until the disk has it; False for progress reports, which may be lost.
    """
    descriptor, name = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            json.dump(value, stream, indent=1, sort_keys=True)
            stream.write("\n")
            os.fchmod(stream.fileno(), 0o666 & ~_umask())
            if durable:
                stream.flush()
                os.fsync(stream.fileno())
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise
    if durable:
        sync_folder(path.parent)


def read_json(path: Path) -> Any:  # noqa: ANN401  any JSON value
    """Content of ``path``; None where it is missing, unreadable or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def sync_folder(folder: Path) -> None:
    """Make renames and new names in ``folder`` durable (fsync(2): a file's own fsync does not)."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Wait until the disk has the content of ``path``."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_tree(folder: Path) -> None:
    """Delete ``folder``: out of sight by one rename first, so that a crash never leaves half of it visible."""
    trash = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=folder.parent))
    folder.rename(trash / folder.name)
    shutil.rmtree(trash)


def leftovers(folder: Path) -> Iterator[Path]:
    """Temporary names directly below ``folder`` that a crash left behind."""
    if folder.is_dir():
        yield from folder.glob(f"{TEMPORARY_PREFIX}*")


@contextlib.contextmanager
def umask_of(root: Path) -> Iterator[None]:
    """Give new files the permissions that ``root`` itself has.

    A root of mode 2775 lets the service user and its group write, one of 0700 lets nobody else in. Process-wide while
    it lasts, as umask(2) is.
    """
    before = os.umask(0o777 & ~(root.stat().st_mode & 0o777 | 0o700))
    try:
        yield
    finally:
        os.umask(before)


def _umask() -> int:
    """This process's umask; reading it from /proc does not change it for other threads."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("Umask:"):
            return int(line.split()[1], 8)
    return 0o022
