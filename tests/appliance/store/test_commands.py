"""The commands as a person or a script types them, in processes of their own."""

import json
import os
import pty
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from spark_llm.store import Store

from tests.hub.pulls import FILES, MODEL
from tests.hub.server import LocalHub

PROGRAM = (
    "import typer; from spark_llm.commands import cache, store\n"
    "from spark_llm.errors import SparkLlmError\n"
    "import sys\n"
    "app = typer.Typer(pretty_exceptions_enable=False); store.register(app); app.add_typer(cache.app, name='cache')\n"
    "try:\n    app()\n"
    "except SparkLlmError as error:\n"
    "    print(f'{error.message} [{error.reason}] {error.hint}', file=sys.stderr); sys.exit(error.exit_code)\n"
)


@dataclass(frozen=True)
class Shell:
    """Runs the commands with one store and one hub."""

    environment: dict[str, str]

    def __call__(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-P", "-c", PROGRAM, *arguments],
            check=False, capture_output=True, text=True, timeout=60, env=self.environment,
        )  # fmt: skip

    def on_a_terminal(self, *arguments: str) -> tuple[int, str]:
        """Exit code and everything that a terminal of 120 columns received."""
        main, side = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *arguments],
            stdin=side, stdout=side, stderr=side, env={**self.environment, "TERM": "xterm", "COLUMNS": "120"},
        )  # fmt: skip
        os.close(side)
        received = b""
        try:
            while block := os.read(main, 2**16):
                received += block
        except OSError:
            pass  # Linux reports the end of a terminal as EIO
        finally:
            os.close(main)
        return process.wait(), received.decode()


@pytest.fixture
def shell(hub: LocalHub, store: Store, tmp_path: Path) -> Shell:
    hub.add(MODEL, FILES)
    return Shell(
        {
            **os.environ,
            "SPARK_LLM_STORE__ENDPOINT": hub.endpoint,
            "SPARK_LLM_STORE__RESERVE_BYTES": "0",
            "SPARK_LLM_STORE__BACKOFF_S": "0.01",
            "SPARK_LLM_PATHS__STATE": str(store.root.parent),
            "SPARK_LLM_PATHS__CACHE": str(tmp_path / "cache"),
        }
    )


def test_a_life_with_one_model(shell: Shell, hub: LocalHub, tmp_path: Path) -> None:
    """pull, models, verify, export, rm, import, verify: each says what it did, and what is there afterwards."""
    pulled = shell("pull", MODEL)
    assert pulled.returncode == 0, pulled.stderr
    assert re.match(
        r"org/name@[0-9a-f]{40}: 3 files, 3.1 MB, 3.1 MB fetched in \d+ s\n/", pulled.stdout
    )
    assert "fetching 100 %" in pulled.stderr
    assert "ready" in shell("models").stdout
    assert [model["state"] for model in json.loads(shell("models", "--json").stdout)] == ["ready"]
    assert shell("verify", MODEL).stdout.endswith(
        "sizes and times as when they were verified: ok\n"
    )
    bundle = tmp_path / "name.tar.zst"
    exported = shell("bundle", "export", MODEL, str(bundle))
    checksum = exported.stdout.split()[-1]
    assert shell("rm", MODEL).stdout.startswith("org/name: removed, ")
    assert "No models" in shell("models").stdout
    assert shell("bundle", "import", str(bundle), "--sha256", "0" * 64).returncode == 1
    hub.seen.clear()
    imported = shell("bundle", "import", str(bundle), "--sha256", checksum)
    assert imported.returncode == 0, imported.stderr
    assert json.loads(shell("verify", MODEL, "--full", "--json").stdout)["ok"] is True
    assert hub.seen == []


def test_nothing_is_imported_from_where_the_command_was_called(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that others write to may hold modules named like the standard library's."""
    for name in ("json", "sys", "selectors", "huggingface_hub"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    pulled = shell("pull", MODEL)
    assert pulled.returncode == 0, pulled.stderr


def test_a_pull_adopts_a_folder(shell: Shell, hub: LocalHub, store: Store, tmp_path: Path) -> None:
    """The folder is named as the caller sees it, and opened for the process that fetches; none is an error."""
    folder = tmp_path / "copied"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(FILES["model.safetensors"])  # type: ignore[arg-type]  # bytes here
    assert "cannot read" in shell("pull", MODEL, "--adopt", str(folder / "none")).stderr
    adopted = shell("pull", MODEL, "--adopt", str(folder))
    assert adopted.returncode == 0, adopted.stderr
    assert hub.downloads("model.safetensors") == []
    weights = next((store.root.parent / "models" / "org--name").rglob("model.safetensors"))
    assert weights.samefile(folder / "model.safetensors")


def test_a_pull_on_a_terminal_draws_bars(shell: Shell, hub: LocalHub) -> None:
    """A person sees a bar for everything and one for each file that moves, with speed and time left."""
    hub.fault("trickle")
    code, text = shell.on_a_terminal("pull", MODEL)
    assert code == 0, text
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert "━" in plain
    assert "model.safetensors" in plain
    assert "3.1/3.1 MB" in plain
    assert "MB/s" in plain


def test_a_pull_for_a_script_prints_events(shell: Shell) -> None:
    """--json gives one object a line, the last one is the outcome, and the exit code agrees."""
    done = [json.loads(line) for line in shell("pull", MODEL, "--json").stdout.splitlines()]
    assert done[-1]["event"] == "result"
    failed = shell("pull", "org/nothing", "--json")
    assert failed.returncode == 2
    assert json.loads(failed.stdout.splitlines()[-1])["reason"] == "not_found"


def test_errors_are_one_line_with_a_hint(shell: Shell) -> None:
    """What cannot be done ends with sentence, reason, hint and the documented exit code."""
    for arguments, code, words in (
        (("pull", "no such name"), 2, "A name looks like ORG/NAME"),
        (("verify", MODEL), 2, "is not in the store"),
        (("rm", MODEL), 2, "is not in the store"),
        (("bundle", "export", MODEL, "/nowhere/x"), 2, "is not in the store"),
        (("bundle", "import", "/nowhere"), 1, "cannot read /nowhere"),
        (("bundle", "import", sys.executable), 3, "is not a model bundle"),
    ):
        ran = shell(*arguments)
        assert (ran.returncode, "Traceback" in ran.stderr) == (code, False), ran.stderr
        assert words in ran.stderr


def test_a_damaged_model_fails_verify_and_names_the_cure(shell: Shell, store: Store) -> None:
    """Verify --full exits 1, names the file, and says which command mends it."""
    shell("pull", MODEL)
    snapshot = store.root.parent / "models" / "org--name"
    weights = next(snapshot.rglob("model.safetensors"))
    weights.write_bytes(b"X" + weights.read_bytes()[1:])
    ran = shell("verify", MODEL)
    assert ran.returncode == 1
    assert "corrupt: model.safetensors" in ran.stdout
    assert f"`spark-llm pull {MODEL}`" in ran.stderr
    assert shell("pull", MODEL).returncode == 0
    assert shell("verify", MODEL, "--full").returncode == 0


def test_caches_are_listed_and_cleared(shell: Shell, tmp_path: Path) -> None:
    """Cache ls, prune and clear work on what is there, and on nothing."""
    assert json.loads(shell("cache", "ls", "--json").stdout) == []
    namespace = tmp_path / "cache" / ("a" * 16)
    (namespace / "data").mkdir(parents=True)
    (namespace / "data" / "kernel").write_bytes(b"x" * 1000)
    assert "not sealed" in shell("cache", "ls").stdout
    assert "0 removed" in shell("cache", "prune").stdout
    assert "1 removed, 1.0 kB freed" in shell("cache", "clear").stdout
    assert not namespace.exists()
