#!/bin/bash
# make demo-disk: a Debian 12 system in .cache/demo, made from Debian packages by debootstrap:
#   base.qcow2            the disk: one ext4 file system, no partition table (boot it with --disk base.qcow2,overlay)
#   vmlinuz, initrd.img   the kernel that is installed on it, and an initial ramdisk for it with the virtio drivers
#   id_ed25519            the key that root's ssh login takes, made on the spot; known_hosts has the system's own
# Kept until this recipe changes. Needs root (by sudo if need be) for the owners and device nodes of the system's files; no loop
# mounts, no kernel modules. DEMO_MIRROR names a Debian mirror (default: that of this system's sources).
# Prints steps with their times; on a terminal also what debootstrap is doing just now.
set -euo pipefail
cd "$(dirname "$0")/.."
demo=$PWD/.cache/demo
log=$demo/build.log
suite=bookworm
packages=systemd-sysv,udev,dbus,openssh-server,iproute2,iputils-ping,netbase,fio,iperf3,linux-image-cloud-amd64,kmod,procps,zstd
disk_size=3G
start=$SECONDS

say() { printf 'demo-disk: %s\n' "$*" >&2; }
die() {
	[ ! -t 2 ] || printf '\r\033[K' >&2
	say "$*"
	exit 1
}
step() { say "$(printf '%3d s' $((SECONDS - start)))  $*"; }

recipe=$(sha256sum <scripts/demo-disk.sh | cut -c 1-64)
complete() {
	[ "$(cat "$demo/recipe" 2>/dev/null)" = "$recipe" ] && [ -f "$demo/base.qcow2" ] && [ -f "$demo/vmlinuz" ] &&
		[ -f "$demo/initrd.img" ] && [ -f "$demo/id_ed25519" ]
}
! complete || exit 0

mkdir -p "$demo"
exec 9>"$demo/lock"
flock -n 9 || { say "another build is under way; waiting for it" && flock 9; }
! complete || exit 0

scripts/deps.sh demo
if [ "$(id -u)" != 0 ]; then
	command -v sudo >/dev/null || die "root is needed to make the files of a Debian system (owners, device nodes) and there is no sudo; run make demo-disk as root"
	say "asking sudo for root: debootstrap makes files of other owners"
	exec 9>&-
	sudo DEMO_MIRROR="${DEMO_MIRROR:-}" scripts/demo-disk.sh
	exec sudo chown -R "$(id -u):$(id -g)" "$demo"
fi
umask 022

# The mirror that apt uses here, so that a proxy or a local mirror is found without asking.
mirror=${DEMO_MIRROR:-$(apt-get indextargets --format '$(SITE) $(RELEASE) $(COMPONENT)' 2>/dev/null | awk -v s=$suite '$2 == s && $3 == "main" { print $1; exit }')}
mirror=${mirror:-http://deb.debian.org/debian}

work=$(mktemp -d "$demo/build.XXXXXX")
root=$work/root
cleanup() {
	# debootstrap may have left its proc mounted in there.
	! mountpoint -q "$root/proc" || umount "$root/proc"
	! mountpoint -q "$root/sys" || umount "$root/sys"
	rm -rf --one-file-system "$work"
}
trap cleanup EXIT
: >"$log"

# One line for what is happening now: debootstrap says "I: Retrieving libfoo 1.2".
progress() {
	local n=0 line
	while IFS= read -r line; do
		printf '%s\n' "$line" >>"$log"
		case $line in
		"I: Retrieving "* | "I: Extracting "* | "I: Unpacking "* | "I: Configuring "*) n=$((n + 1)) ;;
		*) continue ;;
		esac
		[ ! -t 2 ] || printf '\r\033[K           %3d s  %4d  %.60s' $((SECONDS - start)) $n "${line#I: }" >&2
	done
	[ ! -t 2 ] || printf '\r\033[K' >&2
}
# Run a command with its output in the log; on failure its last lines.
run() {
	if ! "$@" </dev/null 2>&1 | progress; then
		tail -15 "$log" >&2
		die "$1 failed (its last lines are above; all of them are in $log)"
	fi
}

step "downloading Debian $suite from $mirror"
mkdir -p "$demo/debs" "$root"
run debootstrap --foreign --variant=minbase --include="$packages" --cache-dir="$demo/debs" $suite "$root" "$mirror"

step "installing $(find "$root/var/cache/apt/archives" -name '*.deb' | wc -l) packages"
# Before they are configured: nobody reads documentation in there, and the initial ramdisk needs what this machine has, no more.
mkdir -p "$root/etc/dpkg/dpkg.cfg.d" "$root/etc/initramfs-tools/conf.d" "$root/usr/share/initramfs-tools/modules.d"
# Its disk is known, so nothing in the initial ramdisk has to wait for udev to find it.
printf '%s\n' force-unsafe-io 'path-exclude=/usr/share/doc/*' 'path-exclude=/usr/share/man/*' 'path-exclude=/usr/share/locale/*' \
	'path-exclude=/usr/share/initramfs-tools/*/udev' >"$root/etc/dpkg/dpkg.cfg.d/demo"
printf '%s\n' MODULES=list COMPRESS=zstd RESUME=none >"$root/etc/initramfs-tools/conf.d/demo"
printf '%s\n' virtio_pci virtio_mmio virtio_blk ext4 crc32c_generic >"$root/usr/share/initramfs-tools/modules.d/demo"
# No service is started while its package is configured.
printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
chmod 755 "$root/usr/sbin/policy-rc.d"
run chroot "$root" env DEBIAN_FRONTEND=noninteractive LC_ALL=C /debootstrap/debootstrap --second-stage

step "setting the system up"
rm -f "$root/usr/sbin/policy-rc.d" "$root/etc/dpkg/dpkg.cfg.d/demo" "$root/var/cache/apt/archives"/*.deb "$root/var/cache/apt"/*.bin
rm -rf "$root/var/lib/apt/lists"/*
echo trapline >"$root/etc/hostname"
printf '127.0.0.1\tlocalhost trapline\n::1\tlocalhost\n' >"$root/etc/hosts"
printf '/dev/vda / ext4 defaults 0 0\n' >"$root/etc/fstab"
echo "deb http://deb.debian.org/debian $suite main" >"$root/etc/apt/sources.list"
# Any card, by DHCP; ssh does not wait for it. The name server is that of --net user.
mkdir -p "$root/etc/systemd/network"
printf '[Match]\nType=ether\n\n[Network]\nDHCP=yes\nIPv6AcceptRA=yes\n\n[DHCPv4]\nUseDNS=no\n' >"$root/etc/systemd/network/demo.network"
rm -f "$root/etc/resolv.conf"
echo "nameserver 10.0.2.3" >"$root/etc/resolv.conf"
run chroot "$root" systemctl enable systemd-networkd.service ssh.service
run chroot "$root" systemctl disable systemd-networkd-wait-online.service systemd-pstore.service
# What a server in a VM does not need, each a program less to start at boot (systemd.generator(7) for the generators).
run chroot "$root" systemctl mask apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service fstrim.timer \
	getty@tty1.service systemd-network-generator.service systemd-random-seed.service systemd-binfmt.service proc-sys-fs-binfmt_misc.automount \
	systemd-update-utmp.service systemd-update-utmp-runlevel.service systemd-ask-password-console.path systemd-ask-password-wall.path \
	modprobe@configfs.service modprobe@dm_mod.service modprobe@drm.service modprobe@fuse.service modprobe@loop.service \
	sys-kernel-config.mount sys-kernel-debug.mount sys-kernel-tracing.mount sys-fs-fuse-connections.mount dev-hugepages.mount
mkdir -p "$root/etc/systemd/system-generators"
for generator in cryptsetup debug gpt-auto hibernate-resume integritysetup rc-local run system-update sysv veritysetup; do
	ln -s /dev/null "$root/etc/systemd/system-generators/systemd-$generator-generator"
done
# Loaded for the processor's features; nothing in the kernel of this system encrypts.
for module in aesni_intel ghash_clmulni_intel sha512_ssse3 sha256_ssse3 sha1_ssse3 crc32_pclmul crct10dif_pclmul serio_raw qemu_fw_cfg; do
	echo "blacklist $module"
done >"$root/etc/modprobe.d/demo.conf"
# The console belongs to whoever started the VM.
mkdir -p "$root/etc/systemd/system/serial-getty@ttyS0.service.d"
printf '[Service]\nExecStart=\nExecStart=-/sbin/agetty --autologin root --keep-baud 115200,57600,38400,9600 - $TERM\n' \
	>"$root/etc/systemd/system/serial-getty@ttyS0.service.d/demo.conf"
# The key, and no passwords.
[ -f "$demo/id_ed25519" ] || ssh-keygen -q -t ed25519 -N '' -C "trapline demo" -f "$demo/id_ed25519"
install -d -m 700 "$root/root/.ssh"
install -m 600 "$demo/id_ed25519.pub" "$root/root/.ssh/authorized_keys"
mkdir -p "$root/etc/ssh/sshd_config.d"
printf 'PasswordAuthentication no\nUseDNS no\n' >"$root/etc/ssh/sshd_config.d/demo.conf"
sed 's/^/trapline /; s/ root@[^ ]*$//' "$root/etc/ssh/ssh_host_ed25519_key.pub" >"$demo/known_hosts.new"
chroot "$root" systemd-machine-id-setup >>"$log" 2>&1
# systemd warns about a boot before the time its files were made.
touch "$root/etc/.updated" "$root/var/.updated"

kernel=$(find "$root/boot" -name 'vmlinuz-*' | sort -V | tail -1)
initrd=$(find "$root/boot" -name 'initrd.img-*' | sort -V | tail -1)
[ -n "$kernel" ] && [ -n "$initrd" ] || die "the system has no kernel or no initial ramdisk in /boot; see $log"
cp "$kernel" "$demo/vmlinuz.new"
# Unpacked: decompressing it is the guest's time at every boot.
unpack_initrd() {
	case $(head -c 4 "$1" | od -An -tx1 | tr -d ' ') in
	28b52ffd) zstd -qdc "$1" ;;
	1f8b*) gzip -dc "$1" ;;
	*) cat "$1" ;;
	esac
}
unpack_initrd "$initrd" >"$demo/initrd.img.new"

step "making the file system"
run mkfs.ext4 -q -F -L demo -E root_owner=0:0,lazy_itable_init=0 -d "$root" "$work/disk.raw" $disk_size
step "converting it to qcow2"
run qemu-img convert -q -f raw -O qcow2 -o lazy_refcounts=off "$work/disk.raw" "$demo/base.qcow2.new"
rm -f "$demo/recipe"
for file in vmlinuz initrd.img known_hosts base.qcow2; do
	mv "$demo/$file.new" "$demo/$file"
done
echo "$recipe" >"$demo/recipe"
step "done: .cache/demo/base.qcow2 ($(du -h "$demo/base.qcow2" | cut -f 1))"
