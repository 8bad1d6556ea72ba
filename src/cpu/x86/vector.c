/*
 * Vector instructions whose memory accesses depend on a mask (AVX2 gathers, VMASKMOV, VPMASKMOV, MASKMOVDQU, MASKMOVQ), and the two
 * that change all registers (VZEROALL, VZEROUPPER). Done by hand, because each element faults on its own.
 */
#include "cpu/x86/exec.h"

struct ymm {
	uint8_t b[32];
};

static struct ymm ymm_get(const struct x86_state *s, unsigned n)
{
	struct ymm v;

	memcpy(v.b, s->xsave + XS_XMM + 16 * n, 16);
	memcpy(v.b + 16, s->xsave + XS_YMMH + 16 * n, 16);
	return v;
}

static void ymm_set(struct x86_state *s, unsigned n, const struct ymm *v)
{
	memcpy(s->xsave + XS_XMM + 16 * n, v->b, 16);
	memcpy(s->xsave + XS_YMMH + 16 * n, v->b + 16, 16);
}

static uint8_t vex_last(const struct x86_insn *in)
{
	return in->bytes[in->opcode_off - 1];
}

static bool vex_w(const struct x86_insn *in)
{
	/* The two-byte form has no W: its second payload bit 7 is R. These are all of map 0F38, so three bytes. */
	return vex_last(in) & 0x80;
}

static unsigned vex_vvvv(const struct x86_insn *in)
{
	return (~vex_last(in) >> 3) & (in->mode == X86_MODE_64 ? 15 : 7);
}

/* 16 or 32 bytes */
static unsigned vex_length(const struct x86_insn *in)
{
	return vex_last(in) & 4 ? 32 : 16;
}

static bool element_masked(const struct ymm *mask, unsigned i, unsigned size)
{
	return mask->b[i * size + size - 1] & 0x80;
}

/* VGATHERxxx, VPGATHERxx (SDM 2C): elements from the lowest up; those done before a fault stay done, their mask elements cleared. */
static int run_gather(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	const struct x86_insn *in = &x->insn;
	struct x86_state *s = e->s;
	int r = exec_fpu_check(e, FPU_VEX);

	if (r)
		return r;
	exec_fpu_normalise(s);
	/* 90, 92: dword indices; 91, 93: qword. W: qword elements. */
	unsigned isize = in->opcode & 1 ? 8 : 4, size = vex_w(in) ? 8 : 4;
	unsigned wider = isize > size ? isize : size, n = vex_length(in) / wider, m = vex_vvvv(in);
	struct ymm dst = ymm_get(s, in->reg), mask = ymm_get(s, m), index = ymm_get(s, (unsigned)in->index);
	uint64_t base = (uint64_t)in->disp + (in->base >= 0 && in->base < 16 ? s->gpr[in->base] : 0);

	(void)next;
	for (unsigned i = 0; i < n; i++) {
		if (!element_masked(&mask, i, size))
			continue;
		uint64_t ix = 0;
		memcpy(&ix, index.b + i * isize, isize);
		uint64_t a = (base + sign_extend(ix, isize) * in->scale) & size_mask(in->addrsize);
		r = emu_read(e, in->seg, a, dst.b + i * size, size);
		if (r) {
			ymm_set(s, in->reg, &dst);
			ymm_set(s, m, &mask);
			return r;
		}
		memset(mask.b + i * size, 0, size);
	}
	memset(mask.b, 0, sizeof(mask.b));
	memset(dst.b + n * size, 0, sizeof(dst.b) - n * size);
	ymm_set(s, in->reg, &dst);
	ymm_set(s, m, &mask);
	exec_zero_above_ymm(e, (uint16_t)(1u << in->reg | 1u << m));
	return RUN_NEXT;
}

/* Masked bytes of a store: all pages first, then the stores. */
static int masked_store(struct emu *e, const struct x86_insn *in, uint64_t offset, const uint8_t *data, const struct ymm *mask,
			unsigned n, unsigned size)
{
	uint64_t amask = size_mask(in->addrsize), linear[32];

	for (unsigned i = 0; i < n; i++) {
		struct emu_page page;
		uint32_t error;
		if (!element_masked(mask, i, size))
			continue;
		int r = emu_linear(e, in->seg, (offset + i * size) & amask, size, true, &linear[i]);
		if (r)
			return r;
		for (unsigned last = 0; last < size; last += size - 1 ? size - 1 : 1)
			if (e->ops->translate(e->opaque, linear[i] + last, MMU_WRITE, emu_user(e), &page, &error))
				return emu_raise_pf(e, linear[i] + last, error);
	}
	for (unsigned i = 0; i < n; i++) {
		if (!element_masked(mask, i, size))
			continue;
		int r = emu_lin_write(e, linear[i], data + i * size, size, false);
		if (r)
			return r;
	}
	return 0;
}

/* VMASKMOVPS/PD, VPMASKMOVD/Q. */
static int run_maskmov(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	const struct x86_insn *in = &x->insn;
	struct x86_state *s = e->s;
	int r = exec_fpu_check(e, FPU_VEX);

	if (r)
		return r;
	exec_fpu_normalise(s);
	bool integer = in->opcode >= 0x8c, store = integer ? in->opcode == 0x8e : in->opcode & 2;
	unsigned size = (integer ? vex_w(in) : in->opcode & 1) ? 8 : 4, n = vex_length(in) / size;
	struct ymm mask = ymm_get(s, vex_vvvv(in)), v;
	uint64_t offset = effective(s, in, next);

	if (store) {
		v = ymm_get(s, in->reg);
		return masked_store(e, in, offset, v.b, &mask, n, size);
	}
	memset(&v, 0, sizeof(v));
	for (unsigned i = 0; i < n; i++) {
		if (!element_masked(&mask, i, size))
			continue;
		r = emu_read(e, in->seg, (offset + i * size) & size_mask(in->addrsize), v.b + i * size, size);
		if (r)
			return r;
	}
	ymm_set(s, in->reg, &v);
	exec_zero_above_ymm(e, (uint16_t)(1u << in->reg));
	return RUN_NEXT;
}

/* MASKMOVDQU, VMASKMOVDQU: bytes of a register to [rDI], where the mask register's byte has its top bit set. */
static int run_maskmovdqu(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	const struct x86_insn *in = &x->insn;
	struct x86_state *s = e->s;
	int r = exec_fpu_check(e, in->encoding == ZYDIS_INSTRUCTION_ENCODING_VEX ? FPU_VEX : FPU_SSE);

	(void)next;
	if (r)
		return r;
	exec_fpu_normalise(s);
	struct ymm v = ymm_get(s, in->reg), mask = ymm_get(s, in->rm);
	return masked_store(e, in, s->gpr[RDI] & size_mask(in->addrsize), v.b, &mask, 16, 1);
}

static unsigned x87_top(const struct x86_state *s)
{
	return (s->xsave[XS_FSW + 1] >> 3) & 7;
}

/* MASKMOVQ: the same with MMX registers, and as every MMX instruction it clears TOP and makes all tags valid. MMn is the physical
 * register n; the save area is ordered from the top of the stack. */
static int run_maskmovq(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	const struct x86_insn *in = &x->insn;
	struct x86_state *s = e->s;
	int r = exec_fpu_check(e, FPU_MMX);

	(void)next;
	if (r)
		return r;
	exec_fpu_normalise(s);
	if (s->xsave[XS_FSW] & 0x80) /* a pending unmasked exception */
		return emu_raise(e, VEC_MF);
	unsigned top = x87_top(s);
	struct ymm mask = { { 0 } };
	uint8_t v[8], st[8][16];
	memcpy(st, s->xsave + XS_ST, sizeof(st));
	memcpy(v, st[((in->reg & 7) - top) & 7], 8);
	memcpy(mask.b, st[((in->rm & 7) - top) & 7], 8);
	r = masked_store(e, in, s->gpr[RDI] & size_mask(in->addrsize), v, &mask, 8, 1);
	if (r)
		return r;
	for (unsigned i = 0; i < 8; i++)
		memcpy(s->xsave + XS_ST + 16 * i, st[(i - top) & 7], 16);
	s->xsave[XS_FSW + 1] &= (uint8_t)~0x38;
	s->xsave[XS_FTW] = 0xff;
	return RUN_NEXT;
}

static int run_vzero(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	struct x86_state *s = e->s;
	unsigned bytes = x86_code64(s) ? 256 : 128;
	int r = exec_fpu_check(e, FPU_VEX);

	(void)next;
	if (r)
		return r;
	exec_fpu_normalise(s);
	memset(s->xsave + XS_YMMH, 0, bytes);
	if (x->insn.mnemonic == ZYDIS_MNEMONIC_VZEROALL)
		memset(s->xsave + XS_XMM, 0, bytes);
	exec_zero_above_ymm(e, bytes == 256 ? 0xffff : 0xff);
	return RUN_NEXT;
}

exec_run vector_handler(const struct x86_insn *in)
{
	if (in->vsib)
		return run_gather;
	switch (in->mnemonic) {
	case ZYDIS_MNEMONIC_VMASKMOVPS:
	case ZYDIS_MNEMONIC_VMASKMOVPD:
	case ZYDIS_MNEMONIC_VPMASKMOVD:
	case ZYDIS_MNEMONIC_VPMASKMOVQ:
		return run_maskmov;
	case ZYDIS_MNEMONIC_MASKMOVDQU:
	case ZYDIS_MNEMONIC_VMASKMOVDQU:
		return run_maskmovdqu;
	case ZYDIS_MNEMONIC_MASKMOVQ:
		return run_maskmovq;
	case ZYDIS_MNEMONIC_VZEROALL:
	case ZYDIS_MNEMONIC_VZEROUPPER:
		return run_vzero;
	default:
		return NULL;
	}
}
