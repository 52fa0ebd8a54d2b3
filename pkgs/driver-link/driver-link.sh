# Links the host's NVIDIA user-space libraries into /run/opengl-driver/lib.
#
# Programs from the Nix store look for libcuda.so.1 there and nowhere else: their loader does not know
# /etc/ld.so.cache, and the distribution's whole library folder cannot be added, because it would mix two
# glibcs (numtide/nix-gl-host#9). So only NVIDIA's own files are linked, by name. As links, they follow
# a driver upgrade by the distribution. NixOS makes the folder itself; there this does nothing.
#
#   driver-link            link, or do nothing when it is done
#   driver-link --check    only say whether it would work
#   driver-link --remove   take away what this made
#   driver-link --root DIR … below another root (tests, images)

allowed=(
  'libcuda.so*'
  'libcudadebugger.so*'
  'libnvidia-allocator.so*'
  'libnvidia-cfg.so*'
  'libnvidia-gpucomp.so*'
  'libnvidia-ml.so*'
  'libnvidia-nvvm*.so*'
  'libnvidia-opencl.so*'
  'libnvidia-ptxjitcompiler.so*'
)

root='' action=link
while [ $# -gt 0 ]; do
  case $1 in
    --root) root=${2:?--root needs a folder}; root=${root%/}; shift 2 ;;
    --check) action=check; shift ;;
    --remove) action=remove; shift ;;
    *) echo "driver-link: unknown argument $1 (known: --root DIR, --check, --remove)" >&2; exit 2 ;;
  esac
done

farm=$root/run/opengl-driver
mark=$farm/.made-by-spark-llm

fail() { echo "driver-link: $*" >&2; exit 1; }

if [ "$action" = remove ]; then
  if [ -e "$mark" ]; then rm -rf -- "$farm"; echo "driver-link: removed $farm"; fi
  exit 0
fi

if [ -e "$root/run/current-system" ]; then
  echo "driver-link: this is NixOS, which provides $farm itself (hardware.graphics.enable); nothing to do"
  exit 0
fi
if [ -e "$farm" ] && [ ! -e "$mark" ]; then
  [ -e "$farm/lib/libcuda.so.1" ] ||
    fail "$farm exists, was not made by spark-llm and holds no lib/libcuda.so.1. Remove it, or link the driver's libraries there."
  echo "driver-link: $farm is provided by something else and has libcuda.so.1; left alone"
  exit 0
fi

libraries=
for folder in /usr/lib/"$(uname -m)"-linux-gnu /usr/lib64 /usr/lib; do
  if [ -e "$root$folder/libcuda.so.1" ]; then libraries=$folder; break; fi
done
[ -n "$libraries" ] ||
  fail "no libcuda.so.1 in /usr/lib/$(uname -m)-linux-gnu, /usr/lib64 or /usr/lib. Install the NVIDIA driver's libraries (DGX OS: sudo apt install --reinstall libnvidia-compute-580, or the series that nvidia-smi names)."

[ -r "$root/proc/driver/nvidia/version" ] ||
  fail "the NVIDIA kernel module is not loaded (/proc/driver/nvidia/version is absent). Try: sudo modprobe nvidia. If that fails, reboot into the kernel that the driver was built for."
kernel=$(grep -m1 '^NVRM' "$root/proc/driver/nvidia/version" | grep -oE '[0-9]+\.[0-9]+(\.[0-9]+)?' | head -n1) ||
  fail "cannot read a version from /proc/driver/nvidia/version; its first line: $(head -n1 "$root/proc/driver/nvidia/version")"

real=$(readlink -e "$root$libraries/libcuda.so.1") || fail "$libraries/libcuda.so.1 points nowhere: the driver's package is damaged. Reinstall it."
user=${real##*/libcuda.so.}
[ "$user" = "$kernel" ] ||
  fail "libcuda is $user and the loaded kernel module is $kernel: the driver was upgraded since the last boot. Reboot (NixOS/nixpkgs#255070)."

if [ "$action" = check ]; then
  echo "driver-link: driver $kernel, libraries in $libraries"
  exit 0
fi

# A fresh folder and one rename of a link: a process that starts meanwhile sees the old set or the new.
mkdir -p "$farm"
: >"$mark"
generation=$farm/.lib.$kernel.$$
mkdir "$generation"
count=0
for pattern in "${allowed[@]}"; do
  for library in "$root$libraries"/$pattern; do
    [ -e "$library" ] || continue
    ln -s "$libraries/${library##*/}" "$generation/${library##*/}"
    count=$((count + 1))
  done
done
ln -s "${generation##*/}" "$farm/lib.new"
old=$(readlink "$farm/lib" || true)
mv -T "$farm/lib.new" "$farm/lib"
[ -z "$old" ] || rm -rf -- "${farm:?}/$old"

if [ -x "$root/usr/bin/nvidia-smi" ]; then
  mkdir -p "$farm/bin"
  ln -sfn /usr/bin/nvidia-smi "$farm/bin/nvidia-smi"
fi
echo "driver-link: $count libraries of driver $kernel linked into $farm/lib"
