"""Turns what is wrong with a file into sentences: the key and the nearest known one, or where it is no text."""

import difflib
import reprlib
import types
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

_QUOTE = reprlib.Repr()
_QUOTE.maxstring = _QUOTE.maxother = _QUOTE.maxlong = 100
"""Longest quotation, in characters: what was sent may be megabytes, and the sentence goes to a log."""


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """All of ``error``, one clause per key, e.g. ``unknown key 'gateway.prot'; did you mean 'port'?``."""
    return "; ".join(_clause(item, model) for item in error.errors(include_url=False))


def undecodable(path: Path, error: UnicodeDecodeError) -> str:
    """Where a file stops being UTF-8, e.g. ``config.toml is not UTF-8: 0xe9 at byte offset 11``."""
    return f"{path} is not UTF-8: {error.object[error.start]:#04x} at byte offset {error.start}"


def _clause(item: Any, model: type[BaseModel]) -> str:  # noqa: ANN401  pydantic's ErrorDetails is a loose TypedDict
    location = [str(part) for part in item["loc"]]
    key = ".".join(location)
    if item["type"] == "extra_forbidden":
        known = _keys(model, location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        advice = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key {_QUOTE.repr(key)}; {advice}"
    if item["type"] == "missing":
        return f"key {key!r} is missing"
    message = item["msg"].removeprefix("Value error, ")
    given = _QUOTE.repr(item["input"])
    return f"key {_QUOTE.repr(key)}: {message[:1].lower()}{message[1:]} (it is {given})"


def _keys(model: type[BaseModel], path: list[str]) -> list[str]:
    """Field names of the model that ``path`` leads to; unknown steps end at the last known model."""
    for part in path:
        field = model.model_fields.get(part)
        inner = _model_in(field.annotation) if field else None
        if inner is None:
            break
        model = inner
    return sorted(model.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:  # noqa: ANN401  annotations are any object
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, tuple, list):
        for part in typing.get_args(annotation):
            if (found := _model_in(part)) is not None:
                return found
    return None
