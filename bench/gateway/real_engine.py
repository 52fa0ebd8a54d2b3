"""The gateway in front of a real vLLM, beside the same vLLM reached directly and through nginx, in one run.

    python bench/gateway/real_engine.py --rounds 3 --out bench/gateway/results/real-engine
    python bench/gateway/real_engine.py --profile demo-gpu --engine VENV/bin/python  # on a machine with a GPU

Starts `spark-llm serve` with the demo model, nginx before the same engine's Unix socket (what it loses, a hop costs by
itself), and a second engine, alike, that listens on TCP, as one runs it without a gateway. Whoever is not under load is
idle. Needs cc, nginx, `spark-llm` on PATH and an engine (`make engine` makes the embedded one).
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import report
import targets
from report import Row
from spark_llm import argv
from spark_llm.demo_model import write_demo_model
from spark_llm.profile import Engine, Profile, load_profile, shipped_folder

READY_TIMEOUT_S = 300.0
NO_HOP = -1
"""In place of a session whose CPU time is to be counted."""
ENGINE = Path(__file__).parents[2] / ".venv-engine" / "bin" / "python"
GPU_SHARE = 0.1
"""Of the GPU that the second engine asks to be free; its KV cache has the profile's size whatever this says."""
WAYS = ("direct", "direct, Unix socket", "nginx", "spark-llm")
CASES = {
    "64 streams of 64 tokens": ("--clients", "64", "--max-tokens", "64", "--warm-up", "4"),
    "1 client, 8 tokens": ("--clients", "1", "--max-tokens", "8", "--warm-up", "1"),
}


def main() -> None:
    """Alternate between the two ways to the engine; print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--profile", default="demo", choices=("demo", "demo-gpu"))
    parser.add_argument("--engine", type=Path, default=ENGINE, help="interpreter that has vLLM")
    parser.add_argument("--out", type=Path, help="write OUT.csv and OUT.md")
    options = parser.parse_args()
    profile = load_profile(options.profile, (shipped_folder(),))
    rows: list[Row] = []
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as name,
        _ways(Path(name), profile, options.engine) as ways,
    ):
        for number in range(1, options.rounds + 1):
            for case, arguments in CASES.items():
                # Who comes first changes from round to round, so that a drift favours nobody.
                for turn in range(len(ways)):
                    way = ways[(turn + number) % len(ways)]
                    seen = _load(Path(name), way, arguments, options.seconds)
                    rows.append({"round": number, "case": case, "way": way.name, **seen})
                    print(rows[-1], flush=True)
    report.publish(
        options.out,
        f"vLLM, profile {profile.name}."
        f" Median of {options.rounds} rounds of {options.seconds:g} s [least to greatest].",
        _table(rows),
        rows,
    )


@contextlib.contextmanager
def _ways(folder: Path, profile: Profile, engine: Path) -> Iterator[list[targets.Target]]:
    """All ways, open at once."""
    targets.compile_tools(folder)
    with (
        _served(folder, profile, engine) as ours,
        _engine_on_tcp(folder, profile, engine) as port,
    ):
        socket = next(Path(folder, "run").glob("*.sock"))
        with targets.nginx_before(folder, socket, core=None) as nginx:
            yield [
                targets.Target("direct", ("--port", str(port)), NO_HOP),
                targets.Target("direct, Unix socket", ("--uds", str(socket)), NO_HOP),
                nginx,
                ours,
            ]


@contextlib.contextmanager
def _engine_on_tcp(folder: Path, profile: Profile, engine: Path) -> Iterator[int]:
    """Port of an engine that was started as the service starts its own, but for its address."""
    port = targets.free_port()
    model = folder / "model"
    write_demo_model(model)
    command = argv.build(
        profile,
        python=engine,
        model=model,
        socket=Path("replaced"),
        home=folder,
        shutdown_timeout_s=1,
        inherited=os.environ,
        caches={},
        gpu_memory_utilization=GPU_SHARE if profile.engine is Engine.CUDA else None,
    )
    where = command.args.index("--uds")
    address = ("--host", "127.0.0.1", "--port", str(port))
    with (folder / "engine.log").open("wb") as log:
        process = subprocess.Popen(
            [*command.args[:where], *address, *command.args[where + 2 :]],
            env=command.environment | {"TMPDIR": str(folder)},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        _await_ready(process, f"http://127.0.0.1:{port}/health", folder / "engine.log")
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


@contextlib.contextmanager
def _served(folder: Path, profile: Profile, engine: Path) -> Iterator[targets.Target]:
    """A service that is ready."""
    port = targets.free_port()
    environment = {"SPARK_LLM_ENGINE__PYTHON": str(engine)} | {
        f"SPARK_LLM_PATHS__{kind.upper()}": str(folder / {"runtime": "run"}.get(kind, kind))
        for kind in ("state", "cache", "runtime")
    }
    with (folder / "serve.log").open("wb") as log:
        process = subprocess.Popen(
            ["spark-llm", "serve", "--profile", profile.name, "--port", str(port)],
            env=os.environ | environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _await_ready(process, f"http://127.0.0.1:{port}/readyz", folder / "serve.log")
        yield targets.Target("spark-llm", ("--port", str(port)), process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def _await_ready(process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while not _ready(url):
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(log.read_text(errors="replace")[-4000:])
        time.sleep(0.5)


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310  http on loopback
            return bool(answer.status == 200)  # noqa: PLR2004  HTTP
    except (urllib.error.URLError, OSError):
        return False


def _load(
    folder: Path, way: targets.Target, arguments: tuple[str, ...], seconds: float
) -> dict[str, float]:
    command = [str(folder / "load"), *way.where, *arguments, "--events", "2"]
    command += ["--seconds", str(seconds)]
    cpu_s, began = way.cpu_s(), time.monotonic()
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if not done.stdout:
        raise SystemExit(done.stderr)
    seen = json.loads(done.stdout)
    used = (way.cpu_s() - cpu_s) / (time.monotonic() - began)
    return {
        "answers_per_s": round(seen["answers"] / seen["seconds"], 3),
        "chunks_per_s": round(seen["events"] / seen["seconds"], 1),
        "first_event_p50_ms": round(seen["first_event_us"]["p50"] / 1e3, 3),
        "answer_p50_ms": round(seen["answer_us"]["p50"] / 1e3, 3),
        "cores": round(used, 3),
        "wrong": seen["wrong"],
        "load_average": round(os.getloadavg()[0], 2),
    }


def _table(rows: list[Row]) -> list[str]:
    lines = []
    for case in CASES:
        lines += [
            f"{case}:",
            "",
            "| way | chunks/s | first event p50, ms | answer p50, ms | cores of the hop | wrong | load average |",
            "|---|---|---|---|---|---|---|",
        ]
        for way in WAYS:
            mine = [row for row in rows if (row["case"], row["way"]) == (case, way)]
            cells = [
                report.spread([float(row[key]) for row in mine], "{:.2f}")
                for key in ("chunks_per_s", "first_event_p50_ms", "answer_p50_ms", "cores")
            ]
            wrong = sum(int(row["wrong"]) for row in mine)
            load = report.spread([float(row["load_average"]) for row in mine], "{:.1f}")
            lines.append(f"| {way} | {' | '.join(cells)} | {wrong} | {load} |")
        lines.append("")
        rounds = sorted({int(row["round"]) for row in rows})
        direct = [_of(rows, case, "direct", number) for number in rounds]
        for way in WAYS[1:]:
            mine = [_of(rows, case, way, number) for number in rounds]
            pairs = list(zip(mine, direct, strict=True))
            shares = [100 * own["chunks_per_s"] / other["chunks_per_s"] for own, other in pairs]
            added = [
                own["first_event_p50_ms"] - other["first_event_p50_ms"] for own, other in pairs
            ]
            lines.append(
                f"- {way}: {report.spread(shares, '{:.1f}')} % of direct's chunks/s,"
                f" {report.spread(added, '{:+.2f}')} ms added to the first event."
            )
        lines.append("")
    return lines


def _of(rows: list[Row], case: str, way: str, number: int) -> dict[str, float]:
    row = next(r for r in rows if (r["case"], r["way"], r["round"]) == (case, way, number))
    return {key: float(row[key]) for key in ("chunks_per_s", "first_event_p50_ms")}


if __name__ == "__main__":
    main()
