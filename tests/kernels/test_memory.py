"""The appliance's figures for the memory that our kernels take, against the kernels' own code."""

import re
import tomllib

import numpy as np
import pytest
from spark_kernels import policy
from spark_kernels.bf16x.reference import Shape, encode
from spark_kernels.lm_head.tuning_sm121 import capacity
from spark_llm import kernels
from spark_llm.kernels import Presence

from tests.kernels.conftest import SOURCE

ROWS = {
    row["kernel"]: row for row in tomllib.loads(policy.TABLE.read_text())["row"] if "kernel" in row
}
SWITCHES = [
    "", "auto", "off", "0", "force", "-lm_head", "-bf16x", "lm_head", "bf16x,nvfp4", "force,-bf16x",
    "force,off", "tuned", " LM_HEAD , force", "lm_head,-lm_head", "nonsense", "-nonsense",
]  # fmt: skip


@pytest.mark.parametrize("text", SWITCHES)
@pytest.mark.parametrize(
    ("presence", "capability"),
    [(Presence.GB10, (12, 1)), (Presence.OTHER_GPU, (9, 0)), (Presence.NONE, None)],
)
def test_switches_mean_what_they_mean_to_the_plugin(
    text: str, presence: Presence, capability: tuple[int, int] | None
) -> None:
    """For every switch and GPU the ledger counts those kernels that the plugin's policy turns on."""
    rows = policy.load_rows()
    try:
        switches = policy.parse_switches(text, policy.kernels(rows))
    except policy.SwitchError:
        expected = set()  # the plugin logs it and registers nothing
    else:
        decisions = [policy.decide(row, switches, capability) for row in rows]
        expected = {item.row.kernel for item in decisions if item.on} & {"lm_head", "bf16x"}
    assert kernels.active(presence, text) == expected


@pytest.mark.parametrize(("rows", "width"), [(1, 8), (16, 256), (40, 264), (96, 5120), (512, 1000)])
def test_coded_bytes_are_the_encoders(rows: int, width: int) -> None:
    """A coded matrix without escapes takes the bytes of the encoder's stream, side array and counters."""
    shape = Shape(rows, width)
    generator = np.random.default_rng(5)
    plain = generator.normal(size=(rows, width)).astype(np.float32)
    words = ((plain.view(np.uint32) >> 16) & 0x80FF | 0x3F00).astype(np.uint16)  # few exponents
    coded = encode(words)
    assert len(coded.stream) == shape.stream_bytes
    least = shape.stream_bytes + 4 * shape.strips
    assert least <= kernels.coded_bytes(rows, width) <= least + 16


def test_coded_share_is_that_of_large_layers() -> None:
    """The share that is shown for a checkpoint is that of a large layer, and never below it by more than counters."""
    rows, width = 16384, 5120
    assert kernels.coded_bytes(rows, width) / (2 * rows * width) == pytest.approx(
        kernels.CODED_SHARE, rel=1e-4
    )


def test_coded_names_are_those_of_the_policy() -> None:
    """Names of a checkpoint are taken as the policy's layers are; head, experts, encoders and other dtypes are not."""
    layers = set(ROWS["bf16x"]["options"]["layers"]) - {"lm_head"}
    assert all(
        kernels.is_coded(f"model.layers.0.self_attn.{name}.weight", "BF16") for name in layers
    )
    for text in ROWS["bf16x"]["options"]["exclude"]:
        assert not kernels.is_coded(f"{text}.blocks.0.attn.qkv_proj.weight", "BF16")
    for name in (
        "lm_head.weight",
        "model.layers.0.mlp.experts.3.up_proj.weight",
        "model.layers.0.mlp.gate.weight",
    ):
        assert not kernels.is_coded(name, "BF16")
    assert not kernels.is_coded("model.layers.0.self_attn.q_proj.weight", "F8_E4M3")


def test_screened_head_is_counted_as_prepare_allocates() -> None:
    """The head's extra bytes are the sum of the buffers that ``prepare`` makes, and 1.3 GB for 248320 x 5120."""
    rows, width = 248_320, 5120
    tokens = kernels.MAX_TOKENS
    assert tokens == ROWS["lm_head"]["options"]["max_tokens"]
    source = (SOURCE / "spark_kernels/lm_head/kernel.cu").read_text()
    token = re.search(r"struct Token \{(.*?)\n\};", source, re.DOTALL)
    assert token is not None
    fields = re.findall(
        r"^\s+(float|unsigned long long|unsigned) ([\w, ]+);", token[1], re.MULTILINE
    )
    size = sum((8 if "long" in kind else 4) * len(names.split(",")) for kind, names in fields)
    blocks = width // 64
    expected = (
        rows // 16 * blocks * 1024
        + rows * 16
        + tokens * (2 * blocks * 64 + size + 2 * 4 * rows + 4 * capacity(rows))
    )
    counted = kernels.screened_head_bytes(rows, width)
    assert expected <= counted <= expected + 1024
    assert 1.3e9 < counted < 1.35e9
    assert kernels.screened_head_bytes(ROWS["lm_head"]["options"]["min_rows"] - 1, width) == 0
    assert kernels.screened_head_bytes(ROWS["lm_head"]["options"]["min_rows"], width) > 0
