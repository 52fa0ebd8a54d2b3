"""The unit files themselves."""

import re
import subprocess
from pathlib import Path

import pytest
from spark_llm import hardening, install
from spark_llm.commands import install as commands

UNITS = sorted(
    path.name
    for path in install.shipped_units().iterdir()
    if path.suffix in {".service", ".socket", ".target"}
)
TREE = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The units as the installer writes them on this machine."""
    return _write(tmp_path_factory.mktemp("units"), "127.0.0.1")


def _write(folder: Path, host: str) -> Path:
    """The units for a gateway on ``host``, each program replaced by one that exists."""
    programs = folder / "bin"
    programs.mkdir()
    for name in ("spark-llm", "spark-llm-guard", "driver-link"):
        (programs / name).symlink_to("/bin/true")
    said = subprocess.run(["systemctl", "--version"], capture_output=True, text=True, check=True)
    address = install.listen_on(host, 8000)
    site = install.Site(programs, *address, systemd=int(said.stdout.split()[1]))
    for path, text in install.wanted(site).items():
        if path.parent == install.UNITS:
            (folder / path.name).write_text(text)
    return folder


def test_verify_is_silent(written: Path) -> None:
    """``systemd-analyze verify`` has nothing to say about any unit."""
    _verify(written)


@pytest.mark.parametrize("host", ["localhost", "::1", "::", "0.0.0.0", "192.0.2.1", "2001:db8::1"])
def test_every_address_is_understood(tmp_path: Path, host: str) -> None:
    """Systemd takes what becomes of any ``gateway.host``."""
    _verify(_write(tmp_path, host))


def _verify(written: Path) -> None:
    names = [str(written / name) for name in UNITS]
    done = subprocess.run(
        ["systemd-analyze", "verify", *names], capture_output=True, text=True, check=False
    )
    ours = [line for line in done.stderr.splitlines() if "spark-llm" in line]
    assert (done.returncode, ours) == (0, [])


@pytest.mark.parametrize(
    ("unit", "limit"),
    [
        ("spark-llm.service", 25),
        ("spark-llm-guard.service", 25),
        ("spark-llm-fetch@.service", 40),
        ("spark-llm-ready.service", 25),
        ("spark-llm-driver.service", 25),
    ],
)
def test_exposure_is_below_its_limit(written: Path, unit: str, limit: int) -> None:
    """``systemd-analyze security`` rates each unit at or below its limit, in tenths."""
    path = written / unit.replace("@.", "@x.")
    if not path.exists():
        path.write_text((written / unit).read_text())
    command = [
        "systemd-analyze",
        "security",
        "--no-pager",
        "--offline=true",
        f"--threshold={limit}",
    ]
    done = subprocess.run([*command, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout.splitlines()[-1:] + done.stderr.splitlines()[-1:]


def test_every_relaxation_has_its_reason() -> None:
    """A protection that is not at its strictest is in relaxations.toml with a reason, and nothing else is."""
    assert hardening.differences(install.shipped_units()) == []


def test_hardening_page_is_current() -> None:
    """docs/reference/hardening.md is what the generator writes."""
    page = TREE / "docs" / "reference" / "hardening.md"
    assert page.read_text() == hardening.page(install.shipped_units())


def test_uninstalling_removes_the_disposable_folders_of_the_units() -> None:
    """What systemd makes for caches and logs is what `uninstall` removes, no more and no less."""
    texts = [(install.shipped_units() / unit).read_text() for unit in UNITS]
    made = {
        f"/var/{folder}/{name}"
        for setting, folder in (("CacheDirectory", "cache"), ("LogsDirectory", "log"))
        for name in re.findall(rf"^{setting}=(.+)$", "\n".join(texts), re.MULTILINE)
    }
    assert made == set(commands.DISPOSABLE)


def test_placeholders_are_the_documented_ones() -> None:
    """The units have the placeholders that their README lists, and no others."""
    folder = install.shipped_units()
    used = {
        name for unit in UNITS for name in re.findall(r"@([a-z_]+)@", (folder / unit).read_text())
    }
    documented = set(
        re.findall(r"^\| `@([a-z_]+)@` ", (folder / "README.md").read_text(), re.MULTILINE)
    )
    assert used == documented
