"""The service under a real systemd, as far as it does not need the engine.

Over 400 lines because all of it shares one installed container and the fixtures that set it up and clean it.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from container import CONFIG, NO_ENGINE, TREE, Container
from spark_llm import install

DropIn = Callable[[str, str], None]
SPARK = f"{TREE}/.venv/bin/spark-llm"
GUARD = "spark-llm-guard.service"
OUTSIDE = "10.77.0.1"
CAP_SYS_RESOURCE = 1 << 24  # linux/capability.h


def test_start_returns_when_the_api_answers(stopped: Container) -> None:
    """``systemctl start spark-llm`` returns once requests are answered, whatever the engine does."""
    stopped.write(CONFIG, NO_ENGINE)
    stopped.systemctl("start", "spark-llm.service")
    assert stopped.http("/livez")[0] == 200
    assert stopped.show("spark-llm.service", "ActiveState", "NotifyAccess") == {
        "ActiveState": "active",
        "NotifyAccess": "main",
    }


def test_blocked_is_shown_everywhere(blocked: Container) -> None:
    """The reason is the same code in the API, in ``systemctl status`` and in the journal's fields."""
    blocked.wait_state("blocked")
    assert blocked.status()["reason"] == "engine_missing"
    assert "[engine_missing]" in blocked.status_text()
    assert blocked.wait(
        lambda: [
            entry
            for entry in blocked.journal("-u", "spark-llm.service")
            if entry.get("SPARK_LLM_STATE") and entry.get("SPARK_LLM_PROFILE") == "demo"
        ]
    )


def test_ready_unit_fails_with_the_cause(blocked: Container) -> None:
    """``systemctl start spark-llm-ready`` ends at once when the service can never be ready, and says why."""
    blocked.wait_state("blocked")
    cursor = blocked.cursor()
    blocked.systemctl("start", "spark-llm-ready.service", check=False)
    assert blocked.show("spark-llm-ready.service", "Result")["Result"] == "exit-code"
    said = [e["MESSAGE"] for e in blocked.journal("-u", "spark-llm-ready.service", after=cursor)]
    assert any("engine_missing" in line for line in said)


def test_watchdog_restarts_a_stuck_controller(stopped: Container, drop_in: DropIn) -> None:
    """A controller that no longer comes round is killed and replaced by systemd."""
    stopped.write(CONFIG, NO_ENGINE)
    drop_in("spark-llm.service", "[Service]\nWatchdogSec=6\nTimeoutAbortSec=15\n")
    stopped.systemctl("start", "spark-llm.service")
    first = stopped.main_pid()
    cursor = stopped.cursor()
    stopped.run("kill", "-STOP", str(first))
    stopped.wait(lambda: stopped.main_pid() not in {0, first} and stopped.http("/livez")[0] == 200)
    said = [entry["MESSAGE"] for entry in stopped.journal(after=cursor)]
    assert any("Watchdog timeout" in line for line in said)
    assert any("Fatal Python error: Aborted" in line for line in said)  # and where it hung


def test_watchdog_is_fed(stopped: Container, drop_in: DropIn) -> None:
    """A healthy controller lives through three watchdog intervals."""
    stopped.write(CONFIG, NO_ENGINE)
    drop_in("spark-llm.service", "[Service]\nWatchdogSec=6\n")
    stopped.systemctl("start", "spark-llm.service")
    first = stopped.main_pid()
    began = float(stopped.run("cut", "-d ", "-f1", "/proc/uptime").stdout)
    stopped.wait(
        lambda: float(stopped.run("cut", "-d ", "-f1", "/proc/uptime").stdout) > began + 18.5
    )
    assert (stopped.main_pid(), stopped.show("spark-llm.service", "NRestarts")["NRestarts"]) == (
        first,
        "0",
    )


@pytest.mark.parametrize("unit", ["spark-llm.service", GUARD])
def test_killed_process_comes_back(blocked: Container, unit: str) -> None:
    """``kill -9`` of the controller or the guard brings a new one; the port stays open."""
    first = blocked.main_pid(unit)
    blocked.run("kill", "-KILL", str(first))
    assert blocked.http("/livez")[0] == 200
    blocked.wait(lambda: blocked.main_pid(unit) not in {0, first})


def test_request_made_during_a_restart_is_answered(blocked: Container) -> None:
    """A connection opened while no process is there waits in the socket until the next one takes it."""
    blocked.systemctl("stop", "spark-llm.service", check=False)
    assert blocked.show("spark-llm.socket", "ActiveState")["ActiveState"] == "active"
    assert blocked.http("/livez")[0] == 200


def test_no_connection_is_lost_in_20_restarts(blocked: Container) -> None:
    """1,000 requests during 20 restarts are all answered: none is refused, reset or left without a reply."""
    blocked.write("/opt/load.py", LOAD)
    load = blocked.spawn("/usr/bin/python3", "/opt/load.py")
    for _ in range(20):
        blocked.systemctl("restart", "spark-llm.service")
        assert blocked.http("/livez")[0] == 200
    blocked.run("touch", "/tmp/load.stop")
    result = json.loads(load.communicate(timeout=60)[0].splitlines()[-1])
    assert result["lost"] == []
    assert result["answered"] >= 1000


def test_reload_takes_up_keys_limits_and_level(blocked: Container) -> None:
    """``systemctl reload`` applies keys, limits and log level, and names what needs a restart."""
    pid = blocked.main_pid()
    token = blocked.run(
        "runuser",
        "-u",
        "spark-llm",
        "--",
        "env",
        "STATE_DIRECTORY=/var/lib/spark-llm",
        "HOME=/var/lib/spark-llm",
        SPARK,
        "keys",
        "add",
        "client",
    ).stdout.strip()
    assert blocked.http("/api/v1/status")[0] == 200  # no key asked for before the reload
    changed = (
        NO_ENGINE + "freeze_timeout_s = 77.0\n[gateway]\nmax_queue = 3\n[log]\nlevel = 'debug'\n"
    )
    blocked.write(CONFIG, changed)
    cursor = blocked.cursor()
    blocked.systemctl("reload", "spark-llm.service")
    said = blocked.wait(
        lambda: [
            entry["MESSAGE"]
            for entry in blocked.journal("-u", "spark-llm.service", after=cursor)
            if "reloaded" in entry["MESSAGE"]
        ]
    )
    assert "gateway.max_queue, log.level" in said[0]
    assert "a restart is needed for engine.freeze_timeout_s" in said[0]
    assert blocked.http("/api/v1/status")[0] == 401
    assert blocked.http("/api/v1/status", key=token)[0] == 200
    assert blocked.main_pid() == pid


def test_reload_with_a_bad_configuration_changes_nothing(blocked: Container) -> None:
    """A configuration that cannot be read is refused by name, and the service goes on with the old one."""
    blocked.write(CONFIG, NO_ENGINE + "[gateway]\nmax_quue = 3\n")
    pid = blocked.main_pid()
    blocked.systemctl("reload", "spark-llm.service")
    blocked.wait(lambda: "refused" in blocked.status_text())
    assert "max_quue" in blocked.status_text()
    assert blocked.main_pid() == pid
    assert blocked.http("/livez")[0] == 200


def test_keys_by_credential_rotate(stopped: Container) -> None:
    """API keys from the credential store are accepted; once replaced, the old are refused and the new accepted."""
    tokens = []
    for name in ("old", "new"):
        done = stopped.run(
            "env", f"STATE_DIRECTORY=/tmp/{name}", "HOME=/tmp", SPARK, "keys", "add", name
        )
        tokens.append(done.stdout.strip())
    stopped.write(CONFIG, NO_ENGINE)
    stopped.run("install", "-Dm600", "/tmp/old/keys.json", "/etc/credstore/spark-llm.api-keys")
    stopped.systemctl("start", "spark-llm.service")
    assert [stopped.http("/api/v1/status", key=token)[0] for token in tokens] == [200, 401]
    stopped.run("install", "-Dm600", "/tmp/new/keys.json", "/etc/credstore/spark-llm.api-keys")
    _take_up_credentials(stopped)
    assert [stopped.http("/api/v1/status", key=token)[0] for token in tokens] == [401, 200]
    stopped.run("rm", "-r", "/tmp/old", "/tmp/new")


def test_starts_without_credentials(blocked: Container) -> None:
    """Absent credentials are not an error: on loopback the service needs none."""
    folder = "/run/credentials/spark-llm.service"
    assert blocked.run("sh", "-c", f"ls {folder} 2>/dev/null | wc -l").stdout.strip() == "0"
    assert blocked.http("/livez")[0] == 200


def test_limits_are_set(blocked: Container) -> None:
    """Memory, tasks, core dumps and the OOM killer's order are as the units say, as far as systemd was told."""
    names = (
        "MemoryMax",
        "MemorySwapMax",
        "TasksMax",
        "LimitCORE",
        "LimitMEMLOCK",
        "OOMScoreAdjust",
    )
    service, guard = (blocked.show(unit, *names) for unit in ("spark-llm.service", GUARD))
    total = int(blocked.run("awk", "/^MemTotal/ {print $2}", "/proc/meminfo").stdout) * 1024
    assert 0.85 * total < int(service.pop("MemoryMax")) < 0.95 * total
    assert service == {
        "MemorySwapMax": "0",
        "TasksMax": "8192",
        "LimitCORE": "0",
        "LimitMEMLOCK": "infinity",
        "OOMScoreAdjust": "-500",
    }
    assert (guard["TasksMax"], guard["LimitMEMLOCK"]) == ("8", "infinity")
    assert int(guard["OOMScoreAdjust"]) < int(service["OOMScoreAdjust"]) < 0


def test_limits_reach_the_kernel(blocked: Container) -> None:
    """The kernel has the memory and task limits of the units, in the cgroups of their processes."""
    have = set(blocked.run("cat", "/sys/fs/cgroup/cgroup.controllers").stdout.split())
    if lacking := {"memory", "pids"} - have:
        pytest.skip(
            f"cgroup version 2 has no {', '.join(sorted(lacking))} controller on this machine"
        )
    for unit, file, setting in (
        ("spark-llm.service", "memory.max", "MemoryMax"),
        ("spark-llm.service", "memory.swap.max", "MemorySwapMax"),
        ("spark-llm.service", "pids.max", "TasksMax"),
        (GUARD, "pids.max", "TasksMax"),
    ):
        set_to = blocked.run("cat", f"/sys/fs/cgroup/system.slice/{unit}/{file}").stdout.strip()
        assert set_to == blocked.show(unit, setting)[setting]


def test_guard_is_locked_and_spared(blocked: Container) -> None:
    """The guard's pages are locked into memory, and the OOM killer takes it after the controller."""
    capabilities = blocked.run("awk", "/^CapBnd/ {print $2}", "/proc/1/status").stdout
    if not int(capabilities, 16) & CAP_SYS_RESOURCE:
        pytest.skip(
            "without CAP_SYS_RESOURCE systemd cannot raise limits or lower an OOM score here"
        )
    guard, controller = blocked.main_pid(GUARD), blocked.main_pid()
    report = json.loads(blocked.run("cat", "/run/spark-llm-guard/report.json").stdout)
    assert report["mlockall"] is True
    scores = [
        blocked.run("cat", f"/proc/{pid}/oom_score_adj").stdout.strip()
        for pid in (guard, controller)
    ]
    assert scores == ["-900", "-500"]


def test_config_error_ends_with_2_and_no_loop(stopped: Container) -> None:
    """A mistyped key ends the start with exit code 2, names the key, and systemd does not try again."""
    stopped.write(CONFIG, "[gateway]\nprot = 8000\n")
    cursor = stopped.cursor()
    stopped.systemctl("start", "spark-llm.service", check=False)
    shown = stopped.show("spark-llm.service", "ActiveState", "ExecMainStatus", "NRestarts")
    assert shown == {"ActiveState": "failed", "ExecMainStatus": "2", "NRestarts": "0"}
    said = [e["MESSAGE"] for e in stopped.journal("-u", "spark-llm.service", after=cursor)]
    assert any("gateway.prot" in line for line in said)


def test_taken_port_is_named(stopped: Container) -> None:
    """Where another program has the port, the service ends with exit code 2 and says how to find it."""
    stopped.write(CONFIG, NO_ENGINE)
    with stopped.serving("127.0.0.1", 8000):
        cursor = stopped.cursor()
        stopped.systemctl("start", "spark-llm.service", check=False)
        assert stopped.show("spark-llm.service", "ExecMainStatus")["ExecMainStatus"] == "2"
        said = " ".join(
            e["MESSAGE"] for e in stopped.journal("-u", "spark-llm.service", after=cursor)
        )
        assert "port_in_use" in said
        assert "ss -ltnp" in said


def test_unwritable_state_is_named(stopped: Container, drop_in: DropIn) -> None:
    """A state folder that cannot be written ends the start with exit code 2 and its path."""
    stopped.write(CONFIG, NO_ENGINE)
    drop_in("spark-llm.service", "[Service]\nReadOnlyPaths=/var/lib/spark-llm\n")
    cursor = stopped.cursor()
    stopped.systemctl("start", "spark-llm.service", check=False)
    assert stopped.show("spark-llm.service", "ExecMainStatus")["ExecMainStatus"] == "2"
    said = " ".join(e["MESSAGE"] for e in stopped.journal("-u", "spark-llm.service", after=cursor))
    assert "/var/lib/spark-llm" in said
    assert "unwritable_directory" in said


def test_gpu_profile_without_driver_is_blocked(stopped: Container) -> None:
    """On a machine without the NVIDIA driver a GPU profile is blocked as no_gpu, and the API says so."""
    stopped.write(CONFIG, 'profile = "qwen3-30b-a3b-nvfp4"\n')
    stopped.systemctl("start", "spark-llm.service")
    assert stopped.wait_state("blocked", "failed")["reason"] == "no_gpu"


def test_what_the_engine_can_do(stopped: Container, drop_in: DropIn) -> None:
    """In the engine's place: its own cgroup, loopback only, its own folders only, no token, no forging."""
    source = (TREE / "tests" / "systemd" / "probe.py").read_text()
    source = "#!/usr/bin/python3\n" + source.replace(
        "@engine@", f"{TREE}/.venv-engine/bin/python"
    ).replace("@outside@", OUTSIDE)
    stopped.write("/opt/probe/bin/python", source, 0o755)
    stopped.run("ln", "-sfn", f"{TREE}/.venv-engine/lib", "/opt/probe/lib")
    stopped.write("/etc/credstore/spark-llm.hub-token", "hf_secret", 0o600)
    without_driver = ("c", "60", "0")
    stopped.run("mknod", "-m", "666", "/dev/probe", *without_driver)
    assert "No such device" in stopped.run("cat", "/dev/probe", check=False).stderr
    drop_in(
        "spark-llm-fetch@x.service",
        "[Service]\nType=exec\nExecStart=\nExecStart=/bin/sleep infinity\n",
    )
    stopped.systemctl("start", "spark-llm-fetch@x.service")
    stopped.write(CONFIG, '[engine]\npython = "/opt/probe/bin/python"\nrestart_budget = 0\n')
    cursor = stopped.cursor()
    with stopped.address(OUTSIDE), stopped.serving(OUTSIDE, 9000):
        stopped.systemctl("start", "spark-llm.service")
        facts = stopped.wait(lambda: _probed(stopped, cursor))
    stopped.systemctl("stop", "spark-llm-fetch@x.service")
    stopped.run("rm", "/dev/probe")
    assert "/spark-llm.service/engine/" in facts["cgroup"]
    assert facts["oom_score_adj"] == 800
    assert int(facts["capabilities"], 16) == 0
    assert facts["no_new_privs"] == "1"
    assert not {"NOTIFY_SOCKET", "CREDENTIALS_DIRECTORY", "LISTEN_FDS"} & set(facts["environment"])
    assert {path for path, result in facts["read"].items() if result == "ok"} == {
        "/var/lib/spark-llm"
    }
    assert {path for path, result in facts["write"].items() if result == "ok"} == {
        "/var/lib/spark-llm",
        "/var/cache/spark-llm",
        "/run/spark-llm",
        "/tmp",  # its own: PrivateTmp
    }
    assert facts["network"]["loopback"] == "ok"
    assert facts["network"]["outside"] != "ok"
    assert facts["device"] == {"/dev/null": "ok", "/dev/probe": "Operation not permitted"}
    assert facts["new_code"] == "ok"  # it compiles kernels
    assert facts["namespaces"] != "ok"
    assert stopped.show("spark-llm.service", "StatusText")["StatusText"] != "forged"
    assert stopped.main_pid() != 1


def test_controller_itself_may_not_make_code(blocked: Container) -> None:
    """The controller has given up making memory executable; its children, the engine, have not."""
    code = (
        "from spark_llm.sandbox import refuse_new_code; import mmap, subprocess, sys;"
        "print(refuse_new_code());"
        "rwx = 'import mmap; mmap.mmap(-1, 4096, prot=7)';"
        "print(subprocess.run([sys.executable, '-c', rwx]).returncode);"
        "exec(rwx)"
    )
    done = blocked.run(f"{TREE}/.venv/bin/python", "-c", code, check=False)
    assert done.stdout.split() == ["True", "0"]
    assert "PermissionError" in done.stderr


@pytest.fixture
def on_a_network(stopped: Container) -> Iterator[Container]:
    """The service configured and installed for an address that is not loopback's."""
    with stopped.address(OUTSIDE):
        stopped.write(CONFIG, NO_ENGINE + f'[gateway]\nhost = "{OUTSIDE}"\ninsecure = true\n')
        stopped.run(SPARK, "install")
        yield stopped
        stopped.systemctl("stop", "spark-llm.service", "spark-llm.socket", check=False)
        stopped.run("rm", CONFIG)
        stopped.run(SPARK, "install")


def test_open_port_does_not_open_the_engines_network(on_a_network: Container) -> None:
    """With the socket open to a network, that network is served; sockets of the service itself stay on loopback."""
    on_a_network.systemctl("start", "spark-llm.service")
    assert on_a_network.http("/livez", url=f"http://{OUTSIDE}:8000")[0] == 200
    allowed = on_a_network.show("spark-llm.service", "IPAddressAllow")["IPAddressAllow"]
    assert set(allowed.split()) == {"127.0.0.0/8", "::1/128"}


def test_ready_unit_asks_the_configured_address(on_a_network: Container) -> None:
    """Where the gateway listens on one address of a network, the ready unit reaches it there, and hears the cause."""
    on_a_network.systemctl("start", "spark-llm.service")
    on_a_network.wait(
        lambda: on_a_network.http("/readyz", url=f"http://{OUTSIDE}:8000")[1]["state"] == "blocked"
    )
    cursor = on_a_network.cursor()
    on_a_network.systemctl("start", "spark-llm-ready.service", check=False, timeout=30)
    said = [
        e["MESSAGE"] for e in on_a_network.journal("-u", "spark-llm-ready.service", after=cursor)
    ]
    assert any("engine_missing" in line for line in said)


def test_network_without_a_key_is_refused(on_a_network: Container) -> None:
    """An address that systemd opened to a network is refused without API keys, just as one opened by the service."""
    text = on_a_network.run("cat", CONFIG).stdout
    on_a_network.write(CONFIG, text.replace("insecure = true", ""))
    cursor = on_a_network.cursor()
    on_a_network.systemctl("start", "spark-llm.service", check=False)
    assert on_a_network.show("spark-llm.service", "ExecMainStatus")["ExecMainStatus"] == "2"
    said = " ".join(
        e["MESSAGE"] for e in on_a_network.journal("-u", "spark-llm.service", after=cursor)
    )
    assert "insecure_bind" in said


def test_tls_certificate_changes_under_an_open_stream(stopped: Container) -> None:
    """A reload takes up a new certificate; the connection that is open goes on, new ones see the new one."""
    stopped.certificate("/etc/spark-llm/tls", "first")
    stopped.write(
        CONFIG,
        NO_ENGINE + '[gateway]\ntls_certificate = "/etc/spark-llm/tls/cert.pem"\n'
        'tls_key = "/etc/spark-llm/tls/key.pem"\n',
    )
    stopped.systemctl("start", "spark-llm.service")
    assert stopped.subject() == "first"
    stopped.write("/opt/stream.py", STREAM)
    stream = stopped.spawn("/usr/bin/python3", "/opt/stream.py")
    assert stream.stdout is not None
    assert stream.stdout.readline().strip() == "open"
    stopped.certificate("/etc/spark-llm/tls", "second")
    stopped.systemctl("reload", "spark-llm.service")
    stopped.wait(lambda: stopped.subject() == "second")
    stopped.run("touch", "/tmp/stream.go")
    assert stream.communicate(timeout=60)[0].strip() == "200 first"
    stopped.run("rm", "/tmp/stream.go")


def test_tls_by_credential(stopped: Container) -> None:
    """Certificate and key from the credential store make the gateway speak TLS, and are renewed there."""
    _store_certificate(stopped, "stored")
    stopped.write(CONFIG, NO_ENGINE)
    stopped.systemctl("start", "spark-llm.service")
    assert stopped.subject() == "stored"
    assert stopped.http("/livez", url="https://127.0.0.1:8000")[0] == 200
    _store_certificate(stopped, "renewed")
    _take_up_credentials(stopped)
    stopped.wait(lambda: stopped.subject() == "renewed")


def test_half_of_a_tls_pair_is_refused(stopped: Container) -> None:
    """A certificate without its key ends the start with exit code 2 and says what is missing."""
    stopped.write(
        CONFIG, NO_ENGINE + '[gateway]\ntls_certificate = "/etc/spark-llm/tls/cert.pem"\n'
    )
    cursor = stopped.cursor()
    stopped.systemctl("start", "spark-llm.service", check=False)
    assert stopped.show("spark-llm.service", "ExecMainStatus")["ExecMainStatus"] == "2"
    said = " ".join(e["MESSAGE"] for e in stopped.journal("-u", "spark-llm.service", after=cursor))
    assert "no key" in said


def _store_certificate(machine: Container, name: str) -> None:
    machine.certificate("/tmp/tls", name)
    for credential, file in (("tls-certificate", "cert.pem"), ("tls-key", "key.pem")):
        machine.run(
            "install", "-Dm600", f"/tmp/tls/{file}", f"/etc/credstore/spark-llm.{credential}"
        )


def _take_up_credentials(machine: Container) -> None:
    """As the manual says: by a reload where systemd refreshes credentials, else by a restart."""
    pid = machine.main_pid()
    refreshes = machine.systemd() >= install.REFRESH_SINCE
    machine.systemctl("reload" if refreshes else "restart", "spark-llm.service")
    assert (machine.main_pid() == pid) == refreshes


def _probed(machine: Container, cursor: str) -> dict[str, Any] | None:
    for entry in machine.journal("-u", "spark-llm.service", after=cursor):
        _, found, text = str(entry["MESSAGE"]).partition("PROBE ")
        if found:
            facts: dict[str, Any] = json.loads(text)
            return facts
    return None


LOAD = """
import http.client, json, os, threading
lost, answered, lock = [], 0, threading.Lock()
def work():
    global answered
    while not os.path.exists("/tmp/load.stop"):
        connection = http.client.HTTPConnection("127.0.0.1", 8000, timeout=30)
        try:
            connection.request("GET", "/livez")
            connection.getresponse().read()
            with lock:
                answered += 1
        except Exception as error:
            with lock:
                lost.append(repr(error))
        finally:
            connection.close()
        threading.Event().wait(0.02)
threads = [threading.Thread(target=work) for _ in range(60)]
[t.start() for t in threads]
[t.join() for t in threads]
os.unlink("/tmp/load.stop")
print(json.dumps({"answered": answered, "lost": lost}))
"""
STREAM = """
import os, socket, ssl, threading
context = ssl._create_unverified_context()
raw = socket.create_connection(("127.0.0.1", 8000))
stream = context.wrap_socket(raw)
subject = stream.getpeercert(True)
name = "first" if b"first" in subject else "other"
stream.sendall(b"GET /livez HTTP/1.1\\r\\nHost: x\\r\\n")
print("open", flush=True)
while not os.path.exists("/tmp/stream.go"):
    threading.Event().wait(0.05)
stream.sendall(b"\\r\\n")
print(stream.recv(4096).split()[1].decode(), name)
"""
