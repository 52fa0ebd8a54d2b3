"""Pulls with real processes between a local hub and a store, and what they said."""

from dataclasses import dataclass, replace
from pathlib import Path

from spark_llm.store import Event, Failure, Note, Progress, Request, Result, Store, unbundle
from spark_llm.store.receipt import Receipt

from tests.hub.server import LocalHub

WEIGHTS = bytes(range(256)) * 12_000
"""Three megabytes, so three chunks of the transfer."""
FILES: dict[str, bytes | Path] = {
    "config.json": b'{"architectures": ["LlamaForCausalLM"]}',
    "tokenizer/vocab.json": b"{}",
    "model.safetensors": WEIGHTS,
}
MODEL = "org/name"


@dataclass(frozen=True)
class Pulled:
    """What a pull said, in order."""

    events: tuple[Event, ...]

    @property
    def result(self) -> Result:
        last = self.events[-1]
        assert isinstance(last, Result), last
        return last

    @property
    def failure(self) -> Failure:
        last = self.events[-1]
        assert isinstance(last, Failure), last
        return last

    @property
    def notes(self) -> list[str]:
        return [event.message for event in self.events if isinstance(event, Note)]

    @property
    def progress(self) -> list[Progress]:
        return [event for event in self.events if isinstance(event, Progress)]


@dataclass(frozen=True)
class Puller:
    """Pulls into one store from one hub, by the same processes as the appliance."""

    hub: LocalHub
    store: Store
    request: Request

    def __call__(self, model: str = MODEL, **changes: object) -> Pulled:
        request = replace(self.request, model=model, **changes)  # type: ignore[arg-type]  # Request's fields
        return Pulled(tuple(self.store.fetch(request)))


def import_bundle(
    root: Path,
    file: Path,
    *,
    reserve_bytes: int = 0,
    sha256: str = "",
    allow_pickle: bool = False,
) -> Receipt:
    """What the command does with a bundle."""
    with (
        file.open("rb") as stream,
        unbundle.opened(stream, file.name, sha256=sha256, allow_pickle=allow_pickle) as bundle,
    ):
        return bundle.receive(root, reserve_bytes=reserve_bytes)
