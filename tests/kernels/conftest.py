"""What the kernel tests share: the package on the path, and its libraries built for this run."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

SOURCE = Path(__file__).parents[2] / "kernels" / "src"
ENGINE = Path(__file__).parents[2] / ".venv-engine" / "bin" / "python"
sys.path.insert(0, str(SOURCE))


@pytest.fixture(scope="session")
def nvcc() -> str:
    """The CUDA compiler; tests that compile for a GPU are skipped without one."""
    from spark_kernels import build

    try:
        return build.find_nvcc()
    except build.BuildError as error:
        pytest.skip(f"compiles CUDA: {error}")


@pytest.fixture(scope="session")
def nvdisasm() -> str:
    """NVIDIA's disassembler; tests that read machine code are skipped without one."""
    from tests.kernels import sass

    try:
        return sass.find_nvdisasm()
    except FileNotFoundError as error:
        pytest.skip(f"reads machine code: {error}")


@pytest.fixture(scope="session")
def host_libraries(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The host encoders, built by the host's C++ compiler."""
    from spark_kernels import build

    if shutil.which(os.environ.get("CXX") or "c++") is None:
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.mktemp("lib")
    for op in build.HOST_OPS:
        build.compile_host(op, folder / f"{op}_host.so")
    before = os.environ.get("SPARK_KERNELS_LIB_DIR")
    os.environ["SPARK_KERNELS_LIB_DIR"] = str(folder)
    build.load.cache_clear()
    yield folder
    build.load.cache_clear()
    del os.environ["SPARK_KERNELS_LIB_DIR"]
    if before is not None:
        os.environ["SPARK_KERNELS_LIB_DIR"] = before


@pytest.fixture(scope="session")
def in_engine() -> Callable[..., Any]:
    """Runs a script of this folder where vLLM is; returns the JSON on its last line."""
    if not ENGINE.is_file():
        pytest.skip("needs the engine's environment: make engine")

    def run(script: str, *arguments: str, **environ: str) -> Any:  # noqa: ANN401  JSON
        env = os.environ | {"PYTHONPATH": str(SOURCE), "VLLM_NO_USAGE_STATS": "1"} | environ
        path = Path(__file__).with_name(script)
        done = subprocess.run(
            [ENGINE, path, *arguments], env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run
