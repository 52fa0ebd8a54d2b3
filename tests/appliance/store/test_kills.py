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
from spark_llm.store.layout import ModelFolder

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
