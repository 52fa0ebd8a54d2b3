"""Stand-in for nixpkgs' pkgs.formats.toml: JSON file in, TOML out. Tables, scalars and lists of scalars."""

import json
import sys
from pathlib import Path
from typing import Any


def scalar(value: object) -> str:
    """One TOML value; JSON's spelling is TOML's for all that is used here."""
    return json.dumps(value)


def table(value: dict[str, Any], path: tuple[str, ...]) -> list[str]:
    """Lines of one table, its sub-tables after its own keys."""
    lines = [f"[{'.'.join(path)}]"] if path else []
    lines += [
        f"{key} = {scalar(item)}" for key, item in value.items() if not isinstance(item, dict)
    ]
    for key, item in value.items():
        if isinstance(item, dict):
            lines += table(item, (*path, key))
    return lines


if __name__ == "__main__":
    print("\n".join(table(json.loads(Path(sys.argv[1]).read_text()), ())))
