# What is compiled for GB10 ahead of time.
final: prev: {
  flashinfer-aot = final.callPackage ../pkgs/flashinfer-aot { };
  spark-kernels = final.callPackage ../pkgs/spark-kernels { };
}
