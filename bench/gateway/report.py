"""What the benchmarks print and keep: command, machine, spread, tables."""

import csv
import os
import platform
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import median

Row = dict[str, float | str]


def spread(values: list[float], form: str) -> str:
    """Median [least to greatest]."""
    return (
        f"{form.format(median(values))} [{form.format(min(values))} to {form.format(max(values))}]"
    )


def machine() -> str:
    """Processor, cores, kernel."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    model = next((s.split(":")[1].strip() for s in info.splitlines() if "model name" in s), "")
    cores = os.cpu_count()
    return f"{model or platform.machine()}, {cores} cores, Linux {platform.release()}"


def publish(
    out: Path | None, what: str, lines: Iterable[str], rows: list[Row] | None = None
) -> None:
    """Print the report, and write it.

    Args:
        out: OUT of OUT.md and, where there are rows, OUT.csv; None writes nothing.
        what: sentences on how it was measured, after the machine.
        lines: the tables, in Markdown.
        rows: the figures of each round.
    """
    command = " ".join([f"bench/gateway/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    text = "\n".join(
        [f"Command: `python {command}`", "", f"Machine: {machine()}. {what}", "", *lines]
    )
    print(text)
    if out is None:
        return
    out.parent.mkdir(exist_ok=True)
    out.with_suffix(".md").write_text(text.rstrip() + "\n", encoding="utf-8")
    if rows:
        with out.with_suffix(".csv").open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, rows[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
