# Pure functions over nixpkgs' lib; nothing here builds. Each file has its test beside it.
{ lib }:
let
  call = file: import file { inherit lib; };
in
{
  address = call ./address.nix;
  arch = call ./arch.nix;
  patches = call ./patches.nix;
  unit = call ./unit.nix;
  version = call ./version.nix;
  wheel = call ./wheel.nix;
}
