#!/bin/sh
# Configure (once) and build. Usage: scripts/build.sh DIR [meson options]
set -eu
cd "$(dirname "$0")/.."
dir=$1
shift
scripts/deps.sh build
if [ ! -f "$dir/build.ninja" ]; then
	echo "build: configuring $dir"
	mkdir -p "$dir"
	if ! meson setup "$dir" "$@" >"$dir/setup.out" 2>&1; then
		tail -30 "$dir/setup.out" >&2
		echo "build: meson could not configure $dir (its last lines are above; all of it is in $dir/setup.out)" >&2
		exit 1
	fi
fi
# ninja is silent about success; what it says about failures is already clear.
exec ninja -C "$dir" --quiet
