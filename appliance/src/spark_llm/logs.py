"""Log lines: for a person on a terminal, with fields in systemd's journal, plain anywhere else."""

import logging
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.logging import RichHandler

_ENGINE = "spark_llm.engine"
_IDENTIFIER = "spark-llm"
_STANDARD = frozenset(
    {"PRIORITY", "CODE_FILE", "CODE_LINE", "CODE_FUNC", "LOGGER", "EXCEPTION_TEXT"}
)
_PREFIX = "SPARK_LLM_"

Fields = Callable[[], Mapping[str, str]]


class _Plain(logging.Formatter):
    """``LEVEL logger | message``; the journal adds the time."""

    def format(self, record: logging.LogRecord) -> str:
        source = "engine" if record.name == _ENGINE else record.name
        line = f"{source} | {record.getMessage()}"
        if record.levelno >= logging.WARNING:
            line = f"{record.levelname} {line}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


_fields: Fields = dict


def configure(level: str) -> None:
    """Send log lines to standard error: times and colours on a terminal, fields in the journal, plain otherwise."""
    logging.basicConfig(level=level.upper(), handlers=[_handler()], force=True)


def set_fields(fields: Fields) -> None:
    """What each line carries in the journal, by lower-case name: ``reason`` becomes ``SPARK_LLM_REASON``."""
    global _fields  # noqa: PLW0603  as the logging configuration itself, one per process
    _fields = fields


def set_level(level: str) -> None:
    """Change the least severe line that is written."""
    logging.getLogger().setLevel(level.upper())


def _handler() -> logging.Handler:
    console = Console(stderr=True)
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(
            console=console, show_path=False, show_level=False, markup=False, highlighter=None
        )
    elif _to_journal(os.environ) and (journal := _journal_handler()) is not None:
        return journal
    else:
        handler = logging.StreamHandler()
    handler.setFormatter(_Plain())
    return handler


def _to_journal(environ: Mapping[str, str]) -> bool:
    """Whether standard error is the journal's stream, as systemd.exec(5) says to find out."""
    try:
        seen = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return environ.get("JOURNAL_STREAM") == f"{seen.st_dev}:{seen.st_ino}"


def _journal_handler() -> logging.Handler | None:
    try:
        from systemd import journal  # noqa: PLC0415  an optional extra; only needed here
    except ImportError:  # plain lines on standard error reach the journal too
        return None

    def send(message: str, **given: Any) -> None:  # noqa: ANN401  as the journal's own function
        # The handler passes the whole record; what is not in these two sets is noise, or arguments of a message.
        kept = {name: value for name, value in given.items() if name in _STANDARD}
        own = {f"{_PREFIX}{name.upper()}": value for name, value in _fields().items() if value}
        journal.send(message, SYSLOG_IDENTIFIER=_IDENTIFIER, **kept, **own)

    handler: logging.Handler = journal.JournalHandler(sender_function=send)
    handler.setFormatter(_Brief())
    return handler


class _Brief(logging.Formatter):
    """As :class:`_Plain` without the level, which is a field."""

    def format(self, record: logging.LogRecord) -> str:
        line = f"engine | {record.getMessage()}" if record.name == _ENGINE else record.getMessage()
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line
