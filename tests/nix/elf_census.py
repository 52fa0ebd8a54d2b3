"""Read the dynamic sections of every ELF file in a system's pinned wheels.

tests/nix/elf_census.py [SYSTEM]   (downloads some 4 GB once, into tests/nix/nix's store; default: both)

Writes elf_census/SYSTEM.json: for each kept wheel its ELF files with what they NEED, keyed by the hash of
the pins. test_elf_closure.py checks that file against the pruning rules and the list of what is ignored, so
that the check itself costs nothing; when the pins change it says that this must run again.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SYSTEMS = ("aarch64-linux", "x86_64-linux")


def census_file(system: str) -> Path:
    """Where a system's census is recorded."""
    return HERE / "elf_census" / f"{system}.json"


def kept_wheels(system: str) -> dict[str, dict[str, str]]:
    """Pins of the wheels that go into the environment, by distribution."""
    pins = json.loads((ROOT / "nix/pins/wheels" / f"{system}.json").read_text())
    pruned = json.loads((ROOT / "nix/pins/pruned.json").read_text())["wheels"]
    return {name: pin for name, pin in pins.items() if name not in pruned}


def pins_hash(system: str) -> str:
    """Hash of all that the census depends on: the kept wheels' own hashes."""
    listed = [f"{name} {pin['sha256']}" for name, pin in sorted(kept_wheels(system).items())]
    return hashlib.sha256("\n".join(listed).encode()).hexdigest()


def dynamic(path: Path) -> tuple[list[str], str]:
    """NEEDED names and SONAME of an ELF file; empty when it has no dynamic section."""
    out = subprocess.run(
        ["readelf", "-dW", str(path)], capture_output=True, text=True, check=True
    ).stdout
    value: dict[str, list[str]] = {"NEEDED": [], "SONAME": []}
    for line in out.splitlines():
        for tag, found in value.items():
            if f"({tag})" in line:
                found.append(line[line.index("[") + 1 : line.rindex("]")])
    return sorted(value["NEEDED"]), "".join(value["SONAME"])


def elf_files(wheel: Path) -> dict[str, dict[str, list[str] | str]]:
    """Each ELF member of a wheel: path -> {"needed": […], "soname": …}."""
    found: dict[str, dict[str, list[str] | str]] = {}
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        for member in archive.infolist():
            with archive.open(member) as file:
                if file.read(4) != b"\x7fELF":
                    continue
            path = Path(archive.extract(member, folder))
            if int.from_bytes(path.read_bytes()[16:18], "little") in {2, 3}:
                needed, soname = dynamic(path)
                found[member.filename] = {"needed": needed} | ({"soname": soname} if soname else {})
            path.unlink()
    return found


def wheel_file(system: str, name: str) -> Path:
    """Fetch one wheel by its pin and return its path on this machine."""
    sys.path.insert(0, str(HERE))
    from flake import nix_build, store_path

    return store_path(nix_build(f"legacyPackages.{system}.pinnedWheels.{name}.src"))


def main() -> None:
    """Take the census of the named systems and write it."""
    for system in sys.argv[1:] or SYSTEMS:
        census = {}
        for name in kept_wheels(system):
            if files := elf_files(wheel_file(system, name)):
                census[name] = files
                print(f"{system} {name}: {len(files)}", file=sys.stderr)
        recorded = {"pins": pins_hash(system), "wheels": census}
        census_file(system).parent.mkdir(exist_ok=True)
        census_file(system).write_text(json.dumps(recorded, indent=0) + "\n")


if __name__ == "__main__":
    main()
