"""Every shipped profile's command line and environment, as the real vLLM reads them."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from spark_llm import argv
from spark_llm.argv import Argv
from spark_llm.flags import REFUSED, refusal
from spark_llm.profile import Engine, load_profile, profile_names, shipped_folder
from spark_llm.switches import adjust

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-engine" / "bin" / "python"
FOLDERS = (shipped_folder(),)
NAMES = profile_names(FOLDERS)


def command(name: str, **switches: Any) -> Argv:  # noqa: ANN401  adjust's keywords
    profile = adjust(load_profile(name, FOLDERS), **switches)
    return argv.build(
        profile,
        python=PYTHON,
        model=Path("/models/served"),
        socket=Path("/run/spark-llm/engine.sock"),
        home=Path("/var/cache/spark-llm"),
        shutdown_timeout_s=30,
        inherited={},
        caches={"VLLM_CACHE_ROOT": "/var/cache/spark-llm/vllm"},
        gpu_memory_utilization=0.5 if profile.engine is Engine.CUDA else None,
        draft=Path("/models/draft"),
    )


def parsed(commands: dict[str, Argv], folder: Path) -> dict[str, Any]:
    """What vLLM makes of each command: its parser and its list of environment variables, in one process."""
    lines = {
        # after `... -m vllm.entrypoints.cli.main serve`
        name: {"args": list(item.args[4:]), "environment": item.environment}
        for name, item in commands.items()
    }
    (folder / "lines.json").write_text(json.dumps(lines))
    probe = Path(__file__).parent / "engine_parse_probe.py"
    done = subprocess.run(
        [PYTHON, probe, folder / "lines.json", folder / "answers.json"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={"PATH": os.environ["PATH"], "HOME": str(folder)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers: dict[str, Any] = json.loads((folder / "answers.json").read_text())
    return answers


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    commands = {name: command(name) for name in NAMES}
    commands["debug"] = command("qwen3.6-35b-a3b-nvfp4", debug=True, mtp=False)
    commands["tq"] = command("qwen3.5-27b-nvfp4", turboquant=True, context=32768)
    wrong = commands["demo"]
    commands["bad flag"] = Argv((*wrong.args, "--max-modle-len", "5"), wrong.environment)
    commands["bad variable"] = Argv(wrong.args, {**wrong.environment, "VLLM_NO_SUCH": "1"})
    return parsed(commands, tmp_path_factory.mktemp("parse"))


@pytest.mark.parametrize("name", NAMES)
def test_engine_understands_the_profile(name: str, answers: dict[str, Any]) -> None:
    """The real parser accepts the argv, the real list knows each variable, and values arrive."""
    profile = load_profile(name, FOLDERS)
    answer = answers[name]
    assert "error" not in answer, answer["error"]
    assert answer["unknown"] == []
    assert answer["context"] == profile.context
    assert answer["kv_cache_bytes"] == profile.kv_cache_bytes
    assert answer["kv_cache_dtype"] == profile.kv_cache_dtype
    assert answer["attention"] == profile.backends.attention
    assert answer["linear"] == (profile.backends.linear or "auto")
    assert answer["moe"] == (profile.backends.moe or "auto")
    tokens = profile.speculative.tokens if profile.speculative else None
    assert (answer["speculative"] or {}).get("num_speculative_tokens") == tokens


@pytest.mark.parametrize("name", ["debug", "tq"])
def test_engine_understands_the_switches(name: str, answers: dict[str, Any]) -> None:
    """Command lines changed by --debug, --no-mtp, --tq and --context are accepted too."""
    assert "error" not in answers[name]


@pytest.mark.parametrize("name", ["bad flag", "bad variable"])
def test_check_would_notice(name: str, answers: dict[str, Any]) -> None:
    """A mistyped flag and an unknown variable are refused, so the checks above can fail."""
    assert "error" in answers[name]


_OPTIONS = """
import json
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = make_arg_parser(FlexibleArgumentParser())
print(json.dumps([option for action in parser._actions for option in action.option_strings]))
"""


def test_refused_flags_are_the_engines(tmp_path: Path) -> None:
    """Each flag that a profile may not set is one of the engine's, and no other one is refused for its beginning."""
    done = subprocess.run(
        [PYTHON, "-c", _OPTIONS],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
    )
    options = set(json.loads(done.stdout.splitlines()[-1]))
    beginnings = {"-s", "-t"}
    assert REFUSED.keys() - beginnings <= options
    assert {option for option in options if refusal(option)} == REFUSED.keys() - beginnings
