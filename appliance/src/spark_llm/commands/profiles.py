"""``profiles`` and ``demo-model``."""

from pathlib import Path
from typing import Annotated

import typer

from spark_llm.commands.common import Config, Json, load, print_json


def register(app: typer.Typer) -> None:
    """Add these commands to ``app``."""
    app.command()(profiles)
    app.command("demo-model")(demo_model)


def profiles(as_json: Json = False, config: Config = None) -> None:
    """List what can be served; exit 2 if a profile's file is broken."""
    _, folders = load(config)
    from spark_llm import catalogue
    from spark_llm.errors import ConfigError
    from spark_llm.status_view import show_profiles

    found = catalogue.read(folders.profiles)
    if as_json:
        print_json([item.model_dump(mode="json") for item in found.profiles])
    else:
        show_profiles(list(found.profiles))
    for error in found.faults.values():
        typer.echo(f"spark-llm: {error.message} [{error.reason}]", err=True)
    if found.faults:
        raise typer.Exit(ConfigError.exit_code)


def demo_model(
    folder: Annotated[Path, typer.Argument(help="Folder to write; must not exist yet.")],
) -> None:
    """Write a small random model: a real Qwen3 in real files, but its text is noise."""
    from spark_llm.demo_model import write_demo_model

    write_demo_model(folder)
    typer.echo(f"{folder}: a random Qwen3 model; its text is noise")
