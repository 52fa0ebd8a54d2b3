# All tests of this folder: { failures = [ … ]; untested = [ … ]; count = N; }, empty lists when good.
# `untested` holds every exported function that no test file names.
{ lib }:
let
  exported = import ./default.nix { inherit lib; };
  suites = lib.mapAttrs (name: _: import (./. + "/test_${name}.nix") { inherit lib; }) exported;
  flat = lib.concatMapAttrs (
    file: functions:
    lib.concatMapAttrs (
      function: lib.mapAttrs' (test: lib.nameValuePair "${test} (${file}.${function})")
    ) functions
  ) suites;
in
{
  failures = lib.runTests flat;
  count = lib.length (lib.attrNames flat);
  untested = lib.concatMap (
    file:
    map (function: "${file}.${function}") (
      lib.filter (function: !(suites.${file} ? ${function})) (lib.attrNames exported.${file})
    )
  ) (lib.attrNames exported);
}
