"""Who may ask, and who may change what is served."""

from typing import Any

import aiohttp
import pytest
from spark_llm import keys
from spark_llm.gateway.access import check
from spark_llm.reply import Reply

from tests.appliance.gateway.conftest import Running


def key(name: str, token: str, *, admin: bool = False) -> keys.Key:
    salt = "00"
    return keys.Key(
        name, name, keys.ADMIN if admin else keys.INFERENCE, salt, keys.digest(token, salt), 0
    )


KEYS = (key("plain", "one"), key("boss", "two", admin=True))


def scope(client: str = "127.0.0.1", **headers: str) -> dict[str, Any]:
    named = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return {"client": (client, 5), "headers": named}


def status(accepted: tuple[keys.Key, ...], asked: dict[str, Any], *, change: bool = False) -> int:
    """Of the answer; 200 where the request is let in."""
    try:
        check(accepted, asked, change=change)
    except Reply as reply:
        return reply.status
    return 200


@pytest.mark.parametrize(
    ("headers", "asking", "changing"),
    [
        ({}, 401, 401),
        ({"authorization": "Bearer three"}, 401, 401),
        ({"authorization": "Basic one"}, 401, 401),
        ({"authorization": "Bearer one"}, 200, 403),
        ({"authorization": "bearer two"}, 200, 200),
        ({"x_api_key": "two"}, 200, 200),
        ({"authorization": "Bearer none", "x_api_key": "one"}, 200, 403),
    ],
)
def test_keys_decide_where_there_are_keys(
    headers: dict[str, str], asking: int, changing: int
) -> None:
    """A known key in either header lets in, an admin's may change, and where it comes from does not matter."""
    asked = scope("10.0.0.9", host="spark.example.com", origin="http://evil.example", **headers)
    assert status(KEYS, asked) == asking
    assert status(KEYS, asked, change=True) == changing


@pytest.mark.parametrize(
    ("asked", "asking", "changing"),
    [
        (scope(host="localhost:8000"), 200, 200),
        (scope(host="127.0.0.1:8000"), 200, 200),
        (scope("::1", host="[::1]:8000"), 200, 200),
        (scope("::ffff:127.0.0.1", host="localhost"), 200, 200),
        (scope(host="localhost:8000", origin="http://localhost:8000"), 200, 200),
        # a page of another program on this machine may ask, not change
        (scope(host="localhost:8000", origin="http://localhost:3000"), 200, 403),
        (scope(host="spark:8000"), 200, 403),
        (scope(host="spark.local:8000"), 200, 403),
        (scope(host="192.168.1.5:8000"), 200, 403),
        (scope(host="localhost:8000", origin="vscode-webview://a"), 200, 403),
        # DNS rebinding: a page's own name that leads here
        (scope(host="evil.example:8000"), 403, 403),
        (scope(host="localhost.evil.example"), 403, 403),
        # a page that posts here without asking
        (scope(host="localhost:8000", origin="https://evil.example"), 403, 403),
        (scope(host="localhost:8000", origin="null"), 403, 403),
        # from the network, where --insecure has let it in
        (scope("192.168.1.9", host="spark.example.com"), 200, 403),
        (scope("192.168.1.9", host="localhost"), 200, 403),
        # through a proxy on this machine
        (scope(host="127.0.0.1:8000", x_forwarded_for="192.168.1.9"), 200, 403),
        ({"client": None, "headers": []}, 200, 403),
    ],
)
def test_without_keys_this_machine_decides(
    asked: dict[str, Any], asking: int, changing: int
) -> None:
    """Only programs here may change things, and no page from elsewhere may ask."""
    assert status((), asked) == asking
    assert status((), asked, change=True) == changing


@pytest.mark.anyio
async def test_refusals_are_counted(running: Running) -> None:
    """Who tries keys shows in the metrics, by path and status."""
    running.gateway.keys = KEYS
    async with aiohttp.ClientSession(running.url) as client:
        for path in ("/v1/models", "/api/v1/status"):
            async with client.get(path, headers={"x-api-key": "guess"}) as answer:
                assert answer.status == 401
        async with client.get("/metrics") as answer:
            counted = await answer.text()
    for path in ("/v1/models", "/api"):
        assert f'path="{path}",reason="unauthorized",status="401"' in counted
