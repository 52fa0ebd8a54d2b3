from pathlib import Path

import pytest
from spark_llm.config import load
from spark_llm.errors import ConfigError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text('profile = "from-file"\n[gateway]\nport = 1\nmax_queue = 7\n')
    return path


def test_flag_beats_environment_beats_file_beats_default(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each source gives way to the one above it, key by key."""
    assert load(file).gateway.port == 1
    monkeypatch.setenv("SPARK_LLM_GATEWAY__PORT", "2")
    assert load(file).gateway.port == 2
    settings = load(file, {"gateway": {"port": 3, "host": None}})
    assert settings.gateway.port == 3
    assert settings.gateway.max_queue == 7
    assert settings.gateway.host == "127.0.0.1"
    assert settings.profile == "from-file"


def test_file_can_be_named_by_the_environment(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``SPARK_LLM_CONFIG`` names the file."""
    monkeypatch.setenv("SPARK_LLM_CONFIG", str(file))
    assert load().profile == "from-file"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[gateway]\nprot = 1\n", "unknown key 'gateway.prot'; did you mean 'port'?"),
        ("[gatewya]\nport = 1\n", "unknown key 'gatewya'; did you mean 'gateway'?"),
        ("zzz = 1\n", "unknown key 'zzz'; known keys: "),
        ('[gateway]\nport = "x"\n', "key 'gateway.port': input should be a valid integer"),
        ("[gateway]\nport = 70000\n", "key 'gateway.port': input should be less than or equal to"),
        ("[gateway\n", "is not TOML"),
    ],
)
def test_bad_file_names_the_key(tmp_path: Path, text: str, said: str) -> None:
    """A wrong file is a configuration error that names the key and the nearest known one."""
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert said in caught.value.message
    assert caught.value.exit_code == 2


def test_file_that_is_no_text_is_an_error(tmp_path: Path) -> None:
    """A file in another encoding than UTF-8 is a configuration error that names the file and the place."""
    path = tmp_path / "config.toml"
    path.write_bytes('profile = "dém"'.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"config\.toml is not UTF-8: 0xe9 at byte offset 12"):
        load(path)


def test_missing_file_is_an_error(tmp_path: Path) -> None:
    """A file that was named but is not there is an error, not a default."""
    with pytest.raises(ConfigError, match="No such file"):
        load(tmp_path / "none.toml")


def test_mistyped_variable_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable with our prefix that is no setting is refused with the nearest known one."""
    monkeypatch.setenv("SPARK_LLM_PROFLE", "x")
    with pytest.raises(ConfigError, match="did you mean SPARK_LLM_PROFILE"):
        load()


def test_settings_are_frozen() -> None:
    """Nobody changes settings behind another's back."""
    with pytest.raises(ValueError, match="frozen"):
        load().profile = "x"
