"""``spark-llm cache ls | prune | clear``: compile caches."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from spark_llm.commands.common import Config, Json, load_store, print_json

if TYPE_CHECKING:
    from spark_llm.caches import Entry

app = typer.Typer(help="Compile caches, one namespace per manifest.", no_args_is_help=True)


@app.command("ls")
def list_namespaces(as_json: Json = False, config: Config = None) -> None:
    """List the namespaces, the most recently used first."""
    from datetime import datetime

    from rich.console import Console
    from rich.table import Table

    from spark_llm.caches import CacheRoot
    from spark_llm.store.plan import gigabytes
    from spark_llm.terminal import add_row

    _, folders = load_store(config)
    entries = CacheRoot(folders.cache).entries()
    if as_json:
        print_json([asdict(entry) for entry in entries])
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("MANIFEST", "MODEL", "SIZE", "FILES", "LAST USED", "STATE"):
        table.add_column(
            heading, justify="right" if heading in ("SIZE", "FILES") else "left", no_wrap=True
        )
    for entry in entries:
        used = datetime.fromtimestamp(entry.used).astimezone().isoformat(" ", "minutes")
        state = ("sealed" if entry.sealed else "not sealed") + (", in use" if entry.in_use else "")
        add_row(
            table, entry.name, entry.model, gigabytes(entry.bytes), str(entry.files), used, state
        )
    Console().print(table)


@app.command()
def prune(
    max_bytes: Annotated[
        int | None, typer.Option(help="Limit, in bytes; without it cache.max_bytes.")
    ] = None,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Remove the least recently used namespaces until the rest fits the limit."""
    from spark_llm.caches import CacheRoot

    settings, folders = load_store(config)
    limit = settings.cache.max_bytes if max_bytes is None else max_bytes
    _report(
        CacheRoot(folders.cache).prune(max_bytes=limit, keep=settings.cache.keep), as_json=as_json
    )


@app.command()
def clear(as_json: Json = False, config: Config = None) -> None:
    """Remove every namespace that is not in use: the next start compiles again."""
    from spark_llm.caches import CacheRoot

    _, folders = load_store(config)
    _report(CacheRoot(folders.cache).clear(), as_json=as_json)


def _report(removed: "list[Entry]", *, as_json: bool) -> None:
    from spark_llm.store.plan import gigabytes

    if as_json:
        print_json([asdict(entry) for entry in removed])
        return
    for entry in removed:
        typer.echo(f"{entry.name}  {entry.model}  {gigabytes(entry.bytes)}")
    typer.echo(f"{len(removed)} removed, {gigabytes(sum(entry.bytes for entry in removed))} freed")
