"""Resolve the pinned Python closures again and show what changed.

`nix run .#update-pins` runs this from the repository's root. Inputs are `nix/pins/vllm.json` (what is
asked for, and the constraints without which the resolver mixes CUDA 13.5 parts into a 13.0 closure
and takes a monolithic `cuda-python` that overwrites files of `cuda-bindings`) and
`appliance/pyproject.toml`. Outputs are `nix/pins/wheels/<system>.json` and
`nix/pins/appliance/<system>.json`: for each distribution its version, the file name of one wheel and
that file's sha256. No index address is stored: `fetchPypi` builds it from the file name.

uv does the resolving and `packaging` ranks the wheels; pip-compile cannot resolve for another
platform, and a uv.lock holds addresses.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import parse_wheel_filename

#: Nix system -> machine name in a wheel's platform tag.
MACHINES: Mapping[str, str] = {"aarch64-linux": "aarch64", "x86_64-linux": "x86_64"}

#: Newest glibc (2.x) whose wheels are taken. Any nixpkgs of 2026 has 2.40 or newer; 2.34 is the
#: newest that the closure asks for (cryptography).
GLIBC_MINOR = 34

#: Oldest glibc (2.x) that a manylinux tag names: manylinux1 on x86_64, manylinux2014 on aarch64.
_OLDEST_GLIBC_MINOR: Mapping[str, int] = {"aarch64": 17, "x86_64": 5}
_LEGACY_MANYLINUX: Mapping[int, str] = {17: "2014", 12: "2010", 5: "1"}


class PinError(Exception):
    """The closure cannot be pinned; the message says which part and what to do."""


@dataclass(frozen=True, slots=True, order=True)
class Pin:
    """One wheel of a closure: distribution version, wheel file name, sha256 in hex."""

    version: str
    file: str
    sha256: str


Closure = Mapping[str, Pin]


def platform_tags(machine: str) -> list[str]:
    """Platform tags that `machine` accepts, the most specific first."""
    tags = []
    for minor in range(GLIBC_MINOR, _OLDEST_GLIBC_MINOR[machine] - 1, -1):
        tags.append(f"manylinux_2_{minor}_{machine}")
        if minor in _LEGACY_MANYLINUX:
            tags.append(f"manylinux{_LEGACY_MANYLINUX[minor]}_{machine}")
    return [*tags, f"linux_{machine}"]


def ranked_tags(python: str, machine: str) -> dict[Tag, int]:
    """Every tag that CPython `python` ("3.12") on `machine` accepts, mapped to its rank (0 best)."""
    major, minor = (int(part) for part in python.split("."))
    platforms = platform_tags(machine)
    tags = [
        *cpython_tags((major, minor), [f"cp{major}{minor}"], platforms),
        *compatible_tags((major, minor), f"cp{major}{minor}", platforms),
    ]
    return {tag: rank for rank, tag in reversed(list(enumerate(tags)))}


def best_wheel(
    wheels: Iterable[tuple[str, str]], ranks: Mapping[Tag, int]
) -> tuple[str, str] | None:
    """Pick, as pip would, the (file name, sha256) with the best-ranked tag; None if none fits."""
    best: tuple[int, str, str] | None = None
    for file, sha256 in wheels:
        tags = parse_wheel_filename(file)[3]
        rank = min((ranks[tag] for tag in tags if tag in ranks), default=None)
        if rank is not None and (best is None or (rank, file) < best[:2]):
            best = (rank, file, sha256)
    return best[1:] if best else None


def closure_of(pylock: Mapping[str, Any], python: str, system: str) -> dict[str, Pin]:
    """Turn a PEP 751 lock into pins for `system`.

    Raises PinError naming every distribution that has no wheel for the system.
    """
    ranks = ranked_tags(python, MACHINES[system])
    pins: dict[str, Pin] = {}
    missing = []
    for package in pylock["packages"]:
        wheels = [(Path(w["url"]).name, w["hashes"]["sha256"]) for w in package.get("wheels", [])]
        picked = best_wheel(wheels, ranks)
        if picked is None:
            missing.append(f"{package['name']} {package['version']}")
        else:
            pins[package["name"]] = Pin(package["version"], *picked)
    if missing:
        raise PinError(
            f"no wheel for {system} and Python {python}: {', '.join(missing)}. Pin another version "
            "in nix/pins/vllm.json (constraints), or drop what asks for it."
        )
    return dict(sorted(pins.items()))


def difference(old: Closure, new: Closure) -> list[str]:
    """Say line by line what changes from `old` to `new`; empty when nothing does."""
    lines = []
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if before is None and after is not None:
            lines.append(f"+ {name} {after.version}")
        elif after is None and before is not None:
            lines.append(f"- {name} {before.version}")
        elif before and after and before.version != after.version:
            lines.append(f"~ {name} {before.version} -> {after.version}")
        elif before and after and before != after:
            lines.append(f"~ {name} {after.version}: another file, {before.file} -> {after.file}")
    return lines


def read_closure(path: Path) -> dict[str, Pin]:
    """Read a pins file; an absent one is an empty closure."""
    if not path.exists():
        return {}
    return {name: Pin(**pin) for name, pin in json.loads(path.read_text()).items()}


def write_closure(path: Path, closure: Closure) -> None:
    """Write a pins file, one distribution a line so that a change reads well in a diff."""
    rows = [f"  {json.dumps(name)}: {json.dumps(asdict(pin))}" for name, pin in closure.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(rows) + "\n}\n")


def resolve(
    requirements: Sequence[str], constraints: Sequence[str], python: str, system: str
) -> dict[str, Pin]:
    """Resolve with uv for `system`. Raises PinError with uv's own words when there is no solution."""
    with tempfile.TemporaryDirectory() as folder:
        asked, bounds = Path(folder, "requirements.in"), Path(folder, "constraints.txt")
        asked.write_text("\n".join(requirements))
        bounds.write_text("\n".join(constraints))
        command = [
            *("uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate"),
            *("--only-binary", ":all:", "--format", "pylock.toml", "--python-version", python),
            *("--python-platform", f"{MACHINES[system]}-manylinux_2_{GLIBC_MINOR}"),
            *("--constraints", str(bounds), str(asked)),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PinError(f"uv cannot resolve for {system}:\n{done.stderr.strip()}")
    return closure_of(tomllib.loads(done.stdout), python, system)


def update(root: Path, system: str, *, write: bool) -> list[str]:
    """Re-resolve both closures of `system` under `root`; return the difference, write if asked."""
    pins = root / "nix" / "pins"
    asked = json.loads((pins / "vllm.json").read_text())
    engine = resolve(asked["requirements"], asked["constraints"], asked["python"], system)
    project = tomllib.loads((root / "appliance" / "pyproject.toml").read_text())["project"]
    # The appliance takes the engine's versions wherever both use a distribution: one version of
    # anything in the image.
    shared = [f"{name}=={pin.version}" for name, pin in engine.items()]
    appliance = resolve(project["dependencies"], shared, asked["python"], system)
    lines = []
    for folder, closure in (("wheels", engine), ("appliance", appliance)):
        path = pins / folder / f"{system}.json"
        lines += [f"{folder}/{system}: {line}" for line in difference(read_closure(path), closure)]
        if write:
            write_closure(path, closure)
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 when nothing differs or it was written, 1 on `--check` with a difference."""
    parser = argparse.ArgumentParser(description="Resolve the pinned closures again.")
    parser.add_argument(
        "--root", type=Path, default=Path.cwd(), help="repository root (default: .)"
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 on a difference"
    )
    arguments = parser.parse_args(argv)
    if not (arguments.root / "nix" / "pins" / "vllm.json").exists():
        print(
            f"{arguments.root} has no nix/pins/vllm.json: run this from the repository's root, "
            "or give --root",
            file=sys.stderr,
        )
        return 2
    try:
        lines = [
            line
            for system in MACHINES
            for line in update(arguments.root, system, write=not arguments.check)
        ]
    except PinError as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(lines) or "nothing changed")
    return 1 if lines and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
