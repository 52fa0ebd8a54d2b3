"""Tuned tables and the command that makes them, without a device."""

import json
from pathlib import Path

import pytest
from spark_kernels import tune, tuned

LAYER = tune.Layer(experts=512, width=512, hidden=2048, top_k=10, dtype="fp8_w8a8")
KEYS = {
    "BLOCK_SIZE_M",
    "BLOCK_SIZE_N",
    "BLOCK_SIZE_K",
    "GROUP_SIZE_M",
    "num_warps",
    "num_stages",
}


@pytest.mark.parametrize("path", sorted(tuned.tuned_folder().iterdir()), ids=lambda p: p.name)
def test_tables_have_vllms_form(path: Path) -> None:
    """Every shipped table is named for GB10 and maps batch sizes to complete tiles."""
    assert "device_name=NVIDIA_GB10" in path.name
    content = json.loads(path.read_text())
    content.pop("triton_version")
    assert "1" in content
    for batch, tile in content.items():
        assert int(batch) > 0
        assert set(tile) == KEYS


def test_the_folder_is_set_unless_the_operator_set_one() -> None:
    """Registering names our folder, and keeps a folder that was named before."""
    environ: dict[str, str] = {}
    tuned.register({}, environ)
    assert environ == {"VLLM_TUNED_CONFIG_FOLDER": str(tuned.tuned_folder())}
    mine = {"VLLM_TUNED_CONFIG_FOLDER": "/srv/tables"}
    tuned.register({}, mine)
    assert mine == {"VLLM_TUNED_CONFIG_FOLDER": "/srv/tables"}


@pytest.mark.parametrize("batch", [1, 64, 4096])
def test_search_space_fits_shared_memory_and_the_batch(batch: int) -> None:
    """No tile needs more shared memory than SM 12.x has, and small batches get no tall tiles."""
    tiles = list(tune.search_space(LAYER, batch))
    assert tiles
    for tile in tiles:
        rows, columns, depth = (tile[f"BLOCK_SIZE_{axis}"] for axis in "MNK")
        assert (rows + columns) * depth * tile["num_stages"] <= 99 * 1024
        assert batch > 400 or rows == 16


def test_block_scales_fix_the_depth() -> None:
    """With 128 x 128 scales every tile is 128 deep."""
    layer = tune.Layer(256, 512, 2048, 8, "fp8_w8a8", block_scaled=True)
    assert {tile["BLOCK_SIZE_K"] for tile in tune.search_space(layer, 64)} == {128}


def test_the_fastest_tile_that_runs_is_chosen() -> None:
    """Tiles that fail are passed over; the fastest of the others wins, with the default beside it."""

    def time_us(_batch: int, config: tune.Config | None) -> float | None:
        if config is None:
            return 100.0
        if config["num_stages"] == 5:
            return None  # the fastest, but it does not run
        return 10.0 * config["num_warps"] - config["num_stages"] + config["BLOCK_SIZE_N"] / 32

    choice = tune.choose(LAYER, 4, time_us)
    assert (choice.config["num_warps"], choice.config["num_stages"]) == (4, 4)
    assert choice.config["BLOCK_SIZE_N"] == 32
    assert choice.default_us == 100.0
    assert tune.table([choice], "3.7.1") == {"triton_version": "3.7.1", "4": choice.config}


def test_a_batch_without_a_running_tile_keeps_vllms_default() -> None:
    """Where no tile runs, the table leaves the batch size out."""
    choice = tune.choose(LAYER, 2, lambda _batch, config: None if config else 50.0)
    assert tune.table([choice], "3.7.1") == {"triton_version": "3.7.1"}


def test_a_layer_that_does_not_run_at_all_is_an_error() -> None:
    """If even vLLM's default fails, tuning stops with the layer's name."""
    with pytest.raises(RuntimeError, match="experts=512"):
        tune.choose(LAYER, 1, lambda _batch, _config: None)


def test_writing_leaves_no_scratch_file(tmp_path: Path) -> None:
    """A table appears whole under its name and nothing else is left in the folder."""
    path = tmp_path / "deep" / "table.json"
    tune.write_atomically(path, {"triton_version": "3.7.1"})
    assert [p.name for p in path.parent.iterdir()] == ["table.json"]
    assert json.loads(path.read_text()) == {"triton_version": "3.7.1"}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--top-k", "9"], "more than --experts 8"),
        (["--top-k", "0"], "positive"),
        (["--top-k", "2", "--dtype", "bf16", "--block-scaled"], "is for --dtype fp8_w8a8"),
    ],
)
def test_sizes_that_make_no_sense_are_usage_errors(
    extra: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bad sizes exit with status 2 and say which."""
    base = ["moe", "--experts", "8", "--width", "64", "--hidden", "64", "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        tune.main([*base, *extra])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_without_a_gpu_the_command_says_what_it_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a machine without a GPU or vLLM the command fails with status 1 and one line."""
    sizes = ["--experts", "8", "--width", "64", "--hidden", "64", "--top-k", "2"]
    assert tune.main(["moe", *sizes, "--out", str(tmp_path)]) == 1
    assert "tune needs a GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
