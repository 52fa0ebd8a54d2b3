"""The plugin in the real engine on a CPU: loaded through its entry point, and nothing changes."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
ENGINE = ROOT / ".venv-engine" / "bin" / "python"
SOURCE = ROOT / "kernels" / "src"
DEADLINE_S = 240


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The appliance's demo model: a real Qwen3 of random weights."""
    pytest.importorskip("spark_llm", reason="needs the appliance: make venv")
    from spark_llm.demo_model import write_demo_model

    folder = tmp_path_factory.mktemp("model") / "demo"
    write_demo_model(folder)
    return folder


def installed(folder: Path) -> Path:
    """Write the package's metadata as an installer would: its entry point is what is being tested."""
    info = folder / "spark_kernels-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: spark-kernels\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nspark_kernels = spark_kernels.plugin:register\n"
    )
    return folder


def generate(model: Path, python_path: list[Path], **environ: str) -> dict[str, Any]:
    """Run the engine once and return its tokens."""
    if not ENGINE.exists():
        pytest.skip("needs the embedded engine: make engine")
    env = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("VLLM_", "SPARK_"))},
        "PYTHONPATH": os.pathsep.join(map(str, python_path)),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "2",
        **environ,
    }
    script = Path(__file__).with_name("engine_tokens.py")
    done = subprocess.run(
        [str(ENGINE), str(script), str(model)],
        env=env,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout[-2000:] + done.stderr[-4000:]
    result: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    return result


@pytest.mark.timeout(2 * DEADLINE_S)
def test_nothing_changes_on_a_cpu(model: Path, tmp_path: Path) -> None:
    """With the plugin installed and forced, tokens and log probabilities are those without it, bit for bit."""
    without = generate(model, [])
    plugin = generate(model, [installed(tmp_path), SOURCE], SPARK_KERNELS="force")
    assert without["entry_points"] == []
    assert plugin["entry_points"] == ["spark_kernels.plugin:register"]
    assert (without["plugin_ran"], plugin["plugin_ran"]) == (False, True)
    assert plugin["untouched"]
    assert not plugin["hooks_loaded"]
    assert len(plugin["tokens"]) == 3
    assert plugin["tokens"] == without["tokens"]
    assert plugin["logprobs"] == without["logprobs"]


def test_the_metadata_is_the_packages_own() -> None:
    """The entry point that the engine test installs is the one that pyproject.toml declares."""
    import tomllib

    project = tomllib.loads((SOURCE.parent / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {
        "spark_kernels": "spark_kernels.plugin:register"
    }
    assert project["scripts"]["spark-kernels"] == "spark_kernels.cli:main"
