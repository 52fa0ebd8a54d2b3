# `nix run .#NAME`. Programs that change the host say what they do, and do nothing twice.
{ lib, pkgs, ... }:
let
  program = name: description: args: {
    type = "app";
    program = lib.getExe (pkgs.writeShellApplication ({ inherit name; } // args));
    meta = { inherit description; };
  };

  # `sudo nix run` would have root evaluate a repository that is another user's, which git refuses.
  asRoot = ''if [ "$(id -u)" != 0 ]; then exec sudo "$0" "$@"; fi'';
in
{
  default = {
    type = "app";
    program = lib.getExe pkgs.spark-llm;
    meta.description = "The spark-llm command";
  };

  serve = program "spark-llm-serve" "Serve a model in the foreground" {
    runtimeInputs = [ pkgs.spark-llm ];
    text = ''
      if [ ! -e ${pkgs.sparkPins.driverLib}/libcuda.so.1 ] && [ -e /proc/driver/nvidia/version ]; then
        echo "The NVIDIA driver is loaded, but Nix programs cannot see its libraries yet. Once per boot:" >&2
        echo "  sudo ${lib.getExe pkgs.driver-link}" >&2
        echo "Or once and for all, with the service: nix run .#install" >&2
        exit 1
      fi
      exec spark-llm serve "$@"
    '';
  };

  # All three are subcommands, so that they can be tested and dry-run without Nix.
  install = program "spark-llm-install" "Install the systemd service on DGX OS (asks for sudo)" {
    text = ''
      ${asRoot}
      exec ${lib.getExe pkgs.spark-llm} install --package ${pkgs.spark-llm} "$@"
    '';
  };

  upgrade = program "spark-llm-upgrade" "Switch the service to this version, or back if it fails" {
    text = ''
      ${asRoot}
      exec ${lib.getExe pkgs.spark-llm} upgrade ${pkgs.spark-llm} "$@"
    '';
  };

  uninstall = program "spark-llm-uninstall" "Remove the service; models and configuration stay" {
    text = ''
      ${asRoot}
      exec ${lib.getExe pkgs.spark-llm} uninstall "$@"
    '';
  };

  load-oci = program "spark-llm-load-oci" "Load the image into Docker or Podman" {
    text = ''
      image=${pkgs.callPackage ./oci.nix { }}
      if command -v podman >/dev/null; then
        "$image" | podman load
      elif command -v docker >/dev/null; then
        "$image" | docker load
      else
        echo "neither podman nor docker is on PATH; the image streams from $image" >&2
        exit 1
      fi
    '';
  };

  update-pins = program "update-pins" "Resolve the pinned wheels again and print the difference" {
    runtimeInputs = [
      pkgs.uv
      (pkgs.python312.withPackages (python: [ python.packaging ]))
    ];
    text = ''exec python3 ${./update-pins/update_pins.py} "$@"'';
  };
}
