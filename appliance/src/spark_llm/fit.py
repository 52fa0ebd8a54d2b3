"""The memory ledger of a profile for people and programs: the verdict, and the largest context that fits."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from spark_llm import host, model_facts
from spark_llm.config import Settings
from spark_llm.engine import engine_python
from spark_llm.errors import ConfigError, TryAgainError
from spark_llm.folders import Folders
from spark_llm.high_water import HighWater, build_of
from spark_llm.kernels import Presence
from spark_llm.ledger import GIB, Ledger, Machine, Measured, Model, account, kv_cache_bytes_for
from spark_llm.profile import Profile
from spark_llm.store.credentials import check_endpoint, read_token
from spark_llm.switches import adjust
from spark_llm.terminal import add_row

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_size(text: str) -> int:
    """Bytes from ``64G``, ``512M``, ``68719476736``; units are powers of 1024.

    Raises:
        ConfigError: not a size.
    """
    number, unit = text.strip().upper().removesuffix("B").removesuffix("I"), ""
    if number and number[-1] in _UNITS:
        number, unit = number[:-1], number[-1]
    try:
        size = int(float(number) * _UNITS[unit])
    except (ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise ConfigError(f"{text!r} is not a size", hint="Write it as 64G, 512M or in bytes.")
    return size


def find_model(
    profile: Profile, settings: Settings, models: Path, environ: Mapping[str, str], *, offline: bool
) -> Model | None:
    """What is known of the profile's model: from disk, else from the hub's headers, else nothing.

    Args:
        profile: names the model.
        settings: the hub's address and token file.
        models: the store's folder.
        environ: for the token and ``HF_ENDPOINT``.
        offline: do not ask the hub.

    Raises:
        TryAgainError: the hub cannot be reached and the profile has no figure of its own either.
    """
    local = model_facts.local_model(profile, models)
    if local is not None or offline:
        return local
    token = read_token(settings.store.token_file, environ)
    endpoint = settings.store.endpoint or environ.get("HF_ENDPOINT") or None
    if endpoint:
        check_endpoint(endpoint, token)
    try:
        return model_facts.fetch_model(profile, endpoint=endpoint, token=token)
    except TryAgainError:
        if profile.memory.weights_bytes:
            return None
        raise


def plan(  # noqa: PLR0913  what is asked of the plan
    profile: Profile,
    model: Model | None,
    machine: Machine,
    *,
    sequences: int | None = None,
    widen: bool = False,
    recall: Callable[[Profile], tuple[Measured | None, str]] = lambda _: (None, ""),
) -> tuple[Profile, Ledger]:
    """Ledger of ``profile``, and the profile with the KV cache that it counts.

    Args:
        profile: what to serve.
        model: see :func:`find_model`.
        machine: see :func:`machine`.
        sequences: size the KV cache for so many whole sequences; None keeps the profile's.
        widen: let the cache grow until it holds one sequence, for a context that was asked for.
        recall: what earlier runs of a profile took, see :func:`measurements`.

    Raises:
        ConfigError: a size was asked for and the model's layers are not known, or see
            :func:`spark_llm.ledger.account`.
    """
    if sequences is not None or widen:
        if model is None:
            raise ConfigError(
                f"the layers of {profile.model} are not known, so its KV cache cannot be sized",
                hint="Fetch the model, or connect to the hub: its headers are enough.",
            )
        needed = kv_cache_bytes_for(profile, model, sequences or 1)
        if sequences is None:
            needed = max(needed, profile.kv_cache_bytes)
        profile = adjust(profile, kv_cache_bytes=needed, max_num_seqs=sequences)
    measured, word = recall(profile)
    ledger = account(profile, machine, model, measured)
    return profile, replace(ledger, notes=(*ledger.notes, word)) if word else ledger


def measurements(
    settings: Settings, folders: Folders, *, imagined: bool = False
) -> Callable[[Profile], tuple[Measured | None, str]]:
    """What earlier runs on this machine took, for :func:`plan`; nothing for a machine that is only ``imagined``."""
    if imagined:
        return lambda _: (None, "")
    build = build_of(engine_python(settings))
    return lambda profile: HighWater(folders.high_water).recall(profile, build)


def as_json(profile: Profile, ledger: Ledger) -> dict[str, Any]:
    """The ledger for programs; sizes in bytes."""
    return {
        "profile": profile.name,
        "model": profile.model,
        "nodes": profile.nodes,
        "lines": [
            {"name": line.name, "bytes": line.size, "source": line.source} for line in ledger.lines
        ],
        "need_bytes": ledger.need_bytes,
        "reserve_bytes": ledger.machine.reserve,
        "available_bytes": ledger.machine.available,
        "total_bytes": ledger.machine.total,
        "kv_cache_tokens": ledger.tokens,
        "kv_cache_sequences": round(ledger.sequences, 2),
        "context": ledger.context,
        "longest_context": ledger.longest_context,
        "gpu_memory_utilization": ledger.gpu_memory_utilization,
        "fits_now": ledger.fits_now,
        "fits_machine": ledger.fits_machine,
        "verdict": verdict(ledger),
        "notes": list(ledger.notes),
    }


def verdict(ledger: Ledger) -> str:
    """One sentence."""
    limit = ledger.machine.total - ledger.machine.reserve
    if not ledger.fits_machine:
        return f"does not fit: {_gib(ledger.need_bytes - limit)} GiB too much for this machine"
    if not ledger.fits_now:
        short = ledger.need_bytes + ledger.machine.reserve - ledger.machine.available
        return f"fits this machine, but not now: {_gib(short)} GiB are in use by others"
    return f"fits, {_gib(ledger.machine.available - ledger.machine.reserve - ledger.need_bytes)} GiB to spare"


def show(profile: Profile, ledger: Ledger, console: Console | None = None) -> None:
    """Print the ledger as a table with the verdict."""
    console = console or Console()
    each = " per node" if profile.nodes > 1 else ""
    table = Table(
        title=Text(f"{profile.name}: {profile.model}", "table.title"), title_justify="left"
    )
    table.add_column(f"memory{each}")
    table.add_column("GiB", justify="right")
    table.add_column("from")
    for line in ledger.lines:
        add_row(table, line.name, _gib(line.size), line.source)
    table.add_section()
    add_row(table, "needed", _gib(ledger.need_bytes), "")
    add_row(table, "kept for the host", _gib(ledger.machine.reserve), "memory.reserve_bytes")
    add_row(
        table, "available now", _gib(ledger.machine.available), f"of {_gib(ledger.machine.total)}"
    )
    console.print(table)
    if ledger.sequences:
        console.print(
            f"The KV cache holds {ledger.tokens} tokens: {ledger.sequences:.1f} sequences of {ledger.context}."
        )
    if ledger.longest_context is not None:
        console.print(f"Largest context that fits this machine: {ledger.longest_context} tokens.")
    for note in ledger.notes:
        console.print(f"Note: {note}.", markup=False, emoji=False)
    console.print(verdict(ledger))


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}"


_VISIBLE = 0.95
"""Of the memory a machine is sold with, what its kernel sees: 121.69 of 128 GiB on a DGX Spark."""


def machine(settings: Settings, memory: str | None) -> Machine:
    """This machine, or an idle one sold with ``memory``, e.g. ``64G``."""
    reserve = settings.memory.reserve_bytes
    if memory:  # a Spark, with the engine of this release
        total = int(parse_size(memory) * _VISIBLE)
        return host.machine(reserve_bytes=reserve, total_bytes=total, kernels=Presence.GB10)
    return host.machine(reserve_bytes=reserve, kernels=host.kernels_of(engine_python(settings)))
