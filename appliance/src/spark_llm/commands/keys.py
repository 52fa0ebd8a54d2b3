"""``keys add|list|remove``."""

from typing import Annotated

import typer

from spark_llm.commands.common import Config, Json, load_store, print_json

app = typer.Typer(help="API keys: stored as hashes, shown once.", no_args_is_help=True)


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="Who it is for.")],
    admin: Annotated[bool, typer.Option("--admin", help="May also change what is served.")] = False,
    config: Config = None,
) -> None:
    """Make an API key and print it, once."""
    _, folders = load_store(config)
    from spark_llm import keys

    key, token = keys.add(folders.keys, name, keys.ADMIN if admin else keys.INFERENCE)
    typer.echo(token)
    typer.echo(
        f"Key {key.id} for {name!r} ({key.scope}). It is shown this once; a running service takes it "
        "up on reload (SIGHUP).",
        err=True,
    )


@app.command("list")
def list_keys(as_json: Json = False, config: Config = None) -> None:
    """List the API keys made here, without the keys; a service may have more from systemd, see /api/v1/keys."""
    _, folders = load_store(config)
    from spark_llm import keys
    from spark_llm.status_view import show_keys

    found = keys.load(folders.keys)
    if as_json:
        print_json([key.public() for key in found])
    elif found:
        show_keys(found)
    else:
        typer.echo(
            f"No keys in {folders.keys}. A service without the systemd credential api-keys either lets in everybody "
            "who can reach it: this machine alone, unless gateway.insecure is set."
        )


@app.command()
def remove(name: Annotated[str, typer.Argument(help="Name or id.")], config: Config = None) -> None:
    """Remove an API key."""
    _, folders = load_store(config)
    from spark_llm import keys

    key = keys.remove(folders.keys, name)
    typer.echo(f"removed {key.id} ({key.name})")
