"""Calling a C launcher from torch: pointers, the current stream, and its error code."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class LaunchError(RuntimeError):
    """A launcher returned a CUDA error code."""


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    """Return the tensor's device address; NULL for None."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def stream(tensor: torch.Tensor) -> ctypes.c_void_p:
    """Return the current stream of the tensor's device, as torch sees it (graph capture too)."""
    import torch  # noqa: PLC0415 - this package imports without torch

    return ctypes.c_void_p(torch.cuda.current_stream(tensor.device).cuda_stream)


def check(code: int, what: str) -> None:
    """Raise LaunchError if a launcher's return value is not cudaSuccess (0)."""
    if code != 0:
        raise LaunchError(f"{what} failed with CUDA error {code}")
