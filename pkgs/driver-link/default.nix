# Makes /run/opengl-driver/lib on hosts that are not NixOS (DGX OS), from the host's own driver.
{
  lib,
  writeShellApplication,
  coreutils,
  gnugrep,
}:

writeShellApplication {
  name = "driver-link";
  runtimeInputs = [
    coreutils
    gnugrep
  ];
  text = builtins.readFile ./driver-link.sh;
  meta = {
    description = "Link farm of the host's NVIDIA user-space libraries at /run/opengl-driver";
    license = lib.licenses.asl20;
    platforms = lib.platforms.linux;
    mainProgram = "driver-link";
  };
}
