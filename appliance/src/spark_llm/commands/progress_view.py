"""Shows a fetch: bars on a terminal, a line every few seconds elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bars

from spark_llm.store.progress import Event, Note, Progress

_LINE_EVERY_S = 5.0
_NAME_WIDTH = 40

Show = Callable[[Event], None]


@contextmanager
def shown(console: Console) -> Iterator[Show]:
    """A function that shows events on ``console`` while the block lasts."""
    if console.is_terminal:
        with _bars(console) as bars:
            yield _BarView(bars)
    else:
        yield _LineView(console)


@contextmanager
def byte_bar(console: Console, label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A function that takes bytes done, shown as one bar on a terminal and not at all elsewhere."""
    if not console.is_terminal:
        yield lambda _: None
        return
    with _bars(console) as bars:
        task = bars.add_task(label, total=total)
        yield lambda count: bars.advance(task, count)


def _bars(console: Console) -> Bars:
    return Bars(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


class _BarView:
    """One bar for everything, one for each file that moves."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._total: TaskID | None = None
        self._files: dict[str, TaskID] = {}

    def __call__(self, event: Event) -> None:
        if isinstance(event, Note):
            self._bars.console.print(event.message, markup=False, emoji=False)
        elif isinstance(event, Progress):
            if self._total is None:
                self._total = self._bars.add_task("", total=event.total)
            counted = f"{event.phase} {event.files_done}/{event.files} files"
            self._bars.update(
                self._total, completed=event.bytes, total=event.total, description=counted
            )
            self._show_files(event)

    def _show_files(self, event: Progress) -> None:
        for path in self._files.keys() - {path for path, _, _ in event.moving}:
            self._bars.remove_task(self._files.pop(path))
        for path, done, size in event.moving:
            if path not in self._files:
                name = path if len(path) <= _NAME_WIDTH else "…" + path[1 - _NAME_WIDTH :]
                self._files[path] = self._bars.add_task(f"  {name}", total=size)
            self._bars.update(self._files[path], completed=done)


class _LineView:
    """Plain lines, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._said = float("-inf")

    def __call__(self, event: Event) -> None:
        if isinstance(event, Note):
            self._print(event.message)
        elif isinstance(event, Progress):
            now = time.monotonic()
            if now - self._said >= _LINE_EVERY_S or event.files_done == event.files:
                self._said = now
                self._print(event.status_line())

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)
