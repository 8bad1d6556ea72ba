#!/bin/sh
# make run: boot the demo guest. On a terminal: a shell. Otherwise: a short report, power-off, status 0.
# ACCEL, CPUS, MEMORY, APPEND, FLAVOUR and BUILD come from the Makefile.
set -eu
cd "$(dirname "$0")/.."
build=${BUILD:-build}
flavour=${FLAVOUR:-cloud}
case $flavour in
cloud | amd64) ;;
*)
	echo "run: FLAVOUR=$flavour: no such kernel flavour; choose cloud or amd64" >&2
	exit 2
	;;
esac
[ -x "$build/trapline" ] || { echo "run: $build/trapline is missing; run make" >&2; exit 1; }
scripts/guest.sh "$flavour"

append="console=ttyS0 quiet panic=-1"
[ -t 0 ] || append="$append trapline.report"
exec "$build/trapline" run --accel "${ACCEL:-auto}" --cpus "${CPUS:-1}" --memory "${MEMORY:-512M}" --no-reboot \
	--kernel ".cache/guest/vmlinuz-$flavour" --initrd .cache/guest/initrd.img \
	--append "$append${APPEND:+ $APPEND}"
