"""A hub, a store, and pulls from one into the other."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from spark_llm import config
from spark_llm.store import Request, Store

from tests.hub.pulls import MODEL, Puller
from tests.hub.server import LocalHub, local_hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LocalHub]:
    for name in (
        "HF_TOKEN",
        "HF_ENDPOINT",
        "HF_HUB_OFFLINE",
        "CREDENTIALS_DIRECTORY",
        "HF_TOKEN_PATH",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf-home"))
    with local_hub() as hub:
        yield hub


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def pull(hub: LocalHub, store: Store) -> Puller:
    settings = config.Store(
        endpoint=hub.endpoint, reserve_bytes=0, stall_timeout_s=10, attempts=3, backoff_s=0.01
    )
    return Puller(hub, store, Request(str(store.root), MODEL, **settings.model_dump()))
