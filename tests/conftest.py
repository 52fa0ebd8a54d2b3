"""Rules for all tests: a sentence each, a clean environment."""

import os

import pytest

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
def anyio_backend() -> str:
    """The service runs on asyncio."""
    return "asyncio"
