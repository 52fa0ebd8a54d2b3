# Pins, wheels, and the CUDA toolkit merged from them.
final: prev:
let
  inherit (final) lib;
  inherit (final.stdenv.hostPlatform) system;
in
{
  sparkLib = import ../nix/lib { inherit lib; };

  # Everything pinned, for this system.
  sparkPins = lib.fix (self: {
    inherit system;
    vllm = lib.importJSON ../nix/pins/vllm.json;
    pruned = lib.importJSON ../nix/pins/pruned.json;
    externals = lib.importJSON ../nix/pins/externals.json;
    wheels = final.sparkLib.wheel.forSystem ../nix/pins/wheels system;
    appliance = final.sparkLib.wheel.forSystem ../nix/pins/appliance system;
    # Named ones are there even if the file lacks them: asking for their wheel then says what to do.
    kept =
      lib.genAttrs (self.vllm.required ++ self.vllm.cuda.toolkit) (
        final.sparkLib.wheel.pick system self.wheels
      )
      // final.sparkLib.wheel.keep self.pruned.wheels self.wheels;
    sitePackages = "lib/python${self.vllm.python}/site-packages";
    # Where NixOS has the driver's libraries, and driver-link puts them elsewhere.
    driverLib = "/run/opengl-driver/lib";
    # NEEDED by pinned libraries and provided by no package: the driver's own, and what Numba's threading
    # layer for TBB wants on x86_64, which Numba tries and does without.
    ignoreMissing = [
      "libcuda.so.1"
      "libtbb.so.12"
    ];
  });

  mkPinnedWheel = final.callPackage ../pkgs/wheel { };

  # Every pinned distribution by name, pruned ones too: python-env merges the kept ones.
  pinnedWheels = lib.mapAttrs (name: _: final.mkPinnedWheel { inherit name; }) (
    final.sparkPins.wheels // final.sparkPins.kept
  );

  cuda-toolkit = final.callPackage ../pkgs/cuda-toolkit { };

  # What compiling needs: a tenth of the toolkit's size.
  cuda-compiler = final.cuda-toolkit.override { members = final.sparkPins.vllm.cuda.compiler; };
}
