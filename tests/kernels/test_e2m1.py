"""E2M1: our rounding against NVIDIA's, on every float, and the targets that have the instruction."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
from spark_kernels import build
from spark_kernels.rmsnorm_fp4 import reference

from tests.kernels import sass

pytestmark = pytest.mark.usefixtures("nvcc")

HERE = Path(__file__).parent
PACKAGE = build.PACKAGE

# One conversion of two floats, through NVIDIA's header and as inline PTX.
HEADER_PROBE = """
#include <cuda_fp4.h>
extern "C" __global__ void probe(const float2* x, unsigned char* out) {
  out[threadIdx.x] = __nv_cvt_float2_to_fp4x2(x[threadIdx.x], __NV_E2M1, cudaRoundNearest);
}
"""
PTX_PROBE = r"""
extern "C" __global__ void probe(const float2* x, unsigned* out) {
  float2 v = x[threadIdx.x];
  asm("{\n.reg .b8 b;\ncvt.rn.satfinite.e2m1x2.f32 b, %1, %2;\ncvt.u32.u8 %0, b;\n}"
      : "=r"(out[threadIdx.x]) : "f"(v.y), "f"(v.x));
}
"""


@pytest.fixture(scope="module")
def exhaustive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The comparison program: host code only; nvcc is there for the path of its headers."""
    out = tmp_path_factory.mktemp("e2m1") / "e2m1_exhaustive"
    flags = ["-std=c++17", "-O3", "-Xcompiler=-pthread", "-I", str(PACKAGE)]
    source = str(HERE / "e2m1_exhaustive.cpp")
    subprocess.run([build.find_nvcc(), *flags, source, "-o", str(out)], check=True)
    return out


def compile_probe(source: str, arch: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Compile a probe for one target; the cubin is ``folder/probe.cubin``."""
    path = folder / "probe.cu"
    path.write_text(source)
    flags = ["-std=c++17", "-gencode", f"arch=compute_{arch},code=sm_{arch}", "-cubin"]
    return subprocess.run(
        [build.find_nvcc(), *flags, "-o", str(folder / "probe.cubin"), str(path)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_rounding_equals_nvidias_on_every_float(exhaustive: Path) -> None:
    """All 2^32 float bit patterns, NaNs of both signs included, round as cuda_fp4.hpp rounds them."""
    done = subprocess.run([exhaustive, "sweep"], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(2**32), "0"]


def test_published_converters_differ_where_the_documentation_says(exhaustive: Path) -> None:
    """Of dgx-vllm's two converters one is wrong for negative NaNs alone, the other for 18.9 million numbers."""
    done = subprocess.run([exhaustive, "published"], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "software_e2m1 0 8388607",
        "nv_fp4_dummy 18874377 16777214",
    ]


def test_numpy_rounding_equals_nvidias_on_every_bfloat16(exhaustive: Path) -> None:
    """The NumPy reference gives NVIDIA's code for each of the 65536 bfloat16 patterns."""
    done = subprocess.run([exhaustive, "bfloat16"], capture_output=True, check=True)
    values = (np.arange(65536, dtype=np.uint32) << np.uint32(16)).view(np.float32)
    assert np.array_equal(reference.to_e2m1(values), np.frombuffer(done.stdout, np.uint8))


@pytest.mark.usefixtures("nvdisasm")
@pytest.mark.parametrize("arch", ["120f", "121a", "121f"])
def test_suffixed_targets_convert_in_one_instruction(arch: str, tmp_path: Path) -> None:
    """For family- and architecture-specific targets NVIDIA's header compiles to one F2FP E2M1."""
    assert compile_probe(HEADER_PROBE, arch, tmp_path).returncode == 0
    probe = sass.disassemble(tmp_path / "probe.cubin")["probe"]
    assert probe.count(r"F2FP\.SATFINITE\.E2M1\.F32") == 1
    assert len(probe.lines) < 64


@pytest.mark.usefixtures("nvdisasm")
@pytest.mark.parametrize("arch", ["120", "121"])
def test_plain_targets_fall_back_without_a_word(arch: str, tmp_path: Path) -> None:
    """For plain 12.x the header compiles too, to over a hundred instructions: why a guard is needed."""
    assert compile_probe(HEADER_PROBE, arch, tmp_path).returncode == 0
    probe = sass.disassemble(tmp_path / "probe.cubin")["probe"]
    assert probe.count(r"F2FP\.SATFINITE\.E2M1") == 0
    assert len(probe.lines) > 100


@pytest.mark.parametrize("arch", ["120", "121"])
def test_the_assembler_refuses_the_instruction_for_plain_targets(arch: str, tmp_path: Path) -> None:
    """The conversion that is said to be missing from SM 12.1 is refused for plain targets alone."""
    done = compile_probe(PTX_PROBE, arch, tmp_path)
    assert done.returncode != 0
    assert f"not supported on .target 'sm_{arch}'" in done.stdout + done.stderr


@pytest.mark.parametrize("arch", ["120f", "121a"])
def test_the_assembler_takes_the_instruction_for_suffixed_targets(
    arch: str, tmp_path: Path
) -> None:
    """The same source assembles for the family and for 12.1 itself."""
    done = compile_probe(PTX_PROBE, arch, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("op", ["nvfp4", "rmsnorm_fp4"])
@pytest.mark.parametrize("arch", ["120", "121"])
def test_our_sources_refuse_plain_targets(op: str, arch: str, tmp_path: Path) -> None:
    """Building an FP4 kernel for plain 12.x stops with an error that names the target to use."""
    with pytest.raises(build.BuildError, match="build for 120f"):
        build.compile_cubin(build.Target(op, arch), tmp_path / "never.cubin")
