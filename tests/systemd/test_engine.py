"""The service with the real engine under a real systemd: start, death, drain."""

import json

import pytest
from container import Container

SERVICE = "spark-llm.service"
CGROUP = "/sys/fs/cgroup/system.slice/spark-llm.service"


@pytest.fixture(scope="module")
def started(installed: Container) -> tuple[Container, list[str]]:
    """The service started and ready, and every message of that start as PID 1 received it."""
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
    status, body = ready.http(
        "/v1/completions", body={"model": "default", "prompt": "a", "max_tokens": 4}
    )
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
    ready.wait_state("preflight", "loading", "warming", timeout=30)
    assert ready.http("/livez")[0] == 200
    ready.wait_state("ready", timeout=240)
    assert ready.main_pid() == pid
    assert ready.http("/api/v1/status")[1]["restarts"] == 1


def test_killed_guard_does_not_stop_tokens(ready: Container) -> None:
    """``kill -9`` of the controller's own guard leaves the engine serving."""
    ready.run("kill", "-KILL", *(str(pid) for pid in _processes(ready, f"{CGROUP}/guard")))
    status, _ = ready.http(
        "/v1/completions", body={"model": "default", "prompt": "a", "max_tokens": 4}
    )
    assert status == 200


def test_stop_under_load_drains(ready: Container) -> None:
    """A stop lets a running stream end with its last token, exits with 0 and leaves no process."""
    ready.write(
        "/opt/stream.json",
        json.dumps(
            {
                "model": "default",
                "prompt": "a",
                "max_tokens": 1500,
                "ignore_eos": True,
                "stream": True,
            }
        ),
    )
    stream = ready.spawn(
        "curl", "-sN", "-H", "Content-Type: application/json", "-d", "@/opt/stream.json",
        "http://127.0.0.1:8000/v1/completions",
    )  # fmt: skip
    assert stream.stdout is not None
    assert stream.stdout.readline().startswith("data:")
    cursor = ready.cursor()
    ready.systemctl("stop", SERVICE)
    text = stream.communicate(timeout=30)[0]
    assert text.rstrip().endswith("data: [DONE]")
    shown = ready.show(SERVICE, "ExecMainStatus", "ExecMainCode", "Result")
    assert shown == {"ExecMainStatus": "0", "ExecMainCode": "1", "Result": "success"}
    said = [entry["MESSAGE"] for entry in ready.journal("_PID=1", after=cursor)]
    assert not any("Killing process" in line for line in said)


def _processes(machine: Container, folder: str) -> list[int]:
    """Process ids in a cgroup and below it, as the container numbers them."""
    text = machine.run("find", folder, "-name", "cgroup.procs", "-exec", "cat", "{}", "+").stdout
    return [int(line) for line in text.split()]
