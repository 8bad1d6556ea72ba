#!/bin/sh
# Fetch the demo guest's parts as Debian packages and unpack what we use, all under .cache/guest and without root:
#   .cache/guest/vmlinuz-cloud   the kernel that linux-image-cloud-amd64 depends on
#   .cache/guest/vmlinuz-amd64   the kernel that linux-image-amd64 depends on
#   .cache/guest/busybox         the program of busybox-static
#   .cache/guest/busybox-i386    the same for i386: 32-bit programs for the tests
# A kernel's directory also has the few modules that the initramfs takes (MODULES below), as lib/modules/VERSION/*.ko.
# Each is a link to a directory named after package and version, so a newer version is fetched once and the old one stays
# usable offline. Usage: scripts/fetch-guest.sh [cloud] [amd64] [busybox] [busybox-i386]   (default: cloud busybox)
set -eu
cd "$(dirname "$0")/.."
cache=$PWD/.cache
guest=$cache/guest
mkdir -p "$guest"
[ $# -gt 0 ] || set -- cloud busybox

# The virtio drivers, what they and ext4 depend on, and what tests mount; names of files, - or _ as the kernel has them.
MODULES="virtio virtio_ring virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_mmio
	virtio_blk failover net_failover virtio_net virtio_console virtio_balloon virtio-rng virtio_mem
	vsock vmw_vsock_virtio_transport_common vmw_vsock_virtio_transport fuse virtiofs
	button evdev
	crc16 libcrc32c crc32c_generic crc32c-intel mbcache jbd2 ext4 overlay"

say() { echo "guest: $*" >&2; }
die() { say "$*"; exit 1; }

# apt's options: none for the system's lists; later our own lists, which need no root to refresh.
apt_options=
own_lists() { # part
	mkdir -p "$cache/apt/lists/partial" "$cache/apt/archives/partial"
	apt_options="-o Dir::State::lists=$cache/apt/lists -o Dir::Cache=$cache/apt -o APT::Sandbox::User=$(id -un)"
	# Only here: the system's apt and dpkg need not know of i386.
	[ "$1" != busybox-i386 ] || apt_options="$apt_options -o APT::Architectures::=amd64 -o APT::Architectures::=i386"
	say "refreshing the Debian package lists in .cache/apt"
	# shellcheck disable=SC2086
	apt-get $apt_options update -qq >"$cache/apt/update.log" 2>&1 || true
}

# The version that apt would install, from the lists alone (no network); empty if the lists do not know it.
candidate() {
	# shellcheck disable=SC2086
	apt-cache $apt_options policy "$1" 2>/dev/null | sed -n 's/^  Candidate: //p' | grep -v '(none)' || true
}

# The real image package behind a metapackage.
image_of() {
	# shellcheck disable=SC2086
	apt-cache $apt_options depends "$1" 2>/dev/null | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p' | head -1
}

download() { # package version directory
	say "downloading $1 $2"
	rm -rf "$3.tmp"
	mkdir -p "$3.tmp"
	# shellcheck disable=SC2086
	(cd "$3.tmp" && apt-get $apt_options -o APT::Sandbox::User="$(id -un)" download -qq "$1=$2") >"$guest/download.log" 2>&1 ||
		return 1
	mv "$3.tmp"/*.deb "$3.tmp/package.deb"
}

# Of the package unpacked in DIR/all, what we use, to DIR.
keep_from_package() { # directory
	for part in boot bin usr; do
		[ ! -e "$1/all/$part" ] || mv "$1/all/$part" "$1/$part"
	done
	for version in "$1"/all/lib/modules/*; do
		[ -d "$version" ] || continue
		to=$1/lib/modules/$(basename "$version")
		mkdir -p "$to"
		for module in $MODULES; do
			find "$version/kernel" -name "$module.ko" -exec mv {} "$to" \;
		done
		echo "$MODULES" >"$1/modules"
	done
}

# fetch_from_lists NAME: bring one part into the cache using the lists in force. 0 done, 1 failed.
fetch_from_lists() {
	case $1 in
	cloud | amd64)
		meta=linux-image-amd64
		[ "$1" = amd64 ] || meta=linux-image-cloud-amd64
		package=$(image_of $meta)
		link=$guest/vmlinuz-$1
		;;
	busybox)
		package=busybox-static
		link=$guest/busybox
		;;
	busybox-i386)
		package=busybox-static:i386
		link=$guest/busybox-i386
		;;
	*) die "unknown part \"$1\"; the parts are cloud, amd64, busybox and busybox-i386" ;;
	esac
	[ -n "$package" ] || return 1
	version=$(candidate "$package")
	[ -n "$version" ] || return 1
	dir=$guest/$(echo "${package}_$version" | tr : %)
	if [ ! -d "$dir" ] || { [ "${1%-i386}" != busybox ] && [ "$(cat "$dir/modules" 2>/dev/null)" != "$MODULES" ]; }; then
		if download "$package" "$version" "$dir"; then
			# Only what the guest needs: a kernel package's modules are 300 MB.
			mkdir "$dir.tmp/all"
			dpkg-deb --fsys-tarfile "$dir.tmp/package.deb" | tar -x -C "$dir.tmp/all" --wildcards './boot/*' \
				'./bin/busybox' './usr/bin/busybox' './lib/modules/*' 2>/dev/null || true
			keep_from_package "$dir.tmp"
			rm -rf "$dir.tmp/package.deb" "$dir.tmp/all" "$dir"
			mv "$dir.tmp" "$dir"
		elif [ ! -d "$dir" ]; then
			return 1 # else: an older cache without these modules, and no mirror; the guest has what there is
		fi
	fi
	file=$(find "$dir" -type f \( -name 'vmlinuz-*' -o -name busybox \) | head -1)
	[ -n "$file" ] || { rm -rf "$dir"; return 1; }
	# Replaced in one step: a parallel reader sees the old link or the new.
	ln -sfn "${file#"$guest/"}" "$link.new.$$" && mv -fT "$link.new.$$" "$link"
}

command -v apt-get >/dev/null || {
	for part in "$@"; do
		[ -e "$guest/vmlinuz-$part" ] || [ -e "$guest/$part" ] ||
			die "no apt-get here; put a kernel at .cache/guest/vmlinuz-cloud and a static busybox at .cache/guest/busybox"
	done
	exit 0
}

# One fetch at a time: two makes share the cache.
exec 9>"$guest/lock"
flock 9
for part in "$@"; do
	# Any version will do, and the lists for i386 are not the system's.
	[ "$part" != busybox-i386 ] || [ ! -e "$guest/$part" ] || continue
	fetch_from_lists "$part" && continue
	case $part:$apt_options in
	*: | busybox-i386:*) own_lists "$part" ;;
	esac
	fetch_from_lists "$part" && continue
	link=$guest/vmlinuz-$part
	[ "${part%-i386}" != busybox ] || link=$guest/$part
	if [ -e "$link" ]; then
		say "could not reach a Debian mirror; using the cached $(readlink "$link")"
		continue
	fi
	tail -5 "$cache/apt/update.log" "$guest/download.log" >&2 2>/dev/null || true
	die "could not download the Debian package for \"$part\"; check the network and /etc/apt/sources.list, then run make again"
done
