# The service around vLLM, and what it needs of the host.
final: prev: {
  spark-llm = final.callPackage ../pkgs/spark-llm { };
  driver-link = final.callPackage ../pkgs/driver-link { };
}
