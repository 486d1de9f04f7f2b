# Sourced by tools/test and tools/demo: installs Debian packages for commands that are missing, and nothing else.

# as_root COMMAND...: runs it as root, directly or through sudo; fails where neither is possible.
as_root() {
  if [ "$(id -u)" = 0 ]; then
    "$@"
  elif command -v sudo >/dev/null && { [ -t 0 ] || sudo -n true 2>/dev/null; }; then
    sudo "$@"
  else
    return 1
  fi
}

# apt_install PACKAGE...: refreshes the package lists once, then installs without recommended packages.
apt_install() {
  command -v apt-get >/dev/null || return 1
  if [ -z "${VOLLEY_APT_UPDATED:-}" ]; then
    # A third-party source that can't be reached must not keep the others from being refreshed.
    as_root apt-get -q -o Acquire::http::Timeout=20 -o Acquire::Retries=1 update >/dev/null 2>&1 || true
    VOLLEY_APT_UPDATED=1
  fi
  as_root env DEBIAN_FRONTEND=noninteractive \
    apt-get -q -y --no-install-recommends -o DPkg::Lock::Timeout=300 install "$@" >&2
}

# ensure COMMAND PACKAGE [COMMAND PACKAGE]...: installs, in one step, the packages of the commands (or files, where an
# absolute path is given) that are missing. Fails if one is still missing afterwards.
ensure() {
  local packages=() wanted=() item
  while [ $# -gt 0 ]; do
    wanted+=("$1")
    have "$1" || packages+=("$2")
    shift 2
  done
  [ ${#packages[@]} = 0 ] || apt_install "${packages[@]}" || true
  for item in "${wanted[@]}"; do
    have "$item" || return 1
  done
}

have() {
  case $1 in
    /*) [ -e "$1" ] ;;
    *) command -v "$1" >/dev/null 2>&1 || [ -x "/usr/sbin/$1" ] || [ -x "/sbin/$1" ] ;;
  esac
}

ensure_build_tools() { ensure cc build-essential; }

ensure_nbd_tools() { ensure nbdinfo libnbd-bin nbdcopy libnbd-bin nbdsh python3-libnbd; }

# The emulator has its own step: on a machine whose qemu-utils came from backports, Debian's qemu-system-x86 replaces
# it, so qemu-img is looked for afterwards and not before.
ensure_emulator() { ensure qemu-system-x86_64 qemu-system-x86; }

ensure_qemu_img() { ensure qemu-img qemu-utils qemu-io qemu-utils; }

ensure_image_tools() {
  ensure mmdebstrap mmdebstrap grub-mkimage grub-common /usr/lib/grub/i386-pc/boot.img grub-pc-bin \
    mke2fs e2fsprogs sfdisk fdisk
}

# debian_image FILE: makes the bootable Debian image once, atomically: FILE is whole or absent.
debian_image() {
  local image=$1 partial
  [ -f "$image" ] && return 0
  ensure_image_tools || return 1
  mkdir -p "$(dirname "$image")"
  partial=$image.partial.$$
  if as_root "$(dirname "${BASH_SOURCE[0]}")/make-debian-image" "$partial" >"$image.log" 2>&1; then
    as_root chown "$(id -u):$(id -g)" "$partial" && mv "$partial" "$image"
  else
    as_root rm -f "$partial"
    tail -n 20 "$image.log" >&2
    return 1
  fi
}
