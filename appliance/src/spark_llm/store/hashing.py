"""Hashes of files at disk speed, leaving nothing in the page cache.

On unified memory the page cache and the model's weights share one pool, and vLLM counts what is available before it
starts; pages of a 60 GB model that was only hashed would be in its way. So each block is dropped once it is hashed.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

BLOCK = 4 * 2**20
"""Bytes per read; large enough that Python's part of the time is noise."""
_DROP_EVERY = 16 * BLOCK


@dataclass(frozen=True)
class Digests:
    """What one pass over a file yields.

    Attributes:
        sha256: of the content; the hub's hash for LFS files.
        git_sha1: git's blob id, the hub's hash for all other files.
        size: in bytes.
    """

    sha256: str
    git_sha1: str
    size: int


GIT_LIMIT = 64 * 2**20
"""Files up to this size, in bytes, get a git blob id too; the hub stores larger ones as LFS."""


class Hasher:
    """Both hashes of a content that comes in blocks.

    The git id is made for small files only: hashing a 5 GB shard twice would halve the speed, and the hub gives sha256
    for those. Larger files get an empty ``git_sha1``.

    Args:
        size: of the whole content, in bytes; git's blob id begins with it.
    """

    def __init__(self, size: int) -> None:
        self._size, self._done = size, 0
        self._sha256 = hashlib.sha256()
        header = f"blob {size}\0".encode()
        self._git = hashlib.sha1(header, usedforsecurity=False) if size <= GIT_LIMIT else None

    def update(self, block: bytes | memoryview) -> None:
        """The next bytes."""
        self._sha256.update(block)
        if self._git is not None:
            self._git.update(block)
        self._done += len(block)

    def digests(self) -> Digests:
        """The hashes of what came so far."""
        whole = self._git is not None and self._done == self._size
        return Digests(
            self._sha256.hexdigest(),
            self._git.hexdigest() if self._git and whole else "",
            self._done,
        )


def hash_file(path: Path, advance: Callable[[int], None] = lambda _: None) -> Digests:
    """Both hashes of ``path``, see ``Hasher``; its pages leave the page cache as it goes.

    Args:
        path: read from start to end.
        advance: called with the number of bytes of each block.
    """
    size = path.stat().st_size
    hasher = Hasher(size)
    buffer = memoryview(bytearray(min(BLOCK, max(size, 1))))
    done = dropped = 0
    with path.open("rb", buffering=0) as stream:
        descriptor = stream.fileno()
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while count := stream.readinto(buffer):
            hasher.update(buffer[:count])
            done += count
            advance(count)
            if done - dropped >= _DROP_EVERY:
                os.posix_fadvise(descriptor, dropped, done - dropped, os.POSIX_FADV_DONTNEED)
                dropped = done
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    return hasher.digests()


def hash_files(
    paths: Iterable[Path], *, workers: int = 0, advance: Callable[[int], None] = lambda _: None
) -> Iterator[tuple[Path, Digests | OSError]]:
    """Hashes of many files, as they are done; a file that cannot be read yields its error.

    Threads are enough: hashlib and read(2) release the interpreter lock for blocks of this size, and one process keeps
    the memory at one buffer a thread.

    Args:
        paths: the largest are started first, so that no core waits for one long last file.
        workers: threads; 0 takes one for each core this process may use.
        advance: called from several threads with the bytes of each block.
    """
    ordered = sorted(paths, key=_size, reverse=True)
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        futures = {pool.submit(hash_file, path, advance): path for path in ordered}
        for future in as_completed(futures):
            error = future.exception()
            if error is None:
                yield futures[future], future.result()
            elif isinstance(error, OSError):
                yield futures[future], error
            else:
                raise error


def drop_pages(path: Path) -> None:
    """Give the page cache of ``path`` back; dirty pages stay, so sync first."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
