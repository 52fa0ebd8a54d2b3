"""Add + RMSNorm + NVFP4 quantisation on a GPU: equal to the NumPy reference, bit for bit."""

import numpy as np
import pytest
from spark_kernels.rmsnorm_fp4 import reference

torch = pytest.importorskip("torch", reason="needs an NVIDIA GPU and torch")
api = pytest.importorskip("spark_kernels.rmsnorm_fp4.api", reason="needs torch")
pytestmark = pytest.mark.usefixtures("requires_gpu")

SHAPES = [
    (1, 16),
    (1, 64),
    (2, 48),
    (3, 5120),
    (8, 4112),
    (130, 2048),
    (2, 16384),
    (1000, 512),
    (600, 5120),
]


def make(rows: int, hidden: int, kind: str) -> "torch.Tensor":
    """Return bfloat16 inputs: normal, or any bit pattern with NaN, infinities and a row of zeros."""
    x = torch.randn(rows, hidden, device="cuda").bfloat16()
    if kind == "adversarial":
        bits = torch.randint(0, 65536, (rows, hidden), device="cuda").to(torch.int32)
        x = bits.to(torch.int16).view(torch.bfloat16)
        x = torch.where(x.float().abs() < 1e4, x, torch.zeros_like(x))
        x[0] = 0
        if rows > 2:
            x[1, 3], x[2, 5] = float("nan"), float("inf")
    return x


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["normal", "adversarial"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equal_to_the_reference(
    shape: tuple[int, int], kind: str, offset: float, *, with_residual: bool
) -> None:
    """Codes, scales in both layouts and the new residual equal the reference in every bit."""
    x = make(*shape, kind)
    residual = torch.randn_like(x) if with_residual else None
    weight = torch.randn(shape[1], device="cuda") * 0.3
    scale = torch.tensor([137.5], device="cuda")
    poison = torch.full((shape[0] * shape[1] * 4,), 255, dtype=torch.uint8, device="cuda")
    del poison
    codes, scales, added = api.add_rmsnorm_fp4(
        x, residual, weight, scale, weight_offset=offset, swizzled=False
    )
    want = reference.add_rmsnorm_fp4_ref(
        x.float().cpu().numpy(),
        None if residual is None else residual.float().cpu().numpy(),
        weight.cpu().numpy(),
        eps=1e-6,
        global_scale=137.5,
        weight_offset=offset,
    )
    assert np.array_equal(codes.cpu().numpy(), want.codes)
    assert np.array_equal(scales.view(torch.uint8).cpu().numpy(), want.scales)
    if added is not None:
        assert np.array_equal(added.float().cpu().numpy(), want.residual, equal_nan=True)
    again, tiles, _ = api.add_rmsnorm_fp4(x, residual, weight, scale, weight_offset=offset)
    assert torch.equal(again, codes)
    assert np.array_equal(
        tiles.view(torch.uint8).cpu().numpy().reshape(-1), reference.swizzle(want.scales)
    )


def test_a_captured_graph_replays_on_new_inputs() -> None:
    """Captured in a CUDA graph, the operation follows its inputs and the global scale."""
    x, residual = torch.randn(2, 4, 5120, device="cuda").bfloat16()
    weight, scale = torch.randn(5120, device="cuda"), torch.tensor([100.0], device="cuda")
    api.add_rmsnorm_fp4(x, residual, weight, scale)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = api.add_rmsnorm_fp4(x, residual, weight, scale)
    for step in range(3):
        x.copy_(torch.randn_like(x))
        scale.fill_(50.0 + step)
        graph.replay()
        for got, want in zip(
            captured, api.add_rmsnorm_fp4(x, residual, weight, scale), strict=True
        ):
            assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))


def test_a_bfloat16_weight_is_widened_before_the_offset() -> None:
    """A bfloat16 weight gives what its float32 values give: 1 + w is not rounded to bfloat16."""
    x, residual = torch.randn(2, 5, 5120, device="cuda").bfloat16()
    weight = (torch.randn(5120, device="cuda") * 0.1).bfloat16()
    scale = torch.tensor([100.0], device="cuda")
    narrow = api.add_rmsnorm_fp4(x, residual, weight, scale)
    wide = api.add_rmsnorm_fp4(x, residual, weight.float(), scale)
    assert all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in zip(narrow, wide, strict=True)
    )


@pytest.mark.parametrize("hidden", [24, 16400])
def test_unsupported_widths_are_refused(hidden: int) -> None:
    """A width that is no multiple of 16, or beyond 16384, raises ValueError that says so."""
    x = torch.zeros(1, hidden, device="cuda", dtype=torch.bfloat16)
    weight, scale = torch.zeros(hidden, device="cuda"), torch.ones(1, device="cuda")
    with pytest.raises(ValueError, match="multiple of 16 up to 16384"):
        api.add_rmsnorm_fp4(x, None, weight, scale)
