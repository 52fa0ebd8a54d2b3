# `nix develop`: what the Makefile and the tests expect on PATH.
{ pkgs, ... }:
{
  default = pkgs.mkShellNoCC {
    packages = [
      pkgs.cmake
      pkgs.git
      pkgs.gnumake
      pkgs.nixfmt
      pkgs.python312
      pkgs.shellcheck
      pkgs.uv
    ];
  };
}
