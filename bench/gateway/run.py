"""The gateway beside its peers, in one run, on a synthetic upstream.

    python bench/gateway/run.py --rounds 5 --seconds 4 --out bench/gateway/results/synthetic

Each round starts every target in turn, so a neighbour's load meets all of them; a figure is the median of the rounds,
with the least and the greatest. CPU per answer is the robust one: it does not see a neighbour.
Needs two cores, cc, taskset, nginx, and `spark-llm` and `litellm` on PATH (requirements.txt).
"""

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

import report
import targets
from report import Row

COLUMNS = {
    "answers/s": ("answers_per_s", "{:,.0f}"),
    "chunks/s": ("chunks_per_s", "{:,.0f}"),
    "first event p50, ms": ("first_event_p50_ms", "{:.2f}"),
    "answer p50, ms": ("answer_p50_ms", "{:.2f}"),
    "CPU per answer, ms": ("cpu_ms_per_answer", "{:.3f}"),
    "RSS, MB": ("rss_mb", "{:.0f}"),
}


def main() -> None:
    """Run the rounds; print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", default=",".join(targets.ALL))
    parser.add_argument("--clients", default="1,64")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--step-us", type=int, default=0, help="0: as fast as it can")
    parser.add_argument("--out", type=Path, help="write OUT.csv and OUT.md")
    options = parser.parse_args()
    names, clients = options.targets.split(","), [int(n) for n in options.clients.split(",")]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        targets.compile_tools(Path(folder))
        for number in range(1, options.rounds + 1):
            for name in names:
                with targets.ALL[name](Path(folder), options.step_us) as target:
                    for count in clients:
                        rows.append(measure(Path(folder), target, count, options, number))
                        print(rows[-1], flush=True)
    report.publish(
        options.out,
        f"Median of {options.rounds} rounds of {options.seconds:g} s [least to greatest].",
        table(rows, clients),
        rows,
    )


def measure(
    folder: Path, target: targets.Target, clients: int, options: argparse.Namespace, number: int
) -> Row:
    """One run of ``load``; answers per second, times and CPU time of the target."""
    cpu = target.cpu_s()
    command = [
        "taskset",
        "-c",
        str(targets.OTHER_CORE),
        folder / "load",
        *target.where,
        "--clients",
        str(clients),
    ]
    done = subprocess.run(
        [*command, "--seconds", str(options.seconds)], check=False, capture_output=True, text=True
    )
    if not done.stdout:
        raise SystemExit(f"{target.name}: {done.stderr}")
    seen = json.loads(done.stdout)
    return {
        "round": number,
        "target": target.name,
        "clients": clients,
        "answers": seen["answers"],
        "wrong": seen["wrong"],
        "answers_per_s": round(seen["answers"] / seen["seconds"], 2),
        "chunks_per_s": round(seen["events"] / seen["seconds"], 1),
        "first_event_p50_ms": round(seen["first_event_us"]["p50"] / 1e3, 4),
        "first_event_p99_ms": round(seen["first_event_us"]["p99"] / 1e3, 4),
        "answer_p50_ms": round(seen["answer_us"]["p50"] / 1e3, 4),
        "cpu_ms_per_answer": round(1e3 * (target.cpu_s() - cpu) / seen["with_warm_up"], 4),
        "rss_mb": round(target.rss_mb(), 1),
        "load_average": round(os.getloadavg()[0], 2),
    }


def table(rows: list[Row], clients: Iterable[int]) -> list[str]:
    """Markdown, one table for each number of clients."""
    lines = []
    for count in clients:
        lines += [
            f"{count} client{'s' if count > 1 else ''}:",
            "",
            f"| target | {' | '.join(COLUMNS)} | wrong answers | load average |",
            "|---" * (len(COLUMNS) + 3) + "|",
        ]
        for name in dict.fromkeys(str(row["target"]) for row in rows):
            mine = [row for row in rows if row["target"] == name and row["clients"] == count]
            cells = [
                report.spread([float(row[key]) for row in mine], form)
                for key, form in COLUMNS.values()
            ]
            wrong = sum(int(row["wrong"]) for row in mine)
            load = report.spread([float(row["load_average"]) for row in mine], "{:.1f}")
            lines.append(f"| {name} | {' | '.join(cells)} | {wrong} | {load} |")
        lines.append("")
    return lines


if __name__ == "__main__":
    main()
