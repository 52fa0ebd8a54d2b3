"""The command, started as a person would."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from spark_llm import __version__, cli

from tests.appliance.service import environment, stub_service


def _run(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "spark_llm.cli", *arguments],
        env=environment(folder, **env),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def _commands(command: Any, *path: str) -> Iterator[tuple[tuple[str, ...], list[str | None]]]:  # noqa: ANN401  Typer's own click
    """The command and all below it: the words that call each, its help and that of its parameters."""
    yield path, [command.help, *(parameter.help for parameter in command.params)]
    for name, below in getattr(command, "commands", {}).items():
        yield from _commands(below, *path, name)


COMMANDS = dict(_commands(typer.main.get_group(cli.app)))


def test_version(tmp_path: Path) -> None:
    """``--version`` prints it."""
    assert _run(tmp_path, "--version").stdout == f"spark-llm {__version__}\n"


def test_configuration_error_is_exit_2(tmp_path: Path) -> None:
    """An unknown key is exit 2 with the key, the nearest one and where was looked."""
    (tmp_path / "c.toml").write_text("[gateway]\nprot = 1\n")
    done = _run(tmp_path, "serve", "--config", str(tmp_path / "c.toml"))
    assert done.returncode == 2
    assert "unknown key 'gateway.prot'; did you mean 'port'? [bad_config]" in done.stderr
    assert "Traceback" not in done.stderr


def test_unknown_profile_is_exit_2(tmp_path: Path) -> None:
    """A profile that does not exist is exit 2 with the known ones."""
    done = _run(tmp_path, "serve", "--profile", "nope")
    assert done.returncode == 2
    assert "demo" in done.stderr


def test_status_without_service_is_exit_75(tmp_path: Path) -> None:
    """Asking a service that is not there is exit 75: try again later."""
    done = _run(tmp_path, "status", SPARK_LLM_GATEWAY__PORT="1")
    assert done.returncode == 75
    assert "spark-llm serve" in done.stderr


def test_wait_gives_up(tmp_path: Path) -> None:
    """``wait --ready`` ends with 75 when its time is up."""
    done = _run(tmp_path, "wait", "--ready", "--timeout", "0.1", SPARK_LLM_GATEWAY__PORT="1")
    assert done.returncode == 75


def test_profiles_as_json(tmp_path: Path) -> None:
    """``profiles --json`` lists the shipped ones with their models."""
    found = json.loads(_run(tmp_path, "profiles", "--json").stdout)
    assert {"demo", "qwen3.6-35b-a3b-nvfp4"} <= {item["name"] for item in found}


def test_keys_round_trip(tmp_path: Path) -> None:
    """A key is printed once, listed without itself, and removed."""
    token = _run(tmp_path, "keys", "add", "laptop").stdout.strip()
    assert token.startswith("sk-spark-")
    listed = _run(tmp_path, "keys", "list", "--json").stdout
    assert token not in listed
    assert json.loads(listed)[0]["name"] == "laptop"
    assert _run(tmp_path, "keys", "remove", "laptop").returncode == 0
    assert json.loads(_run(tmp_path, "keys", "list", "--json").stdout) == []


def test_demo_model(tmp_path: Path) -> None:
    """``demo-model`` writes a model and says that its text is noise."""
    done = _run(tmp_path, "demo-model", str(tmp_path / "m"))
    assert "noise" in done.stdout
    assert (tmp_path / "m" / "model.safetensors").is_file()


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: "-".join(("spark-llm", *path)))
def test_help_of_every_command(tmp_path: Path, path: tuple[str, ...]) -> None:
    """Each command explains itself, and each of its options and arguments."""
    done = _run(tmp_path, *path, "--help")
    assert done.returncode == 0
    assert "Usage" in done.stdout
    assert all(COMMANDS[path])
    assert str(COMMANDS[path][0]).split()[0] in done.stdout


def test_status_over_tls(short_path: Path) -> None:
    """``status`` reaches a service that speaks TLS, whose certificate only the service can read."""
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=spark"),
            *("-keyout", str(short_path / "key.pem"), "-out", str(short_path / "cert.pem")),
        ],
        check=True,
        capture_output=True,
    )
    settings = {
        "SPARK_LLM_GATEWAY__TLS_CERTIFICATE": str(short_path / "cert.pem"),
        "SPARK_LLM_GATEWAY__TLS_KEY": str(short_path / "key.pem"),
    }
    with stub_service(short_path, **settings) as running:
        port = running.wait_log(r"listening on https://[^:]+:(\d+)")[1]
        done = _run(short_path, "status", "--json", SPARK_LLM_GATEWAY__PORT=port)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["profile"] == "stub"
