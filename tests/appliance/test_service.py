"""What the service owes the machine that it runs on: descriptors and signals."""

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.appliance.service import stub_service


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
