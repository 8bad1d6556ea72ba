#include "cpu/x86/seg.h"

/* What is delivered. */
struct event {
	uint8_t vector;
	bool soft; /* INT n, INT3, INTO: gate DPL counts, EXT is clear */
	bool has_error;
	uint32_t error;
	uint64_t rip; /* to be pushed */
	uint64_t rflags;
};

static int gp(struct emu *e, uint32_t error)
{
	return emu_raise_error(e, VEC_GP, error);
}

static uint32_t ext_of(const struct event *ev)
{
	return ev->soft ? 0 : 1;
}

/* Error code naming an IDT entry (SDM 3A 6.13). */
static uint32_t idt_error(const struct event *ev)
{
	return ev->vector * 8 + 2 + ext_of(ev);
}

/* --- delivery --- */

/* Real mode: the IVT (SDM 3B 21.1.4). */
static int deliver_real(struct emu *e, const struct event *ev)
{
	struct x86_state *s = e->s;
	uint64_t frame[3] = {ev->rip, s->seg[SREG_CS].sel, ev->rflags};
	struct seg_stack st;
	uint16_t entry[2];

	if (ev->vector * 4 + 3 > s->idt.limit)
		return gp(e, idt_error(ev));
	int r = emu_lin_read(e, (uint32_t)(s->idt.base + ev->vector * 4), entry, 4, true);

	if (r)
		return r;
	seg_stack_current(e, &st);
	r = seg_stack_push(e, &st, frame, 3, 2);
	if (r)
		return r;
	seg_set_rsp(e, st.sp, st.mask);
	emu_load_seg_real(e, SREG_CS, entry[1]);
	s->rip = entry[0];
	s->rflags &= ~(uint64_t)(FL_IF | FL_TF | FL_AC | FL_RF);
	return 0;
}

struct gate {
	uint16_t sel;
	uint64_t offset;
	unsigned type, ist, size;
};

/* SDM 3A 6.11, 6.14.1. */
static int read_gate(struct emu *e, const struct event *ev, struct gate *g)
{
	const struct x86_state *s = e->s;
	bool lm = x86_long_mode(s);
	uint32_t offset = ev->vector * (lm ? 16 : 8);
	uint64_t raw[2] = {0, 0};

	if (offset + (lm ? 15 : 7) > s->idt.limit)
		return gp(e, idt_error(ev));
	uint64_t linear = s->idt.base + offset;
	int r = emu_lin_read(e, lm ? linear : (uint32_t)linear, raw, lm ? 16 : 8, true);

	if (r)
		return r;
	uint32_t hi = raw[0] >> 32;

	g->type = (hi >> 8) & 0x1f;
	g->sel = raw[0] >> 16;
	g->offset = (raw[0] & 0xffff) | (hi & 0xffff0000);
	g->ist = lm ? hi & 7 : 0;
	g->size = lm ? 8 : g->type & 8 ? 4 : 2;
	if (lm)
		g->offset |= raw[1] << 32;
	else if (g->size == 2)
		g->offset &= 0xffff;

	bool known = g->type == DESC_INT32 || g->type == DESC_TRAP32 ||
		     (!lm && (g->type == DESC_INT16 || g->type == DESC_TRAP16 || g->type == DESC_TASK));

	if (!known)
		return gp(e, idt_error(ev));
	if (ev->soft && ((hi >> 13) & 3) < s->cpl)
		return gp(e, idt_error(ev));
	if (!(hi & 1 << 15))
		return emu_raise_error(e, VEC_NP, idt_error(ev));
	if (g->type == DESC_TASK)
		return emu_unsupported(e, "task gate in the IDT");
	return 0;
}

static int read_target(struct emu *e, const struct gate *g, uint32_t ext, struct seg_desc *cs)
{
	if (seg_is_null(g->sel))
		return gp(e, ext);
	int r = seg_fetch(e, g->sel, VEC_GP, ext, cs);

	if (r)
		return r;
	uint32_t error = (g->sel & 0xfffc) | ext;

	if (!seg_is_code(&cs->seg) || seg_dpl(&cs->seg) > e->s->cpl)
		return gp(e, error);
	if (!(cs->seg.attr & SEG_P))
		return emu_raise_error(e, VEC_NP, error);
	if (x86_long_mode(e->s) && (cs->seg.attr & (SEG_L | SEG_DB)) != SEG_L)
		return gp(e, error);
	return seg_check_rip(e, &cs->seg, g->offset, ext);
}

/* Long mode: the stack is switched for an IST entry or an inner ring, and always aligned (SDM 3A 6.14.2-6.14.5). */
static int stack_long(struct emu *e, const struct gate *g, unsigned cpl, uint32_t ext, struct seg_stack *st)
{
	const struct x86_state *s = e->s;

	*st = (struct seg_stack){.ss = s->seg[SREG_SS],
				 .sp = s->gpr[RSP],
				 .mask = ~0ull,
				 .flat64 = true,
				 .system = cpl != 3,
				 .error = ext};
	if (g->ist) {
		uint32_t offset = 0x24 + (g->ist - 1) * 8;
		const struct x86_seg *tr = &s->seg[SREG_TR];

		if (offset + 7 > tr->limit)
			return emu_raise_error(e, VEC_TS, (tr->sel & 0xfffc) | ext);
		int r = emu_lin_read(e, tr->base + offset, &st->sp, 8, true);

		if (r)
			return r;
		if (cpl != s->cpl)
			st->ss = seg_null_ss(cpl);
	} else if (cpl != s->cpl) {
		int r = seg_stack_inner(e, cpl, ext, st);

		if (r)
			return r;
	}
	st->sp &= ~15ull;
	return 0;
}

static int deliver_protected(struct emu *e, const struct event *ev)
{
	struct x86_state *s = e->s;
	uint32_t ext = ext_of(ev);
	bool lm = x86_long_mode(s);
	struct seg_stack st;
	struct seg_desc cs;
	struct gate g = {0};
	int r = read_gate(e, ev, &g);

	if (!r)
		r = read_target(e, &g, ext, &cs);
	if (r)
		return r;
	unsigned cpl = seg_is_conforming(&cs.seg) ? s->cpl : seg_dpl(&cs.seg);
	bool switched = cpl != s->cpl;

	if (s->rflags & FL_VM)
		return emu_unsupported(e, "interrupt in virtual-8086 mode");
	if (lm) {
		r = stack_long(e, &g, cpl, ext, &st);
	} else if (switched) {
		r = seg_stack_inner(e, cpl, ext, &st);
	} else {
		seg_stack_current(e, &st);
		st.error = ext;
		r = 0;
	}
	if (r)
		return r;

	uint64_t frame[6];
	unsigned n = 0;

	if (ev->has_error)
		frame[n++] = ev->error;
	frame[n++] = ev->rip;
	frame[n++] = s->seg[SREG_CS].sel;
	frame[n++] = ev->rflags;
	if (lm || switched) {
		frame[n++] = s->gpr[RSP];
		frame[n++] = s->seg[SREG_SS].sel;
	}
	r = seg_stack_push(e, &st, frame, n, g.size);
	if (!r)
		r = seg_mark(e, &cs, SEG_A);
	if (r)
		return r;
	seg_set_cs(e, &cs.seg, cpl);
	if (lm || switched)
		seg_stack_commit(e, &st);
	else
		seg_set_rsp(e, st.sp, st.mask);
	s->rip = g.offset;
	s->rflags &= ~(uint64_t)(FL_TF | FL_NT | FL_RF | FL_VM);
	if (!(g.type & 1)) /* interrupt gates have even types */
		s->rflags &= ~(uint64_t)FL_IF;
	return 0;
}

static int deliver(struct emu *e, const struct event *ev)
{
	int r = x86_protected(e->s) ? deliver_protected(e, ev) : deliver_real(e, ev);

	if (!r) {
		e->s->shadow = SHADOW_NONE;
		e->delivered++;
	}
	return r;
}

/* --- exceptions --- */

enum fault_class { BENIGN, CONTRIBUTORY, PAGE_FAULT, DOUBLE_FAULT };

/* SDM 3A table 6-4. */
static enum fault_class class_of(uint8_t vector)
{
	switch (vector) {
	case VEC_DE:
	case VEC_TS:
	case VEC_NP:
	case VEC_SS:
	case VEC_GP:
		return CONTRIBUTORY;
	case VEC_PF:
		return PAGE_FAULT;
	case VEC_DF:
		return DOUBLE_FAULT;
	default:
		return BENIGN;
	}
}

/* Fault-class exceptions push RF set, so that a debug breakpoint at the instruction does not hit again (SDM
 * 3B 17.3.1.1). */
static bool is_fault_class(uint8_t vector)
{
	switch (vector) {
	case VEC_DB:
	case VEC_NMI:
	case VEC_BP:
	case VEC_OF:
	case VEC_DF:
	case VEC_MC:
		return false;
	default:
		return vector < 32;
	}
}

enum emu_result emu_deliver_fault(struct emu *e)
{
	struct x86_state *s = e->s;

	for (;;) {
		struct emu_fault f = e->fault;
		struct event ev = {.vector = f.vector,
				   .has_error = f.has_error,
				   .error = f.error,
				   .rip = s->rip,
				   .rflags = s->rflags};

		if (is_fault_class(f.vector))
			ev.rflags |= FL_RF;
		if (f.vector == VEC_PF)
			s->cr2 = f.cr2;
		int r = deliver(e, &ev);

		emu_debug_hold(e);
		if (!r)
			return EMU_OK;
		if (r == EMU_UNSUPPORTED)
			return EMU_FAILED;
		/* Another fault on the way: SDM 3A table 6-5. */
		enum fault_class first = class_of(f.vector), second = class_of(e->fault.vector);

		if (first == DOUBLE_FAULT)
			return EMU_SHUTDOWN;
		if ((first == CONTRIBUTORY && second == CONTRIBUTORY) || (first == PAGE_FAULT && second != BENIGN)) {
			if (second == PAGE_FAULT)
				s->cr2 = e->fault.cr2;
			emu_raise_error(e, VEC_DF, 0);
		}
	}
}

enum emu_result emu_interrupt(struct emu *e, uint8_t vector)
{
	struct x86_state *s = e->s;
	struct event ev = {.vector = vector, .rip = s->rip, .rflags = s->rflags};

	s->halted = 0;
	if (vector == VEC_NMI)
		s->nmi_masked = 1;
	int r = deliver(e, &ev);

	emu_debug_hold(e);
	if (!r)
		return EMU_OK;
	return r == EMU_UNSUPPORTED ? EMU_FAILED : emu_deliver_fault(e);
}

enum emu_result emu_exception(struct emu *e, uint8_t vector, bool has_error, uint32_t error, uint64_t cr2)
{
	e->s->halted = 0;
	e->fault = (struct emu_fault){.vector = vector, .has_error = has_error, .error = error, .cr2 = cr2};
	return emu_deliver_fault(e);
}

int emu_soft_int(struct emu *e, uint8_t vector, uint64_t next)
{
	struct event ev = {.vector = vector, .soft = true, .rip = next, .rflags = e->s->rflags};

	/* IOPL < 3 in virtual-8086 mode: INT n is the monitor's. */
	if ((e->s->rflags & FL_VM) && (e->s->rflags & FL_IOPL) != FL_IOPL)
		return gp(e, 0);
	return deliver(e, &ev);
}

/* INT1: a trap as the debug logic makes it, whatever the gate's DPL (SDM 3A 6.12.1.2). */
int emu_int1(struct emu *e, uint64_t next)
{
	struct event ev = {.vector = VEC_DB, .rip = next, .rflags = e->s->rflags};
	int r = deliver(e, &ev);

	if (!r)
		e->s->dr[7] &= ~(uint64_t)DR7_GD;
	return r;
}

/* --- IRET --- */

/* Flags that IRET at the old CPL may change (SDM 2A IRET). */
static uint64_t iret_mask(const struct x86_state *s, unsigned opsize)
{
	uint64_t mask = FL_STATUS | FL_TF | FL_DF | FL_NT;

	if (opsize > 2)
		mask |= FL_RF | FL_AC | FL_ID;
	if (!x86_protected(s))
		return mask | FL_IF | FL_IOPL;
	if (s->cpl <= (s->rflags & FL_IOPL) >> 12)
		mask |= FL_IF;
	if (s->cpl == 0) {
		mask |= FL_IOPL;
		if (opsize > 2)
			mask |= FL_VIF | FL_VIP;
	}
	return mask;
}

static void set_flags(struct x86_state *s, uint64_t v, uint64_t mask)
{
	s->rflags = (s->rflags & ~mask) | (v & mask) | FL_FIXED;
}

static int iret_real(struct emu *e, unsigned opsize)
{
	struct x86_state *s = e->s;
	uint64_t v[3];

	for (unsigned i = 0; i < 3; i++) {
		int r = seg_stack_peek(e, i * opsize, opsize, &v[i]);

		if (r)
			return r;
	}
	if (v[0] > 0xffff)
		return gp(e, 0);
	seg_set_rsp(e, s->gpr[RSP] + 3 * opsize, emu_stack_mask(e));
	emu_load_seg_real(e, SREG_CS, v[1]);
	s->rip = v[0];
	set_flags(s, v[2], iret_mask(s, opsize));
	s->nmi_masked = 0;
	return 0;
}

int emu_iret(struct emu *e, unsigned opsize)
{
	struct x86_state *s = e->s;
	uint64_t v[5] = {0}, mask = emu_stack_mask(e);
	bool code64 = x86_code64(s);
	struct x86_seg ss = s->seg[SREG_SS];
	struct seg_desc cs;

	if (!x86_protected(s))
		return iret_real(e, opsize);
	if (s->rflags & FL_VM)
		return emu_unsupported(e, "IRET in virtual-8086 mode");
	if (s->rflags & FL_NT)
		return x86_long_mode(s) ? gp(e, 0) : emu_unsupported(e, "IRET to a nested task");
	/* 64-bit mode always pops SS:RSP, other modes on a change of privilege. */
	unsigned n = code64 ? 5 : 3;

	for (unsigned i = 0; i < n; i++) {
		int r = seg_stack_peek(e, i * opsize, opsize, &v[i]);

		if (r)
			return r;
	}
	if (!x86_long_mode(s) && opsize == 4 && s->cpl == 0 && (v[2] & FL_VM))
		return emu_unsupported(e, "IRET to virtual-8086 mode");
	int r = seg_return_cs(e, v[1], &cs);

	if (!r)
		r = seg_check_rip(e, &cs.seg, v[0], 0);
	if (r)
		return r;
	unsigned cpl = v[1] & 3, old_cpl = s->cpl;
	uint64_t flags = iret_mask(s, opsize);

	if (!code64 && cpl != old_cpl) {
		r = seg_stack_peek(e, 3 * opsize, opsize, &v[3]);
		if (!r)
			r = seg_stack_peek(e, 4 * opsize, opsize, &v[4]);
		if (r)
			return r;
		n = 5;
	}
	if (n == 5) {
		r = seg_return_ss(e, v[4], cpl, &cs.seg, &ss);
		if (r)
			return r;
	}
	seg_set_cs(e, &cs.seg, cpl);
	s->seg[SREG_SS] = ss;
	s->rip = v[0];
	if (n == 5)
		seg_set_rsp(e, v[3], emu_stack_mask(e)); /* a 16-bit stack leaves the upper half of ESP as it was */
	else
		seg_set_rsp(e, s->gpr[RSP] + 3 * opsize, mask);
	set_flags(s, v[2], flags);
	s->nmi_masked = 0;
	if (cpl != old_cpl)
		seg_drop_inner_data(e);
	return 0;
}

/* --- SYSCALL, SYSENTER --- */

enum {
	FLAT_CODE = SEG_P | SEG_S | SEG_CODE | SEG_RW | SEG_A,
	FLAT_DATA = SEG_P | SEG_S | SEG_RW | SEG_A | SEG_DB,
	DPL3 = 3 << SEG_DPL_SHIFT,
};

static void enter_flat(struct x86_state *s, uint16_t cs, uint16_t ss, bool code64, unsigned cpl)
{
	uint16_t dpl = cpl ? DPL3 : 0;

	s->seg[SREG_CS] = seg_flat((cs & ~3) | cpl, FLAT_CODE | dpl | (code64 ? SEG_L : SEG_DB));
	s->seg[SREG_SS] = seg_flat((ss & ~3) | cpl, FLAT_DATA | dpl);
	s->cpl = cpl;
}

/* As Intel: #UD outside 64-bit mode (AMD has SYSCALL in compatibility and legacy mode too). */
int emu_syscall(struct emu *e, uint64_t next)
{
	struct x86_state *s = e->s;

	if (!(s->efer & EFER_SCE) || !x86_code64(s))
		return emu_raise(e, VEC_UD);
	s->gpr[RCX] = next;
	s->gpr[R11] = s->rflags & ~(uint64_t)FL_RF;
	s->rip = s->lstar;
	s->rflags = (s->rflags & ~(s->sfmask | FL_RF)) | FL_FIXED;
	uint16_t cs = s->star >> 32;

	enter_flat(s, cs, (cs & ~3) + 8, true, 0);
	return 0;
}

/* As Intel: a non-canonical RCX faults here, at CPL 0 (on AMD: after the return, at CPL 3), and SS is loaded whole. */
int emu_sysret(struct emu *e, unsigned opsize)
{
	struct x86_state *s = e->s;

	if (!(s->efer & EFER_SCE) || !x86_code64(s))
		return emu_raise(e, VEC_UD);
	if (s->cpl || (opsize == 8 && !x86_canonical(s->gpr[RCX])))
		return gp(e, 0);
	uint16_t base = s->star >> 48;

	s->rip = opsize == 8 ? s->gpr[RCX] : (uint32_t)s->gpr[RCX];
	s->rflags = (s->gpr[R11] & 0x3c7fd7) | FL_FIXED;
	enter_flat(s, base + (opsize == 8 ? 16 : 0), base + 8, opsize == 8, 3);
	return 0;
}

int emu_sysenter(struct emu *e)
{
	struct x86_state *s = e->s;
	bool lm = x86_long_mode(s);

	if (!x86_protected(s) || !(s->sysenter_cs & 0xfffc))
		return gp(e, 0);
	s->rflags &= ~(uint64_t)(FL_VM | FL_IF | FL_RF);
	s->rip = lm ? s->sysenter_eip : (uint32_t)s->sysenter_eip;
	s->gpr[RSP] = lm ? s->sysenter_esp : (uint32_t)s->sysenter_esp;
	enter_flat(s, s->sysenter_cs, (s->sysenter_cs & 0xfffc) + 8, lm, 0);
	return 0;
}

int emu_sysexit(struct emu *e, unsigned opsize)
{
	struct x86_state *s = e->s;
	bool to64 = opsize == 8;

	if (!x86_protected(s) || !(s->sysenter_cs & 0xfffc) || s->cpl)
		return gp(e, 0);
	if (to64 && (!x86_canonical(s->gpr[RCX]) || !x86_canonical(s->gpr[RDX])))
		return gp(e, 0);
	uint16_t cs = (s->sysenter_cs & 0xfffc) + (to64 ? 32 : 16);

	s->rip = to64 ? s->gpr[RDX] : (uint32_t)s->gpr[RDX];
	s->gpr[RSP] = to64 ? s->gpr[RCX] : (uint32_t)s->gpr[RCX];
	enter_flat(s, cs, cs + 8, to64, 3);
	return 0;
}
