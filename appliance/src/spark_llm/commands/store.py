"""``spark-llm pull | verify | models | rm | bundle``: models on this machine."""

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spark_llm.commands.common import Config, Json, load, load_store, print_json

if TYPE_CHECKING:
    from spark_llm.config import Settings
    from spark_llm.store import Request

Model = Annotated[str, typer.Argument(help="ORG/NAME, or ORG/NAME@REVISION.", metavar="MODEL")]
AllowPickle = Annotated[
    bool,
    typer.Option("--allow-pickle", help="Accept weights whose loading runs their author's code."),
]
bundle_app = typer.Typer(help="Carry models to machines without a network.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add these commands to ``app``."""
    app.command()(pull)
    app.command()(verify)
    app.command()(models)
    app.command()(rm)
    app.add_typer(bundle_app, name="bundle")


def fetch_request(settings: "Settings", root: Path, name: str) -> "Request":
    """What the fetching process is asked for, from the settings; the model's name may carry a revision.

    Raises:
        ConfigError: not a model's name.
    """
    from spark_llm import prepare
    from spark_llm.store import split_name

    return prepare.fetch_request(settings, root, *split_name(name))


def pull(  # noqa: PLR0913, PLR0917  typer: one parameter an option
    model: Model,
    adopt: Annotated[
        Path | None,
        typer.Option(
            help="Take files from this folder or Hugging Face cache instead of fetching them."
        ),
    ] = None,
    allow_pickle: AllowPickle = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be fetched.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print events, one JSON object a line.")
    ] = False,
    config: Config = None,
) -> None:
    """Fetch a model, verify it and keep it. Run again after any interruption: finished files stay."""
    from dataclasses import replace

    from rich.console import Console

    from spark_llm.commands.progress_view import shown
    from spark_llm.owner import act_as_owner, open_first
    from spark_llm.store import Failure, Result, Store
    from spark_llm.store.plan import gigabytes
    from spark_llm.store.progress import duration, encode

    settings, folders = load(config)
    given: tuple[int, ...] = ()
    if adopt:
        given = (open_first(adopt, folders.state, os.O_DIRECTORY),)
    else:
        act_as_owner(folders.state)
    request = replace(
        fetch_request(settings, folders.models, model),
        refresh=True,
        allow_pickle=allow_pickle,
        dry_run=dry_run,
        adopt=f"/proc/self/fd/{given[0]}" if given else "",
    )
    last = None
    with shown(Console(stderr=True)) as show:
        for event in Store(folders.models).fetch(request, pass_fds=given):
            if as_json:
                sys.stdout.write(encode(event) + "\n")
                sys.stdout.flush()
            else:
                show(event)
            last = event
    if not isinstance(last, Result):  # no outcome is no success: whoever started this must see that
        failure = last if isinstance(last, Failure) else Failure.silent()
        if as_json:
            raise typer.Exit(failure.exit_code)
        raise failure.error()
    if not as_json:
        if dry_run:
            fetched = f"would fetch {gigabytes(last.fetched_bytes)} of {gigabytes(last.bytes)}"
        else:
            fetched = f"{gigabytes(last.bytes)}, {gigabytes(last.fetched_bytes)} fetched in {duration(last.seconds)}"
        typer.echo(f"{last.model}@{last.commit}: {last.files} files, {fetched}")
        if last.path:
            typer.echo(last.path)


def verify(
    model: Model,
    full: Annotated[
        bool, typer.Option("--full", help="Read every byte, whatever the receipt says.")
    ] = False,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Compare a model with the hub's checksums kept in its receipt. Needs no network."""
    from rich.console import Console

    from spark_llm.commands.progress_view import byte_bar
    from spark_llm.store import Store, split_name
    from spark_llm.store.plan import gigabytes

    _, folders = load_store(config)
    name, revision = split_name(model)
    store = Store(folders.models)
    total = store.receipt(name, revision).size
    with byte_bar(Console(stderr=True), f"verifying {name}", total) as advance:
        found = store.verify(name, revision, full=full, advance=advance)
    if as_json:
        print_json({"ok": found.ok, **asdict(found)})
    else:
        for word, paths in (
            ("missing", found.missing), ("corrupt", found.corrupt), ("unreadable", found.unreadable),
            ("extra", found.extra),
        ):  # fmt: skip
            for path in paths:
                typer.echo(f"{word}: {path}")
        read = (
            f"{gigabytes(found.bytes)} read"
            if found.bytes
            else "sizes and times as when they were verified"
        )
        typer.echo(
            f"{name}@{found.commit}: {found.files} files, {read}: {'ok' if found.ok else 'NOT OK'}"
        )
        if not found.ok:
            typer.echo(
                f"  `spark-llm pull {model}` fetches the bad files again, and only those.", err=True
            )
    if not found.ok:
        raise typer.Exit(1)


def models(as_json: Json = False, config: Config = None) -> None:
    """List the models on this machine."""
    from rich.console import Console
    from rich.table import Table

    from spark_llm.store import Store
    from spark_llm.store.plan import gigabytes
    from spark_llm.terminal import add_row

    _, folders = load_store(config)
    stored = Store(folders.models).models()
    if as_json:
        print_json([asdict(model) for model in stored])
        return
    if not stored:
        typer.echo(f"No models in {folders.models}. `spark-llm pull ORG/NAME` fetches one.")
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("MODEL", "COMMIT", "REVISION", "SIZE", "FILES", "STATE"):
        table.add_column(
            heading, justify="right" if heading in ("SIZE", "FILES") else "left", no_wrap=True
        )
    for model in stored:
        state = model.state + (", in use" if model.in_use else "")
        names = ", ".join(model.revisions)
        add_row(
            table,
            model.model,
            model.commit[:12],
            names,
            gigabytes(model.bytes),
            str(model.files),
            state,
        )
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def rm(model: Model, as_json: Json = False, config: Config = None) -> None:
    """Remove a model, or with @REVISION one of its snapshots."""
    from spark_llm.store import Store, split_name
    from spark_llm.store.plan import gigabytes

    _, folders = load_store(config)
    name, revision = split_name(model)
    freed = Store(folders.models).remove(name, revision)
    if as_json:
        print_json({"model": name, "revision": revision, "freed_bytes": freed})
    else:
        typer.echo(f"{model}: removed, {gigabytes(freed)} freed")


@bundle_app.command("export")
def export_bundle(
    model: Model,
    file: Annotated[Path, typer.Argument(help="The bundle to write, e.g. name.tar.zst.")],
    config: Config = None,
) -> None:
    """Write a verified model to one file."""
    from rich.console import Console

    from spark_llm.commands.progress_view import byte_bar
    from spark_llm.store import Store, split_name
    from spark_llm.store.bundle import export
    from spark_llm.store.plan import gigabytes

    _, folders = load_store(config)
    name, revision = split_name(model)
    store = Store(folders.models)
    total = store.receipt(name, revision).size
    with byte_bar(Console(stderr=True), f"exporting {name}", total) as advance:
        proof, sha256 = export(store, name, revision, file, advance)
    typer.echo(
        f"{file}: {name}@{proof.commit}, {len(proof.files)} files, {gigabytes(file.stat().st_size)}"
    )
    typer.echo(f"sha256 {sha256}")


@bundle_app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="A bundle that `spark-llm bundle export` wrote.")],
    sha256: Annotated[
        str,
        typer.Option(
            help="The checksum that export printed; compared before the model becomes visible."
        ),
    ] = "",
    allow_pickle: AllowPickle = False,
    config: Config = None,
) -> None:
    """Bring a model from a bundle into the store; it is verified before it becomes visible."""
    from rich.console import Console

    from spark_llm.commands.progress_view import byte_bar
    from spark_llm.owner import open_first
    from spark_llm.store import unbundle

    settings, folders = load(config)
    with (
        os.fdopen(open_first(file, folders.state), "rb") as stream,
        unbundle.opened(stream, str(file), sha256=sha256, allow_pickle=allow_pickle) as bundle,
        byte_bar(
            Console(stderr=True), f"importing {bundle.promised.model}", bundle.promised.size
        ) as advance,
    ):
        proof = bundle.receive(
            folders.models, reserve_bytes=settings.store.reserve_bytes, advance=advance
        )
    typer.echo(f"{proof.model}@{proof.commit}: {len(proof.files)} files, verified")
