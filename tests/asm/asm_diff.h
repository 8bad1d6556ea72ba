/*
 * The differential harness: one program under the interpreter, under the translator in all its forced modes, and natively;
 * all must agree on registers, defined flags, FPU state, memory, and on the exception if there is one.
 *
 * One struct asm_diff at a time in a process (signals), used by the thread that opened it.
 */
#ifndef TRAPLINE_TESTS_ASM_DIFF_H
#define TRAPLINE_TESTS_ASM_DIFF_H

#include "asm_gen.h"

#define ASM_ENGINES 8

struct asm_diff {
	struct asm_vm vm[ASM_ENGINES]; /* 0 is the interpreter: the reference */
	unsigned n;
	bool native;
	uint64_t programs, faults[32], timeouts, natives, strays;
	char what[512]; /* the last disagreement */
};

/* Opens what there is: -errno with the reason if not even interpreter and translator. only: bits of the engines to use
 * besides the interpreter (bit k: vm[k]), 0 for all. */
int asm_diff_open(struct asm_diff *d, unsigned only, struct error *err);
void asm_diff_close(struct asm_diff *d);
/* Run everywhere: true if all agree, else d->what says who and how. */
bool asm_diff_run(struct asm_diff *d, const struct asm_gen *g);
/* Make a disagreeing program as short as it still disagrees. */
void asm_diff_shrink(struct asm_diff *d, struct asm_gen *g);
#define ASM_SEED_COMPAT (1ull << 63) /* 32-bit programs */
/* The program of this seed, size and features chosen by it. If there is a disagreement: shrink it, print it to stderr, false. */
bool asm_diff_seed(struct asm_diff *d, uint64_t seed);

#endif
