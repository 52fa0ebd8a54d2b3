# From a pins file (name -> version, file, sha256) to what fetchPypi wants.
{ lib }:
let
  inherit (lib)
    concatStringsSep
    elemAt
    filterAttrs
    length
    removeSuffix
    splitString
    ;

  systems = [
    "aarch64-linux"
    "x86_64-linux"
  ];

  # "cbor2-6.2.1-cp312-cp312-manylinux_2_28_aarch64.whl" => its five parts (PEP 427)
  parseFile =
    file:
    let
      parts = splitString "-" (removeSuffix ".whl" file);
    in
    if length parts != 5 || !lib.hasSuffix ".whl" file then
      throw ''"${file}" is not a wheel's file name (NAME-VERSION-PYTHON-ABI-PLATFORM.whl); run `nix run .#update-pins`.''
    else
      {
        pname = elemAt parts 0;
        version = elemAt parts 1;
        python = elemAt parts 2;
        abi = elemAt parts 3;
        platform = elemAt parts 4;
      };
in
{
  inherit parseFile;

  # Arguments for fetchPypi. `dist` is the folder of the registry's stable layout, which is the wheel's
  # python tag.
  fetchArgs =
    pin:
    let
      parts = parseFile pin.file;
    in
    parts
    // {
      format = "wheel";
      dist = parts.python;
      inherit (pin) sha256;
    };

  # The pins of one system, or a sentence.
  forSystem =
    folder: system:
    if lib.elem system systems then
      lib.importJSON (folder + "/${system}.json")
    else
      throw ''
        spark-llm has no wheels for ${system}: its systems are ${concatStringsSep " and " systems}.
        Build on a DGX Spark (aarch64-linux) or on an x86_64-linux machine.'';

  # The pin of one distribution, or a sentence.
  pick =
    system: pins: name:
    pins.${name}
      or (throw "no wheel of ${name} is pinned for ${system}: run `nix run .#update-pins` and commit nix/pins.");

  # The closure without the distributions in `pruned` (name -> reason).
  keep = pruned: pins: filterAttrs (name: _: !(pruned ? ${name})) pins;
}
