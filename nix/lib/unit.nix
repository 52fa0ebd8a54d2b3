# systemd unit text from a template with @placeholders@.
{ lib }:
let
  inherit (lib)
    attrNames
    attrValues
    concatStringsSep
    filter
    isList
    replaceStrings
    unique
    ;

  # "a @b@ c @d@" => [ "b" "d" ]
  placeholders =
    text: unique (map (found: lib.head found) (filter isList (builtins.split "@([a-z_]+)@" text)));
in
{
  inherit placeholders;

  # Fill a template. Every placeholder must have a value: a unit with a literal @bin@ in it starts nothing,
  # and says so only in the journal.
  fill =
    values: template:
    let
      wanted = placeholders template;
      marks = map (name: "@${name}@") (attrNames values);
      missing = filter (name: !(values ? ${name})) wanted;
    in
    if missing != [ ] then
      throw "unit template: no value for @${concatStringsSep "@, @" missing}@."
    else
      replaceStrings marks (map toString (attrValues values)) template;
}
