"""``spark-llm fit``: from disk, from the hub's headers, and without either."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from spark_llm.demo_model import write_demo_model
from spark_llm.errors import ConfigError
from spark_llm.fit import parse_size
from spark_llm.model_facts import fetch_model, known_model, local_model
from spark_llm.profile import Memory, load_profile, shipped_folder
from typer.testing import CliRunner, Result

from tests.hub.server import LocalHub, local_hub

MODEL = "org/tiny"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LocalHub]:
    """A hub with one model: the demo's files under another name."""
    for name in ("HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE", "CREDENTIALS_DIRECTORY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf-home"))
    folder = tmp_path / "made"
    write_demo_model(folder)
    with local_hub() as running:
        running.add(MODEL, {path.name: path for path in folder.iterdir() if path.is_file()})
        yield running


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration with folders of its own and a profile for the tiny model."""
    profiles = tmp_path / "profiles"
    profiles.mkdir()
    (profiles / "tiny.toml").write_text(f'extends = "demo"\nmodel = "{MODEL}"\naliases = []\n')
    file = tmp_path / "config.toml"
    file.write_text(
        f'[paths]\nstate = "{tmp_path}/state"\ncache = "{tmp_path}/cache"\n'
        f'runtime = "{tmp_path}/run"\nprofiles = "{profiles}"\n'
    )
    return file


def fit(config: Path, *arguments: str) -> Result:
    import typer
    from spark_llm.commands.fit import fit as command

    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, [*arguments, "--config", str(config)])


def ledger(config: Path, *arguments: str) -> dict[str, Any]:
    done = fit(config, *arguments, "--json")
    parsed: dict[str, Any] = json.loads(done.stdout)
    return parsed


def size(found: dict[str, Any], name: str) -> int:
    return next(int(line["bytes"]) for line in found["lines"] if line["name"] == name)


def test_table(config: Path) -> None:
    """The demo fits any machine that runs tests, and the table says so with its sum."""
    done = fit(config, "demo")
    assert done.exit_code == 0
    assert "needed" in done.stdout
    assert "KV cache" in done.stdout
    assert "fits, " in done.stdout


def test_too_small_machine_is_exit_3(config: Path) -> None:
    """What does not fit the asked machine is refused with exit code 3 and the missing amount."""
    done = fit(config, "demo", "--memory", "2G")
    assert done.exit_code == 3
    assert "does not fit" in done.stdout


def test_larger_context_widens_the_cache(config: Path) -> None:
    """A context that the profile's cache cannot hold makes the cache grow, and the ledger with it."""
    usual, wide = ledger(config, "demo"), ledger(config, "demo", "--seqs", "1000")
    assert size(wide, "KV cache") > size(usual, "KV cache")
    assert 1000 <= wide["kv_cache_sequences"] < 1001


def test_context_above_the_model_is_refused(config: Path) -> None:
    """A context the model was not made for is an error with the largest one."""
    error = fit(config, "demo", "--context", "999999").exception
    assert isinstance(error, ConfigError)
    assert "was made for" in error.message


def test_headers_from_the_hub(config: Path, hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the files the ledger comes from the hub, and is the one of the files; no weights are fetched."""
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    remote = ledger(config, "tiny")
    assert size(remote, "weights") == size(ledger(config, "demo"), "weights")
    weights = hub.downloads("model.safetensors")
    whole = max(path.stat().st_size for path in (config.parent / "made").glob("*.safetensors"))
    assert weights
    assert sum(seen.sent for seen in weights) < whole


def test_hub_and_disk_agree(hub: LocalHub, tmp_path: Path) -> None:
    """Architecture and every part's bytes are the same from either side."""
    write_demo_model(tmp_path / "models" / "demo")
    demo = load_profile("demo", (shipped_folder(),))
    local = local_model(demo, tmp_path / "models")
    remote = fetch_model(demo.model_copy(update={"model": MODEL}), endpoint=hub.endpoint)
    assert local == remote


def test_uncountable_model_goes_by_the_profiles_figure(tmp_path: Path) -> None:
    """A model with layers of an unknown kind is served by its profile's own size, and refused without one."""
    folder = tmp_path / "model"
    write_demo_model(folder)
    config = json.loads((folder / "config.json").read_text())
    unknown = ["quantum_attention"] * config["num_hidden_layers"]
    (folder / "config.json").write_text(json.dumps(config | {"layer_types": unknown}))
    demo = load_profile("demo", (shipped_folder(),))
    with pytest.raises(ConfigError, match="quantum_attention"):
        known_model(demo, folder)
    sized = demo.model_copy(update={"memory": Memory(weights_bytes=5, weights_source="me")})
    assert known_model(sized, folder) is None


def test_unreachable_hub_is_try_again(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing on disk, no figure in the profile and no hub, the answer is exit 75 at once."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    error = fit(config, "tiny").exception
    assert getattr(error, "exit_code", None) == 75


def test_published_figure_stands_in(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A profile with a published size gives a ledger without hub and files."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    found = ledger(config, "qwen3.6-35b-a3b-nvfp4", "--memory", "128G")
    assert found["fits_machine"]
    assert found["longest_context"] is None
    assert not ledger(config, "nemotron-3-super-120b-a12b-nvfp4", "--memory", "64G", "--offline")[
        "fits_machine"
    ]


@pytest.mark.parametrize(
    ("text", "size"), [("64G", 64 << 30), ("64GiB", 64 << 30), ("1.5g", 3 << 29), ("1024", 1024)]
)
def test_sizes(text: str, size: int) -> None:
    """Sizes are read with and without a unit."""
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-5G", "0", "many", "1e999"])
def test_no_size(text: str) -> None:
    """What is no size is refused."""
    with pytest.raises(ConfigError, match="not a size"):
        parse_size(text)
