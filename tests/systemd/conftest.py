"""Fixtures: a booted container for each module, with the service installed by its own installer."""

from collections.abc import Callable, Iterator

import pytest
from container import CONFIG, NO_ENGINE, TREE, Container, container_or_reason

UNITS = (
    "spark-llm.service",
    "spark-llm.socket",
    "spark-llm-ready.service",
    "spark-llm-guard.service",
)


@pytest.fixture(scope="module")
def machine() -> Iterator[Container]:
    """A booted machine without the service."""
    with container_or_reason() as container:
        yield container


@pytest.fixture(scope="module")
def installed(machine: Container) -> Container:
    """The service installed, not started."""
    machine.run(f"{TREE}/.venv/bin/spark-llm", "install")
    return machine


@pytest.fixture
def stopped(installed: Container) -> Iterator[Container]:
    """The service installed and stopped, with nothing left of an earlier test."""
    _clean(installed)
    yield installed
    _clean(installed)


@pytest.fixture
def blocked(stopped: Container) -> Container:
    """The service running without an engine."""
    stopped.write(CONFIG, NO_ENGINE)
    stopped.systemctl("start", "spark-llm.service")
    return stopped


@pytest.fixture
def drop_in(installed: Container) -> Callable[[str, str], None]:
    """Adds settings to a unit until the test's end."""

    def add(unit: str, text: str) -> None:
        installed.write(f"/run/systemd/system/{unit}.d/50-test.conf", text)
        installed.systemctl("daemon-reload")

    return add


def _clean(machine: Container) -> None:
    machine.systemctl("stop", *UNITS, check=False)
    machine.run(
        "sh",
        "-c",
        "rm -rf /run/systemd/system/spark-llm*.d /etc/credstore/spark-llm.* /var/lib/spark-llm/keys.json"
        f" {CONFIG} /etc/spark-llm/tls",
    )
    machine.systemctl("daemon-reload")
    machine.systemctl("reset-failed", *UNITS, check=False)
