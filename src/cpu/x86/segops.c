#include <string.h>

#include "cpu/x86/seg.h"
#include "cpu/x86/sysops.h"

static int gp(struct emu *e, uint16_t sel)
{
	return emu_raise_error(e, VEC_GP, sel & 0xfffc);
}

static bool real_or_v86(const struct emu *e)
{
	return !x86_protected(e->s) || (e->s->rflags & FL_VM);
}

/* --- segment registers --- */

/* Loading SS holds interrupts off for one instruction, so that RSP can follow (SDM 3A 6.8.3). */
static void shadow_after(struct emu *e, enum x86_sreg seg)
{
	if (seg == SREG_SS)
		e->s->shadow = SHADOW_MOVSS;
}

/* MOV Sreg, r/m16 */
int segop_load(struct emu *e, const struct x86_insn *in, enum emu_result *result)
{
	enum x86_sreg seg = in->reg & 7;
	uint64_t sel;

	(void)result;
	if (seg == SREG_CS || seg > SREG_GS)
		return emu_raise(e, VEC_UD);
	int r = emu_read_rm(e, in, 2, &sel);

	if (!r)
		r = emu_load_seg(e, seg, sel);
	if (!r)
		shadow_after(e, seg);
	return r;
}

/* MOV r/m, Sreg: 16 bits to memory, zero-extended to a register. */
int segop_store(struct emu *e, const struct x86_insn *in, enum emu_result *result)
{
	enum x86_sreg seg = in->reg & 7;

	(void)result;
	if (seg > SREG_GS)
		return emu_raise(e, VEC_UD);
	return emu_write_rm(e, in, in->mod == 3 ? in->opsize : 2, e->s->seg[seg].sel);
}

/* Which register PUSH/POP 06..1F, 0F A0..A9 mean. */
static enum x86_sreg stack_sreg(const struct x86_insn *in)
{
	if (in->map == MAP_1BYTE)
		return (in->opcode >> 3) & 3;
	return in->opcode & 8 ? SREG_GS : SREG_FS;
}

int segop_push(struct emu *e, const struct x86_insn *in, enum emu_result *result)
{
	(void)result;
	return emu_push(e, e->s->seg[stack_sreg(in)].sel, in->opsize);
}

int segop_pop(struct emu *e, const struct x86_insn *in, enum emu_result *result)
{
	enum x86_sreg seg = stack_sreg(in);
	uint64_t rsp = e->s->gpr[RSP], sel;

	(void)result;
	int r = emu_pop(e, &sel, in->opsize);

	if (r)
		return r;
	r = emu_load_seg(e, seg, sel);
	if (r)
		e->s->gpr[RSP] = rsp;
	else
		shadow_after(e, seg);
	return r;
}

/* LDS, LES, LSS, LFS, LGS */
int segop_load_far(struct emu *e, const struct x86_insn *in, enum emu_result *result)
{
	enum x86_sreg seg;
	uint8_t ptr[10];
	uint64_t offset = 0;
	uint16_t sel;

	(void)result;
	switch (in->mnemonic) {
	case ZYDIS_MNEMONIC_LDS:
		seg = SREG_DS;
		break;
	case ZYDIS_MNEMONIC_LES:
		seg = SREG_ES;
		break;
	case ZYDIS_MNEMONIC_LSS:
		seg = SREG_SS;
		break;
	case ZYDIS_MNEMONIC_LFS:
		seg = SREG_FS;
		break;
	default:
		seg = SREG_GS;
	}
	if (!in->has_mem)
		return emu_raise(e, VEC_UD);
	int r = emu_read(e, in->seg, sys_effective(e, in), ptr, in->opsize + 2u);

	if (r)
		return r;
	memcpy(&offset, ptr, in->opsize);
	memcpy(&sel, ptr + in->opsize, 2);
	r = emu_load_seg(e, seg, sel);
	if (!r)
		emu_set_gpr(e, in->reg, in->opsize, false, offset);
	return r;
}

/* --- GDTR, IDTR --- */

static int load_table(struct emu *e, const struct x86_insn *in, struct x86_dtr *dtr)
{
	uint8_t buf[10] = {0};
	bool code64 = x86_code64(e->s);
	uint64_t base;
	int r = sys_privileged(e);

	if (!r)
		r = emu_read(e, in->seg, sys_effective(e, in), buf, code64 ? 10 : 6);
	if (r)
		return r;
	memcpy(&base, buf + 2, 8);
	if (!code64 && in->opsize == 2)
		base &= 0xffffff;
	if (!x86_canonical(base))
		return gp(e, 0);
	memcpy(&dtr->limit, buf, 2);
	dtr->base = base;
	return 0;
}

static int store_table(struct emu *e, const struct x86_insn *in, const struct x86_dtr *dtr)
{
	uint8_t buf[10];
	int r = sys_umip(e);

	if (r)
		return r;
	memcpy(buf, &dtr->limit, 2);
	memcpy(buf + 2, &dtr->base, 8);
	return emu_write(e, in->seg, sys_effective(e, in), buf, x86_code64(e->s) ? 10 : 6);
}

int segop_lgdt(struct emu *e, const struct x86_insn *in, enum emu_result *result)
{
	(void)result;
	return load_table(e, in, &e->s->gdt);
}

int segop_lidt(struct emu *e, const struct x86_insn *in, enum emu_result *result)
{
	(void)result;
	return load_table(e, in, &e->s->idt);
}

int segop_sgdt(struct emu *e, const struct x86_insn *in, enum emu_result *result)
{
	(void)result;
	return store_table(e, in, &e->s->gdt);
}

int segop_sidt(struct emu *e, const struct x86_insn *in, enum emu_result *result)
{
	(void)result;
	return store_table(e, in, &e->s->idt);
}

/* --- LDTR, TR --- */

static int read_system_selector(struct emu *e, const struct x86_insn *in, uint64_t *sel)
{
	if (real_or_v86(e))
		return emu_raise(e, VEC_UD);
	int r = sys_privileged(e);

	return r ? r : emu_read_rm(e, in, 2, sel);
}

int segop_lldt(struct emu *e, const struct x86_insn *in, enum emu_result *result)
{
	struct x86_state *s = e->s;
	struct seg_desc d;
	uint64_t sel;

	(void)result;
	int r = read_system_selector(e, in, &sel);

	if (r)
		return r;
	if (seg_is_null(sel)) {
		s->seg[SREG_LDTR] = (struct x86_seg){.sel = sel};
		return 0;
	}
	if (sel & 4)
		return gp(e, sel);
	r = seg_fetch(e, sel, VEC_GP, 0, &d);
	if (r)
		return r;
	if ((d.seg.attr & SEG_S) || seg_type(&d.seg) != DESC_LDT || !x86_canonical(d.seg.base))
		return gp(e, sel);
	if (!(d.seg.attr & SEG_P))
		return emu_raise_error(e, VEC_NP, sel & 0xfffc);
	s->seg[SREG_LDTR] = d.seg;
	return 0;
}

int segop_ltr(struct emu *e, const struct x86_insn *in, enum emu_result *result)
{
	struct seg_desc d;
	uint64_t sel;

	(void)result;
	int r = read_system_selector(e, in, &sel);

	if (r)
		return r;
	if (seg_is_null(sel))
		return gp(e, 0);
	if (sel & 4)
		return gp(e, sel);
	r = seg_fetch(e, sel, VEC_GP, 0, &d);
	if (r)
		return r;
	bool available = !(d.seg.attr & SEG_S) && (seg_type(&d.seg) == DESC_TSS32 ||
						   (seg_type(&d.seg) == DESC_TSS16 && !x86_long_mode(e->s)));

	if (!available || !x86_canonical(d.seg.base))
		return gp(e, sel);
	if (!(d.seg.attr & SEG_P))
		return emu_raise_error(e, VEC_NP, sel & 0xfffc);
	r = seg_mark(e, &d, 2); /* busy */
	if (r)
		return r;
	e->s->seg[SREG_TR] = d.seg;
	return 0;
}

static int store_system_selector(struct emu *e, const struct x86_insn *in, enum x86_sreg seg)
{
	if (real_or_v86(e))
		return emu_raise(e, VEC_UD);
	int r = sys_umip(e);

	return r ? r : emu_write_rm(e, in, in->mod == 3 ? in->opsize : 2, e->s->seg[seg].sel);
}

int segop_sldt(struct emu *e, const struct x86_insn *in, enum emu_result *result)
{
	(void)result;
	return store_system_selector(e, in, SREG_LDTR);
}

int segop_str(struct emu *e, const struct x86_insn *in, enum emu_result *result)
{
	(void)result;
	return store_system_selector(e, in, SREG_TR);
}

/* --- descriptor inquiries: ZF says whether the question had an answer --- */

static void set_zf(struct emu *e, bool on)
{
	e->s->rflags = (e->s->rflags & ~(uint64_t)FL_ZF) | (on ? FL_ZF : 0);
}

/* Fetch for LAR, LSL, VERR, VERW: *ok false for null, outside the table, or not visible at CPL and RPL. */
static int inquire(struct emu *e, const struct x86_insn *in, struct seg_desc *d, bool *ok)
{
	uint64_t sel;

	*ok = false;
	if (real_or_v86(e))
		return emu_raise(e, VEC_UD);
	int r = emu_read_rm(e, in, 2, &sel);

	if (r || seg_is_null(sel))
		return r;
	r = seg_find(e, sel, d, ok);
	if (r || !*ok)
		return r;
	if (!seg_is_conforming(&d->seg) && (e->s->cpl > seg_dpl(&d->seg) || (sel & 3) > seg_dpl(&d->seg)))
		*ok = false;
	return 0;
}

/* System types that LAR and LSL accept, as bit masks (SDM 2A LAR table 3-53, LSL table 3-56). */
enum {
	LAR_LEGACY = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 9 | 1 << 11 | 1 << 12,
	LAR_LONG = 1 << 2 | 1 << 9 | 1 << 11 | 1 << 12,
	LSL_LEGACY = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 9 | 1 << 11,
	LSL_LONG = 1 << 2 | 1 << 9 | 1 << 11,
};

static bool type_in(const struct emu *e, const struct seg_desc *d, unsigned legacy, unsigned lm)
{
	return (d->seg.attr & SEG_S) || ((x86_long_mode(e->s) ? lm : legacy) >> seg_type(&d->seg) & 1);
}

int segop_lar(struct emu *e, const struct x86_insn *in, enum emu_result *result)
{
	struct seg_desc d;
	bool ok;

	(void)result;
	int r = inquire(e, in, &d, &ok);

	if (r)
		return r;
	ok = ok && type_in(e, &d, LAR_LEGACY, LAR_LONG);
	if (ok)
		emu_set_gpr(e, in->reg, in->opsize, false, (d.raw >> 32) & (in->opsize == 2 ? 0xff00 : 0xf0ff00));
	set_zf(e, ok);
	return 0;
}

int segop_lsl(struct emu *e, const struct x86_insn *in, enum emu_result *result)
{
	struct seg_desc d;
	bool ok;

	(void)result;
	int r = inquire(e, in, &d, &ok);

	if (r)
		return r;
	ok = ok && type_in(e, &d, LSL_LEGACY, LSL_LONG);
	if (ok)
		emu_set_gpr(e, in->reg, in->opsize, false, d.seg.limit);
	set_zf(e, ok);
	return 0;
}

int segop_verr(struct emu *e, const struct x86_insn *in, enum emu_result *result)
{
	struct seg_desc d;
	bool ok;

	(void)result;
	int r = inquire(e, in, &d, &ok);

	if (!r)
		set_zf(e, ok && seg_is_readable(&d.seg));
	return r;
}

int segop_verw(struct emu *e, const struct x86_insn *in, enum emu_result *result)
{
	struct seg_desc d;
	bool ok;

	(void)result;
	int r = inquire(e, in, &d, &ok);

	if (!r)
		set_zf(e, ok && seg_is_writable_data(&d.seg));
	return r;
}

int segop_arpl(struct emu *e, const struct x86_insn *in, enum emu_result *result)
{
	uint64_t dst, src = emu_gpr(e, in->reg, 2, false);

	(void)result;
	if (real_or_v86(e))
		return emu_raise(e, VEC_UD);
	int r = emu_read_rm(e, in, 2, &dst);

	if (r)
		return r;
	bool raise = (dst & 3) < (src & 3);

	if (raise) {
		r = emu_write_rm(e, in, 2, (dst & ~3ull) | (src & 3));
		if (r)
			return r;
	}
	set_zf(e, raise);
	return 0;
}
