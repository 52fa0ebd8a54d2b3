"""The service's own cgroup, divided: ``controller``, ``engine`` and ``guard`` below what systemd delegated.

Without delegation (a terminal, a container) there is nothing to divide, and the engine is a process group instead.
"""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

_MOUNTS = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))
"""Where cgroup v2 is mounted: alone, or beside version 1."""
_DELEGATED = "user.delegate"
"""Extended attribute that systemd ≥ 251 sets on a cgroup it handed over (systemd.io/CGROUP_DELEGATION)."""


@dataclass(frozen=True)
class Subtree:
    """Folders of the parts of a delegated cgroup."""

    root: Path

    @property
    def controller(self) -> Path:
        """Where this process lives."""
        return self.root / "controller"

    @property
    def engine(self) -> Path:
        """Where vLLM lives."""
        return self.root / "engine"

    @property
    def guard(self) -> Path:
        """Where the memory guard lives."""
        return self.root / "guard"


def own(text: str | None = None, mounts: tuple[Path, ...] = _MOUNTS) -> Path | None:
    """Folder of this process's cgroup v2; None where there is none.

    Args:
        text: contents of /proc/self/cgroup; None reads it.
        mounts: where cgroup v2 may be mounted.
    """
    if text is None:
        text = Path("/proc/self/cgroup").read_text(encoding="utf-8")
    for line in text.splitlines():
        if line.startswith("0::/"):
            for mount in mounts:
                if (mount / "cgroup.controllers").exists():
                    return mount / line.removeprefix("0::/")
    return None


def current() -> Subtree | None:
    """The subtree that :func:`divide` made, for a process in its ``controller``; None elsewhere."""
    folder = own()
    if folder is None or folder.name != "controller" or not _delegated(folder.parent):
        return None
    return Subtree(folder.parent)


def divide() -> Subtree | None:
    """Divide this process's cgroup and move into its ``controller``; None unless systemd delegated it.

    The kernel lets a cgroup have either processes or, with controllers enabled, children; hence the move.
    """
    root = own()
    if root is None or not _delegated(root):
        return None
    tree = Subtree(root)
    for folder in (tree.controller, tree.engine, tree.guard):
        folder.mkdir(exist_ok=True)
    enter(tree.controller)
    with contextlib.suppress(OSError):  # not on a machine whose controllers are bound to cgroup v1
        available = (root / "cgroup.controllers").read_text(encoding="ascii").split()
        wanted = " ".join(f"+{name}" for name in available if name in {"memory", "pids"})
        (root / "cgroup.subtree_control").write_text(wanted, encoding="ascii")
        # The kernel's OOM killer must not leave half an engine.
        (tree.engine / "memory.oom.group").write_text("1", encoding="ascii")
    return tree


def enter(folder: Path, process: int = 0) -> None:
    """Move a process, by default this one, into a cgroup."""
    (folder / "cgroup.procs").write_text(str(process), encoding="ascii")


def populated(folder: Path) -> bool:
    """Whether a process is left in a cgroup or below it; False if the cgroup is gone."""
    try:
        return "populated 1" in (folder / "cgroup.events").read_text(encoding="ascii")
    except OSError:
        return False


def kill(folder: Path) -> None:
    """SIGKILL to every process of a cgroup, at once (Linux ≥ 5.14)."""
    with contextlib.suppress(OSError):
        (folder / "cgroup.kill").write_text("1", encoding="ascii")


def _delegated(folder: Path) -> bool:
    try:
        return os.getxattr(folder, _DELEGATED) == b"1"
    except OSError:
        return False
