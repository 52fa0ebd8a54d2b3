# Test double of nixpkgs' lib: the functions that the flake uses, with their real argument order and
# results, and no others: an attribute that is missing here stops the evaluation. nix/lib's tests give the
# same results with the real lib.
let
  inherit (builtins)
    attrNames
    concatMap
    filter
    hasAttr
    head
    isAttrs
    isFunction
    isList
    isString
    length
    listToAttrs
    stringLength
    substring
    ;

  lib = {
    inherit (builtins)
      all
      any
      attrNames
      attrValues
      concatMap
      concatStringsSep
      elem
      elemAt
      filter
      foldl'
      functionArgs
      genList
      hasAttr
      head
      isAttrs
      isBool
      isFloat
      isFunction
      isInt
      isList
      isPath
      isString
      length
      listToAttrs
      map
      mapAttrs
      match
      removeAttrs
      replaceStrings
      stringLength
      substring
      tail
      toJSON
      ;

    id = x: x;
    fix =
      f:
      let
        x = f x;
      in
      x;
    max = a: b: if a > b then a else b;
    min = a: b: if a < b then a else b;
    importJSON = path: builtins.fromJSON (builtins.readFile path);
    importTOML = path: builtins.fromTOML (builtins.readFile path);

    # attribute sets
    genAttrs =
      names: f:
      listToAttrs (
        map (name: {
          inherit name;
          value = f name;
        }) names
      );
    nameValuePair = name: value: { inherit name value; };
    mapAttrs' = f: set: listToAttrs (map (name: f name set.${name}) (attrNames set));
    mapAttrsToList = f: set: map (name: f name set.${name}) (attrNames set);
    concatMapAttrs = f: set: builtins.foldl' (a: b: a // b) { } (lib.mapAttrsToList f set);
    filterAttrs =
      keep: set: removeAttrs set (filter (name: !(keep name set.${name})) (attrNames set));
    optionalAttrs = condition: set: if condition then set else { };
    isDerivation = value: value.type or null == "derivation";
    recursiveUpdate =
      a: b:
      a
      // builtins.mapAttrs (
        name: value:
        if isAttrs value && isAttrs (a.${name} or null) && !(lib.isDerivation value) then
          lib.recursiveUpdate a.${name} value
        else
          value
      ) b;
    attrByPath =
      path: default: set:
      if path == [ ] then
        set
      else if isAttrs set && hasAttr (head path) set then
        lib.attrByPath (builtins.tail path) default set.${head path}
      else
        default;
    getAttrFromPath = path: set: lib.attrByPath path (throw "no attribute ${toString path}") set;
    setAttrByPath =
      path: value:
      if path == [ ] then value else { ${head path} = lib.setAttrByPath (builtins.tail path) value; };

    # lists
    optional = condition: value: if condition then [ value ] else [ ];
    optionals = condition: list: if condition then list else [ ];
    unique = builtins.foldl' (seen: x: if builtins.elem x seen then seen else seen ++ [ x ]) [ ];
    subtractLists = away: filter (x: !(builtins.elem x away));
    toList = x: if isList x then x else [ x ];
    # Right for names that start with numbers of equal width, the one use here.
    naturalSort = builtins.sort builtins.lessThan;
    flatten = x: if isList x then concatMap lib.flatten x else [ x ];

    # strings
    optionalString = condition: text: if condition then text else "";
    concatStrings = builtins.concatStringsSep "";
    concatMapStrings = f: list: builtins.concatStringsSep "" (map f list);
    concatMapStringsSep =
      separator: f: list:
      builtins.concatStringsSep separator (map f list);
    concatLines = lib.concatMapStrings (line: line + "\n");
    hasPrefix = prefix: text: substring 0 (stringLength prefix) text == prefix;
    hasSuffix =
      suffix: text:
      stringLength text >= stringLength suffix
      && substring (stringLength text - stringLength suffix) (-1) text == suffix;
    hasInfix = infix: text: length (builtins.split (lib.escapeRegex infix) text) > 1;
    escapeRegex = builtins.replaceStrings (map (c: c) [ "." "*" "+" "?" "(" ")" "[" "{" "\\" "^" "$" "|" ]) (
      map (c: "\\" + c) [ "." "*" "+" "?" "(" ")" "[" "{" "\\" "^" "$" "|" ]
    );
    removeSuffix =
      suffix: text:
      if lib.hasSuffix suffix text then substring 0 (stringLength text - stringLength suffix) text else text;
    removePrefix =
      prefix: text:
      if lib.hasPrefix prefix text then substring (stringLength prefix) (-1) text else text;
    splitString =
      separator: text: filter isString (builtins.split (lib.escapeRegex separator) text);
    escapeShellArg = arg: "'${builtins.replaceStrings [ "'" ] [ "'\\''" ] (toString arg)}'";
    escapeShellArgs = args: builtins.concatStringsSep " " (map lib.escapeShellArg args);
    versionOlder = a: b: builtins.compareVersions a b < 0;
    versionAtLeast = a: b: !(lib.versionOlder a b);
    getVersion = x: if isString x then (builtins.parseDrvName x).version else x.version;
    cmakeFeature = name: value: "-D${name}:STRING=${value}";
    cmakeBool = name: value: "-D${name}:BOOL=${if value then "TRUE" else "FALSE"}";

    # derivations
    getOutput = output: package: package.${output} or package.out or package;
    getLib = lib.getOutput "lib";
    getBin = lib.getOutput "bin";
    getExe' = package: name: "${lib.getBin package}/bin/${name}";
    getExe =
      package:
      lib.getExe' package (
        package.meta.mainProgram or (throw "getExe: ${package.name} has no meta.mainProgram")
      );
    makeBinPath = packages: builtins.concatStringsSep ":" (map (p: "${lib.getBin p}/bin") packages);
    makeOverridable =
      f: args:
      let
        result = f args;
        override = more: lib.makeOverridable f (args // (if isFunction more then more args else more));
      in
      if isAttrs result then
        result // { inherit override; }
      else if isFunction result then
        {
          __functor = _: result;
          inherit override;
        }
      else
        result;
    setFunctionArgs = f: args: {
      __functor = _: f;
      __functionArgs = args;
    };
    cleanSource =
      src:
      builtins.path {
        path = src;
        name = "source";
        filter = path: _: !(builtins.elem (baseNameOf path) [ ".git" ]) && !(lib.hasSuffix "~" path);
      };
    fileset = throw "the stand-in has no lib.fileset";

    licenses = {
      asl20 = {
        shortName = "asl20";
        free = true;
      };
      bsd3 = {
        shortName = "bsd3";
        free = true;
      };
      mit = {
        shortName = "mit";
        free = true;
      };
      nvidiaCudaRedist = {
        shortName = "CUDA EULA";
        free = false;
      };
    };
    sourceTypes.binaryNativeCode = {
      shortName = "binaryNativeCode";
      isSource = false;
    };
    platforms.linux = [
      "aarch64-linux"
      "x86_64-linux"
    ];

    runTests =
      tests:
      concatMap (
        name:
        let
          test = tests.${name};
        in
        if !(lib.hasPrefix "test" name) || test.expr == test.expected then
          [ ]
        else
          [
            {
              inherit name;
              inherit (test) expected;
              result = test.expr;
            }
          ]
      ) (attrNames tests);
  }
  // import ./modules.nix { inherit lib; };
in
lib
