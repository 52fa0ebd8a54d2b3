"""``serve``, and what asks a running service: ``status``, ``wait``, ``switch``."""

import json
from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spark_llm.commands.common import Config, Json, load, print_json

if TYPE_CHECKING:
    from spark_llm.config import Settings


def register(app: typer.Typer) -> None:
    """Add these commands to ``app``."""
    for command in (serve, status, wait, switch):
        app.command()(command)


def serve(  # noqa: PLR0913  typer: one parameter an option
    profile: Annotated[str | None, typer.Option(help="What to serve.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one.")] = None,
    context: Annotated[int | None, typer.Option(min=16, help="Context, in tokens.")] = None,
    *,
    tq: Annotated[bool, typer.Option("--tq", help="TurboQuant KV cache.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Eager mode, no CUDA graphs.")] = False,
    mtp: Annotated[
        bool | None, typer.Option("--mtp/--no-mtp", help="With or without speculation.")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Allow a non-loopback address without API keys.")
    ] = False,
    config: Config = None,
) -> None:
    """Serve a model until stopped."""
    gateway = {"host": host, "port": port, "insecure": insecure or None}
    flags = {"profile": profile, "gateway": gateway}
    settings, folders = load(config, flags)
    from spark_llm import logs, sandbox, service
    from spark_llm.prepare import default_profile
    from spark_llm.profile import load_profile
    from spark_llm.switches import adjust

    sandbox.refuse_new_code()
    logs.configure(settings.log.level)
    chosen = adjust(
        load_profile(settings.profile or default_profile(settings), folders.profiles),
        context=context,
        turboquant=tq,
        debug=debug,
        mtp=mtp,
    )

    def reread() -> "Settings":
        return load(config, flags)[0]

    raise typer.Exit(service.serve(settings, chosen, folders, reread))


def status(
    watch: Annotated[bool, typer.Option("--watch", help="Show it until Ctrl-C.")] = False,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Show what the service is doing."""
    settings, _ = load(config)
    from spark_llm import client
    from spark_llm.errors import SparkLlmError
    from spark_llm.status_view import show, show_until_interrupted

    def look() -> tuple[int, dict[str, Any]]:
        try:
            return HTTPStatus.OK, client.status(settings)
        except SparkLlmError as error:  # a restart, say: who watches wants to see how it goes on
            said = f"{error.message}. {error.hint}" if error.hint else error.message
            return HTTPStatus.SERVICE_UNAVAILABLE, {"error": {"message": said}}

    if watch:
        show_until_interrupted(look)
    elif as_json:
        print_json(client.status(settings))
    else:
        show(HTTPStatus.OK, client.status(settings))


def wait(
    ready: Annotated[bool, typer.Option("--ready", help="Wait until tokens are proven.")] = False,
    timeout: Annotated[float, typer.Option(help="Longest wait, in seconds.")] = 1800.0,
    config: Config = None,
) -> None:
    """Wait for the service to be ready."""
    if not ready:
        raise typer.BadParameter("say what to wait for: --ready")
    settings, _ = load(config)
    from spark_llm import client

    client.wait_ready(settings, timeout)
    typer.echo("ready")


def switch(
    profile: Annotated[str, typer.Argument(help="What to serve from now on.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be done.")
    ] = False,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Serve another profile; the old one comes back if the new one is not proven."""
    settings, _ = load(config)
    from spark_llm import client

    body: dict[str, Any] = {"profile": profile, "dry_run": dry_run}
    answer = client.ask(settings, "/api/v1/switch", "steps" if dry_run else "switch", body)
    if dry_run:
        typer.echo(json.dumps(answer) if as_json else "\n".join(answer["steps"]))
        return
    outcome = client.wait_switched(settings, lambda line: typer.echo(line, err=True))
    if as_json:
        print_json(outcome)
    else:
        typer.echo(outcome["message"] or f"{outcome['after']} serves")
        if outcome["hint"]:
            typer.echo(f"  {outcome['hint']}")
    if outcome["outcome"] != "done":
        raise typer.Exit(1)
