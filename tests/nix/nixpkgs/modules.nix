# Test double of the module system: options with types that check, defaults, mkIf, mkDefault and merging of
# lists and sets. One level of priority; no submodules beyond a freeform set.
{ lib }:
let
  inherit (builtins)
    all
    attrNames
    attrValues
    concatLists
    elem
    filter
    foldl'
    hasAttr
    head
    isAttrs
    isBool
    isInt
    isList
    isString
    length
    ;

  isOption = value: isAttrs value && value._type or null == "option";
  isIf = value: isAttrs value && value._type or null == "if";
  isDefault = value: isAttrs value && value._type or null == "default";

  # A type: a name, a check, and how several definitions become one.
  one =
    name: check:
    {
      inherit name check;
      merge =
        path: values:
        if length values == 1 then head values else throw "stand-in: ${path} is defined ${toString (length values)} times";
    };
  mergeSets = foldl' lib.recursiveUpdate { };

  types = {
    anything = one "anything" (_: true) // {
      merge = _: values: if all isAttrs values then mergeSets values else lib.flatten values;
    };
    bool = one "boolean" isBool;
    str = one "string" isString;
    path = one "path" (value: builtins.isPath value || (isString value && lib.hasPrefix "/" value));
    package = one "package" (value: value.type or null == "derivation");
    ints.unsigned = one "unsigned integer" (value: isInt value && value >= 0);
    listOf = of: {
      name = "list of ${of.name}";
      check = value: isList value && all of.check value;
      merge = _: concatLists;
    };
    attrsOf = of: {
      name = "attribute set of ${of.name}";
      check = value: isAttrs value && all of.check (attrValues value);
      merge = _: mergeSets;
    };
    nullOr = of: {
      name = "null or ${of.name}";
      check = value: value == null || of.check value;
      inherit (of) merge;
    };
    submodule =
      { freeformType }:
      {
        name = "settings";
        check = isAttrs;
        merge = _: mergeSets;
      };
  };

  # Every definition below `path`, conditions resolved: [ { default; value; } ]
  definitions =
    path: value:
    if isIf value then
      # Whether there is a definition must not depend on the condition: `enable` itself is asked for here.
      let
        inside = definitions path value.content;
      in
      if inside == [ ] || !value.condition then [ ] else inside
    else if path == [ ] then
      [
        {
          default = isDefault value;
          value = strip value;
        }
      ]
    else if isAttrs value && hasAttr (head path) value then
      definitions (builtins.tail path) value.${head path}
    else
      [ ];
  strip =
    value:
    if isDefault value then
      strip value.content
    else if isAttrs value && !(lib.isDerivation value) then
      builtins.mapAttrs (_: strip) value
    else
      value;

  # Options as [ { path; option; } ]
  declared =
    path: set:
    if isOption set then
      [
        {
          inherit path;
          option = set;
        }
      ]
    else
      concatLists (map (name: declared (path ++ [ name ]) set.${name}) (attrNames set));
in
{
  inherit types;
  literalExpression = text: {
    _type = "literalExpression";
    inherit text;
  };
  mkOption = option: option // { _type = "option"; };
  mkEnableOption = what: {
    _type = "option";
    type = types.bool;
    default = false;
    description = "Whether to enable ${what}.";
  };
  mkIf = condition: content: {
    _type = "if";
    inherit condition content;
  };
  mkDefault = content: {
    _type = "default";
    inherit content;
  };

  # evalModules { modules; free; specialArgs; }: `free` names the roots that belong to NixOS, whose options
  # are not declared here.
  evalModules =
    {
      modules,
      free,
      specialArgs,
    }:
    let
      config = foldl' lib.recursiveUpdate { } (map setOption options ++ map setFree free);
      loaded = map (module: if lib.isFunction module then module (specialArgs // { inherit config lib; }) else { config = module; }) modules;
      options = concatLists (map (module: declared [ ] (module.options or { })) loaded);
      found = path: concatLists (map (module: definitions path (module.config or { })) loaded);
      chosen =
        path:
        let
          all = found path;
          strong = filter (d: !d.default) all;
        in
        map (d: d.value) (if strong != [ ] then strong else all);
      setOption =
        { path, option }:
        let
          name = builtins.concatStringsSep "." path;
          values = chosen path ++ lib.optional (chosen path == [ ] && option ? default) option.default;
          value = option.type.merge name values;
        in
        lib.setAttrByPath path (
          if values == [ ] then
            throw "stand-in: ${name} has no value"
          else if option.type.check value then
            value
          else
            throw "stand-in: ${name} is not of type ${option.type.name}"
        );
      setFree = name: { ${name} = types.anything.merge name (map (d: d.value) (found [ name ])); };
    in
    {
      inherit config;
      options = builtins.listToAttrs (
        map (
          { path, option }: {
            name = builtins.concatStringsSep "." path;
            value = option;
          }
        ) options
      );
    };
}
