"""Times kernels against named peers in one process and appends the figures to a CSV.

    python kernels/bench/run.py OP... [--csv kernels/bench/results/h100.csv]

``bench_<op>.py`` beside this file defines ``CASES``, a list of ``Case``, and ``providers(case)``, a dict from
a provider's name to its ``Provider``. The first provider is ours. Every call is captured in a CUDA graph that
runs over copies of the inputs larger than three L2 caches; providers take turns, and the figure is the median
of the rounds with the 10th and 90th percentile beside it.
"""

import argparse
import csv
import gc
import importlib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

ROUNDS = 15
CALLS = 24  # of one graph, at least
COLUMNS = [
    "device",
    "op",
    "shape",
    "m",
    "provider",
    "us",
    "us_p10",
    "us_p90",
    "bytes",
    "gbps",
    "peer",
    "ratio",
]


@dataclass(frozen=True)
class Case:
    """One shape (``n`` rows by ``k`` columns of the weight, or what the operation calls them) at ``m`` tokens."""

    n: int
    k: int
    m: int

    @property
    def shape(self) -> str:
        """The shape as text."""
        return f"{self.n}x{self.k}"


@dataclass(frozen=True)
class Provider:
    """``calls`` enqueue one call each, on different copies of the inputs; ``nbytes`` is what one has to move.

    ``peer`` is False for another form of our own kernel: timed, but nothing to be compared with.
    """

    calls: Sequence[Callable[[], object]]
    nbytes: int
    peer: bool = True


def rotations(nbytes: int) -> int:
    """Return how many copies of ``nbytes`` pass three L2 caches (at most 32, at least 1)."""
    return min(32, 3 * torch.cuda.get_device_properties(0).L2_cache_size // max(1, nbytes) + 1)


def capture(provider: Provider) -> tuple[torch.cuda.CUDAGraph, int]:
    """Capture a graph over the provider's calls. Returns it and its number of calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in provider.calls:
            call()
        for call in provider.calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph, repeats = torch.cuda.CUDAGraph(), max(1, CALLS // len(provider.calls))
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for call in provider.calls:
                call()
    return graph, repeats * len(provider.calls)


def measure(providers: dict[str, Provider]) -> dict[str, list[float]]:
    """Return each provider's microseconds a call, one figure a round, sorted."""
    graphs = {name: capture(provider) for name, provider in providers.items()}
    times: dict[str, list[float]] = {name: [] for name in providers}
    for _ in range(ROUNDS):
        for name, (graph, calls) in graphs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            graph.replay()  # the first replay after another provider's finds cold caches: not timed
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) * 1e3 / calls)
    return {name: sorted(values) for name, values in times.items()}


def rows(op: str, case: Case, providers: dict[str, Provider]) -> list[dict[str, object]]:
    """Measure one case. ``ratio`` is the peer's time over ours, in our provider's row once a peer."""
    times = measure(providers)
    median = {name: statistics.median(values) for name, values in times.items()}
    ours, *others = providers
    peers = [name for name in others if providers[name].peer]
    found: list[dict[str, object]] = []
    for name, peer in [(ours, peer) for peer in peers or [""]] + [(name, "") for name in others]:
        values, nbytes = times[name], providers[name].nbytes
        found.append(
            {
                "device": torch.cuda.get_device_name(),
                "op": op,
                "shape": case.shape,
                "m": case.m,
                "provider": name,
                "us": f"{median[name]:.2f}",
                "us_p10": f"{values[len(values) // 10]:.2f}",
                "us_p90": f"{values[-1 - len(values) // 10]:.2f}",
                "bytes": nbytes,
                "gbps": f"{nbytes / median[name] / 1e3:.0f}",
                "peer": peer,
                "ratio": f"{median[peer] / median[name]:.3f}" if peer else "",
            }
        )
    return found


def geometric_means(found: list[dict[str, object]]) -> dict[tuple[str, str], float]:
    """Return the geometric mean of the ratios by (operation, peer)."""
    groups: dict[tuple[str, str], list[float]] = {}
    for row in found:
        if row["peer"]:
            groups.setdefault((str(row["op"]), str(row["peer"])), []).append(
                float(str(row["ratio"]))
            )
    return {key: statistics.geometric_mean(values) for key, values in groups.items()}


def copy_ceiling() -> float:
    """Return the GB/s of a device-to-device copy of 2 GiB, bytes read plus bytes written."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    times = measure({"copy": Provider([lambda: target.copy_(source)], 0)})["copy"]
    return 2 * source.numel() / statistics.median(times) / 1e3


def main() -> None:
    """Run the named operations."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ops", nargs="+")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    torch.manual_seed(20261121)
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}; copy {copy_ceiling():.0f} GB/s"
    )
    found: list[dict[str, object]] = []
    for op in args.ops:
        module = importlib.import_module(f"bench_{op}")
        for case in module.CASES:
            for row in rows(op, case, module.providers(case)):
                found.append(row)
                against = f"  x{row['ratio']} of {row['peer']}" if row["peer"] else ""
                spread = f"({row['us_p10']}-{row['us_p90']})"
                what = f"{op} {row['shape']:>14} m={row['m']:<2} {row['provider']:<24}"
                figures = f"{row['us']:>8} us {spread:<20} {row['gbps']:>5} GB/s"
                print(what + figures + against, flush=True)
            gc.collect()
            torch.cuda.empty_cache()
    for (op, peer), mean in geometric_means(found).items():
        print(f"{op}: {mean:.3f}x {peer}, geometric mean")
    if args.csv:
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if args.csv.exists():
            with args.csv.open() as file:
                kept = [row for row in csv.DictReader(file) if row["op"] not in args.ops]
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(kept + found)


if __name__ == "__main__":
    main()
