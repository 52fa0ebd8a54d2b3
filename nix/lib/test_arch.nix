{ lib }:
let
  inherit (import ./arch.nix { inherit lib; }) gencode kernelArch maxJobs;
  fails = value: !(builtins.tryEval value).success;
in
{
  kernelArch = {
    testFamilyStays = {
      expr = kernelArch "12.0f";
      expected = "12.0f";
    };
    testFamilyOf121IsTheSameFamily = {
      expr = kernelArch "12.1f";
      expected = "12.0f";
    };
    testArchitectureSpecificIsRefused = {
      expr = map (arch: fails (kernelArch arch)) [
        "12.0a"
        "12.1a"
      ];
      expected = [
        true
        true
      ];
    };
    testPlainIsRefused = {
      expr = fails (kernelArch "12.0") && fails (kernelArch "12.1");
      expected = true;
    };
    testOtherGenerationIsRefused = {
      expr = fails (kernelArch "9.0a");
      expected = true;
    };
    testNonsenseIsRefused = {
      expr = fails (kernelArch "blackwell");
      expected = true;
    };
  };
  gencode = {
    testFamily = {
      expr = gencode "12.0f";
      expected = "-gencode=arch=compute_120f,code=sm_120f";
    };
    testNonsenseIsRefused = {
      expr = fails (gencode "sm_120");
      expected = true;
    };
  };
  maxJobs = {
    testMemoryBindsOnASpark = {
      expr = maxJobs {
        cores = 20;
        memoryGiB = 128;
      };
      expected = 10;
    };
    testCoresBind = {
      expr = maxJobs {
        cores = 2;
        memoryGiB = 128;
      };
      expected = 2;
    };
    testNeverZero = {
      expr = maxJobs {
        cores = 2;
        memoryGiB = 8;
      };
      expected = 1;
    };
  };
}
