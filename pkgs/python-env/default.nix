# A virtual environment made of pinned wheels: one real site-packages tree, because a join of symlinks
# breaks wheels that find each other by $ORIGIN/../../nvidia/…, and a virtual environment, because .pth
# files are honoured in a site directory and child processes start from sys.executable.
{
  lib,
  stdenv,
  autoPatchelfHook,
  numactl,
  rdma-core,
  zlib,
  python312,
  pinnedWheels,
  sparkPins,
  cuda-toolkit,
  pname ? "spark-python-env",
  version ? sparkPins.vllm.version,
  # Distributions to merge, by name. vLLM itself is vllm-gb10's, so that a changed patch rebuilds little.
  members ? lib.subtractLists ([ "vllm" ] ++ sparkPins.vllm.cuda.toolkit) (
    lib.attrNames sparkPins.kept
  ),
  wheels ? pinnedWheels,
  withCuda ? true,
}:

let
  inherit (sparkPins) sitePackages;
in
stdenv.mkDerivation (finalAttrs: {
  inherit pname version;

  strictDeps = true;
  nativeBuildInputs = [
    autoPatchelfHook
    python312
  ];
  buildInputs = [
    (lib.getLib stdenv.cc.cc)
    numactl
    rdma-core
    zlib
  ];

  members = map (name: "${wheels.${name}}/${sitePackages}") members;
  # Metadata of the toolkit's wheels: torch and FlashInfer ask importlib.metadata for some of them.
  metadata = lib.optionals withCuda (
    map (name: "${pinnedWheels.${name}}/${sitePackages}") sparkPins.vllm.cuda.toolkit
  );

  dontUnpack = true;
  dontConfigure = true;
  dontBuild = true;

  installPhase = ''
    runHook preInstall
    python3.12 ${./merge.py} "$out/${sitePackages}" $members
    for member in $metadata; do
      cp -r --no-preserve=ownership,mode "$member"/*.dist-info "$out/${sitePackages}/"
    done
    ${lib.optionalString withCuda ''
      mkdir -p "$out/${sitePackages}/nvidia"
      ln -s ${cuda-toolkit} "$out/${sitePackages}/nvidia/cu13"
    ''}
    mkdir -p "$out/bin"
    for name in python python3 python3.12; do
      ln -s ${lib.getExe python312} "$out/bin/$name"
    done
    printf '%s\n' 'home = ${python312}/bin' 'include-system-site-packages = false' 'version = 3.12' >"$out/pyvenv.cfg"
    runHook postInstall
  '';

  # The store is read-only, so what is not compiled here is compiled again at every start. Some wheels
  # carry templates that are no Python; compileall says so and goes on.
  postFixup = ''
    python3.12 -m compileall -q -j "$NIX_BUILD_CORES" --invalidation-mode unchecked-hash \
      "$out/${sitePackages}" >compileall.log 2>&1 ||
      echo "compileall left $(grep -c '^\*\*\*' compileall.log) files uncompiled"
  '';

  dontStrip = true;
  dontPatchELF = true;

  autoPatchelfIgnoreMissingDeps = sparkPins.ignoreMissing;
  appendRunpaths = [
    "$ORIGIN"
  ]
  ++ lib.optionals withCuda (
    [ "${cuda-toolkit}/lib" ]
    ++ map (folder: "${placeholder "out"}/${sitePackages}/${folder}") [
      "nvidia/cudnn/lib"
      "nvidia/nccl/lib"
      "nvidia/nvshmem/lib"
      "nvidia/cusparselt/lib"
      "torch/lib"
    ]
    # dlopened by NCCL, NVSHMEM, cuFile.
    ++ [
      "${lib.getLib rdma-core}/lib"
      "${lib.getLib numactl}/lib"
      sparkPins.driverLib
    ]
  );
  preFixup = lib.optionalString withCuda ''
    addAutoPatchelfSearchPath ${cuda-toolkit}/lib
  '';

  passthru = {
    inherit members;
    python = python312;
  };

  meta = {
    description = "Virtual environment of the wheels that ${pname} pins";
    license = if withCuda then lib.licenses.nvidiaCudaRedist else lib.licenses.asl20;
    platforms = [ sparkPins.system ];
    sourceProvenance = [ lib.sourceTypes.binaryNativeCode ];
  };
})
