"""How bf16x deals a matrix to multiprocessors, and which layers it takes."""

import pytest
from spark_kernels import policy
from spark_kernels.bf16x.selection import Selection
from spark_kernels.bf16x.tuning_sm121 import RINGS, launch

TILE_BYTES = 6176
SHARED_LIMIT = {
    9: 227 * 1024,
    12: 99 * 1024,
}  # a block's most, CUDA programming guide, table of capabilities
DEVICES = [(9, 132), (12, 48), (12, 188)]
MATRICES = [(1024, 20), (320, 24), (320, 68), (15520, 20), (6, 20), (1, 1), (64, 2), (7, 3)]


@pytest.mark.parametrize("major", RINGS)
def test_the_ring_fits_a_block(major: int) -> None:
    """Tiles and barriers fit the shared memory of a block on each architecture."""
    ring = RINGS[major]
    assert ring.warps * ring.stages * (TILE_BYTES + 8) <= SHARED_LIMIT[major]
    assert 1 <= ring.warps <= 16


@pytest.mark.parametrize(("major", "sms"), DEVICES)
@pytest.mark.parametrize(("strips", "tiles"), MATRICES)
def test_every_part_has_work_and_no_block_is_idle(
    strips: int, tiles: int, major: int, sms: int
) -> None:
    """No part is empty, and the grid has no more blocks than units."""
    chosen = launch(strips, tiles, sms, major)
    assert 1 <= chosen.parts <= tiles
    assert chosen.grid == min(sms, strips * chosen.parts)


@pytest.mark.parametrize(("strips", "tiles"), [m for m in MATRICES if m[0] * m[1] >= 4096])
def test_large_matrices_fall_evenly(strips: int, tiles: int) -> None:
    """On GB10 the busiest multiprocessor of a large layer has at most 10 % more than its share."""
    sms = 48
    chosen = launch(strips, tiles, sms, 12)
    busiest = -(-strips * chosen.parts // sms) * -(-tiles // chosen.parts)
    assert busiest <= 1.1 * strips * tiles / sms


def selection() -> Selection:
    """Return the product's selection."""
    row = next(row for row in policy.load_rows() if row.kernel == "bf16x")
    return Selection.from_options(row.options)


@pytest.mark.parametrize(
    ("name", "shape", "taken"),
    [
        ("model.layers.0.self_attn.qkv_proj", (6144, 4096), True),
        ("model.layers.3.linear_attn.in_proj_qkvz", (16384, 5120), True),
        ("lm_head", (248320, 5120), True),
        ("model.layers.0.self_attn.kv_b_proj", (6144, 4096), False),
        ("model.layers.0.mlp.gate", (512, 4096), False),
        ("visual.blocks.0.attn.qkv_proj", (6144, 4096), False),
        ("model.layers.0.self_attn.o_proj", (128, 128), False),
        ("model.layers.0.self_attn.o_proj", (4096, 4097), False),
    ],
)
def test_which_layers_are_taken(name: str, shape: tuple[int, int], *, taken: bool) -> None:
    """Large known projections are taken; encoders, routers, absorbed and odd layers are not."""
    assert selection().takes(name, shape) is taken


def test_a_layer_that_saves_too_little_stays_plain() -> None:
    """The coded form is kept only if it saves the share that the policy asks for."""
    assert selection().worth(75, 100)
    assert not selection().worth(95, 100)
