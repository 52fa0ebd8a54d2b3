# PyTorch, the CUDA 13.0 build for CPython 3.12: on both systems the index's default wheel is that build.
# It NEEDs every library of nvidia/ that python-env merges beside it.
{ lib, mkPinnedWheel }:

mkPinnedWheel {
  name = "torch";
  meta = {
    description = "Tensors and neural networks, built for CUDA 13.0";
    homepage = "https://pytorch.org";
    license = lib.licenses.bsd3;
  };
}
