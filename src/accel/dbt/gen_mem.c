/*
 * Data accesses: addresses, inline TLB checks, the planned merged checks, and the operands that result.
 *
 * A check clobbers the status flags; where they are live it saves them in rax around itself (LAHF, SETO), which costs less than PUSHF/POPF.
 */
#include "accel/dbt/gen_internal.h"

/* --- Flags around a check --- */

void e_save_flags(struct gen *g, bool grp)
{
	struct code *c = &g->c;
	if (grp)
		e_mov_rr(c, GRP, H_RAX);
	else
		e_store(c, mem_gs(OFF(save_rax)), H_RAX);
	e8(c, 0x9f);				       /* lahf */
	e8(c, 0x0f), e8(c, 0x90), e8(c, 0xc0);	       /* seto al */
}

void e_restore_flags(struct gen *g, bool grp)
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

/* dst = linear address, which wraps at 4 GiB in compatibility mode; uses T2. dst is T1 or an identity register that the address does not use. */
void e_address(struct gen *g, int dst, const struct address *a)
{
	struct code *c = &g->c;
	int base = a->base, index = a->index, seg = a->seg;
	if (a->rip) {
		e_mov_va(c, dst, (uint64_t)a->disp, RELOC_VA);
	} else if (base < 0 && index < 0) {
		e_mov_imm(c, dst, (uint64_t)a->disp);
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
		e_op_mem(c, g->w, 0x8d, dst, mem_bi(base, index, a->scale, (int32_t)a->disp)); /* MOFFS has neither base nor index */
	}
	if (seg == SREG_FS || seg == SREG_GS) {
		e_load(c, T2, mem_gs((uint32_t)(OFF(s.seg) + (unsigned)seg * sizeof(struct x86_seg) +
						offsetof(struct x86_seg, base))));
		e_op_mem(c, g->w, 0x8d, dst, mem_bi(dst, T2, 1, 0));
	}
}

void e_insn_address(struct gen *g, const struct address *a)
{
	e_address(g, T1, a);
}

static bool is_constant(int base, int index, int seg)
{
	return base < 0 && index < 0 && seg != SREG_FS && seg != SREG_GS;
}

static uint32_t tlb_const(const struct gen *g, uint64_t gva)
{
	return g->tlb_off + (uint32_t)((gva >> 12) & (g->tlb_mask >> 5)) * (uint32_t)sizeof(struct tlb_entry);
}

/* The forced mode makes one check in four fail whatever the address: chosen by address, so that a guest's loops see both kinds. */
uint32_t check_forced(const struct gen *g, uint64_t pc)
{
	bool force = g->vm->debug & ACCEL_DEBUG_CHECKS_FAIL && (pc * 0x9e3779b97f4a7c15ull) >> 62 == 0;
	return force ? FILL_REFUSE : 0;
}

/* The jump to the cold part of a check. */
static uint8_t *e_check_jump(struct gen *g, int cc, uint32_t forced)
{
	return forced ? e_jmp_fwd(&g->c) : e_jcc_fwd(&g->c, cc);
}

/* Check T1 for `len` bytes against the TLB: jumps to cold if it misses. Then T1 is the offset in the page and T2 the entry's offset
 * from the TLB's start. Clobbers flags. */
uint8_t *e_tlb_check(struct gen *g, bool write, unsigned len, uint32_t forced)
{
	struct code *c = &g->c;
	e_rorx(c, T2, T1, 7);
	e8(c, 0x41), e8(c, 0x81), e8(c, 0xe1), e32(c, g->tlb_mask); /* and r9d, mask */
	e_op_mem(c, 1, 0x03, T1,
		 mem_gsr(T2, g->tlb_off + (uint32_t)(write ? offsetof(struct tlb_entry, nwrite) : offsetof(struct tlb_entry, nread))));
	e8(c, 0x49), e8(c, 0x81), e8(c, 0xf8), e32(c, (uint32_t)(PAGE_SIZE - len)); /* cmp r8, 4096 - len */
	return e_check_jump(g, CC_A, forced);
}

/* The same for an address known now: compares the entry's tag. */
static uint8_t *e_tlb_check_const(struct gen *g, uint64_t gva, bool rip, bool write, uint32_t forced)
{
	struct code *c = &g->c;
	uint64_t ntag = -(gva & PAGE_MASK);
	struct mem tag = mem_gs(tlb_const(g, gva) +
				(uint32_t)(write ? offsetof(struct tlb_entry, nwrite) : offsetof(struct tlb_entry, nread)));
	if (fits32((int64_t)ntag) && !(rip && c->movable)) {
		e_op_mem(c, 1, 0x81, 7, tag);
		e32(c, (uint32_t)ntag);
	} else if (rip) {
		e_mov_va(c, T1, ntag, RELOC_NEG);
		e_op_mem(c, 1, 0x39, T1, tag);
		code_note(c, c->p - 4, RELOC_TLB);
	} else {
		e_mov_imm(c, T1, ntag);
		e_op_mem(c, 1, 0x39, T1, tag);
	}
	return e_check_jump(g, CC_NE, forced);
}

/* dst = host page of an address known now, whose check has passed. */
static void e_load_hpage(struct gen *g, int dst, uint64_t gva, bool rip)
{
	e_load(&g->c, dst, mem_gs(tlb_const(g, gva) + (uint32_t)offsetof(struct tlb_entry, hpage)));
	if (rip)
		code_note(&g->c, g->c.p - 4, RELOC_TLB);
}

/* T1 = the lowest address of a group. */
void e_check_address(struct gen *g, const struct check *ch)
{
	const struct address a = { .base = ch->base, .index = ch->index, .scale = ch->scale, .seg = ch->seg, .rip = ch->rip, .disp = ch->lo };
	e_address(g, T1, &a);
}

/* An access checked by itself: afterwards the host address is in *op (T1/T2 based). */
void gen_single(struct gen *g, unsigned i, const struct address *addr, unsigned size, bool write, struct mem *op)
{
	struct code *c = &g->c;
	const struct block_insn *bi = &g->b->insn[i];
	bool live = bi->live_in != 0;
	bool grp = !bi->grp_busy && !g->grp_used;
	uint32_t retry = code_rx(c), forced = check_forced(g, bi->pc);
	bool constant = is_constant(addr->base, addr->index, addr->seg) &&
			(((uint64_t)addr->disp ^ ((uint64_t)addr->disp + size - 1)) & PAGE_MASK) == 0;
	uint8_t *from;
	if (constant) {
		if (live)
			e_save_flags(g, grp);
		from = e_tlb_check_const(g, (uint64_t)addr->disp, addr->rip, write, forced);
		if (live)
			e_restore_flags(g, grp);
		e_load_hpage(g, T2, (uint64_t)addr->disp, addr->rip);
		*op = mem_b(T2, (int32_t)((uint64_t)addr->disp & (PAGE_SIZE - 1)));
	} else {
		e_insn_address(g, addr);
		if (live)
			e_save_flags(g, grp);
		from = e_tlb_check(g, write, size, forced);
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
	d->what = size | (write ? FILL_WRITE : 0) | forced | i << 16;
	d->addr = *addr;
}

/* The planned checks before instruction i. */
void gen_check(struct gen *g, unsigned k)
{
	struct code *c = &g->c;
	const struct check *ch = &g->b->check[k];
	bool grp = !ch->stack || !g->b->insn[ch->at].grp_busy;
	uint32_t retry = code_rx(c), forced = check_forced(g, g->b->insn[ch->at].pc);
	uint8_t *from;
	if (ch->stack) {
		e_lea(c, T1, mem_b(ch->base, (int32_t)ch->lo));
		if (ch->save_flags)
			e_save_flags(g, grp);
		e_op_mem(c, 1, 0x03, T1, mem_gs(OFF(stack_ntag)));
		e8(c, 0x49), e8(c, 0x81), e8(c, 0xf8), e32(c, (uint32_t)(PAGE_SIZE - ch->len));
		from = e_check_jump(g, CC_A, forced);
		if (ch->save_flags)
			e_restore_flags(g, grp);
	} else if (is_constant(ch->base, ch->index, ch->seg)) {
		if (ch->save_flags)
			e_save_flags(g, grp);
		from = e_tlb_check_const(g, (uint64_t)ch->lo, ch->rip, ch->write, forced);
		if (ch->save_flags)
			e_restore_flags(g, grp);
		e_load_hpage(g, GRP, (uint64_t)ch->lo, ch->rip);
	} else {
		e_check_address(g, ch);
		if (ch->save_flags)
			e_save_flags(g, grp);
		from = e_tlb_check(g, ch->write, ch->len, forced);
		if (ch->save_flags)
			e_restore_flags(g, grp);
		if (g->w) {
			e_load(c, GRP, mem_gsr(T2, g->tlb_off + (uint32_t)offsetof(struct tlb_entry, addend)));
		} else { /* the host address itself: sums with an addend would not wrap at 4 GiB */
			e_load(c, T2, mem_gsr(T2, g->tlb_off + (uint32_t)offsetof(struct tlb_entry, hpage)));
			e_lea(c, GRP, mem_bi(T1, T2, 1, 0));
		}
	}
	struct cold *d = cold_new(g, ch->stack ? COLD_STACK : COLD_GROUP, ch->at);
	d->from[0] = from;
	d->retry = retry;
	d->saved = ch->save_flags;
	d->saved_grp = grp;
	d->check = k;
	d->what = (ch->write ? FILL_WRITE : 0) | forced | ch->len << 16;
	d->link = link_new(g, g->b->insn[ch->at].pc, g->b->mode | MODE_NOMERGE, g->b->insn[ch->at].pc);
	g->vm->link[d->link].backward = false; /* no poll: this may be in the shadow of STI, and it is no loop */
}

/* Operand of an access under a group's check. May use T1 and T2; `plain_base` asks for one that uses no identity register. */
struct mem group_operand(struct gen *g, const struct block_insn *bi, bool no_identity)
{
	struct code *c = &g->c;
	if (is_constant(bi->ea.base, bi->ea.index, bi->ea.seg))
		return mem_b(GRP, (int32_t)((uint64_t)bi->ea.disp & (PAGE_SIZE - 1)));
	if (!g->w)
		return mem_b(GRP, bi->grp_off);
	if (bi->ea.base >= 0 && bi->ea.index < 0 && bi->ea.seg == SREG_DS && !no_identity) {
		int base = host_reg(bi->ea.base);
		if (is_slot(bi->ea.base)) {
			e_load(c, T1, mem_gs(OFF_GPR(bi->ea.base)));
			base = T1;
		}
		return mem_bi(base, GRP, 1, (int32_t)bi->ea.disp);
	}
	e_insn_address(g, &bi->ea);
	return mem_bi(T1, GRP, 1, 0);
}

struct mem stack_operand(int64_t disp)
{
	return mem_bi(GSP, STK, 1, (int32_t)disp);
}
