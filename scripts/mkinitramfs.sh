#!/bin/sh
# Build the demo guest's initramfs: busybox, /init, (if built) the benchmark program, and kernel modules. Needs no root and
# is reproducible: same inputs, same bytes. Usage: scripts/mkinitramfs.sh BUSYBOX OUTPUT [PROGRAM | MODULES]...
# Each PROGRAM goes to /bin. MODULES is a directory with modules, named after the kernel's version. The archive is not compressed: the guest would pay for it at every boot.
set -eu
here=$(dirname "$0")
busybox=$1
output=$2
shift 2

root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
mkdir -p "$root/bin" "$root/dev" "$root/proc" "$root/sys" "$root/root" "$root/tmp" "$root/etc"
install -m 755 "$busybox" "$root/bin/busybox"
install -m 755 "$here/guest-init" "$root/init"
# The applets as links, so that nothing is installed at boot.
for applet in $("$busybox" --list); do
	[ "$applet" = busybox ] || ln -sf busybox "$root/bin/$applet"
done
# busybox's poweroff and reboot signal init and wait for it; ours is a script, so the interactive shell forces them.
cat >"$root/etc/shrc" <<'END'
alias poweroff='poweroff -f' halt='poweroff -f' reboot='reboot -f'
END
# Where the kernel looks for modprobe when it wants a file system or a protocol.
mkdir "$root/sbin"
ln -s ../bin/busybox "$root/sbin/modprobe"
for part in "$@"; do
	if [ -d "$part" ]; then
		version=$(basename "$part")
		mkdir -p "$root/lib/modules/$version"
		cp "$part"/*.ko "$root/lib/modules/$version"
		"$busybox" depmod -b "$root" "$version"
	else
		install -m 755 "$part" "$root/bin/$(basename "$part")"
	fi
done

# Sorted names, fixed times, root as owner and renumbered inodes: the bytes depend on the contents alone.
find "$root" -exec touch -h -d @0 {} +
(cd "$root" && find . -mindepth 1 | LC_ALL=C sort | cpio --quiet --reproducible -o -H newc --owner 0:0) >"$output.tmp"
mv "$output.tmp" "$output"
