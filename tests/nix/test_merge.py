"""Merging site-packages trees: one owner for every file."""

from pathlib import Path

import merge
import pytest


def make(root: Path, files: dict[str, str]) -> Path:
    """A tree with these files."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_namespace_packages_share_a_folder(tmp_path: Path) -> None:
    """Two distributions may fill one folder, and modes survive."""
    a = make(tmp_path / "a", {"nvidia/x/lib.so": "x", "nvidia/x/bin/tool": "t"})
    b = make(tmp_path / "b", {"nvidia/y/lib.so": "y"})
    (a / "nvidia/x/bin/tool").chmod(0o555)
    merge.merge(tmp_path / "out", [a, b])
    assert (tmp_path / "out/nvidia/y/lib.so").read_text() == "y"
    assert (tmp_path / "out/nvidia/x/bin/tool").stat().st_mode & 0o111


def test_same_content_is_no_collision(tmp_path: Path) -> None:
    """The same file from two distributions is taken once."""
    trees = [make(tmp_path / name, {"LICENSE": "same"}) for name in "ab"]
    merge.merge(tmp_path / "out", trees)
    assert (tmp_path / "out/LICENSE").read_text() == "same"


def test_other_content_is_refused(tmp_path: Path) -> None:
    """Different content stops the merge and names the file and both sides."""
    a = make(tmp_path / "cuda-bindings", {"cuda/driver.py": "13"})
    b = make(tmp_path / "cuda-python", {"cuda/driver.py": "12"})
    with pytest.raises(
        merge.CollisionError, match=r"cuda/driver.py differs .*cuda-bindings.*cuda-python"
    ):
        merge.merge(tmp_path / "out", [a, b])


def test_litter_at_the_root_is_left_out(tmp_path: Path) -> None:
    """Leftovers of builds at the root are not installed; folders of that name deeper are."""
    a = make(tmp_path / "a", {"build_utils.py": "", "include/a.h": "", "torch/include/b.h": ""})
    merge.merge(tmp_path / "out", [a])
    assert not (tmp_path / "out/build_utils.py").exists()
    assert not (tmp_path / "out/include").exists()
    assert (tmp_path / "out/torch/include/b.h").exists()
