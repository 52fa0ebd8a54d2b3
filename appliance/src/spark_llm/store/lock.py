"""Locks between processes, with the owner's pid and reason.

A lock is a file held with an open file description lock (fcntl(2), F_OFD_SETLK): the kernel lets go of it when its
owner dies, however it dies, so there is no stale lock to break. Unlike flock(2) it can be asked about without being
taken (F_OFD_GETLK): whoever only looks, as lists do, never stands in the way of a start. What the file says about its
owner is for people; it never decides anything.
"""

import contextlib
import errno
import fcntl
import json
import os
import stat
import struct
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from spark_llm.errors import TryAgainError
from spark_llm.reason import Reason


@dataclass(frozen=True)
class Owner:
    """Who holds a lock.

    Attributes:
        pid: process id, in the owner's pid namespace.
        reason: what for: ``pull``, ``rm``, ``serving``.
        since: Unix time, in seconds.
    """

    pid: int
    reason: str
    since: float


class BusyError(TryAgainError):
    """Somebody else holds the lock.

    Attributes:
        owner: who, or None where the file does not say.
    """

    def __init__(self, what: str, owner: Owner | None) -> None:
        self.owner = owner
        by = f" by process {owner.pid} ({owner.reason})" if owner else ""
        super().__init__(
            f"{what} is in use{by}",
            reason=Reason.MODEL_BUSY,
            hint="Wait until it is done, or stop that process.",
        )


class Lock:
    """One lock file. Several shared holders, or one exclusive one.

    Args:
        path: made if it is missing; stays when released, because deleting a held lock file would let two owners in.
        what: the thing it guards, for messages.
    """

    def __init__(self, path: Path, what: str) -> None:
        self.path = path
        self._what = what

    @contextlib.contextmanager
    def hold(self, reason: str, *, shared: bool = False, wait: bool = False) -> Iterator[int]:
        """Hold the lock; yields its file descriptor, which a child may inherit to hold it too.

        A shared hold works in a store that this process may only read: it then locks an existing file, or none (-1),
        for what nobody here may write nobody here can remove.

        Raises:
            BusyError: somebody else has it and ``wait`` is False.
        """
        descriptor, writable = self._locked(shared=shared, wait=wait)
        try:
            if writable:
                _write(descriptor, Owner(os.getpid(), reason, time.time()))
            yield descriptor
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def _locked(self, *, shared: bool, wait: bool) -> tuple[int, bool]:
        """A locked descriptor (or -1) of the file that has the path's name now, and whether it may be written."""
        while True:
            writable = True
            try:
                descriptor = _open(self.path)
            except OSError as error:
                if not shared or error.errno not in _READ_ONLY:
                    raise
                writable = False
                descriptor = _open_existing(self.path)
                if descriptor < 0:
                    return descriptor, writable
            try:
                take(descriptor, shared=shared, wait=wait)
                if _has_name(descriptor, self.path):
                    return descriptor, writable
            except OSError as error:
                os.close(descriptor)
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise BusyError(self._what, self.owner()) from None
                raise
            os.close(descriptor)  # while we waited it was removed with its folder

    def owner(self) -> Owner | None:
        """The last one who took the lock and wrote its name."""
        try:
            return Owner(**json.loads(self.path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def held(self) -> Owner | None:
        """Its owner if somebody holds it now, else None."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            asked = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _whole_file(fcntl.F_WRLCK))
        finally:
            os.close(descriptor)
        if (
            _FLOCK.unpack(asked)[0] == fcntl.F_UNLCK
        ):  # nothing would stand in an exclusive owner's way
            return None
        return self.owner() or Owner(0, "unknown", 0.0)


def take(descriptor: int, *, shared: bool, wait: bool = False) -> None:
    """Lock the file of ``descriptor``, or turn the lock it has into the other kind at once.

    Raises:
        OSError: somebody else has it and ``wait`` is False (EAGAIN or EACCES).
    """
    command = fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK
    fcntl.fcntl(descriptor, command, _whole_file(fcntl.F_RDLCK if shared else fcntl.F_WRLCK))


_FLOCK = struct.Struct("hhqqi0q")
"""``struct flock`` of 64-bit Linux: type, whence, start, length, pid."""


def _whole_file(kind: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0)


def _open(path: Path) -> int:
    """The lock file; a new one may be locked by whoever may write its folder, whatever this process's umask is."""
    folder = path.parent
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        _share(folder)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    os.fchmod(descriptor, folder.stat().st_mode & 0o666)
    return descriptor


def _share(folder: Path) -> None:
    """Give a new folder its parent's mode, if the umask took something of it away."""
    mode = stat.S_IMODE(folder.parent.stat().st_mode)
    if stat.S_IMODE(folder.stat().st_mode) == mode:
        return
    try:
        folder.chmod(mode)
    except (
        PermissionError
    ):  # RestrictSUIDSGID= lets no one set that bit; the group itself was inherited
        folder.chmod(mode & 0o777)


def _has_name(descriptor: int, path: Path) -> bool:
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), found)


_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


def _open_existing(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1


def _write(descriptor: int, owner: Owner) -> None:
    """Overwrite in place: a rename would change the inode that others hold."""
    text = json.dumps(asdict(owner)).encode()
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text, 0)
