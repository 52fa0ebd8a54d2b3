"""Tables for a terminal."""

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from spark_llm.keys import Key
from spark_llm.profile import Profile
from spark_llm.terminal import add_row

_REFRESH_S = 1.0
_COLOURS = {"ready": "green", "degraded": "yellow", "failed": "red", "blocked": "red"}


def show(code: int, status: dict[str, Any]) -> None:
    """Print one status."""
    Console().print(status_table(code, status))


def show_until_interrupted(fetch: Callable[[], tuple[int, dict[str, Any]]]) -> None:
    """Show the status again and again; Ctrl-C ends it."""
    with Live(status_table(*fetch()), auto_refresh=False) as live:
        try:
            while True:
                time.sleep(_REFRESH_S)
                live.update(status_table(*fetch()), refresh=True)
        except KeyboardInterrupt:
            return


def status_table(code: int, status: dict[str, Any]) -> Table:
    """The status as two columns; an error body as its message."""
    table = Table.grid(padding=(0, 2))
    if code != 200:  # noqa: PLR2004  HTTP
        add_row(table, "error", str(status.get("error", {}).get("message", status)))
        return table
    state = str(status["state"])
    colour = _COLOURS.get(state, "cyan")
    table.add_row("state", Text.assemble((state, colour), " ", str(status["message"])))
    if status["phase"] and state != "ready":
        eta = f", about {status['eta_s']:.0f} s left" if status["eta_s"] else ""
        add_row(table, "phase", f"{status['phase']}, {status['percent']} %{eta}")
    if status["reason"] != "ok":
        add_row(table, "reason", str(status["reason"]))
    if status["hint"]:
        add_row(table, "hint", str(status["hint"]))
    add_row(table, "profile", str(status["profile"]))
    add_row(table, "model", str(status["model"]))
    if status["engine_pid"]:
        add_row(table, "engine", f"process {status['engine_pid']}, run {status['run_id']}")
    if status["speed"]:
        add_row(table, "speed", str(status["speed"]))
    if status["memory_peak_bytes"]:
        held, peak = (status[name] / 2**30 for name in ("memory_bytes", "memory_peak_bytes"))
        add_row(table, "memory", f"{held:.1f} GiB, at most {peak:.1f}")
    if status["restarts"]:
        left = status["restarts_left"]
        add_row(table, "restarts", f"{status['restarts']}, {left} left")
    for index, line in enumerate(status["last_log"][-10:]):
        add_row(table, "last log" if index == 0 else "", str(line))
    return table


def show_profiles(profiles: list[Profile]) -> None:
    """Print the catalogue."""
    table = Table("profile", "model", "engine", "context", "what it is", box=None)
    for item in profiles:
        add_row(table, item.name, item.model, item.engine, f"{item.context:,}", item.description)
    Console().print(table)


def show_keys(keys: tuple[Key, ...]) -> None:
    """Print the keys, without the keys; at least one."""
    table = Table("id", "name", "scope", "made", box=None)
    for key in keys:
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(key.created))
        add_row(table, key.id, key.name, key.scope, made)
    Console().print(table)
