# CUDA 13.0 as one tree, merged from the wheels that torch loads: the libraries for run time and, as
# CUDA_HOME, nvcc with its headers for what FlashInfer, DeepGEMM and Triton compile. python-env links
# nvidia/cu13 to it, so there is one copy of each library.
#
# nixpkgs' cudaPackages is not used for this: torch's wheels pin these exact builds, and a second cuBLAS in
# the closure would cost 700 MB and could be the one that gets loaded.
{
  lib,
  stdenv,
  autoPatchelfHook,
  numactl,
  rdma-core,
  zlib,
  pinnedWheels,
  sparkPins,
  # Distributions to merge; fewer make a smaller toolkit for compiling only.
  members ? sparkPins.vllm.cuda.toolkit,
}:

stdenv.mkDerivation (finalAttrs: {
  pname = "cuda-toolkit";
  version = sparkPins.vllm.cuda.nvcc;

  strictDeps = true;
  nativeBuildInputs = [ autoPatchelfHook ];
  buildInputs = [
    (lib.getLib stdenv.cc.cc)
    numactl
    rdma-core
    zlib
  ];

  members = map (name: "${pinnedWheels.${name}}/${sparkPins.sitePackages}/nvidia/cu13") members;

  dontUnpack = true;
  dontConfigure = true;
  dontBuild = true;

  installPhase = ''
    runHook preInstall
    mkdir -p "$out"
    for member in $members; do
      # -n never overwrites: the wheels share no file, and the build stops below if that changes.
      (cd "$member" && find . -type f) | sort >members.new
      if clash=$(comm -12 members.new <(cd "$out" && find . -type f | sort)) && [ -n "$clash" ]; then
        echo "two CUDA wheels carry the same file, so their versions do not belong together: $clash" >&2
        exit 1
      fi
      cp -rn --no-preserve=ownership "$member/." "$out/"
      chmod -R u+w "$out"
    done
    rm members.new

    # FlashInfer and nvcc's own -L look in lib64.
    ln -s lib "$out/lib64"
    # The wheels carry sonames only; linkers ask for libNAME.so.
    for library in "$out"/lib/lib*.so.*; do
      link=''${library%%.so.*}.so
      [ -e "$link" ] || ln -s "$(basename "$library")" "$link"
    done
    # Linking against the driver: compiled code runs only where the driver is, so its own file serves as
    # the stub. No wheel carries one.
    mkdir -p "$out/lib/stubs"
    ln -s ${sparkPins.driverLib}/libcuda.so.1 "$out/lib/stubs/libcuda.so"
    # nvlink loads nvvm/lib64/libnvvm.so for -dlto; the wheel has it elsewhere.
    if [ -e "$out/lib/libnvvm.so.4" ]; then
      mkdir -p "$out/nvvm/lib64"
      ln -s ../../lib/libnvvm.so.4 "$out/nvvm/lib64/libnvvm.so"
    fi

    # glibc 2.42 declares rsqrt and rsqrtf noexcept; CUDA 13.0's own declarations then conflict in every
    # .cu file. nixpkgs patches its cuda_crt the same way (NixOS/nixpkgs#484031).
    if [ -d "$out/include/crt" ]; then
      substituteInPlace "$out/include/crt/math_functions.h" \
        --replace-fail 'rsqrt(double x);' 'rsqrt(double x) throw();' \
        --replace-fail 'rsqrtf(float x);' 'rsqrtf(float x) throw();' \
        --replace-fail '__func__(double rsqrt(double a));' '__func__(double rsqrt(double a) throw());' \
        --replace-fail '__func__(float rsqrtf(float a));' '__func__(float rsqrtf(float a) throw());'
      substituteInPlace "$out/include/crt/math_functions.hpp" \
        --replace-fail '__func__(double rsqrt(const double a))' '__func__(double rsqrt(const double a) throw())' \
        --replace-fail '__func__(float rsqrtf(const float a))' '__func__(float rsqrtf(const float a) throw())'
    fi
    runHook postInstall
  '';

  dontStrip = true;
  # shrink-rpath would drop the folders that are only dlopened from.
  dontPatchELF = true;

  autoPatchelfIgnoreMissingDeps = sparkPins.ignoreMissing;
  # autoPatchelf replaces RUNPATH. libnvrtc finds libnvrtc-builtins by $ORIGIN alone, and without it fails
  # with "failed to open libnvrtc-builtins.so.13.0".
  appendRunpaths = [
    "$ORIGIN"
    "${placeholder "out"}/lib"
    sparkPins.driverLib
  ];

  doInstallCheck =
    stdenv.buildPlatform.canExecute stdenv.hostPlatform && lib.elem "nvidia-cuda-nvcc" members;
  installCheckPhase = ''
    runHook preInstallCheck
    "$out/bin/nvcc" --version | grep -F "V${sparkPins.vllm.cuda.nvcc}"
    runHook postInstallCheck
  '';

  meta = {
    description = "CUDA ${sparkPins.vllm.cuda.version} toolkit merged from the wheels that PyTorch loads";
    homepage = "https://developer.nvidia.com/cuda-toolkit";
    license = lib.licenses.nvidiaCudaRedist;
    platforms = [ sparkPins.system ];
    mainProgram = "nvcc";
    sourceProvenance = [ lib.sourceTypes.binaryNativeCode ];
  };
})
