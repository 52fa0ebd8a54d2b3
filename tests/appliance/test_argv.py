"""The engine's command line of every shipped profile, to the word."""

import json
from pathlib import Path
from typing import Any

import pytest
from spark_llm import argv
from spark_llm.errors import ConfigError
from spark_llm.profile import Engine, Profile, load_profile, profile_names, shipped_folder
from spark_llm.switches import adjust

FOLDERS = (shipped_folder(),)
GOLDEN: dict[str, str] = json.loads((Path(__file__).parent / "data" / "argv.json").read_text())
"""Command lines as one string each, without the parts that no profile decides. To accept a change that is meant, run
``python -m tests.appliance.test_argv``."""


def build(profile: Profile, **changes: Any) -> argv.Argv:  # noqa: ANN401  build's keywords
    given: dict[str, Any] = {
        "python": Path("/python"),
        "model": Path("/model"),
        "socket": Path("/engine.sock"),
        "home": Path("/home"),
        "shutdown_timeout_s": 30,
        "inherited": {},
        "caches": {},
        "draft": Path("/draft"),
    }
    return argv.build(profile, **(given | changes))


def line(name: str) -> str:
    return " ".join(build(load_profile(name, FOLDERS)).args)


@pytest.mark.parametrize("name", profile_names(FOLDERS))
def test_command_line(name: str) -> None:
    """A shipped profile's command line is the one on record."""
    assert line(name) == GOLDEN[name]


def test_record_has_no_more() -> None:
    """Command lines of profiles that are gone are gone from the record."""
    assert GOLDEN.keys() == set(profile_names(FOLDERS))


def value(built: argv.Argv, flag: str) -> str:
    return built.args[built.args.index(flag) + 1]


def test_cuda_profile_speaks_bytes() -> None:
    """The KV cache is given in bytes, and the share for the start check is the ledger's."""
    built = build(load_profile("gpt-oss-20b", FOLDERS), gpu_memory_utilization=0.31)
    assert value(built, "--kv-cache-memory-bytes") == "12884901888"
    assert value(built, "--gpu-memory-utilization") == "0.31"


def test_engine_finds_the_driver_where_the_service_does() -> None:
    """The folders of the driver's libraries, which a container sets, reach the engine; a token does not."""
    given = {"LD_LIBRARY_PATH": "/run/opengl-driver/lib:/usr/lib64", "HF_TOKEN": "secret"}
    built = build(load_profile("gpt-oss-20b", FOLDERS), inherited=given)
    assert built.environment["LD_LIBRARY_PATH"] == given["LD_LIBRARY_PATH"]
    assert "HF_TOKEN" not in built.environment


def test_cuda_environment_is_for_cuda() -> None:
    """Variables for the GPU build are not set for the CPU build."""
    for name in profile_names(FOLDERS):
        profile = load_profile(name, FOLDERS)
        there = "VLLM_HAS_FLASHINFER_CUBIN" in build(profile).environment
        assert there == (profile.engine is Engine.CUDA)


def test_debug_is_eager() -> None:
    """--debug adds --enforce-eager to the engine's command line."""
    profile = load_profile("gpt-oss-20b", FOLDERS)
    assert "--enforce-eager" not in build(profile).args
    assert "--enforce-eager" in build(adjust(profile, debug=True)).args


def test_speculation_is_one_json_flag() -> None:
    """Method, tokens and the draft's folder go into one flag; --no-mtp leaves it out."""
    profile = load_profile("qwen3.8-27b-nvfp4", FOLDERS)
    config = json.loads(value(build(profile), "--speculative-config"))
    assert config == {"method": "dflash", "model": "/draft", "num_speculative_tokens": 8}
    assert "--speculative-config" not in build(adjust(profile, mtp=False)).args


def test_missing_draft_is_refused() -> None:
    """A profile with a draft model does not start without its folder: the engine is offline and would look for it."""
    with pytest.raises(ConfigError, match=r"z-lab/Qwen3\.8-27B-DFlash2"):
        build(load_profile("qwen3.8-27b-nvfp4", FOLDERS), draft=None)


def test_no_secret_is_inherited() -> None:
    """A token in the caller's environment does not reach the engine."""
    inherited = {"HF_TOKEN": "hf_secret", "PATH": "/bin", "NOTIFY_SOCKET": "/run/systemd/notify"}
    environment = build(load_profile("demo", FOLDERS), inherited=inherited).environment
    assert environment["PATH"] == "/bin"
    assert environment.keys().isdisjoint({"HF_TOKEN", "NOTIFY_SOCKET"})


def test_long_socket_path_is_refused() -> None:
    """A path that the kernel would cut off is refused with its length."""
    with pytest.raises(ConfigError, match="200 bytes"):
        build(load_profile("demo", FOLDERS), socket=Path("/" + "x" * 199))


if __name__ == "__main__":
    target = Path(__file__).parent / "data" / "argv.json"
    lines = {name: line(name) for name in profile_names(FOLDERS)}
    target.write_text(json.dumps(lines, indent=1) + "\n")
