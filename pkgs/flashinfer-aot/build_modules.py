"""Compile FlashInfer's modules ahead of time: build_modules.py CONFIG OUT [NAME…].

CONFIG (modules.json) says which modules; NAMEs, if given, pick among them by FlashInfer's own names.
OUT becomes the package `flashinfer_jit_cache`, which FlashInfer 0.7 asks for compiled modules before
it compiles any. Takes FLASHINFER_CUDA_ARCH_LIST (one target, as "12.1a"), CUDA_HOME and MAX_JOBS from
the environment. No GPU is needed.
"""

import argparse
import importlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


def specs(config: Mapping[str, Any]) -> Iterator[Any]:
    """Yield FlashInfer's JitSpec of every module that `config` names."""
    import torch  # noqa: PLC0415 - FlashInfer reads its environment at import: see main
    from flashinfer.aot import gen_fa2  # noqa: PLC0415

    attention = config["attention"]
    for query, kv, dim, window in itertools.product(
        attention["query_dtypes"],
        attention["kv_dtypes"],
        attention["head_dims"],
        attention["sliding_window"],
    ):
        yield from gen_fa2(
            dtype_qo=getattr(torch, query),
            dtype_kv=getattr(torch, kv),
            head_dim_qk=dim,
            head_dim_vo=dim,
            use_sliding_window=window,
            use_logits_soft_cap=False,
        )
    for generator in config["generators"]:
        module, function = generator.split(":")
        yield getattr(importlib.import_module(module), function)()


def architecture(listed: str) -> str:
    """FlashInfer's name of a FLASHINFER_CUDA_ARCH_LIST entry: "12.1a" is "sm121a"."""
    return "sm" + listed.strip().replace(".", "")


def package(out: Path, libraries: Mapping[str, Path], arch: str, version: str) -> None:
    """Lay the package at `out`: our provider module, its manifest, one folder a library."""
    cache = out / "jit_cache"
    cache.mkdir(parents=True)
    shutil.copyfile(Path(__file__).with_name("provider.py"), out / "__init__.py")
    for name, library in libraries.items():
        (cache / name).mkdir()
        shutil.copy2(library, cache / name / f"{name}.so")
    manifest = {"version": version, "architecture": arch, "modules": sorted(libraries)}
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def driver_stub(folder: Path) -> None:
    """Let `-lcuda` link without a driver: an empty library with the driver's soname, in LIBRARY_PATH.

    A shared object may leave symbols open, so it needs none.
    """
    compiler = os.environ.get("CXX", "c++")
    command = [
        compiler,
        "-shared",
        "-Wl,-soname,libcuda.so.1",
        "-o",
        "libcuda.so",
        "-x",
        "c++",
        "/dev/null",
    ]
    subprocess.run(command, cwd=folder, check=True)
    paths = [str(folder), *filter(None, [os.environ.get("LIBRARY_PATH")])]
    os.environ["LIBRARY_PATH"] = os.pathsep.join(paths)


def main(argv: Sequence[str] | None = None) -> int:
    """Compile and package; 0 when every module was built, 1 otherwise."""
    parser = argparse.ArgumentParser(description="Compile FlashInfer's modules ahead of time.")
    parser.add_argument("config", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*")
    arguments = parser.parse_args(argv)
    arch_list = os.environ.get("FLASHINFER_CUDA_ARCH_LIST", "")
    if not arch_list or "," in arch_list or " " in arch_list.strip():
        parser.error("set FLASHINFER_CUDA_ARCH_LIST to the one target, such as 12.1a")

    with tempfile.TemporaryDirectory() as work:
        # FlashInfer reads this once, when it is imported: so it is imported late.
        os.environ["FLASHINFER_WORKSPACE_BASE"] = work
        driver_stub(Path(work))
        from flashinfer.jit import core  # noqa: PLC0415
        from flashinfer.version import __version__ as version  # noqa: PLC0415

        chosen = {spec.name: spec for spec in specs(json.loads(arguments.config.read_text()))}
        if unknown := [name for name in arguments.names if name not in chosen]:
            parser.error(
                f"no such module: {', '.join(unknown)}. Known: {', '.join(sorted(chosen))}"
            )
        wanted = [chosen[name] for name in arguments.names or chosen]
        for spec in wanted:
            spec.build_dir.mkdir(parents=True, exist_ok=True)
        core.build_jit_specs(wanted, verbose=True, skip_prebuilt=False)
        libraries = {spec.name: spec.jit_library_path for spec in wanted}
        package(arguments.out, libraries, architecture(arch_list), version)
    print(f"{len(libraries)} modules for {architecture(arch_list)} in {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
