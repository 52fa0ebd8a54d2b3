"""The table of protections that the units do without: checked against the units, and made into a page.

Run as ``python -m spark_llm.hardening`` it writes docs/reference/hardening.md of the checkout.
"""

import tomllib
from pathlib import Path
from typing import Any

from spark_llm.install import shipped_units

_HEAD = """# What the units may do

Made from `appliance/units/relaxations.toml` by `python -m spark_llm.hardening`; a test compares it with the units.

Every unit starts from the strictest setting systemd has. This page lists each setting that is not at its strictest,
with the reason. `systemd-analyze security spark-llm` rates the result on your machine: lower is better, and the tests
hold the controller and the guard at 2.5 or below and the fetch unit at 4.0 or below.

Not in the table, because they are no protections: `MemoryMax=` and `TasksMax=` count host memory and tasks only. What
the GPU takes of unified memory is in no cgroup; the memory guard looks after that.
"""


def settings(unit: str) -> dict[str, str]:
    """The ``[Service]`` section; a key given several times has its values joined by a space."""
    found: dict[str, str] = {}
    section = ""
    for raw in unit.splitlines():
        line = raw.strip()
        if line.startswith("["):
            section = line
        elif section == "[Service]" and "=" in line and not line.startswith("#"):
            key, value = line.split("=", 1)
            found[key] = f"{found[key]} {value}".strip() if key in found else value
    return found


def relaxed(unit: str, strict: dict[str, str]) -> dict[str, str]:
    """Settings of a unit that are not at their strictest, with the value they have."""
    found = settings(unit)
    return {
        key: found.get(key, "") or "not set"
        for key, wanted in strict.items()
        if found.get(key, "") != wanted
    }


def differences(folder: Path) -> list[str]:
    """Relaxations without a reason and reasons without a relaxation, as sentences."""
    table = _table(folder)
    problems = []
    for path in _services(folder):
        have = relaxed(path.read_text(encoding="utf-8"), table["strict"])
        said = table["relaxed"].get(path.name, {})
        problems += [
            f"{path.name}: {key} is {have[key]} without a reason" for key in have if key not in said
        ]
        problems += [
            f"{path.name}: {key} has a reason but is strict" for key in said if key not in have
        ]
    return problems


def page(folder: Path) -> str:
    """docs/reference/hardening.md."""
    table = _table(folder)
    parts = [_HEAD]
    for path in _services(folder):
        have = relaxed(path.read_text(encoding="utf-8"), table["strict"])
        parts.append(
            f"\n## {path.name}\n\n| setting | is | strictest | because |\n|---|---|---|---|\n"
        )
        for key, value in have.items():
            strictest = f"`{table['strict'][key]}`" if table["strict"][key] else "not set"
            reason = table["relaxed"].get(path.name, {}).get(key, "")
            parts.append(f"| `{key}` | `{value}` | {strictest} | {reason} |\n")
    return "".join(parts)


def _services(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.service"))


def _table(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / "relaxations.toml").read_text(encoding="utf-8"))


if __name__ == "__main__":
    target = Path(__file__).parents[3] / "docs" / "reference" / "hardening.md"
    target.write_text(page(shipped_units()), encoding="utf-8")
