"""The operator's API over real connections."""

from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from spark_llm import keys

from tests.appliance.gateway.conftest import Running

pytestmark = pytest.mark.anyio


@pytest.fixture
async def client(running: Running) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(running.url) as session:
        yield session


async def test_keys_are_those_that_open_the_door(
    running: Running, client: aiohttp.ClientSession, tmp_path: Path
) -> None:
    """The list has the keys of a systemd credential too, not only those of the file."""
    key, token = keys.add(tmp_path / "credential", "boss", keys.ADMIN)
    running.gateway.keys = keys.load(tmp_path / "credential")
    async with client.get("/api/v1/keys", headers={"x-api-key": token}) as answer:
        assert await answer.json() == {"keys": [key.public()]}
