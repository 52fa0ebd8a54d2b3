# vLLM, from its wheel and from its source.
final: prev: {
  vllm-gb10 = final.callPackage ../pkgs/vllm-gb10 { };
  vllm-gb10-source = final.callPackage ../pkgs/vllm-gb10-source { };
}
