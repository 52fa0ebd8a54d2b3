"""How long starts took, so that the next one can say how long it will take."""

import contextlib
import threading
from pathlib import Path

from spark_llm.store import durable

_KEPT = 50
_writing = threading.Lock()
"""Engines beside each other share the file, and each write begins with a read."""


class Starts:
    """Durations of the last start of each profile, in seconds, in one small file.

    A file that cannot be read or written costs the estimate and nothing else.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def expected_s(self, profile: str) -> float | None:
        """How long the last start of ``profile`` took; None if it is not known."""
        value = self._read().get(profile)
        return float(value) if isinstance(value, int | float) else None

    def took(self, profile: str, seconds: float) -> None:
        """Remember a start that ended in ready."""
        with _writing, contextlib.suppress(OSError):
            known = self._read()
            known.pop(profile, None)
            recent = dict([*known.items(), (profile, round(seconds, 1))][-_KEPT:])
            durable.write_json(self._path, recent, durable=False)

    def _read(self) -> dict[str, object]:
        try:
            value = durable.read_json(self._path)
        except (OSError, ValueError):
            return {}
        return value if isinstance(value, dict) else {}
