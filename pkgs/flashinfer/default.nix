# FlashInfer. Since 0.6 the wheel holds sources and headers only; flashinfer-aot compiles what GB10 uses.
{ lib, mkPinnedWheel }:

mkPinnedWheel {
  name = "flashinfer-python";
  meta = {
    description = "Attention, sampling and GEMM kernels for LLM serving";
    homepage = "https://flashinfer.ai";
    license = lib.licenses.asl20;
  };
}
