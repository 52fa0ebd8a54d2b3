"""Which kernel serves what: the table in policy.toml, the switches in SPARK_KERNELS, one decision a row."""

import argparse
import difflib
import sys
import textwrap
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("policy.toml")
GB10 = (12, 1)
VARIABLE = "SPARK_KERNELS"


class SwitchError(ValueError):
    """SPARK_KERNELS holds a term that means nothing; the message names the nearest that does."""


@dataclass(frozen=True, slots=True)
class Row:
    """One operation: what serves it, instead of what, and the evidence."""

    operation: str
    choice: str
    evidence: str
    kernel: str | None = None
    entry: str | None = None
    instead_of: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Switches:
    """What the operator asked for: everything off, forced on other GPUs, only some, all but some."""

    off: bool = False
    force: bool = False
    only: frozenset[str] = frozenset()
    without: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether a row's kernel is to be registered, and the reason in words."""

    row: Row
    on: bool
    reason: str


def load_rows(path: Path = TABLE) -> tuple[Row, ...]:
    """Read the policy table."""
    return tuple(Row(**row) for row in tomllib.loads(path.read_text())["row"])


def kernels(rows: Sequence[Row]) -> tuple[str, ...]:
    """Return the names that SPARK_KERNELS knows."""
    return tuple(row.kernel for row in rows if row.kernel)


def parse_switches(text: str, known: Sequence[str]) -> Switches:
    """Parse ``SPARK_KERNELS``: comma-separated ``off``, ``force``, NAME (only these), -NAME (all but).

    An empty text or ``auto`` means every kernel, on GB10 alone.

    Raises:
        SwitchError: a term is none of these.
    """
    off = force = False
    only: set[str] = set()
    without: set[str] = set()
    for term in (part.strip().lower() for part in text.split(",")):
        match term:
            case "" | "auto":
                continue
            case "off" | "0":
                off = True
            case "force":
                force = True
            case _ if term in known:
                only.add(term)
            case _ if term.startswith("-") and term[1:] in known:
                without.add(term[1:])
            case _:
                words = ["off", "force", *known, *(f"-{name}" for name in known)]
                near = difflib.get_close_matches(term, words, 1, 0.0)
                raise SwitchError(f"{VARIABLE}: {term!r} is no switch (did you mean {near[0]!r}?)")
    return Switches(off, force, frozenset(only), frozenset(without))


def decide(row: Row, switches: Switches, capability: tuple[int, int] | None) -> Decision:
    """Decide one row for a device: ``capability`` is CUDA's (major, minor), None without a GPU."""
    if row.kernel is None or row.entry is None:
        return Decision(row, on=False, reason="not ours")
    if switches.off:
        return Decision(row, on=False, reason=f"{VARIABLE}=off")
    if capability is None:
        return Decision(row, on=False, reason="no CUDA device")
    if row.kernel in switches.without or (switches.only and row.kernel not in switches.only):
        return Decision(row, on=False, reason=f"switched off in {VARIABLE}")
    if capability != GB10 and not switches.force:
        found = f"SM {capability[0]}.{capability[1]}"
        return Decision(
            row, on=False, reason=f"measured for SM 12.1, this is {found}; {VARIABLE}=force to try"
        )
    return Decision(row, on=True, reason="forced" if capability != GB10 else "GB10")


def main(argv: Sequence[str]) -> int:
    """``spark-kernels policy``: print the table."""
    argparse.ArgumentParser(prog="spark-kernels policy", description=main.__doc__).parse_args(argv)
    for row in load_rows():
        switch = f"  [{row.kernel}]" if row.kernel else ""
        sys.stdout.write(f"{row.operation}: {row.choice}{switch}\n")
        if row.instead_of:
            sys.stdout.write(f"    instead of {row.instead_of}\n")
        sys.stdout.write(
            textwrap.fill(row.evidence, 96, initial_indent="    ", subsequent_indent="    ") + "\n"
        )
    return 0
