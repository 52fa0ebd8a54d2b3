"""The machine code of bf16x and lm_head: no local memory, the matrix instructions meant, few beside them."""

import itertools

import pytest
from spark_kernels import build

from tests.kernels import sass

ARCHS = ["90a", "120f", "121a"]
TILE_WEIGHTS = 16 * 256  # one turn of either main loop
GB10_BYTES_PER_CLOCK = 273e9 / 48 / 2.42e9  # a multiprocessor's share of the memory's nominal rate


def straight(function: sass.Function, pattern: str) -> tuple[str, ...]:
    """Return the stretch between two labels with the most instructions of ``pattern``: the main loop's body."""
    cuts = sorted({0, len(function.lines), *function.labels.values()})
    stretches = [function.lines[a:b] for a, b in itertools.pairwise(cuts)]
    return max(stretches, key=lambda body: sass.Function("", body, {}).count(pattern))


@pytest.fixture(scope="module", params=ARCHS)
def kernels(
    request: pytest.FixtureRequest,
    nvcc: str,
    nvdisasm: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, sass.Function]:
    """Both operations' kernels for one target; a spill is a build error."""
    del nvcc, nvdisasm
    found: dict[str, sass.Function] = {}
    for op in ("bf16x", "lm_head"):
        cubin = tmp_path_factory.mktemp("cubin") / f"{op}.cubin"
        build.compile_cubin(build.Target(op, request.param), cubin)
        found |= sass.disassemble(cubin)
    return found


def named(kernels: dict[str, sass.Function], name: str, groups: int) -> sass.Function:
    """Return the instance for ``groups`` of 8 tensor-core columns."""
    return next(f for key, f in kernels.items() if f"{name}ILi{groups}E" in key)


def test_no_kernel_touches_local_memory(kernels: dict[str, sass.Function]) -> None:
    """No kernel of either operation keeps an array or a spill in local memory."""
    assert len(kernels) >= 12
    for function in kernels.values():
        assert function.count("(LDL|STL)") == 0, function.name


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_weights_arrive_by_bulk_copy(kernels: dict[str, sass.Function], groups: int) -> None:
    """The main loops are fed by cp.async.bulk, and wait for the previous kernel after asking for weights."""
    for name in ("linear", "coarse"):
        function = named(kernels, name, groups)
        opcodes = [sass.opcode(line) for line in function.lines]
        copies = [i for i, code in enumerate(opcodes) if code.startswith("UBLKCP")]
        waits = [i for i, code in enumerate(opcodes) if code.startswith("ACQBULK")]
        assert copies
        assert len(waits) == 1
        assert copies[0] < waits[0]


def test_bf16x_decodes_in_two_instructions_a_weight(kernels: dict[str, sass.Function]) -> None:
    """A tile takes 16 HMMA, 12 wide loads and at most 2.4 instructions a weight and thread in all."""
    body = sass.Function("", straight(named(kernels, "linear", 1), "HMMA"), {})
    assert body.count("HMMA.16816.F32.BF16") == TILE_WEIGHTS // 256
    assert body.count("LDS.128") >= 12
    assert len(body.lines) * 32 / TILE_WEIGHTS <= 2.4


def test_the_coarse_head_needs_no_decoding(kernels: dict[str, sass.Function]) -> None:
    """A tile takes 8 IMMA on bytes as they lie in memory, at most 0.6 instructions a weight and thread."""
    body = sass.Function("", straight(named(kernels, "coarse", 1), "IMMA"), {})
    assert body.count("IMMA.16832.S8.S8") == TILE_WEIGHTS // 512
    assert body.count("LDS.128") == 8
    assert len(body.lines) * 32 / TILE_WEIGHTS <= 0.6


@pytest.mark.parametrize(
    ("name", "pattern", "bytes_a_weight"), [("linear", "HMMA", 1.508), ("coarse", "IMMA", 1.0)]
)
def test_gb10_has_issue_slots_to_spare(
    kernels: dict[str, sass.Function], name: str, pattern: str, bytes_a_weight: float
) -> None:
    """At GB10's memory rate the loop fills under a tenth of the issue slots, at up to 16 tokens."""
    for groups in (1, 2):
        body = straight(named(kernels, name, groups), pattern)
        clocks = TILE_WEIGHTS * bytes_a_weight / GB10_BYTES_PER_CLOCK
        slots = 4 * clocks  # four schedulers, one warp instruction a clock each
        assert len(body) / slots < 0.1
