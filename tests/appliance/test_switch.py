"""Changing what is served while it is served: switch, return, on-demand load, unload."""

import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path

import pytest
from spark_llm import host
from spark_llm.demo_model import write_demo_model

from tests.appliance.service import (
    Service,
    environment,
    fetch,
    processes_below,
    stub_profile,
    stub_service,
    wait_for,
)

CHAT = "/v1/chat/completions"


@contextmanager
def _two_profiles(
    folder: Path, other: str = "", kv_cache_bytes: int = 2**20, /, **settings: str
) -> Iterator[Service]:
    (folder / "profiles").mkdir()
    (folder / "profiles" / "other.toml").write_text(
        stub_profile(other, kv_cache_bytes=kv_cache_bytes)
    )
    with stub_service(folder, "", kv_cache_bytes, **settings) as running:
        running.listening()
        running.wait_state("ready")
        yield running


def _switch(running: Service, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "spark_llm.cli", "switch", *arguments],
        env=environment(folder, SPARK_LLM_GATEWAY__PORT=str(running.port)),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_switch_serves_the_other_profile(short_path: Path) -> None:
    """A switch ends with the other profile ready, proven, and the first one's engine gone."""
    with _two_profiles(short_path) as running:
        engine = running.status()["engine_pid"]
        done = _switch(running, short_path, "other")
        assert done.returncode == 0, done.stderr
        assert done.stdout == "other serves\n"
        status = running.status()
        assert (status["profile"], status["state"]) == ("other", "ready")
        assert not Path(f"/proc/{engine}").exists()
        assert running.post(CHAT, {"model": "other"})[0] == 200


def test_switch_that_fails_its_canary_returns(short_path: Path) -> None:
    """When the new profile answers wrongly, the old one serves again and the command says why, with exit 1."""
    with _two_profiles(short_path, "wrong-canary") as running:
        done = _switch(running, short_path, "other")
        assert done.returncode == 1
        assert "the canary failed" in done.stdout
        assert "stub serves again" in done.stdout
        assert running.status()["profile"] == "stub"
        assert running.post(CHAT, {"model": "default"})[0] == 200


def test_switch_dry_run_changes_nothing(short_path: Path) -> None:
    """``--dry-run`` lists the steps and leaves the run alone."""
    with _two_profiles(short_path) as running:
        run = running.status()["run_id"]
        done = _switch(running, short_path, "other", "--dry-run")
        assert done.stdout.splitlines()[0].startswith("drain stub")
        assert running.status()["run_id"] == run


def test_switch_to_an_unknown_profile_is_a_usage_error(short_path: Path) -> None:
    """A profile that does not exist is exit 2 with the known ones, and nothing is stopped."""
    with _two_profiles(short_path) as running:
        done = _switch(running, short_path, "otter")
        assert done.returncode == 2
        assert "Known profiles" in done.stderr
        assert running.status()["state"] == "ready"


HOPELESS = {
    "two-nodes": ("peers", stub_profile().replace("[env", "nodes = 2\n[env")),
    "huge": ("does_not_fit", stub_profile(kv_cache_bytes=2**50)),
    "long": ("bad_profile", stub_profile().replace("context = 512", "context = 1_000_000")),
    "no-folder": ("model_missing", stub_profile(model="/nowhere/model")),
    "no-network": ("model_missing", stub_profile(model="org/model")),
}
"""Profiles that cannot be served here, and why."""


def test_switch_to_what_cannot_be_served_stops_nothing(short_path: Path) -> None:
    """What a start would refuse on an idle machine, too, is refused with its reason while the engine runs on."""
    (short_path / "profiles").mkdir()
    for name, (_, text) in HOPELESS.items():
        (short_path / "profiles" / f"{name}.toml").write_text(text)
    with stub_service(short_path, HF_HUB_OFFLINE="1") as running:
        running.listening()
        run = running.wait_state("ready")["run_id"]
        wanted = {name: reason for name, (reason, _) in HOPELESS.items()}
        # Where there is a GPU, it is the stub's build of vLLM that stands against this one.
        wanted["demo-gpu"] = "wrong_engine" if host.driver_version() else "no_gpu"
        for name, reason in wanted.items():
            for dry_run in (True, False):
                asked = {"profile": name, "dry_run": dry_run}
                code, body = running.post("/api/v1/switch", asked)
                assert 400 <= code < 500, (name, body)
                assert body["error"]["code"] == reason, (name, body)
        assert running.get("/api/v1/switch")[1] == {"switch": None}
        assert running.status()["run_id"] == run


def test_switch_may_fetch_its_model(short_path: Path) -> None:
    """A model that is still to be fetched is not held against a switch."""
    text = stub_profile(model="org/model")
    with _two_profiles(short_path) as running:
        (short_path / "profiles" / "far.toml").write_text(text)
        assert _switch(running, short_path, "far", "--dry-run").returncode == 0


def test_switch_lets_running_streams_finish(short_path: Path) -> None:
    """A stream that runs when the switch begins ends whole."""
    with _two_profiles(short_path, SPARK_LLM_ENGINE__DRAIN_TIMEOUT_S="120") as running:
        engine = running.status()["engine_pid"]
        request = urllib.request.Request(
            f"http://127.0.0.1:{running.port}{CHAT}", data=b'{"model": "held", "stream": true}'
        )
        with urllib.request.urlopen(request, timeout=60) as stream:
            stream.readline()
            assert running.post("/api/v1/switch", {"profile": "other"})[0] == 202
            assert running.post("/api/v1/switch", {"profile": "other"})[0] == 503
            os.kill(engine, signal.SIGUSR1)
            assert stream.read().endswith(b"data: [DONE]\n\n")
        wait_for(
            lambda: running.get("/api/v1/switch")[1]["switch"]["outcome"] == "done",
            30,
            running.text,
        )


ON_DEMAND = {
    "SPARK_LLM_MODELS__ON_DEMAND": "true",
    "SPARK_LLM_MODELS__MAX_LOADED": "2",
}


def test_model_is_loaded_on_demand(short_path: Path) -> None:
    """A request for a known profile that is not loaded waits for it and is answered by it, beside the first."""
    with _two_profiles(short_path, **ON_DEMAND) as running:
        assert running.post(CHAT, {"model": "other"})[0] == 200
        assert [item["profile"] for item in running.status()["others"]] == ["other"]
        assert len(running.get("/v1/models")[1]["data"]) == 2
        assert running.post(CHAT, {"model": "default"})[0] == 200
        assert running.stop() == 0
    wait_for(lambda: not processes_below(short_path), 30, lambda: "left")


def test_model_is_not_loaded_unless_allowed(short_path: Path) -> None:
    """Without ``models.on_demand`` such a request goes to the engine that runs."""
    with _two_profiles(short_path) as running:
        assert running.post(CHAT, {"model": "other"})[0] == 200  # the stub answers to every name
        assert running.status()["others"] == []


def test_model_that_fails_to_load_is_a_503(short_path: Path) -> None:
    """Requests that waited for a model which is not proven are answered 503 with its reason."""
    with _two_profiles(short_path, "wrong-canary", **ON_DEMAND) as running:
        code, body = running.post(CHAT, {"model": "other"})
        assert (code, body["error"]["code"]) == (503, "canary")
        assert running.post(CHAT, {"model": "default"})[0] == 200


def test_model_that_failed_is_loaded_again(short_path: Path) -> None:
    """A model that could not be loaded is loaded by a later request, once what was in the way is cured."""
    model = short_path / "model"
    with _two_profiles(short_path, **ON_DEMAND) as running:
        (short_path / "profiles" / "late.toml").write_text(stub_profile(model=str(model)))
        running.process.send_signal(signal.SIGHUP)
        running.wait_log("profiles read again")
        code, body = running.post(CHAT, {"model": "late"})
        assert (code, body["error"]["code"]) == (503, "model_missing")
        write_demo_model(model)
        wait_for(lambda: running.post(CHAT, {"model": "late"})[0] == 200, 30, running.text)


def test_client_that_does_not_wait_for_a_load_is_told(short_path: Path) -> None:
    """A client's own timeout ends its wait for a model that is being loaded, and nobody else's."""
    with _two_profiles(short_path, "hang-at-load", **ON_DEMAND) as running:
        url = f"http://127.0.0.1:{running.port}{CHAT}"
        hurried = {"x-stainless-timeout": "0.5"}
        code, body = fetch(url, b'{"model": "other"}', **hurried)
        assert (code, body["error"]["code"]) == (503, "deadline")
        assert running.status()["others"][0]["state"] != "failed"


def test_idle_model_is_unloaded(short_path: Path) -> None:
    """A model beside the first is unloaded after its time to live, and loaded again when it is asked for."""
    with _two_profiles(short_path, **ON_DEMAND, SPARK_LLM_MODELS__TTL_S="1") as running:
        assert running.post(CHAT, {"model": "other"})[0] == 200
        wait_for(lambda: running.status()["others"] == [], 30, running.text)
        assert running.post(CHAT, {"model": "other"})[0] == 200


def test_pinned_model_is_loaded_at_the_start_and_stays(short_path: Path) -> None:
    """A pinned profile is there without being asked for, and stays when one that is not pinned has had its time."""
    settings = {
        "SPARK_LLM_MODELS__ON_DEMAND": "true",
        "SPARK_LLM_MODELS__MAX_LOADED": "3",
        "SPARK_LLM_MODELS__PINNED": '["pinned"]',
        "SPARK_LLM_MODELS__TTL_S": "1",
        "SPARK_LLM_ENGINE__RESTART_BUDGET": "0",
    }
    (short_path / "profiles").mkdir()
    for name in ("pinned", "other"):
        (short_path / "profiles" / f"{name}.toml").write_text(stub_profile())
    # The first model fails, so that memory for two engines is enough.
    with stub_service(short_path, "exit-at-load", **settings) as running:
        running.listening()

        def beside() -> dict[str, tuple[str, str]]:
            return {
                item["profile"]: (item["state"], item["run_id"])
                for item in running.status()["others"]
            }

        wait_for(lambda: beside()["pinned"][0] == "ready", 30, running.text)
        assert running.post(CHAT, {"model": "pinned"})[0] == 200
        before = beside()
        assert running.post(CHAT, {"model": "other"})[0] == 200
        running.wait_log("unloading other")
        assert beside() == before
        assert list(before) == ["pinned"]


def test_switch_to_a_model_that_is_loaded_beside(short_path: Path) -> None:
    """The engine beside the first is stopped before its profile becomes the first; a pinned one is loaded again."""
    settings = {**ON_DEMAND, "SPARK_LLM_MODELS__PINNED": '["other"]'}
    with _two_profiles(short_path, **settings) as running:
        wait_for(lambda: running.status()["others"][0]["state"] == "ready", 30, running.text)
        done = _switch(running, short_path, "other")
        assert done.returncode == 0, done.stderr
        assert running.status()["others"] == []
        assert running.post(CHAT, {"model": "other"})[0] == 200
        assert _switch(running, short_path, "stub").returncode == 0
        wait_for(lambda: running.status()["others"][0]["state"] == "ready", 30, running.text)


def test_model_that_is_being_unloaded_is_loaded_after_that(short_path: Path) -> None:
    """A request for a model whose engine is still stopping waits for the new one; the two never run together."""
    settings = {
        **ON_DEMAND,
        "SPARK_LLM_MODELS__TTL_S": "1",
        "SPARK_LLM_ENGINE__STOP_TIMEOUT_S": "120",
    }
    with _two_profiles(short_path, "deaf", **settings) as running:
        assert running.post(CHAT, {"model": "other"})[0] == 200

        def engines() -> list[str]:
            return [
                line
                for line in processes_below(short_path)
                if "--uds" in line and "other.sock" in line
            ]

        before = engines()
        wait_for(lambda: running.status()["others"] == [], 30, running.text)
        assert engines() == before, "it is deaf to SIGTERM"
        with closing(HTTPConnection("127.0.0.1", running.port, timeout=60)) as waiting:
            waiting.request("POST", CHAT, b'{"model": "other"}')
            for _ in range(20):  # each a turn of the service, which has the request by now
                assert running.status()["others"] == []
            assert engines() == before
            os.kill(int(before[0].partition(":")[0]), signal.SIGKILL)
            assert waiting.getresponse().status == 200
        assert len(engines()) == len(before) == 1
        assert engines() != before


def test_memory_is_promised_once(short_path: Path) -> None:
    """With memory for one of two engines the first model gets it, and keeps its place while its engine is restarted."""
    available = host.machine().available
    cache = available // 3  # by the ledger; it really takes some 40 MB
    need = cache + 2.2 * 2**30
    reserve = max(0, int(available - 1.5 * need))  # neighbours may take or give back half of need
    settings = {
        **ON_DEMAND,
        "SPARK_LLM_MODELS__PINNED": '["other"]',
        "SPARK_LLM_MEMORY__RESERVE_BYTES": str(reserve),
    }
    (short_path / "state" / "high-water.json").mkdir(parents=True)  # nothing is learned
    with _two_profiles(short_path, "", cache, **settings) as running:

        def beside() -> dict[str, str]:
            found: dict[str, str] = running.status()["others"][0]
            return found

        wait_for(lambda: "promised to other engines" in beside()["message"], 30, running.text)
        first = running.status()
        os.kill(first["engine_pid"], signal.SIGKILL)
        wait_for(lambda: running.status()["run_id"] not in {"", first["run_id"]}, 30, running.text)
        running.wait_state("ready")
        assert beside()["state"] == "waiting_memory"
        assert "other is ready" not in running.text()


@pytest.mark.parametrize(
    ("pinned", "loaded", "message"),
    [
        ('["other"]', "1", "models.max_loaded = 1"),
        ('["otter"]', "2", "no profile is named 'otter'"),
    ],
)
def test_pinned_models_that_cannot_be_are_a_usage_error(
    short_path: Path, pinned: str, loaded: str, message: str
) -> None:
    """Pinned models that are unknown, or more than may be loaded, are refused by name before anything starts."""
    (short_path / "profiles").mkdir()
    (short_path / "profiles" / "other.toml").write_text(stub_profile())
    settings = {
        "SPARK_LLM_MODELS__PINNED": pinned,
        "SPARK_LLM_MODELS__MAX_LOADED": loaded,
    }
    with stub_service(short_path, **settings) as running:
        assert running.process.wait(30) == 2
        assert message in running.text()
        assert "loading" not in running.text()


def test_canary_on_demand(short_path: Path) -> None:
    """``POST /api/v1/canary`` proves the running engine again."""
    with _two_profiles(short_path) as running:
        code, body = running.post("/api/v1/canary", {})
        assert (code, body["passed"]) == (200, True)


def test_foreign_pages_may_not_change_things(short_path: Path) -> None:
    """A web page's request, by its Origin or by a rebound Host, is refused; reading is not changed."""
    with _two_profiles(short_path) as running:
        url = f"http://127.0.0.1:{running.port}/api/v1/switch"
        for headers in (
            {"Origin": "http://evil.example"},
            {
                "Host": f"evil.example:{running.port}",
                "Origin": f"http://evil.example:{running.port}",
            },
        ):
            assert fetch(url, b'{"profile": "other"}', **headers)[0] == 403
        assert running.get("/api/v1/switch")[1] == {"switch": None}


def test_only_admin_keys_may_change_things(short_path: Path) -> None:
    """With keys configured, a switch needs one made with ``--admin``."""
    tokens = {}
    for name, extra in (("user", []), ("boss", ["--admin"])):
        done = subprocess.run(
            [sys.executable, "-m", "spark_llm.cli", "keys", "add", name, *extra],
            env=environment(short_path),
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        tokens[name] = done.stdout.strip()
    with stub_service(short_path) as running:
        running.listening()
        url = f"http://127.0.0.1:{running.port}/api/v1/switch"
        for name, expected in (("user", 403), ("boss", 200)):
            headers = {"Authorization": f"Bearer {tokens[name]}"}
            assert fetch(url, b'{"profile": "demo", "dry_run": true}', **headers)[0] == expected


def test_fit_and_profiles_are_in_the_api(short_path: Path) -> None:
    """``/api/v1/fit`` gives the ledger, ``/api/v1/profiles`` the catalogue; unknown keys are named."""
    with _two_profiles(short_path) as running:
        code, body = running.post("/api/v1/fit", {"profile": "demo"})
        assert code == 200, body
        names = {item["name"] for item in running.get("/api/v1/profiles")[1]["profiles"]}
        assert {"demo", "other", "stub"} <= names
        code, body = fetch(f"http://127.0.0.1:{running.port}/api/v1/fit", b'{"profil": "x"}')
        assert code == 400
        assert "did you mean 'profile'" in body["error"]["message"]
