"""The documentation points at things that are there."""

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PAGES = sorted([REPOSITORY / "README.md", *(REPOSITORY / "docs").rglob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link of a page is a file of the repository."""
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert missing == []


def test_promises_name_tests_that_exist() -> None:
    """Every test that the table of promises names is there."""
    text = (REPOSITORY / "docs" / "reference" / "acceptance.md").read_text()
    missing = []
    for path, name in re.findall(r"`(tests/[\w/.]+\.py)(?:::(\w+))?`", text):
        file = REPOSITORY / path
        if not file.is_file() or (name and f"def {name}(" not in file.read_text()):
            missing.append(f"{path}::{name}")
    assert missing == []


def test_two_commands_of_the_readme_are_targets() -> None:
    """``make serve`` and ``make test`` are what the README says and the Makefile has."""
    makefile = (REPOSITORY / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", (REPOSITORY / "README.md").read_text(), re.MULTILINE):
        assert f"\n{target}:" in makefile
