# A Python package's version, from the one place where it stands.
{ lib }:
{
  # ofPackage ./src/spark_llm/__init__.py => "0.1.0"
  ofPackage =
    file:
    let
      lines = lib.splitString "\n" (builtins.readFile file);
      found = lib.filter (line: line != null) (map (builtins.match ''__version__ = "([^"]+)"'') lines);
    in
    if found == [ ] then
      throw ''${toString file} has no line __version__ = "…".''
    else
      lib.head (lib.head found);
}
