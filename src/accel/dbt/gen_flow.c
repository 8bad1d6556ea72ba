/*
 * The stack and control flow: pushes, pops, calls, returns, indirect and counted branches.
 *
 * A guest call is a host call on the private stack, a guest return a host return: the host's return predictor serves the guest. The
 * landing pad compares the guest's return address with its own.
 */
#include "accel/dbt/gen_internal.h"

/* --- Stack instructions --- */

/* An address off RSP or RBP for gen_single. */
static struct address stack_address(int base, int64_t disp)
{
	return (struct address){ .base = (int8_t)base, .index = -1, .scale = 1, .seg = SREG_DS, .disp = disp };
}

/* Where a push goes; unmerged blocks check it here (then T1 holds the host address alone). */
static struct mem push_operand(struct gen *g, unsigned i)
{
	if (g->b->insn[i].acc == ACC_STACK)
		return stack_operand(-(int)g->word);
	struct address a = stack_address(RSP, -(int)g->word);
	struct mem op;
	gen_single(g, i, &a, g->word, true, &op);
	e_lea(&g->c, T1, op);
	return mem_b(T1, 0);
}

static struct mem pop_operand(struct gen *g, unsigned i)
{
	if (g->b->insn[i].acc == ACC_STACK)
		return stack_operand(0);
	struct address a = stack_address(RSP, 0);
	struct mem op;
	gen_single(g, i, &a, g->word, false, &op);
	return op;
}

static void e_move_rsp(struct gen *g, int by)
{
	e_op_mem(&g->c, g->w, 0x8d, GSP, mem_b(GSP, by));
}

static void e_load_word(struct gen *g, int dst, struct mem m)
{
	e_op_mem(&g->c, g->w, 0x8b, dst, m);
}

static void e_store_word(struct gen *g, struct mem m, int src)
{
	e_op_mem(&g->c, g->w, 0x89, src, m);
}

static void e_store_word_imm(struct gen *g, struct mem m, int32_t v)
{
	e_op_mem(&g->c, g->w, 0xc7, 0, m);
	e32(&g->c, (uint32_t)v);
}

void gen_push(struct gen *g, unsigned i)
{
	const struct x86_insn *in = &g->b->insn[i].in;
	struct mem op = push_operand(g, i);
	if (in->opcode == 0x68 || in->opcode == 0x6a)
		e_store_word_imm(g, op, (int32_t)in->imm);
	else
		e_store_word(g, op, e_guest_reg(g, in->opcode == 0xff ? in->rm : opcode_gpr(in), T2));
	e_move_rsp(g, -(int)g->word);
}

/* The explicit memory operand, a word, of CALL, JMP, PUSH into dst. */
static void e_load_operand(struct gen *g, unsigned i, int dst)
{
	struct mem op;
	gen_single(g, i, &g->b->insn[i].ea, g->word, false, &op);
	e_load_word(g, dst, op);
}

void gen_push_mem(struct gen *g, unsigned i)
{
	bool window = g->b->insn[i].acc == ACC_STACK;
	int t = window ? T1 : GRP; /* unmerged blocks have no groups */
	e_load_operand(g, i, t);
	g->grp_used = !window;
	e_store_word(g, push_operand(g, i), t);
	e_move_rsp(g, -(int)g->word);
}

void gen_pop(struct gen *g, unsigned i)
{
	struct code *c = &g->c;
	int reg = opcode_gpr(&g->b->insn[i].in);
	struct mem op = pop_operand(g, i);
	if (reg == RSP) {
		e_load_word(g, GSP, op);
		return;
	}
	if (is_slot(reg)) {
		e_load(c, T1, op);
		e_store(c, mem_gs(OFF_GPR(reg)), T1);
	} else {
		e_load_word(g, host_reg(reg), op);
	}
	e_move_rsp(g, (int)g->word);
}

void gen_leave(struct gen *g, unsigned i)
{
	struct code *c = &g->c;
	if (g->b->insn[i].acc == ACC_STACK) {
		/* The load first: where RBP is not canonical it faults on the host. */
		e_op_mem(c, g->w, 0x8d, T1, mem_b(H_RBP, (int)g->word));
		e_load_word(g, H_RBP, mem_bi(H_RBP, STK, 1, 0));
		e_mov_rr(c, GSP, T1);
		return;
	}
	struct address a = stack_address(RBP, 0);
	struct mem op;
	gen_single(g, i, &a, g->word, false, &op);
	e_load_word(g, T1, op);
	e_op_mem(c, g->w, 0x8d, GSP, mem_b(H_RBP, (int)g->word));
	e_mov_rr(c, H_RBP, T1);
}

void gen_pushf(struct gen *g, unsigned i)
{
	struct code *c = &g->c;
	/* The store's check first, where it is made here: it uses T1 and T2. */
	bool window = g->b->insn[i].acc == ACC_STACK;
	struct mem op = push_operand(g, i);
	if (!window)
		e_mov_rr(c, GRP, T1), op = mem_b(GRP, 0);
	e8(c, 0x9c);		       /* pushfq */
	e8(c, 0x41), e8(c, 0x58);      /* pop r8 */
	e_pxxx_gs(c, 2, T1, T1, OFF(pext_status)); /* T1 &= status flags, without touching flags */
	e_pxxx_gs(c, 3, T1, T1, OFF(pext_status));
	e_load(c, T2, mem_gs(OFF(s.rflags)));
	e_lea(c, T1, mem_bi(T1, T2, 1, 0));
	e_op_mem(c, 0, 0xb60f, T2, mem_gs(OFF(iflag)));
	e_rorx(c, T2, T2, 64 - 9);
	e_lea(c, T1, mem_bi(T1, T2, 1, 0));
	e_store_word(g, op, T1);
	e_move_rsp(g, -(int)g->word);
}

/* --- Control flow --- */

/* Through the indirect cache with T1 = target. */
static void e_lookup(struct gen *g, bool call)
{
	struct code *c = &g->c;
	e_op_reg(c, 0, 0xb70f, T2, T1);
	e_load32(c, T2, mem_icache(T2, dbt_class(g->b->mode)));
	e8(c, 0x41), e8(c, 0xff), e8(c, call ? 0xd1 : 0xe1);
}

static void e_push_return(struct gen *g, unsigned i, struct mem op)
{
	struct code *c = &g->c;
	uint64_t next = g->b->insn[i].next;
	if ((!g->w || fits32((int64_t)next)) && !c->movable) {
		e_store_word_imm(g, op, (int32_t)next);
	} else {
		e_mov_va(c, T2, next, RELOC_VA);
		e_store_word(g, op, T2);
	}
	e_move_rsp(g, -(int)g->word);
}

/* Where the host return of the callee lands, T1 = the guest's return address. */
static void e_landing(struct gen *g, unsigned i)
{
	const struct block_insn *bi = &g->b->insn[i];
	e_expect_pc(&g->c, bi->next, g->vm->stub.lookup[dbt_class(g->b->mode)]);
	e_link(g, 0xe9, -1, bi->next, g->b->mode & ~(uint32_t)MODE_NOMERGE, bi->pc, i);
}

void gen_call(struct gen *g, unsigned i)
{
	const struct block_insn *bi = &g->b->insn[i];
	e_push_return(g, i, push_operand(g, i));
	e_link(g, 0xe8, -1, branch_target(bi), g->b->mode & ~(uint32_t)MODE_NOMERGE, bi->pc, i);
	e_landing(g, i);
}

/* Target of an indirect branch into dst. */
static void e_target(struct gen *g, unsigned i, int dst)
{
	const struct block_insn *bi = &g->b->insn[i];
	if (bi->in.has_mem)
		e_load_operand(g, i, dst);
	else if (g->w)
		e_mov_rr(&g->c, dst, e_guest_reg(g, bi->in.rm, dst));
	else
		e_op_reg(&g->c, 0, 0x8b, dst, host_reg(bi->in.rm));
}

void gen_call_indirect(struct gen *g, unsigned i)
{
	struct code *c = &g->c;
	bool window = g->b->insn[i].acc == ACC_STACK;
	int t = window ? T1 : GRP;
	e_target(g, i, t);
	g->grp_used = !window;
	e_push_return(g, i, push_operand(g, i));
	e_mov_rr(c, T1, t);
	e_lookup(g, true);
	e_landing(g, i);
}

void gen_ret(struct gen *g, unsigned i)
{
	struct code *c = &g->c;
	const struct x86_insn *in = &g->b->insn[i].in;
	e_load_word(g, T1, pop_operand(g, i));
	e_move_rsp(g, (int)g->word + (in->opcode == 0xc2 ? (int32_t)(uint16_t)in->imm : 0));
	e8(c, 0xc3);
}

void gen_jmp_indirect(struct gen *g, unsigned i)
{
	e_target(g, i, T1);
	e_lookup(g, false);
}

/* Leave through a link if rcx is zero (JRCXZ) or non-zero (LOOP). */
void gen_count_branch(struct gen *g, unsigned i, bool loop)
{
	struct code *c = &g->c;
	const struct block_insn *bi = &g->b->insn[i];
	uint32_t mode = g->b->mode & ~(uint32_t)MODE_NOMERGE;
	if (loop)
		e_op_mem(c, g->w, 0x8d, H_RCX, mem_b(H_RCX, -1));
	if (!g->w)
		e8(c, 0x67); /* JECXZ */
	uint8_t *zero = e_j8_fwd(c, OP_JRCXZ);
	e_link(g, 0xe9, -1, loop ? branch_target(bi) : bi->next, mode, bi->pc, i);
	e_patch8(c, zero);
	e_link(g, 0xe9, -1, loop ? bi->next : branch_target(bi), mode, bi->pc, i);
}
