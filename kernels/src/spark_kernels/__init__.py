"""Decode kernels for NVIDIA GB10 (SM 12.1), loaded by vLLM as a plugin.

One folder an operation: ``api`` (the public functions), ``reference`` (what the result must be, in
NumPy), ``kernel.cu`` (the kernel and its C launchers), ``tuning_sm121`` (launch parameters).
Importing this package imports neither torch nor CUDA.
"""

__version__ = "0.1.0"
