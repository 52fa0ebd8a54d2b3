"""The policy: switches, one decision a row, and a table whose rows stand up."""

import importlib.util
import logging
import re
from pathlib import Path

import pytest
from spark_kernels import cli, plugin, policy
from spark_kernels.policy import GB10, Row, Switches, decide, parse_switches

KNOWN = ("bf16x", "lm_head", "nvfp4")
OURS = Row("op", "ours", "measured", kernel="bf16x", entry="module:register")
H100 = (9, 0)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("", Switches()),
        ("auto", Switches()),
        ("off", Switches(off=True)),
        ("0", Switches(off=True)),
        ("force", Switches(force=True)),
        ("BF16X, nvfp4", Switches(only=frozenset({"bf16x", "nvfp4"}))),
        ("-lm_head", Switches(without=frozenset({"lm_head"}))),
        ("force,bf16x", Switches(force=True, only=frozenset({"bf16x"}))),
    ],
)
def test_switches(text: str, want: Switches) -> None:
    """Each form of SPARK_KERNELS means what the reference says."""
    assert parse_switches(text, KNOWN) == want


@pytest.mark.parametrize(
    ("text", "near"), [("bf16", "bf16x"), ("-lmhead", "-lm_head"), ("of", "off")]
)
def test_an_unknown_switch_names_the_nearest(text: str, near: str) -> None:
    """A misspelt term is refused with the term that was probably meant."""
    with pytest.raises(policy.SwitchError, match=re.escape(f"did you mean {near!r}")):
        parse_switches(text, KNOWN)


@pytest.mark.parametrize(
    ("row", "switches", "capability", "on", "reason"),
    [
        (OURS, Switches(), GB10, True, "GB10"),
        (OURS, Switches(), H100, False, "this is SM 9.0"),
        (OURS, Switches(), (12, 0), False, "force"),
        (OURS, Switches(force=True), H100, True, "forced"),
        (OURS, Switches(), None, False, "no CUDA"),
        (OURS, Switches(force=True), None, False, "no CUDA"),
        (OURS, Switches(off=True, force=True), GB10, False, "SPARK_KERNELS=off"),
        (OURS, Switches(only=frozenset({"nvfp4"})), GB10, False, "switched off"),
        (OURS, Switches(only=frozenset({"bf16x"})), GB10, True, "GB10"),
        (OURS, Switches(without=frozenset({"bf16x"})), GB10, False, "switched off"),
        (Row("op", "vLLM's own", "measured"), Switches(), GB10, False, "not ours"),
    ],
)
def test_decisions(
    row: Row, switches: Switches, capability: tuple[int, int] | None, *, on: bool, reason: str
) -> None:
    """A kernel is on for GB10, off elsewhere unless forced, and every switch is obeyed."""
    decision = decide(row, switches, capability)
    assert decision.on is on
    assert reason in decision.reason


def test_every_entry_of_the_table_exists() -> None:
    """Each row that is ours names a module of the package, with evidence beside it."""
    rows = policy.load_rows()
    assert set(policy.kernels(rows)) >= set(KNOWN)
    for row in rows:
        assert row.evidence
        if row.entry:
            module, function = row.entry.split(":")
            path = Path(*module.split(".")[1:])
            source = policy.TABLE.parent / path.with_suffix(".py")
            package = policy.TABLE.parent / path / "__init__.py"
            text = (source if source.exists() else package).read_text()
            assert f"def {function}(" in text


def test_a_head_is_screened_before_it_could_be_coded() -> None:
    """lm_head stands before bf16x: layers go to the first kernel that takes them."""
    names = policy.kernels(policy.load_rows())
    assert names.index("lm_head") < names.index("bf16x")


def test_the_policy_command_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    """`spark-kernels policy` shows every operation and the switch that turns ours off."""
    assert cli.main(["policy"]) == 0
    printed = capsys.readouterr().out
    for row in policy.load_rows():
        assert row.operation in printed
    assert "[bf16x]" in printed


def test_an_unknown_command_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    """A misspelt command exits 2 and lists the commands."""
    assert cli.main(["biuld"]) == 2
    assert "no such command: biuld" in capsys.readouterr().err
    assert cli.main(["--help"]) == 0


def test_build_refuses_an_unknown_operation(capsys: pytest.CaptureFixture[str]) -> None:
    """`spark-kernels build` names an operation that it does not know."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["build", "bf61x"])
    assert stop.value.code == 2
    assert "bf61x" in capsys.readouterr().err


def test_build_without_nvcc_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Where there is no nvcc, building fails with one line and exit status 1."""
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert cli.main(["build", "--out", str(tmp_path), "bf16x"]) == 1
    assert "install CUDA 13.0" in capsys.readouterr().err


def test_registering_without_vllm_only_logs(caplog: pytest.LogCaptureFixture) -> None:
    """Where vLLM cannot be imported, the entry point says so and returns."""
    if importlib.util.find_spec("vllm") is not None:
        pytest.skip("this environment has vLLM; test_plugin_engine.py covers it")
    with caplog.at_level(logging.WARNING, "vllm.spark_kernels"):
        plugin.register({})
    assert "spark_kernels is off" in caplog.text


def test_a_kernel_that_cannot_register_leaves_the_others_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One row's failure is one warning; the next row is still registered."""
    rows = (
        Row("a", "ours", "measured", kernel="broken", entry="spark_kernels.nowhere:register"),
        Row("b", "ours", "measured", kernel="fine", entry="spark_kernels.policy:load_rows"),
    )
    monkeypatch.setattr(plugin, "_capability", lambda: GB10)
    monkeypatch.setattr(plugin, "_registered", set())
    monkeypatch.setattr(policy, "load_rows", lambda *_: rows)
    with caplog.at_level(logging.WARNING, "vllm.spark_kernels"):
        plugin.register({})
    assert "broken stays off: ModuleNotFoundError" in caplog.text
    assert plugin._registered == {"fine"}


def test_a_misspelt_switch_turns_everything_off(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """SPARK_KERNELS with a typo registers nothing and says so: the engine starts as without us."""
    monkeypatch.setattr(plugin, "_capability", lambda: GB10)
    monkeypatch.setattr(plugin, "_registered", set())
    with caplog.at_level(logging.WARNING, "vllm.spark_kernels"):
        plugin.register({"SPARK_KERNELS": "bf61x"})
    assert "did you mean 'bf16x'" in caplog.text
    assert plugin._registered == set()
