"""What can be built without nixpkgs is built: for real, twice where it must be the same.

Over 400 lines because the tests share what was built: a build takes longer than all of them.
"""

import hashlib
import json
import os
import re
import struct
import subprocess
import tempfile
import tomllib
from pathlib import Path

import pytest
from flake import (
    ROOT,
    STAND_IN,
    NixError,
    changed,
    nix_build,
    nix_eval,
    overlaid,
    reference,
    run_nix,
    store_path,
    tree,
)

ENGINE_PYTHON = ROOT / ".venv-engine" / "bin" / "python"
SITE = "lib/python3.12/site-packages"

pytestmark = [pytest.mark.usefixtures("nix"), pytest.mark.timeout(900)]


def build(system: str, expression: str, *args: str) -> Path:
    """Build and return where the output lies."""
    out = run_nix("build", "--no-link", "--print-out-paths", *overlaid(system, expression), *args)
    return store_path(out.splitlines()[-1])


def machine_code(library: Path) -> set[int]:
    """Compute capabilities, times ten, of the machine code in a library's CUDA fat binaries.

    A fat binary is a 16-byte header and entries; an entry says its kind (2: machine code), header and
    payload size at its start and its architecture at byte 28, as `cuobjdump --list-elf` reads them.
    """
    data, magic, found = library.read_bytes(), struct.pack("<I", 0xBA55ED50), set()
    start = data.find(magic)
    while start >= 0:
        header, size = struct.unpack_from("<HQ", data[start + 6 : start + 16])
        entry, end = start + header, start + header + size
        while entry < end:
            kind, _, entry_header, payload = struct.unpack_from("<HHIQ", data, entry)
            if kind == 2:
                found.add(struct.unpack_from("<I", data, entry + 28)[0])
            entry += entry_header + payload
        start = data.find(magic, start + 4)
    return found


APPLIANCE = "(pkgs.spark-llm.override { vllm-gb10 = null; })"


@pytest.fixture(scope="module")
def vllm() -> Path:
    """The aarch64 wheel of vLLM, patched and pruned."""
    return store_path(nix_build("packages.aarch64-linux.vllm-gb10-patched"))


def test_every_patch_is_in_the_tree(vllm: Path) -> None:
    """vllm-gb10 really builds from the official wheel, and each patch's added lines are in the result."""
    for patch in sorted((ROOT / "pkgs/vllm-gb10/patches").glob("*.patch")):
        target = None
        for line in patch.read_text().splitlines():
            if line.startswith("+++ b/"):
                target = (vllm / SITE / line.removeprefix("+++ b/").split("\t")[0]).read_text()
            elif line.startswith("+") and target is not None:
                assert line[1:] in target, f"{patch.name}: {line}"


def test_unusable_libraries_are_gone(vllm: Path) -> None:
    """The wheel's libraries for other GPUs are pruned and those for GB10 are there."""
    names = {path.name.split(".")[0] for path in (vllm / SITE / "vllm").rglob("*.so")}
    assert {"_C_stable_libtorch", "_moe_C_stable_libtorch", "_vllm_fa2_C"} <= names
    assert not names & {"_vllm_fa3_C", "_flashmla_C", "_qutlass_C", "_deepselect_C"}
    assert os.access(vllm / SITE / "vllm/vllm-rs", os.X_OK)


def test_patched_modules_import_and_behave(vllm: Path, tmp_path: Path) -> None:
    """The built tree imports, on a platform described as GB10, and decides as the patches say."""
    assert ENGINE_PYTHON.exists(), "the embedded engine is missing: run `make engine`"
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "PROBE_TMP": str(tmp_path),
        "PYTHONPATH": str(vllm / SITE),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [str(ENGINE_PYTHON), str(Path(__file__).with_name("patches_probe.py"))],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    assert answers["tree"] == str(vllm / SITE)
    assert answers["memory: NVML silent"] == 128_524_550_144
    assert answers["int8"] == "TritonInt8ScaledMMLinearKernel"
    assert answers["moe: qwen3_5"] == "TRITON"
    assert answers["drain: its status"] == 503


def test_source_build_has_its_build_system() -> None:
    """All that the pinned sdist's pyproject.toml requires to build is there, from python-env or as a tool."""
    package = "legacyPackages.x86_64-linux.vllm-gb10-source"
    sdist = store_path(nix_build(f"{package}.src"))
    text = subprocess.run(
        ["tar", "-xOf", sdist, "--wildcards", "--no-wildcards-match-slash", "*/pyproject.toml"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    lines = tomllib.loads(text)["build-system"]["requires"]
    required = {re.split(r"[^\w-]", line, maxsplit=1)[0] for line in lines}
    members = json.loads(nix_eval("packages.x86_64-linux.python-env.passthru.members", "--json"))
    tools = nix_eval(f"{package}.nativeBuildInputs", "--json")
    missing = {name for name in required - set(members) if name not in tools}
    # setuptools 70.1 and newer make wheels themselves.
    assert missing == {"wheel"}


def test_service_runs_from_its_wheels() -> None:
    """spark-llm, built from the pinned wheels, starts (its own install check runs it) and has driver-link."""
    out = build("x86_64-linux", APPLIANCE)
    assert {"spark-llm", "driver-link"} <= {path.name for path in (out / "bin").iterdir()}


def test_service_names_its_engine() -> None:
    """The packaged service finds the packaged vLLM without configuration."""
    script = json.loads(
        run_nix("eval", "--json", *overlaid("aarch64-linux", "pkgs.spark-llm.installPhase"))
    )
    engine = json.loads(
        run_nix("eval", "--json", *overlaid("aarch64-linux", "pkgs.vllm-gb10.outPath"))
    )
    assert f"--set-default SPARK_LLM_ENGINE__PYTHON {engine}/bin/python" in script


NVML = """
int nvmlInit_v2(void) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **device) { return 0; }
int nvmlDeviceGetPowerUsage(void *device, unsigned *milliwatts) { *milliwatts = 42000; return 0; }
"""


def test_service_finds_the_drivers_management_library() -> None:
    """The packaged service reads the GPU's power from the driver's folder, which no loader cache names."""
    driver = f"""(final: prev: {{
        sparkPins = prev.sparkPins // {{
          driverLib = final.runCommand "driver" {{ }} ''
            mkdir $out
            gcc -shared -fPIC -o $out/libnvidia-ml.so.1 ${{builtins.toFile "nvml.c" {json.dumps(NVML)}}}
          '';
        }};
      }})"""
    script = """
      # Python imports it before the program.
      echo 'from spark_llm import host; print(host.gpu_power_w())' >sitecustomize.py
      PYTHONPATH=$PWD ${service}/bin/spark-llm --version >$out"""
    expression = f"(let service = {APPLIANCE}; in pkgs.runCommand \"power\" {{ }} ''{script}'')"
    overlay = f"[ overlay {driver} ]"
    asked = run_nix(
        *("build", "--no-link", "--print-out-paths"),
        *overlaid("x86_64-linux", expression, overlays=overlay),
    )
    assert "42.0" in store_path(asked.splitlines()[-1]).read_text().split()


@pytest.mark.parametrize(
    ("mounted", "found"),
    [("toolkit", "toolkit"), ("driver toolkit", "driver"), ("", "driver")],
    ids=["in a container", "on the host", "nowhere"],
)
def test_engine_links_with_the_driver_that_is_there(mounted: str, found: str) -> None:
    """The engine's wrapper names the folder that has libcuda, ours first, to Triton (`-l:libcuda.so.1`) and to gcc."""
    script = f"""
      mkdir -p $out/libexec $out/${{pkgs.sparkPins.sitePackages}} driver toolkit
      for folder in {mounted}; do touch $folder/libcuda.so.1; done
      for program in vllm python3.12; do
        printf '#!/bin/sh\necho "$TRITON_LIBCUDA_PATH" "$LD_LIBRARY_PATH" "$LIBRARY_PATH"\n' >$out/libexec/$program
        chmod +x $out/libexec/$program
      done
      # The wrapper's own text, without the gigabytes that it names.
      ${{builtins.replaceStrings
        [ pkgs.sparkPins.driverLib ]
        [ "$PWD/driver" ]
        (builtins.unsafeDiscardStringContext pkgs.vllm-gb10.postFixup)}}
      LD_LIBRARY_PATH=$PWD/absent:$PWD/toolkit $out/bin/python3 >$out/said"""
    expression = (
        '(pkgs.runCommand "wrapped" { nativeBuildInputs = [ pkgs.makeWrapper pkgs.python312 ]; } '
        f"''{script}'')"
    )
    folder, path, *gcc = (build("x86_64-linux", expression) / "said").read_text().split()
    assert Path(folder).name == found
    assert gcc == ([folder] if mounted else [])
    assert [Path(each).name for each in path.split(":")] == ["driver", "absent", "toolkit"]


def test_units_have_store_paths() -> None:
    """Every unit of appliance/units is rendered without a placeholder left, starting store programs."""
    at = tree()
    units = build(
        "x86_64-linux", f"(pkgs.callPackage {at}/nix/units.nix {{ spark-llm = {APPLIANCE}; }})"
    )
    rendered = {path.name: path.read_text() for path in (units / "lib/systemd/system").iterdir()}
    sources = {
        path.name
        for path in (ROOT / "appliance/units").iterdir()
        if path.suffix in {".service", ".socket", ".target"}
    }
    assert rendered.keys() == sources
    assert "ExecStart=/nix/store/" in rendered["spark-llm.service"]
    assert "ListenStream=127.0.0.1:8000" in rendered["spark-llm.socket"]
    assert not [name for name, text in rendered.items() if re.search("@[a-z]+@", text)]


def test_units_have_the_configured_address() -> None:
    """On NixOS too the socket listens at `gateway.host` as systemd writes it, and the ready unit may ask there."""
    units = build(
        "x86_64-linux",
        f"""(let
              lib = import {STAND_IN}/lib.nix;
              flake.packages.x86_64-linux = {{ }};
              system = import {STAND_IN}/nixos.nix {{ inherit lib; }} {{
                modules = [
                  (import {tree()}/nix/module.nix flake)
                  {{
                    nixpkgs.hostPlatform = "x86_64-linux";
                    services.spark-llm = {{
                      enable = true;
                      package = {APPLIANCE};
                      settings.gateway = {{ host = "fd00::1"; port = 8080; }};
                    }};
                  }}
                ];
              }};
            in builtins.head system.config.systemd.packages)""",
    )
    folder = units / "lib/systemd/system"
    assert "ListenStream=[fd00::1]:8080\n" in (folder / "spark-llm.socket").read_text()
    assert "IPAddressAllow=fd00::1\n" in (folder / "spark-llm-ready.service").read_text()


def test_apps_run() -> None:
    """`serve`, `install` and `uninstall` pass shellcheck, and `install` lays the units with store paths in them."""
    at = tree()
    script = """
      ${apps.serve.program} --help >$out
      # The chroot has no systemd, which `install` asks for its version and, for another root, nothing more.
      mkdir $TMPDIR/bin
      printf '#!/bin/bash\necho systemd 257\n' >$TMPDIR/bin/systemctl
      chmod +x $TMPDIR/bin/systemctl
      PATH=$TMPDIR/bin:$PATH ${apps.install.program} --prefix $TMPDIR/host
      cat $TMPDIR/host/etc/systemd/system/spark-llm.service >>$out
      echo ${apps.uninstall.program} >>$out"""
    out = build(
        "x86_64-linux",
        f"""(let apps = import {at}/nix/apps.nix {{
               inherit (pkgs) lib;
               pkgs = pkgs // {{ spark-llm = {APPLIANCE}; }};
             }}; in pkgs.runCommand "apps" {{ }} ''{script}'')""",
    ).read_text()
    assert "--profile" in out
    assert "ExecStart=" in out
    assert "@bin@" not in out


def test_driver_link_is_built() -> None:
    """driver-link passes shellcheck and starts."""
    out = store_path(nix_build("packages.x86_64-linux.driver-link"))
    done = subprocess.run(
        ["bash", str(out / "bin/driver-link"), "--nonsense"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2


@pytest.fixture(scope="module")
def compiler() -> Path:
    """Nvcc and its headers, merged from the pinned wheels (its install check runs nvcc)."""
    return store_path(nix_build("packages.x86_64-linux.cuda-compiler"))


def test_toolkit_links(compiler: Path, tmp_path: Path) -> None:
    """CUDA_HOME compiles FP4 code for 12.0f and links it the way FlashInfer does, which the bare wheels do not."""
    source = tmp_path / "fp4.cu"
    source.write_text(
        "#include <cuda_fp4.h>\n#include <cub/block/block_reduce.cuh>\n"
        "__global__ void k(float2 *x, __nv_fp4x2_storage_t *y)\n"
        "{ *y = __nv_cvt_float2_to_fp4x2(*x, __NV_E2M1, cudaRoundNearest); }\n"
        'extern "C" void run(float2 *x, __nv_fp4x2_storage_t *y) { k<<<1, 1>>>(x, y); }\n'
    )
    library = tmp_path / "fp4.so"
    command = [str(compiler / "bin/nvcc"), "-gencode=arch=compute_120f,code=sm_120f", "-shared"]
    command += [
        "-Xcompiler=-fPIC",
        f"-L{compiler}/lib64",
        "-lcudart",
        "-o",
        str(library),
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert machine_code(library) == {120}


def test_toolkit_headers_suit_new_glibc(compiler: Path) -> None:
    """Rsqrt is declared noexcept, as glibc 2.42 does; the declarations of 13.0 conflict with it."""
    header = (compiler / "include/crt/math_functions.h").read_text()
    assert "rsqrt(double x) throw();" in header
    assert "rsqrtf(float x) throw();" in header


def test_kernels_are_compiled_by_the_pinned_nvcc() -> None:
    """spark-kernels carries one library an operation, with machine code for sm_120f and the plugin's entry point."""
    out = store_path(nix_build("packages.x86_64-linux.spark-kernels")) / SITE
    libraries = sorted((out / "spark_kernels/_lib").glob("*.so"))
    operations = {
        path.parent.name for path in (ROOT / "kernels/src/spark_kernels").glob("*/kernel.cu")
    }
    assert {path.stem for path in libraries} >= operations
    for path in libraries:
        assert machine_code(path) == (set() if path.stem.endswith("_host") else {120}), path
    (entry_points,) = out.glob("spark_kernels-*.dist-info/entry_points.txt")
    assert "[vllm.general_plugins]" in entry_points.read_text()


def test_flashinfer_module_is_compiled_ahead(compiler: Path) -> None:
    """One FlashInfer module is compiled for 12.1a by the derivation's own script, and FlashInfer finds it there.

    The result is kept by the hash of all that goes into it.
    """
    assert ENGINE_PYTHON.exists(), "the embedded engine is missing: run `make engine`"
    sources = ROOT / "pkgs/flashinfer-aot"
    # FlashInfer and what it imports that the embedded engine, which has torch, does not.
    flashinfer, *helpers = (
        store_path(nix_build(f"legacyPackages.x86_64-linux.pinnedWheels.{name}")) / SITE
        for name in ("flashinfer-python", "nvidia-ml-py", "tabulate")
    )
    inputs = [
        str(compiler),
        str(flashinfer),
        *(p.read_text() for p in sorted(sources.glob("*.[pj]*"))),
    ]
    key = hashlib.sha256("\0".join(inputs).encode()).hexdigest()[:32]
    cache = (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        / "spark-llm"
        / "flashinfer-aot"
    )
    package = cache / key / "flashinfer_jit_cache"
    environment = {
        "PATH": f"{ENGINE_PYTHON.parent}:{os.environ['PATH']}",
        "HOME": os.environ["HOME"],
        "PYTHONPATH": ":".join(map(str, [flashinfer, *helpers])),
        "CUDA_HOME": str(compiler),
        "FLASHINFER_CUDA_ARCH_LIST": "12.1a",
        "MAX_JOBS": "2",
    }
    if not package.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as work:
            out = Path(work) / "flashinfer_jit_cache"
            script = [str(sources / "build_modules.py"), str(sources / "modules.json"), str(out)]
            done = subprocess.run(
                [str(ENGINE_PYTHON), *script, "quantization"],
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
            package.parent.mkdir(exist_ok=True)
            out.rename(package)
    library = package / "jit_cache/quantization/quantization.so"
    assert machine_code(library) == {121}

    ask = (
        "from flashinfer.jit.quantization import gen_quantization_module as g; s = g(); "
        "print(s.is_aot, s.get_library_path())"
    )
    environment["PYTHONPATH"] += f":{package.parent}"
    done = subprocess.run(
        [str(ENGINE_PYTHON), "-c", ask],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["True", str(library)], done.stderr


@pytest.mark.parametrize(
    ("system", "expression"),
    [
        ("x86_64-linux", APPLIANCE),
        ("x86_64-linux", f"{APPLIANCE}.package"),
        ("x86_64-linux", "pkgs.driver-link"),
        ("aarch64-linux", "pkgs.vllm-gb10.patched"),
    ],
    ids=["spark-llm", "its Python package", "driver-link", "patched vLLM"],
)
def test_second_build_is_the_same(system: str, expression: str) -> None:
    """Building again gives the same bytes: Nix compares, and fails if they differ."""
    build(system, expression)
    build(system, expression, "--rebuild")


# What must fail, and how.


def test_patch_that_does_not_apply(tmp_path: Path) -> None:
    """A patch whose lines are gone stops the build and says to rebase or delete it; fuzz is not allowed."""
    name = min((ROOT / "pkgs/vllm-gb10/patches").glob("*.patch")).name
    text = (ROOT / "pkgs/vllm-gb10/patches" / name).read_text()
    hunk = text[text.index("\n@@ ") :].splitlines()
    context = next(line for line in hunk if line.startswith(" ") and line.strip())
    at = changed(
        tmp_path, f"pkgs/vllm-gb10/patches/{name}", f"\n{context}\n", f"\n{context} moved\n"
    )
    with pytest.raises(NixError, match=rf"{name} does not apply to vLLM 0.32.0"):
        run_nix(
            "build", "--no-link", "-L", *reference("packages.aarch64-linux.vllm-gb10-patched", at)
        )


def test_wheel_with_another_hash(tmp_path: Path) -> None:
    """A wheel that is not the pinned one stops the build with both hashes and what to do."""
    pins = json.loads((ROOT / "nix/pins/appliance/x86_64-linux.json").read_text())
    at = changed(tmp_path, "nix/pins/appliance/x86_64-linux.json", pins["h11"]["sha256"], "0" * 64)
    with pytest.raises(NixError, match=r"hash mismatch in h11-.*the pins say sha256 0000"):
        run_nix(
            "build", "--no-link", "-L", *overlaid("x86_64-linux", f"{APPLIANCE}.environment", at=at)
        )


def test_pruning_rule_that_matches_nothing(tmp_path: Path) -> None:
    """A pruning rule whose file is gone stops the build and names the rule."""
    at = changed(tmp_path, "nix/pins/pruned.json", "vllm/_qutlass_C*.so", "vllm/_gone_C*.so")
    with pytest.raises(NixError, match=r"vllm 0.32.0: nothing matches .*_gone_C"):
        run_nix(
            "build", "--no-link", "-L", *reference("packages.aarch64-linux.vllm-gb10-patched", at)
        )
