# What `nix flake check` runs: everything that builds in minutes. The engine's whole environment is not among
# it (`nix build .#vllm-gb10`): compiling FlashInfer's kernels takes hours.
{
  self,
  lib,
  pkgs,
  ...
}:
let
  inherit (pkgs.stdenv.hostPlatform) system;

  # A whole NixOS system with the service, as its owner would write it.
  machine = self.inputs.nixpkgs.lib.nixosSystem {
    modules = [
      self.nixosModules.default
      {
        nixpkgs.hostPlatform = system;
        boot.loader.grub.enable = false;
        fileSystems."/" = {
          device = "none";
          fsType = "tmpfs";
        };
        system.stateVersion = "26.11";
        services.spark-llm = {
          enable = true;
          settings.gateway.host = "0.0.0.0";
          openFirewall = true;
          clients = [ "192.168.1.0/24" ];
          credentials.api-keys = "/run/secrets/keys";
        };
      }
    ];
  };

  libTests = import ./lib/tests.nix { inherit lib; };

  # The service around an engine that only answers: the VM has no GPU, and the engine is tested elsewhere.
  stubbed = pkgs.spark-llm.override { vllm-gb10 = null; };
in
{
  inherit (pkgs) driver-link spark-kernels;
  spark-llm = stubbed;
  vllm-gb10-patched = pkgs.vllm-gb10.patched;

  lib =
    if libTests.failures == [ ] && libTests.untested == [ ] then
      pkgs.runCommand "lib-tests" { } ''echo "${toString libTests.count} passed" >"$out"''
    else
      throw "nix/lib: ${builtins.toJSON libTests}";

  module = pkgs.runCommand "module-evaluates" {
    unit = machine.config.systemd.services.spark-llm.serviceConfig.LoadCredential;
    ports = machine.config.networking.firewall.allowedTCPPorts;
    config = machine.config.environment.etc."spark-llm/config.toml".source;
  } ''printf '%s\n' "$unit" "$ports" "$config" >"$out"'';

  format = pkgs.runCommand "nixfmt-check" { nativeBuildInputs = [ pkgs.nixfmt ]; } ''
    find ${../.} -name '*.nix' -not -path '*/tests/nix/nixpkgs/*' -exec nixfmt --check {} +
    touch "$out"
  '';
}
# A VM boots NixOS with the service; only x86_64 builders commonly have the kvm feature.
// lib.optionalAttrs (system == "x86_64-linux") {
  vm = pkgs.testers.runNixOSTest {
    name = "spark-llm";
    nodes.machine = {
      imports = [ self.nixosModules.default ];
      services.spark-llm = {
        enable = true;
        package = stubbed;
      };
    };
    # The unit's READY means that the front door answers; the engine behind it is absent, and said to be.
    testScript = ''
      machine.wait_for_unit("spark-llm.service")
      machine.succeed("curl --fail http://127.0.0.1:8000/livez")
      machine.fail("curl --fail http://127.0.0.1:8000/readyz")
      machine.succeed("systemctl stop spark-llm.service")
    '';
  };
}
