/*
 * Copied instructions: registers renamed, the memory operand replaced, all else byte for byte.
 */
#include "accel/dbt/gen_internal.h"

/* --- Copied instructions --- */

static int vex_vvvv(const struct x86_insn *in)
{
	return (~in->bytes[in->opcode_off - 1] >> 3) & 15;
}

static bool in_mem(const struct mem *m, int reg)
{
	return m->base == reg || m->index == reg;
}

/* VZEROUPPER and VZEROALL of 32-bit code leave registers 8 to 15 alone (SDM 2D): vmovaps xmm, xmm; vpxor xmm, xmm, xmm. */
static void gen_vzero32(struct gen *g, bool all)
{
	struct code *c = &g->c;
	for (unsigned r = 0; r < 8; r++) {
		e8(c, 0xc5);
		e8(c, (uint8_t)(all ? 0x80 | (~r & 15) << 3 | 1 : 0xf8));
		e8(c, all ? 0xef : 0x28);
		e8(c, (uint8_t)(0xc0 | r << 3 | r));
	}
}

void gen_plain(struct gen *g, unsigned i)
{
	struct code *c = &g->c;
	struct block_insn *bi = &g->b->insn[i];
	struct x86_insn in = bi->in;
	struct mem op = { .base = -1, .index = -1 };
	unsigned high = x86_high_byte(&in);

	if (!g->w && (in.mnemonic == ZYDIS_MNEMONIC_VZEROUPPER || in.mnemonic == ZYDIS_MNEMONIC_VZEROALL)) {
		gen_vzero32(g, in.mnemonic == ZYDIS_MNEMONIC_VZEROALL);
		return;
	}
	if (in.has_mem) {
		if (high && (in.mnemonic == ZYDIS_MNEMONIC_CMPXCHG || in.mnemonic == ZYDIS_MNEMONIC_XADD)) {
			gen_step(g, i);
			return;
		}
		if (bi->acc == ACC_STACK)
			op = stack_operand(bi->ea.disp);
		else if (bi->acc == ACC_GROUP)
			op = group_operand(g, bi, high);
		else
			gen_single(g, i, &bi->ea, in.mem_size, in.mem_written, &op);
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
int e_guest_reg(struct gen *g, int gpr, int t)
{
	if (!is_slot(gpr))
		return host_reg(gpr);
	e_load(&g->c, t, mem_gs(OFF_GPR(gpr)));
	return t;
}

void gen_lea(struct gen *g, unsigned i)
{
	struct code *c = &g->c;
	const struct block_insn *bi = &g->b->insn[i];
	int dst = is_slot(bi->in.reg) ? T1 : host_reg(bi->in.reg);
	/* Into T1 first if the address needs T1 or T2 anyway. LEA ignores segments. */
	bool direct = dst != T1 && !(bi->ea.base >= 0 && is_slot(bi->ea.base)) && (fits32(bi->ea.disp) || (bi->ea.base < 0 && bi->ea.index < 0));
	struct address a = bi->ea;
	a.seg = SREG_DS;
	e_address(g, direct ? dst : T1, &a);
	if (!direct && dst != T1)
		e_mov_rr(c, dst, T1);
	if (bi->in.opsize == 4 && g->w)
		e_op_reg(c, 0, 0x8b, dst, dst);
	if (dst == T1)
		e_store(c, mem_gs(OFF_GPR(bi->in.reg)), T1);
}

void gen_bitstring(struct gen *g, unsigned i)
{
	struct code *c = &g->c;
	struct block_insn *bi = &g->b->insn[i];
	const struct x86_insn *in = &bi->in;
	bool q = in->opsize == 8;
	/* The element that the bit offset selects: element size * (offset >> 5 or 6), signed (SDM 2A BT). The check below needs
	 * the address again when it fails, so it is made by the stepper's hands then: no retry with a moved address. */
	uint32_t retry = code_rx(&g->c);
	e_insn_address(g, &bi->ea);
	int bit = e_guest_reg(g, in->reg, T2);
	if (!q) {
		e_op_reg(c, 1, 0x63, T2, bit); /* movsxd */
		bit = T2;
	}
	e_mov_imm(c, GRP, q ? 6 : 5);
	e_sarx(c, GRP, bit, GRP);
	e_op_mem(c, g->w, 0x8d, T1, mem_bi(T1, GRP, q ? 8 : 4, 0));
	e_mov_rr(c, GRP, T1); /* for the cold path */
	bool live = bi->live_in != 0;
	if (live)
		e_save_flags(g, false);
	uint8_t *from = e_tlb_check(g, in->mem_written, in->opsize, check_forced(g, bi->pc));
	if (live)
		e_restore_flags(g, false);
	e_load(c, T2, mem_gsr(T2, g->tlb_off + (uint32_t)offsetof(struct tlb_entry, hpage)));
	e_lea(c, T1, mem_bi(T1, T2, 1, 0));
	struct cold *d = cold_new(g, COLD_SINGLE, i);
	d->from[0] = from;
	d->retry = retry;
	d->saved = live;
	d->saved_grp = false;
	d->what = in->opsize | (in->mem_written ? FILL_WRITE : 0) | check_forced(g, bi->pc) | i << 16;
	d->addr = (struct address){ .base = -2 };
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

