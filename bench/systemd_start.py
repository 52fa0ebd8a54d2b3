"""Start and reload under a real systemd: ``python bench/systemd_start.py [--rounds 20]`` (root).

Boots the container of tests/systemd. A start is timed by PID 1 itself, from the process's start to READY=1; its peer is
what Python and the imports cost: ``spark-llm --version`` and an empty Python program, in the same container and run.
"""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "systemd"))

from container import CONFIG, NO_ENGINE, TREE, Container, boot  # noqa: E402  found on the line above

SERVICE = "spark-llm.service"


def start(machine: Container) -> float:
    """Seconds from start to READY=1, by PID 1's clock."""
    machine.systemctl("stop", SERVICE)
    machine.systemctl("start", SERVICE)
    begin, end = "InactiveExitTimestampMonotonic", "ActiveEnterTimestampMonotonic"
    shown = machine.show(SERVICE, begin, end)
    return (int(shown[end]) - int(shown[begin])) / 1e6


def timed(act: Callable[[], object]) -> float:
    """Seconds that ``act`` takes."""
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    rounds = range(parser.parse_args().rounds)
    spark, python = f"{TREE}/.venv/bin/spark-llm", f"{TREE}/.venv/bin/python"
    with boot() as machine:
        machine.run(spark, "install")
        machine.write(CONFIG, NO_ENGINE)
        results = {
            "start to READY=1": [start(machine) for _ in rounds],
            "reload": [timed(lambda: machine.systemctl("reload", SERVICE)) for _ in rounds],
            "`spark-llm --version`": [
                timed(lambda: machine.run(spark, "--version")) for _ in rounds
            ],
            "empty Python program": [timed(lambda: machine.run(python, "-c", "")) for _ in rounds],
        }
        version = machine.run("systemctl", "--version").stdout.splitlines()[0]
    load = Path("/proc/loadavg").read_text(encoding="ascii").split()[0]
    print(f"{version}, {platform.machine()}, load average {load}, {len(rounds)} rounds\n")
    print("| what | median, s | least | greatest |\n|---|---|---|---|")
    for what, seconds in results.items():
        print(
            f"| {what} | {statistics.median(seconds):.3f} | {min(seconds):.3f} | {max(seconds):.3f} |"
        )


if __name__ == "__main__":
    main()
