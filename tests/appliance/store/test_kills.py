"""kill -9 at any moment: no visible model is ever incomplete or unverified, and the next pull mends the rest."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from spark_llm import config
from spark_llm.commands import store as commands
from spark_llm.errors import TryAgainError
from spark_llm.store import Event, Failure, Note, Request, Store
from spark_llm.store.layout import ModelFolder
from spark_llm.store.process import fetch
from spark_llm.store.progress import encode
from typer import Typer
from typer.testing import CliRunner

from tests.hub import kill_rounds
from tests.hub.pulls import FILES, MODEL, Puller
from tests.hub.server import LocalHub

ROUNDS = 240
SMALL: dict[str, bytes | Path] = {
    "config.json": b"{}",
    "model-00001-of-00002.safetensors": bytes(range(256)) * 400,
    "model-00002-of-00002.safetensors": bytes(reversed(range(256))) * 500,
    "model.safetensors.index.json": b'{"weight_map": {"a": "model-00001-of-00002.safetensors"}}',
    "tokenizer/vocab.json": b"{}" * 10,
}


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory where there is one: a kill loses nothing that was written, so the disk adds only its time."""
    base = Path("/dev/shm")  # noqa: S108  tmpfs on every Linux
    with tempfile.TemporaryDirectory(dir=base if base.is_dir() else None) as folder:
        yield Path(folder)


def test_no_kill_leaves_a_broken_model_visible(hub: LocalHub, memory: Path) -> None:
    """Pulls, repairs and imports are killed 240 times; every visible snapshot stays right to the last byte."""
    hub.add(MODEL, SMALL)
    seed = int.from_bytes(os.urandom(4), "big")
    ran = subprocess.run(
        [sys.executable, kill_rounds.__file__, hub.endpoint, str(memory), str(ROUNDS), str(seed)],
        check=False, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert ran.returncode == 0, f"seed {seed}: {ran.stdout}{ran.stderr}"
    counts = json.loads(ran.stdout)
    assert counts["killed"] + counts["completed"] == ROUNDS
    assert counts["killed"] > ROUNDS // 4, counts
    assert counts["completed"] > 0, counts


def test_a_killed_pull_takes_its_child_along(pull: Puller) -> None:
    """The process with the token and the open file ends with the one that started it; the lock is free then."""
    pull.hub.add(MODEL, FILES)
    pull.hub.fault("stall", after=1_500_000)
    process = subprocess.Popen(pull.request.command(), stdout=subprocess.PIPE)
    assert process.stdout is not None
    pull.hub.wait_for("model.safetensors")
    parts = ModelFolder(pull.store.root, MODEL).path / "incoming"
    deadline = time.monotonic() + 20
    while not any(path.stat().st_size >= 2**20 for path in parts.glob("*/.spark-llm/parts/*")):
        assert time.monotonic() < deadline
        threading.Event().wait(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 1
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with ModelFolder(pull.store.root, MODEL).write_lock.hold("test", wait=True):
        assert (
            not Path(f"/proc/{children[0]}/cmdline").exists()
            or not Path(f"/proc/{children[0]}/cmdline").read_text()
        )
    pull.hub.faults.clear()
    pull.hub.released.set()
    assert pull().result.fetched_bytes < len(FILES["model.safetensors"])  # type: ignore[arg-type]  # bytes here


@pytest.fixture
def doomed(monkeypatch: pytest.MonkeyPatch, store: Store) -> Request:
    """A request whose process is killed in the middle, as the kernel does when memory runs out."""
    said = encode(Note("so far, so good"))
    monkeypatch.setattr(
        Request, "command", lambda _: ["/bin/sh", "-c", f"echo '{said}'; kill -9 $$"]
    )
    return Request(str(store.root), MODEL, **config.Store().model_dump())


def assert_silent(events: list[Event]) -> None:
    last = events[-1]
    assert isinstance(last, Failure)
    assert (last.reason, last.exit_code) == ("aborted", 75)
    assert "status -9" in last.message


def test_a_killed_fetch_ends_with_a_failure(doomed: Request, store: Store) -> None:
    """Whoever follows the events is told that there is no model, although the process could not say so."""
    assert_silent(list(store.fetch(doomed)))


@pytest.mark.anyio
async def test_a_killed_fetch_ends_with_a_failure_for_the_service_too(doomed: Request) -> None:
    """The service hears the same as the command line."""
    assert_silent([event async for event in fetch(doomed)])


@pytest.mark.usefixtures("doomed")
def test_pull_fails_when_its_fetch_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command exits with 75, so that its unit tries again; a script reads the failure as the last line."""
    monkeypatch.setenv("SPARK_LLM_PATHS__STATE", str(tmp_path))
    app = Typer(pretty_exceptions_enable=False)
    commands.register(app)
    plain = CliRunner().invoke(app, ["pull", MODEL])
    assert isinstance(plain.exception, TryAgainError)
    script = CliRunner().invoke(app, ["pull", MODEL, "--json"])
    assert script.exit_code == 75
    assert json.loads(script.stdout.splitlines()[-1])["event"] == "failure"


def test_pull_without_an_outcome_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Events that end with neither result nor failure are no success."""
    monkeypatch.setenv("SPARK_LLM_PATHS__STATE", str(tmp_path))
    monkeypatch.setattr(Store, "fetch", lambda *_, **__: iter([Note("hello")]))
    app = Typer(pretty_exceptions_enable=False)
    commands.register(app)
    assert isinstance(CliRunner().invoke(app, ["pull", MODEL]).exception, TryAgainError)
