# The Python environment under vLLM. Distributions with something to say have a package file.
final: prev: {
  pinnedWheels = prev.pinnedWheels // {
    torch = final.callPackage ../pkgs/torch { };
    triton = final.callPackage ../pkgs/triton { };
    flashinfer-python = final.callPackage ../pkgs/flashinfer { };
    nvidia-cutlass-dsl-libs-base = final.callPackage ../pkgs/cutlass-dsl { };
  };

  python-env = final.callPackage ../pkgs/python-env { };
}
