# What the configured gateway.host becomes in units; as `listen_on` of the service's install.py, which does it on DGX OS.
{ lib }:
let
  inherit (lib) elem hasInfix hasPrefix;

  isLoopback =
    host:
    elem host [
      "localhost"
      "::1"
    ]
    || hasPrefix "127." host;
in
{
  inherit isLoopback;

  # ListenStream= takes no names, and an IPv6 address in brackets (systemd.socket(5)).
  listen =
    host: port:
    let
      address =
        if host == "localhost" then
          "127.0.0.1"
        else if hasInfix ":" host then
          "[${host}]"
        else
          host;
    in
    "${address}:${toString port}";

  # Where this machine asks the gateway, as IPAddressAllow= takes it: what listens everywhere is asked on loopback.
  gateway =
    host:
    if
      isLoopback host
      || elem host [
        "0.0.0.0"
        "::"
      ]
    then
      "localhost"
    else
      host;
}
