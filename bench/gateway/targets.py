"""What is measured: each target is started on loopback, answers /v1/chat/completions, and is stopped by its pid.

All forward to the same synthetic upstream. The target under load has core 0 for itself, all else runs on core 1. A
target runs in a session of its own, so its CPU time and memory are those of the session's processes; the engine that
spark-llm starts is in yet another session and does not count.
"""

import contextlib
import http.client
import json
import os
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
READY_TIMEOUT_S = 120.0
TARGET_CORE, OTHER_CORE = 0, 1
_TICKS = os.sysconf("SC_CLK_TCK")
_BODY = json.dumps(
    {
        "model": "default",
        "messages": [{"role": "user", "content": "hi"}],
        "stream": True,
        "max_tokens": 8,
    }
)


@dataclass(frozen=True)
class Target:
    """A server under load.

    Attributes:
        name: as in the tables.
        where: arguments of ``load`` that reach it.
        session: session id of its processes.
    """

    name: str
    where: tuple[str, ...]
    session: int

    def cpu_s(self) -> float:
        """CPU time of its processes so far, in seconds; the kernel counts in 1/100 s."""
        return sum(int(f[11]) + int(f[12]) for _, f in self._stats()) / _TICKS

    def rss_mb(self) -> float:
        """Resident memory of its processes, in MB (10^6 bytes)."""
        pages = sum(int(fields[21]) for _, fields in self._stats())
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def _stats(self) -> Iterator[tuple[int, list[str]]]:
        """Pid and the fields of /proc/PID/stat from the third on (proc_pid_stat(5))."""
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = path.read_text().rpartition(") ")[2].split()
                if int(fields[3]) == self.session:
                    yield int(path.parent.name), fields


def compile_tools(folder: Path) -> None:
    """Build ``load`` and ``upstream`` into ``folder``."""
    for name in ("load", "upstream"):
        subprocess.run(["cc", "-O2", "-o", folder / name, HERE / f"{name}.c"], check=True)


@contextlib.contextmanager
def direct(folder: Path, step_us: int, core: int = TARGET_CORE) -> Iterator[Target]:
    """The upstream itself, over TCP."""
    port = free_port()
    command = [folder / "upstream", "--port", port, "--step-us", step_us]
    with _started("direct", command, port, folder, core=core) as target:
        yield target


@contextlib.contextmanager
def direct_unix(folder: Path, step_us: int, core: int = TARGET_CORE) -> Iterator[Target]:
    """The upstream itself, over a Unix socket."""
    path = folder / "upstream.sock"
    command = [folder / "upstream", "--uds", path, "--step-us", step_us]
    with _started("direct, Unix socket", command, path, folder, core=core) as target:
        yield target


@contextlib.contextmanager
def nginx(folder: Path, step_us: int) -> Iterator[Target]:
    """Nginx before the upstream."""
    with (
        direct_unix(folder, step_us, OTHER_CORE) as upstream,
        nginx_before(folder, Path(upstream.where[1])) as target,
    ):
        yield target


@contextlib.contextmanager
def nginx_before(folder: Path, engine: Path, core: int | None = TARGET_CORE) -> Iterator[Target]:
    """Debian's nginx with one worker, unbuffered, as one configures it for server-sent events, before a socket."""
    port = free_port()
    configuration = folder / "nginx.conf"
    text = (HERE / "nginx.conf").read_text(encoding="utf-8")
    configuration.write_text(text.format(folder=folder, engine=engine, port=port), encoding="utf-8")
    command = ["nginx", "-c", configuration, "-p", folder, "-e", folder / "nginx.err"]
    if os.geteuid() == 0:  # its worker would change to a user who may not enter the folder
        command += ["-g", "user root;"]
    with _started("nginx", command, port, folder, core=core) as target:
        yield target


@contextlib.contextmanager
def litellm(folder: Path, step_us: int) -> Iterator[Target]:
    """LiteLLM's proxy with one worker (its default), found as ``litellm`` on PATH."""
    port = free_port()
    with direct(folder, step_us, OTHER_CORE) as upstream:
        configuration = folder / "litellm.yaml"
        configuration.write_text(
            (HERE / "litellm.yaml").read_text().format(upstream=upstream.where[1]), encoding="utf-8"
        )
        command = ["litellm", "--config", configuration, "--host", "127.0.0.1", "--port", port]
        environment = {
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # no look-up on the network
            "LITELLM_LOG": "ERROR",
            "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",  # loopback, no keys, as the others
            "LITELLM_MODE": "PRODUCTION",
        }
        with _started("LiteLLM", command, port, folder, environment) as target:
            yield target


@contextlib.contextmanager
def spark_llm(folder: Path, step_us: int) -> Iterator[Target]:
    """The whole appliance as `spark-llm serve` runs it, with the synthetic upstream as its engine."""
    port = free_port()
    profiles = folder / "profiles"
    profiles.mkdir(exist_ok=True)
    # The upstream's tokens are not the demo's, so the canary takes any.
    (profiles / "synthetic.toml").write_text('extends = "demo"\n\n[canary]\npattern = ""\n')
    environment = {
        "SPARK_LLM_PATHS__PROFILES": str(profiles),
        "SPARK_LLM_ENGINE__PYTHON": str(stand_in_engine(folder, step_us)),
        "SPARK_LLM_PATHS__STATE": str(folder / "state"),
        "SPARK_LLM_PATHS__CACHE": str(folder / "cache"),
        "SPARK_LLM_PATHS__RUNTIME": str(folder / "run"),
    }
    command = ["spark-llm", "serve", "--profile", "synthetic", "--port", port]
    with _started("spark-llm", command, port, folder, environment) as target:
        yield target


ALL = {
    "direct": direct,
    "direct-unix": direct_unix,
    "nginx": nginx,
    "litellm": litellm,
    "spark-llm": spark_llm,
}


def stand_in_engine(folder: Path, step_us: int) -> Path:
    """A program for ``engine.python``: the upstream, in what looks like an environment with vLLM."""
    record = folder / "engine/lib/python3/site-packages/vllm-0+cpu.dist-info/RECORD"
    record.parent.mkdir(parents=True, exist_ok=True)
    record.touch()
    program = folder / "engine/bin/python"
    program.parent.mkdir(exist_ok=True)
    upstream = shlex.quote(str(folder / "upstream"))
    program.write_text(
        f'#!/bin/sh\nexec taskset -c {OTHER_CORE} {upstream} --step-us {step_us} "$@"\n',
        encoding="utf-8",
    )
    program.chmod(0o755)
    return program


def free_port() -> int:
    """A TCP port of loopback that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _started(  # noqa: PLR0913  what a process is started with
    name: str,
    command: Sequence[object],
    address: int | Path,
    folder: Path,
    environment: dict[str, str] | None = None,
    *,
    core: int | None = TARGET_CORE,
) -> Iterator[Target]:
    pinned = () if core is None else ("taskset", "-c", str(core))
    log = folder / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*pinned, *(str(part) for part in command)],
            env=os.environ | (environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            _await_stream(process, address, log)
            where = (
                ("--port", str(address)) if isinstance(address, int) else ("--uds", str(address))
            )
            yield Target(name, where, process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _await_stream(process: "subprocess.Popen[bytes]", address: int | Path, log: Path) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            if _streams(address):
                return
        time.sleep(0.1)
    raise SystemExit(f"{process.args!r} does not answer; its log: {log.read_text()[-2000:]}")


def _streams(address: int | Path) -> bool:
    connection = http.client.HTTPConnection(
        "127.0.0.1", address if isinstance(address, int) else 0, timeout=10
    )
    with contextlib.closing(connection):
        if isinstance(address, Path):
            connection.sock = socket.socket(socket.AF_UNIX)
            connection.sock.connect(str(address))
        connection.request(
            "POST", "/v1/chat/completions", _BODY, {"content-type": "application/json"}
        )
        answer = connection.getresponse()
        return answer.status == http.HTTPStatus.OK and answer.read().endswith(b"data: [DONE]\n\n")
