"""A Nix profile whose generations are the installed versions: set, roll back, ask.

The profile is a garbage-collector root, so a generation that can be rolled back to stays on disk.
"""

import shutil
import subprocess
from pathlib import Path

from spark_llm.errors import RefusedError, SparkLlmError
from spark_llm.reason import Reason

PROFILE = Path("/nix/var/nix/profiles/spark-llm")
STORE = Path("/nix/store")
_OTHER_PLACES = "/nix/var/nix/profiles/default/bin:/run/current-system/sw/bin:/usr/bin"
"""Where nix-env lies when sudo has cut PATH."""


def current() -> Path | None:
    """The package that is installed; None without one."""
    return PROFILE.resolve() if PROFILE.exists() else None


def store_path(program: Path) -> Path | None:
    """The store path that ``program`` belongs to; None outside the store."""
    found = program.resolve()
    if not found.is_relative_to(STORE):
        return None
    return STORE / found.relative_to(STORE).parts[0]


def select(package: Path) -> None:
    """Make ``package`` the newest generation; nothing happens if it is the current one."""
    if current() != package.resolve():
        _nix_env("--set", str(package))


def go_back_to(package: Path) -> None:
    """Make the newest generation of ``package`` current again; nothing happens if it is already.

    The other generations keep their order, so that a later :func:`roll_back` does not lead to what was left now.

    Raises:
        SparkLlmError: nix-env failed.
    """
    if current() == package.resolve():
        return
    numbers = [
        int(link.name.removeprefix(f"{PROFILE.name}-").removesuffix("-link"))
        for link in PROFILE.parent.glob(f"{PROFILE.name}-*-link")
        if link.resolve() == package.resolve()
    ]
    if numbers:
        _nix_env("--switch-generation", str(max(numbers)))
    else:  # somebody deleted old generations meanwhile
        select(package)


def roll_back() -> Path:
    """Go back one generation; returns its package.

    Raises:
        SparkLlmError: there is none before the current one.
    """
    _nix_env("--rollback")
    package = current()
    if package is None:
        raise SparkLlmError(f"{PROFILE} is gone", reason=Reason.INTERNAL)
    return package


def forget() -> list[Path]:
    """Remove the profile; the packages stay in the store until garbage is collected."""
    links = [path for path in PROFILE.parent.glob(f"{PROFILE.name}*") if path.is_symlink()]
    for link in links:
        link.unlink()
    return links


def _nix_env(*arguments: str) -> None:
    program = shutil.which("nix-env") or shutil.which("nix-env", path=_OTHER_PLACES)
    if program is None:
        raise RefusedError(
            "nix-env is not there, and versions are switched with it",
            reason=Reason.NOT_FOUND,
            hint="Install Nix; with sudo, keep PATH: sudo env PATH=$PATH spark-llm ...",
        )
    done = subprocess.run(  # noqa: S603  the arguments are ours
        [program, "--profile", str(PROFILE), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SparkLlmError(
            f"nix-env {' '.join(arguments)}: {done.stderr.strip() or done.returncode}",
            reason=Reason.NOT_FOUND,
        )
