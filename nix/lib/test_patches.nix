{ lib }:
let
  inherit (import ./patches.nix { inherit lib; }) series;
  fails = value: !(builtins.tryEval value).success;
  folder =
    files:
    builtins.path {
      path = ./testdata/patches + "/${files}";
      name = files;
    };
  names = files: map baseNameOf (series (folder files));
in
{
  series = {
    testOrderIsTheNumbers = {
      expr = names "good";
      expected = [
        "0001-first.patch"
        "0002-second.patch"
        "0010-tenth.patch"
      ];
    };
    testDuplicateNumberIsRefused = {
      expr = fails (names "duplicate");
      expected = true;
    };
    testUnnumberedIsRefused = {
      expr = fails (names "unnumbered");
      expected = true;
    };
  };
}
