"""The command ``spark-llm``: one module of ``commands/`` for each group."""

import sys
from typing import Annotated, NoReturn

import typer

from spark_llm import __version__
from spark_llm.commands import cache, doctor, fit, install, keys, profiles, service, store
from spark_llm.errors import SparkLlmError
from spark_llm.owner import not_yours

app = typer.Typer(
    name="spark-llm",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command; errors become one line, a hint and an exit code."""
    try:
        app()
    except SparkLlmError as error:
        _fail(error)
    except PermissionError as error:
        if not error.filename:
            raise
        _fail(not_yours(error.filename))


def _fail(error: SparkLlmError) -> NoReturn:
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


service.register(app)
profiles.register(app)
app.command()(fit.fit)
store.register(app)
doctor.register(app)
app.add_typer(keys.app, name="keys")
app.add_typer(cache.app, name="cache")
install.register(app)

if __name__ == "__main__":
    main()
