/* Generated instruction sequences: interpreter, translator in its forced modes, and the host itself must agree.
 * fuzz-asm SECONDS SEED [COUNT]: programs SEED, SEED+1, ...; COUNT 1 repeats one (then SEED is the program's). Prints the shortened program. */
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "asm_diff.h"
#include "base/clock.h"

int main(int argc, char **argv)
{
	uint64_t seconds = argc > 1 ? strtoull(argv[1], NULL, 0) : 1;
	uint64_t seed = argc > 2 ? strtoull(argv[2], NULL, 0) : 1;
	uint64_t count = argc > 3 ? strtoull(argv[3], NULL, 0) : UINT64_MAX;
	static struct asm_diff diff;
	struct error err = { "" };
	unsigned bad = 0;

	clock_init();
	if (asm_diff_open(&diff, 0, &err) < 0) {
		fprintf(stderr, "fuzz-asm: %s\n", err.text);
		return 1;
	}
	uint64_t start = clock_ns(), shown = start;
	if (argc <= 3 && seed < UINT64_MAX / 1000000)
		seed *= 1000000; /* runs of neighbouring seeds do not meet */
	for (uint64_t k = 0; k < count && clock_ns() < start + seconds * NS_PER_SEC && bad < 10; k++) {
		/* One program in three is 32-bit. */
		uint64_t this = count != 1 && k % 3 == 2 ? (seed + k) | ASM_SEED_COMPAT : seed + k;
		if (!asm_diff_seed(&diff, this)) {
			fprintf(stderr, "fuzz-asm: repeat with: %s %llu %llu 1\n\n", argv[0], (unsigned long long)seconds,
				(unsigned long long)this);
			bad++;
		}
		if (isatty(STDERR_FILENO) && clock_ns() > shown + NS_PER_SEC) {
			shown = clock_ns();
			fprintf(stderr, "\rfuzz-asm: %llu programs, %u findings ", (unsigned long long)diff.programs, bad);
		}
	}
	printf("fuzz-asm: %llu programs (%llu also native, %llu without end, %llu differences of strays), seed %llu, %u findings\nfuzz-asm: ended by vector:",
	       (unsigned long long)diff.programs, (unsigned long long)diff.natives, (unsigned long long)diff.timeouts,
	       (unsigned long long)diff.strays,
	       (unsigned long long)seed, bad);
	for (unsigned i = 0; i < 32; i++)
		if (diff.faults[i])
			printf(" %u: %llu", i, (unsigned long long)diff.faults[i]);
	printf("\n");
	asm_diff_close(&diff);
	return bad != 0;
}
