"""The flake evaluates: every file, every output, on both systems, with a real Nix."""

import json
import re
from pathlib import Path

import pytest
from flake import (
    ROOT,
    STAND_IN,
    NixError,
    changed,
    nix_eval,
    overlaid,
    reference,
    run_nix,
    tree,
)
from spark_llm import install

SYSTEMS = ("aarch64-linux", "x86_64-linux")
PACKAGES = {
    "cuda-compiler",
    "cuda-toolkit",
    "default",
    "driver-link",
    "flashinfer-aot",
    "oci",
    "python-env",
    "spark-kernels",
    "spark-llm",
    "vllm-gb10",
    "vllm-gb10-patched",
}
APPS = {"default", "install", "load-oci", "serve", "uninstall", "update-pins", "upgrade"}

pytestmark = [pytest.mark.usefixtures("nix"), pytest.mark.timeout(600)]


def test_every_nix_file_parses() -> None:
    """Each .nix file of the repository parses and is a value."""
    files = list(tree().rglob("*.nix"))
    files += STAND_IN.rglob("*.nix")
    listed = " ".join(str(path) for path in files)
    kinds = run_nix(
        "eval", "--impure", "--json", "--expr", f"map (f: builtins.typeOf (import f)) [ {listed} ]"
    )
    assert len(json.loads(kinds)) == len(files) > 40


def test_show_lists_every_output() -> None:
    """`nix flake show` names packages, apps, checks, the module and the overlay."""
    shown = json.loads(run_nix("flake", "show", "--json", "--all-systems", *reference("")))
    for system in SYSTEMS:
        assert shown["packages"][system].keys() == PACKAGES
        assert shown["apps"][system].keys() == APPS
        assert {"lib", "module", "format", "spark-llm"} <= shown["checks"][system].keys()
    assert shown["overlays"].keys() == shown["nixosModules"].keys() == {"default"}


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_package_instantiates(system: str) -> None:
    """Each package of a system has a derivation."""
    paths = json.loads(
        nix_eval(f"packages.{system}", "--json", "--apply", "builtins.mapAttrs (_: p: p.drvPath)")
    )
    assert paths.keys() == PACKAGES
    assert all(re.fullmatch(r"/nix/store/\w{32}-.+\.drv", path) for path in paths.values())


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_source_build_instantiates(system: str) -> None:
    """vllm-gb10-source has a derivation, below the name that `nix build .#vllm-gb10-source` resolves."""
    path = nix_eval("vllm-gb10-source.drvPath", "--raw", "--system", system)
    assert re.fullmatch(r"/nix/store/\w{32}-vllm-gb10-source-.+\.drv", path)


def test_check_leaves_the_source_build_alone(tmp_path: Path) -> None:
    """`nix flake check` evaluates everything else, and not what would fetch a sdist and git repositories for it."""
    at = changed(tmp_path, "overlays/vllm.nix", "../pkgs/vllm-gb10-source", "../pkgs/no-such-one")
    with pytest.raises(NixError, match="no-such-one"):
        nix_eval("vllm-gb10-source.drvPath", at=at)
    run_nix("flake", "check", "--no-build", *reference("", at))


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_package_says_what_it_is(system: str) -> None:
    """Each package has a description, a licence and its platforms in meta."""
    metas = json.loads(
        nix_eval(
            f"packages.{system}",
            "--json",
            "--apply",
            'p: builtins.mapAttrs (_: p: builtins.attrNames p.meta) (removeAttrs p [ "oci" ])',
        )
    )
    for name, meta in metas.items():
        assert {"description", "license", "platforms"} <= set(meta), name


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_check_and_app_evaluates(system: str) -> None:
    """Checks have derivations and apps have programs."""
    nix_eval(f"checks.{system}", "--json", "--apply", "builtins.mapAttrs (_: c: c.drvPath)")
    programs = json.loads(
        nix_eval(f"apps.{system}", "--json", "--apply", "builtins.mapAttrs (_: a: a.program)")
    )
    assert programs.keys() == APPS
    assert all("/bin/" in program for program in programs.values())


def test_lib_functions_are_tested() -> None:
    """nix/lib's tests pass, and every exported function has one."""
    expression = f"import {tree()}/nix/lib/tests.nix {{ lib = import {STAND_IN}/lib.nix; }}"
    result = json.loads(run_nix("eval", "--impure", "--json", "--expr", expression))
    assert result["failures"] == []
    assert result["untested"] == []
    assert result["count"] >= 25


def test_units_address_is_the_installers() -> None:
    """What NixOS makes of ``gateway.host`` is what `spark-llm install` makes of it, which systemd understands."""
    hosts = ["127.0.0.1", "localhost", "::1", "127.0.1.1", "::", "0.0.0.0", "192.0.2.1", "fd00::1"]
    expression = f"""let
        lib = import {STAND_IN}/lib.nix;
        inherit (import {tree()}/nix/lib {{ inherit lib; }}) address;
      in map (h: [ (address.listen h 8000) (address.gateway h) (address.isLoopback h) ])
        [ {" ".join(f'"{host}"' for host in hosts)} ]"""
    ours = json.loads(run_nix("eval", "--impure", "--json", "--expr", expression))
    theirs = [install.listen_on(host, 8000) for host in hosts]
    assert ours == [[listen, gateway, who == "localhost"] for listen, who, gateway in theirs]


def test_overlay_applies_once() -> None:
    """Bringing the overlay twice changes nothing, and keeps an override made in between."""
    between = "(final: prev: { cuda-toolkit = prev.cuda-toolkit // { mine = true; }; })"
    out = run_nix(
        "eval",
        "--json",
        *overlaid(
            "aarch64-linux",
            "pkgs.cuda-toolkit.mine or false",
            overlays=f"[ overlay {between} overlay ]",
        ),
    )
    assert json.loads(out) is True


def test_override_of_patches_and_plugins() -> None:
    """Consumers can replace the patches and add plugins, and get another derivation."""
    expression = """
      let other = pkgs.vllm-gb10.override { patches = [ ]; extraPlugins = [ pkgs.driver-link ]; };
      in {
        differs = other.drvPath != pkgs.vllm-gb10.drvPath;
        patches = builtins.length other.patches;
        plugins = map (p: p.name) other.plugins;
      }"""
    out = json.loads(run_nix("eval", "--json", *overlaid("aarch64-linux", expression)))
    assert out == {"differs": True, "patches": 0, "plugins": ["spark-kernels-0.1.0", "driver-link"]}


def test_service_without_kernels_compiled_ahead() -> None:
    """The way to begin without FlashInfer's hours, as docs/how-to/build.md writes it, evaluates to another service."""
    expression = """
      let p = pkgs; in (p.spark-llm.override {
        vllm-gb10 = p.vllm-gb10.override { flashinfer-aot = null; };
      }).drvPath != p.spark-llm.drvPath"""
    out = run_nix("eval", "--json", *overlaid("aarch64-linux", expression))
    assert json.loads(out) is True


def test_patches_are_in_order() -> None:
    """vllm-gb10 takes exactly the patch files of its folder, by number."""
    out = nix_eval(
        "packages.aarch64-linux.vllm-gb10.patches", "--json", "--apply", "map baseNameOf"
    )
    names = sorted(path.name for path in (ROOT / "pkgs/vllm-gb10/patches").glob("*.patch"))
    assert [re.sub(r"^\w{32}-", "", name) for name in json.loads(out)] == names


@pytest.mark.parametrize("system", SYSTEMS)
def test_image_is_configured(system: str) -> None:
    """The image serves as an ordinary user, is stopped by SIGTERM and checked on /readyz."""
    config = json.loads(
        json.loads(nix_eval(f"packages.{system}.oci", "--json", "--apply", "p: p.config"))
    )
    assert config["Entrypoint"][0].endswith("/bin/spark-llm")
    assert config["Cmd"] == ["serve"]
    assert config["User"] == "2000:0"
    assert config["StopSignal"] == "SIGTERM"
    assert config["Healthcheck"]["Test"][2:4] == ["wait", "--ready"]
    environment = dict(entry.split("=", 1) for entry in config["Env"])
    folders = environment["LD_LIBRARY_PATH"].split(":")
    assert folders[:2] == ["/run/opengl-driver/lib", f"/usr/lib/{system}-gnu"]
    assert environment["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility"
    # A published port arrives at another address than the container's loopback, and state must lie in the volumes.
    assert environment["SPARK_LLM_GATEWAY__HOST"] == "0.0.0.0"
    assert {environment["STATE_DIRECTORY"], environment["CACHE_DIRECTORY"]} == set(
        config["Volumes"]
    )
    assert config["Labels"]["org.opencontainers.image.version"] == "0.1.0"


def test_image_is_not_its_users() -> None:
    """The store in the image is root's: a service that could write its own code would keep what breaks into it."""
    owner = nix_eval("packages.aarch64-linux.oci", "--json", "--apply", "p: [ p.uid p.gid ]")
    assert json.loads(owner) == [0, 0]


def test_nixos_module() -> None:
    """A system with the service gets users, groups, port and credentials; the hub token is the fetch units' alone."""
    out = run_nix(
        "eval",
        "--json",
        *machine(
            'openFirewall = true; settings.gateway.host = "0.0.0.0"; '
            'clients = [ "10.0.0.0/8" ]; '
            'credentials = { api-keys = "/run/keys"; hub-token = "/run/token"; };'
        ),
    )
    assert json.loads(out) == {
        "credential": {"service": ["api-keys:/run/keys"], "fetch": ["hub-token:/run/token"]},
        "groups": list(install.GROUPS),
        "ports": [8000],
        "users": ["spark-llm", "spark-llm-fetch"],
    }


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ("openFirewall = true;", "set services.spark-llm.settings.gateway.host"),
        ('openFirewall = true; settings.gateway.host = "0.0.0.0";', "services.spark-llm.clients"),
        ('cluster = { peers = [ "10.0.0.2" ]; rank = 2; };', "the ranks are 0 to 1"),
        ('settings.profile = "other"; profile = "demo";', "say it once"),
        ("profile = 3;", "services.spark-llm.profile is not of type string"),
    ],
)
def test_nixos_module_refuses(settings: str, sentence: str) -> None:
    """Contradictory options stop the evaluation with what to set."""
    with pytest.raises(NixError, match=re.escape(sentence)):
        run_nix("eval", "--json", *machine(settings))


def machine(settings: str) -> list[str]:
    """Arguments that evaluate a NixOS system with the service and these settings."""
    return [
        "--impure",
        "--expr",
        f"""let
          lib = import {STAND_IN}/lib.nix;
          pkgs = import {STAND_IN} {{
            system = "x86_64-linux";
            config.allowUnfreePredicate = _: true;
            overlays = [ (import {tree()}/overlays) ];
          }};
          flake.packages.x86_64-linux = {{ inherit (pkgs) spark-llm driver-link; }};
          system = import {STAND_IN}/nixos.nix {{ inherit lib; }} {{
            modules = [
              (import {tree()}/nix/module.nix flake)
              {{
                nixpkgs.hostPlatform = "x86_64-linux";
                services.spark-llm = {{ enable = true; {settings} }};
              }}
            ];
          }};
        in {{
          credential = builtins.mapAttrs (_: unit: unit.serviceConfig.LoadCredential) {{
            service = system.config.systemd.services.spark-llm;
            fetch = system.config.systemd.services."spark-llm-fetch@";
          }};
          groups = system.config.users.users.spark-llm.extraGroups;
          ports = system.config.networking.firewall.allowedTCPPorts;
          users = builtins.attrNames system.config.users.users;
        }}""",
    ]


def test_wheel_missing_for_the_system(tmp_path: Path) -> None:
    """A distribution without a pin stops the evaluation and names the command that pins."""
    at = changed(tmp_path, "nix/pins/wheels/aarch64-linux.json", '"triton":', '"triton2":')
    with pytest.raises(NixError, match=r"no wheel of triton is pinned for aarch64-linux: run"):
        nix_eval("packages.aarch64-linux.vllm-gb10.drvPath", at=at)


def test_wrong_architecture_is_refused(tmp_path: Path) -> None:
    """12.0a, which does not load on GB10, stops the evaluation with the right string."""
    at = changed(tmp_path, "nix/pins/vllm.json", '"12.0f"', '"12.0a"')
    with pytest.raises(NixError, match=r'"12.0a" is refused: GB10 is compute capability 12.1'):
        nix_eval("legacyPackages.aarch64-linux.vllm-gb10-source.drvPath", at=at)


def test_unsupported_system_is_refused() -> None:
    """Another system stops the evaluation with the systems there are."""
    with pytest.raises(NixError, match="spark-llm has no wheels for riscv64-linux"):
        run_nix("eval", *overlaid("riscv64-linux", "pkgs.sparkPins.wheels.vllm.version"))


def test_unknown_attribute_stops_the_stand_in() -> None:
    """The stand-in for nixpkgs throws on what it does not have, so that a test cannot pass on it."""
    with pytest.raises(NixError, match="no attribute nonesuch"):
        run_nix("eval", *overlaid("x86_64-linux", "pkgs.callPackage ({ nonesuch }: { }) { }"))
    with pytest.raises(NixError, match="fetchPypi takes no argument pythons"):
        run_nix(
            "eval",
            *overlaid(
                "x86_64-linux",
                'pkgs.fetchPypi { pname = "a"; version = "1"; format = "wheel"; pythons = ""; sha256 = ""; }',
            ),
        )
