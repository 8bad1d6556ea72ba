#include "cpu/x86/seg.h"

#include <string.h>

static bool real_or_v86(const struct emu *e)
{
	return !x86_protected(e->s) || (e->s->rflags & FL_VM);
}

static int gp(struct emu *e, uint32_t error)
{
	return emu_raise_error(e, VEC_GP, error);
}

/* The selector part of an error code. */
static uint32_t sel_error(uint16_t sel)
{
	return sel & 0xfffc;
}

/* --- descriptors --- */

/* SDM 3A figure 3-8. */
static void expand(uint64_t raw, uint16_t sel, struct x86_seg *seg)
{
	uint32_t lo = raw, hi = raw >> 32;

	seg->sel = sel;
	seg->attr = (hi >> 8) & 0xf0ff;
	seg->base = (lo >> 16) | (hi & 0xff) << 16 | (hi & 0xff000000);
	seg->limit = (lo & 0xffff) | (hi & 0xf0000);
	if (seg->attr & SEG_G)
		seg->limit = seg->limit << 12 | 0xfff;
}

int seg_find(struct emu *e, uint16_t sel, struct seg_desc *d, bool *found)
{
	const struct x86_state *s = e->s;
	uint64_t base = s->gdt.base;
	uint32_t limit = s->gdt.limit, offset = sel & 0xfff8;

	*found = false;
	if (sel & 4) {
		if (!(s->seg[SREG_LDTR].attr & SEG_P))
			return 0;
		base = s->seg[SREG_LDTR].base;
		limit = s->seg[SREG_LDTR].limit;
	}
	if (offset + 7 > limit)
		return 0;
	d->linear = x86_long_mode(s) ? base + offset : (uint32_t)(base + offset);
	d->high = 0;
	int r = emu_lin_read(e, d->linear, &d->raw, 8, true);

	if (r)
		return r;
	expand(d->raw, sel, &d->seg);
	if (x86_long_mode(s) && !(d->seg.attr & SEG_S)) {
		/* System descriptors have 16 bytes (SDM 3A 3.5.2). */
		if (offset + 15 > limit)
			return 0;
		r = emu_lin_read(e, d->linear + 8, &d->high, 8, true);
		if (r)
			return r;
		d->seg.base |= d->high << 32;
	}
	*found = true;
	return 0;
}

int seg_fetch(struct emu *e, uint16_t sel, uint8_t vector, uint32_t ext, struct seg_desc *d)
{
	bool found;
	int r = seg_find(e, sel, d, &found);

	if (r)
		return r;
	return found ? 0 : emu_raise_error(e, vector, sel_error(sel) | ext);
}

int seg_mark(struct emu *e, struct seg_desc *d, unsigned bits)
{
	if ((d->seg.attr & bits) == bits)
		return 0;
	d->seg.attr |= bits;
	uint8_t byte = (uint8_t)(d->raw >> 40) | bits;

	return emu_lin_write(e, d->linear + 5, &byte, 1, true);
}

bool seg_is_code64(const struct emu *e, const struct x86_seg *cs)
{
	return x86_long_mode(e->s) && (cs->attr & SEG_L);
}

int seg_check_rip(struct emu *e, const struct x86_seg *cs, uint64_t rip, uint32_t ext)
{
	bool ok = seg_is_code64(e, cs) ? x86_canonical(rip) : rip <= cs->limit;

	return ok ? 0 : gp(e, ext);
}

void seg_set_cs(struct emu *e, const struct x86_seg *cs, unsigned cpl)
{
	e->s->seg[SREG_CS] = *cs;
	e->s->seg[SREG_CS].sel = (cs->sel & ~3) | cpl;
	e->s->cpl = cpl;
}

/* --- data segment loads --- */

void emu_load_seg_real(struct emu *e, enum x86_sreg r, uint16_t sel)
{
	struct x86_seg *seg = &e->s->seg[r];
	bool v86 = e->s->rflags & FL_VM;

	seg->sel = sel;
	seg->base = (uint32_t)sel << 4;
	if (v86 || !(seg->attr & SEG_P))
		seg->limit = 0xffff;
	/* In real mode the limit and size stay as they are in the hidden part ("unreal mode"). */
	seg->attr = v86 ? 0 : seg->attr & (SEG_DB | SEG_G);
	seg->attr |= SEG_P | SEG_S | SEG_RW | SEG_A;
	if (v86)
		seg->attr |= 3 << SEG_DPL_SHIFT;
	else if (r == SREG_CS)
		seg->attr |= SEG_CODE;
}

static int load_ss(struct emu *e, uint16_t sel)
{
	struct x86_state *s = e->s;
	struct seg_desc d;

	if (seg_is_null(sel)) {
		if (!x86_code64(s) || s->cpl == 3 || (sel & 3) != s->cpl)
			return gp(e, 0);
		s->seg[SREG_SS] = seg_null_ss(s->cpl);
		return 0;
	}
	int r = seg_fetch(e, sel, VEC_GP, 0, &d);

	if (r)
		return r;
	if ((sel & 3) != s->cpl || seg_dpl(&d.seg) != s->cpl || !seg_is_writable_data(&d.seg))
		return gp(e, sel_error(sel));
	if (!(d.seg.attr & SEG_P))
		return emu_raise_error(e, VEC_SS, sel_error(sel));
	r = seg_mark(e, &d, SEG_A);
	if (r)
		return r;
	s->seg[SREG_SS] = d.seg;
	return 0;
}

int emu_load_seg(struct emu *e, enum x86_sreg seg, uint16_t sel)
{
	struct x86_state *s = e->s;
	struct seg_desc d;

	if (real_or_v86(e)) {
		emu_load_seg_real(e, seg, sel);
		return 0;
	}
	if (seg == SREG_SS)
		return load_ss(e, sel);
	if (seg_is_null(sel)) {
		s->seg[seg] = (struct x86_seg){.sel = sel}; /* as Intel: the base becomes 0 too */
		return 0;
	}
	int r = seg_fetch(e, sel, VEC_GP, 0, &d);

	if (r)
		return r;
	if (!seg_is_readable(&d.seg))
		return gp(e, sel_error(sel));
	if (!seg_is_conforming(&d.seg) && ((sel & 3u) > seg_dpl(&d.seg) || s->cpl > seg_dpl(&d.seg)))
		return gp(e, sel_error(sel));
	if (!(d.seg.attr & SEG_P))
		return emu_raise_error(e, VEC_NP, sel_error(sel));
	r = seg_mark(e, &d, SEG_A);
	if (r)
		return r;
	s->seg[seg] = d.seg;
	return 0;
}

/* --- stacks --- */

void seg_set_rsp(struct emu *e, uint64_t rsp, uint64_t mask)
{
	uint64_t *p = &e->s->gpr[RSP];

	*p = mask == 0xffff ? (*p & ~0xffffull) | (rsp & 0xffff) : rsp & mask;
}

void seg_stack_current(const struct emu *e, struct seg_stack *st)
{
	*st = (struct seg_stack){.ss = e->s->seg[SREG_SS], .mask = emu_stack_mask(e), .flat64 = x86_code64(e->s)};
	st->sp = e->s->gpr[RSP] & st->mask;
	st->system = e->s->cpl != 3;
}

static int tss_read(struct emu *e, uint32_t offset, void *dst, unsigned size, uint32_t ext)
{
	const struct x86_seg *tr = &e->s->seg[SREG_TR];

	if (offset + size - 1 > tr->limit)
		return emu_raise_error(e, VEC_TS, sel_error(tr->sel) | ext);
	uint64_t linear = tr->base + offset;

	return emu_lin_read(e, x86_long_mode(e->s) ? linear : (uint32_t)linear, dst, size, true);
}

/* SDM 3A figures 7-2, 7-10, 7-11. */
int seg_stack_inner(struct emu *e, unsigned dpl, uint32_t ext, struct seg_stack *st)
{
	const struct x86_seg *tr = &e->s->seg[SREG_TR];
	struct seg_desc d;
	uint16_t sel = 0;
	int r;

	*st = (struct seg_stack){.system = dpl != 3};
	if (x86_long_mode(e->s)) {
		st->ss = seg_null_ss(dpl);
		st->mask = ~0ull;
		st->flat64 = true;
		st->error = ext;
		return tss_read(e, 4 + dpl * 8, &st->sp, 8, ext);
	}
	if (seg_type(tr) == DESC_TSS16 || seg_type(tr) == DESC_TSS16_BUSY) {
		r = tss_read(e, 2 + dpl * 4, &st->sp, 2, ext);
		if (!r)
			r = tss_read(e, 4 + dpl * 4, &sel, 2, ext);
	} else {
		r = tss_read(e, 4 + dpl * 8, &st->sp, 4, ext);
		if (!r)
			r = tss_read(e, 8 + dpl * 8, &sel, 2, ext);
	}
	if (r)
		return r;
	if (seg_is_null(sel))
		return emu_raise_error(e, VEC_TS, ext);
	r = seg_fetch(e, sel, VEC_TS, ext, &d);
	if (r)
		return r;
	if ((sel & 3u) != dpl || seg_dpl(&d.seg) != dpl || !seg_is_writable_data(&d.seg))
		return emu_raise_error(e, VEC_TS, sel_error(sel) | ext);
	if (!(d.seg.attr & SEG_P))
		return emu_raise_error(e, VEC_SS, sel_error(sel) | ext);
	r = seg_mark(e, &d, SEG_A);
	if (r)
		return r;
	st->ss = d.seg;
	st->mask = d.seg.attr & SEG_DB ? 0xffffffff : 0xffff;
	st->sp &= st->mask;
	st->error = sel_error(sel) | ext;
	return 0;
}

/* The limit check of a push below st->sp. */
static bool stack_fits(const struct seg_stack *st, uint64_t sp, unsigned bytes)
{
	uint64_t last = sp + bytes - 1;

	if (st->flat64)
		return x86_canonical(sp) && x86_canonical(last);
	if (st->ss.attr & SEG_CE) /* a stack is data: expand-down */
		return sp > st->ss.limit && last <= st->mask;
	return last <= st->ss.limit;
}

int seg_stack_push(struct emu *e, struct seg_stack *st, const uint64_t *value, unsigned n, unsigned size)
{
	uint8_t frame[40 * 8];
	unsigned bytes = n * size;
	uint64_t sp = (st->sp - bytes) & st->mask;

	if (!stack_fits(st, sp, bytes))
		return emu_raise_error(e, VEC_SS, st->error);
	for (unsigned i = 0; i < n; i++)
		memcpy(frame + i * size, &value[i], size);
	uint64_t linear = st->flat64 ? sp : (uint32_t)(st->ss.base + sp);
	/* Within the supervisor it is an access like others to SMAP. */
	int r = emu_lin_write(e, linear, frame, bytes, st->system && (e->s->cpl == 3 || !x86_code64(e->s)));

	if (r)
		return r;
	st->sp = sp;
	return 0;
}

void seg_stack_commit(struct emu *e, const struct seg_stack *st)
{
	e->s->seg[SREG_SS] = st->ss;
	seg_set_rsp(e, st->sp, st->mask);
}

int seg_stack_peek(struct emu *e, unsigned disp, unsigned size, uint64_t *value)
{
	*value = 0;
	return emu_read(e, SREG_SS, (e->s->gpr[RSP] + disp) & emu_stack_mask(e), value, size);
}

/* --- far JMP and CALL --- */

static uint64_t truncate_rip(uint64_t rip, unsigned opsize)
{
	return opsize == 2 ? rip & 0xffff : opsize == 4 ? rip & 0xffffffff : rip;
}

static int check_present_and_mode(struct emu *e, const struct x86_seg *cs, uint32_t ext)
{
	if (!(cs->attr & SEG_P))
		return emu_raise_error(e, VEC_NP, sel_error(cs->sel) | ext);
	if (x86_long_mode(e->s) && (cs->attr & SEG_L) && (cs->attr & SEG_DB))
		return gp(e, sel_error(cs->sel) | ext);
	return 0;
}

/* Code segment as the direct target (SDM 3A 5.8.1). */
static int check_direct(struct emu *e, const struct x86_seg *cs)
{
	unsigned cpl = e->s->cpl, rpl = cs->sel & 3;

	if (seg_is_conforming(cs) ? seg_dpl(cs) > cpl : rpl > cpl || seg_dpl(cs) != cpl)
		return gp(e, sel_error(cs->sel));
	return check_present_and_mode(e, cs, 0);
}

struct call_gate {
	uint16_t sel;
	uint64_t offset;
	unsigned params, size; /* size of what is pushed: 2, 4, 8 */
};

/* A system descriptor as the target: call gates are followed, the rest refused. */
static int open_gate(struct emu *e, const struct seg_desc *d, struct call_gate *g)
{
	const struct x86_seg *seg = &d->seg;
	bool lm = x86_long_mode(e->s);
	unsigned type = seg_type(seg);

	if (!lm && (type == DESC_TASK || type == DESC_TSS16 || type == DESC_TSS32))
		return emu_unsupported(e, "hardware task switch by far JMP or CALL");
	if (type != DESC_CALL32 && (lm || type != DESC_CALL16))
		return gp(e, sel_error(seg->sel));
	if (seg_dpl(seg) < e->s->cpl || (seg->sel & 3u) > seg_dpl(seg))
		return gp(e, sel_error(seg->sel));
	if (lm && (d->high >> 40 & 0x1f)) /* type field of the upper half must be 0 */
		return gp(e, sel_error(seg->sel));
	if (!(seg->attr & SEG_P))
		return emu_raise_error(e, VEC_NP, sel_error(seg->sel));
	g->sel = d->raw >> 16;
	g->offset = (d->raw & 0xffff) | (d->raw >> 48) << 16;
	g->params = (d->raw >> 32) & 0x1f;
	g->size = lm ? 8 : type == DESC_CALL32 ? 4 : 2;
	if (lm)
		g->offset |= d->high << 32;
	else if (g->size == 2)
		g->offset &= 0xffff;
	return 0;
}

/* The code segment behind a call gate (SDM 3A 5.8.4). */
static int gate_target(struct emu *e, const struct call_gate *g, struct seg_desc *cs)
{
	if (seg_is_null(g->sel))
		return gp(e, 0);
	int r = seg_fetch(e, g->sel, VEC_GP, 0, cs);

	if (r)
		return r;
	if (!seg_is_code(&cs->seg) || seg_dpl(&cs->seg) > e->s->cpl)
		return gp(e, sel_error(g->sel));
	if (x86_long_mode(e->s) && (cs->seg.attr & (SEG_L | SEG_DB)) != SEG_L)
		return gp(e, sel_error(g->sel));
	return check_present_and_mode(e, &cs->seg, 0);
}

/* Common end of a transfer that keeps the CPL. */
static int enter_code(struct emu *e, struct seg_desc *cs, uint64_t rip)
{
	int r = seg_mark(e, cs, SEG_A);

	if (r)
		return r;
	seg_set_cs(e, &cs->seg, e->s->cpl);
	e->s->rip = rip;
	return 0;
}

static int far_target(struct emu *e, uint16_t sel, struct seg_desc *d)
{
	return seg_is_null(sel) ? gp(e, 0) : seg_fetch(e, sel, VEC_GP, 0, d);
}

static int far_real(struct emu *e, uint16_t sel, uint64_t offset)
{
	if (offset > 0xffff)
		return gp(e, 0);
	emu_load_seg_real(e, SREG_CS, sel);
	e->s->rip = offset;
	return 0;
}

int emu_far_jmp(struct emu *e, uint16_t sel, uint64_t offset, unsigned opsize)
{
	struct seg_desc d, cs;
	struct call_gate gate;

	offset = truncate_rip(offset, opsize);
	if (real_or_v86(e))
		return far_real(e, sel, offset);
	int r = far_target(e, sel, &d);

	if (r)
		return r;
	if (seg_is_code(&d.seg)) {
		r = check_direct(e, &d.seg);
		if (!r)
			r = seg_check_rip(e, &d.seg, offset, 0);
		return r ? r : enter_code(e, &d, offset);
	}
	if (d.seg.attr & SEG_S)
		return gp(e, sel_error(sel));
	r = open_gate(e, &d, &gate);
	if (!r)
		r = gate_target(e, &gate, &cs);
	if (r)
		return r;
	/* A JMP never changes privilege. */
	if (!seg_is_conforming(&cs.seg) && seg_dpl(&cs.seg) != e->s->cpl)
		return gp(e, sel_error(gate.sel));
	r = seg_check_rip(e, &cs.seg, gate.offset, 0);
	return r ? r : enter_code(e, &cs, gate.offset);
}

/* Push CS:next, then go: the same privilege. */
static int call_same(struct emu *e, struct seg_desc *cs, uint64_t rip, uint64_t next, unsigned size)
{
	uint64_t frame[2] = {next, e->s->seg[SREG_CS].sel};
	struct seg_stack st;

	seg_stack_current(e, &st);
	int r = seg_check_rip(e, &cs->seg, rip, 0);

	if (!r)
		r = seg_stack_push(e, &st, frame, 2, size);
	if (!r)
		r = enter_code(e, cs, rip);
	if (r)
		return r;
	seg_set_rsp(e, st.sp, st.mask);
	return 0;
}

static int call_inner(struct emu *e, const struct call_gate *g, struct seg_desc *cs, uint64_t next)
{
	struct x86_state *s = e->s;
	unsigned dpl = seg_dpl(&cs->seg), n = 0, params = x86_long_mode(s) ? 0 : g->params;
	uint64_t frame[4 + 31];
	struct seg_stack st;
	int r = seg_stack_inner(e, dpl, 0, &st);

	if (r)
		return r;
	frame[n++] = next;
	frame[n++] = s->seg[SREG_CS].sel;
	for (unsigned i = 0; i < params; i++) {
		r = seg_stack_peek(e, i * g->size, g->size, &frame[n++]);
		if (r)
			return r;
	}
	frame[n++] = s->gpr[RSP];
	frame[n++] = s->seg[SREG_SS].sel;
	r = seg_check_rip(e, &cs->seg, g->offset, 0);
	if (!r)
		r = seg_stack_push(e, &st, frame, n, g->size);
	if (!r)
		r = seg_mark(e, cs, SEG_A);
	if (r)
		return r;
	seg_set_cs(e, &cs->seg, dpl);
	seg_stack_commit(e, &st);
	s->rip = g->offset;
	return 0;
}

int emu_far_call(struct emu *e, uint16_t sel, uint64_t offset, unsigned opsize, uint64_t next)
{
	struct seg_desc d, cs;
	struct call_gate gate;

	offset = truncate_rip(offset, opsize);
	if (real_or_v86(e)) {
		uint64_t frame[2] = {next, e->s->seg[SREG_CS].sel};
		struct seg_stack st;

		if (offset > 0xffff)
			return gp(e, 0);
		seg_stack_current(e, &st);
		int r = seg_stack_push(e, &st, frame, 2, opsize);

		if (r)
			return r;
		seg_set_rsp(e, st.sp, st.mask);
		return far_real(e, sel, offset);
	}
	int r = far_target(e, sel, &d);

	if (r)
		return r;
	if (seg_is_code(&d.seg)) {
		r = check_direct(e, &d.seg);
		return r ? r : call_same(e, &d, offset, next, opsize);
	}
	if (d.seg.attr & SEG_S)
		return gp(e, sel_error(sel));
	r = open_gate(e, &d, &gate);
	if (!r)
		r = gate_target(e, &gate, &cs);
	if (r)
		return r;
	if (seg_is_conforming(&cs.seg) || seg_dpl(&cs.seg) == e->s->cpl)
		return call_same(e, &cs, gate.offset, next, gate.size);
	return call_inner(e, &gate, &cs, next);
}

/* --- far returns --- */

int seg_return_cs(struct emu *e, uint16_t sel, struct seg_desc *cs)
{
	unsigned rpl = sel & 3;

	if (seg_is_null(sel))
		return gp(e, 0);
	int r = seg_fetch(e, sel, VEC_GP, 0, cs);

	if (r)
		return r;
	if (!seg_is_code(&cs->seg) || rpl < e->s->cpl)
		return gp(e, sel_error(sel));
	if (seg_is_conforming(&cs->seg) ? seg_dpl(&cs->seg) > rpl : seg_dpl(&cs->seg) != rpl)
		return gp(e, sel_error(sel));
	r = check_present_and_mode(e, &cs->seg, 0);
	return r ? r : seg_mark(e, cs, SEG_A);
}

int seg_return_ss(struct emu *e, uint16_t sel, unsigned cpl, const struct x86_seg *cs, struct x86_seg *ss)
{
	struct seg_desc d;

	if (seg_is_null(sel)) {
		if (!seg_is_code64(e, cs) || cpl == 3 || (sel & 3u) != cpl)
			return gp(e, 0);
		*ss = seg_null_ss(cpl);
		return 0;
	}
	int r = seg_fetch(e, sel, VEC_GP, 0, &d);

	if (r)
		return r;
	if ((sel & 3u) != cpl || seg_dpl(&d.seg) != cpl || !seg_is_writable_data(&d.seg))
		return gp(e, sel_error(sel));
	if (!(d.seg.attr & SEG_P))
		return emu_raise_error(e, VEC_SS, sel_error(sel));
	r = seg_mark(e, &d, SEG_A);
	if (r)
		return r;
	*ss = d.seg;
	return 0;
}

void seg_drop_inner_data(struct emu *e)
{
	static const enum x86_sreg data[] = {SREG_ES, SREG_DS, SREG_FS, SREG_GS};

	for (unsigned i = 0; i < sizeof(data) / sizeof(data[0]); i++) {
		struct x86_seg *seg = &e->s->seg[data[i]];

		if ((seg->attr & SEG_P) && !seg_is_conforming(seg) && seg_dpl(seg) < e->s->cpl)
			*seg = (struct x86_seg){0};
	}
}

static int ret_real(struct emu *e, unsigned opsize, unsigned pop_bytes)
{
	uint64_t mask = emu_stack_mask(e), rip, sel;
	int r = seg_stack_peek(e, 0, opsize, &rip);

	if (!r)
		r = seg_stack_peek(e, opsize, opsize, &sel);
	if (!r)
		r = far_real(e, sel, rip);
	if (r)
		return r;
	seg_set_rsp(e, e->s->gpr[RSP] + 2 * opsize + pop_bytes, mask);
	return 0;
}

int emu_far_ret(struct emu *e, unsigned opsize, unsigned pop_bytes)
{
	struct x86_state *s = e->s;
	uint64_t mask = emu_stack_mask(e), rip, sel, rsp, ss_sel;
	struct seg_desc cs;
	struct x86_seg ss;

	if (real_or_v86(e))
		return ret_real(e, opsize, pop_bytes);
	int r = seg_stack_peek(e, 0, opsize, &rip);

	if (!r)
		r = seg_stack_peek(e, opsize, opsize, &sel);
	if (!r)
		r = seg_return_cs(e, sel, &cs);
	if (!r)
		r = seg_check_rip(e, &cs.seg, rip, 0);
	if (r)
		return r;
	unsigned cpl = sel & 3;

	if (cpl == s->cpl) {
		seg_set_cs(e, &cs.seg, cpl);
		s->rip = rip;
		seg_set_rsp(e, s->gpr[RSP] + 2 * opsize + pop_bytes, mask);
		return 0;
	}
	r = seg_stack_peek(e, 2 * opsize + pop_bytes, opsize, &rsp);
	if (!r)
		r = seg_stack_peek(e, 3 * opsize + pop_bytes, opsize, &ss_sel);
	if (!r)
		r = seg_return_ss(e, ss_sel, cpl, &cs.seg, &ss);
	if (r)
		return r;
	seg_set_cs(e, &cs.seg, cpl);
	s->seg[SREG_SS] = ss;
	s->rip = rip;
	seg_set_rsp(e, rsp + pop_bytes, emu_stack_mask(e));
	seg_drop_inner_data(e);
	return 0;
}
