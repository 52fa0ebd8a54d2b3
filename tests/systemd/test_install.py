"""Installing, upgrading, rolling back and uninstalling, with real Nix generations and the real engine."""

from collections.abc import Iterator

import pytest
from container import TREE, Container, container_or_reason

PROFILE = "/nix/var/nix/profiles/spark-llm"
COMMAND = "/usr/local/bin/spark-llm"
KEYS = "/var/lib/spark-llm/keys.json"
BAD_CANARY = 'extends = "demo"\n\n[canary]\npattern = "^no model says this$"\n'


@pytest.fixture(scope="module")
def nix() -> Iterator[Container]:
    """A machine of its own: these tests install and remove."""
    with container_or_reason() as container:
        yield container


@pytest.mark.timeout(900)  # five starts of the engine
def test_life_of_an_installation(nix: Container) -> None:
    """Install, upgrade, an upgrade whose canary fails and goes back by itself, roll back, uninstall: data stays."""
    first = _package(nix, "1")
    second = _package(nix, "2")
    broken = _package(nix, "3", BAD_CANARY)

    plan = nix.run(f"{first}/bin/spark-llm", "install", "--dry-run").stdout
    assert "create /etc/systemd/system/spark-llm.service" in plan
    assert nix.run("ls", "/etc/spark-llm", check=False).returncode != 0

    done = nix.run(f"{first}/bin/spark-llm", "install", "--start").stdout
    assert plan.splitlines() == done.splitlines()[: len(plan.splitlines())]
    assert nix.run("readlink", "-f", PROFILE).stdout.strip() == first
    assert nix.run(f"{first}/bin/spark-llm", "install").stdout.strip() == "nothing to do"
    assert "spark-llm" in nix.run(COMMAND, "--version").stdout
    for user in ("spark-llm", "spark-llm-fetch"):
        assert nix.run("id", "-gn", user).stdout.strip() == "spark-llm"
    assert "video" in nix.run("id", "-Gn", "spark-llm").stdout
    assert nix.run("stat", "-c", "%a %G", "/var/lib/spark-llm/models").stdout.split() == [
        "2770",
        "spark-llm",
    ]

    nix.run(COMMAND, "keys", "add", "me")
    assert nix.run("stat", "-c", "%U %a", KEYS).stdout.split() == ["spark-llm", "600"]
    nix.run(COMMAND, "keys", "remove", "me")
    for command in (("keys", "add", "you"), ("models",), ("doctor",), ("cache", "ls")):
        other = nix.run("setpriv", "--reuid=65534", COMMAND, *command, check=False)
        assert other.returncode == 3
        assert "/var/lib/spark-llm: permission denied" in other.stderr
        assert "sudo" in other.stderr

    upgraded = nix.run(f"{PROFILE}/bin/spark-llm", "upgrade", second, check=False, timeout=300)
    log = nix.run("journalctl", "-u", "spark-llm.service", "-o", "cat").stdout.splitlines()
    own = [line for line in log if not line.startswith("engine |")]
    assert upgraded.returncode == 0, "\n".join([upgraded.stderr, *own[-60:]])
    assert _serving(nix) == second

    failed = nix.run(f"{PROFILE}/bin/spark-llm", "upgrade", broken, check=False, timeout=300)
    assert failed.returncode == 1
    assert "canary" in failed.stderr
    assert f"{second} serves again" in failed.stderr
    assert _serving(nix) == second
    assert nix.status()["ready"] is True

    nix.run(f"{PROFILE}/bin/spark-llm", "rollback", timeout=300)
    assert _serving(nix) == first

    nix.write("/var/lib/spark-llm/models/kept", "weights")
    said = nix.run(COMMAND, "uninstall").stdout
    assert "left: /var/lib/spark-llm /etc/spark-llm" in said
    assert nix.run("cat", "/var/lib/spark-llm/models/kept").stdout == "weights"
    assert nix.run("ls", "/etc/spark-llm/config.toml").returncode == 0
    assert nix.show("spark-llm.service", "LoadState")["LoadState"] == "not-found"
    gone = ("/var/cache/spark-llm", PROFILE, "/etc/sysusers.d/spark-llm.conf", COMMAND)
    assert [path for path in gone if nix.run("test", "-e", path, check=False).returncode == 0] == []
    assert nix.http("/livez")[0] == 0
    assert "nothing to do" in nix.run(f"{first}/bin/spark-llm", "uninstall").stdout


def test_upgrade_to_what_is_no_package_changes_nothing(nix: Container) -> None:
    """A path without spark-llm is refused before anything is switched."""
    done = nix.run(f"{TREE}/.venv/bin/spark-llm", "upgrade", "/opt", check=False)
    assert done.returncode == 2
    assert "nix build" in done.stderr


def test_a_unit_of_another_hand_is_not_overwritten(nix: Container) -> None:
    """A unit file that spark-llm did not write is refused by name, and stays."""
    path = "/etc/systemd/system/spark-llm.service"
    nix.write("/tmp/prefix" + path, "[Service]\nExecStart=/bin/true\n")
    done = nix.run(f"{TREE}/.venv/bin/spark-llm", "install", "--prefix", "/tmp/prefix", check=False)
    assert done.returncode == 3
    assert path in done.stderr
    assert "ExecStart=/bin/true" in nix.run("cat", "/tmp/prefix" + path).stdout


def _serving(machine: Container) -> str:
    """Store path that the running service was started from."""
    pid = machine.main_pid()
    words = machine.run("cat", f"/proc/{pid}/cmdline").stdout.split("\0")
    program = next(word for word in words if word.startswith("/nix/store"))
    return "/".join(program.split("/")[:4])


def _package(machine: Container, version: str, profile: str = "") -> str:
    """A store path that is laid out as the flake's package: bin/ with wrappers, libexec/ with the program."""
    folder = f"/opt/package-{version}"
    environment = [f"export SPARK_LLM_ENGINE__PYTHON={TREE}/.venv-engine/bin/python"]
    if profile:
        machine.write(f"{folder}/profiles/demo.toml", profile)
        environment += [
            'export SPARK_LLM_PATHS__PROFILES="$(dirname "$(readlink -f "$0")")/../profiles"',
            "export SPARK_LLM_ENGINE__RESTART_BUDGET=0",
        ]
    for name, module in (("spark-llm", "cli"), ("spark-llm-guard", "guard")):
        program = (
            f"#!{TREE}/.venv/bin/python\n# version {version}\n"
            f"import sys\nfrom spark_llm.{module} import main\nsys.exit(main())\n"
        )
        machine.write(f"{folder}/libexec/{name}", program, 0o755)
        start = f'exec "$(dirname "$(readlink -f "$0")")/../libexec/{name}" "$@"'
        wrapper = "\n".join(["#!/bin/sh", *environment, start, ""])
        machine.write(f"{folder}/bin/{name}", wrapper, 0o755)
    machine.write(f"{folder}/bin/driver-link", "#!/bin/sh\n", 0o755)
    return str(machine.run("nix-store", "--add", folder, timeout=60).stdout).strip()
