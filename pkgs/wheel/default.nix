# mkPinnedWheel { name = "torch"; … }: one wheel of nix/pins, unpacked into a site-packages tree.
#
# Nothing is patched for Nix here: the wheels find each other's libraries by relative path, so that happens
# once, in the merged trees (cuda-toolkit, python-env). What a package file says beside `name` reaches
# mkDerivation.
{
  lib,
  stdenvNoCC,
  fetchPypi,
  unzip,
  sparkLib,
  sparkPins,
}:

{
  name,
  # Globs below site-packages that nobody needs; each must match something, so that a pruning rule does
  # not outlive what it prunes.
  prune ? sparkPins.pruned.files.${name} or [ ],
  meta ? { },
  ...
}@args:

let
  pin = sparkLib.wheel.pick sparkPins.system sparkPins.wheels name;
  isNvidia = lib.hasPrefix "nvidia-" name || lib.hasPrefix "cuda-" name;
in
stdenvNoCC.mkDerivation (
  {
    pname = name;
    inherit (pin) version;

    src = fetchPypi (sparkLib.wheel.fetchArgs pin);

    strictDeps = true;
    nativeBuildInputs = [ unzip ];

    # unzip and not Python's zipfile: mode bits matter (nvcc, ptxas, vllm-rs).
    unpackPhase = ''
      runHook preUnpack
      mkdir source
      unzip -q "$src" -d source
      cd source
      runHook postUnpack
    '';

    dontConfigure = true;
    dontBuild = true;

    inherit prune;

    installPhase = ''
      runHook preInstall
      # Scripts and man pages of the wheel: no program of theirs is used.
      rm -rf -- *.data
      read -ra patterns <<<"$prune"
      shopt -s globstar nullglob
      for pattern in "''${patterns[@]}"; do
        matches=($pattern)
        if [ ! -e "''${matches[0]-}" ]; then
          echo "${name} ${pin.version}: nothing matches \"$pattern\", which nix/pins/pruned.json prunes. Drop that line, or say the file's new name." >&2
          exit 1
        fi
        rm -rf -- "''${matches[@]}"
      done
      shopt -u globstar nullglob
      mkdir -p "$out/${sparkPins.sitePackages}"
      cp -r --no-preserve=ownership . "$out/${sparkPins.sitePackages}/"
      runHook postInstall
    '';

    # The merged tree is fixed up, once; stripping would break wheels that carry fat binaries.
    dontFixup = true;

    meta = {
      description = "Python distribution ${name}, as its official wheel";
      sourceProvenance = [ lib.sourceTypes.binaryNativeCode ];
      platforms = [ sparkPins.system ];
    }
    // lib.optionalAttrs isNvidia { license = lib.licenses.nvidiaCudaRedist; }
    // meta;
  }
  // removeAttrs args [
    "name"
    "prune"
    "meta"
  ]
)
