"""The most memory that each profile's engine has taken on this machine, so that the ledger need not guess it again."""

import asyncio
import hashlib
import logging
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median_high
from typing import Any

from spark_llm import host, manifest
from spark_llm.ledger import Measured
from spark_llm.profile import Profile
from spark_llm.store import durable

_FORMAT = 1
_PROFILES = 50
_RUNS = 5
_WORTH_A_MARK = 64 * 2**20
"""Growth of the high-water mark, in bytes, that is written down."""
_writing = threading.Lock()
"""Engines beside each other share the file, and each write begins with a read."""

log = logging.getLogger("spark_llm.memory")


@dataclass(frozen=True)
class Mark:
    """The highest footprint of one run that became ready.

    Attributes:
        run: id of the run.
        size: in bytes, on this node.
        whole: it is the fall of available memory since the start, others' share included, because the driver does not
            say what the engine has on the GPU.
    """

    run: str
    size: int
    whole: bool = False


def learned(marks: Sequence[Mark]) -> Measured | None:
    """What ``marks`` of equal runs say together; None if there are none.

    The largest that was attributed to the engine. Falls of available memory alone are blurred by others both ways, so
    of those it is the middle one.
    """
    own = [mark.size for mark in marks if not mark.whole]
    if own:
        return Measured(max(own), len(own))
    if marks:
        return Measured(median_high([mark.size for mark in marks]), len(marks), whole=True)
    return None


_NO_MATTER = {
    "name", "extends", "description", "aliases", "canary", "status", "memory", "quantization",
    "tool_parser", "reasoning_parser",
}  # fmt: skip
"""Keys of a profile that take no memory."""


def key(profile: Profile) -> str:
    """Digest of everything in ``profile`` that takes memory: equal for equal models, contexts, sequences and flags."""
    return hashlib.sha256(profile.model_dump_json(exclude=_NO_MATTER).encode()).hexdigest()


def build_of(python: Path) -> str:
    """Digest of what takes memory beside the profile: engine, kernels, driver; empty without an engine."""
    try:
        parts = (manifest.engine_build(python), manifest.kernels_build(python))
    except OSError:
        return ""
    return hashlib.sha256("\0".join((*parts, host.driver_version())).encode()).hexdigest()


class HighWater:
    """Marks in one small file.

    A file that cannot be read or written costs the measurement and nothing else: the ledger goes by its estimate.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def recall(self, profile: Profile, build: str) -> tuple[Measured | None, str]:
        """What earlier runs of ``profile`` took, and a word on marks that are not used.

        Args:
            profile: what is to be served.
            build: see :func:`build_of`; marks of another one do not count.
        """
        known, word = self._read()
        entry = known.get(key(profile))
        if entry is None:
            return None, word
        if entry["build"] != build:
            return None, "an earlier measurement is of another engine, kernels or driver: not used"
        return learned(_marks(entry)), word

    def remember(self, profile: Profile, build: str, mark: Mark) -> None:
        """Keep ``mark``, in place of an earlier one of the same run; the newest five runs count."""
        with _writing:
            self._remember(profile, build, mark)

    def _remember(self, profile: Profile, build: str, mark: Mark) -> None:
        known, _ = self._read()
        entry = known.pop(key(profile), None)
        marks = _marks(entry) if entry and entry["build"] == build else []
        marks = [*(item for item in marks if item.run != mark.run), mark][-_RUNS:]
        known[key(profile)] = {
            "profile": profile.name,
            "build": build,
            "runs": [asdict(item) for item in marks],
        }
        kept = dict(list(known.items())[-_PROFILES:])
        try:
            durable.write_json(self._path, {"format": _FORMAT, "profiles": kept})
        except OSError as error:
            log.warning("%s cannot be written: %s", self._path, error.strerror)

    def _read(self) -> tuple[dict[str, Any], str]:
        if not self._path.exists():
            return {}, ""
        value = durable.read_json(self._path)
        try:
            if value["format"] != _FORMAT:
                return {}, f"{self._path} is of another release: not used"
            entries = value["profiles"]
            for entry in entries.values():
                entry["build"], _marks(entry)
        except (TypeError, KeyError, AttributeError, ValueError):
            return {}, f"{self._path} cannot be read and is not used; the next run writes it anew"
        return entries, ""


class Recording:
    """The mark of one run, written down as it grows.

    Args:
        record: where marks are kept.
        profile: what the run serves.
        build: see :func:`build_of`; without one nothing is written.
    """

    def __init__(self, record: HighWater, profile: Profile, build: str) -> None:
        self._record = record
        self._profile = profile
        self._build = build
        self._written = 0

    async def note(self, mark: Mark) -> None:
        """Write ``mark`` down, in a thread, if it is the first or has grown by 64 MiB."""
        if not self._build or (self._written and mark.size < self._written + _WORTH_A_MARK):
            return
        self._written = mark.size
        await asyncio.to_thread(self._record.remember, self._profile, self._build, mark)


def _marks(entry: Any) -> list[Mark]:  # noqa: ANN401  JSON
    marks = [Mark(str(run["run"]), run["size"], run["whole"]) for run in entry["runs"]]
    if any(type(mark.size) is not int or mark.size <= 0 for mark in marks):
        raise ValueError("a size is a positive number of bytes")
    return marks
