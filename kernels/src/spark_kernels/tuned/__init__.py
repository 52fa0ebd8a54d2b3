"""Tuned Triton tables for GB10, and the folder variable by which vLLM finds them.

vLLM looks for a table first in ``VLLM_TUNED_CONFIG_FOLDER`` and then among its own; the variable holds
one folder. Sources of the tables: README.md.
"""

import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any, Final

VARIABLE: Final = "VLLM_TUNED_CONFIG_FOLDER"


def tuned_folder() -> Path:
    """Return the folder with this package's tables."""
    return Path(__file__).parent / "gb10"


def register(options: Mapping[str, Any], environ: MutableMapping[str, str] = os.environ) -> None:
    """Point vLLM at this package's tables, unless the operator named a folder of their own."""
    del options
    environ.setdefault(VARIABLE, str(tuned_folder()))
