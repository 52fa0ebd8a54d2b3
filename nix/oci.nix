# The container image, as a program that streams it: `nix run .#load-oci`, or `./result | podman load`.
#
# streamLayeredImage and not buildLayeredImage: the closure is some 7 GB and would be in the store twice.
# The image holds NVIDIA's libraries, so passing it on is subject to NVIDIA's EULA.
{
  lib,
  bash,
  cacert,
  coreutils,
  dockerTools,
  spark-llm,
  sparkPins,
}:

dockerTools.streamLayeredImage {
  name = "spark-llm";
  tag = spark-llm.version;
  maxLayers = 100;

  contents = [
    # FlashInfer's ninja rules run through /bin/sh.
    bash
    coreutils
    dockerTools.fakeNss
    dockerTools.caCertificates
  ];

  # Not root inside either. 2000:0 is what vLLM's own image uses, so its volumes keep working. It owns nothing: `uid` and
  # `gid` here would give it the store layers as well (nixpkgs' stream_layered_image.py), its own code among them. These
  # folders are root's, and it may write them as group 0.
  extraCommands = ''
    mkdir -p tmp var/lib/spark-llm var/cache/spark-llm
    chmod 1777 tmp
    chmod 0775 var/lib/spark-llm var/cache/spark-llm
  '';

  config = {
    Entrypoint = [ (lib.getExe spark-llm) ];
    Cmd = [ "serve" ];
    User = "2000:0";
    WorkingDir = "/var/lib/spark-llm";
    ExposedPorts."8000/tcp" = { };
    Volumes = {
      "/var/lib/spark-llm" = { };
      "/var/cache/spark-llm" = { };
    };
    StopSignal = "SIGTERM";
    Env = [
      "HOME=/var/lib/spark-llm"
      "STATE_DIRECTORY=/var/lib/spark-llm"
      "CACHE_DIRECTORY=/var/cache/spark-llm"
      # In the volume, so that two containers on one volume see each other's lock.
      "RUNTIME_DIRECTORY=/var/lib/spark-llm/run"
      # Its own loopback is no use to a container: who reaches it is decided by what the port is published on.
      # Without API keys it refuses to start there.
      "SPARK_LLM_GATEWAY__HOST=0.0.0.0"
      "NVIDIA_VISIBLE_DEVICES=all"
      "NVIDIA_DRIVER_CAPABILITIES=compute,utility"
      "PATH=/bin"
      "SSL_CERT_FILE=${cacert}/etc/ssl/certs/ca-bundle.crt"
      # The container toolkit mounts the driver at the host's path (CDI), at a distribution's path (legacy
      # mode) or, on NixOS, at the first. The loader in here knows none of them, and the image holds no
      # libraries of a distribution that these could shadow.
      "LD_LIBRARY_PATH=${
        lib.concatStringsSep ":" [
          sparkPins.driverLib
          "/usr/lib/${sparkPins.system}-gnu"
          "/usr/lib64"
          "/usr/local/nvidia/lib64"
        ]
      }"
    ];
    # Docker's format only; podman needs --format docker to keep it.
    Healthcheck = {
      Test = [
        "CMD"
        (lib.getExe spark-llm)
        # Asks /readyz until it is 200.
        "wait"
        "--ready"
        "--timeout"
        "5"
      ];
      Interval = 30 * 1000000000;
      Timeout = 10 * 1000000000;
      # Loading a large model takes minutes; only afterwards does a failure count.
      StartPeriod = 1800 * 1000000000;
      Retries = 3;
    };
    Labels = {
      "org.opencontainers.image.title" = "spark-llm";
      "org.opencontainers.image.description" = spark-llm.meta.description;
      "org.opencontainers.image.version" = spark-llm.version;
      "org.opencontainers.image.licenses" = "Apache-2.0 AND LicenseRef-NVIDIA-CUDA-EULA";
    };
  };
}
