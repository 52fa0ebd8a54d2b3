{ lib }:
let
  inherit (import ./version.nix { inherit lib; }) ofPackage;
in
{
  ofPackage = {
    testReads = {
      expr = ofPackage ./testdata/package.py;
      expected = "1.2.3";
    };
    testAbsentIsRefused = {
      expr = (builtins.tryEval (ofPackage ./version.nix)).success;
      expected = false;
    };
  };
}
