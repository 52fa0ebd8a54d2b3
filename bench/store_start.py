"""What the store and seal checks add to a start: ``python bench/store_start.py [--files 40] [--gigabytes 60]``.

Sparse files stand for the weights: the checks look at sizes, times and inodes and read no content, which is the point.
"""

import argparse
import platform
import statistics
import tempfile
import time
from pathlib import Path

from spark_llm import manifest
from spark_llm.caches import CacheRoot
from spark_llm.store import Store, receipt
from spark_llm.store.layout import ModelFolder
from spark_llm.store.receipt import Receipt, RemoteFile
from spark_llm.store.stamp import Stamp

MODEL, COMMIT = "bench/model", "0" * 40


def make_model(root: Path, files: int, size: int) -> None:
    """A snapshot with a receipt; no byte of it exists on the disk."""
    snapshot = ModelFolder(root, MODEL).snapshot(COMMIT)
    snapshot.mkdir(parents=True)
    remote, stamps = [], {}
    for number in range(files):
        name = f"model-{number:05}-of-{files:05}.safetensors"
        with (snapshot / name).open("wb") as stream:
            stream.truncate(size // files)
        remote.append(RemoteFile(name, size // files, sha256="0" * 64))
        stamps[name] = Stamp.of(snapshot / name)
    receipt.write(snapshot, Receipt(MODEL, COMMIT, "main", "hub", 0.0, tuple(remote), stamps))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=40)
    parser.add_argument("--gigabytes", type=int, default=60)
    parser.add_argument("--cached", type=int, default=5000, help="files in the compile cache")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        make_model(base / "models", options.files, options.gigabytes * 10**9)
        identity = manifest.build(engine="e", kernels="k", model=MODEL, model_commit=COMMIT)
        namespace = CacheRoot(base / "cache").namespace(identity)
        namespace.prepare()
        for number in range(options.cached):
            path = namespace.data / "triton" / "cache" / f"{number % 100:02}" / f"{number}.cubin"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(number.to_bytes(4, "little") * 1000)
        began = time.perf_counter()
        namespace.seal()
        sealing = time.perf_counter() - began
        located, checked = [], []
        for _ in range(options.rounds):
            began = time.perf_counter()
            if not Store(base / "models").locate(MODEL, COMMIT):
                raise SystemExit("the snapshot was not found")
            located.append(time.perf_counter() - began)
            began = time.perf_counter()
            namespace.check()
            checked.append(time.perf_counter() - began)
    total = [a + b for a, b in zip(located, checked, strict=True)]
    print(f"{options.files} sparse files of {options.gigabytes} GB, {options.cached} cached files,")
    print(
        f"{options.rounds} rounds, {platform.processor() or platform.machine()}, Python {platform.python_version()}\n"
    )
    print("| what | median ms | worst ms |\n|---|---|---|")
    for label, values in (
        ("store: locate", located),
        ("caches: seal check", checked),
        ("both", total),
    ):
        print(f"| {label} | {1e3 * statistics.median(values):.1f} | {1e3 * max(values):.1f} |")
    print(f"\nsealing a fresh cache once: {1e3 * sealing:.0f} ms; limit for both checks: 300 ms")


if __name__ == "__main__":
    main()
