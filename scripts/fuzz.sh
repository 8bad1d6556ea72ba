#!/bin/sh
# Run every fuzzer of the build for some seconds each: scripts/fuzz.sh BUILD SECONDS
# A fuzzer is a program BUILD/tests/fuzz/fuzz-NAME that takes SECONDS and a SEED, prints what failed and how to repeat it,
# and returns non-zero on a finding. FUZZ_SEED repeats a run; the default is the time.
set -eu
cd "$(dirname "$0")/.."
build=$1
seconds=$2
seed=${FUZZ_SEED:-$(date +%s)}
found=0
failed=0
for fuzzer in "$build"/tests/fuzz/fuzz-*; do
	[ -f "$fuzzer" ] && [ -x "$fuzzer" ] || continue
	found=$((found + 1))
	echo "fuzz: $(basename "$fuzzer") for $seconds s, seed $seed"
	"$fuzzer" "$seconds" "$seed" || {
		failed=$((failed + 1))
		echo "fuzz: $(basename "$fuzzer") found something; repeat with: $fuzzer $seconds $seed" >&2
	}
done
if [ $found = 0 ]; then
	echo "fuzz: no fuzzer was built; look at the output of make" >&2
	exit 1
fi
echo "fuzz: $found fuzzers, $failed with findings"
[ $failed = 0 ]
