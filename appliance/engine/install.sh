#!/bin/sh
# install.sh PYTHON VENV: the embedded engine (vLLM's CPU build) in an environment of its own.
#
# Idempotent: does nothing when VENV was made from the same locks by the same Python.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
python=$1
venv=$2
machine=$(uname -m)
lock="$here/$machine.txt"
[ -f "$lock" ] || { echo "engine: no lock for $machine; there is one for x86_64 and one for aarch64" >&2; exit 1; }

stamp=$(cat "$lock" "$here/torch.txt" "$here/install.sh" "$here"/shim/* "$here"/plugin/*.* | sha256sum | cut -d' ' -f1)-$("$python" -V)
if [ -f "$venv/.spark-llm-stamp" ] && [ "$(cat "$venv/.spark-llm-stamp")" = "$stamp" ]; then
  exit 0
fi
echo "engine: installing vLLM's CPU build into $venv (about 500 MB to download, once)"
rm -rf "$venv"
"$python" -m venv "$venv"
pip="$venv/bin/python -m pip --disable-pip-version-check"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

torch=$(grep '^torch==' "$here/torch.txt")
if $pip download -q --no-deps --only-binary=:all: -d "$work" "$torch" >/dev/null 2>&1; then
  echo "engine: $torch from pip's configured sources"
else
  echo "engine: $torch is not on pip's configured sources; taking it from PyTorch's CPU index"
  $pip download -q --no-deps --only-binary=:all: -d "$work" --index-url https://download.pytorch.org/whl/cpu "$torch"
fi
wheel=$(ls "$work"/torch-*.whl)
known=$(grep -F "$(basename "$wheel") sha256:" "$here/torch.txt" | sed 's/.*sha256://' || true)
if [ -n "$known" ]; then
  echo "$known  $wheel" | sha256sum -c --quiet -
  echo "engine: torch's hash is the recorded one"
else
  echo "engine: no recorded hash for $(basename "$wheel"); it came over TLS and is not checked further"
fi

$pip install -q --no-deps --require-hashes --only-binary=:all: -r "$lock"
$pip install -q --no-deps --no-index "$wheel"
cp -r "$here/shim" "$here/plugin" "$work/"
$pip install -q --no-deps --no-index --no-build-isolation "$work/shim" "$work/plugin"
"$venv/bin/python" -c 'import importlib.metadata as m, vllm; print("engine: vLLM", m.version("vllm"), "is installed")'
printf %s "$stamp" >"$venv/.spark-llm-stamp"
