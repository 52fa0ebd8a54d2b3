# Our kernels, compiled for 12.0f by the pinned nvcc.
{
  lib,
  stdenv,
  python312,
  cuda-compiler,
  sparkLib,
  sparkPins,
  src ? ../../kernels,
}:

python312.pkgs.buildPythonPackage {
  pname = "spark-kernels";
  version = sparkLib.version.ofPackage (src + "/src/spark_kernels/__init__.py");
  pyproject = true;

  src = lib.cleanSource src;

  build-system = [ python312.pkgs.hatchling ];
  strictDeps = true;

  # The compilers run on the build machine and write code for the GPU; there is nothing to cross.
  env = {
    CUDA_HOME = "${cuda-compiler}";
    NVCC_PREPEND_FLAGS = "-ccbin ${stdenv.cc}/bin/c++";
  };

  preBuild = ''
    PYTHONPATH=src python -c 'import sys; from spark_kernels.cli import main; sys.exit(main(["build"]))'
    # A wheel without them would install, and fall back to the slow path without a word.
    test -e src/spark_kernels/_lib/nvfp4.so
  '';

  # numpy and torch are the engine's: python-env has them.
  dontCheckRuntimeDeps = true;
  # Fat binaries hold no host symbols worth stripping.
  dontStrip = true;

  passthru.arch = sparkLib.arch.kernelArch sparkPins.vllm.cuda.kernelArch;

  meta = {
    description = "Decode kernels for GB10 as a vLLM plugin";
    license = lib.licenses.asl20;
    platforms = [ sparkPins.system ];
  };
}
