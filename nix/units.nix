# The systemd units of appliance/units, their placeholders filled with store paths. The same templates are
# filled with other paths by `spark-llm install` on DGX OS.
{
  lib,
  runCommand,
  writeText,
  driver-link,
  spark-llm,
  sparkLib,
  user ? "spark-llm",
  group ? "spark-llm",
  configFile ? "/etc/spark-llm/config.toml",
}:

let
  templates = lib.filterAttrs (name: _: lib.hasSuffix ".in" name) (builtins.readDir spark-llm.units);
  values = {
    inherit user group;
    bin = lib.getExe spark-llm;
    bindir = "${spark-llm}/bin";
    config = configFile;
    driver_link = lib.getExe driver-link;
    package = "${spark-llm}";
  };
  fill =
    name: writeText (lib.removeSuffix ".in" name) (sparkLib.unit.fill values (builtins.readFile (spark-llm.units + "/${name}")));
in
runCommand "spark-llm-units" { } ''
  mkdir -p "$out/lib/systemd/system"
  ${lib.concatMapStringsSep "\n" (
    name: ''cp ${fill name} "$out/lib/systemd/system/${lib.removeSuffix ".in" name}"''
  ) (lib.attrNames templates)}
''
