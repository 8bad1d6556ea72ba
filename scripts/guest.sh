#!/bin/sh
# Make the demo guest ready: kernels (cloud by default; name more), busybox, the benchmark program and the initramfs
# .cache/guest/initrd.img. Does nothing that is done already; the network is needed only for what is not cached.
set -eu
cd "$(dirname "$0")/.."
guest=.cache/guest
[ $# -gt 0 ] || set -- cloud
scripts/deps.sh guest
scripts/fetch-guest.sh "$@" busybox

newer() { # target sources...: is the target older than a source, or missing?
	target=$1
	shift
	[ -e "$target" ] || return 0
	[ -n "$(find -L "$@" -newer "$target")" ]
}

exec 9>"$guest/lock"
flock 9
if newer "$guest/bench" bench/guest/bench.c; then
	cc -O2 -static -Wall -Wextra -o "$guest/bench.new" bench/guest/bench.c
	mv "$guest/bench.new" "$guest/bench"
fi
if newer "$guest/initrd.img" "$guest/busybox" "$guest/bench" scripts/guest-init scripts/mkinitramfs.sh ||
	[ "$(readlink "$guest/busybox")" != "$(cat "$guest/initrd.busybox" 2>/dev/null)" ]; then
	echo "guest: building the initramfs" >&2
	scripts/mkinitramfs.sh "$guest/busybox" "$guest/initrd.img" "$guest/bench"
	readlink "$guest/busybox" >"$guest/initrd.busybox"
fi
