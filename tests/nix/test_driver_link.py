"""driver-link on a fake tree: what it links, when it does nothing, and what it refuses."""

import platform
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "pkgs" / "driver-link" / "driver-link.sh"
VERSION = "580.95.05"
FOLDER = f"usr/lib/{platform.machine()}-linux-gnu"
NVRM = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  {}  Release Build  (dvs-builder)\n"
)


def run(root: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Run the script as its package does: with the shell's strict options."""
    command = ["bash", "-euo", "pipefail", str(SCRIPT), "--root", str(root), *args]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A DGX OS tree: a loaded module, the driver's libraries, and a distribution's own libraries."""
    libraries = tmp_path / FOLDER
    libraries.mkdir(parents=True)
    for name in ("cuda", "nvidia-ml", "nvidia-ptxjitcompiler", "nvidia-nvvm", "nvidia-gpucomp"):
        (libraries / f"lib{name}.so.{VERSION}").write_text(name)
        (libraries / f"lib{name}.so.1").symlink_to(f"lib{name}.so.{VERSION}")
    for name in ("libc.so.6", "libstdc++.so.6", "libnvidia-egl-gbm.so.1", "libcudart.so.13"):
        (libraries / name).write_text("not the driver's compute libraries")
    proc = tmp_path / "proc/driver/nvidia"
    proc.mkdir(parents=True)
    (proc / "version").write_text(NVRM.format(VERSION))
    return tmp_path


def farm(root: Path) -> set[str]:
    """Names that the link farm offers."""
    return {path.name for path in (root / "run/opengl-driver/lib").iterdir()}


def test_links_the_drivers_libraries_alone(root: Path) -> None:
    """The farm holds every allowed library under its own names and nothing of the distribution."""
    done = run(root)
    assert done.returncode == 0, done.stderr
    names = farm(root)
    assert {"libcuda.so.1", f"libcuda.so.{VERSION}", "libnvidia-ptxjitcompiler.so.1"} <= names
    assert not names & {"libc.so.6", "libstdc++.so.6", "libnvidia-egl-gbm.so.1", "libcudart.so.13"}
    assert (root / "run/opengl-driver/lib/libcuda.so.1").readlink() == Path(
        f"/{FOLDER}/libcuda.so.1"
    )
    assert "10 libraries of driver 580.95.05" in done.stdout


def test_is_idempotent(root: Path) -> None:
    """A second run leaves the same farm and no leftovers."""
    run(root)
    before = farm(root)
    assert run(root).returncode == 0
    assert farm(root) == before
    left = {path.name for path in (root / "run/opengl-driver").iterdir()}
    assert len([name for name in left if name.startswith(".lib.")]) == 1


def test_follows_an_upgrade(root: Path) -> None:
    """After an upgrade and a reboot the farm has the new libraries and not the old."""
    run(root)
    libraries = root / FOLDER
    (libraries / f"libcuda.so.{VERSION}").rename(libraries / "libcuda.so.590.1.2")
    (libraries / "libcuda.so.1").unlink()
    (libraries / "libcuda.so.1").symlink_to("libcuda.so.590.1.2")
    (root / "proc/driver/nvidia/version").write_text(NVRM.format("590.1.2"))
    assert run(root).returncode == 0
    assert "libcuda.so.590.1.2" in farm(root)
    assert f"libcuda.so.{VERSION}" not in farm(root)


def test_does_nothing_on_nixos(root: Path) -> None:
    """On NixOS, which has the folder itself, nothing is touched."""
    (root / "run/current-system").mkdir(parents=True)
    done = run(root)
    assert done.returncode == 0
    assert "NixOS" in done.stdout
    assert not (root / "run/opengl-driver").exists()


def test_leaves_anothers_folder_alone(root: Path) -> None:
    """A folder that something else made is kept if it serves, and refused with a sentence if not."""
    theirs = root / "run/opengl-driver/lib"
    theirs.mkdir(parents=True)
    refused = run(root)
    assert refused.returncode == 1
    assert "was not made by spark-llm" in refused.stderr
    (theirs / "libcuda.so.1").write_text("theirs")
    assert run(root).returncode == 0
    assert run(root, "--remove").returncode == 0
    assert (theirs / "libcuda.so.1").read_text() == "theirs"


def test_refuses_without_libcuda(root: Path) -> None:
    """A host without the driver's libraries is told what to install."""
    for path in (root / FOLDER).glob("libcuda.so*"):
        path.unlink()
    done = run(root)
    assert done.returncode == 1
    assert "no libcuda.so.1 in" in done.stderr
    assert "apt install" in done.stderr


def test_refuses_another_version_than_the_modules(root: Path) -> None:
    """Libraries of another version than the loaded module mean that a reboot is due."""
    (root / "proc/driver/nvidia/version").write_text(NVRM.format("580.126.09"))
    done = run(root)
    assert done.returncode == 1
    assert "libcuda is 580.95.05 and the loaded kernel module is 580.126.09" in done.stderr
    assert "Reboot" in done.stderr


def test_refuses_without_the_module(root: Path) -> None:
    """Without the kernel module it says how to load it."""
    (root / "proc/driver/nvidia/version").unlink()
    done = run(root)
    assert done.returncode == 1
    assert "modprobe nvidia" in done.stderr


def test_check_changes_nothing(root: Path) -> None:
    """--check reports the driver and links nothing."""
    done = run(root, "--check")
    assert done.returncode == 0
    assert f"driver {VERSION}" in done.stdout
    assert not (root / "run/opengl-driver").exists()


def test_remove_takes_away_what_it_made(root: Path) -> None:
    """--remove deletes the farm, and is content when there is none."""
    run(root)
    assert run(root, "--remove").returncode == 0
    assert not (root / "run/opengl-driver").exists()
    assert run(root, "--remove").returncode == 0


def test_unknown_argument_is_refused(root: Path) -> None:
    """An unknown flag is a usage error that lists the known ones."""
    done = run(root, "--force")
    assert done.returncode == 2
    assert "--remove" in done.stderr
