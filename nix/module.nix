# NixOS module: services.spark-llm.
flake:
{
  config,
  lib,
  pkgs,
  ...
}:

let
  inherit (lib)
    literalExpression
    mkDefault
    mkEnableOption
    mkIf
    mkOption
    types
    ;

  cfg = config.services.spark-llm;
  toml = pkgs.formats.toml { };
  ours = flake.packages.${pkgs.stdenv.hostPlatform.system};
  host = cfg.settings.gateway.host or "127.0.0.1";
  port = cfg.settings.gateway.port or 8000;
  sparkLib = import ./lib { inherit lib; };
  units = pkgs.callPackage ./units.nix {
    inherit sparkLib;
    spark-llm = cfg.package;
    gatewayHost = host;
    gatewayPort = port;
    clients = lib.concatStringsSep " " cfg.clients;
  };
  clustered = cfg.cluster.peers != [ ];
  loaded = lib.mapAttrsToList (name: file: "${name}:${toString file}");
in
{
  options.services.spark-llm = {
    enable = mkEnableOption "spark-llm, which serves a language model on this machine";

    package = mkOption {
      type = types.package;
      default = ours.spark-llm;
      defaultText = literalExpression "spark-llm.packages.\${system}.spark-llm";
      description = "The spark-llm package; it brings its engine (`spark-llm.override { vllm-gb10 = …; }`).";
    };

    profile = mkOption {
      type = types.str;
      default = "";
      example = "qwen3-30b-a3b-nvfp4";
      description = "What to serve: a name that `spark-llm profiles` lists. Empty is a toy that needs no download, `demo-gpu`.";
    };

    settings = mkOption {
      type = types.submodule { freeformType = toml.type; };
      default = { };
      example = {
        gateway.port = 8080;
        log.level = "debug";
      };
      description = "Content of /etc/spark-llm/config.toml. An unknown key stops the service with its name. No secrets here: the store is readable by everybody.";
    };

    openFirewall = mkOption {
      type = types.bool;
      default = false;
      description = "Open the gateway's port. It takes a `settings.gateway.host` that is not loopback, and API keys.";
    };

    clients = mkOption {
      type = types.listOf types.str;
      default = [ "localhost" ];
      example = [
        "localhost"
        "192.168.1.0/24"
      ];
      description = "Who may connect to the gateway, as systemd's IPAddressAllow= takes it.";
    };

    environmentFile = mkOption {
      type = types.nullOr types.path;
      default = null;
      example = "/run/secrets/spark-llm.env";
      description = "File of VARIABLE=value lines for the service, for settings that must not be in the store.";
    };

    credentials = mkOption {
      type = types.attrsOf types.path;
      default = { };
      example = {
        api-keys = "/run/secrets/spark-llm-keys";
        hub-token = "/run/secrets/hub-token";
      };
      description = "systemd credentials (LoadCredential) by name: api-keys, tls-certificate and tls-key for the service, hub-token for the fetch units alone. Root reads the files; they are no part of the store.";
    };

    cluster = {
      peers = mkOption {
        type = types.listOf types.str;
        default = [ ];
        example = [ "192.168.100.11" ];
        description = "Addresses of the other Sparks of a cluster. Checked, but not used yet: this version serves from one machine.";
      };
      rank = mkOption {
        type = types.ints.unsigned;
        default = 0;
        description = "This machine's place in the cluster; 0 leads and answers clients.";
      };
    };
  };

  config = mkIf cfg.enable {
    assertions = [
      {
        assertion = lib.elem pkgs.stdenv.hostPlatform.system [
          "aarch64-linux"
          "x86_64-linux"
        ];
        message = "services.spark-llm: there are no wheels for ${pkgs.stdenv.hostPlatform.system}; a DGX Spark is aarch64-linux.";
      }
      {
        assertion = cfg.openFirewall -> !(sparkLib.address.isLoopback host);
        message = "services.spark-llm.openFirewall opens a port on which nothing listens: set services.spark-llm.settings.gateway.host as well (and make API keys with `spark-llm keys`).";
      }
      {
        assertion = cfg.openFirewall -> cfg.clients != [ "localhost" ];
        message = "services.spark-llm.openFirewall lets packets in that the socket then refuses: name the clients in services.spark-llm.clients.";
      }
      {
        assertion = clustered -> cfg.cluster.rank <= lib.length cfg.cluster.peers;
        message = "services.spark-llm.cluster.rank is ${toString cfg.cluster.rank}, but with ${toString (lib.length cfg.cluster.peers)} peers the ranks are 0 to ${toString (lib.length cfg.cluster.peers)}.";
      }
      {
        assertion = !(cfg.settings ? profile) || cfg.settings.profile == cfg.profile;
        message = "services.spark-llm: profile and settings.profile differ; say it once, in services.spark-llm.profile.";
      }
    ];

    services.spark-llm.settings.profile = mkDefault cfg.profile;

    environment.etc."spark-llm/config.toml".source = toml.generate "config.toml" cfg.settings;
    # The installed service's store and caches are meant, whoever calls.
    environment.systemPackages = [
      (pkgs.writeShellApplication {
        name = "spark-llm";
        text = ''
          export STATE_DIRECTORY="''${STATE_DIRECTORY:-/var/lib/spark-llm}"
          export CACHE_DIRECTORY="''${CACHE_DIRECTORY:-/var/cache/spark-llm}"
          exec ${lib.getExe cfg.package} "$@"
        '';
      })
    ];

    # As appliance/units/sysusers.conf: the fetcher alone has the hub token. A group that the system does not declare gets
    # no members and is no error (nixpkgs' users-groups.nix: members are each declared group's own); NixOS declares no rdma.
    users.users.spark-llm = {
      isSystemUser = true;
      group = "spark-llm";
      home = "/var/lib/spark-llm";
      extraGroups = [
        "video"
        "render"
        "rdma"
      ];
    };
    users.users.spark-llm-fetch = {
      isSystemUser = true;
      group = "spark-llm";
      home = "/var/lib/spark-llm";
    };
    users.groups.spark-llm = { };

    # The driver's libraries at /run/opengl-driver/lib.
    hardware.graphics.enable = mkDefault true;

    # The one source of the units; what NixOS knows better comes as drop-ins. NixOS does not read [Install].
    systemd.packages = [ units ];
    systemd.tmpfiles.packages = [ units ];
    systemd.targets.spark-llm.wantedBy = [ "multi-user.target" ];
    systemd.sockets.spark-llm.wantedBy = [ "sockets.target" ];
    systemd.services.spark-llm-guard.wantedBy = [ "spark-llm.target" ];
    systemd.services.spark-llm = {
      wantedBy = [ "spark-llm.target" ];
      restartTriggers = [ config.environment.etc."spark-llm/config.toml".source ];
      serviceConfig = {
        LoadCredential = loaded (removeAttrs cfg.credentials [ "hub-token" ]);
      }
      // lib.optionalAttrs (cfg.environmentFile != null) { EnvironmentFile = [ cfg.environmentFile ]; };
    };
    systemd.services."spark-llm-fetch@".serviceConfig.LoadCredential = loaded (
      lib.filterAttrs (name: _: name == "hub-token") cfg.credentials
    );

    networking.firewall.allowedTCPPorts = lib.optional cfg.openFirewall port;
  };
}
