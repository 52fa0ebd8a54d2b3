"""bf16x on a GPU: the same code as the reference, every bit back, sums against float64, any number of tokens."""

import numpy as np
import pytest
from spark_kernels.bf16x import reference

torch = pytest.importorskip("torch", reason="needs an NVIDIA GPU and torch")
api = pytest.importorskip("spark_kernels.bf16x.api", reason="needs torch")
pytestmark = pytest.mark.usefixtures("requires_gpu")

SHAPES = [(16384, 5120), (5120, 6144), (5120, 17408), (4096, 4096), (96, 5120)]
RAGGED = [(16, 64), (1, 8), (17, 72), (40, 264), (100, 1000), (1000, 4104), (4097, 248)]
KINDS = ["normal", "escapes", "row scales"]


def bits(tensor: "torch.Tensor") -> "torch.Tensor":
    """Return bf16 patterns as int16."""
    return tensor.view(torch.int16)


def make(n: int, k: int, kind: str) -> "torch.Tensor":
    """Return finite weights that code well, with many escapes, or with rows of very different size."""
    w = (torch.randn(n, k, device="cuda") * 0.02).bfloat16()
    if kind == "escapes":
        tiny = torch.randn(n, k, device="cuda") * 2.0 ** torch.randint(
            -60, 3, (n, k), device="cuda"
        )
        w = torch.where(torch.rand(n, k, device="cuda") < 0.004, tiny.bfloat16(), w)
    if kind == "row scales":
        w = (w.float() * 2.0 ** torch.randint(-12, 12, (n, 1), device="cuda")).bfloat16()
    return w


@pytest.mark.parametrize("plain", [False, True])
def test_all_patterns_come_back(plain: bool) -> None:
    """Each of the 65,536 bf16 patterns survives the device's encoder and decoder."""
    every = torch.arange(65536, device="cuda").to(torch.int16).view(torch.bfloat16)
    w = every[torch.argsort(bits(every).to(torch.int32) >> 7 & 0xFF, stable=True)].reshape(256, 256)
    assert torch.equal(bits(api.decode(api.encode(w, force_plain=plain))), bits(w))


@pytest.mark.parametrize("shape", RAGGED, ids=str)
@pytest.mark.parametrize("kind", [*KINDS, "any pattern"])
def test_the_device_encoder_writes_the_references_bytes(shape: tuple[int, int], kind: str) -> None:
    """The device's stream, side array and counts equal the reference's."""
    if shape[0] > 1000:
        shape = (shape[0] % 100, shape[1])  # the reference is plain Python
    if kind == "any pattern":
        w = torch.randint(-32768, 32768, shape, device="cuda").to(torch.int16).view(torch.bfloat16)
    else:
        w = make(*shape, kind)
    got, want = api.encode(w), reference.encode(bits(w).cpu().numpy().view(np.uint16))
    np.testing.assert_array_equal(got.stream.cpu().numpy(), want.stream)
    side = got.side.cpu().numpy().view(np.uint32)
    np.testing.assert_array_equal(side[: want.side.size], want.side)
    assert (got.escapes, got.plain_tiles) == (want.escapes, want.plain_tiles)
    assert torch.equal(bits(api.decode(got)), bits(w))


@pytest.mark.parametrize("shape", SHAPES + RAGGED, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_m_matches_float64_and_itself(shape: tuple[int, int], kind: str) -> None:
    """M = 1..16, 24 and 32 give float64's result rounded, and a token's bits do not depend on M."""
    n, k = shape
    w, x = make(n, k, kind), torch.randn(32, k, device="cuda").bfloat16()
    bias = torch.randn(n, device="cuda").bfloat16()
    coded = api.encode(w)
    want = x.double() @ w.double().t() + bias.double()
    size = x.double().abs() @ w.double().abs().t() + bias.double().abs()
    whole = api.linear(x, coded, bias)
    for m in [*range(1, 17), 24, 32]:
        poison = torch.full((m, n), float("nan"), device="cuda").bfloat16()
        del poison  # the output is likely to reuse this memory: what is not written stays NaN
        y = api.linear(x[:m], coded, bias)
        limit = want[:m].abs() * 2**-8 + size[:m] * k * 2**-24 + 1e-30
        assert bool(torch.isfinite(y).all())
        assert ((y.double() - want[:m]).abs() / limit).max().item() <= 1
        assert torch.equal(bits(y), bits(whole[:m])), m


@pytest.mark.parametrize("kind", KINDS)
def test_plain_tiles_give_the_same_bits(kind: str) -> None:
    """The same kernel on uncoded tiles returns the same bits: the code loses nothing."""
    w, x = make(1040, 2120, kind), torch.randn(5, 2120, device="cuda").bfloat16()
    coded, plain = api.encode(w), api.encode(w, force_plain=True)
    assert plain.plain_tiles == 65 * 9
    assert torch.equal(bits(api.linear(x, coded)), bits(api.linear(x, plain)))


def test_prefill_goes_through_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    """More tokens than the kernel takes decode the weight panel by panel and use cuBLAS."""
    monkeypatch.setattr(api, "PANEL_BYTES", 1 << 18)
    w, x = make(1000, 520, "escapes"), torch.randn(3, 100, 520, device="cuda").bfloat16()
    bias = torch.randn(1000, device="cuda").bfloat16()
    want = x.double() @ w.double().t() + bias.double()
    y = api.linear(x, api.encode(w), bias)
    assert y.shape == (3, 100, 1000)
    assert ((y.double() - want).norm() / want.norm()).item() < 4e-3


def test_non_finite_weights_reach_the_output() -> None:
    """Infinities and NaN in one row show in that row alone, whatever the tile's padding."""
    w = make(48, 72, "normal")
    w[3, 5], w[20, 0] = float("inf"), float("nan")
    y = api.linear(torch.ones(2, 72, device="cuda").bfloat16(), api.encode(w))
    odd = ~torch.isfinite(y)
    assert odd[:, 3].all()
    assert odd[:, 20].all()
    assert odd.sum().item() == 4
    assert torch.isinf(y[:, 3]).all()


def test_a_captured_graph_replays() -> None:
    """Calls captured in a CUDA graph give new results for new activations, split sums included."""
    w, x = make(5120, 6144, "normal"), torch.randn(4, 6144, device="cuda").bfloat16()
    coded = api.encode(w)
    api.linear(x, coded)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = api.linear(x, coded)
    for _ in range(3):
        x.copy_(torch.randn(4, 6144, device="cuda").bfloat16())
        graph.replay()
        assert torch.equal(bits(y), bits(api.linear(x, coded)))
    assert coded.arrivals.count_nonzero().item() == 0


def test_strided_and_empty_activations() -> None:
    """A slice with a row stride is read in place; zero tokens give an empty result."""
    w = make(64, 128, "normal")
    coded, wide = api.encode(w), torch.randn(4, 256, device="cuda").bfloat16()
    for x in (wide[:, :128], wide[:, 1:129], wide[::2, 128:]):
        assert torch.equal(api.linear(x, coded), api.linear(x.contiguous(), coded))
    assert api.linear(wide[:0, :128], coded).shape == (0, 64)


@pytest.mark.parametrize("bad", ["dtype", "k", "rank"])
def test_weights_that_cannot_be_coded_are_refused(bad: str) -> None:
    """A wrong dtype, a K that is no multiple of 8 and a vector are errors that say so."""
    w = {
        "dtype": torch.zeros(16, 64, device="cuda"),
        "k": torch.zeros(16, 65, device="cuda").bfloat16(),
        "rank": torch.zeros(64, device="cuda").bfloat16(),
    }[bad]
    with pytest.raises(api.UnsupportedWeightError, match="bf16x takes"):
        api.encode(w)


def test_the_operator_is_well_formed() -> None:
    """Torch's own checks of a custom operator pass: schema, fake tensors, tracing."""
    w, x = make(64, 128, "normal"), torch.randn(3, 128, device="cuda").bfloat16()
    c = api.encode(w)
    torch.library.opcheck(
        torch.ops.spark_kernels.bf16x_linear.default,
        (x, c.stream, c.side, c.arrivals, c.n, None),
        test_utils=("test_schema", "test_faketensor"),
    )
