# A folder of numbered patches.
{ lib }:
let
  inherit (lib)
    attrNames
    filter
    hasSuffix
    match
    naturalSort
    unique
    length
    ;
in
{
  # Paths of the NNNN-name.patch files in a folder, in the order of their numbers.
  series =
    folder:
    let
      names = naturalSort (filter (hasSuffix ".patch") (attrNames (builtins.readDir folder)));
      number =
        name:
        let
          parts = match "([0-9]{4})-[a-z0-9-]+\\.patch" name;
        in
        if parts == null then
          throw ''patch "${name}" must be called NNNN-what-it-does.patch: its number is its place in the series.''
        else
          lib.head parts;
      numbers = map number names;
    in
    if length (unique numbers) != length numbers then
      throw "two patches in ${toString folder} have the same number: renumber one."
    else
      builtins.deepSeq numbers (map (name: folder + "/${name}") names);
}
