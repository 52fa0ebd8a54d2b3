{ lib }:
let
  wheel = import ./wheel.nix { inherit lib; };
  fails = value: !(builtins.tryEval value).success;
  file = "cbor2-6.2.1-cp312-cp312-manylinux_2_28_aarch64.whl";
  everyFileParses =
    system:
    lib.all (pin: (wheel.parseFile pin.file).pname != "") (
      lib.attrValues (wheel.forSystem ../pins/wheels system)
    );
in
{
  parseFile = {
    testParts = {
      expr = wheel.parseFile file;
      expected = {
        pname = "cbor2";
        version = "6.2.1";
        python = "cp312";
        abi = "cp312";
        platform = "manylinux_2_28_aarch64";
      };
    };
    testSourceArchiveIsRefused = {
      expr = fails (wheel.parseFile "vllm-0.32.0.tar.gz").pname;
      expected = true;
    };
    testEveryPinnedFileParses = {
      expr = map everyFileParses [
        "aarch64-linux"
        "x86_64-linux"
      ];
      expected = [
        true
        true
      ];
    };
  };
  fetchArgs = {
    testTakesHashAndFolder = {
      expr = wheel.fetchArgs {
        inherit file;
        version = "6.2.1";
        sha256 = "00";
      };
      expected = {
        pname = "cbor2";
        version = "6.2.1";
        format = "wheel";
        dist = "cp312";
        python = "cp312";
        abi = "cp312";
        platform = "manylinux_2_28_aarch64";
        sha256 = "00";
      };
    };
  };
  forSystem = {
    testKnown = {
      expr = (wheel.forSystem ../pins/wheels "aarch64-linux").vllm.version;
      expected = (lib.importJSON ../pins/vllm.json).version;
    };
    testUnknownSystemIsRefused = {
      expr = fails (wheel.forSystem ../pins/wheels "riscv64-linux");
      expected = true;
    };
  };
  pick = {
    testFound = {
      expr = wheel.pick "aarch64-linux" { a = 1; } "a";
      expected = 1;
    };
    testMissingIsRefused = {
      expr = fails (wheel.pick "aarch64-linux" { a = 1; } "b");
      expected = true;
    };
  };
  keep = {
    testPrunes = {
      expr = wheel.keep { b = "unused"; } {
        a = 1;
        b = 2;
      };
      expected = {
        a = 1;
      };
    };
  };
}
