"""doctor: every finding for what it is, with what to do."""

import json
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

import pytest
from spark_llm import doctor
from spark_llm.caches import CacheRoot
from spark_llm.config import Memory, Settings, Store
from spark_llm.doctor import Finding, Level, driver_finding, examine
from spark_llm.folders import Folders
from spark_llm.store.layout import ModelFolder
from typer.testing import CliRunner

from tests.hub.server import LocalHub, local_hub


@pytest.fixture
def hub() -> Iterator[LocalHub]:
    with local_hub() as hub:
        yield hub


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    folders = Folders(tmp_path / "state", tmp_path / "cache", tmp_path / "run", ())
    return folders.make()


def settings(hub: LocalHub, **store: object) -> Settings:
    return Settings(store=Store(endpoint=hub.endpoint, reserve_bytes=0, **store))  # type: ignore[arg-type]  # fields


def by_check(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.check: finding for finding in findings}


def test_a_healthy_machine_is_ok_throughout(hub: LocalHub, folders: Folders) -> None:
    """Nothing to complain about: every line is ok, each check has one."""
    findings = examine(settings(hub), folders, {"HOME": "/nonexistent"})
    assert {finding.level for finding in findings} == {Level.OK}, findings
    expected = {
        "disk",
        "state",
        "models",
        "cache",
        "hub",
        "clock",
        "token",
        "caches",
        "driver",
        "versions",
    }
    assert expected <= set(by_check(findings))


def test_a_hub_out_of_reach_is_a_warning(folders: Folders) -> None:
    """Serving needs no hub, so its absence is no failure."""
    found = by_check(examine(Settings(store=Store(endpoint="http://127.0.0.1:9")), folders, {}))
    assert found["hub"].level is Level.WARN
    assert "HF_ENDPOINT" in found["hub"].hint


@pytest.mark.parametrize(
    ("token", "level"), [("hf_local_token_for_tests", Level.OK), ("hf_expired", Level.FAIL)]
)
def test_the_token_is_tried(hub: LocalHub, folders: Folders, token: str, level: Level) -> None:
    """A token that the hub does not know fails now, not in the middle of the night; it is never printed."""
    findings = examine(settings(hub), folders, {"HF_TOKEN": token})
    assert by_check(findings)["token"].level is level
    assert token not in repr(findings)


def test_a_token_file_that_others_can_read_fails(
    hub: LocalHub, folders: Folders, tmp_path: Path
) -> None:
    """A secret everybody can read is none."""
    secret = tmp_path / "token"
    secret.write_text(hub.token)
    secret.chmod(0o644)
    found = by_check(examine(settings(hub, token_file=str(secret)), folders, {}))
    assert found["token file"].level is Level.FAIL
    secret.chmod(0o600)
    assert "token file" not in by_check(examine(settings(hub, token_file=str(secret)), folders, {}))


@pytest.mark.parametrize(("off", "level"), [(0, Level.OK), (60, Level.WARN), (4000, Level.FAIL)])
def test_a_wrong_clock_is_noticed(off: float, level: Level) -> None:
    """Signed addresses and certificates depend on the clock."""
    now = time.time()
    (finding,) = doctor.check_clock(formatdate(now - off, usegmt=True), now)
    assert finding.level is level
    assert list(doctor.check_clock("not a date", now)) == []


def test_a_full_disk_is_a_warning(tmp_path: Path) -> None:
    """Less than the reserve is said before the next pull is refused."""
    assert [finding.level for finding in doctor.check_disk(tmp_path / "not" / "yet", 2**62)] == [
        Level.WARN
    ]


def test_a_folder_open_to_everybody_fails(folders: Folders) -> None:
    """Whoever can write models or caches decides what runs."""
    folders.cache.chmod(0o777)
    found = by_check(list(doctor.check_folders(folders)))
    assert (found["cache"].level, found["state"].level) == (Level.FAIL, Level.OK)


def test_leftovers_are_found_and_repaired(folders: Folders) -> None:
    """What a crash left is named with its size, and goes when asked, unless somebody works there."""
    folder = ModelFolder(folders.models, "org/name")
    (folder.path / ".tmp-abc").mkdir(parents=True)
    (folder.path / ".tmp-abc" / "file").write_bytes(b"x" * 1000)
    (folder.quarantine("0" * 40)).mkdir(parents=True)
    (folders.models / ".tmp-removed").mkdir()
    levels = [finding.level for finding in doctor.check_leftovers(folders.models, repair=False)]
    assert levels == [Level.WARN, Level.WARN]
    with folder.write_lock.hold("pull"):
        busy = list(doctor.check_leftovers(folders.models, repair=True))
    assert busy[0].level is Level.WARN
    assert "pull" in busy[0].message
    assert [finding.level for finding in doctor.check_leftovers(folders.models, repair=True)] == [
        Level.OK
    ]
    assert list(doctor.check_leftovers(folders.models, repair=False)) == []


def test_damaged_and_unfinished_models_are_named(folders: Folders) -> None:
    """A snapshot without a receipt fails, a pull that was broken off is a warning."""
    ModelFolder(folders.models, "org/damaged").snapshot("0" * 40).mkdir(parents=True)
    ModelFolder(folders.models, "org/unfinished").incoming("1" * 40).own.mkdir(parents=True)
    levels = {
        finding.message.split("@")[0]: finding.level
        for finding in doctor.check_models(folders.models)
    }
    assert levels["org/damaged"] is Level.FAIL
    assert levels["org/unfinished"] is Level.WARN


def test_held_locks_are_shown(folders: Folders) -> None:
    """Who waits can see for whom."""
    folder = ModelFolder(folders.models, "org/name")
    folder.path.mkdir(parents=True)
    with folder.use_lock.hold("serving", shared=True):
        assert "serving" in next(iter(doctor.check_locks(folders.models))).message
    assert list(doctor.check_locks(folders.models)) == []


def test_caches_above_the_limit_are_a_warning(tmp_path: Path) -> None:
    """The line names the command that helps; a namespace that was never sealed is told apart."""
    namespace = tmp_path / ("a" * 16)
    (namespace / "data").mkdir(parents=True)
    (namespace / "data" / "file").write_bytes(b"x" * 100)
    findings = list(doctor.check_caches(CacheRoot(tmp_path), 10))
    assert [finding.level for finding in findings] == [Level.WARN, Level.WARN]
    assert "prune" in findings[0].hint


def test_drivers_that_are_known_to_fail_on_gb10_are_warned_of() -> None:
    """580 is what DGX OS ships; 590 dead-locks there; other GPUs are their owner's business."""
    known = Settings().memory.drivers
    assert driver_finding("NVIDIA GB10", "580.95.05", known).level is Level.OK
    assert driver_finding("NVIDIA GB10", "590.44", known).level is Level.WARN
    assert driver_finding("NVIDIA H100", "590.44", known).level is Level.OK


def test_drivers_are_judged_by_the_setting(
    hub: LocalHub, folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever allows another driver is warned of it neither at the start nor here; an empty list allows any."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho NVIDIA GB10, 610.10\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    for drivers, level in ((("580.",), Level.WARN), (("580.", "610."), Level.OK), ((), Level.OK)):
        allowed = settings(hub).model_copy(update={"memory": Memory(drivers=drivers)})
        assert by_check(examine(allowed, folders, {}))["driver"].level is level


def test_the_command_prints_lines_or_json(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """People get marks and hints, programs get a list; a failure is exit code 1."""
    import typer
    from spark_llm.commands.doctor import register

    app = typer.Typer()
    register(app)
    monkeypatch.setenv("SPARK_LLM_STORE__ENDPOINT", hub.endpoint)
    for name in ("state", "cache", "runtime"):
        monkeypatch.setenv(f"SPARK_LLM_PATHS__{name.upper()}", str(tmp_path / name))
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    ran = CliRunner().invoke(app, [])
    assert ran.exit_code == 1
    assert "[ FAIL ] token: the hub refuses the token from $HF_TOKEN (401)" in ran.output
    listed = json.loads(CliRunner().invoke(app, ["--json"]).output)
    assert {"check", "level", "message", "hint"} == set(listed[0])
