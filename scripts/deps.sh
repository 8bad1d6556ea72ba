#!/bin/sh
# Install the Debian packages that a step needs and that are not there yet, saying which.
# Usage: scripts/deps.sh build|guest|test|bench|demo|fuzz
set -eu

case "${1:-}" in
build)
	need="build-essential meson ninja-build pkg-config libzydis-dev libcmocka-dev acpica-tools"
	need="$need libslirp-dev" # --net user
	need="$need libnbd-dev"	  # --disk nbd://...
	need="$need liburing-dev" # asynchronous file I/O
	need="$need zlib1g-dev libzstd-dev" # compressed qcow2 clusters
	need="$need libjansson-dev" # the control socket's JSON
	;;
guest) need="cpio" ;;
test)
	need="cpio python3 python3-pytest python3-pexpect"
	need="$need passt iproute2" # --net passt; --net tap's namespace
	need="$need nbdkit qemu-utils gnutls-bin" # peers of the NBD client; qemu-img makes and judges qcow2 images
	need="$need qemu-system-common" # qemu-storage-daemon and virtiofsd: vhost-user back ends
	need="$need lz4" # the kernel inside a vmlinuz
	need="$need openssh-client iperf3" # into the demo system, and the soak's traffic
	need="$need gdb binutils" # the gdb stub's client, and the tools that make it a symbol file
	;;
bench) need="cpio python3 python3-pexpect qemu-system-x86 openssh-client iperf3 passt iproute2" ;;
demo) need="debootstrap e2fsprogs qemu-utils openssh-client zstd" ;;
fuzz) need="clang libclang-rt-dev" ;;
*)
	echo "usage: scripts/deps.sh build|guest|test|bench|demo|fuzz" >&2
	exit 2
	;;
esac

if ! command -v dpkg-query >/dev/null; then
	# Not Debian: say what is needed and let the build find out what is missing.
	echo "deps: this is not a Debian system; make sure that the equivalents of these are installed: $need" >&2
	exit 0
fi

missing=
for package in $need; do
	case "$(dpkg-query -W -f='${db:Status-Abbrev}' "$package" 2>/dev/null || true)" in
	ii*) ;;
	*) missing="$missing $package" ;;
	esac
done
[ -n "$missing" ] || exit 0

as_root=
if [ "$(id -u)" != 0 ]; then
	if ! command -v sudo >/dev/null; then
		echo "deps: these Debian packages are missing and there is no sudo; run as root: apt-get install$missing" >&2
		exit 1
	fi
	as_root="sudo"
fi

echo "deps: installing Debian packages:$missing"
install_missing() {
	# shellcheck disable=SC2086 # a list of words
	$as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing
}

# No lists, or lists so old that their packages are gone from the mirror: refresh, then once more.
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! install_missing >"$log" 2>&1; then
	echo "deps: refreshing the package lists"
	if ! $as_root apt-get update -qq >>"$log" 2>&1; then
		# One broken third-party source must not stop us while Debian's own are fine.
		echo "deps: apt-get update had errors; going on with the lists there are" >&2
	fi
	if ! install_missing >"$log" 2>&1; then
		tail -20 "$log" >&2
		echo "deps: apt-get could not install:$missing (its last lines are above); install them and run make again" >&2
		exit 1
	fi
fi
