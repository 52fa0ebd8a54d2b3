"""The command ``spark-llm``.

Modules are imported inside the commands, so that ``--help`` and shell completion stay fast.
"""

import json
import sys
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spark_llm import __version__
from spark_llm.commands import install
from spark_llm.errors import SparkLlmError

if TYPE_CHECKING:
    from spark_llm.config import Settings
    from spark_llm.folders import Folders

app = typer.Typer(
    name="spark-llm",
    help="Serve language models on an NVIDIA DGX Spark.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)
keys_app = typer.Typer(help="API keys: stored as hashes, shown once.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")
install.register(app)

Config = Annotated[
    Path | None, typer.Option("--config", help="TOML file [default: /etc/spark-llm/config.toml].")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def main() -> None:
    """Run the command; errors become one line, a hint and an exit code."""
    try:
        app()
    except SparkLlmError as error:
        print(f"spark-llm: {error.message} [{error.reason}]", file=sys.stderr)  # noqa: T201
        if error.hint:
            print(f"  {error.hint}", file=sys.stderr)  # noqa: T201
        sys.exit(error.exit_code)


def _print_version(wanted: bool) -> None:  # noqa: FBT001  typer's signature
    if wanted:
        typer.echo(f"spark-llm {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    """Serve language models on an NVIDIA DGX Spark."""


@app.command()
def serve(
    profile: Annotated[str | None, typer.Option(help="What to serve.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one.")] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Allow a non-loopback address without API keys.")
    ] = False,
    config: Config = None,
) -> None:
    """Serve a model until stopped."""
    gateway = {"host": host, "port": port, "insecure": insecure or None}
    settings, folders = _load(config, {"profile": profile, "gateway": gateway})
    from spark_llm import logs, sandbox, service
    from spark_llm.profile import load_profile

    logs.configure(settings.log.level)
    sandbox.refuse_new_code()
    chosen = load_profile(settings.profile, folders.profiles)

    def reread() -> "Settings":
        return _load(config, {"profile": profile, "gateway": gateway})[0]

    raise typer.Exit(service.serve(settings, chosen, folders, reread))


@app.command()
def status(
    watch: Annotated[bool, typer.Option("--watch", help="Show it until Ctrl-C.")] = False,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Show what the service is doing."""
    settings, _ = _load(config)
    from spark_llm import client
    from spark_llm.status_view import show, show_until_interrupted

    if watch:
        show_until_interrupted(lambda: client.ask(settings, "/api/v1/status"))
        return
    code, body = client.ask(settings, "/api/v1/status")
    if as_json:
        typer.echo(json.dumps(body, indent=1))
    else:
        show(code, body)
    if code != HTTPStatus.OK:
        raise typer.Exit(1)


@app.command()
def wait(
    ready: Annotated[bool, typer.Option("--ready", help="Wait until tokens are proven.")] = False,
    timeout: Annotated[float, typer.Option(help="Longest wait, in seconds.")] = 1800.0,
    config: Config = None,
) -> None:
    """Wait for the service to be ready."""
    if not ready:
        raise typer.BadParameter("say what to wait for: --ready")
    settings, _ = _load(config)
    from spark_llm import client

    client.wait_ready(settings, timeout)
    typer.echo("ready")


@app.command()
def profiles(*, as_json: Json = False, config: Config = None) -> None:
    """List what can be served."""
    _, folders = _load(config)
    from spark_llm.profile import load_profile, profile_names
    from spark_llm.status_view import show_profiles

    found = [load_profile(name, folders.profiles) for name in profile_names(folders.profiles)]
    if as_json:
        typer.echo(json.dumps([item.model_dump(mode="json") for item in found], indent=1))
    else:
        show_profiles(found)


@app.command("demo-model")
def demo_model(
    folder: Annotated[Path, typer.Argument(help="Folder to write; must not exist yet.")],
) -> None:
    """Write a small random model: a real Qwen3 in real files, but its text is noise."""
    from spark_llm.demo_model import write_demo_model

    write_demo_model(folder)
    typer.echo(f"{folder}: a random Qwen3 model; its text is noise")


@keys_app.command("add")
def keys_add(
    name: Annotated[str, typer.Argument(help="Who it is for.")],
    admin: Annotated[bool, typer.Option("--admin", help="May also change what is served.")] = False,
    config: Config = None,
) -> None:
    """Make an API key and print it, once."""
    _, folders = _load(config)
    from spark_llm import keys

    key, token = keys.add(folders.keys, name, keys.ADMIN if admin else keys.INFERENCE)
    typer.echo(token)
    typer.echo(
        f"Key {key.id} for {name!r} ({key.scope}). It is shown this once; a running service takes it "
        "up on reload (SIGHUP).",
        err=True,
    )


@keys_app.command("list")
def keys_list(*, as_json: Json = False, config: Config = None) -> None:
    """List API keys, without the keys."""
    _, folders = _load(config)
    from spark_llm import keys
    from spark_llm.status_view import show_keys

    found = keys.load(folders.keys)
    if as_json:
        listed = [
            {"id": k.id, "name": k.name, "scope": k.scope, "created": k.created} for k in found
        ]
        typer.echo(json.dumps(listed, indent=1))
    else:
        show_keys(found)


@keys_app.command("remove")
def keys_remove(
    name: Annotated[str, typer.Argument(help="Name or id.")], config: Config = None
) -> None:
    """Remove an API key."""
    _, folders = _load(config)
    from spark_llm import keys

    key = keys.remove(folders.keys, name)
    typer.echo(f"removed {key.id} ({key.name})")


def _load(config: Path | None, flags: dict[str, Any] | None = None) -> "tuple[Settings, Folders]":
    import os

    from spark_llm import folders
    from spark_llm.config import load
    from spark_llm.profile import shipped_folder

    settings = load(config, flags)
    return settings, folders.resolve(settings.paths, os.environ, shipped_folder())


if __name__ == "__main__":
    main()
