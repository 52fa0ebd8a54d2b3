"""Upgrades that fail: what is installed afterwards, with a nix-env and a systemctl that only keep links and notes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from spark_llm import generations
from spark_llm import install as files
from spark_llm.commands import install
from spark_llm.errors import SparkLlmError
from spark_llm.reason import Reason


@dataclass
class Machine:
    """A Nix profile below a folder, and what was run.

    Attributes:
        root: holds the store and the profile.
        ran: commands, in order.
        failing: tells which commands fail.
    """

    root: Path
    ran: list[str] = field(default_factory=list)
    failing: Callable[[str], bool] = lambda _: False

    def package(self, name: str) -> Path:
        program = self.root / "store" / name / "bin" / "spark-llm"
        program.parent.mkdir(parents=True)
        program.touch()
        return program.parents[1]

    def nix_env(self, *arguments: str) -> None:
        self.run("nix-env", *arguments)
        if arguments[0] == "--set":
            count = len(list(generations.PROFILE.parent.glob("*-link")))
            link = generations.PROFILE.with_name(f"spark-llm-{count + 1}-link")
            link.symlink_to(arguments[1])
        else:
            assert arguments[0] == "--switch-generation"
            link = generations.PROFILE.with_name(f"spark-llm-{arguments[1]}-link")
        generations.PROFILE.unlink(missing_ok=True)
        generations.PROFILE.symlink_to(link)

    def run(self, *command: str) -> None:
        line = " ".join(command).replace(f"{self.root}/store/", "")
        self.ran.append(line)
        if self.failing(line):
            raise SparkLlmError(f"{line} failed", reason=Reason.CANARY)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine(tmp_path)
    (tmp_path / "profiles").mkdir()
    monkeypatch.setattr(generations, "STORE", tmp_path / "store")
    monkeypatch.setattr(generations, "PROFILE", tmp_path / "profiles" / "spark-llm")
    monkeypatch.setattr(generations, "_nix_env", machine.nix_env)
    monkeypatch.setattr(install, "_run", machine.run)
    monkeypatch.setattr(install, "_need_root", lambda: None)
    return machine


def test_a_version_that_fails_gives_way_to_the_one_before(machine: Machine) -> None:
    """The version that served serves again, and the next rollback does not lead to the one that failed."""
    for name in ("old", "running"):
        generations.select(machine.package(name))
    machine.failing = lambda line: line.startswith("new/bin/spark-llm wait")
    with pytest.raises(SparkLlmError, match="running serves again") as caught:
        install.upgrade(machine.package("new"), 1.0)
    assert "new/bin/spark-llm wait" in caught.value.hint
    assert generations.PROFILE.readlink().name == "spark-llm-2-link"
    assert machine.ran[-4:] == [
        "nix-env --switch-generation 2",
        "running/bin/spark-llm install",
        "systemctl restart spark-llm.service",
        "running/bin/spark-llm wait --ready --timeout 1.0",
    ]


def test_a_switch_that_fails_leaves_all_as_it_was(machine: Machine) -> None:
    """When nix-env cannot switch, the healthy installation is neither downgraded nor restarted."""
    for name in ("old", "running"):
        generations.select(machine.package(name))
    machine.failing = lambda line: line.startswith("nix-env --set new")
    with pytest.raises(SparkLlmError, match="running stays installed"):
        install.upgrade(machine.package("new"), 1.0)
    assert generations.current() == generations.STORE / "running"
    assert machine.ran[-1] == "nix-env --set new"


def test_the_same_version_again_has_nothing_to_go_back_to(machine: Machine) -> None:
    """An upgrade to what is installed that fails does not bring an older version."""
    packages = [machine.package(name) for name in ("old", "running")]
    for package in packages:
        generations.select(package)
    machine.failing = lambda line: "wait" in line
    with pytest.raises(SparkLlmError, match="running stays installed"):
        install.upgrade(packages[1], 1.0)
    assert generations.current() == packages[1]


def test_a_version_whose_generation_was_deleted_gets_a_new_one(machine: Machine) -> None:
    """Going back works also after somebody deleted the old generations in the middle of an upgrade."""
    before = machine.package("before")
    generations.select(machine.package("new"))
    generations.go_back_to(before)
    assert generations.current() == before


def test_a_half_done_uninstallation_can_be_finished(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With only the users' file left, no unit is disabled, for systemctl refuses to disable nothing."""
    root = tmp_path / "root"
    monkeypatch.setattr(install, "ROOT", root)
    files.apply(root, [files.Change(files.SYSUSERS, files.MARK, new=True)])
    install.uninstall(root)
    assert machine.ran == ["systemctl daemon-reload"]
    assert not (root / files.SYSUSERS).exists()
