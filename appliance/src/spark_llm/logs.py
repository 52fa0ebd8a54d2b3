"""Log lines for a terminal or a journal."""

import logging

from rich.console import Console
from rich.logging import RichHandler

_ENGINE = "spark_llm.engine"


class _Plain(logging.Formatter):
    """``LEVEL logger | message``; the journal adds the time."""

    def format(self, record: logging.LogRecord) -> str:
        source = "engine" if record.name == _ENGINE else record.name
        line = f"{source} | {record.getMessage()}"
        if record.levelno >= logging.WARNING:
            line = f"{record.levelname} {line}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def configure(level: str) -> None:
    """Send log lines to standard error: with times and colours on a terminal, plain otherwise."""
    console = Console(stderr=True)
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(
            console=console, show_path=False, show_level=False, markup=False, highlighter=None
        )
    else:
        handler = logging.StreamHandler()
    handler.setFormatter(_Plain())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
