"""Load and faults against a real service with a real vLLM: every answer whole, every error well-formed, nothing left?

    python tests/e2e/soak.py --minutes 30 --report docs/reference/soak.md

Clients ask at random sizes, streamed and whole, slow and leaving early, while the engine is killed, frozen for five
seconds, switched, and memory is squeezed. What may happen to a request is a whole answer or a well-formed error, and
nothing else.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

sys.path.insert(0, str(Path(__file__).parents[2]))

from spark_llm import host

from tests.appliance.service import Service, environment, processes_below, service, wait_for

CLIENTS = 12
LONGEST_ANSWER = 96
START_TIMEOUT_S = 240
LEFT_BYTES = 5 * 2**30
"""What engines, and all else on this machine, may take beyond what is used now, before memory counts as low."""
OVERSHOOT_BYTES = 2**29
HOG = """
import sys
held = []
for line in sys.stdin:
    more = bytearray(int(line))
    more[::4096] = bytes(len(more[::4096]))
    held.append(more)
    print("full", flush=True)
"""


@dataclass
class Tally:
    """What came of the requests.

    Attributes:
        outcomes: by name.
        violations: sentences; the soak has failed if there is one.
        faults: injected, by name.
        rss_kib: of the controller, one sample every few seconds.
        fds: its open files, likewise.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    rss_kib: list[int] = field(default_factory=list)
    fds: list[int] = field(default_factory=list)

    @property
    def requests(self) -> int:
        return self.outcomes.total()


class Client:
    """One client that asks again and again until told to stop."""

    def __init__(self, session: aiohttp.ClientSession, tally: Tally, seed: int) -> None:
        self._session = session
        self._tally = tally
        self._random = random.Random(seed)

    async def run(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            kind = self._random.choice(
                [self._whole, self._stream, self._stream, self._leave, self._slow, self._messages]
            )
            try:
                outcome = await kind(self._random.randint(1, LONGEST_ANSWER))
            except aiohttp.ClientError as error:
                # The gateway itself never goes away in this test, so its connection must not break.
                outcome = "broken connection"
                self._tally.violations.append(f"{kind.__name__}: {error!r}")
            self._tally.outcomes[outcome] += 1
            if outcome.startswith("error"):
                await asyncio.sleep(0.5)  # a patient client; the first error said how long

    def _prompt(self) -> str:
        return " the spark of memory" * self._random.choice([1, 4, 30, 120])

    async def _whole(self, tokens: int) -> str:
        body = {"model": "default", "prompt": self._prompt(), "max_tokens": tokens}
        async with self._session.post("/v1/completions", json=body) as answer:
            if answer.status != 200:
                return await self._refused(answer)
            value = await answer.json()
        return self._complete(
            value["usage"]["completion_tokens"], tokens, value["choices"][0]["finish_reason"]
        )

    async def _stream(self, tokens: int) -> str:
        return await self._streamed(tokens, pause=0.0, leave_after=None)

    async def _slow(self, tokens: int) -> str:
        return await self._streamed(tokens, pause=0.02, leave_after=None)

    async def _leave(self, tokens: int) -> str:
        return await self._streamed(tokens, pause=0.0, leave_after=self._random.randint(1, 3))

    async def _streamed(self, tokens: int, *, pause: float, leave_after: int | None) -> str:
        body = {
            "model": "default",
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": tokens,
            "messages": [{"role": "user", "content": self._prompt()}],
        }
        counted, finish, events = 0, None, 0
        async with self._session.post("/v1/chat/completions", json=body) as answer:
            if answer.status != 200:
                return await self._refused(answer)
            async for line in answer.content:
                if not line.startswith(b"data: "):
                    continue
                if line == b"data: [DONE]\n":
                    return self._complete(counted, tokens, finish)
                value = json.loads(line[6:])
                if "error" in value:
                    return f"error in stream: {value['error']['code']}"
                events += 1
                if leave_after is not None and events >= leave_after:
                    answer.close()
                    return "left by the client"
                counted = (value.get("usage") or {}).get("completion_tokens", counted)
                for choice in value["choices"]:
                    finish = choice["finish_reason"] or finish
                if pause:
                    await asyncio.sleep(pause)
        self._tally.violations.append(
            f"a stream ended without [DONE] or error after {events} events"
        )
        return "truncated"

    async def _messages(self, tokens: int) -> str:
        body = {
            "model": "default",
            "max_tokens": tokens,
            "messages": [{"role": "user", "content": self._prompt()}],
        }
        async with self._session.post("/v1/messages", json=body) as answer:
            if answer.status != 200:
                return await self._refused(answer, anthropic=True)
            value = await answer.json()
        return self._complete(value["usage"]["output_tokens"], tokens, value["stop_reason"])

    def _complete(self, counted: int, asked: int, finish: str | None) -> str:
        if counted != asked or finish not in {"length", "max_tokens"}:
            self._tally.violations.append(f"200 with {counted} of {asked} tokens, {finish!r}")
            return "wrong answer as success"
        return "whole answer"

    async def _refused(self, answer: aiohttp.ClientResponse, *, anthropic: bool = False) -> str:
        value = await answer.json()
        well_formed = isinstance(value.get("error", {}).get("message"), str)
        well_formed = well_formed and (not anthropic or value.get("type") == "error")
        if answer.status in {429, 503}:
            well_formed = well_formed and int(answer.headers["Retry-After"]) >= 1
        if not well_formed or answer.status not in {429, 503}:
            self._tally.violations.append(f"{answer.status}: {value}")
        return f"error {answer.status} {value['error'].get('code')}"


async def run(  # noqa: PLR0913, PLR0917
    running: Service, seconds: float, tally: Tally, seed: int, squeeze: bool, between_s: float
) -> None:
    """Load and faults for ``seconds``, then wait for ready and quiet."""
    stop = asyncio.Event()
    timeout = aiohttp.ClientTimeout(total=180)
    url = f"http://127.0.0.1:{running.port}"
    async with aiohttp.ClientSession(url, timeout=timeout) as session:
        clients = [Client(session, tally, seed + index).run(stop) for index in range(CLIENTS)]
        load = asyncio.gather(*clients, _sample(running, tally, stop))
        try:
            await _inject(running, seconds, tally, random.Random(seed), squeeze, between_s)
        finally:
            stop.set()
            await load
    await asyncio.to_thread(running.wait_state, "ready", timeout_s=START_TIMEOUT_S)


async def _inject(  # noqa: PLR0913, PLR0917
    running: Service,
    seconds: float,
    tally: Tally,
    chance: random.Random,
    squeeze: bool,
    between_s: float,
) -> None:
    faults: dict[str, Callable[[Service], Awaitable[None]]] = {
        "engine killed": _kill,
        "engine frozen for 5 s": _freeze,
        "switched": _switch,
    }
    if squeeze:
        faults["memory squeezed"] = _squeeze
    end = time.monotonic() + seconds
    order: list[str] = []
    while (
        time.monotonic() < end or order
    ):  # a round that was begun is finished: each fault as often as the others
        if not order:
            order = chance.sample(sorted(faults), len(faults))
        name = order.pop()
        await asyncio.sleep(between_s)
        tally.faults[name] += 1
        try:
            await faults[name](running)
        except AssertionError as error:  # the report of all the rest must not be lost with it
            tally.violations.append(f"{name}: {str(error)[:300]}")
        await asyncio.to_thread(running.wait_state, "ready", timeout_s=START_TIMEOUT_S)


async def _kill(running: Service) -> None:
    before = (await asyncio.to_thread(running.status))["run_id"]
    os.kill((await asyncio.to_thread(running.status))["engine_pid"], signal.SIGKILL)

    def gone() -> bool:
        return bool(running.status()["run_id"] != before)

    await asyncio.to_thread(wait_for, gone, 60, running.text)


async def _freeze(running: Service) -> None:
    group = (await asyncio.to_thread(running.status))["engine_pid"]
    os.killpg(group, signal.SIGSTOP)
    await asyncio.sleep(5)
    os.killpg(group, signal.SIGCONT)


async def _switch(running: Service) -> None:
    now = (await asyncio.to_thread(running.status))["profile"]
    after = "second" if now == "demo" else "demo"
    code, _ = await asyncio.to_thread(running.post, "/api/v1/switch", {"profile": after})
    assert code == 202

    def over() -> bool:
        return bool(running.get("/api/v1/switch")[1]["switch"]["outcome"] == "done")

    await asyncio.to_thread(wait_for, over, START_TIMEOUT_S, running.text)


async def _squeeze(running: Service) -> None:
    floor = int(running.environment["SPARK_LLM_MEMORY__SOFT_FLOOR_BYTES"])
    hog = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        HOG,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert hog.stdin is not None
        assert hog.stdout is not None
        deadline = time.monotonic() + 60
        while (await asyncio.to_thread(running.status))["state"] != "degraded":
            assert time.monotonic() < deadline, "memory was low for a minute and nobody said so"
            if (
                above := host.machine().available - floor
            ) > 0:  # again if others on this machine let go of some
                hog.stdin.write(b"%d\n" % (above + OVERSHOOT_BYTES))
                await hog.stdout.readline()
            await asyncio.sleep(0.2)
    finally:
        hog.kill()
        await hog.wait()


async def _sample(running: Service, tally: Tally, stop: asyncio.Event) -> None:
    proc = Path(f"/proc/{running.process.pid}")
    while not stop.is_set():
        status = (proc / "status").read_text()
        tally.rss_kib.append(int(status.split("VmRSS:")[1].split()[0]))
        tally.fds.append(len(list((proc / "fd").iterdir())))
        await asyncio.sleep(2)


def growth(samples: list[int]) -> float:
    """Median of the last fifth over the median of the second fifth: the first is the start."""
    fifth = max(len(samples) // 5, 1)
    return statistics.median(samples[-fifth:]) / statistics.median(samples[fifth : 2 * fifth])


def start(folder: Path, cache: Path, *, squeeze: bool) -> Any:  # noqa: ANN401  a context manager
    """A service with two profiles of the demo model."""
    shipped = Path(__file__).parents[2] / "appliance" / "profiles" / "demo.toml"
    (folder / "profiles").mkdir()
    (folder / "profiles" / "second.toml").write_text(shipped.read_text().replace('["demo"]', "[]"))
    more = {
        "SPARK_LLM_PATHS__CACHE": str(cache),
        "SPARK_LLM_ENGINE__RESTART_BUDGET": "1000",
        "SPARK_LLM_ENGINE__SCRAPE_INTERVAL_S": "1",
        "SPARK_LLM_GATEWAY__MAX_RUNNING": "8",
        "SPARK_LLM_GATEWAY__MAX_QUEUE": "8",
    }
    if squeeze:
        # The alarm ends a fifth above the floor (guard.py), and that must lie below what an engine leaves.
        more["SPARK_LLM_MEMORY__SOFT_FLOOR_BYTES"] = str(
            int((host.machine().available - LEFT_BYTES) / 1.2)
        )
    return service(folder, env=environment(folder, **more))


def soak(seconds: float, *, seed: int, squeeze: bool, between_s: float, cache: Path) -> Tally:
    """The whole of it; stops the service and looks for what is left."""
    tally = Tally()
    with (
        tempfile.TemporaryDirectory(prefix="sl-") as made,
        start(Path(made), cache, squeeze=squeeze) as running,
    ):
        folder = Path(made)
        running.listening()
        running.wait_state("ready", timeout_s=START_TIMEOUT_S)
        asyncio.run(run(running, seconds, tally, seed, squeeze, between_s))
        if (code := running.stop(timeout_s=90)) != 0:
            tally.violations.append(f"the service ended with {code}")
        wait_for(lambda: not processes_below(folder), 20, lambda: str(processes_below(folder)))
    return tally


def report(tally: Tally, command: str, minutes: float) -> str:
    """Markdown."""
    outcomes = [f"| {name} | {count:,} |" for name, count in sorted(tally.outcomes.items())]
    faults = [f"| {name} | {count} |" for name, count in sorted(tally.faults.items())]
    violations = [f"- {text}" for text in tally.violations[:20]]
    rss = statistics.median(tally.rss_kib) / 1024
    return f"""# Soak

Load and faults against the service with a real vLLM 0.32.0 on the CPU and the demo model. Written by:

    {command}

{minutes:g} minutes, {CLIENTS} clients, {tally.requests:,} requests on {os.cpu_count()} cores ({platform.machine()}).
Not run on a GB10.

**Violations: {len(tally.violations)}.** A violation is an answer with status 200 that is not whole, an error that is
not well-formed, a broken connection, a process left over, or an exit code other than 0.

{chr(10).join(violations)}

| fault | times |
|---|---:|
{chr(10).join(faults)}

| outcome | requests |
|---|---:|
{chr(10).join(outcomes)}

Controller: RSS {rss:.0f} MiB at the median, last fifth over second fifth {growth(tally.rss_kib):.3f}; open files
{statistics.median(tally.fds):.0f} at the median, {growth(tally.fds):.3f}.
"""


def main() -> int:
    """From the command line; exit 1 if anything was violated."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--report", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sl-") as cache:
        tally = soak(
            60 * arguments.minutes,
            seed=arguments.seed,
            squeeze=True,
            between_s=20,
            cache=Path(cache),
        )
    command = f"python tests/e2e/soak.py --minutes {arguments.minutes:g} --seed {arguments.seed}"
    text = report(tally, command, arguments.minutes)
    print(text)
    if arguments.report:
        arguments.report.write_text(text)
    return 1 if tally.violations else 0


if __name__ == "__main__":
    sys.exit(main())
