"""FlashInfer's compiled modules for GB10, as the provider package that FlashInfer looks for.

FlashInfer 0.7 imports `flashinfer_jit_cache`, compares `__version__` with its own, and asks
`get_jit_cache_providers` for packages that own compiled modules.
"""

import json
from dataclasses import dataclass
from pathlib import Path

_HERE = Path(__file__).parent
_MANIFEST = json.loads((_HERE / "manifest.json").read_text())

__version__: str = _MANIFEST["version"]


@dataclass(frozen=True)
class Provider:
    """The fields that FlashInfer reads."""

    provider_id: str
    distribution: str
    version: str
    jit_cache_dir: str
    cuda_architectures: tuple[str, ...]
    modules: tuple[str, ...]


def get_jit_cache_providers() -> tuple[Provider, ...]:
    """Return this one provider."""
    return (
        Provider(
            provider_id="spark-llm",
            distribution="flashinfer-aot",
            version=__version__,
            jit_cache_dir=str(_HERE / "jit_cache"),
            cuda_architectures=(_MANIFEST["architecture"],),
            modules=tuple(_MANIFEST["modules"]),
        ),
    )
