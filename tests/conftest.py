"""Rules for all tests: a sentence each, a clean environment."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# A property is about its result; how long one example takes on a busy machine says nothing about it.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

pytest_plugins = ("anyio",)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse a test without its sentence."""
    bare = [
        item.nodeid
        for item in items
        if isinstance(item, pytest.Function) and not (item.function.__doc__ or "").strip()
    ]
    if bare:
        raise pytest.UsageError(f"these tests lack their sentence: {', '.join(bare)}")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the person who runs the tests reaches them."""
    for name in list(os.environ):
        if name.startswith("SPARK_LLM_") and name != "SPARK_LLM_NO_NSPAWN":
            monkeypatch.delenv(name)


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A temporary folder with a short name: the engine's sockets lie below it, and their paths are limited."""
    with tempfile.TemporaryDirectory(prefix="sl-") as made:
        yield Path(made)


@pytest.fixture
def anyio_backend() -> str:
    """The service runs on asyncio."""
    return "asyncio"
