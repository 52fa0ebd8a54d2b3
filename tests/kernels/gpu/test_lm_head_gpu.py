"""The screened LM head on a GPU: sound bounds, the exact head's tokens, ties, fallbacks, graphs."""

import pytest

torch = pytest.importorskip("torch", reason="needs an NVIDIA GPU and torch")
api = pytest.importorskip("spark_kernels.lm_head.api", reason="needs torch")
pytestmark = pytest.mark.usefixtures("requires_gpu")

SHAPES = [(16, 64), (100, 72), (1000, 512), (50257, 768), (32000, 4096)]


def make(n: int, k: int) -> "torch.Tensor":
    """Return a normal weight."""
    return (torch.randn(n, k, device="cuda") * 0.02).bfloat16()


def exact(w: "torch.Tensor", x: "torch.Tensor") -> "torch.Tensor":
    """Return the float64 logits."""
    return x.double() @ w.double().t()


def winner_is_right(w: "torch.Tensor", x: "torch.Tensor", winners: "torch.Tensor") -> None:
    """Accept the argmax of the rounded logits.

    Where a logit lies within a float32 sum's error of the boundary between two bf16 values, either
    rounding is a correct head's.
    """
    logits = exact(w, x)
    slack = w.shape[1] * 2**-24 * (x.double().abs() @ w.double().abs().t())
    low, high = ((logits + s * slack).float().bfloat16().double() for s in (-1, 1))
    chosen = high.gather(1, winners[:, None])
    assert bool((chosen >= low.max(dim=1, keepdim=True).values).all())
    certain = (low == high).all(dim=1)
    assert torch.equal(winners[certain], low.argmax(dim=1)[certain])


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 8, 11, 16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bounds_are_sound_and_the_token_is_exact(shape: tuple[int, int], m: int) -> None:
    """Every exact logit lies between its bounds, and greedy returns the exact head's token."""
    w, x = make(*shape), torch.randn(m, shape[1], device="cuda").bfloat16()
    head = api.prepare(w)
    head.scratch.upper.fill_(float("nan"))
    head.scratch.lower.fill_(float("nan"))
    winner_is_right(w, x, api.greedy(head, x).winners)
    api.top_logits(head, x, 2)
    logits = exact(w, x)
    assert bool((logits <= head.scratch.upper[:m].double()).all())
    assert bool((logits >= head.scratch.lower[:m].double()).all())


@pytest.mark.parametrize("top_k", [1, 2, 50])
def test_logits_are_exact_where_they_matter(top_k: int) -> None:
    """The top k logits equal the full head's, and every row above minus infinity is exact."""
    w, x = make(32000, 1024), torch.randn(4, 1024, device="cuda").bfloat16()
    got, full = api.top_logits(api.prepare(w), x, top_k).double(), exact(w, x)
    kept = torch.isfinite(got)
    assert bool((kept.sum(dim=1) >= top_k).all())
    assert bool(((got - full)[kept].abs() <= full[kept].abs() * 2**-8 + 1e-4).all())
    kth = full.float().bfloat16().double().topk(top_k).values[:, -1:]
    assert bool(kept[full > kth + kth.abs() * 2**-6].all())


def test_ties_go_to_the_lowest_index() -> None:
    """Equal rows have equal logits, and the first of them wins."""
    w = make(32000, 4096)
    w[20000] = w[31999] = w[7]
    result = api.greedy(api.prepare(w), w[7:8].clone())
    assert result.winners.tolist() == [7]


@pytest.mark.parametrize(
    "case", ["equal rows", "zero activations", "NaN activations", "infinite activations"]
)
def test_hopeless_steps_rescore_every_row(case: str) -> None:
    """Where the screen cannot tell rows apart, all are rescored: argmax as torch has it, NaN first."""
    w, x = make(5000, 256), torch.randn(2, 256, device="cuda").bfloat16()
    if case == "equal rows":
        w = w[:1].repeat(5000, 1)
    elif case == "zero activations":
        x = torch.zeros_like(x)
    else:
        x[:, 3] = float("nan" if case.startswith("NaN") else "inf")
    result = api.greedy(api.prepare(w), x)
    assert result.rescored.tolist() == [5000, 5000]
    if case == "infinite activations":
        assert result.winners.tolist() == (x.float() @ w.float().t()).argmax(dim=1).tolist()
    else:
        assert result.winners.tolist() == [0, 0]


def test_non_finite_rows_are_always_candidates() -> None:
    """A row with an infinity is rescored rather than bounded."""
    w, x = make(5000, 256), torch.ones(1, 256, device="cuda").bfloat16()
    w[77, 3] = float("inf")
    assert api.greedy(api.prepare(w), x).winners.tolist() == [77]


def test_outliers_and_row_scales() -> None:
    """Activations with a huge channel and rows of very different size keep the token exact."""
    w, x = make(32000, 1024), torch.randn(4, 1024, device="cuda")
    x[:, 7] *= 3000
    scales = 2.0 ** torch.randint(-20, 10, (32000, 1), device="cuda")
    for weight in (w, (w.float() * scales).bfloat16()):
        winner_is_right(weight, x.bfloat16(), api.greedy(api.prepare(weight), x.bfloat16()).winners)


def test_a_captured_graph_replays() -> None:
    """Captured once, the step follows new hidden states."""
    w, x = make(32000, 1024), torch.randn(2, 1024, device="cuda").bfloat16()
    head = api.prepare(w)
    api.greedy(head, x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = api.greedy(head, x)
    for _ in range(3):
        x.copy_(torch.randn(2, 1024, device="cuda").bfloat16())
        graph.replay()
        captured = result.winners.clone()
        assert torch.equal(captured, api.greedy(head, x).winners)


def test_what_is_refused() -> None:
    """Wrong dtypes, too many tokens and too large a k are errors that say so."""
    w = make(512, 64)
    with pytest.raises(api.UnsupportedHeadError, match="bfloat16"):
        api.prepare(w.float())
    head = api.prepare(w, max_tokens=2)
    x = torch.randn(3, 64, device="cuda").bfloat16()
    with pytest.raises(api.UnsupportedHeadError, match="3 tokens"):
        api.greedy(head, x)
    with pytest.raises(api.UnsupportedHeadError, match="hidden states"):
        api.greedy(head, x[:1].float())
    with pytest.raises(api.UnsupportedHeadError, match="top-600"):
        api.top_logits(head, x[:1], 600)
