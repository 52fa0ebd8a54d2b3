import json
import stat
from pathlib import Path

import pytest
from spark_llm import keys
from spark_llm.commands.keys import app
from spark_llm.errors import ConfigError, RefusedError
from typer.testing import CliRunner


def test_key_is_found_again_and_kept_nowhere(tmp_path: Path) -> None:
    """A new key matches, another does not, and the file holds neither."""
    path = tmp_path / "keys.json"
    key, token = keys.add(path, "laptop", keys.INFERENCE)
    found = keys.match(token, keys.load(path))
    assert found == key
    assert keys.match(token + "x", keys.load(path)) is None
    assert token not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_same_token_has_another_hash_under_another_salt() -> None:
    """Salts make equal keys look different."""
    assert keys.digest("t", "00" * 16) != keys.digest("t", "01" * 16)


def test_name_is_taken_once(tmp_path: Path) -> None:
    """A second key of the same name is refused and the first one stays."""
    _, token = keys.add(tmp_path / "k", "a", keys.ADMIN)
    with pytest.raises(RefusedError, match="already"):
        keys.add(tmp_path / "k", "a", keys.ADMIN)
    assert keys.match(token, keys.load(tmp_path / "k")) is not None


def test_removed_key_no_longer_matches(tmp_path: Path) -> None:
    """A key can be removed by name or id; another name is refused."""
    first, token = keys.add(tmp_path / "k", "a", keys.INFERENCE)
    keys.add(tmp_path / "k", "b", keys.INFERENCE)
    assert keys.remove(tmp_path / "k", "a") == first
    assert keys.match(token, keys.load(tmp_path / "k")) is None
    assert len(keys.load(tmp_path / "k")) == 1
    with pytest.raises(RefusedError):
        keys.remove(tmp_path / "k", "a")


@pytest.mark.parametrize("text", ["", "{}", "[{}]", '[{"id": 1}]', "\x00"])
def test_damaged_file_never_opens_the_door(tmp_path: Path, text: str) -> None:
    """A damaged key file is an error, not an empty list."""
    path = tmp_path / "keys.json"
    path.write_text(text)
    with pytest.raises(ConfigError):
        keys.load(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("id", 7),
        ("name", None),
        ("scope", "Admin"),
        ("scope", "operator"),
        ("salt", "zz"),
        ("salt", "00" * 17),
        ("hash", "é"),
        ("hash", "00"),
        ("created", "yesterday"),
        ("expires", 0),
    ],
)
def test_wrong_field_is_an_error_at_once(tmp_path: Path, field: str, value: object) -> None:
    """A field that is none stops the start and names itself; as a key, it would end every request or lose a right."""
    path = tmp_path / "keys.json"
    key, _ = keys.add(path, "a", keys.ADMIN)
    listed = json.loads(path.read_text())
    path.write_text(json.dumps([{**listed[0], field: value}]))
    with pytest.raises(ConfigError, match=rf"0\.{field}") as caught:
        keys.load(path)
    assert key.hash not in caught.value.message


def test_an_empty_list_promises_nothing_about_the_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command knows its own file; keys of a systemd credential it cannot see may still guard the service."""
    monkeypatch.setenv("SPARK_LLM_PATHS__STATE", str(tmp_path))
    said = CliRunner().invoke(app, ["list"]).stdout
    assert str(tmp_path) in said
    assert "credential api-keys" in said
    keys.add(tmp_path / "keys.json", "laptop", keys.INFERENCE)
    assert "laptop" in CliRunner().invoke(app, ["list"]).stdout
