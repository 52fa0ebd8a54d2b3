"""All profiles: one that is broken hides no other, and a model's name finds the one that serves it."""

import errno
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from spark_llm import catalogue
from spark_llm.profile import Profile, load_profile, shipped_folder

from tests.appliance.service import environment, stub_service, wait_for

CHAT = "/v1/chat/completions"
BROKEN = {
    "mistyped": b"contxt = 1\n",
    "no-toml": b"context = = 1\n",
}


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, ...]:
    """Two good profiles, some broken ones and those that are shipped."""
    own = tmp_path / "profiles"
    own.mkdir()
    (own / "a.toml").write_text('extends = "demo"\naliases = ["b", "small"]\n')
    (own / "b.toml").write_text('extends = "demo"\naliases = ["small"]\n')
    for name, content in BROKEN.items():
        (own / f"{name}.toml").write_bytes(content)
    return own, shipped_folder()


def test_broken_profile_hides_no_other(folders: tuple[Path, ...]) -> None:
    """All good profiles are found, and each broken one is named with what is wrong."""
    found = catalogue.read(folders)
    assert {"a", "b", "demo"} <= {profile.name for profile in found.profiles}
    assert found.faults.keys() == BROKEN.keys()
    assert "did you mean 'context'" in found.faults["mistyped"].message
    assert "not TOML" in found.faults["no-toml"].message


def test_profile_that_may_not_be_read_hides_no_other(
    folders: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that this user may not read is one of the broken ones."""

    def refused(name: str, folders: tuple[Path, ...]) -> Profile:
        if name == "a":
            raise PermissionError(errno.EACCES, "Permission denied", "a.toml")
        return load_profile(name, folders)

    monkeypatch.setattr(catalogue, "load_profile", refused)
    found = catalogue.read(folders)
    assert "Permission denied" in found.faults["a"].message
    assert "b" in {profile.name for profile in found.profiles}


@pytest.mark.parametrize(
    ("model", "name"),
    [("a", "a"), ("b", "b"), ("small", "a"), ("demo", "demo"), ("default", None), ("c", None)],
)
def test_model_finds_its_profile(folders: tuple[Path, ...], model: str, name: str | None) -> None:
    """A profile's own name comes before others' aliases, of which the first counts; ``default`` is nobody's."""
    found = catalogue.read(folders).serving(model)
    assert (found and found.name) == name


@pytest.mark.parametrize("arguments", [(), ("--json",)])
def test_command_lists_the_good_and_names_the_broken(
    tmp_path: Path, folders: tuple[Path, ...], arguments: tuple[str, ...]
) -> None:
    """``spark-llm profiles`` lists all that can be served, names the broken ones on stderr and exits with 2."""
    done = subprocess.run(
        [sys.executable, "-m", "spark_llm.cli", "profiles", *arguments],
        env=environment(tmp_path, SPARK_LLM_PATHS__PROFILES=str(folders[0]), COLUMNS="200"),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 2
    assert "mistyped.toml" in done.stderr
    assert "no-toml.toml" in done.stderr
    assert "Traceback" not in done.stderr
    if arguments:
        assert {"a", "b", "demo"} <= {item["name"] for item in json.loads(done.stdout)}
    else:
        assert {"a", "b", "demo"} <= {line.split()[0] for line in done.stdout.splitlines() if line}


def test_profiles_for_requests_are_taken_up_by_a_reload(short_path: Path) -> None:
    """A request does not read profiles: one that is new is found after SIGHUP, and a broken one stops nothing."""
    settings = {"SPARK_LLM_MODELS__ON_DEMAND": "true", "SPARK_LLM_MODELS__MAX_LOADED": "2"}
    with stub_service(short_path, **settings) as running:
        running.listening().wait_state("ready")
        (short_path / "profiles" / "late.toml").write_text('extends = "stub"\n')
        (short_path / "profiles" / "bad.toml").write_text("contxt = 1\n")
        assert running.post(CHAT, {"model": "late"})[0] == 200
        assert running.status()["others"] == []
        running.process.send_signal(signal.SIGHUP)
        wait_for(lambda: "profiles read again" in running.text(), 30, running.text)
        assert running.post(CHAT, {"model": "late"})[0] == 200
        assert [item["profile"] for item in running.status()["others"]] == ["late"]
        body = running.get("/api/v1/profiles")[1]
        assert "late" in {item["name"] for item in body["profiles"]}
        assert "bad.toml" in body["broken"]["bad"]
