/*
 * Inside code generation: one block under construction, and what the gen_*.c files call of each other.
 * Translation lock held; nothing here outlives one dbt_generate.
 */
#ifndef TRAPLINE_ACCEL_DBT_GEN_INTERNAL_H
#define TRAPLINE_ACCEL_DBT_GEN_INTERNAL_H

#include "accel/dbt/block.h"

enum cold_kind { COLD_SINGLE, COLD_GROUP, COLD_STACK, COLD_LINK, COLD_EXIT_PC, COLD_YIELD };

/* Something to emit after the body. */
struct cold {
	enum cold_kind kind;
	uint8_t *from[2];  /* rel32s to patch to it, or NULL */
	uint8_t *from2;    /* entry only: second token check */
	uint32_t retry;	   /* RX */
	unsigned insn;	   /* index */
	unsigned check;	   /* COLD_GROUP, COLD_STACK */
	uint32_t link;	   /* COLD_LINK */
	uint32_t what;	   /* argument of the fill helper: FILL_* */
	bool saved, saved_grp; /* flags are in rax, rax in GRP or in the save slot */
	struct address addr; /* COLD_SINGLE: to recompute; base -2: it is in GRP */
	uint64_t pc;	   /* COLD_EXIT_PC, COLD_YIELD */
};

struct gen {
	struct block *b;
	struct dbt_vm *vm;
	struct code c;
	uint32_t tb;
	uint32_t tlb_off, tlb_mask;
	unsigned word, w; /* bytes of a stack slot and an address: 8 or 4; whether 8: REX.W */
	unsigned ncold;
	struct cold cold[4 * BLOCK_MAX];
	bool ended;
	bool grp_used; /* GRP holds a value of the current instruction */
};

/* Host register of a guest register that has one. */
static inline int host_reg(int gpr)
{
	return gpr == RSP ? GSP : gpr;
}

/* gen.c */
struct cold *cold_new(struct gen *g, enum cold_kind kind, unsigned insn);
uint32_t link_new(struct gen *g, uint64_t pc, uint32_t mode, uint64_t from_pc);
void link_at(struct gen *g, uint32_t link, uint8_t *rel32);
void e_link(struct gen *g, int opcode, int cc, uint64_t pc, uint32_t mode, uint64_t from_pc, unsigned insn);
void e_exit_pc(struct gen *g, uint32_t stub, uint64_t pc);
void gen_step(struct gen *g, unsigned i);
void e_expect_pc(struct code *c, uint64_t pc, uint32_t miss);

/* gen_mem.c */
void e_save_flags(struct gen *g, bool grp);
void e_restore_flags(struct gen *g, bool grp);
void e_address(struct gen *g, int dst, const struct address *a);
void e_check_address(struct gen *g, const struct check *ch);
void e_insn_address(struct gen *g, const struct address *a);
uint32_t check_forced(const struct gen *g, uint64_t pc);
uint8_t *e_tlb_check(struct gen *g, bool write, unsigned len, uint32_t forced);
void gen_single(struct gen *g, unsigned i, const struct address *addr, unsigned size, bool write, struct mem *op);
void gen_check(struct gen *g, unsigned k);
struct mem group_operand(struct gen *g, const struct block_insn *bi, bool no_identity);
struct mem stack_operand(int64_t disp);

/* gen_insn.c */
void gen_plain(struct gen *g, unsigned i);
int e_guest_reg(struct gen *g, int gpr, int t);
void gen_lea(struct gen *g, unsigned i);
void gen_bitstring(struct gen *g, unsigned i);

/* gen_flow.c */
void gen_push(struct gen *g, unsigned i);
void gen_push_mem(struct gen *g, unsigned i);
void gen_pop(struct gen *g, unsigned i);
void gen_leave(struct gen *g, unsigned i);
void gen_pushf(struct gen *g, unsigned i);
void gen_call(struct gen *g, unsigned i);
void gen_call_indirect(struct gen *g, unsigned i);
void gen_ret(struct gen *g, unsigned i);
void gen_jmp_indirect(struct gen *g, unsigned i);
void gen_count_branch(struct gen *g, unsigned i, bool loop);

/* gen_sys.c */
void gen_sti(struct gen *g, unsigned i);
void gen_swapgs(struct gen *g);
void gen_rdtsc(struct gen *g, bool p);
void gen_pause(struct gen *g, unsigned i);
void gen_from_sreg(struct gen *g, unsigned i);
void gen_read_cr(struct gen *g, unsigned i);
void gen_cld(struct gen *g);
void gen_ac(struct gen *g);
void gen_cpuid(struct gen *g, unsigned i);
void gen_xstate(struct gen *g, unsigned i);
void gen_popf(struct gen *g, unsigned i);
void gen_string(struct gen *g, unsigned i);
void gen_transfer(struct gen *g, uint32_t stub, uint64_t arg);
void gen_read_base(struct gen *g, unsigned i);
void gen_write_base(struct gen *g, unsigned i);
void gen_write_cr3(struct gen *g, unsigned i);
void gen_invlpg(struct gen *g, unsigned i);

#endif
