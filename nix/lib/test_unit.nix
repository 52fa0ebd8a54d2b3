{ lib }:
let
  inherit (import ./unit.nix { inherit lib; }) fill placeholders;
  fails = value: !(builtins.tryEval value).success;
in
{
  placeholders = {
    testEachOnce = {
      expr = placeholders "ExecStart=@bin@ --state @state_dir@ @bin@";
      expected = [
        "bin"
        "state_dir"
      ];
    };
    testTemplateInstanceIsNone = {
      expr = placeholders "Wants=getty@tty1.service user@1000.service";
      expected = [ ];
    };
  };
  fill = {
    testFills = {
      expr = fill { bin = "/bin/x"; } "ExecStart=@bin@";
      expected = "ExecStart=/bin/x";
    };
    testMissingIsRefused = {
      expr = fails (fill { } "ExecStart=@bin@");
      expected = true;
    };
  };
}
