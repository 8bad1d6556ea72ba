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
# The modules of every kernel that is here: one initramfs for all.
modules=
for kernel in "$guest"/vmlinuz-*; do
	for dir in "$(dirname "$(readlink -f "$kernel")")"/../lib/modules/*; do
		[ ! -d "$dir" ] || modules="$modules $(realpath "$dir")"
	done
done
inputs="$(readlink "$guest/busybox")$modules"
if newer "$guest/initrd.img" "$guest/busybox" "$guest/bench" scripts/guest-init scripts/mkinitramfs.sh scripts/fetch-guest.sh ||
	[ "$inputs" != "$(cat "$guest/initrd.inputs" 2>/dev/null)" ]; then
	echo "guest: building the initramfs" >&2
	# shellcheck disable=SC2086 # a list of directories; .cache has no spaces where make works
	scripts/mkinitramfs.sh "$guest/busybox" "$guest/initrd.img" "$guest/bench" $modules
	echo "$inputs" >"$guest/initrd.inputs"
fi
