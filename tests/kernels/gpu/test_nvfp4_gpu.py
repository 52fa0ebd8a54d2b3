"""The NVFP4 GEMM on a GPU against float64, on random and adversarial weights."""

import numpy as np
import pytest
from spark_kernels.nvfp4 import reference
from spark_kernels.nvfp4.tuning_sm121 import Plan, plan

torch = pytest.importorskip("torch", reason="needs an NVIDIA GPU and torch")
api = pytest.importorskip("spark_kernels.nvfp4.api", reason="needs torch")
pytestmark = pytest.mark.usefixtures("requires_gpu")

# The five layers that are benchmarked, and ragged N and K: one row more or less than a tile, one group more.
SHAPES = [(34816, 5120), (5120, 17408), (16384, 5120), (5120, 6144), (2048, 512)]
RAGGED = [(16, 16), (1, 48), (17, 80), (63, 1040), (65, 1040), (96, 5120), (1000, 4112), (4097, 64)]
KINDS = ["random", "adversarial"]
GLOBAL_SCALE = 0.0123
# Relative to the sum of |x * w|: half a unit in the last place of the result, and fp32 accumulation.
ROUNDING = {"bfloat16": 2**-8, "float16": 2**-11}


def make(n: int, k: int, kind: str) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Return codes and scales on the GPU: every byte at random, or with zero, negative, extreme scales."""
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
    scales = torch.randint(40, 127, (n, k // 16), dtype=torch.uint8, device="cuda")
    if kind == "adversarial":
        choice = torch.tensor(
            [0, 1, 7, 8, 126, 128, 129, 254, 56], dtype=torch.uint8, device="cuda"
        )
        scales = choice[torch.randint(0, len(choice), scales.shape, device="cuda")]
    return codes, scales


def dequantized(codes: "torch.Tensor", scales: "torch.Tensor") -> "torch.Tensor":
    """Return the weight in float64 without its global scale."""
    table = torch.tensor(reference.E2M1, device="cuda")
    pairs = torch.stack([codes & 15, codes >> 4], dim=-1).reshape(codes.shape[0], -1)
    block = scales.view(torch.float8_e4m3fn).double().repeat_interleave(16, dim=1)
    return table[pairs.long()] * block


def assert_matches(
    y: "torch.Tensor", x: "torch.Tensor", weight: "torch.Tensor", scale: float
) -> None:
    """Compare with float64, element by element, against the rounding that the operation may do."""
    name = str(y.dtype).removeprefix("torch.")
    want = x.double() @ weight.T * scale
    size = x.double().abs() @ weight.abs().T * abs(scale)
    limit = want.abs() * ROUNDING[name] + size * 2e-6 + torch.finfo(y.dtype).smallest_normal * 2**-7
    assert bool(torch.isfinite(y).all())
    worst = ((y.double() - want).abs() / limit).max().item()
    assert worst <= 1, worst


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES + RAGGED, ids=str)
def test_every_m_matches_float64_and_itself(shape: tuple[int, int], kind: str) -> None:
    """For M = 1..32 the result is float64's to the last place, and a row's bits do not depend on M."""
    codes, scales = make(*shape, kind)
    weight, packed = dequantized(codes, scales), api.prepare(codes, scales, GLOBAL_SCALE)
    x = torch.randn(32, shape[1], device="cuda").bfloat16()
    alone = torch.cat([api.linear(x[i : i + 1], packed) for i in range(32)])
    assert_matches(alone, x, weight, GLOBAL_SCALE)
    for m in range(1, 33):
        poison = torch.full((m, shape[0]), float("nan"), dtype=x.dtype, device="cuda")
        del poison  # the allocator hands the same memory to the result
        assert torch.equal(api.linear(x[:m], packed), alone[:m]), m
    assert not packed.arrivals.any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "chosen",
    [Plan(1, 1), Plan(1, 132), Plan(2, 7), Plan(2, 132), Plan(4, 1), Plan(4, 100)],
    ids=str,
)
def test_every_split_of_k_gives_the_same_values(chosen: Plan, dtype: str) -> None:
    """Whatever the tile height and the number of thread blocks, the result is float64's."""
    for shape in ((130, 4112), (1024, 1024)):
        codes, scales = make(*shape, "random")
        kind = getattr(torch, dtype)
        packed = api.prepare(codes, scales, 1e-4, kind, launch_plan=chosen)
        x = torch.randn(32, shape[1], device="cuda").to(kind)
        for m in (1, 7, 8, 9, 16, 17, 32):
            assert_matches(api.linear(x[:m], packed), x[:m], dequantized(codes, scales), 1e-4)


def test_every_code_and_scale_reaches_the_result_exactly() -> None:
    """One-hot activations read back all 16 codes times all 254 finite scales, bit for bit."""
    scales = torch.tensor(
        [s for s in range(256) if s & 127 != 127], dtype=torch.uint8, device="cuda"
    )
    row = torch.arange(0, 16, 2, dtype=torch.uint8, device="cuda")
    codes = (row | (row + 1) << 4).repeat(len(scales), 1)
    want = np.outer(reference.decode_e4m3(scales.cpu().numpy()), reference.E2M1)
    for kind in (torch.bfloat16, torch.float16):
        packed = api.prepare(codes, scales[:, None], 1.0, kind)
        got = api.linear(torch.eye(16, device="cuda", dtype=kind), packed)
        assert np.array_equal(got.double().cpu().numpy().T, want)


def test_repeated_runs_are_identical_with_and_without_overlap() -> None:
    """Fifty launches in a row, overlapping or not, give one result: no race between thread blocks."""
    codes, scales = make(5120, 6144, "random")
    packed = api.prepare(codes, scales, GLOBAL_SCALE)
    x = torch.randn(4, 6144, device="cuda").bfloat16()
    first = api.linear(x, packed, pdl=False)
    results = [api.linear(x, packed, pdl=bool(i % 3)) for i in range(50)]
    assert all(torch.equal(first, y) for y in results)


def test_nothing_is_written_outside_the_result() -> None:
    """The C launcher leaves the bytes before and after the output untouched."""
    n, k, m = 77, 80, 5
    codes, scales = make(n, k, "random")
    packed = api.prepare(codes, scales, 1.0)
    x = torch.randn(m, k, device="cuda").bfloat16()
    guarded = torch.full((n * (m + 4),), 7.0, dtype=torch.bfloat16, device="cuda")
    partial = torch.empty(packed.grid * packed.packed.shape[2] * 16 * 8, device="cuda")  # m <= 8
    pointers = (x.data_ptr(), k, packed.packed.data_ptr(), guarded[2 * n :].data_ptr(), 1.0)
    shape = (m, n, k, packed.packed.shape[2], 0, packed.grid, 0)
    code = api._library().sk_nvfp4_gemm(
        *pointers,
        partial.data_ptr(),
        packed.arrivals.data_ptr(),
        *shape,
        torch.cuda.current_stream().cuda_stream,
    )
    torch.cuda.synchronize()
    assert code == 0
    assert bool((guarded[: 2 * n] == 7).all())
    assert bool((guarded[(2 + m) * n :] == 7).all())
    assert torch.equal(guarded[2 * n : (2 + m) * n].view(m, n), api.linear(x, packed))


@pytest.mark.parametrize("m", [33, 41, 64, 128, 129, 200])
def test_more_rows_than_one_launch_takes(m: int) -> None:
    """Prefill sizes match float64 too, through several launches or the unpacked panel."""
    codes, scales = make(1000, 2064, "random")
    packed = api.prepare(codes, scales, GLOBAL_SCALE)
    x = torch.randn(m, 2064, device="cuda").bfloat16()
    assert_matches(api.linear(x, packed), x, dequantized(codes, scales), GLOBAL_SCALE)


def test_unpacked_panels_cover_a_large_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a scratch smaller than the weight, prefill goes panel by panel and misses no row."""
    monkeypatch.setattr(api, "PANEL_BYTES", 300_000)
    codes, scales = make(1000, 1024, "random")
    packed = api.prepare(codes, scales, GLOBAL_SCALE)
    x = torch.randn(150, 1024, device="cuda").bfloat16()
    assert_matches(api.linear(x, packed), x, dequantized(codes, scales), GLOBAL_SCALE)


def test_strided_and_empty_inputs() -> None:
    """A slice of a wider tensor and an input without rows are taken as they are."""
    codes, scales = make(256, 512, "random")
    packed = api.prepare(codes, scales, GLOBAL_SCALE)
    wide = torch.randn(8, 1537, device="cuda").bfloat16()
    x = wide[:, 513:1025]
    assert torch.equal(api.linear(x, packed), api.linear(x.contiguous(), packed))
    assert api.linear(wide[:0, :512], packed).shape == (0, 256)


def test_a_captured_graph_replays_on_new_inputs() -> None:
    """Two dependent layers captured in a CUDA graph follow their input at every replay."""
    up = api.prepare(*make(1024, 512, "random"), 1e-3)
    down = api.prepare(*make(512, 1024, "random"), 1e-3)
    x = torch.randn(4, 512, device="cuda").bfloat16()
    api.linear(api.linear(x, up), down)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = api.linear(api.linear(x, up), down)
    for _ in range(5):
        x.copy_(torch.randn(4, 512, device="cuda"))
        graph.replay()
        assert torch.equal(y, api.linear(api.linear(x, up), down))


def test_wrong_inputs_are_refused() -> None:
    """A K that does not fit and a dtype without a layout raise ValueError."""
    codes, scales = make(64, 64, "random")
    packed = api.prepare(codes, scales, 1.0)
    with pytest.raises(ValueError, match=r"\[M, 64\]"):
        api.linear(torch.zeros(1, 80, device="cuda", dtype=torch.bfloat16), packed)
    with pytest.raises(ValueError, match="float32"):
        api.prepare(codes, scales, 1.0, torch.float32)


def test_the_device_gets_the_plan_of_its_size() -> None:
    """A prepared weight's grid is the plan's for this device."""
    codes, scales = make(2048, 512, "random")
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    assert api.prepare(codes, scales, 1.0).grid == plan(2048, 512, processors).grid
