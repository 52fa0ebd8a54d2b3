"""What others wrote is shown to the letter: rich's markup and pictures are for our own words."""

import io
from dataclasses import replace

import pytest
from rich.console import Console
from spark_llm import fit, ledger, status_view
from spark_llm.commands.progress_view import shown
from spark_llm.keys import INFERENCE, Key
from spark_llm.ledger import GIB, Machine
from spark_llm.profile import Memory, load_profile, shipped_folder
from spark_llm.status import State, Status
from spark_llm.store import Note

FOREIGN = r"[/INST] [red]x[/red] :warning: C:\[/x]"
"""Ends markup that never began, hides what it colours, and draws a picture, where it is not taken to the letter."""
PROFILE = load_profile("demo", (shipped_folder(),))


@pytest.mark.parametrize("field", ["message", "hint", "phase", "profile", "model", "speed"])
def test_status_shows_every_word_to_the_letter(field: str) -> None:
    """A canary's answer or an engine's name in square brackets neither ends the command nor vanishes."""
    status = Status(state=State.FAILED).as_dict() | {field: FOREIGN}
    assert FOREIGN in printed(200, status)


def test_status_shows_log_lines_and_errors_to_the_letter() -> None:
    """What the engine logged last, and the error of a service that cannot answer."""
    assert FOREIGN in printed(200, Status(last_log=(FOREIGN,)).as_dict())
    assert FOREIGN in printed(503, {"error": {"message": FOREIGN}})


def test_lists_show_names_to_the_letter(capsys: pytest.CaptureFixture[str]) -> None:
    """Names of profiles and keys are the owner's."""
    status_view.show_profiles([PROFILE.model_copy(update={"description": FOREIGN})])
    status_view.show_keys((Key("1", FOREIGN, INFERENCE, "00" * 16, "00" * 32, 0),))
    assert capsys.readouterr().out.count("[/INST]") == 2


def test_the_ledger_shows_the_model_and_its_notes_to_the_letter() -> None:
    """A model may be any folder; notes quote files."""
    machine = Machine(128 * GIB, 120 * GIB, 16 * GIB)
    known = PROFILE.model_copy(
        update={"memory": Memory(weights_bytes=GIB, weights_source="a guess")}
    )
    account = replace(ledger.account(known, machine, None), notes=(FOREIGN,))
    console = Console(file=io.StringIO(), width=200)
    fit.show(PROFILE.model_copy(update={"model": FOREIGN}), account, console)
    assert written(console).count(FOREIGN) == 2


@pytest.mark.parametrize("terminal", [True, False])
def test_a_fetch_shows_its_notes_to_the_letter(terminal: bool) -> None:
    """A note names files of the hub."""
    console = Console(file=io.StringIO(), width=200, force_terminal=terminal, color_system=None)
    with shown(console) as show:
        show(Note(FOREIGN))
    assert FOREIGN in written(console)


def printed(code: int, status: dict[str, object]) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(status_view.status_table(code, status))
    return written(console)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()
