"""What every table for a terminal needs."""

from rich.table import Table
from rich.text import Text


def add_row(table: Table, *cells: str) -> None:
    """Add a row whose cells are shown to the letter.

    To rich, square brackets in a string are markup and ``:name:`` is a picture; in messages, names and logs they are
    what somebody wrote, and ``[/INST]`` would end the command with an error.
    """
    table.add_row(*map(Text, cells))
