"""Merge site-packages trees into one.

merge.py DESTINATION SOURCE…

Two sources may carry the same path only with the same content. Anything else stops the merge, because
then one distribution would run with another's file (as `cuda-python` 12.6 did to `cuda-bindings`).
"""

import filecmp
import os
import shutil
import stat
import sys
from pathlib import Path

#: Folders and files at the root of site-packages that wheels leave there by mistake.
LITTER = frozenset(
    {"benchmarks", "samples", "include", "example.py", "build_backend.py", "build_utils.py"}
)


class CollisionError(Exception):
    """Two distributions carry the same path with different content."""


def merge(destination: Path, sources: list[Path]) -> None:
    """Copy every tree of `sources` into `destination`, file by file.

    Raises CollisionError naming the path and both distributions' trees.
    """
    owners: dict[Path, Path] = {}
    for source in sources:
        for folder, folders, files in os.walk(source):
            below = Path(folder).relative_to(source)
            litter = LITTER if below == Path() else frozenset()
            folders[:] = [name for name in folders if name not in litter]
            (destination / below).mkdir(parents=True, exist_ok=True)
            for name in sorted(set(files) - litter):
                path = below / name
                if path in owners and not filecmp.cmp(
                    source / path, destination / path, shallow=False
                ):
                    raise CollisionError(
                        f"{path} differs between {owners[path]} and {source}: their versions do not "
                        "belong together. Constrain one in nix/pins/vllm.json and run "
                        "`nix run .#update-pins`."
                    )
                owners.setdefault(path, source)
                if not (destination / path).exists():
                    shutil.copyfile(source / path, destination / path)
                    mode = stat.S_IMODE((source / path).stat().st_mode)
                    (destination / path).chmod(mode | stat.S_IWUSR)


if __name__ == "__main__":
    try:
        merge(Path(sys.argv[1]), [Path(source) for source in sys.argv[2:]])
    except CollisionError as error:
        sys.exit(str(error))
