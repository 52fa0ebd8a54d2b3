"""Download and verify against their peers: ``python bench/store_transfer.py [--gigabytes 4] [--rounds 3]``.

One local hub, in a process of its own, serves eight files to ``hf download`` and to the appliance's fetch, in turn.
Then the same files are hashed by ``verify --full`` and by as many ``sha256sum`` as there are cores. Ratios are of
medians within one run; memory is the largest resident set of any process.
"""

import argparse
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from spark_llm.store import Request, Store

ROOT = Path(__file__).parents[1]
MODEL = "bench/model"
FILES = 8


def make(folder: Path, gigabytes: float) -> None:
    """Eight weight files of random bytes and a config."""
    size = int(gigabytes * 1e9 / FILES)
    names = [f"model-{n:05}-of-{FILES:05}.safetensors" for n in range(1, FILES + 1)]
    for name in names:
        with (folder / name).open("wb") as stream:
            for at in range(0, size, 2**22):
                stream.write(os.urandom(min(2**22, size - at)))
    shards = ",".join(f'"{n}": "{name}"' for n, name in enumerate(names))
    (folder / "model.safetensors.index.json").write_text(f'{{"weight_map": {{{shards}}}}}')
    (folder / "config.json").write_text("{}")


def run(command: list[str], **environment: str) -> tuple[float, int]:
    """Seconds and peak resident bytes of the largest process."""
    script = (
        "import resource, subprocess, sys, time; t = time.monotonic();"
        "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL);"
        "print(time.monotonic() - t, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)"
    )
    os.sync()
    ran = subprocess.run(
        [sys.executable, "-c", script, *command], check=True, capture_output=True, text=True,
        env={**os.environ, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1", **environment},
    )  # fmt: skip
    seconds, rss = ran.stdout.split()
    return float(seconds), int(rss)


def row(name: str, runs: list[tuple[float, int]], gigabytes: float) -> str:
    """One line of the table: median, spread, speed, memory."""
    seconds = [run[0] for run in runs]
    middle = statistics.median(seconds)
    spread = f"{min(seconds):.2f}-{max(seconds):.2f}"
    rss = max(run[1] for run in runs) / 2**20
    return f"| {name} | {middle:.2f} | {spread} | {gigabytes / middle:.2f} | {rss:.0f} |"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where the files go")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        base = Path(name)
        source = base / "source"
        source.mkdir()
        make(source, options.gigabytes)
        server = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "hub" / "server.py"), str(source)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert server.stdin is not None  # noqa: S101  for the type checker: both are pipes
        assert server.stdout is not None  # noqa: S101
        endpoint = server.stdout.readline().strip()
        peer, ours = [], []
        request = Request(str(base / "store"), MODEL, endpoint=endpoint, reserve_bytes=0)
        hf = str(Path(sys.executable).with_name("hf"))
        run(
            [hf, "download", MODEL, "--include", "*.json", "--cache-dir", str(base / "hf")],
            HF_ENDPOINT=endpoint,
        )
        for _ in range(options.rounds):
            shutil.rmtree(base / "hf", ignore_errors=True)
            peer.append(
                run([hf, "download", MODEL, "--cache-dir", str(base / "hf")], HF_ENDPOINT=endpoint)
            )
            shutil.rmtree(base / "store", ignore_errors=True)
            ours.append(run(request.command()))
        server.stdin.close()
        server.wait()
        store = Store(base / "store")
        files = [str(path) for path in (store.locate(MODEL) or base).glob("*.safetensors")]
        verify = (
            "from pathlib import Path; from spark_llm.store import Store;"
            f"assert Store(Path({str(base / 'store')!r})).verify({MODEL!r}, full=True).ok"
        )
        sums, faster, verified = [], [], []
        for _ in range(options.rounds):
            drop(files)
            sums.append(run(each("sha256sum", files)))
            drop(files)
            faster.append(run(each("openssl dgst -sha256", files)))
            drop(files)
            verified.append(run([sys.executable, "-c", verify]))
    gigabytes = options.gigabytes
    print(
        f"{gigabytes:g} GB in {FILES} files, {options.rounds} rounds, {cores()} cores, "
        f"{platform.processor() or platform.machine()}, Python {platform.python_version()}\n"
    )
    print("| what | median s | spread s | GB/s | peak MiB |\n|---|---|---|---|---|")
    print(row("hf download (nothing verified)", peer, gigabytes))
    print(row("spark-llm fetch (verified, flushed)", ours, gigabytes))
    print(row(f"{cores()} sha256sum, cold", sums, gigabytes))
    print(row(f"{cores()} openssl dgst -sha256, cold", faster, gigabytes))
    print(row("spark-llm verify --full, cold", verified, gigabytes))
    print()
    print(f"fetch : hf download = {ratio(peer, ours):.2f}")
    print(
        f"verify : sha256sum = {ratio(sums, verified):.2f}; verify : openssl = {ratio(faster, verified):.2f}"
    )


def each(program: str, files: list[str]) -> list[str]:
    """``program`` on each of ``files``, as many at once as there are cores."""
    return ["sh", "-c", f'printf "%s\\n" "$@" | xargs -n1 -P{cores()} {program}', "sh", *files]


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


def drop(files: list[str]) -> None:
    """Out of the page cache, so that both read the disk."""
    for name in files:
        descriptor = os.open(name, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def ratio(peer: list[tuple[float, int]], ours: list[tuple[float, int]]) -> float:
    """Our speed by the peer's: above one is faster."""
    return statistics.median(run[0] for run in peer) / statistics.median(run[0] for run in ours)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()
