"""The generated reference is what the code says now."""

import json
import tomllib
from pathlib import Path

import jsonschema
import pytest
from spark_llm import reference
from spark_llm.profile import profile_names, shipped_folder

DOCS = Path(__file__).parents[2] / "docs" / "reference"


def test_page_is_current() -> None:
    """docs/reference/profiles.md is what the generator writes; run it after changing a profile."""
    assert (DOCS / reference.PAGE).read_text() == reference.page()


def test_settings_page_is_current() -> None:
    """docs/reference/settings.md is what the generator writes; every setting has its meaning there."""
    assert (DOCS / reference.SETTINGS_PAGE).read_text() == reference.settings_page()


def test_schema_is_current() -> None:
    """docs/reference/profile.schema.json is what the generator writes."""
    assert json.loads((DOCS / reference.SCHEMA).read_text()) == reference.schema()


@pytest.mark.parametrize("name", profile_names((shipped_folder(),)))
def test_shipped_profile_meets_the_schema(name: str) -> None:
    """Every shipped file is valid under the exported schema."""
    content = tomllib.loads((shipped_folder() / f"{name}.toml").read_text())
    jsonschema.validate(content, reference.schema())


def test_schema_refuses_unknown_keys() -> None:
    """An editor that knows the schema underlines a mistyped key."""
    with pytest.raises(jsonschema.ValidationError, match="contxt"):
        jsonschema.validate({"contxt": 5}, reference.schema())


def test_every_key_has_a_meaning() -> None:
    """No key of any table is without its sentence."""
    for part in (reference.schema(), *reference.schema()["$defs"].values()):
        for name, key in part.get("properties", {}).items():
            assert key.get("description") or "$ref" in key, name
