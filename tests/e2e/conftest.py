"""One real service with a real vLLM for all tests that only ask it things."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.appliance.service import Service, environment, service

START_TIMEOUT_S = 240
"""A first start on two busy cores takes minutes; on idle ones, half of one."""


@contextmanager
def demo_service(folder: Path, cache: Path, **settings: str) -> Iterator[Service]:
    """A service with the demo profile and the real engine, listening."""
    env = environment(folder, SPARK_LLM_PATHS__CACHE=str(cache), **settings)
    with service(folder, env=env) as running:
        yield running.listening()


@pytest.fixture(scope="session")
def engine_cache() -> Iterator[Path]:
    """One cache for all services of the run, so that only the first start is cold; a short name, see ``short_path``."""
    with tempfile.TemporaryDirectory(prefix="sl-") as made:
        yield Path(made)


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory, engine_cache: Path) -> Iterator[Service]:
    """A service with the demo profile, ready."""
    with demo_service(tmp_path_factory.mktemp("demo"), engine_cache) as running:
        running.wait_state("ready", timeout_s=START_TIMEOUT_S)
        yield running
        assert running.stop() == 0
