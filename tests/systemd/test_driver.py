"""``spark-llm-driver.service`` on a machine whose NVIDIA driver is a tree of empty files."""

import platform
from collections.abc import Iterator

import pytest
from container import TREE, Container

UNIT = "spark-llm-driver.service"
PACKAGE = "/opt/package"
FARM = "/run/opengl-driver"
VERSION = "580.95.05"
LIBRARIES = f"/usr/lib/{platform.machine()}-linux-gnu"
NAMES = [f"lib{name}.so.{end}" for name in ("cuda", "nvidia-ml") for end in ("1", VERSION)]


@pytest.fixture(scope="module")
def packaged(machine: Container) -> Container:
    """The service installed from a folder that has ``driver-link`` too, as the flake's package."""
    script = (TREE / "pkgs" / "driver-link" / "driver-link.sh").read_text()
    machine.write(f"{PACKAGE}/bin/driver-link", f"#!/bin/bash\nset -euo pipefail\n{script}", 0o755)
    for name in ("spark-llm", "spark-llm-guard"):
        machine.run("ln", "-s", f"{TREE}/.venv/bin/{name}", f"{PACKAGE}/bin/{name}")
    machine.run(f"{PACKAGE}/bin/spark-llm", "install", "--package", PACKAGE)
    return machine


@pytest.fixture
def without_driver(packaged: Container) -> Iterator[Container]:
    """A machine that has neither the driver nor the link farm."""
    yield packaged
    packaged.systemctl("stop", UNIT)
    packaged.systemctl("reset-failed")
    packaged.run("sh", "-c", f"rm -rf {FARM} /run/current-system /run/systemd/system/{UNIT}.d")
    packaged.systemctl("daemon-reload")


@pytest.fixture
def with_driver(without_driver: Container) -> Iterator[Container]:
    """The driver's libraries, and what its kernel module shows in /proc, to PID 1 and to the unit."""
    machine = without_driver
    version = f"NVRM version: NVIDIA UNIX Open Kernel Module  {VERSION}  Release Build\n"
    machine.write("/opt/proc/nvidia/version", version)
    machine.run("mount", "--bind", "/opt/proc", "/proc/driver")
    # ProtectProc= gives the unit a /proc of its own; the real driver is in that one too.
    machine.write(
        f"/run/systemd/system/{UNIT}.d/50-test.conf",
        "[Service]\nBindReadOnlyPaths=/opt/proc:/proc/driver\n",
    )
    machine.systemctl("daemon-reload")
    paths = [f"{LIBRARIES}/{name}" for name in NAMES]
    for link, file in zip(paths[::2], paths[1::2], strict=True):
        machine.run("touch", file)
        machine.run("ln", "-sf", file.rpartition("/")[2], link)
    yield machine
    machine.run("umount", "/proc/driver")
    machine.run("rm", *paths)


def test_links_the_driver_and_takes_the_links_away(with_driver: Container) -> None:
    """A start makes the link farm, another start leaves it as it is, a stop removes it."""
    for _ in range(2):
        with_driver.systemctl("restart", UNIT)
        assert with_driver.show(UNIT, "ActiveState", "ConditionResult") == {
            "ActiveState": "active",
            "ConditionResult": "yes",
        }
        links = with_driver.run("ls", f"{FARM}/lib").stdout.split()
        assert sorted(links) == sorted(NAMES)
        # The engine's user must be able to follow them.
        with_driver.run("runuser", "-u", "spark-llm", "--", "cat", f"{FARM}/lib/libcuda.so.1")
        # What the script does for itself when it is called twice without a removal between.
        with_driver.run(f"{PACKAGE}/bin/driver-link")
        assert with_driver.run("ls", f"{FARM}/lib").stdout.split() == links
    with_driver.systemctl("stop", UNIT)
    assert with_driver.run("ls", FARM, check=False).returncode != 0


def test_does_nothing_without_a_driver(without_driver: Container) -> None:
    """On a machine without the NVIDIA driver the unit is skipped: no error, no folder."""
    _assert_skipped(without_driver)


def test_does_nothing_on_nixos(with_driver: Container) -> None:
    """On NixOS, which provides the folder itself, the unit is skipped although the driver is there."""
    with_driver.run("mkdir", "/run/current-system")
    _assert_skipped(with_driver)


def test_upgraded_driver_before_the_reboot_is_named(with_driver: Container) -> None:
    """Libraries newer than the loaded module fail the unit, and the journal says to reboot."""
    newer = f"{LIBRARIES}/libcuda.so.590.1.2"
    with_driver.run("touch", newer)
    with_driver.run("ln", "-sf", newer, f"{LIBRARIES}/libcuda.so.1")
    cursor = with_driver.cursor()
    with_driver.systemctl("start", UNIT, check=False)
    assert with_driver.show(UNIT, "Result")["Result"] == "exit-code"
    said = " ".join(entry["MESSAGE"] for entry in with_driver.journal("-u", UNIT, after=cursor))
    assert "libcuda is 590.1.2" in said
    assert "Reboot" in said
    with_driver.run("rm", newer)


def _assert_skipped(machine: Container) -> None:
    machine.systemctl("start", UNIT)
    assert machine.show(UNIT, "ActiveState", "ConditionResult", "Result") == {
        "ActiveState": "inactive",
        "ConditionResult": "no",
        "Result": "success",
    }
    assert machine.run("ls", FARM, check=False).returncode != 0
