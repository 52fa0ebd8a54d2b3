"""vLLM's own CMake functions, run by cmake: what our architecture string becomes."""

import json
import subprocess
import tarfile
from pathlib import Path

import pytest
from flake import nix_build, store_path

ROOT = Path(__file__).parents[2]
ARCH = json.loads((ROOT / "nix/pins/vllm.json").read_text())["cuda"]["kernelArch"]

pytestmark = pytest.mark.timeout(900)  # the first use lays the Nix

#: CUDA_SUPPORTED_ARCHS of vLLM's CMakeLists.txt for CUDA 13.0.
SUPPORTED = "7.5;8.0;8.6;8.7;8.9;9.0;10.0;11.0;12.0"


@pytest.fixture(scope="module")
def source(nix: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CMake's part of the pinned sdist."""
    del nix
    sdist = store_path(nix_build("legacyPackages.x86_64-linux.vllm-gb10-source.src"))
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(sdist) as archive:
        wanted = [m for m in archive if "/cmake/" in m.name or m.name.endswith("/CMakeLists.txt")]
        archive.extractall(folder, members=wanted, filter="data")
    return folder / "vllm-0.32.0"


def intersect(source: Path, kernels: str, targets: str, scratch: Path) -> str:
    """What cuda_archs_loose_intersection makes of a kernel's list for TORCH_CUDA_ARCH_LIST=targets."""
    script = scratch / "ask.cmake"
    script.write_text(
        "cmake_minimum_required(VERSION 3.25)\n"
        f"include({source}/cmake/utils.cmake)\n"
        f'cuda_archs_loose_intersection(OUT "{kernels}" "{targets}")\n'
        'message(NOTICE "${OUT}")\n'
    )
    done = subprocess.run(["cmake", "-P", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr.strip()


@pytest.mark.parametrize(
    ("kernels", "targets", "result"),
    [
        ("12.0f", ARCH, "12.0f"),  # FP4 and block-scaled FP8: family code, which runs on 12.1
        (SUPPORTED, ARCH, "12.0f"),  # everything without a list of its own
        (
            "8.0+PTX",
            ARCH,
            "8.0+PTX",
        ),  # FlashAttention 2: PTX only, hence the substitution in -source
        ("10.0f;11.0f", ARCH, ""),  # tensor-memory kernels: not for 12.x
        ("12.0f", "12.0a", "12.0a"),  # why nix/lib/arch.nix refuses 12.0a: it would be built so
    ],
)
def test_architecture_table(
    source: Path, tmp_path: Path, kernels: str, targets: str, result: str
) -> None:
    """A kernel's architecture list and ours meet as GB10 needs it."""
    assert intersect(source, kernels, targets, tmp_path) == result


def test_supported_list_is_vllms(source: Path) -> None:
    """The list above is the one that vLLM's CMakeLists.txt has for CUDA 13.0."""
    assert SUPPORTED in (source / "CMakeLists.txt").read_text()


def test_every_external_is_pinned(source: Path) -> None:
    """Each external that vLLM's CMake can take from a folder has a pin, with the commit CMake names."""
    externals = json.loads((ROOT / "nix/pins/externals.json").read_text())
    text = "\n".join(
        path.read_text()
        for path in [source / "CMakeLists.txt", *source.glob("cmake/external_projects/*")]
    )
    variables = {word for word in _words(text) if word.endswith("_SRC_DIR")}
    assert {external["variable"] for external in externals.values()} == variables
    for name, external in externals.items():
        assert external.get("tag", external["rev"]) in text, name


def _words(text: str) -> list[str]:
    """Names in `ENV{NAME}`."""
    return [part.split("}")[0] for part in text.split("ENV{")[1:]]
