{
  description = "Test double of nixpkgs: just the functions that spark-llm's flake uses (see default.nix)";

  outputs =
    { self }:
    let
      lib = import ./lib.nix;
      systems = [
        "aarch64-linux"
        "x86_64-linux"
      ];
    in
    {
      lib = lib // {
        nixosSystem = import ./nixos.nix { inherit lib; };
      };
      legacyPackages = lib.genAttrs systems (system: import ./. { inherit system; });
    };
}
