# Triton with its own assemblers: `ptxas-blackwell` (13.1) knows sm_121a, and is what upstream tests with.
# triton/backends/amd stays: Triton loads every backend by entry point and fails when one is absent.
{ lib, mkPinnedWheel }:

mkPinnedWheel {
  name = "triton";
  postInstall = ''
    test -x "$out"/lib/python*/site-packages/triton/backends/nvidia/bin/ptxas-blackwell
  '';
  meta = {
    description = "Language and compiler for GPU kernels";
    homepage = "https://triton-lang.org";
    license = lib.licenses.mit;
  };
}
