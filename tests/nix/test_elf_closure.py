"""Every library that an environment NEEDs is there, without building it."""

import fnmatch
import json
from pathlib import Path, PurePath

import elf_census
import pytest

ROOT = Path(__file__).parents[2]

#: What the packages in buildInputs provide (gcc's library output, zlib, rdma-core, numactl), and glibc.
SYSTEM = frozenset(
    {
        *("libstdc++.so.6", "libgcc_s.so.1", "libgomp.so.1", "libgomp.so.1.0.0", "libatomic.so.1"),
        *("libz.so.1", "libibverbs.so.1", "libmlx5.so.1", "librdmacm.so.1", "libnuma.so.1"),
        *("libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1", "libutil.so.1"),
        *("ld-linux-aarch64.so.1", "ld-linux-x86-64.so.2"),
    }
)
#: As sparkPins.ignoreMissing of overlays/cuda.nix.
IGNORED = frozenset({"libcuda.so.1", "libtbb.so.12"})

Census = dict[str, dict[str, dict[str, object]]]


@pytest.fixture(scope="module", params=elf_census.SYSTEMS)
def census(request: pytest.FixtureRequest) -> Census:
    """The recorded census; it must be of the pins as they stand."""
    recorded = json.loads(elf_census.census_file(request.param).read_text())
    if recorded["pins"] != elf_census.pins_hash(request.param):
        pytest.fail(
            "the pins changed since the census of ELF files: run tests/nix/elf_census.py "
            "(it downloads some 4 GB) and commit tests/nix/elf_census",
            pytrace=False,
        )
    wheels: Census = recorded["wheels"]
    return wheels


def kept_files(census: Census) -> dict[str, list[str]]:
    """NEEDED of every ELF file that is left after pruning, by path."""
    pruned = json.loads((ROOT / "nix/pins/pruned.json").read_text())["files"]
    return {
        path: list(facts["needed"])  # type: ignore[call-overload]
        for wheel, files in census.items()
        for path, facts in files.items()
        if not any(_under(path, pattern) for pattern in pruned.get(wheel, []))
    }


def _under(path: str, pattern: str) -> bool:
    names = [path, *map(str, PurePath(path).parents)]
    return any(fnmatch.fnmatch(name, pattern) for name in names)


def missing(files: dict[str, list[str]]) -> dict[str, list[str]]:
    """NEEDED names that nothing provides, with who asks."""
    provided = {PurePath(path).name for path in files} | SYSTEM | IGNORED
    wanted: dict[str, list[str]] = {}
    for path, needed in files.items():
        for name in needed:
            if name not in provided:
                wanted.setdefault(name, []).append(path)
    return wanted


def test_everything_needed_is_provided(census: Census) -> None:
    """No library of the pruned closure needs one that is neither in it nor a build input nor the driver's."""
    files = kept_files(census)
    assert len(files) > 180
    assert missing(files) == {}


def test_pruning_loses_nothing_needed(census: Census) -> None:
    """The check would notice: without cuSPARSELt, torch's NEEDED is unmet."""
    files = {p: n for p, n in kept_files(census).items() if "cusparselt" not in p}
    assert "libcusparseLt.so.0" in missing(files)


def test_pruned_libraries_are_the_unusable_ones(census: Census) -> None:
    """What GB10 cannot run (FlashAttention 3, FlashMLA, SM100 kernels) is pruned; FlashAttention 2 stays."""
    vllm = {PurePath(path).name.split(".")[0] for path in kept_files({"vllm": census["vllm"]})}
    assert "_vllm_fa2_C" in vllm
    assert "_C_stable_libtorch" in vllm
    assert not vllm & {"_vllm_fa3_C", "_flashmla_C", "_deepselect_C", "_qutlass_C"}
