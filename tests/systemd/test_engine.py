"""The service with the real engine under a real systemd, over TLS: start, death, drain, a renewed certificate."""

import json
import subprocess
from collections.abc import Callable

import pytest
from container import CONFIG, Container

SERVICE = "spark-llm.service"
CGROUP = "/sys/fs/cgroup/system.slice/spark-llm.service"
TLS = "/etc/spark-llm/tls"
TOKENS = 1500
DRAIN_S = 150
"""For all of :data:`TOKENS` on two busy cores; an idle machine makes them in seconds."""
COMPLETION = {"model": "default", "prompt": "a", "max_tokens": 4}


@pytest.fixture(scope="module")
def started(installed: Container) -> tuple[Container, list[str]]:
    """The service started and ready, and every message of that start as PID 1 received it."""
    installed.certificate(TLS, "first")
    installed.write(
        CONFIG,
        f'[gateway]\ntls_certificate = "{TLS}/cert.pem"\ntls_key = "{TLS}/key.pem"\n'
        f"[engine]\ndrain_timeout_s = {DRAIN_S}\n",
    )
    installed.url = "https://127.0.0.1:8000"
    installed.systemctl("log-level", "debug")
    cursor = installed.cursor()
    installed.systemctl("start", SERVICE)
    early = installed.systemctl("status", SERVICE)
    installed.systemctl("start", "spark-llm-ready.service")
    installed.systemctl("log-level", "info")
    seen = [
        entry["MESSAGE"].partition("(")[2].removesuffix(")")
        for entry in installed.journal("_PID=1", after=cursor)
        if entry["MESSAGE"].startswith(f"{SERVICE}: Got notification message from PID")
    ]
    return installed, [*seen, early]


@pytest.fixture
def ready(started: tuple[Container, list[str]]) -> Container:
    """The service ready; a test that broke it left it to recover."""
    machine = started[0]
    machine.systemctl("start", SERVICE)
    machine.wait_state("ready", timeout=240)
    return machine


def test_messages_of_a_start(started: tuple[Container, list[str]]) -> None:
    """READY comes with the API, long before tokens; then the phases, percent rising to ready; MAINPID never."""
    *messages, early = started[1]
    ready = next(n for n, message in enumerate(messages) if "READY=1" in message)
    status = [message.partition("STATUS=")[2] for message in messages if "STATUS=" in message]
    assert not any("STATUS=ready" in message for message in messages[:ready])
    percents = [
        int(text.split()[1]) for text in status if text.split()[1:2] and text.split()[1].isdigit()
    ]
    assert percents == sorted(percents)
    assert len(percents) >= 3
    assert [
        state
        for state in ("preflight", "loading", "warming", "ready")
        if any(text.startswith(state) for text in status)
    ] == ["preflight", "loading", "warming", "ready"]
    assert any("WATCHDOG=1" in message for message in messages)
    assert not any("MAINPID" in message for message in messages)
    assert "Status:" in early


def test_ready_unit_means_tokens(ready: Container) -> None:
    """Once ``spark-llm-ready`` is started, a completion comes back with tokens."""
    ready.systemctl("start", "spark-llm-ready.service")
    status, body = ready.http("/v1/completions", body=COMPLETION)
    assert status == 200
    assert body["usage"]["completion_tokens"] == 4


def test_every_part_is_in_its_cgroup(ready: Container) -> None:
    """Controller, engine and guard live in sub-cgroups of the service, and nothing lives outside them."""
    inside = {
        name: set(_processes(ready, f"{CGROUP}/{name}"))
        for name in ("controller", "engine", "guard")
    }
    assert inside["controller"] == {ready.main_pid()}
    assert len(inside["engine"]) >= 3  # API, core, worker
    assert len(inside["guard"]) == 1
    assert ready.run("cat", f"{CGROUP}/cgroup.procs").stdout == ""


def test_journal_has_fields(ready: Container) -> None:
    """A line of the journal says which run, manifest and profile it belongs to, and in which state it was written."""
    run = ready.http("/api/v1/status")[1]
    entries = ready.journal("-u", SERVICE, f"SPARK_LLM_RUN_ID={run['run_id']}")
    assert entries
    ready_line = next(entry for entry in entries if "is ready after" in entry["MESSAGE"])
    assert ready_line["SPARK_LLM_PROFILE"] == "demo"
    assert ready_line["SPARK_LLM_STATE"] in {"warming", "ready"}
    assert ready_line["SPARK_LLM_REASON"] == "ok"
    assert ready_line["SPARK_LLM_MANIFEST"] == run["manifest"]
    assert ready_line["PRIORITY"] == "6"


def test_killing_the_engines_cgroup_leaves_the_controller(ready: Container) -> None:
    """After ``cgroup.kill`` of the engine the same controller answers, names the cause and starts another engine."""
    pid = ready.main_pid()
    ready.run("sh", "-c", f"echo 1 > {CGROUP}/engine/cgroup.kill")
    ready.wait_state("preflight", "loading", "warming", timeout=60)
    assert ready.http("/livez")[0] == 200
    ready.wait_state("ready", timeout=240)
    assert ready.main_pid() == pid
    assert ready.http("/api/v1/status")[1]["restarts"] == 1


def test_killed_guard_is_replaced(ready: Container) -> None:
    """``kill -9`` of the controller's own guard leaves the engine serving, and another guard takes its place."""
    first = _processes(ready, f"{CGROUP}/guard")
    ready.run("kill", "-KILL", *(str(pid) for pid in first))
    assert ready.http("/v1/completions", body=COMPLETION)[0] == 200
    second = ready.wait(lambda: _processes(ready, f"{CGROUP}/guard"), timeout=60)
    assert not set(first) & set(second)


def test_killed_controller_leaves_nothing_of_its_engine(ready: Container) -> None:
    """After ``kill -9`` of the controller connections wait in the socket, the old engine is gone, tokens return."""
    first = ready.main_pid()
    restarts = int(ready.show(SERVICE, "NRestarts")["NRestarts"])
    old = [pid for part in ("engine", "guard") for pid in _processes(ready, f"{CGROUP}/{part}")]
    stream = _stream(ready)
    ready.run("kill", "-KILL", str(first))
    held = [
        ready.spawn("curl", "-skm60", "-o", "/dev/null", "-w", "%{http_code}", f"{ready.url}/livez")
        for _ in range(8)
    ]
    assert [client.communicate(timeout=90)[0] for client in held] == ["200"] * 8
    text = stream.communicate(timeout=60)[0]
    assert stream.returncode != 0  # the client can tell that its stream was cut
    assert "[DONE]" not in text
    left = ready.run("ps", "-o", "pid=,args=", "-p", ",".join(map(str, [first, *old])), check=False)
    assert left.stdout == ""
    assert ready.main_pid() not in {0, first}
    assert int(ready.show(SERVICE, "NRestarts")["NRestarts"]) == restarts + 1
    ready.wait_state("ready", timeout=240)
    assert ready.http("/v1/completions", body=COMPLETION)[0] == 200


def test_certificate_changes_under_a_token_stream(ready: Container) -> None:
    """A renewed certificate is shown to new connections while a stream runs, and the stream ends whole."""
    assert ready.subject() == "first"
    stream = _stream(ready)
    frozen = f"{CGROUP}/engine/cgroup.freeze"
    ready.run("sh", "-c", f"echo 1 > {frozen}")  # the stream cannot end before the reload
    try:
        ready.certificate(TLS, "second")
        ready.systemctl("reload", SERVICE)
        ready.wait(lambda: ready.subject() == "second", timeout=60)
    finally:
        ready.run("sh", "-c", f"echo 0 > {frozen}")
    _assert_whole(stream)


def test_stop_under_load_drains(ready: Container, drop_in: Callable[[str, str], None]) -> None:
    """A stop lets a running stream end with its last token, exits with 0 and leaves no process."""
    drop_in(SERVICE, f"[Service]\nTimeoutStopSec={DRAIN_S + 30}\n")
    stream = _stream(ready)
    cursor = ready.cursor()
    ready.systemctl("stop", SERVICE, timeout=DRAIN_S + 60)
    _assert_whole(stream)
    shown = ready.show(SERVICE, "ExecMainStatus", "ExecMainCode", "Result")
    assert shown == {"ExecMainStatus": "0", "ExecMainCode": "1", "Result": "success"}
    said = [entry["MESSAGE"] for entry in ready.journal("_PID=1", after=cursor)]
    assert not any("Killing process" in line for line in said)


def _stream(machine: Container) -> "subprocess.Popen[str]":
    """A client that reads a stream of :data:`TOKENS`, whose first event has come."""
    body = {
        "model": "default",
        "prompt": "a",
        "max_tokens": TOKENS,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    client = machine.spawn(
        "curl", "-sNk", "-H", "Content-Type: application/json", "-d", json.dumps(body),
        f"{machine.url}/v1/completions",
    )  # fmt: skip
    assert client.stdout is not None
    assert client.stdout.readline().startswith("data:")
    return client


def _assert_whole(client: "subprocess.Popen[str]") -> None:
    """The stream has all its tokens and its end."""
    *_, usage, end = client.communicate(timeout=DRAIN_S)[0].split("\n\n")[:-1]
    assert end == "data: [DONE]"
    assert json.loads(usage.removeprefix("data: "))["usage"]["completion_tokens"] == TOKENS
    assert client.returncode == 0


def _processes(machine: Container, folder: str) -> list[int]:
    """Process ids in a cgroup and below it, as the container numbers them."""
    text = machine.run("find", folder, "-name", "cgroup.procs", "-exec", "cat", "{}", "+").stdout
    return [int(line) for line in text.split()]
