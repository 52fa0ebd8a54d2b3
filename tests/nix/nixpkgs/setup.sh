# Stand-in for stdenv's setup.sh: the phases and functions that the flake's packages use.
set -eu -o pipefail
shopt -s extglob
export HOME=/homeless-shelter SOURCE_DATE_EPOCH=315532800 LC_ALL=C.UTF-8
export NIX_BUILD_CORES=$(nproc) TMPDIR=$NIX_BUILD_TOP
[ "$NIX_BUILD_CORES" -gt 0 ]

preFixupHooks=() postFixupHooks=()

runHook() {
  local name=$1 array=$1Hooks[@] entry
  [ -z "${!name-}" ] || eval "${!name}"
  if declare -p "$1Hooks" >/dev/null 2>&1; then
    for entry in "${!array}"; do "$entry"; done
  fi
}

substituteInPlace() {
  local file=$1
  shift
  while [ $# -gt 0 ]; do
    [ "$1" = --replace-fail ] || { echo "stand-in substituteInPlace: unknown flag $1" >&2; return 1; }
    python3 - "$file" "$2" "$3" <<'PY' || return 1
import sys
path, old, new = sys.argv[1:]
text = open(path, encoding="utf-8", errors="surrogateescape").read()
if old not in text:
    sys.exit(f"substituteInPlace: {path}: pattern {old!r} doesn't match anything")
open(path, "w", encoding="utf-8", errors="surrogateescape").write(text.replace(old, new))
PY
    shift 3
  done
}

for input in $nativeBuildInputs; do
  [ ! -d "$input/bin" ] || PATH=$input/bin:$PATH
  [ ! -e "$input/nix-support/setup-hook" ] || . "$input/nix-support/setup-hook"
done
export PATH

phase() {
  local name=$1
  if [ -n "${!name-}" ]; then eval "${!name}"; else "default_$name"; fi
}

default_unpackPhase() {
  runHook preUnpack
  if [ -d "$src" ]; then
    cp -r --no-preserve=ownership,mode "$src" source
    cd source
  else
    tar -xf "$src"
    cd -- */
  fi
  runHook postUnpack
}
default_patchPhase() {
  runHook prePatch
  for patch in ${patches-}; do patch ${patchFlags--p1} <"$patch"; done
  runHook postPatch
}
default_buildPhase() { :; }
default_installPhase() { :; }

cd "$NIX_BUILD_TOP"
[ -n "${dontUnpack-}" ] || phase unpackPhase
[ -n "${dontUnpack-}" ] || phase patchPhase
[ -n "${dontBuild-}" ] || phase buildPhase
[ -n "${dontInstall-}" ] || { phase installPhase; }
if [ -z "${dontFixup-}" ]; then
  runHook preFixup
  # The attribute comes first and the hooks (autoPatchelf) last, as with nixpkgs.
  runHook postFixup
fi
if [ -n "${doInstallCheck-}" ]; then phase installCheckPhase; fi
