"""Start, fail, drain and stop, with the real command and a stub engine that shows the fault.

Over 400 lines because each state is reached through the others, with the same few helpers.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from spark_llm.argv import SOCKET_PATH_LIMIT

from tests.appliance.service import (
    Service,
    environment,
    processes_below,
    processes_of,
    service,
    stub_python,
    stub_service,
    wait_for,
)

CHAT = "/v1/chat/completions"
CRAWLED = 12
"""Steps of an engine that makes one a second: four freeze timeouts."""
SCRAPES = 20
"""Four seconds of them."""


def _no_process_left(folder: Path) -> None:
    wait_for(lambda: not processes_below(folder), 30, lambda: f"left: {processes_below(folder)}")


def _refused(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "spark_llm.cli", "serve", *arguments],
        env=environment(folder, **env),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_start_serve_stop(short_path: Path) -> None:
    """A service becomes ready, answers, and ends with 0 on SIGTERM leaving no process."""
    with stub_service(short_path) as running:
        running.listening()
        assert running.get("/livez")[0] == 200
        running.wait_state("ready")
        assert running.get("/startupz")[0] == 200
        code, body = running.get("/readyz?verbose")
        assert (code, body["ready"]) == (200, True)
        assert running.post(CHAT, {"model": "default"})[0] == 200
        assert "vllm:num_requests_running" in running.get("/metrics")[1]
        assert running.stop() == 0
    _no_process_left(short_path)


def test_second_start_says_how_long_it_will_take(short_path: Path) -> None:
    """A start after the first shows the time left, from what the last one took."""
    with stub_service(short_path) as running:
        running.listening().wait_state("ready")
        assert running.stop() == 0
    with stub_service(short_path, "hang-at-load") as running:
        running.listening()
        wait_for(lambda: running.get("/startupz")[1]["eta_s"] is not None, 30, running.text)


def test_events_tell_the_story(short_path: Path) -> None:
    """The event stream shows the states of a start in order and ends with the service."""
    with stub_service(short_path) as running:
        running.listening()
        states: list[str] = []

        def follow() -> None:
            with urllib.request.urlopen(f"http://127.0.0.1:{running.port}/api/v1/events") as stream:
                states.extend(
                    line.split(b'"state": "')[1].split(b'"')[0].decode()
                    for line in stream
                    if b'"state": ' in line
                )

        thread = threading.Thread(target=follow)
        thread.start()
        running.wait_state("ready")
        assert running.stop() == 0
        thread.join(30)
    order = list(dict.fromkeys(states))
    assert order == [
        "preflight",
        "loading",
        "warming",
        "ready",
        "draining",
        "stopping",
        "stopped",
    ]


def test_sigterm_lets_running_requests_finish(short_path: Path) -> None:
    """SIGTERM refuses new requests and lets a running stream finish; exit 0."""
    with stub_service(short_path, SPARK_LLM_ENGINE__DRAIN_TIMEOUT_S="120") as running:
        running.listening()
        engine = running.wait_state("ready")["engine_pid"]
        url = f"http://127.0.0.1:{running.port}{CHAT}"
        body = b'{"model": "held", "stream": true}'
        request = urllib.request.Request(url, data=body)
        with urllib.request.urlopen(request, timeout=60) as stream:
            first = stream.readline()
            assert b"w0" in first
            running.process.send_signal(signal.SIGTERM)
            running.wait_state("draining")
            code, answer = running.post(CHAT, {"model": "default"})
            assert (code, answer["error"]["code"]) == (503, "draining")
            os.kill(engine, signal.SIGUSR1)
            rest = stream.read()
        assert rest.endswith(b"data: [DONE]\n\n")
        assert running.process.wait(30) == 0
    _no_process_left(short_path)


def test_drain_timeout_cuts_what_is_left(short_path: Path) -> None:
    """A stream that outlasts the drain timeout ends with an error event, and the service still ends with 0."""
    with stub_service(short_path, SPARK_LLM_ENGINE__DRAIN_TIMEOUT_S="0.5") as running:
        running.listening()
        running.wait_state("ready")
        url = f"http://127.0.0.1:{running.port}{CHAT}"
        request = urllib.request.Request(url, data=b'{"model": "endless", "stream": true}')
        with urllib.request.urlopen(request, timeout=60) as stream:
            stream.readline()
            running.process.send_signal(signal.SIGTERM)
            rest = stream.read()
        assert b'"code": "draining"' in rest
        assert running.process.wait(30) == 0
    _no_process_left(short_path)


def test_second_signal_stops_at_once(short_path: Path) -> None:
    """A second Ctrl-C does not wait for requests or for an engine that ignores SIGTERM."""
    settings = {
        "SPARK_LLM_ENGINE__DRAIN_TIMEOUT_S": "120",
        "SPARK_LLM_ENGINE__STOP_TIMEOUT_S": "120",
    }
    with stub_service(short_path, "deaf", **settings) as running:
        running.listening()
        running.wait_state("ready")
        url = f"http://127.0.0.1:{running.port}{CHAT}"
        request = urllib.request.Request(url, data=b'{"model": "endless", "stream": true}')
        with urllib.request.urlopen(request, timeout=60) as stream:
            stream.readline()
            running.process.send_signal(signal.SIGINT)
            running.wait_state("draining")
            running.process.send_signal(signal.SIGINT)
            assert running.process.wait(60) == 0
    _no_process_left(short_path)


def test_deaf_engine_is_killed_after_its_grace(short_path: Path) -> None:
    """An engine that ignores SIGTERM is killed, its children too."""
    with stub_service(short_path, "deaf", SPARK_LLM_ENGINE__STOP_TIMEOUT_S="0.5") as running:
        running.listening()
        running.wait_state("ready")
        assert running.stop(timeout_s=15) == 0
    _no_process_left(short_path)


def test_killed_controller_leaves_nothing(short_path: Path) -> None:
    """SIGKILL of the controller takes the engine with it, also a worker that asks for no signal at its parent's end."""
    with stub_service(short_path) as running:
        running.listening()
        running.wait_state("ready")
        running.process.kill()
        running.process.wait()
    _no_process_left(short_path)


def test_killed_engine_is_restarted(short_path: Path) -> None:
    """SIGKILL of the engine brings a new one, and its orphaned worker is gone first."""
    with stub_service(short_path) as running:
        running.listening()
        first = running.wait_state("ready")
        os.kill(first["engine_pid"], signal.SIGKILL)
        wait_for(lambda: running.status()["run_id"] != first["run_id"], 30, running.text)
        second = running.wait_state("ready")
        assert second["engine_pid"] != first["engine_pid"]
        assert (second["restarts"], second["restarts_left"]) == (1, 2)
        assert running.stop() == 0
    _no_process_left(short_path)


def test_restart_budget_ends_in_failed_with_the_last_lines(short_path: Path) -> None:
    """An engine that always dies is restarted within the budget, then it is failed with its last log lines."""
    with stub_service(short_path, "exit-at-load", SPARK_LLM_ENGINE__RESTART_BUDGET="1") as running:
        running.listening()
        status = running.wait_state("failed")
        assert status["reason"] == "restart_budget"
        assert "ValueError: the weights are wrong" in status["last_log"]
        code, body = running.get("/startupz")
        assert (code, body["reason"]) == (503, "restart_budget")
        assert running.post(CHAT, {"model": "x"})[1]["error"]["code"] == "restart_budget"
        assert running.get("/livez")[0] == 200
        assert running.stop() == 1
    _no_process_left(short_path)


def test_cause_is_found_above_a_long_traceback(short_path: Path) -> None:
    """What the engine core says before the API process's long traceback is the cause, is shown, and is not retried."""
    with stub_service(short_path, "no-cache-at-load") as running:
        running.listening()
        status = running.wait_state("failed")
        assert status["reason"] == "does_not_fit"
        assert "code 1 while reading" in status["message"]
        assert ": ValueError: 0.5 GiB KV cache is needed" in status["message"]
        assert status["last_log"][0].endswith("KV cache memory (0.2 GiB).")
        assert len(status["last_log"]) > 1
        assert status["restarts"] == 1


def test_crash_with_code_0_is_a_crash(short_path: Path) -> None:
    """An engine that exits with 0 when its core dies, as vLLM does, is restarted all the same."""
    with stub_service(short_path, "crash-later") as running:
        running.listening()
        running.wait_log(r"the engine exited with code 0 \(engine_exited\)")
        wait_for(lambda: running.status()["restarts"] >= 1, 30, running.text)


def test_engine_that_nobody_can_guard_is_ended(short_path: Path) -> None:
    """Where no guard can be started, for want of memory, the engine does not live on without one."""
    site = short_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "from spark_llm.watchman import Watchman\n"
        "def fail(_): raise OSError(12, 'Cannot allocate memory')\n"
        "Watchman._start = fail\n"
    )
    with stub_service(short_path, PYTHONPATH=str(site)) as running:
        running.listening()
        status = running.wait_state("failed")
        assert "Cannot allocate memory" in status["message"]
        controller = f"{running.process.pid}: "
        wait_for(
            lambda: all(line.startswith(controller) for line in processes_below(short_path)),
            30,
            lambda: f"left: {processes_below(short_path)}",
        )


def test_hang_during_load_is_noticed(short_path: Path) -> None:
    """A load that neither logs, computes nor reads is ended as stalled."""
    settings = {"SPARK_LLM_ENGINE__STALL_TIMEOUT_S": "1.5", "SPARK_LLM_ENGINE__RESTART_BUDGET": "0"}
    with stub_service(short_path, "hang-at-load", **settings) as running:
        running.listening()
        running.wait_state("failed", timeout_s=60)
        assert "(engine_stalled)" in running.text()
    _no_process_left(short_path)


def test_wrong_canary_is_never_ready(short_path: Path) -> None:
    """An engine that answers the canary wrongly does not become ready and is not restarted in a loop."""
    with stub_service(short_path, "wrong-canary") as running:
        running.listening()
        status = running.wait_state("failed")
        assert status["reason"] == "canary"
        assert running.get("/readyz")[0] == 503
        assert "ready after" not in running.text()


def test_canary_on_demand_closes_and_opens_the_door(short_path: Path) -> None:
    """A wrong answer turns requests away, no answer changes nothing but is told, a right one lets them in again."""
    answer = short_path / "answer"
    answer.write_text("")
    with stub_service(short_path, f"canary:{answer}") as running:
        running.listening()
        ready = running.wait_state("ready")

        def ask(how: str) -> tuple[int, str, str]:
            answer.write_text(how)
            code, body = running.post("/api/v1/canary", {})
            return code, body.get("reason") or body.get("error", {}).get("code", ""), state()

        def state() -> str:
            now = running.status()
            assert (now["phase"], now["percent"]) == ("", 100)
            assert bool(now["proven"]) == (now["state"] == "ready")
            assert running.get("/readyz")[0] == (200 if now["state"] == "ready" else 503)
            code, body = running.post(CHAT, {"model": "x"})
            if now["state"] == "degraded":
                assert (code, body["error"]["code"]) == (503, "canary")
            return str(now["state"])

        assert ask("error") == (503, "timeout", "ready")
        assert ask("wrong") == (503, "canary", "degraded")
        assert ask("error") == (503, "timeout", "degraded")
        assert ask("") == (200, "", "ready")
        assert ask("") == (200, "", "ready")
        assert running.status()["run_id"] == ready["run_id"]


@pytest.mark.parametrize("fault", ["reset-in-canary", "error-in-canary"])
def test_engine_that_dies_of_the_canary(short_path: Path, fault: str) -> None:
    """An engine that dies during the canary is told by its own cause and started again: its tokens were not wrong."""
    with stub_service(short_path, fault) as running:
        running.listening()
        running.wait_log(
            r"exited with code 1 while asking the canary: torch.OutOfMemoryError: 2 GiB \(memory\)"
        )
        first = running.wait_state("preflight", "waiting_memory", "loading")
        assert first["restarts"] == 1


def test_canary_without_an_answer(short_path: Path) -> None:
    """An engine that neither answers the canary nor moves has stalled, which a restart may cure."""
    settings = {"SPARK_LLM_ENGINE__STALL_TIMEOUT_S": "1.5", "SPARK_LLM_ENGINE__RESTART_BUDGET": "0"}
    with stub_service(short_path, "mute-in-canary", **settings) as running:
        running.listening()
        status = running.wait_state("failed", timeout_s=60)
        assert status["reason"] == "restart_budget"
        assert "while it was asking the canary (engine_stalled)" in running.text()


def test_frozen_scheduler_is_restarted(short_path: Path) -> None:
    """Requests that run while the iteration counter stands still mean a new engine, and the old one is gone."""
    with stub_service(short_path, "frozen", SPARK_LLM_ENGINE__FREEZE_TIMEOUT_S="1") as running:
        running.listening()
        first = running.wait_state("ready")
        running.wait_log(r"\(engine_stalled\)")
        wait_for(lambda: running.status()["run_id"] not in {"", first["run_id"]}, 30, running.text)
        assert first["engine_pid"] not in {running.status()["engine_pid"], None}
        assert processes_of(first["engine_pid"]) == []


def test_core_that_froze_while_idle_is_restarted(short_path: Path) -> None:
    """A request that waits in vain counts, though the gauge, which only a step sets, still says that nothing runs."""
    with stub_service(short_path, "frozen-idle", SPARK_LLM_ENGINE__FREEZE_TIMEOUT_S="1") as running:
        running.listening()
        first = running.wait_state("ready")
        code, body = running.post(CHAT, {"model": "held"})
        assert (code, body["error"]["code"]) == (503, "engine_exited")
        running.wait_log(r"\(engine_stalled\)")
        wait_for(lambda: running.status()["run_id"] not in {"", first["run_id"]}, 30, running.text)


def test_client_that_does_not_read_is_no_frozen_core(short_path: Path) -> None:
    """An engine that has nothing left to do is left alone while its answer waits for a client."""
    with stub_service(short_path, "frozen-idle", SPARK_LLM_ENGINE__FREEZE_TIMEOUT_S="1") as running:
        running.listening()
        first = running.wait_state("ready")
        url = f"http://127.0.0.1:{running.port}{CHAT}"
        request = urllib.request.Request(url, data=b'{"model": "flood", "stream": true}')
        with urllib.request.urlopen(request, timeout=60):
            enough = running.text().count("| scraped") + SCRAPES
            wait_for(lambda: running.text().count("| scraped") >= enough, 60, running.text)
            assert running.status()["run_id"] == first["run_id"]
        assert "engine_stalled" not in running.text()


def test_long_prefill_is_not_restarted(short_path: Path) -> None:
    """An engine whose counter moves once in many readings works, however much longer than the freeze timeout."""
    with stub_service(short_path, "crawling", SPARK_LLM_ENGINE__FREEZE_TIMEOUT_S="3") as running:
        running.listening()
        first = running.wait_state("ready")

        def steps() -> int:
            found = re.search(
                r"iteration_tokens_total_count\{[^}]*\} (\d+)", running.get("/metrics")[1]
            )
            assert found is not None
            return int(found[1])

        wait_for(lambda: steps() >= CRAWLED, 90, running.text)
        assert running.status()["run_id"] == first["run_id"]
        assert "engine_stalled" not in running.text()


def test_stale_socket_does_not_block_a_start(short_path: Path) -> None:
    """A socket file left by a killed engine is removed before the next start."""
    (short_path / "run").mkdir()
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(short_path / "run" / "stub.sock"))
    with stub_service(short_path) as running:
        running.listening()
        running.wait_state("ready")


def test_second_instance_is_told(short_path: Path) -> None:
    """A second service in the same folders is refused with the first one's process id; exit 75."""
    with stub_service(short_path) as running:
        running.listening()
        second = _refused(short_path, "--port", "0")
        assert second.returncode == 75
        assert str(running.process.pid) in second.stderr


def test_port_in_use(short_path: Path) -> None:
    """A taken port is exit 2 with the port and what to do."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = _refused(short_path, "--port", str(port))
    assert done.returncode == 2
    assert f"port {port}: Address already in use [port_in_use]" in done.stderr
    assert "--port" in done.stderr


def test_open_door_is_refused(short_path: Path) -> None:
    """Without keys, an address that the network reaches is exit 2; keys or --insecure allow it."""
    done = _refused(short_path, "--host", "0.0.0.0", "--port", "0")
    assert done.returncode == 2
    assert "[insecure_bind]" in done.stderr


def test_socket_path_too_long(short_path: Path) -> None:
    """A runtime folder whose socket path exceeds the kernel's limit is blocked with the numbers."""
    long = short_path / ("x" * SOCKET_PATH_LIMIT)
    long.mkdir()
    with _stub(short_path, SPARK_LLM_PATHS__RUNTIME=str(long)) as running:
        running.listening()
        status = running.wait_state("blocked")
        assert status["reason"] == "socket_path_too_long"
        assert "107" in status["message"]


def test_engine_missing(short_path: Path) -> None:
    """An interpreter that is not there is blocked with its path."""
    with _stub(short_path, SPARK_LLM_ENGINE__PYTHON="/nonexistent/python") as running:
        running.listening()
        status = running.wait_state("blocked")
        assert status["reason"] == "engine_missing"
        assert "/nonexistent/python" in status["message"]
        assert running.stop() == 1


def test_profile_for_another_build_of_vllm(short_path: Path) -> None:
    """A profile for the CPU build is not given to the CUDA build: blocked, with the profile that fits in the hint."""
    cuda = str(stub_python(short_path, build="0.32.0"))
    env = environment(short_path, SPARK_LLM_PROFILE="demo", SPARK_LLM_ENGINE__PYTHON=cuda)
    with service(short_path, env=env) as running:
        running.listening()
        status = running.wait_state("blocked")
        assert status["reason"] == "wrong_engine"
        assert "cpu build" in status["message"]
        assert cuda in status["message"]
        assert "demo-gpu" in status["hint"]


@pytest.mark.parametrize(
    ("build", "profile", "state"),
    [("0.32.0+cpu", "demo", "ready"), ("0.32.0", "demo-gpu", "blocked")],
)
def test_demo_that_suits_the_engine_is_the_default(
    short_path: Path, build: str, profile: str, state: str
) -> None:
    """Without a word on what to serve it is the demo for the build of vLLM that is there; there is no GPU to run on."""
    env = environment(
        short_path, SPARK_LLM_ENGINE__PYTHON=str(stub_python(short_path, build=build))
    )
    with service(short_path, env=env) as running:
        running.listening()
        status = running.wait_state(state)
        assert status["profile"] == profile
        assert status["reason"] == ("ok" if state == "ready" else "no_gpu")


@pytest.mark.parametrize(
    ("missing", "reason"), [("", "model_missing"), ("config.json", "model_incomplete")]
)
def test_model_missing_or_incomplete(short_path: Path, missing: str, reason: str) -> None:
    """A model folder that is missing, or lacks a file, is blocked with the name of what is missing."""
    from spark_llm.demo_model import write_demo_model

    model = short_path / "model"
    if missing:
        write_demo_model(model)
        (model / missing).unlink()
    profiles = short_path / "profiles"
    profiles.mkdir()
    text = (
        'description = "d"\nengine = "cpu"\ncontext = 512\nmax_num_seqs = 4\n'
        f'max_num_batched_tokens = 512\nkv_cache_bytes = 1048576\nmodel = "{model}"\n'
    )
    (profiles / "local.toml").write_text(text)
    with service(short_path, "--profile", "local") as running:
        running.listening()
        status = running.wait_state("blocked")
        assert status["reason"] == reason
        assert (missing or str(model)) in status["message"]


def _stub(folder: Path, **settings: str) -> AbstractContextManager[Service]:
    env = environment(folder, **{"SPARK_LLM_ENGINE__PYTHON": str(stub_python(folder)), **settings})
    return service(folder, env=env)
