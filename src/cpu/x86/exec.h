/*
 * Native execution of single instructions: the decode cache and the stubs in it. Private to the emulator.
 *
 * Every cached instruction has a handler; data instructions also have a stub, host code that loads the guest registers they need
 * from struct x86_state, runs the rewritten instruction, and stores the results. One struct emu_exec belongs to one struct emu and
 * is used by its thread only. The cache is direct-mapped and bounded; an entry's stub slot is reused with the entry.
 */
#ifndef TRAPLINE_CPU_X86_EXEC_H
#define TRAPLINE_CPU_X86_EXEC_H

#include <stdalign.h>
#include <string.h>

#include "cpu/x86/emu_internal.h"

/* What a handler returns besides EMU_FAULT and EMU_UNSUPPORTED. */
enum exec_result {
	RUN_NEXT = 0,  /* done: go on at the next instruction */
	RUN_JUMPED = 3, /* done, and rip is set */
	RUN_INT = 4,	/* the same, and no single-step trap follows: INT n, INTO, SYSCALL */
	RUN_AGAIN = 5, /* part of a rep string is done: rip stays */
	RUN_HLT = 6,
	RUN_INT3 = 7, /* nothing done: the debugger's */
};

enum { EXEC_ENTRIES = 32768, EXEC_SLOT = 320, EXEC_BOUNCE = 256 };

enum exec_fpu { FPU_NONE, FPU_X87, FPU_WAIT, FPU_MMX, FPU_SSE, FPU_VEX, FPU_VEX_GPR, FPU_MIXED, FPU_EVEX };

struct exec_entry;
typedef int (*exec_run)(struct emu *e, const struct exec_entry *x, uint64_t next);

struct exec_entry {
	uint64_t word[2], mask[2]; /* instruction bytes to compare */
	uint8_t key;		   /* enum x86_mode + 1; 0: empty */
	exec_run run;
	/* Returns the flags after the instruction, or ~0 if it faulted (emu_exec.trap says how). */
	uint64_t (*stub)(struct x86_state *s, void *mem);
	uint16_t flags;	   /* status flags the stub's result is valid for */
	uint8_t fpu;	   /* enum exec_fpu */
	uint8_t high;	   /* x86_high_byte */
	bool x87_pointers; /* updates FIP, FDP */
	bool mxcsr;
	bool rbx_saved;	 /* the stub has RBX on its stack */
	uint16_t vex_written; /* vector registers that a VEX stub stores */
	bool bit_string; /* BT m, r: reaches beyond its operand */
	struct x86_evex evex; /* FPU_EVEX */
	struct x86_insn insn;
};

struct emu_exec {
	struct exec_entry *entry;
	uint8_t *code_rw, *code_rx; /* the same memory twice: EXEC_ENTRIES slots of EXEC_SLOT bytes */
	int fd;
	/* Written by the signal handler on the same thread. */
	bool rbx_saved;	    /* the running stub has RBX on its stack */
	volatile int trap;  /* x86 vector of the host fault, or -1 */
	uint8_t avx512;	    /* evex.c: whether the host can run the guest's; 0 not known yet */
	alignas(64) uint8_t bounce[EXEC_BOUNCE + 64];
};

/* --- stub.c --- */
/* Generate x's stub into its slot. Returns 0, or -ENOTSUP. */
int exec_make_stub(const struct emu_exec *ex, struct exec_entry *x, const struct x86_vectors *v);

/* --- exec.c --- */
/* The entry for the instruction at CS:RIP, decoded if need be; NULL with *result a fault or EMU_UNSUPPORTED. */
const struct exec_entry *exec_lookup(struct emu *e, int *result);
/* Handler of data instructions. */
int exec_native(struct emu *e, const struct exec_entry *x, uint64_t next);
/* Run the stub on the operand at `mem`: 0, or the guest's exception. */
int exec_stub(struct emu *e, const struct exec_entry *x, void *mem);
/* #UD, #NM as the FPU control bits say for this class (SDM 3A table 2-2 and following, 3A 13.1). */
int exec_fpu_check(struct emu *e, enum exec_fpu fpu);
/* Make every component of s->xsave explicit: XSTATE_BV says 7 and the bytes are the registers. */
void exec_fpu_normalise(struct x86_state *s);

/* Bits 511:256 of these vector registers are zero, as after any VEX instruction that writes them (SDM 1 14.1.3). */
void exec_zero_above_ymm(struct emu *e, uint16_t regs);

/* --- evex.c --- */
/* Whether AVX-512 is on for this guest, and the host computes with it. */
bool exec_has_avx512(struct emu *e);
/* Handler of AVX-512's data instructions. */
int exec_avx512(struct emu *e, const struct exec_entry *x, uint64_t next);
/* xsave.c: an opmask register; where component `bit` of AVX-512's lies in s->xsave, *size 0 if nowhere. */
uint64_t exec_opmask(const struct emu *e, unsigned n);
unsigned exec_component(const struct emu *e, uint64_t bit, unsigned *size);

/* --- emu.c: which handler runs an instruction; NULL for #UD --- */
exec_run emu_handler(const struct x86_insn *in);

/* --- control.c --- */
exec_run control_handler(const struct x86_insn *in);
/* --- string.c --- */
exec_run string_handler(const struct x86_insn *in);
/* --- legacy.c: BCD, BOUND, PUSHA, ENTER and others without a native twin in 64-bit mode --- */
exec_run legacy_handler(const struct x86_insn *in);
/* --- xsave.c: FPU state as memory, masked moves, gathers --- */
exec_run xsave_handler(const struct x86_insn *in);
exec_run vector_handler(const struct x86_insn *in);

/* Offsets in s->xsave, standard format (SDM 1 10.5.1, 13.4). */
enum {
	XS_FCW = 0,
	XS_FSW = 2,
	XS_FTW = 4,
	XS_FOP = 6,
	XS_FIP = 8,
	XS_FDP = 16,
	XS_MXCSR = 24,
	XS_MXCSR_MASK = 28,
	XS_ST = 32,
	XS_XMM = 160,
	XS_BV = 512,
	XS_COMP_BV = 520,
	XS_YMMH = 576,
};

#define MXCSR_DEFAULT 0x1f80u
#define MXCSR_VALID 0xffffu

/* --- operands --- */

static inline uint64_t size_mask(unsigned size)
{
	return size >= 8 ? ~0ull : (1ull << size * 8) - 1;
}

static inline uint64_t sign_extend(uint64_t v, unsigned size)
{
	unsigned shift = 64 - size * 8;
	return (uint64_t)((int64_t)(v << shift) >> shift);
}

static inline uint64_t gpr_get(const struct x86_state *s, unsigned n, unsigned size, bool high)
{
	if (high)
		return (uint8_t)(s->gpr[n - 4] >> 8);
	return s->gpr[n] & size_mask(size);
}

static inline void gpr_set(struct x86_state *s, unsigned n, unsigned size, bool high, uint64_t value)
{
	if (size == 8)
		s->gpr[n] = value;
	else if (size == 4)
		s->gpr[n] = (uint32_t)value;
	else if (size == 2)
		s->gpr[n] = (s->gpr[n] & ~0xffffull) | (uint16_t)value;
	else if (high)
		s->gpr[n - 4] = (s->gpr[n - 4] & ~0xff00ull) | (uint64_t)(uint8_t)value << 8;
	else
		s->gpr[n] = (s->gpr[n] & ~0xffull) | (uint8_t)value;
}

/* Registers used as counters and pointers: a 32-bit write zero-extends, a 16-bit one merges. */
static inline void gpr_set_addr(struct x86_state *s, unsigned n, unsigned addrsize, uint64_t value)
{
	gpr_set(s, n, addrsize, false, value);
}

static inline uint64_t effective(const struct x86_state *s, const struct x86_insn *in, uint64_t next)
{
	uint64_t a = (uint64_t)in->disp;

	if (in->base >= 0)
		a += in->base == 16 ? next : s->gpr[in->base];
	if (in->index >= 0)
		a += s->gpr[in->index] * in->scale;
	return a & size_mask(in->addrsize);
}

static inline uint32_t load32(const void *p)
{
	uint32_t v;
	memcpy(&v, p, sizeof(v));
	return v;
}

static inline uint64_t load64(const void *p)
{
	uint64_t v;
	memcpy(&v, p, sizeof(v));
	return v;
}

static inline void store32(void *p, uint32_t v)
{
	memcpy(p, &v, sizeof(v));
}

static inline void store64(void *p, uint64_t v)
{
	memcpy(p, &v, sizeof(v));
}

#endif
