"""Compiles each operation's CUDA source into one shared library and loads it.

A library has a plain C interface (``extern "C"`` launchers over device pointers and a stream), so
building needs nvcc alone: no torch headers, no Python headers, and one binary serves every torch
version. ``spark-kernels build`` writes ``_lib/<op>.so`` into the package; ``load`` opens it.
"""

import argparse
import ctypes
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parent
LIBRARY_DIR = PACKAGE / "_lib"
OPS = ("bf16x", "lm_head", "nvfp4", "rmsnorm_fp4")
HOST_OPS = ("bf16x",)  # with an encode.cpp as well

# 12.0f, not 12.0a (would not load on SM 12.1) and not plain 12.0 (the assembler then refuses the
# E2M1 conversions): one binary for GB10, RTX 50 and RTX PRO 6000.
DEFAULT_ARCHS = ("120f",)
NVCC_FLAGS = (
    "-std=c++17",
    "-O3",
    "--threads=2",
    "-Xptxas=-warn-spills,-warn-lmem-usage",
    "-Werror=all-warnings",
)


class BuildError(RuntimeError):
    """nvcc is missing or refused a source; the message holds what it said."""


class LibraryMissingError(RuntimeError):
    """An operation's library was not built, or does not open on this machine."""


@dataclass(frozen=True, slots=True)
class Target:
    """One compilation: ``arch`` is nvcc's number with its suffix, such as ``120f`` or ``90a``."""

    op: str
    arch: str

    @property
    def source(self) -> Path:
        """The operation's CUDA source."""
        return PACKAGE / self.op / "kernel.cu"

    @property
    def gencode(self) -> str:
        """The ``-gencode`` value that emits machine code for exactly this target."""
        return f"arch=compute_{self.arch},code=sm_{self.arch}"


def find_nvcc() -> str:
    """Return the path of nvcc: ``$NVCC``, ``$CUDA_HOME/bin``, PATH, /usr/local/cuda.

    Raises:
        BuildError: there is none.
    """
    named = os.environ.get("NVCC")
    home = os.environ.get("CUDA_HOME")
    candidates = [named, f"{home}/bin/nvcc" if home else None, "nvcc", "/usr/local/cuda/bin/nvcc"]
    for candidate in candidates:
        if candidate and (found := shutil.which(candidate)):
            return found
    raise BuildError("nvcc was not found: install CUDA 13.0 or newer, or set NVCC to its path")


def _run_nvcc(args: Sequence[str]) -> str:
    done = subprocess.run(  # noqa: S603 - our own sources and flags
        [find_nvcc(), *args], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise BuildError(f"nvcc {' '.join(args)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def compile_cubin(target: Target, out: Path, extra: Sequence[str] = ()) -> str:
    """Compile one source to a cubin (for disassembly). Returns nvcc's output.

    Raises:
        BuildError: with nvcc's message.
    """
    flags = [*NVCC_FLAGS, *extra, "-gencode", target.gencode, "-cubin", "-o", str(out)]
    return _run_nvcc([*flags, str(target.source)])


def compile_library(op: str, archs: Sequence[str], out: Path) -> str:
    """Compile one operation for several targets into a shared library. Returns nvcc's output.

    The CUDA runtime is linked statically: it shares the device's primary context (and therefore
    streams and graphs) with torch's, and no soname has to be found at run time.

    Raises:
        BuildError: with nvcc's message.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    codes = [part for arch in archs for part in ("-gencode", Target(op, arch).gencode)]
    source = str(Target(op, archs[0]).source)
    flags = [*NVCC_FLAGS, *codes, "-shared", "--cudart=static", "-Xcompiler=-fPIC,-O3,-Wall"]
    return _run_nvcc([*flags, "-o", str(out), source])


def compile_host(op: str, out: Path) -> None:
    """Compile one operation's ``encode.cpp`` with the host's C++ compiler (``$CXX``, else c++).

    Raises:
        BuildError: there is no compiler, or it refused the source.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    compiler = shutil.which(os.environ.get("CXX") or "c++")
    if compiler is None:
        raise BuildError("no C++ compiler was found: install one, or set CXX to its path")
    flags = ["-std=c++17", "-O3", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
    done = subprocess.run(  # noqa: S603 - our own source and flags
        [compiler, *flags, "-o", str(out), str(PACKAGE / op / "encode.cpp")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise BuildError(done.stderr)


def load_host(op: str) -> ctypes.CDLL:
    """Open an operation's host library; see ``load``."""
    return load(f"{op}_host")


@functools.cache
def load(op: str) -> ctypes.CDLL:
    """Open an operation's library from ``$SPARK_KERNELS_LIB_DIR`` or the package.

    Raises:
        LibraryMissingError: it is not there or does not open; the message says what to type.
    """
    path = Path(os.environ.get("SPARK_KERNELS_LIB_DIR") or LIBRARY_DIR) / f"{op}.so"
    if not path.is_file():
        raise LibraryMissingError(f"{path} is missing: run `spark-kernels build {op}`")
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise LibraryMissingError(f"{path} does not open: {error}") from error


def main(argv: Sequence[str]) -> int:
    """``spark-kernels build [--arch A]... [--out DIR] [OP]...``."""
    parser = argparse.ArgumentParser(prog="spark-kernels build", description=main.__doc__)
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(OPS)}; default all")
    parser.add_argument("--arch", action="append", help="nvcc target, repeatable; default 120f")
    parser.add_argument("--out", type=Path, default=LIBRARY_DIR, help="folder of the libraries")
    args = parser.parse_args(argv)
    if unknown := set(args.ops) - set(OPS):
        parser.error(f"no such operation: {', '.join(sorted(unknown))}")
    for op in args.ops or OPS:
        try:
            compile_library(op, args.arch or DEFAULT_ARCHS, args.out / f"{op}.so")
            if op in HOST_OPS:
                compile_host(op, args.out / f"{op}_host.so")
        except BuildError as error:
            sys.stderr.write(f"{error}\n")
            return 1
        sys.stdout.write(f"{args.out / op}.so\n")
    return 0
