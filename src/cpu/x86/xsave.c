/*
 * FPU state as memory: FXSAVE, FXRSTOR, XSAVE, XSAVEOPT, XSAVEC, XRSTOR, LDMXCSR, STMXCSR (SDM 1 chapters 10.5 and 13).
 *
 * s->xsave holds every component explicitly after exec_fpu_normalise, so these are copies with checks. Nothing is
 * written before the whole area was translated for writing, and nothing loaded before all of it was read.
 */
#include "cpu/x86/exec.h"

enum { PAGE = 4096, LEGACY_SIZE = 512, HEADER_END = 576 };

#define XCOMP_COMPACTED (1ull << 63)

/* Registers 8..15 do not exist outside 64-bit mode and are left alone there. */
static unsigned vector_bytes(const struct emu *e)
{
	return x86_code64(e->s) ? 256 : 128;
}

static bool is_64(const struct x86_insn *in)
{
	switch (in->mnemonic) {
	case ZYDIS_MNEMONIC_FXSAVE64:
	case ZYDIS_MNEMONIC_FXRSTOR64:
	case ZYDIS_MNEMONIC_XSAVE64:
	case ZYDIS_MNEMONIC_XSAVEOPT64:
	case ZYDIS_MNEMONIC_XSAVEC64:
	case ZYDIS_MNEMONIC_XRSTOR64:
		return true;
	default:
		return false;
	}
}

/* Linear address of an area of `size` bytes, aligned as demanded (#GP), writable throughout if `write`. */
static int area_linear(struct emu *e, const struct x86_insn *in, uint64_t next, unsigned size, unsigned align, bool write,
		       uint64_t *linear)
{
	int r = emu_linear(e, in->seg, effective(e->s, in, next), size, write, linear);

	if (r)
		return r;
	if (*linear & (align - 1))
		return emu_raise_error(e, VEC_GP, 0);
	if (!write)
		return 0;
	for (uint64_t i = 0;; i = size - 1) {
		struct emu_page page;
		uint32_t error;
		uint64_t a = *linear + i;
		if (!x86_code64(e->s))
			a = (uint32_t)a;
		if (e->ops->translate(e->opaque, a, MMU_WRITE, emu_user(e), &page, &error))
			return emu_raise_pf(e, a, error);
		if (i)
			return 0;
	}
}

/* Store part of an area; every page of it was checked. */
static int area_put(struct emu *e, uint64_t linear, unsigned off, const void *src, unsigned size)
{
	return emu_lin_write(e, linear + off, src, size, false);
}

/* --- the x87 part, with its two layouts --- */

/* 32-bit layout: selectors (which read as 0, SDM 1 8.1.8) and 32-bit offsets instead of 64-bit offsets. */
static void x87_out(const struct x86_state *s, bool wide, uint8_t out[24])
{
	memcpy(out, s->xsave, 24);
	if (!wide) {
		memset(out + XS_FIP + 4, 0, 4);
		memset(out + XS_FDP + 4, 0, 4);
	}
}

static void x87_in(struct x86_state *s, bool wide, const uint8_t *area)
{
	uint16_t fcw, fop;

	memcpy(s->xsave, area, 24);
	memcpy(s->xsave + XS_ST, area + XS_ST, XS_XMM - XS_ST);
	/* Reserved bits as the processor keeps them (SDM 1 8.1.5). */
	memcpy(&fcw, area + XS_FCW, 2);
	fcw = (fcw & 0x1f3f) | 0x40;
	memcpy(s->xsave + XS_FCW, &fcw, 2);
	memcpy(&fop, area + XS_FOP, 2);
	fop &= 0x7ff;
	memcpy(s->xsave + XS_FOP, &fop, 2);
	s->xsave[XS_FTW + 1] = 0;
	if (!wide) {
		memset(s->xsave + XS_FIP + 4, 0, 4);
		memset(s->xsave + XS_FDP + 4, 0, 4);
	}
	for (unsigned i = 0; i < 8; i++)
		memset(s->xsave + XS_ST + 16 * i + 10, 0, 6);
}

static void x87_init(struct x86_state *s)
{
	store64(s->xsave + XS_BV, load64(s->xsave + XS_BV) & ~(uint64_t)XCR0_X87);
	exec_fpu_normalise(s);
}

static int check_mxcsr(struct emu *e, uint32_t mxcsr)
{
	return mxcsr & ~MXCSR_VALID ? emu_raise_error(e, VEC_GP, 0) : 0;
}

/* --- FXSAVE, FXRSTOR --- */

/* CR0.EM and TS give #NM here, not #UD (SDM 2A FXSAVE). */
static int fxsave_allowed(struct emu *e)
{
	return e->s->cr0 & (CR0_EM | CR0_TS) ? emu_raise(e, VEC_NM) : 0;
}

static int run_fxsave(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	struct x86_state *s = e->s;
	uint8_t head[XS_ST];
	uint64_t linear;
	int r = fxsave_allowed(e);

	if (!r)
		r = area_linear(e, &x->insn, next, LEGACY_SIZE, 16, true, &linear);
	if (r)
		return r;
	exec_fpu_normalise(s);
	x87_out(s, is_64(&x->insn), head);
	memcpy(head + XS_MXCSR, s->xsave + XS_MXCSR, 4);
	store32(head + XS_MXCSR_MASK, MXCSR_VALID);
	r = area_put(e, linear, 0, head, sizeof(head));
	if (!r)
		r = area_put(e, linear, XS_ST, s->xsave + XS_ST, XS_XMM - XS_ST);
	if (!r && (s->cr4 & CR4_OSFXSR))
		r = area_put(e, linear, XS_XMM, s->xsave + XS_XMM, vector_bytes(e));
	return r;
}

static int run_fxrstor(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	struct x86_state *s = e->s;
	uint8_t area[LEGACY_SIZE];
	uint64_t linear;
	int r = fxsave_allowed(e);

	if (!r)
		r = area_linear(e, &x->insn, next, LEGACY_SIZE, 16, false, &linear);
	if (!r)
		r = emu_lin_read(e, linear, area, sizeof(area), false);
	if (!r)
		r = check_mxcsr(e, load32(area + XS_MXCSR));
	if (r)
		return r;
	exec_fpu_normalise(s);
	x87_in(s, is_64(&x->insn), area);
	if (s->cr4 & CR4_OSFXSR) {
		memcpy(s->xsave + XS_MXCSR, area + XS_MXCSR, 4);
		memcpy(s->xsave + XS_XMM, area + XS_XMM, vector_bytes(e));
	}
	return 0;
}

/* --- XSAVE family --- */

static int xsave_allowed(struct emu *e)
{
	if (!(e->s->cr4 & CR4_OSXSAVE))
		return emu_raise(e, VEC_UD);
	return e->s->cr0 & CR0_TS ? emu_raise(e, VEC_NM) : 0;
}

static uint64_t requested(const struct x86_state *s)
{
	uint64_t mask = (uint32_t)s->gpr[RAX] | s->gpr[RDX] << 32;
	return mask & s->xcr0;
}

/* A component behind the header (SDM 1 13.4.2): where it lies in x86_state and in the standard format, which are the same; how much of it the
 * current mode has; and where it lies in the area at hand. */
struct component {
	unsigned state, size, bytes, area;
};

/* Registers 8..15 and 16..31 do not exist outside 64-bit mode. */
static unsigned mode_bytes(const struct emu *e, uint64_t bit, unsigned size)
{
	if (x86_code64(e->s) || bit == XCR0_OPMASK)
		return size;
	return bit == XCR0_HI16_ZMM ? 0 : size / 2;
}

/* Component `bit` (one of XCR0's from AVX up), of an area whose compacted components are `compact` (0: standard format). */
static struct component component(const struct emu *e, uint64_t bit, uint64_t compact)
{
	struct component c = { .state = XS_YMMH, .size = 256 };

	if (bit != XCR0_AVX) {
		uint32_t r[4] = { 0 };
		x86_cpuid(e->cpuid, e->s, 0xd, (uint32_t)__builtin_ctzll(bit), r);
		c.state = r[1];
		c.size = r[0];
		if (c.state < HEADER_END || c.state >= X86_XSAVE_SIZE || c.size > X86_XSAVE_SIZE - c.state)
			c.state = c.size = 0; /* no such thing on this processor */
	}
	c.bytes = mode_bytes(e, bit, c.size);
	c.area = c.state;
	if (compact & (bit - 1) & ~(uint64_t)(XCR0_X87 | XCR0_SSE)) {
		/* 13.4.3: behind the one before. All that are carried are multiples of 64 bytes, so alignment asks for nothing. */
		uint64_t before = compact & (bit - 1) & XCR0_CARRIED;
		struct component last = component(e, 1ull << (63 - __builtin_clzll(before)), compact);
		c.area = last.area + last.size;
	} else if (compact) {
		c.area = HEADER_END;
	}
	return c;
}

void exec_zero_above_ymm(struct emu *e, uint16_t regs)
{
	if (!(e->s->xcr0 & XCR0_ZMM_HI256))
		return;
	struct component c = component(e, XCR0_ZMM_HI256, 0);
	for (unsigned i = 0; i < 16 && 32 * (i + 1) <= c.size; i++)
		if (regs >> i & 1)
			memset(e->s->xsave + c.state + 32 * i, 0, 32);
}

unsigned exec_component(const struct emu *e, uint64_t bit, unsigned *size)
{
	struct component c = component(e, bit, 0);

	*size = c.size;
	return c.state;
}

uint64_t exec_opmask(const struct emu *e, unsigned n)
{
	struct component c = component(e, XCR0_OPMASK, 0);

	if (8 * (n + 1) > c.size || !(load64(e->s->xsave + XS_BV) & XCR0_OPMASK))
		return 0;
	return load64(e->s->xsave + c.state + 8 * n);
}

#define EXTENDED(components) ((components) & XCR0_CARRIED & ~(uint64_t)(XCR0_X87 | XCR0_SSE))

/* Each of `components` behind the header in turn: for (uint64_t rest = EXTENDED(components), bit; (bit = lowest(&rest));) */
static uint64_t lowest(uint64_t *rest)
{
	uint64_t bit = *rest & -*rest;

	*rest &= ~bit;
	return bit;
}

static unsigned area_size(const struct emu *e, uint64_t components, uint64_t compact)
{
	unsigned size = HEADER_END;

	for (uint64_t rest = EXTENDED(components), bit; (bit = lowest(&rest));) {
		struct component c = component(e, bit, compact);
		if (c.area + c.size > size)
			size = c.area + c.size;
	}
	return size;
}

static bool all_zero(const uint8_t *p, unsigned n)
{
	uint64_t v = 0;
	for (unsigned i = 0; i < n; i += 8)
		v |= load64(p + i);
	return v == 0;
}

/* XINUSE (SDM 1 13.6): components that are not in their initial configuration. */
static uint64_t in_use(const struct emu *e)
{
	const struct x86_state *s = e->s;
	const uint8_t *xs = s->xsave;
	uint64_t bv = 0;
	static const uint8_t x87[8] = { 0x7f, 0x03 };

	if (memcmp(xs, x87, 8) != 0 || !all_zero(xs + 8, 16) || !all_zero(xs + XS_ST, 128))
		bv |= XCR0_X87;
	if (!all_zero(xs + XS_XMM, 256))
		bv |= XCR0_SSE;
	for (uint64_t rest = EXTENDED(s->xcr0), bit; (bit = lowest(&rest));) {
		struct component c = component(e, bit, 0);
		if (!all_zero(xs + c.state, c.size))
			bv |= bit;
	}
	return bv;
}

static int put_components(struct emu *e, const struct x86_insn *in, uint64_t linear, uint64_t components, uint64_t compact, bool mxcsr)
{
	struct x86_state *s = e->s;
	uint8_t head[24], control[8];
	int r = 0;

	if (components & XCR0_X87) {
		x87_out(s, is_64(in), head);
		r = area_put(e, linear, 0, head, sizeof(head));
		if (!r)
			r = area_put(e, linear, XS_ST, s->xsave + XS_ST, XS_XMM - XS_ST);
	}
	if (!r && mxcsr) {
		memcpy(control, s->xsave + XS_MXCSR, 4);
		store32(control + 4, MXCSR_VALID);
		r = area_put(e, linear, XS_MXCSR, control, sizeof(control));
	}
	if (!r && (components & XCR0_SSE))
		r = area_put(e, linear, XS_XMM, s->xsave + XS_XMM, vector_bytes(e));
	for (uint64_t rest = EXTENDED(components), bit; !r && (bit = lowest(&rest));) {
		struct component c = component(e, bit, compact);
		if (c.bytes)
			r = area_put(e, linear, c.area, s->xsave + c.state, c.bytes);
	}
	return r;
}

/* XSAVE and XSAVEOPT (13.7, 13.9; the optimizations of the latter are optional, but for not writing initial components). */
static int run_xsave(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	struct x86_state *s = e->s;
	bool opt = x->insn.mnemonic == ZYDIS_MNEMONIC_XSAVEOPT || x->insn.mnemonic == ZYDIS_MNEMONIC_XSAVEOPT64;
	uint64_t linear, old = 0, rfbm = requested(s);
	int r = xsave_allowed(e);

	if (!r)
		r = area_linear(e, &x->insn, next, area_size(e, rfbm, 0), 64, true, &linear);
	if (!r)
		r = emu_lin_read(e, linear + XS_BV, &old, 8, false);
	if (r)
		return r;
	exec_fpu_normalise(s);
	uint64_t used = in_use(e) & rfbm;
	r = put_components(e, &x->insn, linear, opt ? used : rfbm, 0, rfbm & (XCR0_SSE | XCR0_AVX));
	if (r)
		return r;
	old = (old & ~rfbm) | used;
	return area_put(e, linear, XS_BV, &old, 8);
}

/* 13.10: compacted format, initial components not written. */
static int run_xsavec(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	struct x86_state *s = e->s;
	uint64_t linear, header[8] = { 0 }, rfbm = requested(s);
	int r = xsave_allowed(e);

	if (!r)
		r = area_linear(e, &x->insn, next, area_size(e, rfbm, rfbm | XCOMP_COMPACTED), 64, true, &linear);
	if (r)
		return r;
	exec_fpu_normalise(s);
	uint64_t used = in_use(e) & rfbm;
	if ((rfbm & XCR0_SSE) && load32(s->xsave + XS_MXCSR) != MXCSR_DEFAULT)
		used |= XCR0_SSE;
	r = put_components(e, &x->insn, linear, used, rfbm | XCOMP_COMPACTED, used & XCR0_SSE);
	if (r)
		return r;
	header[0] = used;
	header[1] = rfbm | XCOMP_COMPACTED;
	return area_put(e, linear, XS_BV, header, 16);
}

/* 13.8.1 and 13.8.2: the checks on the header. */
static int check_header(struct emu *e, const uint64_t header[8], bool *compact)
{
	uint64_t bv = header[0], comp = header[1], reserved = 0;

	*compact = comp & XCOMP_COMPACTED;
	for (unsigned i = 2; i < (*compact ? 8 : 3); i++)
		reserved |= header[i];
	bool bad = reserved || (bv & ~e->s->xcr0);
	if (*compact)
		bad = bad || (comp & ~XCOMP_COMPACTED & ~e->s->xcr0) || (bv & ~comp);
	else
		bad = bad || comp;
	return bad ? emu_raise_error(e, VEC_GP, 0) : 0;
}

static int run_xrstor(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	struct x86_state *s = e->s;
	uint8_t area[X86_XSAVE_SIZE];
	uint64_t linear, header[8], rfbm = requested(s);
	bool compact;
	int r = xsave_allowed(e);

	if (!r)
		r = area_linear(e, &x->insn, next, HEADER_END, 64, false, &linear);
	if (!r)
		r = emu_lin_read(e, linear, area, HEADER_END, false);
	if (r)
		return r;
	memcpy(header, area + XS_BV, sizeof(header));
	r = check_header(e, header, &compact);
	if (r)
		return r;
	uint64_t load = header[0] & rfbm;
	uint64_t format = compact ? header[1] : 0;
	for (uint64_t rest = EXTENDED(load), bit; (bit = lowest(&rest));) {
		struct component c = component(e, bit, format);
		r = area_linear(e, &x->insn, next, c.area + c.size, 64, false, &linear);
		if (!r && c.bytes)
			r = emu_lin_read(e, linear + c.area, area + c.state, c.bytes, false);
		if (r)
			return r;
	}
	/* MXCSR: in the standard format loaded whenever SSE or AVX are asked for; in the compacted one it is part of SSE. */
	bool mxcsr = compact ? rfbm & XCR0_SSE : rfbm & (XCR0_SSE | XCR0_AVX);
	uint32_t value = compact && !(load & XCR0_SSE) ? MXCSR_DEFAULT : load32(area + XS_MXCSR);
	if (mxcsr) {
		r = check_mxcsr(e, value);
		if (r)
			return r;
	}

	exec_fpu_normalise(s);
	if (load & XCR0_X87)
		x87_in(s, is_64(&x->insn), area);
	else if (rfbm & XCR0_X87)
		x87_init(s);
	if (mxcsr)
		store32(s->xsave + XS_MXCSR, value);
	if (load & XCR0_SSE)
		memcpy(s->xsave + XS_XMM, area + XS_XMM, vector_bytes(e));
	else if (rfbm & XCR0_SSE)
		memset(s->xsave + XS_XMM, 0, vector_bytes(e));
	for (uint64_t rest = EXTENDED(rfbm), bit; (bit = lowest(&rest));) {
		struct component c = component(e, bit, 0);
		if (load & bit)
			memcpy(s->xsave + c.state, area + c.state, c.bytes);
		else
			memset(s->xsave + c.state, 0, c.bytes);
		store64(s->xsave + XS_BV, load64(s->xsave + XS_BV) | bit);
	}
	return 0;
}

/* --- MXCSR --- */

static int mxcsr_allowed(struct emu *e, const struct x86_insn *in)
{
	return exec_fpu_check(e, in->encoding == ZYDIS_INSTRUCTION_ENCODING_VEX ? FPU_VEX : FPU_SSE);
}

static int run_ldmxcsr(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	const struct x86_insn *in = &x->insn;
	uint32_t v;
	int r = mxcsr_allowed(e, in);

	if (!r)
		r = emu_read(e, in->seg, effective(e->s, in, next), &v, 4);
	if (!r)
		r = check_mxcsr(e, v);
	if (!r)
		store32(e->s->xsave + XS_MXCSR, v);
	return r;
}

static int run_stmxcsr(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	const struct x86_insn *in = &x->insn;
	int r = mxcsr_allowed(e, in);

	return r ? r : emu_write(e, in->seg, effective(e->s, in, next), e->s->xsave + XS_MXCSR, 4);
}

/* XSAVES and XRSTORS are not offered: supervisor state components do not exist here. */
static int run_not_offered(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	(void)x;
	(void)next;
	return emu_raise(e, VEC_UD);
}

exec_run xsave_handler(const struct x86_insn *in)
{
	switch (in->mnemonic) {
	case ZYDIS_MNEMONIC_FXSAVE:
	case ZYDIS_MNEMONIC_FXSAVE64:
		return run_fxsave;
	case ZYDIS_MNEMONIC_FXRSTOR:
	case ZYDIS_MNEMONIC_FXRSTOR64:
		return run_fxrstor;
	case ZYDIS_MNEMONIC_XSAVE:
	case ZYDIS_MNEMONIC_XSAVE64:
	case ZYDIS_MNEMONIC_XSAVEOPT:
	case ZYDIS_MNEMONIC_XSAVEOPT64:
		return run_xsave;
	case ZYDIS_MNEMONIC_XSAVEC:
	case ZYDIS_MNEMONIC_XSAVEC64:
		return run_xsavec;
	case ZYDIS_MNEMONIC_XRSTOR:
	case ZYDIS_MNEMONIC_XRSTOR64:
		return run_xrstor;
	case ZYDIS_MNEMONIC_XSAVES:
	case ZYDIS_MNEMONIC_XSAVES64:
	case ZYDIS_MNEMONIC_XRSTORS:
	case ZYDIS_MNEMONIC_XRSTORS64:
		return run_not_offered;
	case ZYDIS_MNEMONIC_LDMXCSR:
	case ZYDIS_MNEMONIC_VLDMXCSR:
		return run_ldmxcsr;
	case ZYDIS_MNEMONIC_STMXCSR:
	case ZYDIS_MNEMONIC_VSTMXCSR:
		return run_stmxcsr;
	default:
		return NULL;
	}
}
