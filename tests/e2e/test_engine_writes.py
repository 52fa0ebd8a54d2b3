"""Where the real engine writes: below its cache namespace and nowhere else.

The engine runs in a mount namespace of its own where the whole machine is read-only, but for the cache folder and for
empty file systems over the places that libraries write to when nobody stops them; those must still be empty at the end.
"""

import http.client
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from spark_llm import argv, manifest
from spark_llm.caches import CacheRoot, Namespace, State
from spark_llm.demo_model import write_demo_model
from spark_llm.profile import Profile, load_profile, shipped_folder

PYTHON = Path(__file__).parents[2] / ".venv-engine" / "bin" / "python"
START_TIMEOUT_S = 280
HOME = Path.home()
WATCHED = [
    *("/tmp", "/var/tmp"),  # noqa: S108  looked at, not used
    *(str(HOME / name) for name in (".cache", ".config", ".triton", ".nv")),
]
"""Where libraries write by themselves; a place that does not exist cannot be made on a read-only machine either."""


class Unix(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=60)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(60)
        self.sock.connect(str(self._path))


def ask(path: Path, method: str, url: str, body: object = None) -> int:
    connection = Unix(path)
    try:
        content = json.dumps(body) if body is not None else None
        connection.request(method, url, content, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
    except OSError:
        return 0
    else:
        return answer.status
    finally:
        connection.close()


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path outside the watched places; not everybody may write to /opt."""
    base = Path("/opt") if os.access("/opt", os.W_OK) else HOME
    made = Path(tempfile.mkdtemp(prefix="sl-", dir=base))
    yield made
    shutil.rmtree(made)


@pytest.mark.timeout(START_TIMEOUT_S + 60)
def test_the_engine_writes_below_its_namespace_only(folder: Path) -> None:
    """A compiled start and a request on a read-only machine: everything written is in the namespace, and sealable."""
    write_demo_model(folder / "model")
    profile = compiled(load_profile("demo", (shipped_folder(),)))
    socket_path = folder / "run" / "engine.sock"
    (folder / "run").mkdir()
    (folder / "engine").mkdir()
    identity = manifest.build(
        engine=manifest.engine_build(PYTHON), kernels="", model="demo", model_commit="0" * 40
    )
    namespace = CacheRoot(folder / "cache").namespace(identity)
    assert namespace.prepare().state is State.NEW
    command = argv.build(
        profile,
        python=folder / "engine" / "bin" / "python",
        model=folder / "model",
        socket=socket_path,
        home=folder / "nowhere",
        shutdown_timeout_s=1,
        inherited=os.environ,
        caches=namespace.environment(),
    )
    script = " && ".join(
        [
            f"mount --bind {folder} {folder}",
            # The checkout may lie below a watched place, and the engine with it.
            f"mount --bind {PYTHON.parents[1]} {folder / 'engine'}",
            *(f"mount -t tmpfs none {place}" for place in WATCHED if Path(place).is_dir()),
            "mount -o remount,bind,ro /",
            'exec "$@"',
        ]
    )
    log = folder / "run" / "log"
    with log.open("wb") as output:
        engine = subprocess.Popen(
            ["unshare", "--mount", "--map-root-user", "--fork", "--pid", "--mount-proc", "--kill-child",
             "sh", "-c", script, "sh", *command.args],
            stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=command.environment,
            cwd=folder,
        )  # fmt: skip
    try:
        wait_ready(engine, socket_path, log)
        question = {"model": "default", "prompt": "Say something.", "max_tokens": 4}
        assert ask(socket_path, "POST", "/v1/completions", question) == 200
        outside = list(written_outside(engine.pid))
        sealed = namespace.seal()
    finally:
        engine.kill()
        engine.wait()
    assert outside == []
    assert not (folder / "nowhere").exists()
    assert sealed > 10, "a compiled start leaves its artefacts in the cache"
    assert {path.name for path in folder.iterdir()} == {"engine", "model", "run", "cache"}
    assert "Read-only file system" not in log.read_text(errors="replace")
    assert_kept(namespace, sealed)


def assert_kept(namespace: Namespace, sealed: int) -> None:
    """The seal holds after the engine is gone."""
    verdict = namespace.check(full=True)
    assert verdict.state in (State.VALID, State.RESTORED), verdict
    assert verdict.files == sealed


def compiled(profile: Profile) -> Profile:
    """The profile with compilation, which is what fills caches."""
    return profile.model_copy(update={"eager": False})


def wait_ready(engine: "subprocess.Popen[bytes]", path: Path, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while ask(path, "GET", "/health") != 200:
        assert engine.poll() is None, log.read_text(errors="replace")[-9000:]
        assert time.monotonic() < deadline, log.read_text(errors="replace")[-9000:]
        time.sleep(0.5)  # the socket appears without an event we could wait for


def written_outside(pid: int) -> Iterator[str]:
    """Files in the watched places, seen through a process inside the mount namespace."""
    inside = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0]
    for place in WATCHED:
        base = Path(f"/proc/{inside}/root{place}")
        yield from (f"{place}/{path.relative_to(base)}" for path in base.rglob("*"))
