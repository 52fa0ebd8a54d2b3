"""Which HTTP client library: each fetches the same streamed answers over the same Unix socket, on uvloop.

    PYTHONPATH=appliance/src python bench/gateway/clients.py --out bench/gateway/results/clients

In the environment of requirements.txt, which has aiohttp and httpx; needs cc and two cores.
"""

import argparse
import asyncio
import os
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp
import httptools
import httpx
import report
import targets
import uvloop
from spark_llm.upstream import Upstream

EVENTS = 66
TARGET = "/v1/chat/completions"
BODY = b'{"model":"default","messages":[{"role":"user","content":"hi"}],"stream":true}'
HEADERS = {"content-type": "application/json", "x-request-id": "0123456789abcdef"}

Fetch = Callable[[], Awaitable[int]]
"""One answer; its number of events."""


async def measure(fetch: Fetch, clients: int, seconds: float) -> tuple[float, float]:
    """Answers per second, and CPU time per answer in microseconds."""
    count = 0

    async def ask_until(end: float) -> None:
        nonlocal count
        while time.monotonic() < end:
            if await fetch() != EVENTS:
                raise SystemExit("an answer is incomplete")
            count += 1

    async def all_clients(end: float) -> None:
        await asyncio.gather(*(ask_until(end) for _ in range(clients)))

    await all_clients(time.monotonic() + 0.3)
    count, begin, cpu = 0, time.monotonic(), time.process_time()
    await all_clients(begin + seconds)
    return count / (time.monotonic() - begin), 1e6 * (time.process_time() - cpu) / count


async def compare(socket: Path, rounds: int, seconds: float) -> list[str]:
    """The table's rows."""
    upstream = Upstream(socket)
    connector = aiohttp.UnixConnector(path=str(socket), limit=0)
    transport = httpx.AsyncHTTPTransport(
        uds=str(socket), limits=httpx.Limits(max_connections=None, max_keepalive_connections=256)
    )
    async with (
        aiohttp.ClientSession(connector=connector, auto_decompress=False) as session,
        httpx.AsyncClient(transport=transport, timeout=60) as client,
    ):

        async def own() -> int:
            headers = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            async with upstream.request("POST", TARGET.encode(), headers, BODY) as answer:
                count = 0
                while data := await answer.read_some():
                    count += data.count(b"\n\n")
                return count

        async def with_aiohttp() -> int:
            async with session.post(f"http://engine{TARGET}", headers=HEADERS, data=BODY) as answer:
                return sum([data.count(b"\n\n") async for data in answer.content.iter_any()])

        async def with_httpx() -> int:
            url = f"http://engine{TARGET}"
            async with client.stream("POST", url, headers=HEADERS, content=BODY) as answer:
                return sum([data.count(b"\n\n") async for data in answer.aiter_raw()])

        libraries: dict[str, Fetch] = {
            f"httptools {httptools.__version__}, upstream.py": own,
            f"aiohttp {aiohttp.__version__}": with_aiohttp,
            f"httpx {httpx.__version__}": with_httpx,
        }
        found: dict[tuple[str, int], list[tuple[float, float]]] = {}
        for _ in range(rounds):
            for name, fetch in libraries.items():
                for clients in (1, 64):
                    one = await measure(fetch, clients, seconds)
                    found.setdefault((name, clients), []).append(one)
    await upstream.close()
    return [
        f"| {name} | {clients} | {report.spread([cpu for _, cpu in pairs], '{:.0f}')} "
        f"| {report.spread([rate for rate, _ in pairs], '{:,.0f}')} |"
        for (name, clients), pairs in found.items()
    ]


def main() -> None:
    """Run the rounds; print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--out", type=Path, help="write OUT.md")
    options = parser.parse_args()
    os.sched_setaffinity(0, {targets.TARGET_CORE})
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        targets.compile_tools(Path(name))
        with targets.direct_unix(Path(name), 0, targets.OTHER_CORE) as target:
            rows = uvloop.run(compare(Path(target.where[1]), options.rounds, options.seconds))
    report.publish(
        options.out,
        f"Load average {os.getloadavg()[0]:.1f}. Median of {options.rounds} rounds of {options.seconds:g} s [least to"
        " greatest].",
        [
            "| client | concurrent | CPU per answer, us | answers/s |",
            "|---|---|---|---|",
            *rows,
        ],
    )


if __name__ == "__main__":
    main()
