"""Starts the real command ``spark-llm serve`` for tests and talks to it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

T = TypeVar("T")
REPOSITORY = Path(__file__).parents[2]


def stub_profile(fault: str = "", model: str = "demo", kv_cache_bytes: int = 2**20) -> str:
    """A profile for the stub engine with ``fault``."""
    return f"""
description = "Stub engine"
engine = "cpu"
model = "{model}"
context = 512
max_num_seqs = 4
max_num_batched_tokens = 512
kv_cache_bytes = {kv_cache_bytes}

[environment]
STUB_FAULT = "{fault}"
"""


class Service:
    """One running ``spark-llm serve``.

    Attributes:
        process: the controller.
        port: where its gateway listens.
        log: file with its standard error.
        environment: what it was started with.
    """

    def __init__(
        self, process: "subprocess.Popen[bytes]", log: Path, environment: Mapping[str, str]
    ) -> None:
        self.process = process
        self.environment = environment
        self.log = log
        self.port = 0

    def listening(self, timeout_s: float = 30) -> Self:
        line = self.wait_log(r"listening on http://[^:]+:(\d+)", timeout_s)
        self.port = int(line[1])
        return self

    def wait_log(self, pattern: str, timeout_s: float = 30) -> re.Match[str]:
        def find() -> re.Match[str] | None:
            if self.process.poll() is not None and not re.search(pattern, self.text()):
                raise AssertionError(f"it ended with {self.process.returncode}:\n{self.text()}")
            return re.search(pattern, self.text())

        return wait_for(find, timeout_s, self.text)

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def get(self, path: str) -> tuple[int, Any]:
        return fetch(f"http://127.0.0.1:{self.port}{path}")

    def post(self, path: str, value: object) -> tuple[int, Any]:
        return fetch(f"http://127.0.0.1:{self.port}{path}", json.dumps(value).encode())

    def status(self) -> dict[str, Any]:
        body: dict[str, Any] = self.get("/api/v1/status")[1]
        return body

    def wait_state(self, *states: str, timeout_s: float = 30) -> dict[str, Any]:
        def reached() -> dict[str, Any] | None:
            status = self.status()
            return status if status["state"] in states else None

        return wait_for(reached, timeout_s, self._explain)

    def _explain(self) -> str:
        return f"{self.text()}\n{self.status()}"

    def stop(self, number: signal.Signals = signal.SIGTERM, timeout_s: float = 60) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout_s)


def wait_for(check: Callable[[], T | None], timeout_s: float, explain: Callable[[], str]) -> T:
    """The first true result of ``check``; fails with ``explain()`` after ``timeout_s`` seconds."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if result := check():
            return result
        time.sleep(0.05)
    raise AssertionError(f"not within {timeout_s} s:\n{explain()[-4000:]}")


def fetch(url: str, body: bytes | None = None, **headers: str) -> tuple[int, Any]:
    """Status and JSON of a request; the text where it is no JSON."""
    sent = {"Content-Type": "application/json", **headers}
    request = urllib.request.Request(url, data=body, headers=sent)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            status, data = answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            status, data = error.code, error.read()
    try:
        return status, json.loads(data)
    except ValueError:
        return status, data.decode()


def environment(folder: Path, **more: str) -> dict[str, str]:
    """Environment of a service that keeps everything below ``folder``."""
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "SPARK_LLM_PATHS__STATE": str(folder / "state"),
        "SPARK_LLM_PATHS__CACHE": str(folder / "cache"),
        "SPARK_LLM_PATHS__RUNTIME": str(folder / "run"),
        "SPARK_LLM_PATHS__PROFILES": str(folder / "profiles"),
        **more,
    }


@contextmanager
def service(
    folder: Path, *arguments: str, env: Mapping[str, str] | None = None
) -> Iterator[Service]:
    """A service below ``folder``; killed at the end if it still runs."""
    log = folder / "log"
    env = dict(env or environment(folder))
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "spark_llm.cli", "serve", "--port", "0", *arguments],
            env=env,
            cwd=folder,
            stderr=stream,
            stdout=stream,
            start_new_session=True,  # no terminal, whose end would be a reason to stop
        )
    try:
        yield Service(process, log, env)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def stub_python(folder: Path, build: str = "0.32.0+cpu") -> Path:
    """A program to use as ``engine.python``: the stub engine, in what looks like an environment with that vLLM."""
    record = folder / f"stub/lib/python3.11/site-packages/vllm-{build}.dist-info/RECORD"
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text("")
    script = folder / "stub/bin/python"
    script.parent.mkdir(exist_ok=True)
    script.write_text(
        f'#!/bin/sh\nPYTHONPATH={REPOSITORY} exec {sys.executable} {REPOSITORY}/tests/stub_engine.py "$@"\n'
    )
    script.chmod(0o755)
    return script


@contextmanager
def stub_service(
    folder: Path, fault: str = "", kv_cache_bytes: int = 2**20, /, **settings: str
) -> Iterator[Service]:
    """A service whose engine is the stub with ``fault``."""
    profiles = folder / "profiles"
    profiles.mkdir(exist_ok=True)
    (profiles / "stub.toml").write_text(stub_profile(fault, kv_cache_bytes=kv_cache_bytes))
    env = environment(
        folder,
        SPARK_LLM_PROFILE="stub",
        SPARK_LLM_ENGINE__PYTHON=str(stub_python(folder)),
        SPARK_LLM_ENGINE__SCRAPE_INTERVAL_S="0.2",
        **settings,
    )
    with service(folder, env=env) as running:
        yield running


def processes_of(group: int) -> list[str]:
    """Living members of a process group. vLLM overwrites its arguments and environment, so only numbers tell."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                name, _, rest = (entry / "stat").read_text().rpartition(")")
            except OSError:
                continue
            fields = rest.split()
            if fields[0] not in "ZX" and int(fields[2]) == group:
                found.append(f"{name})")
    return found


def processes_below(folder: Path) -> list[str]:
    """Command lines of living processes that name ``folder`` in their arguments or environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            command = (entry / "cmdline").read_bytes()
            if str(folder).encode() in command + (entry / "environ").read_bytes():
                found.append(f"{entry.name}: {command.replace(bytes(1), b' ').decode()}")
        except OSError:
            continue
    return found
