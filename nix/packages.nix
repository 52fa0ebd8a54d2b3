# `nix build .#NAME`; vllm-gb10-source comes from legacyPackages.
{ lib, pkgs, ... }:
{
  inherit (pkgs)
    cuda-compiler
    cuda-toolkit
    driver-link
    flashinfer-aot
    python-env
    spark-kernels
    spark-llm
    vllm-gb10
    ;
  # The patched Python tree of vLLM without its environment: minutes and megabytes instead of gigabytes.
  vllm-gb10-patched = pkgs.vllm-gb10.patched;
  oci = pkgs.callPackage ./oci.nix { };
  default = pkgs.spark-llm;
}
