"""``spark-llm fit PROFILE``: does it fit?"""

from typing import Annotated

import typer

from spark_llm.commands.common import Config, Json, load_store, print_json

_REFUSED = 3


def fit(  # noqa: PLR0913  one argument per option
    name: Annotated[str, typer.Argument(metavar="PROFILE", help="What to serve.")],
    context: Annotated[int | None, typer.Option(min=16, help="Context, in tokens.")] = None,
    seqs: Annotated[
        int | None, typer.Option(min=1, help="Size the KV cache for so many whole sequences.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Ask for an idle machine of this size, e.g. 64G.")
    ] = None,
    *,
    tq: Annotated[bool, typer.Option("--tq", help="TurboQuant KV cache.")] = False,
    mtp: Annotated[
        bool | None, typer.Option("--mtp/--no-mtp", help="With or without speculation.")
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Do not ask the hub.")] = False,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Show the memory ledger of a profile. Needs no weights: their headers are enough. Exit 3 if it does not fit."""
    import os

    from spark_llm import fit as fitting
    from spark_llm.profile import load_profile
    from spark_llm.switches import adjust

    settings, folders = load_store(config)
    profile = adjust(load_profile(name, folders.profiles), context=context, turboquant=tq, mtp=mtp)
    model = fitting.find_model(profile, settings, folders.models, os.environ, offline=offline)
    machine = fitting.machine(settings, memory)
    profile, ledger = fitting.plan(
        profile,
        model,
        machine,
        sequences=seqs,
        widen=context is not None,
        recall=fitting.measurements(settings, folders, imagined=memory is not None),
    )
    if as_json:
        print_json(fitting.as_json(profile, ledger))
    else:
        fitting.show(profile, ledger)
    if not (ledger.fits_machine if memory else ledger.fits_now):
        raise typer.Exit(_REFUSED)
