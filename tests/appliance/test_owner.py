"""Who acts on the store: root as its owner, others not at all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from spark_llm.errors import RefusedError
from spark_llm.install import COMMAND, Site, wanted
from spark_llm.owner import act_as_owner, open_first

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
OTHER = 4321
CODE = """
import json, os, sys
from pathlib import Path
from spark_llm.owner import act_as_owner
act_as_owner(Path(sys.argv[1]))
(Path(sys.argv[1]) / "made").write_text("x")
print(json.dumps([os.getuid(), os.geteuid(), os.getgid(), os.getgroups()]))
"""


def spark(*arguments: str, state: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "spark_llm.cli", *arguments],
        env={"PATH": os.environ["PATH"], "STATE_DIRECTORY": str(state), "HOME": "/nonexistent"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_root_goes_on_as_the_owner(short_path: Path) -> None:
    """In a folder of another user root gives its rights up for good, and what it makes is that user's."""
    short_path.chmod(0o755)
    folder = short_path / "state"
    folder.mkdir(mode=0o750)
    os.chown(folder, OTHER, OTHER)
    done = subprocess.run(
        [sys.executable, "-c", CODE, folder], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"[{OTHER}, {OTHER}, {OTHER}, []]"
    made = (folder / "made").stat()
    assert (made.st_uid, made.st_gid, made.st_mode & 0o777) == (OTHER, OTHER, 0o660)


READ = """
import os, sys
from pathlib import Path
from spark_llm.owner import open_first
from spark_llm.errors import SparkLlmError
try:
    descriptor = open_first(Path(sys.argv[1]), Path(sys.argv[2]))
    print(os.read(descriptor, 9).decode(), os.geteuid())
except SparkLlmError as error:
    print(error.message, os.geteuid())
"""


def test_what_root_may_read_is_opened_first(short_path: Path) -> None:
    """A file that only the caller may read is open when the rights are gone; the owner's links lead root nowhere."""
    short_path.chmod(0o755)
    state, secret = short_path / "state", short_path / "home" / "file"
    secret.parent.mkdir(mode=0o700)
    secret.write_text("secret")
    state.mkdir(mode=0o750)
    (state / "file").symlink_to(secret)
    (state / "folder").symlink_to(secret.parent)
    os.chown(state, OTHER, OTHER)

    def read(path: Path) -> str:
        return subprocess.run(
            [sys.executable, "-c", READ, path, state], capture_output=True, text=True, check=True
        ).stdout.strip()

    assert read(secret) == f"secret {OTHER}"
    for link in (state / "file", state / "folder" / "file"):
        assert read(link) == f"cannot read {link}: Permission denied {OTHER}"
    descriptor = open_first(secret, short_path / "none")
    assert os.read(descriptor, 9) == b"secret", "where there is no store yet root stays root"
    os.close(descriptor)


def test_nothing_changes_where_nothing_must(tmp_path: Path) -> None:
    """In a folder of its own, or one that is not there yet, root stays what it is."""
    act_as_owner(tmp_path)
    act_as_owner(tmp_path / "none")
    assert os.geteuid() == 0


def test_others_are_told_to_use_sudo(short_path: Path) -> None:
    """Who may not look into the store gets one line and a hint."""
    short_path.chmod(0o755)
    folder = short_path / "state"
    folder.mkdir(mode=0o700)
    os.seteuid(OTHER)
    try:
        with pytest.raises(RefusedError, match=f"{folder}: permission denied") as refused:
            act_as_owner(folder)
    finally:
        os.seteuid(0)
    assert "sudo" in refused.value.hint


def test_keys_of_root_are_the_service_s(short_path: Path) -> None:
    """A key that root adds lies in the service's own file, readable for it alone."""
    short_path.chmod(0o755)
    folder = short_path / "state"
    folder.mkdir(mode=0o750)
    os.chown(folder, OTHER, OTHER)
    assert spark("keys", "add", "me", state=folder).returncode == 0
    stored = (folder / "keys.json").stat()
    assert (stored.st_uid, stored.st_mode & 0o777) == (OTHER, 0o600)


def test_installed_command_means_the_installed_store() -> None:
    """The command of an installation looks into the service's folders, unless the caller names others."""
    text = wanted(Site(Path("/opt/bin")))[COMMAND]
    said = subprocess.run(
        ["/bin/sh", "-c", text.replace("exec /opt/bin/spark-llm", "exec env")],
        env={"PATH": os.environ["PATH"], "CACHE_DIRECTORY": "/mine"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert "STATE_DIRECTORY=/var/lib/spark-llm" in said
    assert "CACHE_DIRECTORY=/mine" in said
