"""Who acts on the store: root goes on as its owner, and who may not look into it is told so."""

import os
import pwd
from pathlib import Path

from spark_llm.errors import RefusedError, SparkLlmError
from spark_llm.reason import Reason

_UMASK = 0o007
"""The fetch unit's: service and fetcher share the store by group."""


def act_as_owner(folder: Path) -> None:
    """Make this process one that may work in ``folder``, for good.

    What root wrote there the service could not read, and root in a folder of another user would follow that user's
    links; so root gives its rights up. A folder that is not there is left to whom it is made by.

    Raises:
        RefusedError: the caller is neither root nor let in.
    """
    try:
        owner = folder.stat()
    except FileNotFoundError:
        return
    except PermissionError:
        raise not_yours(folder) from None
    if os.geteuid() == 0 and owner.st_uid != 0:
        _become(owner.st_uid, owner.st_gid)
    elif not os.access(folder, os.R_OK | os.X_OK, effective_ids=True):
        raise not_yours(folder)


def open_first(path: Path, folder: Path, flags: int = 0) -> int:
    """Descriptor of ``path`` for reading, opened before :func:`act_as_owner` of ``folder``.

    What lies in somebody's home is the caller's to read and seldom the owner's. Root does not follow the owner's links,
    though: below a folder of the owner's it is opened after.

    Args:
        path: a file, or a folder.
        folder: see :func:`act_as_owner`.
        flags: more of ``os.open``.

    Raises:
        RefusedError: see :func:`act_as_owner`.
        SparkLlmError: it cannot be read.
    """
    try:
        if _is_owners(path.absolute(), folder):
            act_as_owner(folder)
        descriptor = os.open(path, os.O_RDONLY | flags)
    except OSError as error:
        raise SparkLlmError(
            f"cannot read {path}: {error.strerror}", reason=Reason.MODEL_MISSING
        ) from error
    try:
        act_as_owner(folder)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def not_yours(path: Path | str) -> RefusedError:
    """The error for ``path`` when it may not be read or written."""
    return RefusedError(
        f"{path}: permission denied",
        reason=Reason.UNWRITABLE_DIRECTORY,
        hint="If it is the installed service's, run this with sudo; it then acts as the service's user.",
    )


def _is_owners(path: Path, folder: Path) -> bool:
    """Whether a folder on the way to ``path`` belongs to the owner of ``folder``."""
    try:
        owner = folder.stat().st_uid
    except FileNotFoundError:
        return False
    return any(above.stat().st_uid == owner for above in path.parents)


def _become(user: int, group: int) -> None:
    try:
        entry = pwd.getpwuid(user)
        os.initgroups(entry.pw_name, entry.pw_gid)
        os.environ["HOME"] = entry.pw_dir
    except KeyError:  # a container's volume may belong to a number without a name
        os.setgroups([])
    os.setgid(group)
    os.setuid(user)
    os.umask(_UMASK)
