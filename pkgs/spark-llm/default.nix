# The appliance: our Python service in a virtual environment of its pinned dependencies, with the engine's
# interpreter wired in. The engine stays a separate environment: the controller must live when it dies.
{
  lib,
  stdenv,
  callPackage,
  makeWrapper,
  python312,
  driver-link,
  python-env,
  sparkLib,
  sparkPins,
  # null leaves the engine to configuration ([engine] python = …).
  vllm-gb10 ? null,
  src ? ../../appliance,
}:

let
  inherit (sparkPins) sitePackages;
  version = sparkLib.version.ofPackage (src + "/src/spark_llm/__init__.py");

  inherit (lib.importTOML (src + "/pyproject.toml")) project;

  # A console script of the project: "spark_llm.cli:main" runs in the environment, with the engine named.
  script =
    name: entry:
    let
      parts = lib.splitString ":" entry;
    in
    ''
      printf '%s\n' '#!${environment}/bin/python' 'import sys' \
        'from ${lib.elemAt parts 0} import ${lib.elemAt parts 1} as run' 'sys.exit(run())' >"$out/libexec/${name}"
      chmod +x "$out/libexec/${name}"
      makeWrapper "$out/libexec/${name}" "$out/bin/${name}" ${toString wrapperFlags}
    '';

  wrapperFlags = [
    # For NVML: the loader of nixpkgs' glibc reads no ld.so.cache, so a bare dlopen finds nothing of the driver's.
    "--prefix LD_LIBRARY_PATH : ${sparkPins.driverLib}"
  ]
  ++ lib.optionals (vllm-gb10 != null) [
    "--set-default SPARK_LLM_ENGINE__PYTHON ${vllm-gb10}/bin/python"
  ];

  mkWheel = callPackage ../wheel {
    sparkPins = sparkPins // {
      wheels = sparkPins.appliance;
    };
  };

  package = python312.pkgs.buildPythonPackage {
    pname = "spark-llm";
    inherit version;
    pyproject = true;
    src = lib.cleanSource src;
    build-system = [ python312.pkgs.hatchling ];
    strictDeps = true;
    # They are in the environment below, from the lock.
    dontCheckRuntimeDeps = true;
    meta = {
      description = "The spark-llm Python package alone";
      license = lib.licenses.asl20;
    };
  };

  environment = python-env.override {
    pname = "spark-llm-env";
    inherit version;
    withCuda = false;
    wheels = lib.mapAttrs (name: _: mkWheel { inherit name; }) sparkPins.appliance // {
      spark-llm = package;
      systemd-python = python312.pkgs.systemd-python;
    };
    members = lib.attrNames sparkPins.appliance ++ [
      "spark-llm"
      "systemd-python"
    ];
  };
in
stdenv.mkDerivation (finalAttrs: {
  pname = "spark-llm";
  inherit version;

  strictDeps = true;
  nativeBuildInputs = [ makeWrapper ];

  dontUnpack = true;
  dontConfigure = true;
  dontBuild = true;

  installPhase = ''
    runHook preInstall
    mkdir -p "$out/libexec"
    ${lib.concatStrings (lib.mapAttrsToList script project.scripts)}
    # spark-llm-driver.service expects it beside the service.
    ln -s ${lib.getExe driver-link} "$out/bin/driver-link"
    runHook postInstall
  '';

  doInstallCheck = stdenv.buildPlatform.canExecute stdenv.hostPlatform;
  installCheckPhase = ''
    runHook preInstallCheck
    HOME=$TMPDIR "$out/bin/spark-llm" --help >/dev/null
    runHook postInstallCheck
  '';

  passthru = {
    inherit environment package;
    engine = vllm-gb10;
    units = src + "/units";
  };

  meta = {
    description = "LLM appliance for NVIDIA DGX Spark: plans memory, starts and guards vLLM, serves OpenAI and Anthropic clients";
    license = lib.licenses.asl20;
    platforms = [ sparkPins.system ];
    mainProgram = "spark-llm";
  };
})
