# Test double of nixosSystem: our module with the rest of NixOS as undeclared sets; assertions as NixOS
# raises them.
{ lib }:
{ modules }:
let
  system = (lib.attrByPath [ "nixpkgs" "hostPlatform" ] null) (lib.fix (_: builtins.elemAt modules 1));
  evaluated = lib.evalModules {
    inherit modules;
    free = [
      "assertions"
      "boot"
      "environment"
      "fileSystems"
      "hardware"
      "networking"
      "nixpkgs"
      "systemd"
      "system"
      "users"
    ];
    specialArgs.pkgs = import ./. { inherit system; };
  };
  failed = builtins.filter (a: !a.assertion) evaluated.config.assertions;
in
evaluated
// {
  config =
    if failed == [ ] then
      evaluated.config
    else
      throw "Failed assertions:\n${lib.concatMapStringsSep "\n" (a: "- ${a.message}") failed}";
}
