"""What all commands share: options, settings, and output for people or programs."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from spark_llm.config import Settings
    from spark_llm.folders import Folders

Config = Annotated[
    Path | None, typer.Option("--config", help="TOML file; without it /etc/spark-llm/config.toml.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def load(config: Path | None, flags: dict[str, Any] | None = None) -> "tuple[Settings, Folders]":
    """Settings and folders for one command.

    Args:
        config: TOML file; None takes the usual one.
        flags: settings given on the command line.

    Raises:
        ConfigError: see ``config.load``.
    """
    from spark_llm import config as configuration
    from spark_llm import folders
    from spark_llm.profile import shipped_folder

    settings = configuration.load(config, flags)
    return settings, folders.resolve(settings.paths, os.environ, shipped_folder())


def load_store(config: Path | None) -> "tuple[Settings, Folders]":
    """:func:`load` for a command that works in the store, as the store's owner where root calls it.

    Raises:
        RefusedError: the store is another user's.
    """
    from spark_llm.owner import act_as_owner

    settings, folders = load(config)
    act_as_owner(folders.state)
    return settings, folders


def print_json(value: Any) -> None:  # noqa: ANN401  any JSON value
    """One JSON document on standard output."""
    json.dump(value, sys.stdout, indent=1, default=str)
    sys.stdout.write("\n")
