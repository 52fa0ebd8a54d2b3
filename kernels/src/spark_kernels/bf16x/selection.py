"""Which layers bf16x takes: a pure decision over a layer's name, shape and coded size."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Selection:
    """The options of policy.toml's bf16x row.

    ``layers`` are last parts of layer names, ``exclude`` are texts that no part of a name may hold;
    ``min_weights`` is a layer's smallest size and ``min_saving`` the smallest share of its bytes
    that coding must save.
    """

    layers: frozenset[str]
    exclude: tuple[str, ...]
    min_weights: int
    min_saving: float

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> "Selection":
        """Build from the table's row."""
        return cls(
            frozenset(options["layers"]),
            tuple(options["exclude"]),
            int(options["min_weights"]),
            float(options["min_saving"]),
        )

    def takes(self, name: str, shape: tuple[int, ...]) -> bool:
        """Say whether a loaded weight (n, k) is to be encoded."""
        n, k = shape
        named = name.rsplit(".", 1)[-1] in self.layers and not any(
            text in name for text in self.exclude
        )
        return named and n * k >= self.min_weights and k % 8 == 0

    def worth(self, coded_bytes: int, plain_bytes: int) -> bool:
        """Say whether the coded form is enough smaller to be kept."""
        return coded_bytes <= (1 - self.min_saving) * plain_bytes
