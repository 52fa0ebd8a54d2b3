# CUDA architecture strings of GB10 (compute capability 12.1).
{ lib }:
let
  inherit (lib)
    elem
    head
    match
    max
    min
    replaceStrings
    ;

  parse =
    arch:
    let
      parts = match "([0-9]+)\\.([0-9])([af]?)" arch;
    in
    if parts == null then
      throw ''"${arch}" is no CUDA architecture: write a compute capability such as "12.0f".''
    else
      {
        major = head parts;
        minor = lib.elemAt parts 1;
        suffix = lib.elemAt parts 2;
      };

  digits = arch: replaceStrings [ "." ] [ "" ] arch;
in
{
  # vLLM's CMake knows no 12.1 and carries 12.0f through unchanged, and code for the family "120f" runs
  # on 12.1. 12.0a code does not load on 12.1; plain 12.0 and 12.1 have no FP4 conversion instructions.
  # vLLM #36835 (12.1f silently becomes 12.0f).
  #
  # kernelArch "12.0f" => "12.0f"
  kernelArch =
    arch:
    let
      parsed = parse arch;
    in
    if
      elem arch [
        "12.0f"
        "12.1f"
      ]
    then
      "12.0f"
    else if parsed.major == "12" && parsed.suffix == "a" then
      throw ''
        CUDA architecture "${arch}" is refused: GB10 is compute capability 12.1, and code built for
        12.0a does not load there (12.1a is not known to vLLM's CMake). Use "12.0f", the family code.''
    else if parsed.major == "12" then
      throw ''
        CUDA architecture "${arch}" is refused: without the "f" the assembler has no FP4 conversion
        (cvt to e2m1) and the FP4 kernels do not build. Use "12.0f".''
    else
      throw ''
        CUDA architecture "${arch}" is not GB10's: this flake builds for compute capability 12.1 only.
        Use "12.0f".'';

  # gencode "12.0f" => "-gencode=arch=compute_120f,code=sm_120f"
  gencode =
    arch:
    let
      code = builtins.seq (parse arch) (digits arch);
    in
    "-gencode=arch=compute_${code},code=sm_${code}";

  # Parallel nvcc processes for a machine: one CUTLASS translation unit takes about 6 GiB, and half of the
  # memory is left to the rest of the host (graham33/nixos-dgx-spark measured 120 GiB at 20 jobs).
  #
  # maxJobs { cores = 20; memoryGiB = 128; } => 10
  maxJobs = { cores, memoryGiB }: max 1 (min cores (memoryGiB / 2 / 6));
}
