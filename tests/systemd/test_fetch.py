"""``spark-llm-fetch@.service`` fetching a model with a token, from a hub on the container's own loopback."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from container import CONFIG, TREE, Container

MODEL = "org/name"
TOKEN = "hf_local_token_for_tests"  # noqa: S105  nobody's; tests/hub/server.py knows it
CREDENTIAL = "/etc/credstore/spark-llm.hub-token"
STORE = "/var/lib/spark-llm/models"
HUB = f"""
import os, threading
from pathlib import Path
from spark_llm.demo_model import write_demo_model
from tests.hub.server import local_hub
with local_hub() as hub:
    assert hub.token == {TOKEN!r}
    write_demo_model(Path("/opt/hub/model"))
    files = {{path.name: path.read_bytes() for path in Path("/opt/hub/model").iterdir()}}
    hub.add({MODEL!r}, files)
    hub.models[{MODEL!r}].private = True
    hub.fault("stall", after=100_000)
    Path("/opt/hub/endpoint.new").write_text(hub.endpoint)
    os.rename("/opt/hub/endpoint.new", "/opt/hub/endpoint")
    hub.wait_for("model.safetensors", 120)
    Path("/opt/hub/stalled").touch()
    while not os.path.exists("/opt/hub/go"):
        threading.Event().wait(0.05)
    hub.released.set()
    threading.Event().wait()
"""
XET = """
import http.server, threading, time
from huggingface_hub.utils._xet import get_xet_session
from hf_xet import XetFileInfo

class Store(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        print("asked for", self.path.partition("?")[0], flush=True)
        self.send_error(404)

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Store)
threading.Thread(target=server.serve_forever, daemon=True).start()
with get_xet_session().new_file_download_group(
    endpoint=f"http://127.0.0.1:{server.server_port}", token="t", token_expiry_unix_secs=int(time.time()) + 999,
    token_refresh_url="http://127.0.0.1:1", token_refresh_headers={}, custom_headers={},
    progress_callback=lambda *_: None,
) as group:
    group.start_download_file(XetFileInfo("a" * 64, 10), "/var/cache/spark-llm-fetch/out")
"""


@dataclass(frozen=True)
class Fetching:
    """A machine whose fetch unit is set to the hub inside; the download stops after its first megabyte."""

    machine: Container
    unit: str

    def resume(self) -> None:
        """Let the hub send the rest."""
        self.machine.run("touch", "/opt/hub/go")


@pytest.fixture
def fetching(installed: Container) -> Iterator[Fetching]:
    """A private model in the hub, and the fetch unit of it."""
    installed.write("/opt/hub/hub.py", HUB)
    installed.run(
        *("systemd-run", "--quiet", "--unit=test-hub.service", f"--setenv=PYTHONPATH={TREE}"),
        *(f"{TREE}/.venv/bin/python", "/opt/hub/hub.py"),
    )
    escaped = installed.run("systemd-escape", MODEL).stdout.strip()
    unit = f"spark-llm-fetch@{escaped}.service"
    try:
        endpoint = installed.wait(
            lambda: installed.run("cat", "/opt/hub/endpoint", check=False).stdout, timeout=60
        )
        installed.write(
            "/run/systemd/system/spark-llm-fetch@.service.d/50-test.conf",
            f"[Service]\nEnvironment=HF_ENDPOINT={endpoint}\n",
        )
        installed.systemctl("daemon-reload")
        yield Fetching(installed, unit)
    finally:
        installed.systemctl("stop", unit, "test-hub.service", "spark-llm.service", check=False)
        installed.systemctl("reset-failed")
        installed.run("sh", "-c", f"rm -rf /opt/hub {CREDENTIAL} {STORE}/* {CONFIG}")


def test_service_names_the_unit_that_fetches_then_serves(fetching: Fetching) -> None:
    """A service whose model is missing asks for the fetch unit; that brings it with the token; then tokens come."""
    machine, unit = fetching.machine, fetching.unit
    machine.write("/etc/spark-llm/profiles/fetched.toml", f'extends = "demo"\nmodel = "{MODEL}"\n')
    machine.write(CONFIG, 'profile = "fetched"\n')
    machine.systemctl("start", "spark-llm.service")
    said = machine.wait_state("blocked", "failed", timeout=60)
    assert (said["state"], said["reason"]) == ("blocked", "model_missing")
    fetch = said["hint"].partition("sudo ")[2].partition(";")[0]

    machine.write(CREDENTIAL, TOKEN + "\n", 0o600)
    cursor = machine.cursor()
    client = machine.spawn("sh", "-c", fetch)
    machine.wait(lambda: machine.run("ls", "/opt/hub/stalled", check=False).returncode == 0)
    _assert_token_is_the_units_alone(machine, unit)
    fetching.resume()
    assert client.communicate(timeout=60)[0] == ""
    assert client.returncode == 0
    journal = [entry["MESSAGE"] for entry in machine.journal("-u", unit, after=cursor)]
    assert any(line.startswith(MODEL) for line in journal)
    assert not any(TOKEN in line for line in journal)

    machine.wait_state("ready", "failed")
    machine.systemctl("start", "spark-llm-ready.service")
    body = {"model": "default", "prompt": "a", "max_tokens": 4}
    status, answer = machine.http("/v1/completions", body=body)
    assert (status, answer["usage"]["completion_tokens"]) == (200, 4)


def test_without_the_token_it_ends_and_says_so(fetching: Fetching) -> None:
    """A private model without a token ends the unit at once, without a retry, and the journal names the cause."""
    machine, unit = fetching.machine, fetching.unit
    cursor = machine.cursor()
    machine.systemctl("start", unit, check=False)
    shown = machine.show(unit, "ActiveState", "ExecMainStatus", "NRestarts")
    assert shown == {"ActiveState": "failed", "ExecMainStatus": "2", "NRestarts": "0"}
    said = " ".join(entry["MESSAGE"] for entry in machine.journal("-u", unit, after=cursor))
    assert f"no public model {MODEL}" in said
    assert "give the token" in said


def test_xet_has_what_it_needs(installed: Container, drop_in: Callable[[str, str], None]) -> None:
    """In the unit's confinement the Xet library starts and asks its store: it may write where it wants to."""
    installed.write("/opt/xet.py", XET)
    program = f"{TREE}/.venv/bin/python /opt/xet.py"
    drop_in(
        "spark-llm-fetch@xet.service",
        f"[Service]\nRestart=no\nExecStart=\nExecStart={program}\n",
    )
    cursor = installed.cursor()
    installed.systemctl("start", "spark-llm-fetch@xet.service", check=False)
    said = "\n".join(
        entry["MESSAGE"] for entry in installed.journal("-u", "spark-llm-fetch@xet", after=cursor)
    )
    installed.systemctl("reset-failed", "spark-llm-fetch@xet.service", check=False)
    assert "asked for" in said, said


def _assert_token_is_the_units_alone(machine: Container, unit: str) -> None:
    """The credential is there for the unit; the service's user reads it nowhere; no process has it where ps looks."""
    pid = machine.main_pid(unit)
    credential = f"/run/credentials/{unit}/hub-token"
    assert machine.run("cat", credential).stdout.strip() == TOKEN
    for path in (credential, CREDENTIAL, f"/proc/{pid}/environ"):
        assert machine.run("runuser", "-u", "spark-llm", "--", "cat", path, check=False).returncode
    family = machine.run("ps", "-o", "pid=", "-u", "spark-llm-fetch").stdout.split()
    assert str(pid) in family
    for each in family:
        seen = machine.run("cat", f"/proc/{each}/cmdline", f"/proc/{each}/environ").stdout
        assert TOKEN not in seen
