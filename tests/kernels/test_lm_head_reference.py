"""The screened LM head's arithmetic: the bound holds, so the token is the full head's."""

import numpy as np
import numpy.typing as npt
import pytest
from spark_kernels.bf16x.reference import to_float64
from spark_kernels.lm_head import reference
from spark_kernels.lm_head.request import FULL, batch_top_k, request_top_k
from spark_kernels.lm_head.tuning_sm121 import LAUNCHES, capacity

U16 = npt.NDArray[np.uint16]
ROWS, WIDTH = 3000, 512


def bits(values: npt.NDArray[np.float64]) -> U16:
    """Return bf16 patterns."""
    return reference.bf16_bits(values)


def adversary(kind: str, seed: int) -> tuple[U16, U16]:
    """Return a weight (ROWS, WIDTH) and one hidden state that try to mislead the screen."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((ROWS, WIDTH)) * 0.05
    x = rng.standard_normal(WIDTH)
    match kind:
        case "exact ties":
            w[2000] = w[17] = x * 0.05
        case "one bit apart":
            w[5:25] = x * 0.05
            near = bits(w)
            near[5:25, 0] ^= np.arange(20, dtype=np.uint16) & 1
            return near, bits(x)
        case "outlier activations":
            x[::100] *= 2000
        case "outlier weights":
            w[:, 7] *= 300
        case "row scales":
            w *= 2.0 ** rng.integers(-20, 10, (ROWS, 1))
        case "all rows equal":
            w[:] = w[0]
        case "zero activations":
            x[:] = 0
        case "residual along x":
            coarse = np.rint(w / np.abs(w).max(axis=1, keepdims=True) * 127)
            w = (coarse + 0.45 * np.sign(x)) * 0.0005
        case "all negative":
            w = -np.abs(w)
            x = np.abs(x)
    return bits(w), bits(x)


KINDS = [
    "normal", "exact ties", "one bit apart", "outlier activations", "outlier weights", "row scales",
    "all rows equal", "zero activations", "residual along x", "all negative",
]  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_holds_and_the_token_is_the_same(kind: str, seed: int) -> None:
    """Every exact logit lies within its bound, and the screened argmax is the full one."""
    w, x = adversary(kind, seed)
    head = reference.quantise(w)
    logits, bound = reference.coarse(head, x)
    exact = to_float64(w) @ to_float64(x)
    assert np.all(np.abs(exact - logits) <= bound)
    assert reference.screened_greedy(w, head, x) == reference.greedy(w, x)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ["forward", "backward", "pairs"])
def test_float32_sums_in_any_order_stay_within_the_bound(kind: str, seed: int, order: str) -> None:
    """The candidates hold the argmax of a head that sums in float32, in whatever order."""
    w, x = adversary(kind, seed)
    products = (to_float64(w) * to_float64(x)).astype(np.float32)
    if order == "pairs":
        while products.shape[1] > 1:
            products = products[:, ::2] + products[:, 1::2]
        sums = products[:, 0]
    else:
        sums = np.zeros(ROWS, np.float32)
        for column in (products if order == "forward" else products[:, ::-1]).T:
            sums = sums + column
    rounded = to_float64(bits(sums.astype(np.float64)))
    assert int(np.argmax(rounded)) in reference.candidates(reference.quantise(w), x)


@pytest.mark.parametrize("k", [1, 2, 20, 64])
def test_the_candidates_hold_the_top_k(k: int) -> None:
    """Every row that ties with or beats the k-th largest bf16 logit is among the candidates."""
    w, x = adversary("one bit apart", 0)
    logits = to_float64(bits(to_float64(w) @ to_float64(x)))
    kth = np.sort(logits)[-k]
    left = set(reference.candidates(reference.quantise(w), x, k).tolist())
    assert set(np.flatnonzero(logits >= kth).tolist()) <= left


def test_the_screen_leaves_few_rows() -> None:
    """On a winner that stands out, the screen leaves under 1 % of the rows."""
    w, x = adversary("exact ties", 0)
    assert len(reference.candidates(reference.quantise(w), x)) < ROWS // 100


def test_bf16_rounding_is_to_nearest_even() -> None:
    """Halfway values go to the even pattern, in both directions."""
    halves = np.array([1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8), 1 + 2**-8 + 2**-20])
    want = np.array([0x3F80, 0x3F82, 0xBF80, 0x3F81], np.uint16)
    np.testing.assert_array_equal(reference.bf16_bits(halves), want)


class Params:
    """vLLM's SamplingParams as far as the decision reads them, at their defaults."""

    def __init__(self, **changed: object) -> None:
        self.temperature: float = 0.0
        self.top_k: int = 0
        self.top_p = self.repetition_penalty = 1.0
        self.min_p = self.presence_penalty = self.frequency_penalty = 0.0
        self.logprobs: int | None = None
        self.min_tokens = 0
        self.logprob_token_ids: object = None
        self.logit_bias: object = None
        self.allowed_token_ids: object = None
        self.bad_words: object = None
        self.extra_args: object = None
        self.thinking_token_budget: object = None
        self.__dict__.update(changed)


@pytest.mark.parametrize(
    ("changed", "needed"),
    [
        ({}, 1),
        ({"temperature": 0.7, "top_k": 20}, 20),
        ({"temperature": 0.7, "top_k": 65}, FULL),
        ({"temperature": 0.7}, FULL),
        ({"temperature": 0.7, "top_k": 20, "top_p": 0.9}, FULL),
        ({"temperature": 0.7, "top_k": 20, "min_p": 0.1}, FULL),
        ({"repetition_penalty": 1.1}, FULL),
        ({"presence_penalty": 0.1}, FULL),
        ({"frequency_penalty": -0.1}, FULL),
        ({"logprobs": 0}, FULL),
        ({"logprob_token_ids": [1]}, FULL),
        ({"logit_bias": {1: 2.0}}, FULL),
        ({"allowed_token_ids": [1]}, FULL),
        ({"bad_words": ["x"]}, FULL),
        ({"min_tokens": 3}, FULL),
        ({"extra_args": {"x": 1}}, FULL),
        ({"thinking_token_budget": 0}, FULL),
    ],
)
def test_how_many_logits_a_request_needs(changed: dict[str, object], needed: int) -> None:
    """Greedy needs the first, top-k sampling its k, and whatever reads other logits all of them."""
    assert request_top_k(Params(**changed), 64) == needed


def test_how_many_logits_a_batch_needs() -> None:
    """A step needs what its most demanding request does."""
    assert batch_top_k([1, 20, 1]) == 20
    assert batch_top_k([1, FULL]) == FULL
    assert batch_top_k([]) == FULL


def test_the_ring_fits_a_block_on_gb10() -> None:
    """The coarse pass's ring fits 99 KiB of shared memory, and small heads keep room for candidates."""
    assert LAUNCHES[12].warps * LAUNCHES[12].stages * (4096 + 8) <= 99 * 1024
    assert (capacity(248320), capacity(100)) == (15520, 256)
