"""``spark-kernels tune``: measure launch parameters on this device and write them where vLLM reads them.

``tune moe`` times vLLM's own Triton MoE kernel over a grid of tiles for each batch size, as the table
format of ``VLLM_TUNED_CONFIG_FOLDER`` wants it. Alternatives weighed: vLLM's benchmark_moe.py does the
same with Ray and a model download, and its wheel does not carry it.
"""

import argparse
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

Config = dict[str, int]
BATCHES: Final = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 2048, 4096)
DTYPES: Final = ("fp8_w8a8", "bf16")
# SM 12.x has 99 KiB of shared memory a block; a tile's stages hold both operands.
SHARED_BYTES: Final = 99 * 1024
BLOCK: Final = 128  # of block-scaled FP8


@dataclass(frozen=True, slots=True)
class Layer:
    """A mixture of experts: ``width`` is one expert's intermediate size on this rank."""

    experts: int
    width: int
    hidden: int
    top_k: int
    dtype: str
    block_scaled: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """The fastest tile of a batch size, its time and the time of vLLM's default, in microseconds."""

    batch: int
    config: Config
    us: float
    default_us: float


def search_space(layer: Layer, batch: int) -> Iterator[Config]:
    """Yield the tiles worth trying: those that fit shared memory and are not mostly padding.

    Tiles taller than a batch's routed rows only pad; short ones re-read weights. BLOCK_SIZE_K is tied
    to 128 where scales are (block-scaled FP8).
    """
    size = 1 if layer.dtype == "fp8_w8a8" else 2
    rows = max(1, batch * layer.top_k // layer.experts)
    tallest = 16 if rows <= 8 else 32 if rows <= 24 else 128  # noqa: PLR2004 - a few rows an expert
    for m, n, k, group, warps, stages in itertools.product(
        (16, 32, 64, 128), (32, 64, 128, 256), (64, 128, 256), (1, 16), (4, 8), (2, 3, 4, 5)
    ):
        fits = (m + n) * k * size * stages <= SHARED_BYTES
        if m > tallest or not fits or (layer.block_scaled and k != BLOCK):
            continue
        yield {
            "BLOCK_SIZE_M": m,
            "BLOCK_SIZE_N": n,
            "BLOCK_SIZE_K": k,
            "GROUP_SIZE_M": group,
            "num_warps": warps,
            "num_stages": stages,
        }


def choose(
    layer: Layer, batch: int, time_us: Callable[[int, Config | None], float | None]
) -> Choice:
    """Return the fastest tile for a batch size.

    Args:
        layer: what is tuned.
        batch: tokens of a step.
        time_us: times a tile, or vLLM's default for None; None where the tile does not run or does
            not give the default's result.

    Raises:
        RuntimeError: not even the default runs.
    """
    default = time_us(batch, None)
    if default is None:
        raise RuntimeError(f"vLLM's default tile does not run for {layer} at batch {batch}")
    timed = [
        (us, config) for config in search_space(layer, batch) if (us := time_us(batch, config))
    ]
    us, config = min(timed, key=lambda pair: pair[0], default=(default, {}))
    return Choice(batch, config, us, default)


def table(choices: Sequence[Choice], triton_version: str) -> Mapping[str, object]:
    """Return vLLM's table: batch size → tile; batches where no tile ran are left out."""
    tiles = {str(c.batch): c.config for c in choices if c.config}
    return {"triton_version": triton_version, **tiles}


def write_atomically(path: Path, content: Mapping[str, object]) -> None:
    """Write JSON beside the target and rename it, so that a reader never sees half a table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".part")
    scratch.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(scratch, path)  # noqa: PTH105 - Path.replace says the same


def parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    root = argparse.ArgumentParser(prog="spark-kernels tune", description=__doc__)
    moe = root.add_subparsers(dest="what", required=True).add_parser("moe", help="Triton MoE tiles")
    moe.add_argument("--experts", type=int, required=True, help="number of experts (E)")
    moe.add_argument("--width", type=int, required=True, help="an expert's intermediate size (N)")
    moe.add_argument("--hidden", type=int, required=True, help="hidden size")
    moe.add_argument("--top-k", type=int, required=True, help="experts a token is sent to")
    moe.add_argument("--dtype", choices=DTYPES, default="fp8_w8a8")
    moe.add_argument("--block-scaled", action="store_true", help="128 x 128 FP8 scales")
    moe.add_argument("--batch", type=int, nargs="+", default=list(BATCHES), help="tokens of a step")
    moe.add_argument("--out", type=Path, required=True, help="folder for VLLM_TUNED_CONFIG_FOLDER")
    return root


def main(argv: Sequence[str]) -> int:
    """Run ``spark-kernels tune``. Returns 0; 1 where there is no GPU or no vLLM."""
    args = parser().parse_args(argv)
    layer = Layer(args.experts, args.width, args.hidden, args.top_k, args.dtype, args.block_scaled)
    if min(layer.experts, layer.width, layer.hidden, layer.top_k, *args.batch) < 1:
        parser().error("sizes are positive")
    if layer.top_k > layer.experts:
        parser().error(f"--top-k {layer.top_k} is more than --experts {layer.experts}")
    if layer.block_scaled and layer.dtype != "fp8_w8a8":
        parser().error("--block-scaled is for --dtype fp8_w8a8")
    try:
        from spark_kernels.tune_moe import Bench  # noqa: PLC0415 - needs torch, vLLM and a GPU

        bench = Bench(layer)
    except (ImportError, RuntimeError) as error:
        sys.stderr.write(f"tune needs a GPU and the vLLM that will serve on it: {error}\n")
        return 1
    choices = []
    for batch in sorted(set(args.batch)):
        found = choose(layer, batch, bench.time_us)
        choices.append(found)
        gain = found.default_us / found.us
        sys.stdout.write(
            f"batch {batch:>5}: {found.us:9.1f} us, {gain:.2f}x the default  {found.config}\n"
        )
        sys.stdout.flush()
        # After every batch: an interrupted run keeps what it measured.
        write_atomically(args.out / bench.file_name, table(choices, bench.triton_version))
    sys.stdout.write(f"{args.out / bench.file_name}\n")
    return 0
