/*
 * From a planned block to host code: checks, accesses, copied instructions, control flow.
 *
 * Layout of a block: [token check][interrupt poll][body], then its cold part: the ways out of failed checks and unlinked exits.
 * At each guest instruction boundary all guest state is in its home, so a fault needs only the instruction's address.
 */
#include "accel/dbt/gen.h"

#include "accel/dbt/block.h"

enum cold_kind { COLD_SINGLE, COLD_GROUP, COLD_STACK, COLD_LINK, COLD_EXIT_PC };

/* Something to emit after the body. */
struct cold {
	enum cold_kind kind;
	uint8_t *from[2];  /* rel32s to patch to it, or NULL */
	uint32_t retry;	   /* RX */
	unsigned insn;	   /* index */
	unsigned check;	   /* COLD_GROUP, COLD_STACK */
	uint32_t link;	   /* COLD_LINK */
	uint32_t what;	   /* COLD_SINGLE: T2 */
	bool saved, saved_grp; /* flags are in rax, rax in GRP or in the save slot */
	struct block_insn addr; /* COLD_SINGLE: address to recompute (only the address fields) */
	uint64_t pc;	   /* COLD_EXIT_PC */
};

struct gen {
	struct block *b;
	struct dbt_vm *vm;
	struct code c;
	uint32_t tb;
	uint32_t tlb_off, tlb_mask;
	unsigned ncold;
	struct cold cold[4 * BLOCK_MAX];
	bool ended;
	bool grp_used; /* GRP holds a value of the current instruction */
};

/* Host register of a guest register that has one. */
static int host_reg(int gpr)
{
	return gpr == RSP ? GSP : gpr;
}

static struct cold *cold_new(struct gen *g, enum cold_kind kind, unsigned insn)
{
	if (g->ncold == sizeof(g->cold) / sizeof(g->cold[0])) {
		g->c.overflow = true;
		return &g->cold[0];
	}
	struct cold *d = &g->cold[g->ncold++];
	*d = (struct cold){ .kind = kind, .insn = insn };
	return d;
}

/* --- Links --- */

static uint32_t link_new(struct gen *g, uint64_t pc, uint32_t mode, uint64_t from_pc)
{
	uint32_t i = g->vm->nlink++;
	g->vm->link[i] = (struct link){ .src = g->tb, .pc = pc, .mode = mode,
					.backward = ((pc ^ from_pc) & PAGE_MASK) == 0 && pc <= from_pc };
	return i;
}

static void link_at(struct gen *g, uint32_t link, uint8_t *rel32)
{
	g->vm->link[link].rel32_at = (uint32_t)((intptr_t)rel32 + g->c.rx_delta);
}

/* jmp/call/jcc to a guest address, linked later. rel32s are 4-aligned: they are patched while others run. */
static void e_link(struct gen *g, int opcode, int cc, uint64_t pc, uint32_t mode, uint64_t from_pc, unsigned insn)
{
	struct code *c = &g->c;
	uint32_t link = link_new(g, pc, mode, from_pc);
	struct cold *d = cold_new(g, COLD_LINK, insn);
	d->link = link;
	if (cc >= 0) {
		e_align(c, 4, 2);
		d->from[0] = e_jcc_fwd(c, cc);
	} else {
		e_align(c, 4, 3);
		e8(c, (uint8_t)opcode);
		e32(c, 0);
		d->from[0] = c->p - 4;
	}
	link_at(g, link, d->from[0]);
}

static void e_exit_pc(struct gen *g, uint32_t stub, uint64_t pc)
{
	e_mov_imm(&g->c, T1, pc);
	e_jmp(&g->c, stub);
}

/* Leave this one to the stepper, and end the block. */
static void gen_step(struct gen *g, unsigned i)
{
	e_exit_pc(g, g->vm->stub.step, g->b->insn[i].pc);
	g->ended = true;
}

/* --- Flagless comparisons --- */

/* rcx = T1 - pc, flags untouched. */
static void e_sub_pc(struct code *c, uint64_t pc)
{
	if (fits32((int64_t)-pc)) {
		e_lea(c, H_RCX, mem_b(T1, (int32_t)-pc));
	} else {
		e_mov_imm(c, H_RCX, -pc);
		e_lea(c, H_RCX, mem_bi(H_RCX, T1, 1, 0));
	}
}

/* Fall through if T1 == pc, else go to `miss` with T1 kept. Uses T2; rcx and flags are kept. */
static void e_expect_pc(struct code *c, uint64_t pc, uint32_t miss)
{
	e_mov_rr(c, T2, H_RCX);
	e_sub_pc(c, pc);
	uint8_t *ok = e_j8_fwd(c, OP_JRCXZ);
	e_mov_rr(c, H_RCX, T2);
	e_jmp(c, miss);
	e_patch8(c, ok);
	e_mov_rr(c, H_RCX, T2);
}

/* --- Flags around a check --- */

static void e_save_flags(struct gen *g, bool grp)
{
	struct code *c = &g->c;
	if (grp)
		e_mov_rr(c, GRP, H_RAX);
	else
		e_store(c, mem_gs(OFF(save_rax)), H_RAX);
	e8(c, 0x9f);				       /* lahf */
	e8(c, 0x0f), e8(c, 0x90), e8(c, 0xc0);	       /* seto al */
}

static void e_restore_flags(struct gen *g, bool grp)
{
	struct code *c = &g->c;
	e8(c, 0x04), e8(c, 0x7f); /* add al, 0x7f: OF */
	e8(c, 0x9e);		  /* sahf */
	if (grp)
		e_mov_rr(c, H_RAX, GRP);
	else
		e_load(c, H_RAX, mem_gs(OFF(save_rax)));
}

/* --- Addresses and checks --- */

/* dst = linear address; uses T2. dst is T1 or an identity register that the address does not use. */
static void e_address(struct gen *g, int dst, int base, int index, int scale, int seg, int64_t disp)
{
	struct code *c = &g->c;
	if (base < 0 && index < 0) {
		e_mov_imm(c, dst, (uint64_t)disp);
	} else {
		if (base >= 0 && is_slot(base)) {
			e_load(c, T1, mem_gs(OFF_GPR(base)));
			base = T1;
		} else if (base >= 0) {
			base = host_reg(base);
		}
		if (index >= 0 && is_slot(index)) {
			e_load(c, T2, mem_gs(OFF_GPR(index)));
			index = T2;
		}
		if (fits32(disp)) {
			e_lea(c, dst, mem_bi(base, index, scale, (int32_t)disp));
		} else { /* only RIP-relative addresses beside FS/GS bases are this far: no base, no index */
			e_mov_imm(c, dst, (uint64_t)disp);
		}
	}
	if (seg == SREG_FS || seg == SREG_GS) {
		e_load(c, T2, mem_gs((uint32_t)(OFF(s.seg) + (unsigned)seg * sizeof(struct x86_seg) +
						offsetof(struct x86_seg, base))));
		e_lea(c, dst, mem_bi(dst, T2, 1, 0));
	}
}

static void e_insn_address(struct gen *g, const struct block_insn *i)
{
	e_address(g, T1, i->base, i->index, i->scale, i->seg, i->disp);
}

static bool is_constant(int base, int index, int seg)
{
	return base < 0 && index < 0 && seg != SREG_FS && seg != SREG_GS;
}

static uint32_t tlb_const(const struct gen *g, uint64_t gva)
{
	return g->tlb_off + (uint32_t)((gva >> 12) & (g->tlb_mask >> 5)) * (uint32_t)sizeof(struct tlb_entry);
}

/* The jump to the cold part of a check; the forced mode takes it always. */
static uint8_t *e_check_jump(struct gen *g, int cc)
{
	return g->vm->debug & ACCEL_DEBUG_CHECKS_FAIL ? e_jmp_fwd(&g->c) : e_jcc_fwd(&g->c, cc);
}

/* Check T1 for `len` bytes against the TLB: jumps to cold if it misses. Then T1 is the offset in the page and T2 the entry's offset
 * from the TLB's start. Clobbers flags. */
static uint8_t *e_tlb_check(struct gen *g, bool write, unsigned len)
{
	struct code *c = &g->c;
	e_rorx(c, T2, T1, 7);
	e8(c, 0x41), e8(c, 0x81), e8(c, 0xe1), e32(c, g->tlb_mask); /* and r9d, mask */
	e_op_mem(c, 1, 0x03, T1,
		 mem_gsr(T2, g->tlb_off + (uint32_t)(write ? offsetof(struct tlb_entry, nwrite) : offsetof(struct tlb_entry, nread))));
	e8(c, 0x49), e8(c, 0x81), e8(c, 0xf8), e32(c, (uint32_t)(PAGE_SIZE - len)); /* cmp r8, 4096 - len */
	return e_check_jump(g, CC_A);
}

/* The same for an address known now: compares the entry's tag. */
static uint8_t *e_tlb_check_const(struct gen *g, uint64_t gva, bool write)
{
	struct code *c = &g->c;
	uint64_t ntag = -(gva & PAGE_MASK);
	struct mem tag = mem_gs(tlb_const(g, gva) +
				(uint32_t)(write ? offsetof(struct tlb_entry, nwrite) : offsetof(struct tlb_entry, nread)));
	if (fits32((int64_t)ntag)) {
		e_op_mem(c, 1, 0x81, 7, tag);
		e32(c, (uint32_t)ntag);
	} else {
		e_mov_imm(c, T1, ntag);
		e_op_mem(c, 1, 0x39, T1, tag);
	}
	return e_check_jump(g, CC_NE);
}

/* An access checked by itself: afterwards the host address is in *op (T1/T2 based). */
static void gen_single(struct gen *g, unsigned i, const struct block_insn *addr, unsigned size, bool write, struct mem *op)
{
	struct code *c = &g->c;
	const struct block_insn *bi = &g->b->insn[i];
	bool live = bi->live_in != 0;
	bool grp = !bi->grp_busy && !g->grp_used;
	uint32_t retry = code_rx(c);
	bool constant = is_constant(addr->base, addr->index, addr->seg) &&
			(((uint64_t)addr->disp ^ ((uint64_t)addr->disp + size - 1)) & PAGE_MASK) == 0;
	uint8_t *from;
	if (constant) {
		if (live)
			e_save_flags(g, grp);
		from = e_tlb_check_const(g, (uint64_t)addr->disp, write);
		if (live)
			e_restore_flags(g, grp);
		e_load(c, T2, mem_gs(tlb_const(g, (uint64_t)addr->disp) + (uint32_t)offsetof(struct tlb_entry, hpage)));
		*op = mem_b(T2, (int32_t)((uint64_t)addr->disp & (PAGE_SIZE - 1)));
	} else {
		e_insn_address(g, addr);
		if (live)
			e_save_flags(g, grp);
		from = e_tlb_check(g, write, size);
		if (live)
			e_restore_flags(g, grp);
		e_load(c, T2, mem_gsr(T2, g->tlb_off + (uint32_t)offsetof(struct tlb_entry, hpage)));
		*op = mem_bi(T1, T2, 1, 0);
	}
	struct cold *d = cold_new(g, COLD_SINGLE, i);
	d->from[0] = from;
	d->retry = retry;
	d->saved = live;
	d->saved_grp = grp;
	d->what = size | (write ? 0x100u : 0) | i << 16;
	d->addr = *addr;
}

/* The planned checks before instruction i. */
static void gen_check(struct gen *g, unsigned k)
{
	struct code *c = &g->c;
	const struct check *ch = &g->b->check[k];
	bool grp = !ch->stack || !g->b->insn[ch->at].grp_busy;
	uint32_t retry = code_rx(c);
	uint8_t *from;
	if (ch->stack) {
		e_lea(c, T1, mem_b(ch->base, (int32_t)ch->lo));
		if (ch->save_flags)
			e_save_flags(g, grp);
		e_op_mem(c, 1, 0x03, T1, mem_gs(OFF(stack_ntag)));
		e8(c, 0x49), e8(c, 0x81), e8(c, 0xf8), e32(c, (uint32_t)(PAGE_SIZE - ch->len));
		from = e_check_jump(g, CC_A);
		if (ch->save_flags)
			e_restore_flags(g, grp);
	} else if (is_constant(ch->base, ch->index, ch->seg)) {
		if (ch->save_flags)
			e_save_flags(g, grp);
		from = e_tlb_check_const(g, (uint64_t)ch->lo, ch->write);
		if (ch->save_flags)
			e_restore_flags(g, grp);
		e_load(c, GRP, mem_gs(tlb_const(g, (uint64_t)ch->lo) + (uint32_t)offsetof(struct tlb_entry, hpage)));
	} else {
		e_address(g, T1, ch->base, ch->index, ch->scale, ch->seg, ch->lo);
		if (ch->save_flags)
			e_save_flags(g, grp);
		from = e_tlb_check(g, ch->write, ch->len);
		if (ch->save_flags)
			e_restore_flags(g, grp);
		e_load(c, GRP, mem_gsr(T2, g->tlb_off + (uint32_t)offsetof(struct tlb_entry, addend)));
	}
	struct cold *d = cold_new(g, ch->stack ? COLD_STACK : COLD_GROUP, ch->at);
	d->from[0] = from;
	d->retry = retry;
	d->saved = ch->save_flags;
	d->saved_grp = grp;
	d->check = k;
	d->link = link_new(g, g->b->insn[ch->at].pc, g->b->mode | MODE_NOMERGE, g->b->insn[ch->at].pc);
}

/* Operand of an access under a group's check. May use T1 and T2; `plain_base` asks for one that uses no identity register. */
static struct mem group_operand(struct gen *g, const struct block_insn *bi, bool no_identity)
{
	struct code *c = &g->c;
	if (is_constant(bi->base, bi->index, bi->seg))
		return mem_b(GRP, (int32_t)((uint64_t)bi->disp & (PAGE_SIZE - 1)));
	if (bi->base >= 0 && bi->index < 0 && bi->seg == SREG_DS && !no_identity) {
		int base = host_reg(bi->base);
		if (is_slot(bi->base)) {
			e_load(c, T1, mem_gs(OFF_GPR(bi->base)));
			base = T1;
		}
		return mem_bi(base, GRP, 1, (int32_t)bi->disp);
	}
	e_insn_address(g, bi);
	return mem_bi(T1, GRP, 1, 0);
}

static struct mem stack_operand(int64_t disp)
{
	return mem_bi(GSP, STK, 1, (int32_t)disp);
}

/* --- Copied instructions --- */

static int vex_vvvv(const struct x86_insn *in)
{
	return (~in->bytes[in->opcode_off - 1] >> 3) & 15;
}

static bool in_mem(const struct mem *m, int reg)
{
	return m->base == reg || m->index == reg;
}

static void gen_plain(struct gen *g, unsigned i)
{
	struct code *c = &g->c;
	struct block_insn *bi = &g->b->insn[i];
	struct x86_insn in = bi->in;
	struct mem op = { .base = -1, .index = -1 };
	unsigned high = x86_high_byte(&in);

	if (in.has_mem) {
		if (high && (in.mnemonic == ZYDIS_MNEMONIC_CMPXCHG || in.mnemonic == ZYDIS_MNEMONIC_XADD)) {
			gen_step(g, i);
			return;
		}
		if (bi->acc == ACC_STACK)
			op = stack_operand(bi->disp);
		else if (bi->acc == ACC_GROUP)
			op = group_operand(g, bi, high);
		else
			gen_single(g, i, bi, in.mem_size, in.mem_written, &op);
	}

	/* Guest registers that live in slots: to scratch registers, or (one that is only in ModRM.rm) left in memory. */
	struct x86_rewrite rw = { .mem_base = -1, .mem_index = -1 };
	for (int r = 0; r < 16; r++)
		rw.map[r] = (uint8_t)host_reg(r);
	uint16_t slots = 0;
	int vvvv = in.gpr_ops & OPND_VVVV ? vex_vvvv(&in) : -1;
	if (in.gpr_ops & OPND_REG && is_slot(in.reg))
		slots |= (uint16_t)(1u << in.reg);
	if (in.gpr_ops & OPND_OPCODE && is_slot(opcode_gpr(&in)))
		slots |= (uint16_t)(1u << opcode_gpr(&in));
	if (vvvv >= 0 && is_slot(vvvv))
		slots |= (uint16_t)(1u << vvvv);
	if (in.gpr_ops & OPND_RM && is_slot(in.rm) && !in.has_mem) {
		bool written = in.gpr_written >> in.rm & 1;
		bool other = slots >> in.rm & 1;
		if (in.mnemonic != ZYDIS_MNEMONIC_XCHG && !(written && (in.opsize == 4 || other || in.encoding != ZYDIS_INSTRUCTION_ENCODING_LEGACY || in.fpu))) {
			uint8_t tmp[X86_REWRITE_MAX];
			rw.rm_to_mem = true;
			rw.gs = true;
			rw.mem_disp = (int32_t)OFF_GPR(in.rm);
			if (x86_rewrite(&in, &rw, tmp) < 0) {
				rw.rm_to_mem = rw.gs = false;
				rw.mem_disp = 0;
			}
		}
		if (!rw.rm_to_mem)
			slots |= (uint16_t)(1u << in.rm);
	}

	if (slots && op.base == T1 && op.index == T2) {
		/* One register for the address frees the other. */
		e_lea(c, T1, op);
		op = mem_b(T1, 0);
	}
	int scratch[3], nscratch = 0;
	if (!in_mem(&op, T1))
		scratch[nscratch++] = T1;
	if (!in_mem(&op, T2))
		scratch[nscratch++] = T2;
	if (!in_mem(&op, GRP) && !bi->grp_busy)
		scratch[nscratch++] = GRP;
	if (__builtin_popcount(slots) > nscratch) {
		gen_step(g, i);
		return;
	}
	nscratch = 0;
	for (int r = 0; r < 16; r++)
		if (slots >> r & 1) {
			int t = scratch[nscratch++];
			rw.map[r] = (uint8_t)t;
			if (in.gpr_read >> r & 1)
				e_load(c, t, mem_gs(OFF_GPR(r)));
		}
	int partner = -1;
	if (in.has_mem) {
		rw.mem_base = (int8_t)op.base;
		rw.mem_index = (int8_t)op.index;
		rw.mem_disp = op.disp;
		if (high & 1) { /* AH..DH cannot stand beside a REX prefix: swap the halves around it */
			partner = in.reg - 4;
			in.reg = (uint8_t)partner;
			e8(c, 0x86), e8(c, (uint8_t)(0xc0 | (partner + 4) << 3 | partner));
		}
	}
	uint8_t out[X86_REWRITE_MAX];
	int n = x86_rewrite(&in, &rw, out);
	if (n < 0) {
		if (partner >= 0) /* undo: nothing happened */
			e8(c, 0x86), e8(c, (uint8_t)(0xc0 | (partner + 4) << 3 | partner));
		gen_step(g, i);
		return;
	}
	e_bytes(c, out, (unsigned)n);
	if (partner >= 0)
		e8(c, 0x86), e8(c, (uint8_t)(0xc0 | (partner + 4) << 3 | partner));
	for (int r = 0; r < 16; r++)
		if (slots >> r & 1 && in.gpr_written >> r & 1)
			e_store(c, mem_gs(OFF_GPR(r)), rw.map[r]);
}

/* Value of a guest register in a host register (T for slots). */
static int e_guest_reg(struct gen *g, int gpr, int t)
{
	if (!is_slot(gpr))
		return host_reg(gpr);
	e_load(&g->c, t, mem_gs(OFF_GPR(gpr)));
	return t;
}

static void gen_lea(struct gen *g, unsigned i)
{
	struct code *c = &g->c;
	const struct block_insn *bi = &g->b->insn[i];
	int dst = is_slot(bi->in.reg) ? T1 : host_reg(bi->in.reg);
	/* Into T1 first if the address needs T1 or T2 anyway. LEA ignores segments. */
	bool direct = dst != T1 && !(bi->base >= 0 && is_slot(bi->base)) && (fits32(bi->disp) || (bi->base < 0 && bi->index < 0));
	e_address(g, direct ? dst : T1, bi->base, bi->index, bi->scale, SREG_DS, bi->disp);
	if (!direct && dst != T1)
		e_mov_rr(c, dst, T1);
	if (bi->in.opsize == 4)
		e_op_reg(c, 0, 0x8b, dst, dst);
	if (dst == T1)
		e_store(c, mem_gs(OFF_GPR(bi->in.reg)), T1);
}

/* --- Stack instructions --- */

/* An address off RSP or RBP for gen_single. */
static struct block_insn stack_address(int base, int64_t disp)
{
	return (struct block_insn){ .base = (int8_t)base, .index = -1, .scale = 1, .seg = SREG_DS, .disp = disp };
}

/* Where a push of 8 bytes goes; unmerged blocks check it here (then T1 holds the host address alone). */
static struct mem push_operand(struct gen *g, unsigned i)
{
	if (g->b->insn[i].acc == ACC_STACK)
		return stack_operand(-8);
	struct block_insn a = stack_address(RSP, -8);
	struct mem op;
	gen_single(g, i, &a, 8, true, &op);
	e_lea(&g->c, T1, op);
	return mem_b(T1, 0);
}

static struct mem pop_operand(struct gen *g, unsigned i)
{
	if (g->b->insn[i].acc == ACC_STACK)
		return stack_operand(0);
	struct block_insn a = stack_address(RSP, 0);
	struct mem op;
	gen_single(g, i, &a, 8, false, &op);
	return op;
}

static void e_move_rsp(struct gen *g, int32_t by)
{
	e_lea(&g->c, GSP, mem_b(GSP, by));
}

static void gen_push(struct gen *g, unsigned i)
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
	gen_single(g, i, &g->b->insn[i], 8, false, &op);
	e_load(&g->c, dst, op);
}

static void gen_push_mem(struct gen *g, unsigned i)
{
	bool window = g->b->insn[i].acc == ACC_STACK;
	int t = window ? T1 : GRP; /* unmerged blocks have no groups */
	e_load_operand(g, i, t);
	g->grp_used = !window;
	e_store(&g->c, push_operand(g, i), t);
	e_move_rsp(g, -8);
}

static void gen_pop(struct gen *g, unsigned i)
{
	struct code *c = &g->c;
	int reg = opcode_gpr(&g->b->insn[i].in);
	struct mem op = pop_operand(g, i);
	if (is_slot(reg)) {
		e_load(c, T1, op);
		e_store(c, mem_gs(OFF_GPR(reg)), T1);
	} else {
		e_load(c, host_reg(reg), op);
	}
	e_move_rsp(g, 8);
}

static void gen_leave(struct gen *g, unsigned i)
{
	struct code *c = &g->c;
	if (g->b->insn[i].acc == ACC_STACK) {
		/* The load first: where RBP is not canonical it faults on the host. */
		e_lea(c, T1, mem_b(H_RBP, 8));
		e_load(c, H_RBP, mem_bi(H_RBP, STK, 1, 0));
		e_mov_rr(c, GSP, T1);
		return;
	}
	struct block_insn a = stack_address(RBP, 0);
	struct mem op;
	gen_single(g, i, &a, 8, false, &op);
	e_load(c, T1, op);
	e_lea(c, GSP, mem_b(H_RBP, 8));
	e_mov_rr(c, H_RBP, T1);
}

static void gen_pushf(struct gen *g, unsigned i)
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
	e_load32(c, T2, (struct mem){ .base = -1, .index = T2, .scale = 4, .disp = (int32_t)OFF(icache), .gs = true });
	e8(c, 0x41), e8(c, 0xff), e8(c, call ? 0xd1 : 0xe1);
}

static void e_push_return(struct gen *g, unsigned i, struct mem op)
{
	struct code *c = &g->c;
	uint64_t next = g->b->insn[i].next;
	if (fits32((int64_t)next)) {
		e_mov_mem_simm64(c, op, (int32_t)next);
	} else {
		e_mov_imm(c, T2, next);
		e_store(c, op, T2);
	}
	e_move_rsp(g, -8);
}

/* Where the host return of the callee lands, T1 = the guest's return address. */
static void e_landing(struct gen *g, unsigned i)
{
	const struct block_insn *bi = &g->b->insn[i];
	e_expect_pc(&g->c, bi->next, g->vm->stub.lookup);
	e_link(g, 0xe9, -1, bi->next, g->b->mode & ~(uint32_t)MODE_NOMERGE, bi->pc, i);
}

static void gen_call(struct gen *g, unsigned i)
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

static void gen_call_indirect(struct gen *g, unsigned i)
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

static void gen_ret(struct gen *g, unsigned i)
{
	struct code *c = &g->c;
	const struct x86_insn *in = &g->b->insn[i].in;
	e_load(c, T1, pop_operand(g, i));
	e_move_rsp(g, 8 + (in->opcode == 0xc2 ? (int32_t)(uint16_t)in->imm : 0));
	e8(c, 0xc3);
}

/* Leave through a link if rcx is zero (JRCXZ) or non-zero (LOOP). */
static void gen_count_branch(struct gen *g, unsigned i, bool loop)
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

/* --- The rest --- */

static void gen_bitstring(struct gen *g, unsigned i)
{
	struct code *c = &g->c;
	struct block_insn *bi = &g->b->insn[i];
	const struct x86_insn *in = &bi->in;
	bool q = in->opsize == 8;
	/* The element that the bit offset selects: element size * (offset >> 5 or 6), signed (SDM 2A BT). The check below needs
	 * the address again when it fails, so it is made by the stepper's hands then: no retry with a moved address. */
	uint32_t retry = code_rx(&g->c);
	e_insn_address(g, bi);
	int bit = e_guest_reg(g, in->reg, T2);
	if (!q) {
		e_op_reg(c, 1, 0x63, T2, bit); /* movsxd */
		bit = T2;
	}
	e_mov_imm(c, GRP, q ? 6 : 5);
	e_sarx(c, GRP, bit, GRP);
	e_lea(c, T1, mem_bi(T1, GRP, q ? 8 : 4, 0));
	e_mov_rr(c, GRP, T1); /* for the cold path */
	bool live = bi->live_in != 0;
	if (live)
		e_save_flags(g, false);
	uint8_t *from = e_tlb_check(g, in->mem_written, in->opsize);
	if (live)
		e_restore_flags(g, false);
	e_load(c, T2, mem_gsr(T2, g->tlb_off + (uint32_t)offsetof(struct tlb_entry, hpage)));
	e_lea(c, T1, mem_bi(T1, T2, 1, 0));
	struct cold *d = cold_new(g, COLD_SINGLE, i);
	d->from[0] = from;
	d->retry = retry;
	d->saved = live;
	d->saved_grp = false;
	d->what = in->opsize | (in->mem_written ? 0x100u : 0) | i << 16;
	d->addr = (struct block_insn){ .base = -2 };
	e_pxxx_gs(c, 2, T2, e_guest_reg(g, in->reg, T2), q ? OFF(pext_63) : OFF(pext_31));
	struct x86_rewrite rw = { .mem_base = T1, .mem_index = -1 };
	for (int r = 0; r < 16; r++)
		rw.map[r] = (uint8_t)host_reg(r);
	rw.map[in->reg] = T2;
	uint8_t out[X86_REWRITE_MAX];
	int n = x86_rewrite(in, &rw, out);
	if (n < 0) {
		gen_step(g, i);
		return;
	}
	e_bytes(c, out, (unsigned)n);
}

static void gen_sti(struct gen *g, unsigned i)
{
	struct code *c = &g->c;
	e_mov_mem_imm8(c, mem_gs(OFF(iflag)), 1);
	e_mov_rr(c, T2, H_RCX);
	e_op_mem(c, 0, 0xb60f, H_RCX, mem_gs(OFF(irq_waiting)));
	uint8_t *none = e_j8_fwd(c, OP_JRCXZ);
	e_mov_rr(c, H_RCX, T2);
	struct cold *d = cold_new(g, COLD_EXIT_PC, i);
	d->from[0] = e_jmp_fwd(c);
	d->pc = g->b->insn[i].next;
	e_patch8(c, none);
	e_mov_rr(c, H_RCX, T2);
}

static void gen_swapgs(struct gen *g)
{
	struct code *c = &g->c;
	uint32_t base = (uint32_t)(OFF(s.seg) + SREG_GS * sizeof(struct x86_seg) + offsetof(struct x86_seg, base));
	e_load(c, T1, mem_gs(base));
	e_load(c, T2, mem_gs(OFF(s.kernel_gs_base)));
	e_store(c, mem_gs(base), T2);
	e_store(c, mem_gs(OFF(s.kernel_gs_base)), T1);
}

static void gen_rdtsc(struct gen *g, unsigned i, bool p)
{
	struct code *c = &g->c;
	if (g->vm->debug & ACCEL_DEBUG_ICOUNT) {
		gen_step(g, i);
		return;
	}
	if (p)
		e8(c, 0x0f), e8(c, 0xae), e8(c, 0xe8); /* lfence: earlier loads first */
	e8(c, 0x0f), e8(c, 0x31);
	e_rorx(c, H_RDX, H_RDX, 32);
	e_lea(c, H_RAX, mem_bi(H_RAX, H_RDX, 1, 0));
	e_load(c, T1, mem_gs(OFF(s.tsc_offset)));
	e_lea(c, H_RAX, mem_bi(H_RAX, T1, 1, 0));
	e_rorx(c, H_RDX, H_RAX, 32);
	e_op_reg(c, 0, 0x8b, H_RDX, H_RDX);
	e_op_reg(c, 0, 0x8b, H_RAX, H_RAX);
	if (p)
		e_load32(c, H_RCX, mem_gs(OFF(s.tsc_aux)));
}

static void gen_from_sreg(struct gen *g, unsigned i)
{
	struct code *c = &g->c;
	const struct x86_insn *in = &g->b->insn[i].in;
	if ((in->reg & 7) > SREG_GS) {
		gen_step(g, i);
		return;
	}
	int dst = is_slot(in->rm) ? T1 : host_reg(in->rm);
	e_op_mem(c, 0, 0xb70f, dst,
		 mem_gs((uint32_t)(OFF(s.seg) + (in->reg & 7u) * sizeof(struct x86_seg) + offsetof(struct x86_seg, sel))));
	if (dst == T1)
		e_store(c, mem_gs(OFF_GPR(in->rm)), T1);
}

static void gen_string(struct gen *g, unsigned i)
{
	struct code *c = &g->c;
	const struct block_insn *bi = &g->b->insn[i];
	e_mov_imm(c, T1, bi->in.opcode | (uint32_t)bi->in.rep << 8 | (uint32_t)bi->in.opsize << 16);
	e_mov_imm(c, T2, bi->pc);
	e_call(c, g->vm->stub.string);
}

/* A helper that always jumps somewhere: T1 = argument. */
static void gen_transfer(struct gen *g, uint32_t stub, uint64_t arg)
{
	e_mov_imm(&g->c, T1, arg);
	e_call(&g->c, stub);
	e8(&g->c, 0x0f), e8(&g->c, 0x0b);
}

static void gen_insn(struct gen *g, unsigned i)
{
	const struct block_insn *bi = &g->b->insn[i];
	uint32_t mode = g->b->mode & ~(uint32_t)MODE_NOMERGE;
	g->grp_used = false;
	switch ((enum insn_class)bi->cls) {
	case CLS_PLAIN:
		gen_plain(g, i);
		break;
	case CLS_LEA:
		gen_lea(g, i);
		break;
	case CLS_NOP:
		break;
	case CLS_PUSH:
		gen_push(g, i);
		break;
	case CLS_PUSH_MEM:
		gen_push_mem(g, i);
		break;
	case CLS_POP:
		gen_pop(g, i);
		break;
	case CLS_LEAVE:
		gen_leave(g, i);
		break;
	case CLS_PUSHF:
		gen_pushf(g, i);
		break;
	case CLS_BITSTRING:
		gen_bitstring(g, i);
		break;
	case CLS_STRING:
		gen_string(g, i);
		break;
	case CLS_CLI:
		e_mov_mem_imm8(&g->c, mem_gs(OFF(iflag)), 0);
		break;
	case CLS_STI:
		gen_sti(g, i);
		break;
	case CLS_SWAPGS:
		gen_swapgs(g);
		break;
	case CLS_RDTSC:
	case CLS_RDTSCP:
		gen_rdtsc(g, i, bi->cls == CLS_RDTSCP);
		break;
	case CLS_FROM_SREG:
		gen_from_sreg(g, i);
		break;
	case CLS_JCC:
		e_link(g, 0, bi->in.opcode & 15, branch_target(bi), mode, bi->pc, i);
		break;
	case CLS_STEP:
		gen_step(g, i);
		break;
	case CLS_JMP:
		e_link(g, 0xe9, -1, branch_target(bi), mode, bi->pc, i);
		break;
	case CLS_JMP_IND:
		e_target(g, i, T1);
		e_lookup(g, false);
		break;
	case CLS_JRCXZ:
	case CLS_LOOP:
		gen_count_branch(g, i, bi->cls == CLS_LOOP);
		break;
	case CLS_CALL:
		gen_call(g, i);
		break;
	case CLS_CALL_IND:
		gen_call_indirect(g, i);
		break;
	case CLS_RET:
		gen_ret(g, i);
		break;
	case CLS_SYSCALL:
		gen_transfer(g, g->vm->stub.syscall, bi->next);
		break;
	case CLS_SYSRET:
		gen_transfer(g, g->vm->stub.sysret, bi->pc);
		break;
	case CLS_IRET:
		gen_transfer(g, g->vm->stub.iret, bi->pc);
		break;
	}
}

/* --- Cold part --- */

static void gen_cold(struct gen *g, struct cold *d)
{
	struct code *c = &g->c;
	for (int k = 0; k < 2; k++)
		if (d->from[k])
			e_patch32(c, d->from[k]);
	const struct check *ch = &g->b->check[d->check];
	switch (d->kind) {
	case COLD_SINGLE:
		if (d->saved)
			e_restore_flags(g, d->saved_grp);
		if (d->addr.base == -2)
			e_mov_rr(c, T1, GRP);
		else
			e_insn_address(g, &d->addr);
		e_mov_imm(c, T2, d->what);
		e_call(c, g->vm->stub.fill_single);
		e_jmp(c, d->retry);
		break;
	case COLD_GROUP:
	case COLD_STACK:
		if (d->saved)
			e_restore_flags(g, d->saved_grp);
		if (d->kind == COLD_STACK)
			e_lea(c, T1, mem_b(ch->base, (int32_t)ch->lo));
		else
			e_address(g, T1, ch->base, ch->index, ch->scale, ch->seg, ch->lo);
		e_mov_imm(c, T2, ch->len << 16 | (ch->write ? 0x100u : 0));
		e_call(c, d->kind == COLD_STACK ? g->vm->stub.fill_stack : g->vm->stub.fill_group);
		e_jmp(c, d->retry);
		/* fill_* returns here when the merged check cannot pass: on in the unmerged block. */
		e_align(c, 4, 3);
		e8(c, 0xe9);
		link_at(g, d->link, c->p);
		g->vm->link[d->link].stub = code_rx(c) + 4;
		e32(c, 0);
		e_mov_mem_imm32(c, mem_gs(OFF(exit_arg)), d->link);
		e_jmp(c, g->vm->stub.link);
		break;
	case COLD_LINK:
		g->vm->link[d->link].stub = code_rx(c);
		e_mov_mem_imm32(c, mem_gs(OFF(exit_arg)), d->link);
		e_jmp(c, g->vm->stub.link);
		break;
	case COLD_EXIT_PC:
		e_mov_mem_imm8(c, mem_gs(OFF(s.shadow)), SHADOW_STI);
		e_exit_pc(g, g->vm->stub.pc, d->pc);
		break;
	}
}

/* Token check and poll. */
static void gen_entry(struct gen *g, struct tb *t)
{
	struct code *c = &g->c;
	struct dbt_vm *vm = g->vm;
	const struct view *w = &vm->view[t->view];
	struct mem slot = mem_gs(OFF(token) + 4 * dbt_token_slot(w->va, w->mode));
	uint8_t *bad, *polled;
	e_align(c, 16, 0);
	t->checked = code_rx(c);
	if (!t->flags_live) {
		e_op_mem(c, 0, 0x81, 7, slot); /* cmp dword [slot], token */
		e32(c, w->token);
		bad = e_jcc_fwd(c, CC_NE);
		t->poll = code_rx(c);
		e_op_mem(c, 0, 0x80, 7, mem_gs(OFF(exit_req))); /* cmp byte [exit_req], 0 */
		e8(c, 0);
		polled = e_jcc_fwd(c, CC_NE);
	} else {
		e_mov_rr(c, T2, H_RCX);
		e_load32(c, H_RCX, slot);
		e_op_mem(c, 0, 0x8d, H_RCX, mem_b(H_RCX, (int32_t)-w->token)); /* lea ecx, [rcx - token] */
		uint8_t *ok = e_j8_fwd(c, OP_JRCXZ);
		e_mov_rr(c, H_RCX, T2);
		bad = e_jmp_fwd(c);
		e_patch8(c, ok);
		e_mov_rr(c, H_RCX, T2);
		t->poll = code_rx(c);
		e_mov_rr(c, T2, H_RCX);
		e_op_mem(c, 0, 0xb60f, H_RCX, mem_gs(OFF(exit_req)));
		ok = e_j8_fwd(c, OP_JRCXZ);
		e_mov_rr(c, H_RCX, T2);
		polled = e_jmp_fwd(c);
		e_patch8(c, ok);
		e_mov_rr(c, H_RCX, T2);
	}
	/* Their cold ends come right here, jumped over by nobody: before the body would cost a jump, so they go after it. */
	g->cold[0].from[0] = bad;
	g->cold[0].from[1] = polled;
	t->body = code_rx(c);
}

static void gen_entry_cold(struct gen *g)
{
	struct code *c = &g->c;
	e_patch32(c, g->cold[0].from[0]);
	e_mov_mem_imm32(c, mem_gs(OFF(exit_arg)), g->tb);
	e_jmp(c, g->vm->stub.token);
	e_patch32(c, g->cold[0].from[1]);
	e_mov_mem_imm32(c, mem_gs(OFF(exit_arg)), g->tb);
	e_jmp(c, g->vm->stub.poll);
}

int dbt_generate(struct block *b, uint32_t tb)
{
	struct dbt_vm *vm = b->vm;
	struct tb *t = &vm->tb[tb];
	struct gen gen;
	struct gen *g = &gen;
	g->b = b;
	g->vm = vm;
	g->tb = tb;
	g->c = (struct code){ .p = vm->rw + vm->code_used, .end = vm->rw + vm->code_size, .rx_delta = vm->rx - vm->rw };
	g->tlb_off = (uint32_t)(OFF(tlb) + (b->mode & MODE_USER ? sizeof(struct tlb_entry) * TLB_SIZE : 0));
	g->tlb_mask = (vm->debug & ACCEL_DEBUG_TINY_TLB ? 3u : TLB_SIZE - 1) << 5;
	g->ncold = 1; /* 0 is the entry's */
	g->ended = false;
	struct code *c = &g->c;

	t->flags_live = b->insn[0].live_in != 0;
	gen_entry(g, t);
	t->meta = vm->nmeta;
	unsigned i;
	for (i = 0; i < b->n && !g->ended; i++) {
		vm->meta[t->meta + i] = (struct insn_meta){ .host = code_rx(c), .pc = (uint16_t)(b->insn[i].pc - b->pc) };
		if (vm->debug & ACCEL_DEBUG_POISON_FLAGS && b->insn[i].live_in == 0)
			e_mov_imm(c, T1, 0x5a5a5a7f + i * 0x01010101u), e_op_reg(c, 0, 0x02, T1, T1); /* add r8b, r8b */
		for (unsigned k = 0; k < b->nchecks; k++)
			if (b->check[k].at == i && b->check[k].stack)
				gen_check(g, k);
		for (unsigned k = 0; k < b->nchecks; k++)
			if (b->check[k].at == i && !b->check[k].stack)
				gen_check(g, k);
		gen_insn(g, i);
	}
	b->n = i;
	if (!g->ended && b->insn[i - 1].cls < CLS_LAST)
		e_link(g, 0xe9, -1, b->insn[i - 1].next, b->mode & ~(uint32_t)MODE_NOMERGE, b->insn[i - 1].pc, i - 1);
	gen_entry_cold(g);
	for (unsigned k = 1; k < g->ncold; k++)
		gen_cold(g, &g->cold[k]);
	if (c->overflow)
		return -1;
	t->ninsn = (uint16_t)b->n;
	t->len = (uint16_t)(b->insn[b->n - 1].next - b->pc);
	vm->nmeta += b->n;
	vm->code_used = (size_t)(c->p - vm->rw);
	t->host_end = code_rx(c);
	return 0;
}

uint32_t dbt_ind_thunk(struct dbt_vm *vm, struct tb *t)
{
	struct code code = { .p = vm->rw + vm->code_used, .end = vm->rw + vm->code_size, .rx_delta = vm->rx - vm->rw };
	e_align(&code, 16, 0);
	uint32_t at = code_rx(&code);
	e_expect_pc(&code, t->pc, vm->stub.miss);
	e_jmp(&code, t->checked);
	if (code.overflow)
		return 0;
	vm->code_used = (size_t)(code.p - vm->rw);
	return at;
}
