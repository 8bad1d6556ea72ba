#!/bin/sh
# Run every fuzzer of the build for some seconds each: scripts/fuzz.sh BUILD SECONDS
# A fuzzer is a program BUILD/tests/fuzz/fuzz-NAME that takes SECONDS and a SEED, prints what failed and how to repeat it,
# and returns non-zero on a finding. FUZZ_SEED repeats a run; the default is the time. FUZZ names those to run (a shell pattern).
# With clang, the libFuzzer targets of build-fuzz run as well, under the sanitizers: what they find out about the inputs grows in
# .cache/fuzz/NAME from run to run; what is worth keeping of that goes to tests/fuzz/corpus (see tests/fuzz/README).
set -eu
cd "$(dirname "$0")/.."
build=$1
seconds=$2
seed=${FUZZ_SEED:-$(date +%s)}
pattern=${FUZZ:-*}
found=0
failed=0
# shellcheck disable=SC2231 # a pattern
for fuzzer in "$build"/tests/fuzz/fuzz-$pattern; do
	if [ ! -f "$fuzzer" ] || [ ! -x "$fuzzer" ]; then
		continue
	fi
	found=$((found + 1))
	echo "fuzz: $(basename "$fuzzer") for $seconds s, seed $seed"
	"$fuzzer" "$seconds" "$seed" || {
		failed=$((failed + 1))
		echo "fuzz: $(basename "$fuzzer") found something; repeat with: $fuzzer $seconds $seed" >&2
	}
done

# libFuzzer brings its own main, and its coverage finds what dumb mutations do not.
if scripts/deps.sh fuzz && command -v clang >/dev/null; then
	CC=clang scripts/build.sh build-fuzz -Dlibfuzzer=true -Db_sanitize=address,undefined -Db_lundef=false
	# shellcheck disable=SC2231
	for fuzzer in build-fuzz/tests/fuzz/libfuzz-$pattern; do
		if [ ! -f "$fuzzer" ] || [ ! -x "$fuzzer" ]; then
			continue
		fi
		name=${fuzzer##*/libfuzz-}
		corpus=tests/fuzz/corpus/$name
		grown=.cache/fuzz/$name
		mkdir -p "$grown" "$corpus"
		found=$((found + 1))
		echo "fuzz: libfuzz-$name for $seconds s, seed $seed"
		# Seeds of 32 bits; its many lines are only of interest when it finds something.
		"$fuzzer" -max_total_time="$seconds" -seed=$((seed % 4294967295)) -timeout=20 -rss_limit_mb=4096 -max_len=4096 \
			-artifact_prefix=.cache/fuzz/ "$grown" "$corpus" >".cache/fuzz/$name.log" 2>&1 || {
			failed=$((failed + 1))
			tail -60 ".cache/fuzz/$name.log" >&2
			echo "fuzz: libfuzz-$name found something; repeat with: $fuzzer and the file named above" >&2
		}
		grep '^Done' ".cache/fuzz/$name.log" || true
	done
else
	echo "fuzz: no clang here: the libFuzzer targets run with plain mutations only" >&2
fi
if [ $found = 0 ]; then
	echo "fuzz: no fuzzer was built; look at the output of make" >&2
	exit 1
fi
echo "fuzz: $found fuzzers, $failed with findings"
[ $failed = 0 ]
