"""``spark-llm doctor``: is this machine fit to fetch and serve?"""

import os
from dataclasses import asdict
from typing import Annotated

import typer

from spark_llm.commands.common import Config, Json, load_store, print_json

_MARKS = {"ok": "  ok  ", "warn": " warn ", "fail": " FAIL "}


def register(app: typer.Typer) -> None:
    """Add this command to ``app``."""
    app.command()(doctor)


def doctor(
    repair: Annotated[bool, typer.Option("--repair", help="Remove leftovers of crashes.")] = False,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Check disk, permissions, hub, token, clock, models, caches and driver; exit 1 if something fails."""
    from spark_llm.doctor import Level, examine

    settings, folders = load_store(config)
    findings = examine(settings, folders, os.environ, repair=repair)
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        for finding in findings:
            typer.echo(f"[{_MARKS[finding.level]}] {finding.check}: {finding.message}")
            if finding.hint:
                typer.echo(f"         {finding.hint}")
    if any(finding.level is Level.FAIL for finding in findings):
        raise typer.Exit(1)
