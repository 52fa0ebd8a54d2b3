# CuTe DSL. `import cutlass` works through nvidia_cutlass_dsl_packages.pth alone, which is honoured in a
# site directory and not on PYTHONPATH: the reason why python-env is a virtual environment.
{ lib, mkPinnedWheel }:

mkPinnedWheel {
  name = "nvidia-cutlass-dsl-libs-base";
  postInstall = ''
    test -e "$out"/lib/python*/site-packages/nvidia_cutlass_dsl_packages.pth ||
      echo "nvidia-cutlass-dsl-libs-base carries no .pth any more: see that \`import cutlass\` still works" >&2
  '';
  meta = {
    description = "Python DSL for CUTLASS kernels";
    homepage = "https://docs.nvidia.com/cutlass";
    license = lib.licenses.nvidiaCudaRedist;
  };
}
