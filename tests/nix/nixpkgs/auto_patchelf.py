"""Stand-in for nixpkgs' auto-patchelf: give every ELF file of a tree its RUNPATH and interpreter.

As the real one: a NEEDED name is looked for by file name in the tree, then in the search paths, then in
the inputs; RUNPATH becomes what was found plus the appended paths, and what stood there is dropped; a
name that is found nowhere and not ignored is an error. Inputs say what they provide in
nix-support/provides, because on another architecture their real libraries are not here.
"""

import argparse
import fnmatch
import subprocess
import sys
from pathlib import Path

INTERPRETER = {
    "aarch64-linux": "/lib/ld-linux-aarch64.so.1",
    "x86_64-linux": "/lib64/ld-linux-x86-64.so.2",
}
MACHINE = {"aarch64-linux": 183, "x86_64-linux": 62}
GLIBC = frozenset(
    {
        *("libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1", "libutil.so.1"),
        *("libresolv.so.2", "libanl.so.1", "ld-linux-aarch64.so.1", "ld-linux-x86-64.so.2"),
    }
)


def is_elf(path: Path, system: str) -> bool:
    """Whether `path` is a 64-bit ELF executable or shared object for `system`."""
    with path.open("rb") as file:
        head = file.read(20)
    return (
        head[:5] == b"\x7fELF\x02"
        and int.from_bytes(head[16:18], "little") in {2, 3}
        and int.from_bytes(head[18:20], "little") == MACHINE[system]
    )


def patchelf(*args: str) -> str:
    done = subprocess.run(["patchelf", *args], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip())
    return done.stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("system")
    parser.add_argument("out", type=Path)
    for name in ("ignore", "append", "search", "inputs"):
        parser.add_argument(f"--{name}", nargs="*", default=[])
    args = parser.parse_args()

    elves = [
        path
        for path in sorted(args.out.rglob("*"))
        if path.is_file() and not path.is_symlink() and is_elf(path, args.system)
    ]
    provided: dict[str, str] = {}
    for path in elves:
        if ".so" in path.name:
            provided.setdefault(path.name, str(path.parent))
    for folder in map(Path, args.search):
        for path in sorted(folder.glob("*.so*")):
            provided.setdefault(path.name, str(folder))
    for folder in map(Path, args.inputs):
        listed = folder / "nix-support" / "provides"
        for name in listed.read_text().split() if listed.exists() else []:
            provided.setdefault(name, f"{folder}/lib")

    missing = []
    for path in elves:
        try:
            needed = patchelf("--print-needed", str(path)).split()
        except RuntimeError:
            continue  # statically linked: no dynamic section
        runpath: list[str] = []
        for name in needed:
            if name in GLIBC:
                continue
            if name in provided:
                if provided[name] not in runpath:
                    runpath.append(provided[name])
            elif not any(fnmatch.fnmatch(name, pattern) for pattern in args.ignore):
                missing.append((name, path))
        runpath += [entry for entry in args.append if entry not in runpath]
        options = ["--set-rpath", ":".join(runpath)]
        if has_interpreter(path):
            options += ["--set-interpreter", INTERPRETER[args.system]]
        patchelf(*options, str(path))
    for name, path in missing:
        print(
            f"auto-patchelf could not satisfy dependency {name} wanted by {path}", file=sys.stderr
        )
    print(f"auto-patchelf: {len(elves)} ELF files, {len(missing)} dependencies missing")
    return 1 if missing else 0


def has_interpreter(path: Path) -> bool:
    """Whether the file is started by a loader, so that its name must be set."""
    try:
        return bool(patchelf("--print-interpreter", str(path)))
    except RuntimeError:
        return False


if __name__ == "__main__":
    sys.exit(main())
