#!/bin/bash
# make demo: boot the Debian system of make demo-disk on a throw-away overlay, wait for its ssh server and log in. On a terminal: a shell;
# leaving it shuts the guest down from the inside. Otherwise: two commands, then the same. Ends with the VMM's status.
# ACCEL, CPUS, MEMORY, APPEND and BUILD come from the Makefile; DEMO_TIMEOUT is how many seconds the boot may
# take (180), DEMO_RUN another command for a run without a terminal.
set -euo pipefail
cd "$(dirname "$0")/.."
build=${BUILD:-build}
demo=$PWD/.cache/demo
limit=${DEMO_TIMEOUT:-180}
[ -x "$build/trapline" ] || { echo "demo: $build/trapline is missing; run make" >&2; exit 1; }
scripts/demo-disk.sh

say() { printf 'demo: %s\n' "$*" >&2; }
# Seconds with one decimal since the VM was started.
elapsed() { awk -v a="$start" -v b="$(date +%s.%N)" 'BEGIN { printf "%.1f", b - a }'; }

port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
console=$demo/console.log
scratch=$(mktemp -d)
ssh_options=(-i "$demo/id_ed25519" -p "$port" -o "UserKnownHostsFile=$demo/known_hosts" -o HostKeyAlias=trapline -o StrictHostKeyChecking=yes
	-o BatchMode=yes -o LogLevel=ERROR -o ConnectTimeout=30 -o "ControlPath=$scratch/ssh")
in_guest() { ssh "${ssh_options[@]}" root@127.0.0.1 "$@"; }
# One connection, which later commands share.
log_in() { ssh "${ssh_options[@]}" -M -N -f root@127.0.0.1 >/dev/null 2>&1; }
# Its console says so; or (nothing is on the console) it greets. No waiting for a greeting that was asked for before there was a network:
# the user network would ask the guest ever less often.
ssh_is_up() {
	grep -q 'Started .*ssh\.service' "$console" 2>/dev/null ||
		timeout 1 bash -c 'exec 3<>"/dev/tcp/127.0.0.1/$1" && read -r line <&3 && [[ $line == SSH-* ]]' bash "$port" 2>/dev/null
}

vm=
cleanup() {
	rm -rf "$scratch"
	[ -z "$vm" ] || ! kill -0 "$vm" 2>/dev/null || { say "ending the VM"; kill "$vm"; wait "$vm" || true; }
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

rm -f "$console"
start=$(date +%s.%N)
"$build/trapline" run --accel "${ACCEL:-auto}" --cpus "${CPUS:-2}" --memory "${MEMORY:-1G}" --kernel "$demo/vmlinuz" --initrd "$demo/initrd.img" \
	--append "root=/dev/vda rw console=ttyS0 panic=-1${APPEND:+ $APPEND}" --disk "$demo/base.qcow2,overlay" \
	--net "user,hostfwd=tcp:127.0.0.1:$port-:22" --balloon on --serial "file:$console" --no-reboot </dev/null &
vm=$!

# A line that tells what the guest is doing: the last one of its console.
progress() {
	[ -t 2 ] || return 0
	printf '\r\033[K  %5s s  %.70s' "$(elapsed)" "$(tail -c 400 "$console" 2>/dev/null | tr -d '\r' | sed 's/\x1b\[[0-9;?]*[A-Za-z]//g' | grep . | tail -n 1)" >&2
}
done_progress() { [ ! -t 2 ] || printf '\r\033[K' >&2; }

say "booting Debian 12 from .cache/demo/base.qcow2 (a throw-away overlay; console in .cache/demo/console.log)"
until ssh_is_up && log_in; do
	if ! kill -0 "$vm" 2>/dev/null; then
		done_progress
		status=0
		wait "$vm" || status=$?
		vm=
		say "the VM ended (status $status) before its ssh server answered; the end of its console:"
		tail -n 15 "$console" >&2 || true
		exit 1
	fi
	if [ "$(elapsed | cut -d. -f1)" -ge "$limit" ]; then
		done_progress
		say "no ssh after $limit s; the end of its console:"
		tail -n 15 "$console" >&2 || true
		exit 1
	fi
	progress
	sleep 0.2
done
done_progress
say "logged in by ssh after $(elapsed) s"
if [ -t 0 ] && [ -t 1 ]; then
	say "this is root's shell in the guest; leave it to shut the guest down"
	in_guest -t || true
else
	in_guest "${DEMO_RUN:-uname -a; systemctl is-system-running --wait}"
fi
say "shutting the guest down from the inside"
in_guest systemctl poweroff 2>/dev/null || true
status=0
wait "$vm" || status=$?
vm=
say "the VM ended with status $status after $(elapsed) s"
exit "$status"
