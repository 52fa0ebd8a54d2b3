# vLLM compiled from its sdist for SM 12.0f alone, with every external pinned by commit.
#
# Not built so far, on any machine: evaluated only. Expect hours on a Spark (vLLM #14452, #20345).
# Against vllm-gb10 it gains FlashAttention-2 as machine code (the official wheel carries it as PTX that the
# driver compiles at first use), qutlass for SM 12.0, and leaves out every other architecture.
#
# Evaluating this fetches: the sdist (its Cargo.lock is read) and the externals without a published hash. So it is in
# legacyPackages alone, which `nix flake check` does not evaluate.
{
  lib,
  stdenv,
  cargo,
  cmake,
  fetchPypi,
  fetchgit,
  git,
  ninja,
  openssl,
  pkg-config,
  protobuf,
  python312,
  runCommand,
  rustPlatform,
  rustc,
  cuda-toolkit,
  python-env,
  sparkLib,
  sparkPins,
  kernelArch ? sparkPins.vllm.cuda.kernelArch,
  # One nvcc takes about 6 GiB; half of a Spark's memory stays with the host.
  maxJobs ? sparkLib.arch.maxJobs {
    cores = 20;
    memoryGiB = 128;
  },
  nvccThreads ? 1,
  # fetchGit is legal in pure evaluation because the commit is given; git's object name is the integrity
  # check. A parameter, so that an evaluation without a network can pass a recorder.
  fetchGit ? builtins.fetchGit,
}:

let
  inherit (sparkPins.vllm) version;
  inherit (sparkPins) sitePackages;
  arch = sparkLib.arch.kernelArch kernelArch;

  sdist = fetchPypi { inherit (sparkPins.vllm.sdist) pname version hash; };

  # No hash is invented: what has a published one is fetched by it, the rest by commit.
  fetchExternal =
    external:
    let
      url = "https://github.com/${external.owner}/${external.repo}.git";
    in
    if external ? hash then
      fetchgit {
        inherit url;
        inherit (external) rev hash;
        fetchSubmodules = external.submodules != [ ];
      }
    else
      fetchGit {
        inherit url;
        inherit (external) rev;
        shallow = true;
        submodules = external.submodules != [ ];
      };
  externals = lib.mapAttrs (_: fetchExternal) sparkPins.externals;

  source = runCommand "vllm-${version}-source" { } ''
    mkdir "$out"
    tar -xf ${sdist} --strip-components=1 -C "$out"
  '';

  # A derivation of its own: Rust and CUDA then rebuild independently, and setup.py skips cargo when
  # vllm/vllm-rs is there.
  frontend = rustPlatform.buildRustPackage {
    pname = "vllm-rs";
    inherit version;
    src = source;
    sourceRoot = "${source.name}/rust";
    cargoLock = {
      lockFile = "${source}/rust/Cargo.lock";
      # Three crates are git dependencies, pinned by commit in the lock.
      allowBuiltinFetchGit = true;
    };
    buildAndTestSubdir = "src/cmd";
    nativeBuildInputs = [
      pkg-config
      protobuf
    ];
    buildInputs = [ openssl ];
    env = {
      OPENSSL_NO_VENDOR = "1";
      VLLM_RS_BUILD_VERSION = version;
    };
    meta = {
      description = "Rust front end of vLLM";
      homepage = "https://docs.vllm.ai";
      license = lib.licenses.asl20;
      mainProgram = "vllm-rs";
    };
  };

  # CMake insists on writing into these two; and FlashAttention gets 12.0f.
  writable = [
    "deepgemm"
    "qutlass"
    "vllm_flash_attn"
  ];
  direct = removeAttrs sparkPins.externals writable;

  # What pyproject.toml requires to build and python-env lacks. Not as inputs of their own: setuptools-rust's setup hook
  # stops every build without rustPlatform.cargoSetupHook (nixpkgs' setuptools-rust-hook.sh), and there is no cargo to set
  # up here.
  python = python312.withPackages (packages: [
    packages.setuptools-rust
    packages.setuptools-scm
  ]);
in
stdenv.mkDerivation (finalAttrs: {
  pname = "vllm-gb10-source";
  inherit version;

  src = sdist;
  patches = sparkLib.patches.series ../vllm-gb10/patches;
  patchFlags = [
    "-p1"
    "--fuzz=0"
  ];

  strictDeps = true;
  nativeBuildInputs = [
    cargo
    cmake
    git
    ninja
    python
    rustc
  ];
  buildInputs = [ cuda-toolkit ];
  # setup.py drives CMake.
  dontUseCmakeConfigure = true;

  requiredSystemFeatures = [ "big-parallel" ];

  env = {
    CUDA_HOME = "${cuda-toolkit}";
    VLLM_TARGET_DEVICE = "cuda";
    TORCH_CUDA_ARCH_LIST = arch;
    MAX_JOBS = toString maxJobs;
    NVCC_THREADS = toString nvccThreads;
    # The sdist has no .git for setuptools-scm to read.
    SETUPTOOLS_SCM_PRETEND_VERSION = version;
    VLLM_VERSION_OVERRIDE = version;
  }
  // lib.mapAttrs' (
    name: external:
    lib.nameValuePair external.variable (
      "${externals.${name}}" + lib.optionalString (external ? subdirectory) "/${external.subdirectory}"
    )
  ) direct;

  preConfigure = ''
    externals=$NIX_BUILD_TOP/externals
    mkdir -p "$externals"
    ${lib.concatMapStrings (name: ''
      cp -r --no-preserve=ownership ${externals.${name}} "$externals/${name}"
      chmod -R u+w "$externals/${name}"
    '') writable}
    export DEEPGEMM_SRC_DIR=$externals/deepgemm QUTLASS_SRC_DIR=$externals/qutlass
    # Not VLLM_FLASH_ATTN_SRC_DIR: with it install() leaves a symbolic link into the source, and skips
    # rewriting the imports of flash_attn.cute. setup.py splits CMAKE_ARGS at white space.
    export CMAKE_ARGS="${lib.cmakeBool "FETCHCONTENT_FULLY_DISCONNECTED" true} ${lib.cmakeFeature "FETCHCONTENT_SOURCE_DIR_VLLM-FLASH-ATTN" "$externals/vllm_flash_attn"}"
    # Without this FlashAttention-2 is compute_80 PTX on 12.x, and the driver compiles it at first use.
    substituteInPlace "$externals/vllm_flash_attn/CMakeLists.txt" \
      --replace-fail '"8.0+PTX"' '"8.0+PTX;${arch}"'
    install -m755 ${lib.getExe frontend} vllm/vllm-rs
    export PYTHONPATH=${python-env}/${sitePackages}
  '';

  buildPhase = ''
    runHook preBuild
    python3.12 setup.py bdist_wheel --dist-dir dist
    runHook postBuild
  '';

  installPhase = ''
    runHook preInstall
    mkdir -p "$out/${sitePackages}"
    python3.12 -m zipfile -e dist/*.whl "$out/${sitePackages}"
    chmod +x "$out/${sitePackages}/vllm/vllm-rs"
    runHook postInstall
  '';

  passthru = {
    inherit arch externals frontend;
  };

  meta = {
    description = "vLLM compiled from source for GB10 (${arch}); evaluated, not built so far";
    homepage = "https://docs.vllm.ai";
    license = lib.licenses.asl20;
    platforms = [ sparkPins.system ];
    mainProgram = "vllm";
  };
})
