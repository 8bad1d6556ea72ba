/*
 * One block on its way from guest code to host code: what scan.c finds out and plan.c decides, gen.c emits.
 * Lives on the translating thread's stack for one dbt_translate; nothing is kept.
 */
#ifndef TRAPLINE_ACCEL_DBT_BLOCK_H
#define TRAPLINE_ACCEL_DBT_BLOCK_H

#include "accel/dbt/dbt.h"

#define BLOCK_MAX 48
#define GROUP_SPAN 2048 /* bytes a merged check may cover */

enum insn_class {
	CLS_PLAIN,     /* copied, with registers renamed and a checked memory operand */
	CLS_LEA,
	CLS_NOP,       /* nothing to do: NOP, prefetch, ENDBR */
	CLS_PUSH,      /* register or immediate */
	CLS_PUSH_MEM,
	CLS_POP,       /* register, not RSP */
	CLS_LEAVE,
	CLS_PUSHF,
	CLS_BITSTRING, /* BT/BTS/BTR/BTC mem, reg */
	CLS_STRING,
	CLS_CLI,
	CLS_STI,
	CLS_SWAPGS,
	CLS_RDTSC,
	CLS_RDTSCP,
	CLS_FROM_SREG, /* MOV r, Sreg */
	CLS_CLD,
	CLS_PAUSE,
	CLS_POPF,
	CLS_READ_CR,   /* MOV r, CR0/2/3/4 */
	CLS_READ_BASE, /* RDFSBASE, RDGSBASE */
	CLS_WRITE_BASE,
	CLS_CPUID,
	CLS_XSTATE,    /* XSAVE64, XSAVEC64, XSAVEOPT64, XRSTOR64 */
	CLS_JCC,
	/* From here on: ends the block. */
	CLS_LAST,
	CLS_STEP = CLS_LAST, /* for the stepper */
	CLS_AC,	       /* STAC, CLAC: on in another mode */
	CLS_JMP,
	CLS_JMP_IND,
	CLS_JRCXZ,
	CLS_LOOP,
	CLS_CALL,
	CLS_CALL_IND,
	CLS_RET,
	CLS_SYSCALL,
	CLS_SYSRET,
	CLS_SYSRET32,  /* to compatibility mode */
	CLS_SYSENTER,
	CLS_INT,       /* INT n of user code */
	CLS_IRET,
	CLS_WRITE_CR3,
	CLS_INVLPG,
};

/* How an instruction's data access is checked. */
enum access_kind {
	ACC_NONE,
	ACC_SINGLE, /* by itself: T1 + T2 is the host address */
	ACC_GROUP,  /* under the active merged check: GRP holds the addend */
	ACC_STACK,  /* under a stack window check: STK holds the addend */
};

/* seg base + base + index*scale + disp; registers are guest GPRs or -1. */
struct address {
	int8_t base, index;
	uint8_t scale;
	uint8_t seg; /* SREG_FS, SREG_GS or SREG_DS for none */
	bool rip;    /* disp was relative to RIP, and moves with the code */
	int64_t disp;
};

struct block_insn {
	struct x86_insn in;
	uint64_t pc, next;
	uint8_t cls;
	uint8_t acc;
	uint16_t live_in; /* status flags that may be read before they are written, from here on */
	bool grp_busy;	  /* GRP holds a group's addend across this instruction */
	struct address ea; /* of the explicit memory operand; RIP-relative ones are absolute */
	int32_t grp_off;   /* of the operand from the lowest address of its group */
};

/* A check placed before instruction `at`. */
struct check {
	uint16_t at;
	bool stack, write, save_flags;
	/* Group: seg + base + index*scale + [lo, hi). Stack: base (GSP or RBP) + [lo, hi). */
	int8_t base, index;
	uint8_t scale, seg;
	bool rip;
	int64_t lo;
	unsigned len;
};

struct block {
	struct dbt_vcpu *v;
	struct dbt_vm *vm;
	uint64_t pc, phys, phys2;
	uint32_t mode;
	bool cross; /* the block is one instruction that lies on two pages */
	unsigned n;
	uint64_t lines; /* 64-byte lines of the page that the translation depends on */
	struct block_insn insn[BLOCK_MAX];
	unsigned nchecks;
	struct check check[2 * BLOCK_MAX];
	const uint8_t *page;  /* hva of the code page */
	/* Where the first instruction continues on the next page, its hva and what of it is depended on; NULL if that page cannot be
	 * fetched from: the stepper raises the fault. */
	const uint8_t *page2;
	uint64_t lines2;
};

/* scan.c: decode and classify from b->pc; 0 instructions if not even one is in RAM. */
void dbt_scan(struct block *b);
/* plan.c: decide where accesses are checked. */
void dbt_plan(struct block *b);

/* Bytes of a stack slot, an address, a near branch's operand. */
static inline unsigned mode_word(uint32_t mode)
{
	return mode & MODE_COMPAT ? 4 : 8;
}

static inline unsigned insn_word(const struct block_insn *g)
{
	return g->in.mode == X86_MODE_64 ? 8 : 4;
}

/* Registers that live in memory slots. */
static inline bool is_slot(int gpr)
{
	return gpr >= 8 && gpr <= 11 ? true : gpr == 15;
}

/* The register that the low bits of the opcode name, REX.B included. */
static inline int opcode_gpr(const struct x86_insn *in)
{
	unsigned start = in->opcode_off - (in->map == MAP_0F ? 1u : 0u); /* of the opcode with its escape byte (BSWAP) */
	uint8_t before = start ? in->bytes[start - 1] : 0;
	return (in->opcode & 7) | ((before & 0xf0) == 0x40 ? (before & 1) << 3 : 0);
}

/* A direct branch's target. */
static inline uint64_t branch_target(const struct block_insn *g)
{
	uint64_t target = g->next + (uint64_t)g->in.imm;
	return g->in.mode == X86_MODE_64 ? target : (uint32_t)target;
}

#endif
