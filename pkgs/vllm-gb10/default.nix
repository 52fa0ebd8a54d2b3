# vLLM for GB10: the official wheel, our patches on its Python, without the libraries that SM 12.1 cannot
# use, in a virtual environment of its own over python-env.
#
#   vllm-gb10.override { patches = [ … ]; extraPlugins = [ drv ]; }
#
# The wheel's CUDA code for 12.0 is family code and runs on 12.1, so nothing is compiled on the user's
# machine; vllm-gb10-source compiles everything.
{
  lib,
  stdenv,
  autoPatchelfHook,
  bash,
  makeWrapper,
  ninja,
  python312,
  mkPinnedWheel,
  sparkLib,
  sparkPins,
  cuda-toolkit,
  python-env,
  flashinfer-aot ? null,
  spark-kernels ? null,
  patches ? sparkLib.patches.series ./patches,
  # Packages with a vllm.general_plugins entry point, each a site-packages tree.
  extraPlugins ? [ ],
}:

let
  inherit (sparkPins) sitePackages;
  inherit (sparkPins.vllm) cuda;

  # nvcc 13.0 takes gcc up to 15 (crt/host_config.h).
  hostCompiler =
    if lib.versionOlder (lib.getVersion stdenv.cc.cc) "16" then
      stdenv.cc
    else
      throw "vllm-gb10: nvcc ${cuda.nvcc} takes gcc 15 at most, and this nixpkgs' stdenv has ${lib.getVersion stdenv.cc.cc}. Pass another one: vllm-gb10.override { stdenv = gcc15Stdenv; }.";

  # Unpacked, patched and pruned; the tests build this much without the gigabytes below it.
  patched = mkPinnedWheel {
    name = "vllm";
    inherit patches;
    # A fuzzy patch has found lines that look like the ones it was written for.
    patchPhase = ''
      runHook prePatch
      for patch in $patches; do
        echo "applying $(basename "$patch")"
        if ! patch -p1 --fuzz=0 --force --no-backup-if-mismatch <"$patch"; then
          echo "$(basename "$patch") does not apply to vLLM ${sparkPins.vllm.version}: its lines changed upstream. See the patch's header for what it settles; rebase it, or delete it if upstream has settled that." >&2
          exit 1
        fi
      done
      runHook postPatch
    '';
    # What pip's metadata says of a file that a patch changed is no longer so.
    postInstall = ''
      rm "$out/${sitePackages}"/vllm-*.dist-info/RECORD
    '';
    meta = {
      description = "vLLM ${sparkPins.vllm.version}, patched for GB10 (Python tree only)";
      homepage = "https://docs.vllm.ai";
      license = lib.licenses.asl20;
    };
  };

  # What is compiled at run time is linked with the driver, which in a container is where the container toolkit mounts
  # it. Triton takes -l:libcuda.so.1 from this one folder (triton/backends/nvidia/driver.py, libcuda_dirs; unset, it asks
  # /sbin/ldconfig). FlashInfer takes -lcuda from cuda-toolkit's stubs (flashinfer/jit/cpp_ext.py), which point to
  # driverLib; gcc looks in LIBRARY_PATH after them, and the toolkit makes a libcuda.so (its hook create-symlinks).
  findLibcuda = ''
    IFS=: read -ra folders <<<"$LD_LIBRARY_PATH"
    for folder in "''${folders[@]}"; do
      if [ -e "$folder/libcuda.so.1" ]; then
        export TRITON_LIBCUDA_PATH=$folder LIBRARY_PATH=$folder''${LIBRARY_PATH:+:$LIBRARY_PATH}
        break
      fi
    done
  '';

  plugins = lib.optional (spark-kernels != null) spark-kernels ++ extraPlugins;
in
stdenv.mkDerivation (finalAttrs: {
  pname = "vllm-gb10";
  inherit (sparkPins.vllm) version;

  strictDeps = true;
  nativeBuildInputs = [
    autoPatchelfHook
    makeWrapper
    python312
  ];
  buildInputs = [ (lib.getLib stdenv.cc.cc) ];

  plugins = map (plugin: "${plugin}/${sitePackages}") plugins;

  dontUnpack = true;
  dontConfigure = true;
  dontBuild = true;

  installPhase = ''
    runHook preInstall
    python3.12 ${../python-env/merge.py} "$out/${sitePackages}" ${patched}/${sitePackages} $plugins
    ${lib.optionalString (flashinfer-aot != null) ''
      ln -s ${flashinfer-aot}/${sitePackages}/flashinfer_jit_cache "$out/${sitePackages}/"
    ''}
    # addsitedir and not a plain path: python-env has .pth files of its own (cutlass).
    echo 'import site; site.addsitedir("${python-env}/${sitePackages}")' >"$out/${sitePackages}/python-env.pth"
    mkdir -p "$out/libexec"
    ln -s ${lib.getExe python312} "$out/libexec/python3.12"
    printf '%s\n' 'home = ${python312}/bin' 'include-system-site-packages = false' 'version = 3.12' >"$out/pyvenv.cfg"
    cat >"$out/libexec/vllm" <<EOF
    #!$out/libexec/python3.12
    import sys
    from vllm.entrypoints.cli.main import main
    sys.exit(main())
    EOF
    chmod +x "$out/libexec/vllm"
    runHook postInstall
  '';

  preFixup = ''
    for folder in torch/lib nvidia/nccl/lib; do
      addAutoPatchelfSearchPath "${python-env}/${sitePackages}/$folder"
    done
    addAutoPatchelfSearchPath ${cuda-toolkit}/lib
  '';

  postFixup = ''
    for program in vllm python3.12; do
      makeWrapper "$out/libexec/$program" "$out/bin/$program" \
        --inherit-argv0 \
        --set CUDA_HOME ${cuda-toolkit} \
        --set CC ${hostCompiler}/bin/cc \
        --set CXX ${hostCompiler}/bin/c++ \
        --set TRITON_PTXAS_BLACKWELL_PATH ${python-env}/${sitePackages}/triton/backends/nvidia/bin/ptxas-blackwell \
        --set TRITON_LIBCUDA_PATH ${sparkPins.driverLib} \
        --set-default FLASHINFER_CUDA_ARCH_LIST ${cuda.jitArch} \
        --set-default VLLM_HAS_FLASHINFER_CUBIN 1 \
        --set-default VLLM_NO_USAGE_STATS 1 \
        --set-default DO_NOT_TRACK 1 \
        --prefix LD_LIBRARY_PATH : ${sparkPins.driverLib} \
        --run ${lib.escapeShellArg findLibcuda} \
        --prefix PATH : ${
          lib.makeBinPath [
            bash
            ninja
            hostCompiler
            cuda-toolkit
          ]
        }
    done
    ln -s python3.12 "$out/bin/python"
    ln -s python3.12 "$out/bin/python3"
    python3.12 -m compileall -q -j "$NIX_BUILD_CORES" --invalidation-mode unchecked-hash "$out/${sitePackages}"
  '';

  dontStrip = true;
  dontPatchELF = true;
  autoPatchelfIgnoreMissingDeps = sparkPins.ignoreMissing;
  appendRunpaths = [
    "$ORIGIN"
    "${python-env}/${sitePackages}/torch/lib"
    "${cuda-toolkit}/lib"
    sparkPins.driverLib
  ];

  # vLLM's kernels cannot be imported here: they NEED libcuda.so.1, which only a host with a GPU has.
  passthru = {
    inherit patched patches plugins;
    updateScript = [
      "nix"
      "run"
      ".#update-pins"
    ];
  };

  meta = {
    description = "vLLM ${finalAttrs.version} for NVIDIA GB10 (DGX Spark), patched, with CUDA ${cuda.version}";
    homepage = "https://docs.vllm.ai";
    changelog = "https://github.com/vllm-project/vllm/releases/tag/v${finalAttrs.version}";
    # vLLM is Apache-2.0; its environment holds NVIDIA's redistributable libraries.
    license = [
      lib.licenses.asl20
      lib.licenses.nvidiaCudaRedist
    ];
    platforms = [ sparkPins.system ];
    mainProgram = "vllm";
    sourceProvenance = [ lib.sourceTypes.binaryNativeCode ];
  };
})
