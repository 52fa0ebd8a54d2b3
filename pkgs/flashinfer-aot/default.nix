# FlashInfer's kernels for GB10 (12.1a), compiled ahead of time: the first start of a Spark without a
# network, or without patience, compiles nothing. modules.json says which; the rest still compiles at
# first use.
{
  lib,
  stdenv,
  ninja,
  cuda-toolkit,
  python-env,
  sparkLib,
  sparkPins,
  # FlashInfer's names of the modules to build; none means all of modules.json.
  modules ? [ ],
  maxJobs ? sparkLib.arch.maxJobs {
    cores = 20;
    memoryGiB = 128;
  },
}:

stdenv.mkDerivation (finalAttrs: {
  pname = "flashinfer-aot";
  inherit (sparkPins.wheels.flashinfer-python) version;

  strictDeps = true;
  nativeBuildInputs = [ ninja ];
  requiredSystemFeatures = [ "big-parallel" ];

  dontUnpack = true;
  dontConfigure = true;
  dontUseNinjaBuild = true;
  dontUseNinjaInstall = true;

  env = {
    CUDA_HOME = "${cuda-toolkit}";
    FLASHINFER_CUDA_ARCH_LIST = sparkPins.vllm.cuda.jitArch;
    FLASHINFER_NVCC_THREADS = "1";
  };

  buildPhase = ''
    runHook preBuild
    export HOME=$TMPDIR MAX_JOBS=$((NIX_BUILD_CORES < ${toString maxJobs} ? NIX_BUILD_CORES : ${toString maxJobs}))
    mkdir -p "$out/${sparkPins.sitePackages}"
    ${python-env}/bin/python ${./.}/build_modules.py ${./modules.json} \
      "$out/${sparkPins.sitePackages}/flashinfer_jit_cache" ${lib.escapeShellArgs modules}
    runHook postBuild
  '';

  dontInstall = true;
  dontStrip = true;
  dontPatchELF = true;

  meta = {
    description = "FlashInfer kernels compiled for GB10";
    homepage = "https://flashinfer.ai";
    license = lib.licenses.asl20;
    platforms = [ sparkPins.system ];
  };
})
