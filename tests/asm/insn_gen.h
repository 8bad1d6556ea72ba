/*
 * Random, valid and safe instruction sequences for differential tests (native, stepper, translator).
 *
 * Code is 64-bit, user-level, without branches. It reads and writes only [base, base + mem_size) through one base register, and a
 * few words below RSP; neither base nor RSP (but by push and pop) is a destination. Nothing in it faults: divisors are made
 * to fit, masks of MXCSR and FCW are expected to be set. Only instructions that the host has are generated. The same seed
 * gives the same sequence on the same kind of host. A struct insn_gen belongs to its caller; any thread.
 */
#ifndef TRAPLINE_TESTS_INSN_GEN_H
#define TRAPLINE_TESTS_INSN_GEN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum insn_gen_class {
	GEN_INT = 1 << 0,    /* ALU, moves, shifts, bits, multiply, setcc, cmov, locked forms */
	GEN_DIV = 1 << 1,
	GEN_BMI = 1 << 2,    /* VEX-encoded integer instructions, ADCX/ADOX, MOVBE, CRC32 */
	GEN_STACK = 1 << 3,
	GEN_STRING = 1 << 4,
	GEN_SSE = 1 << 5,
	GEN_AVX = 1 << 6,
	GEN_X87 = 1 << 7,
	GEN_MMX = 1 << 8,
	GEN_ALL = (1 << 9) - 1,
};

struct insn_gen {
	uint64_t rng;
	unsigned classes;
	uint8_t base;	   /* GPR number, not RSP */
	uint32_t mem_size; /* bytes, at least 512; base must be 64-byte aligned */
	bool strict_flags; /* never read a flag that the manual calls undefined */
	uint16_t undefined; /* status flags (FL_ masks) undefined at this point */
	unsigned depth;	   /* words pushed and not popped */
};

#define INSN_GEN_MAX 64	      /* bytes that one insn_gen_next may emit */
#define INSN_GEN_STACK_DEPTH 16 /* words used below the initial RSP at most */

void insn_gen_init(struct insn_gen *g, uint64_t seed, unsigned classes, uint8_t base, uint32_t mem_size);
uint64_t insn_gen_random(struct insn_gen *g);

/* Append one instruction (or a short group that belongs together); returns its length in bytes, <= INSN_GEN_MAX. */
unsigned insn_gen_next(struct insn_gen *g, uint8_t *out);
/* `count` of them; returns the bytes. `cap` >= count * INSN_GEN_MAX. */
size_t insn_gen_sequence(struct insn_gen *g, uint8_t *out, unsigned count);

#endif
