"""The machine code of nvfp4 and rmsnorm_fp4: the instructions meant are there, and how many a weight."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from spark_kernels import build

from tests.kernels import sass

pytestmark = pytest.mark.usefixtures("nvcc", "nvdisasm")

GEMM_KERNELS = [(kind, m, r) for kind in ("Bf16", "Fp16") for m in (1, 2, 4) for r in (1, 2, 4)]
# Instructions a weight of the main loop, 64 rows and M <= 8, rounded up. Budgets: 30.6 on GB10 (48 SMs x
# 128 lanes x 2.42 GHz over 273 GB/s at 0.5625 B), 5.0 on an H100. README.md quotes these.
PER_WEIGHT = {
    ("90a", "Bf16"): 2.7,
    ("120f", "Bf16"): 2.8,
    ("121a", "Bf16"): 2.8,
    ("120f", "Fp16"): 2.3,
}

Disassemble = Callable[[str, str], dict[str, sass.Function]]


@pytest.fixture(scope="module")
def machine_code(tmp_path_factory: pytest.TempPathFactory) -> Disassemble:
    """A function (op, arch) -> kernels; each is compiled once. A spill is a compile error."""
    folder = tmp_path_factory.mktemp("cubins")
    known: dict[tuple[str, str], dict[str, sass.Function]] = {}

    def get(op: str, arch: str) -> dict[str, sass.Function]:
        if (op, arch) not in known:
            cubin = Path(folder) / f"{op}.{arch}.cubin"
            build.compile_cubin(build.Target(op, arch), cubin)
            known[op, arch] = sass.disassemble(cubin)
        return known[op, arch]

    return get


def gemm(functions: dict[str, sass.Function], kind: str, m_tiles: int, rows: int) -> sass.Function:
    """Return the instantiation nvfp4_gemm<kind, m_tiles, rows>."""
    pattern = re.compile(rf"nvfp4_gemm.*{kind}ELi{m_tiles}ELi{rows}E")
    return next(f for name, f in functions.items() if pattern.search(name))


@pytest.mark.parametrize("arch", ["90a", "120f", "121a"])
def test_gemm_compiles_without_spills_for_every_target(
    arch: str, machine_code: Disassemble
) -> None:
    """All eighteen GEMM kernels compile, none touches local memory, all use tensor cores and bulk copies."""
    functions = machine_code("nvfp4", arch)
    for kind, m_tiles, rows in GEMM_KERNELS:
        function = gemm(functions, kind, m_tiles, rows)
        assert function.count(r"LDL|STL") == 0, function.name
        assert function.count(r"HMMA\.16816\.F32") == 4 * rows * m_tiles, function.name
        assert function.count(r"UBLKCP") > 0, function.name


def test_weights_are_requested_before_waiting_for_the_previous_kernel(
    machine_code: Disassemble,
) -> None:
    """The first bulk copy comes before griddepcontrol.wait (ACQBULK), the first read of x after it."""
    for arch in ("90a", "120f"):
        lines = gemm(machine_code("nvfp4", arch), "Bf16", 1, 4).lines
        opcodes = [sass.opcode(line) for line in lines]
        wait = opcodes.index("ACQBULK")
        assert next(i for i, op in enumerate(opcodes) if op.startswith("UBLKCP")) < wait
        assert all(i > wait for i, op in enumerate(opcodes) if op.startswith("LDG"))


@pytest.mark.parametrize("arch", ["120f", "121a"])
def test_fp16_weights_are_decoded_by_the_hardware(arch: str, machine_code: Disassemble) -> None:
    """On 12.x one F2FP.F16.E2M1.UNPACK_B decodes a pair of codes: 16 for 32 weights of a lane."""
    for rows in (1, 2, 4):
        function = gemm(machine_code("nvfp4", arch), "Fp16", 1, rows)
        assert function.count(r"F2FP\.F16\.E2M1\.UNPACK_B") == 16 * rows


@pytest.mark.parametrize(("arch", "kind"), PER_WEIGHT)
def test_main_loop_stays_within_its_instruction_count(
    arch: str, kind: str, machine_code: Disassemble
) -> None:
    """A lane's 128 weights of a 64-row unit take no more instructions than the README says."""
    loop = gemm(machine_code("nvfp4", arch), kind, 1, 4).loop("HMMA")
    assert len(loop) / 128 <= PER_WEIGHT[arch, kind]


def test_bf16_pairs_cost_a_rotation_and_a_mask(machine_code: Disassemble) -> None:
    """A word of 8 codes takes 5 logic operations, 2 rotations, 1 multiplication and 4 scale products."""
    loop = sass.opcodes(gemm(machine_code("nvfp4", "120f"), "Bf16", 1, 4).loop("HMMA"))
    words = 16
    assert loop["HMUL2"] == 4 * words
    assert 5 * words <= loop["LOP3"] <= 5 * words + 4
    assert 2 * words <= loop["SHF"] <= 2 * words + 6


@pytest.mark.parametrize("arch", ["120f", "121a"])
def test_norm_quantises_with_the_hardware_conversion(arch: str, machine_code: Disassemble) -> None:
    """Each of the two kernels converts a thread's 16 elements with 8 F2FP E2M1: H/2 a row."""
    functions = machine_code("rmsnorm_fp4", arch)
    assert len(functions) == 2
    for function in functions.values():
        assert function.count(r"F2FP\.SATFINITE\.E2M1\.F32") == 8
        assert function.count(r"LDL|STL") == 0


def test_norm_reads_its_weight_before_waiting(machine_code: Disassemble) -> None:
    """The norm's weight is loaded before griddepcontrol.wait and its input after."""
    for function in machine_code("rmsnorm_fp4", "120f").values():
        opcodes = [sass.opcode(line) for line in function.lines]
        loads = [i for i, op in enumerate(opcodes) if op.startswith("LDG")]
        wait = opcodes.index("ACQBULK")
        assert sum(i < wait for i in loads) == 4 + 2  # float32, or bfloat16
        assert sum(i > wait for i in loads) >= 3
