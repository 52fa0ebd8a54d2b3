"""Closure size of a store path and its largest members: closure.py STORE-PATH [SITE-PACKAGES…].

Prints one table of the closure's ten largest store paths, and one of the ten largest distributions in
the given site-packages folders (top-level names). Sizes are apparent sizes in MB (10^6 bytes).
"""

import os
import subprocess
import sys
from pathlib import Path

NIX = Path(__file__).parents[2] / "tests" / "nix" / "nix"
LARGEST = 10


def size(path: Path) -> int:
    """Bytes below a path; links count nothing."""
    if path.is_symlink() or path.is_file():
        return path.lstat().st_size
    return sum(
        (Path(folder) / name).lstat().st_size
        for folder, _, names in os.walk(path)
        for name in names
    )


def table(title: str, rows: list[tuple[int, str]]) -> None:
    """Print the largest rows and the sum of all."""
    print(f"\n{title}: {sum(bytes_ for bytes_, _ in rows) / 1e6:.0f} MB in {len(rows)}")
    for bytes_, name in sorted(rows, reverse=True)[:LARGEST]:
        print(f"  {bytes_ / 1e6:8.1f}  {name}")


def main() -> None:
    """Print both tables."""
    listed = subprocess.run(
        [str(NIX), "path-info", "--recursive", "--size", sys.argv[1]],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    rows = [(int(line.split()[1]), line.split()[0]) for line in listed.splitlines()]
    table("closure", rows)
    for folder in map(Path, sys.argv[2:]):
        table(str(folder), [(size(path), path.name) for path in folder.iterdir()])


if __name__ == "__main__":
    main()
