"""What the controller costs: time to /livez, resident memory, and the import of its command line.

    python bench/gateway/controller.py --rounds 10 --out bench/gateway/results/controller

The engine is the synthetic upstream, which is there at once. Needs cc and `spark-llm` on PATH.
"""

import argparse
import os
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import report
import targets

IMPORT = (
    "import time; t = time.perf_counter(); import spark_llm.cli; print(time.perf_counter() - t)"
)
BARS = {
    "/livez after process start, s": 1.0,
    "CPU time until then, s": 1.0,
    "import of spark_llm.cli, s": 0.3,
    "RSS, MB": 120.0,
}


def main() -> None:
    """Measure each figure ``--rounds`` times; print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, help="write OUT.md")
    options = parser.parse_args()
    found: dict[str, list[float]] = {name: [] for name in BARS}
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        targets.compile_tools(folder)
        python = Path(subprocess.check_output(["which", "spark-llm"], text=True).strip())
        for _ in range(options.rounds):
            elapsed, cpu = _livez_s(folder)
            found["/livez after process start, s"].append(elapsed)
            found["CPU time until then, s"].append(cpu)
            imported = subprocess.check_output([python.parent / "python", "-c", IMPORT], text=True)
            found["import of spark_llm.cli, s"].append(float(imported))
        with targets.spark_llm(folder, 0) as target:
            command = [str(folder / "load"), *target.where, "--clients", "64", "--seconds", "3"]
            for _ in range(3):
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                found["RSS, MB"].append(target.rss_mb())
    report.publish(
        options.out,
        f"Load average {os.getloadavg()[0]:.1f}. Median [least to greatest] of {options.rounds}; memory after each of 3"
        " loads with 64 clients.",
        [
            "| figure | measured | bar |",
            "|---|---|---|",
            *(
                f"| {name} | {report.spread(values, '{:.2f}')} | {BARS[name]:g} |"
                for name, values in found.items()
            ),
        ],
    )


def _livez_s(folder: Path) -> tuple[float, float]:
    """Seconds from starting the process to the first answer of /livez, and its CPU time in them."""
    port = targets.free_port()
    environment = {
        "SPARK_LLM_ENGINE__PYTHON": str(targets.stand_in_engine(folder, 0)),
        **{
            f"SPARK_LLM_PATHS__{kind}": str(folder / kind.lower())
            for kind in ("STATE", "CACHE", "RUNTIME")
        },
    }
    begin = time.monotonic()
    process = subprocess.Popen(
        ["spark-llm", "serve", "--profile", "demo", "--port", str(port)],
        env=os.environ | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        while process.poll() is None and time.monotonic() < begin + 30:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/livez", timeout=5).close()
                elapsed = time.monotonic() - begin
                return elapsed, targets.Target("", (), process.pid).cpu_s()
            except (urllib.error.URLError, OSError):
                time.sleep(0.005)
        raise SystemExit("spark-llm serve does not answer /livez")
    finally:
        process.terminate()
        process.wait(30)


if __name__ == "__main__":
    main()
