{
  description = "spark-llm: an NVIDIA DGX Spark as an LLM appliance";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-unstable";

  outputs =
    { self, nixpkgs }:
    let
      inherit (nixpkgs) lib;

      # aarch64-linux is the Spark; x86_64-linux is for development and CI.
      eachSystem = lib.genAttrs [
        "aarch64-linux"
        "x86_64-linux"
      ];

      # NVIDIA's licences, and no other unfree software: nobody sets anything globally.
      pkgsFor = eachSystem (
        system:
        import nixpkgs {
          inherit system;
          config.allowUnfreePredicate = nixpkgs.legacyPackages.${system}._cuda.lib.allowUnfreeCudaPredicate;
          overlays = [ self.overlays.default ];
        }
      );

      call =
        file: system:
        import file {
          inherit self lib;
          pkgs = pkgsFor.${system};
        };
    in
    {
      overlays.default = import ./overlays;
      # nixpkgs with the overlay: every pinned wheel, and whatever is not worth a name in `packages`.
      legacyPackages = pkgsFor;
      packages = eachSystem (call ./nix/packages.nix);
      apps = eachSystem (call ./nix/apps.nix);
      checks = eachSystem (call ./nix/checks.nix);
      devShells = eachSystem (call ./nix/shell.nix);
      formatter = eachSystem (system: pkgsFor.${system}.nixfmt);
      nixosModules.default = import ./nix/module.nix self;
    };
}
