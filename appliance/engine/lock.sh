#!/bin/sh
# Writes the embedded engine's locks: appliance/engine/x86_64.txt and aarch64.txt (`make lock` calls this).
#
# torch, torchaudio, torchvision and torchcodec are overridden away: torch is a `+cpu` build that the package index does
# not carry (torch.txt pins it, install.sh fetches it), and the other three exist there only as CUDA builds, whose import
# fails beside a CPU torch. torch's own needs are therefore named here by hand. triton (asked for by xgrammar) compiles
# for GPUs only: 200 MB that a CPU engine never imports.
set -eu
cd "$(dirname "$0")"
uv=${UV:-uv}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for machine in x86_64 aarch64; do
  cat >"$work/pyproject.toml" <<TOML
[project]
name = "engine"
version = "0"
requires-python = ">=3.11,<3.14"
dependencies = [
  "$(grep -v '^#' requirements.in)",
  "filelock", "fsspec>=0.8.5", "jinja2", "networkx>=2.5.1", "sympy>=1.13.3", "typing-extensions>=4.10",
]
[tool.uv]
environments = ["sys_platform == 'linux' and platform_machine == '$machine' and platform_python_implementation == 'CPython'"]
override-dependencies = [
  "torch ; python_version < '3'", "torchaudio ; python_version < '3'",
  "torchvision ; python_version < '3'", "torchcodec ; python_version < '3'", "triton ; python_version < '3'",
]
TOML
  (cd "$work" && "$uv" pip compile -q --universal --generate-hashes --no-header --no-annotate --no-build \
    pyproject.toml -o lock.txt >/dev/null)
  { echo "# Written by lock.sh; do not edit. Install with --no-deps --require-hashes."; sed "s/ ; platform_machine == '$machine' and platform_python_implementation == 'CPython' and sys_platform == 'linux'//; s/ and platform_machine == '$machine' and platform_python_implementation == 'CPython' and sys_platform == 'linux'//" "$work/lock.txt"; } >"$machine.txt"
done
