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

/* Where a push of 8 bytes goes; unmerged blocks check it here (then T1 holds the host address alone). */
static struct mem push_operand(struct gen *g, unsigned i)
{
	if (g->b->insn[i].acc == ACC_STACK)
		return stack_operand(-8);
	struct address a = stack_address(RSP, -8);
	struct mem op;
	gen_single(g, i, &a, 8, true, &op);
	e_lea(&g->c, T1, op);
	return mem_b(T1, 0);
}

static struct mem pop_operand(struct gen *g, unsigned i)
{
	if (g->b->insn[i].acc == ACC_STACK)
		return stack_operand(0);
	struct address a = stack_address(RSP, 0);
	struct mem op;
	gen_single(g, i, &a, 8, false, &op);
	return op;
}

static void e_move_rsp(struct gen *g, int32_t by)
{
	e_lea(&g->c, GSP, mem_b(GSP, by));
}

void gen_push(struct gen *g, unsigned i)
{
	struct code *c = &g->c;
	const struct x86_insn *in = &g->b->insn[i].in;
	struct mem op = push_operand(g, i);
	if (in->opcode == 0x68 || in->opcode == 0x6a)
		e_mov_mem_simm64(c, op, (int32_t)in->imm);
	else
		e_store(c, op, e_guest_reg(g, in->opcode == 0xff ? in->rm : opcode_gpr(in), T2));
	e_move_rsp(g, -8);
}

/* The explicit 8-byte memory operand of CALL, JMP, PUSH into dst. */
static void e_load_operand(struct gen *g, unsigned i, int dst)
{
	struct mem op;
	gen_single(g, i, &g->b->insn[i].ea, 8, false, &op);
	e_load(&g->c, dst, op);
}

void gen_push_mem(struct gen *g, unsigned i)
{
	bool window = g->b->insn[i].acc == ACC_STACK;
	int t = window ? T1 : GRP; /* unmerged blocks have no groups */
	e_load_operand(g, i, t);
	g->grp_used = !window;
	e_store(&g->c, push_operand(g, i), t);
	e_move_rsp(g, -8);
}

void gen_pop(struct gen *g, unsigned i)
{
	struct code *c = &g->c;
	int reg = opcode_gpr(&g->b->insn[i].in);
	struct mem op = pop_operand(g, i);
	if (reg == RSP) {
		e_load(c, GSP, op);
		return;
	}
	if (is_slot(reg)) {
		e_load(c, T1, op);
		e_store(c, mem_gs(OFF_GPR(reg)), T1);
	} else {
		e_load(c, host_reg(reg), op);
	}
	e_move_rsp(g, 8);
}

void gen_leave(struct gen *g, unsigned i)
{
	struct code *c = &g->c;
	if (g->b->insn[i].acc == ACC_STACK) {
		/* The load first: where RBP is not canonical it faults on the host. */
		e_lea(c, T1, mem_b(H_RBP, 8));
		e_load(c, H_RBP, mem_bi(H_RBP, STK, 1, 0));
		e_mov_rr(c, GSP, T1);
		return;
	}
	struct address a = stack_address(RBP, 0);
	struct mem op;
	gen_single(g, i, &a, 8, false, &op);
	e_load(c, T1, op);
	e_lea(c, GSP, mem_b(H_RBP, 8));
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
	e_store(c, op, T1);
	e_move_rsp(g, -8);
}

/* --- Control flow --- */

/* Through the indirect cache with T1 = target. */
static void e_lookup(struct gen *g, bool call)
{
	struct code *c = &g->c;
	e_op_reg(c, 0, 0xb70f, T2, T1);
	e_load32(c, T2, mem_icache(T2, g->b->mode & MODE_USER));
	e8(c, 0x41), e8(c, 0xff), e8(c, call ? 0xd1 : 0xe1);
}

static void e_push_return(struct gen *g, unsigned i, struct mem op)
{
	struct code *c = &g->c;
	uint64_t next = g->b->insn[i].next;
	if (fits32((int64_t)next) && !c->movable) {
		e_mov_mem_simm64(c, op, (int32_t)next);
	} else {
		e_mov_va(c, T2, next, RELOC_VA);
		e_store(c, op, T2);
	}
	e_move_rsp(g, -8);
}

/* Where the host return of the callee lands, T1 = the guest's return address. */
static void e_landing(struct gen *g, unsigned i)
{
	const struct block_insn *bi = &g->b->insn[i];
	e_expect_pc(&g->c, bi->next, g->vm->stub.lookup[g->b->mode & MODE_USER]);
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
	else
		e_mov_rr(&g->c, dst, e_guest_reg(g, bi->in.rm, dst));
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
	e_load(c, T1, pop_operand(g, i));
	e_move_rsp(g, 8 + (in->opcode == 0xc2 ? (int32_t)(uint16_t)in->imm : 0));
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
		e_lea(c, H_RCX, mem_b(H_RCX, -1));
	uint8_t *zero = e_j8_fwd(c, OP_JRCXZ);
	e_link(g, 0xe9, -1, loop ? branch_target(bi) : bi->next, mode, bi->pc, i);
	e_patch8(c, zero);
	e_link(g, 0xe9, -1, loop ? bi->next : branch_target(bi), mode, bi->pc, i);
}
