/*
 * Descriptors, inner stacks and returns: what far transfers (seg.c) and interrupts (intr.c) share. Inside the emulator
 * only.
 *
 * Same convention as emu_internal.h: 0, or non-zero with the fault recorded and nothing committed. `ext` is the EXT bit
 * that error codes carry while an event from outside the program is delivered (SDM 3A 6.13).
 */
#ifndef TRAPLINE_CPU_X86_SEG_H
#define TRAPLINE_CPU_X86_SEG_H

#include "cpu/x86/emu_internal.h"

/* System descriptor types (SDM 3A table 3-2). */
enum {
	DESC_TSS16 = 1,
	DESC_LDT = 2,
	DESC_TSS16_BUSY = 3,
	DESC_CALL16 = 4,
	DESC_TASK = 5,
	DESC_INT16 = 6,
	DESC_TRAP16 = 7,
	DESC_TSS32 = 9,
	DESC_TSS32_BUSY = 11,
	DESC_CALL32 = 12,
	DESC_INT32 = 14,
	DESC_TRAP32 = 15,
};

struct seg_desc {
	uint64_t linear;    /* where it lies, to set its accessed bit */
	uint64_t raw, high; /* high: second half of a 16-byte system descriptor */
	struct x86_seg seg; /* expanded; .sel is the selector it was fetched by */
};

static inline bool seg_is_null(uint16_t sel)
{
	return !(sel & ~3);
}

static inline unsigned seg_type(const struct x86_seg *s)
{
	return s->attr & SEG_TYPE_MASK;
}

static inline unsigned seg_dpl(const struct x86_seg *s)
{
	return (s->attr >> SEG_DPL_SHIFT) & 3;
}

static inline bool seg_is_code(const struct x86_seg *s)
{
	return (s->attr & (SEG_S | SEG_CODE)) == (SEG_S | SEG_CODE);
}

static inline bool seg_is_conforming(const struct x86_seg *s)
{
	return (s->attr & (SEG_S | SEG_CODE | SEG_CE)) == (SEG_S | SEG_CODE | SEG_CE);
}

static inline bool seg_is_writable_data(const struct x86_seg *s)
{
	return (s->attr & (SEG_S | SEG_CODE | SEG_RW)) == (SEG_S | SEG_RW);
}

static inline bool seg_is_readable(const struct x86_seg *s)
{
	return (s->attr & SEG_S) && (!(s->attr & SEG_CODE) || (s->attr & SEG_RW));
}

/* The flat segments of SYSCALL and friends. */
static inline struct x86_seg seg_flat(uint16_t sel, uint16_t attr)
{
	return (struct x86_seg){.limit = 0xffffffff, .sel = sel, .attr = attr | SEG_G};
}

/* SS after a change of privilege in long mode: null, its RPL the new CPL. */
static inline struct x86_seg seg_null_ss(unsigned cpl)
{
	return (struct x86_seg){.sel = cpl, .attr = cpl << SEG_DPL_SHIFT};
}

/* Read the descriptor of a non-null selector. *found false: outside its table (or half of it is). */
int seg_find(struct emu *e, uint16_t sel, struct seg_desc *d, bool *found);
/* The same, outside the table being `vector`(sel|ext). */
int seg_fetch(struct emu *e, uint16_t sel, uint8_t vector, uint32_t ext, struct seg_desc *d);
/* Set type bits in the descriptor in memory (SEG_A; 2 = TSS busy) if they are clear. */
int seg_mark(struct emu *e, struct seg_desc *d, unsigned bits);
/* Offset in the code segment an instruction pointer may have: limit, or canonical form in 64-bit code. #GP(ext). */
int seg_check_rip(struct emu *e, const struct x86_seg *cs, uint64_t rip, uint32_t ext);
bool seg_is_code64(const struct emu *e, const struct x86_seg *cs);
void seg_set_cs(struct emu *e, const struct x86_seg *cs, unsigned cpl);
void seg_set_rsp(struct emu *e, uint64_t rsp, uint64_t mask);

/* A stack that is not (yet) SS:RSP. */
struct seg_stack {
	struct x86_seg ss;
	uint64_t sp, mask;
	bool flat64;	/* 64-bit mode: no limit */
	bool system;	/* accesses are supervisor's */
	uint32_t error; /* of #SS */
};

void seg_stack_current(const struct emu *e, struct seg_stack *st);
/* The stack for privilege level `dpl` out of the TSS, SS loaded and checked (#TS, #SS). */
int seg_stack_inner(struct emu *e, unsigned dpl, uint32_t ext, struct seg_stack *st);
/* Store n values of `size` bytes, value[0] at the lowest address; moves st->sp. All or nothing. */
int seg_stack_push(struct emu *e, struct seg_stack *st, const uint64_t *value, unsigned n, unsigned size);
void seg_stack_commit(struct emu *e, const struct seg_stack *st);
/* Read `size` bytes at SS:RSP+disp; RSP does not move. */
int seg_stack_peek(struct emu *e, unsigned disp, unsigned size, uint64_t *value);

/* RETF/IRET: fetch and check the CS to return to; the new CPL is its RPL. */
int seg_return_cs(struct emu *e, uint16_t sel, struct seg_desc *cs);
/* The SS popped for a return to `cpl`; `cs` is where it goes. */
int seg_return_ss(struct emu *e, uint16_t sel, unsigned cpl, const struct x86_seg *cs, struct x86_seg *ss);
/* Data segments that the now outer privilege level may not have become null (SDM 2B RET). */
void seg_drop_inner_data(struct emu *e);

#endif
