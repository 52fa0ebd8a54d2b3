"""The high-water mark of a real engine, and what the ledger makes of it."""

import json
import os
import subprocess
import sys
from typing import Any

from spark_llm.overhead import overhead
from spark_llm.profile import Engine

from tests.appliance.service import Service, wait_for


def _fit(running: Service, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "spark_llm.cli", "fit", "demo", "--json", *arguments],
        env={**os.environ, **running.environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    parsed: dict[str, Any] = json.loads(done.stdout)
    return parsed


def _size(ledger: dict[str, Any], *names: str) -> int:
    return sum(line["bytes"] for line in ledger["lines"] if line["name"] in names)


def test_engine_is_measured_and_the_ledger_learns(demo: Service) -> None:
    """A served engine holds its weights and cache; ``fit`` then says what it took instead of what was estimated."""

    def weighed() -> dict[str, Any] | None:
        ledger = _fit(demo)
        return ledger if _size(ledger, "all else") else None

    ledger = wait_for(weighed, 60, demo.text)
    peak = demo.status()["memory_peak_bytes"]
    estimated = _fit(demo, "--memory", "64G")
    known = _size(ledger, "weights", "KV cache")
    assert known == _size(estimated, "weights", "KV cache")
    assert _size(estimated, "all else") == 0, "nothing was measured on a machine that is imagined"
    assert known < peak < 2 * estimated["need_bytes"], "the estimate is of the right order"
    # 64 MiB of growth are not worth a mark.
    margin = max(
        overhead(Engine.CPU).margin_bytes,
        round((peak - known) * overhead(Engine.CPU).margin_share),
    )
    assert abs(ledger["need_bytes"] - (peak + margin)) < 2 * 64 * 2**20
    assert ledger["notes"] == []
