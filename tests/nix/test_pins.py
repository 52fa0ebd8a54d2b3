"""The pins: their form, the lock, and the program that makes them."""

import base64
import json
import re
import tomllib
from pathlib import Path

import pytest
import update_pins
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename
from update_pins import Pin, PinError

ROOT = Path(__file__).parents[2]
PINS = ROOT / "nix" / "pins"
SYSTEMS = ("aarch64-linux", "x86_64-linux")


def closure(folder: str, system: str) -> dict[str, Pin]:
    """One pins file."""
    return update_pins.read_closure(PINS / folder / f"{system}.json")


@pytest.mark.parametrize("folder", ["wheels", "appliance"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_each_pin_is_one_wheel(folder: str, system: str) -> None:
    """Every pin names a wheel of its own distribution and version, with a sha256, fit for the system."""
    ranks = update_pins.ranked_tags("3.12", update_pins.MACHINES[system])
    pins = closure(folder, system)
    assert len(pins) > 30
    for name, pin in pins.items():
        distribution, version, _, tags = parse_wheel_filename(pin.file)
        assert (distribution, str(version)) == (name, pin.version)
        assert re.fullmatch(r"[0-9a-f]{64}", pin.sha256)
        assert tags & ranks.keys(), f"{pin.file} does not run on {system}"


def test_systems_pin_the_same_versions() -> None:
    """Both systems have the same distributions in the same versions."""
    ours, theirs = (closure("wheels", system) for system in SYSTEMS)
    assert {n: p.version for n, p in ours.items()} == {n: p.version for n, p in theirs.items()}


def test_cuda_is_one_release() -> None:
    """The toolkit is CUDA 13.0 throughout, and cuda-python is not the one that overwrites bindings."""
    pins = closure("wheels", "aarch64-linux")
    asked = json.loads((PINS / "vllm.json").read_text())
    assert pins["nvidia-cuda-nvcc"].version == asked["cuda"]["nvcc"] == "13.0.88"
    assert pins["nvidia-nvvm"].version == pins["nvidia-cuda-crt"].version == "13.0.88"
    assert pins["cuda-python"].version == pins["cuda-bindings"].version == "13.0.3"
    assert pins["vllm"].version == asked["version"] == asked["sdist"]["version"]
    assert set(asked["cuda"]["compiler"]) < set(asked["cuda"]["toolkit"]) <= pins.keys()


def test_appliance_shares_versions_with_the_engine() -> None:
    """What the appliance and the engine both use is pinned in one version."""
    engine, appliance = (closure(folder, "aarch64-linux") for folder in ("wheels", "appliance"))
    shared = engine.keys() & appliance.keys()
    assert shared
    assert {name: engine[name] for name in shared} == {name: appliance[name] for name in shared}


@pytest.mark.parametrize("system", SYSTEMS)
def test_appliance_pins_meet_its_requirements(system: str) -> None:
    """Every requirement of appliance/pyproject.toml is pinned in a version that it allows."""
    project = tomllib.loads((ROOT / "appliance" / "pyproject.toml").read_text())["project"]
    pins = closure("appliance", system)
    for requirement in map(Requirement, project["dependencies"]):
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin, f"{requirement.name} is not pinned: run `nix run .#update-pins`"
        assert requirement.specifier.contains(pin.version), f"{requirement} against {pin.version}"


def test_pruned_distributions_exist() -> None:
    """Every pruned distribution is a pinned one, has a reason, and none that is needed is pruned."""
    pruned = json.loads((PINS / "pruned.json").read_text())
    pins = closure("wheels", "aarch64-linux")
    assert pruned["wheels"].keys() <= pins.keys()
    assert pruned["files"].keys() <= pins.keys() - pruned["wheels"].keys()
    assert all(len(reason) > 10 for reason in pruned["wheels"].values())
    assert not pruned["wheels"].keys() & {"torch", "vllm", "triton", "flashinfer-python", "blake3"}


def test_no_index_address_is_stored() -> None:
    """Pins hold no address: the fetcher builds it."""
    for path in PINS.rglob("*.json"):
        assert "://" not in path.read_text(), path


def test_externals_are_commits() -> None:
    """Every external has a full commit, and a hash only where one is published."""
    externals = json.loads((PINS / "externals.json").read_text())
    for name, external in externals.items():
        assert re.fullmatch(r"[0-9a-f]{40}", external["rev"]), name
        if "hash" in external:
            assert len(base64.b64decode(external["hash"].removeprefix("sha256-"))) == 32
    assert [name for name, external in externals.items() if "hash" in external] == ["qutlass"]


def test_lock_has_one_input() -> None:
    """flake.lock is version 7 and pins nixpkgs alone, as flake.nix asks for it."""
    lock = json.loads((ROOT / "flake.lock").read_text())
    assert lock["version"] == 7
    assert lock["nodes"].keys() == {"nixpkgs", "root"}
    assert lock["nodes"]["root"]["inputs"] == {"nixpkgs": "nixpkgs"}
    node = lock["nodes"]["nixpkgs"]
    original, locked = node["original"], node["locked"]
    url = re.search(r'inputs\.nixpkgs\.url = "([^"]+)"', (ROOT / "flake.nix").read_text())
    assert url is not None
    assert url[1] == "{type}:{owner}/{repo}/{ref}".format(**original)
    assert {k: locked[k] for k in ("type", "owner", "repo")} == {
        k: original[k] for k in ("type", "owner", "repo")
    }
    assert re.fullmatch(r"[0-9a-f]{40}", locked["rev"])
    assert len(base64.b64decode(locked["narHash"].removeprefix("sha256-"))) == 32
    assert isinstance(locked["lastModified"], int)


def test_flake_fits_on_a_screen() -> None:
    """flake.nix says what there is in fifty lines at most."""
    assert len((ROOT / "flake.nix").read_text().splitlines()) <= 50


# The program.


def test_best_wheel_prefers_the_closest_tag() -> None:
    """A wheel for the interpreter beats a stable-ABI one, which beats a pure one."""
    ranks = update_pins.ranked_tags("3.12", "aarch64")
    pure = ("a-1-py3-none-any.whl", "p")
    stable = ("a-1-cp38-abi3-manylinux_2_28_aarch64.whl", "s")
    exact = ("a-1-cp312-cp312-manylinux2014_aarch64.manylinux_2_17_aarch64.whl", "e")
    foreign = ("a-1-cp312-cp312-manylinux_2_28_x86_64.whl", "f")
    too_new = ("a-1-cp312-cp312-manylinux_2_39_aarch64.whl", "n")
    assert update_pins.best_wheel([foreign, pure, stable, exact, too_new], ranks) == exact
    assert update_pins.best_wheel([foreign, pure, stable], ranks) == stable
    assert update_pins.best_wheel([foreign, too_new], ranks) is None


def test_closure_takes_one_wheel_each() -> None:
    """A lock becomes sorted pins of file names, without addresses."""
    wheels = [{"url": "x://y/z/b-2-py3-none-any.whl", "hashes": {"sha256": "22"}}]
    lock = {
        "packages": [
            {"name": "b", "version": "2", "wheels": wheels},
            {
                "name": "a",
                "version": "1",
                "wheels": [{"url": "x://y/a-1-py3-none-any.whl", "hashes": {"sha256": "11"}}],
            },
        ]
    }
    assert update_pins.closure_of(lock, "3.12", "aarch64-linux") == {
        "a": Pin("1", "a-1-py3-none-any.whl", "11"),
        "b": Pin("2", "b-2-py3-none-any.whl", "22"),
    }


def test_closure_names_what_has_no_wheel() -> None:
    """A distribution without a wheel for the system is named, with the way out."""
    lock = {"packages": [{"name": "a", "version": "1", "wheels": []}]}
    with pytest.raises(
        PinError, match=r"no wheel for aarch64-linux and Python 3.12: a 1. Pin another"
    ):
        update_pins.closure_of(lock, "3.12", "aarch64-linux")


def test_difference_says_each_change() -> None:
    """Added, removed, moved and replaced distributions have a line each; the same has none."""
    old = {"a": Pin("1", "a", "1"), "b": Pin("1", "b", "1"), "c": Pin("1", "c", "1")}
    new = {"a": Pin("2", "a", "1"), "c": Pin("1", "c", "9"), "d": Pin("1", "d", "1")}
    assert update_pins.difference(old, new) == [
        "~ a 1 -> 2",
        "- b 1",
        "~ c 1: another file, c -> c",
        "+ d 1",
    ]
    assert update_pins.difference(old, old) == []


def test_written_pins_are_read_back(tmp_path: Path) -> None:
    """Writing and reading a closure changes nothing, with one line a distribution."""
    pins = closure("wheels", "aarch64-linux")
    path = tmp_path / "pins.json"
    update_pins.write_closure(path, pins)
    assert update_pins.read_closure(path) == pins
    assert len(path.read_text().splitlines()) == len(pins) + 2
    assert update_pins.read_closure(tmp_path / "absent.json") == {}


def test_wrong_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Outside the repository the command says where it belongs."""
    assert update_pins.main(["--root", str(tmp_path)]) == 2
    assert "run this from the repository's root" in capsys.readouterr().err
