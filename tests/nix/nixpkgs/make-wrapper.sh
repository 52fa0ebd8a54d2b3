# Stand-in for nixpkgs' makeWrapper: the flags in use, and an error for any other.
makeWrapper() {
  local target=$1 wrapper=$2 var
  shift 2
  mkdir -p "$(dirname "$wrapper")"
  {
    echo '#!/bin/bash -e'
    while [ $# -gt 0 ]; do
      case $1 in
        --inherit-argv0) exec_flags='-a "$0"'; shift ;;
        --set) printf 'export %s=%q\n' "$2" "$3"; shift 3 ;;
        --set-default) printf 'export %s="${%s-%s}"\n' "$2" "$2" "$3"; shift 3 ;;
        --prefix) printf 'export %s=%q"${%s:+%s$%s}"\n' "$2" "$4" "$2" "$3" "$2"; shift 4 ;;
        --run) printf '%s\n' "$2"; shift 2 ;;
        --add-flags) exec_args+=" $2"; shift 2 ;;
        *) echo "stand-in makeWrapper: unknown flag $1" >&2; return 1 ;;
      esac
    done
    printf 'exec %s %q%s "$@"\n' "${exec_flags-}" "$target" "${exec_args-}"
  } >"$wrapper"
  unset exec_flags exec_args
  chmod +x "$wrapper"
}
