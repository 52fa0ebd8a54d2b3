# The systemd units of appliance/units with store paths in them. The same templates get other paths from
# `spark-llm install` on DGX OS.
{
  lib,
  runCommand,
  writeText,
  spark-llm,
  sparkLib,
  # gateway.host and gateway.port of the configuration, and who may connect, as systemd's IPAddressAllow= takes it.
  gatewayHost ? "127.0.0.1",
  gatewayPort ? 8000,
  clients ? "localhost",
}:

let
  values = {
    inherit clients;
    bin = "${spark-llm}/bin";
    gateway = sparkLib.address.gateway gatewayHost;
    listen = sparkLib.address.listen gatewayHost gatewayPort;
  };
  isUnit =
    name:
    lib.any (kind: lib.hasSuffix ".${kind}" name) [
      "service"
      "socket"
      "target"
    ];
  units = lib.filter isUnit (lib.attrNames (builtins.readDir spark-llm.units));
  # A store path's name takes no @.
  fill =
    name:
    writeText (lib.replaceStrings [ "@" ] [ "-" ] name) (
      sparkLib.unit.fill values (builtins.readFile (spark-llm.units + "/${name}"))
    );
in
runCommand "spark-llm-units" { } ''
  mkdir -p "$out/lib/systemd/system" "$out/lib/tmpfiles.d"
  ${lib.concatMapStrings (name: ''
    cp ${fill name} "$out/lib/systemd/system/${name}"
  '') units}
  cp ${spark-llm.units}/tmpfiles.conf "$out/lib/tmpfiles.d/spark-llm.conf"
''
