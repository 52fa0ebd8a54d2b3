"""Run the real Nix (tests/nix/nix) on this repository's flake, with the stand-in for nixpkgs."""

import atexit
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NIX = HERE / "nix"
STAND_IN = HERE / "nixpkgs"
PARTS = ("flake.nix", "flake.lock", "nix", "overlays", "pkgs", "appliance", "kernels")


class NixError(Exception):
    """Nix failed; the message is what it wrote to stderr."""


def run_nix(*args: str) -> str:
    """Run Nix and return its stdout, stripped. Raises NixError."""
    done = subprocess.run([str(NIX), *args], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NixError(done.stderr)
    return done.stdout.strip()


def copy_tree(destination: Path) -> Path:
    """Copy the flake's files as git sees them (tracked, and new but not ignored) and return the copy."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-zco", "--exclude-standard", "--", *PARTS],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (destination / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, destination / name)
    return destination


@functools.cache
def tree() -> Path:
    """One copy of the flake for this process, in the temporary folder, which the chroot sees."""
    folder = tempfile.mkdtemp(prefix="spark-llm-flake-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return copy_tree(Path(folder))


def changed(destination: Path, file: str, old: str, new: str) -> Path:
    """Copy the flake to `destination` with one text in one file replaced; return the copy."""
    copy_tree(destination)
    text = (destination / file).read_text()
    assert old in text
    (destination / file).write_text(text.replace(old, new))
    return destination


def overlaid(
    system: str, expression: str, *, at: Path | None = None, overlays: str = "[ overlay ]"
) -> list[str]:
    """Arguments that name an expression over `pkgs`: the stand-in with our overlay, without the flake."""
    return [
        "--impure",
        "--expr",
        f"""let
          overlay = import {at or tree()}/overlays;
          pkgs = import {STAND_IN} {{
            system = "{system}";
            config.allowUnfreePredicate = _: true;
            overlays = {overlays};
          }};
        in {expression}""",
    ]


def reference(attribute: str, at: Path | None = None) -> list[str]:
    """Arguments that name an attribute of the flake, with nixpkgs replaced."""
    return [
        *("--override-input", "nixpkgs", f"path:{STAND_IN}", "--no-write-lock-file"),
        f"path:{at or tree()}" + (f"#{attribute}" if attribute else ""),
    ]


def nix_eval(attribute: str, *args: str, at: Path | None = None) -> str:
    """Evaluate an attribute."""
    return run_nix("eval", *reference(attribute, at), *args)


def nix_build(attribute: str, *args: str, at: Path | None = None) -> str:
    """Build an attribute and return its store path, as Nix names it."""
    built = run_nix("build", "--no-link", "--print-out-paths", *reference(attribute, at), *args)
    return built.splitlines()[-1]


def store_path(path: str) -> Path:
    """Where a store path lies on this machine: below the chroot when Nix runs in one."""
    inside = Path(path)
    if inside.exists():
        return inside
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "spark-llm" / "nix" / "rootfs" / inside.relative_to("/")
