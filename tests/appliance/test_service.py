"""What the service owes the machine that it runs on: descriptors and signals."""

import http.client
import itertools
import os
import pty
import resource
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from spark_llm.config import Settings
from spark_llm.notify import Notifier
from spark_llm.service import _hangup_stops, _take_up

from tests.appliance.service import (
    Service,
    environment,
    processes_below,
    stub_profile,
    stub_python,
    stub_service,
)


@pytest.fixture
def as_from_a_shell() -> Iterator[None]:
    """What is started has a shell's limit on descriptors."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.usefixtures("as_from_a_shell")
def test_service_takes_all_descriptors_that_it_may(short_path: Path) -> None:
    """Started from a shell, the service may hold as many connections as the machine's administrator allows."""
    with stub_service(short_path) as running:
        running.listening()
        soft, hard = resource.prlimit(running.process.pid, resource.RLIMIT_NOFILE)
    assert soft == hard > 1024


@contextmanager
def in_a_terminal(folder: Path, *before: str) -> Iterator[tuple[Service, int]]:
    """``spark-llm serve`` in the foreground of a terminal, and the other end of that."""
    (folder / "profiles").mkdir()
    (folder / "profiles/stub.toml").write_text(stub_profile())
    env = environment(
        folder, SPARK_LLM_PROFILE="stub", SPARK_LLM_ENGINE__PYTHON=str(stub_python(folder))
    )
    log = folder / "log"
    master, slave = pty.openpty()
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [
                # whoever runs the tests may have hangups ignored, which is inherited
                *("env", "--default-signal=HUP", "setsid", "--ctty", *before),
                *(sys.executable, "-m", "spark_llm.cli", "serve", "--port", "0"),
            ],
            env=env,
            cwd=folder,
            stdin=slave,
            stdout=stream,
            stderr=stream,
        )
    os.close(slave)
    try:
        yield Service(process, log, env), master
    finally:
        process.kill()
        process.wait()


def test_closing_the_terminal_stops(short_path: Path) -> None:
    """Who closes the window of a service in the foreground has stopped it: nothing goes on unseen."""
    with in_a_terminal(short_path) as (running, terminal):
        running.listening().wait_state("ready")
        os.close(terminal)
        assert running.process.wait(30) == 0
    assert processes_below(short_path) == []


def test_closing_the_terminal_lets_running_requests_finish(short_path: Path) -> None:
    """Shell and kernel both tell of the terminal's end; that is no hurry, as a second Ctrl-C is."""
    with in_a_terminal(short_path) as (running, terminal):
        engine = running.listening().wait_state("ready")["engine_pid"]
        url = f"http://127.0.0.1:{running.port}/v1/chat/completions"
        request = urllib.request.Request(url, data=b'{"model": "held", "stream": true}')
        with urllib.request.urlopen(request, timeout=60) as stream:
            assert b"w0" in stream.readline()
            os.close(terminal)
            running.wait_state("draining")
            running.process.send_signal(signal.SIGHUP)
            assert running.get("/livez")[0] == 200  # the second one has come before this
            os.kill(engine, signal.SIGUSR1)
            assert stream.read().endswith(b"data: [DONE]\n\n")
        assert running.process.wait(30) == 0


def test_nohup_outlasts_the_terminal(short_path: Path) -> None:
    """Started with nohup, the service takes the terminal's end for a reload and goes on."""
    with in_a_terminal(short_path, "nohup") as (running, terminal):
        running.listening().wait_state("ready")
        os.close(terminal)
        running.wait_log("reloaded: ")
        assert running.status()["state"] == "ready"
        assert running.stop() == 0


@pytest.mark.parametrize(
    ("supervised", "terminal", "ignored"), [*itertools.product([False, True], repeat=3)]
)
def test_hangup_stops_only_what_a_terminal_holds(
    supervised: bool, terminal: bool, ignored: bool
) -> None:
    """SIGHUP means stop where it can come from a terminal alone; everywhere else it means reload."""
    stops = _hangup_stops(supervised=supervised, terminal=terminal, ignored=ignored)
    assert stops is ((supervised, terminal, ignored) == (False, True, False))


def test_reload_that_breaks_is_over_for_systemd() -> None:
    """Whatever a reload meets, systemd hears that it has ended: it would wait, then end what still serves."""

    class Broken:
        def reload(self) -> str:
            raise OSError("the disk is gone")

    broken: Any = Broken()
    said: list[str] = []
    with pytest.raises(OSError, match="disk"):
        _take_up(broken, Notifier(said.append))
    assert [text.partition("\n")[0] for text in said] == ["RELOADING=1", "READY=1"]


def test_idle_connection_is_kept_as_long_as_set(short_path: Path) -> None:
    """A connection stays open between requests for ``gateway.keep_alive_s``, and no longer."""
    with stub_service(short_path, SPARK_LLM_GATEWAY__KEEP_ALIVE_S="1") as running:
        running.listening()
        with closing(http.client.HTTPConnection("127.0.0.1", running.port, 30)) as client:
            client.connect()
            idle = client.sock
            for _ in range(2):
                client.request("GET", "/livez")
                assert client.getresponse().read()
            answered = time.monotonic()
            assert client.sock is idle
            assert idle.recv(1) == b""
            assert 0.9 < time.monotonic() - answered < 4


def test_proxies_give_up_an_idle_connection_first() -> None:
    """By default no common proxy finds a connection closed that it still meant to use; Caddy keeps them longest."""
    assert Settings().gateway.keep_alive_s > 120
