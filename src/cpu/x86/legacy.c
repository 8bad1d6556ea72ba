/* Instructions that 64-bit mode does not have: decimal adjustment, BOUND, PUSHA/POPA, SALC (SDM 2A, 2B). */
#include "cpu/x86/exec.h"

static void set_flags(struct x86_state *s, uint64_t mask, uint64_t value)
{
	s->rflags = (s->rflags & ~mask) | (value & mask);
}

static uint64_t result_flags(uint8_t v)
{
	return (v == 0 ? FL_ZF : 0) | (v & 0x80 ? FL_SF : 0) | (__builtin_parity(v) ? 0 : FL_PF);
}

/* DAA (27) and DAS (2F). */
static int run_decimal(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	struct x86_state *s = e->s;
	bool sub = x->insn.opcode == 0x2f;
	uint8_t old = (uint8_t)s->gpr[RAX], al = old;
	bool old_cf = s->rflags & FL_CF, cf = false, af = false;

	(void)next;
	if ((old & 15) > 9 || (s->rflags & FL_AF)) {
		cf = old_cf || (sub ? old < 6 : old > 0xf9);
		al = (uint8_t)(sub ? al - 6 : al + 6);
		af = true;
	}
	if (old > 0x99 || old_cf) {
		al = (uint8_t)(sub ? al - 0x60 : al + 0x60);
		cf = true;
	}
	gpr_set(s, RAX, 1, false, al);
	set_flags(s, FL_STATUS & ~FL_OF, result_flags(al) | (cf ? FL_CF : 0) | (af ? FL_AF : 0));
	return RUN_NEXT;
}

/* AAA (37) and AAS (3F). */
static int run_ascii(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	struct x86_state *s = e->s;
	bool sub = x->insn.opcode == 0x3f, adjust = ((uint8_t)s->gpr[RAX] & 15) > 9 || (s->rflags & FL_AF);
	uint16_t ax = (uint16_t)s->gpr[RAX];

	(void)next;
	if (adjust)
		ax = (uint16_t)(sub ? ax - 0x106 : ax + 0x106);
	gpr_set(s, RAX, 2, false, ax & 0xff0f);
	set_flags(s, FL_CF | FL_AF, adjust ? FL_CF | FL_AF : 0);
	return RUN_NEXT;
}

static int run_aam(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	struct x86_state *s = e->s;
	uint8_t base = (uint8_t)x->insn.imm, al = (uint8_t)s->gpr[RAX];

	(void)next;
	if (!base)
		return emu_raise(e, VEC_DE);
	gpr_set(s, RAX, 2, false, (uint16_t)(al / base) << 8 | al % base);
	set_flags(s, FL_SF | FL_ZF | FL_PF, result_flags(al % base));
	return RUN_NEXT;
}

static int run_aad(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	struct x86_state *s = e->s;
	uint8_t al = (uint8_t)(s->gpr[RAX] + (uint8_t)(s->gpr[RAX] >> 8) * (uint8_t)x->insn.imm);

	(void)next;
	gpr_set(s, RAX, 2, false, al);
	set_flags(s, FL_SF | FL_ZF | FL_PF, result_flags(al));
	return RUN_NEXT;
}

static int run_salc(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	(void)x;
	(void)next;
	gpr_set(e->s, RAX, 1, false, e->s->rflags & FL_CF ? 0xff : 0);
	return RUN_NEXT;
}

static int run_bound(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	const struct x86_insn *in = &x->insn;
	unsigned size = in->opsize;
	uint8_t pair[8];
	uint64_t low = 0, high = 0;
	int r = emu_read(e, in->seg, effective(e->s, in, next), pair, 2 * size);

	if (r)
		return r;
	memcpy(&low, pair, size);
	memcpy(&high, pair + size, size);
	int64_t index = (int64_t)sign_extend(e->s->gpr[in->reg], size);
	if (index < (int64_t)sign_extend(low, size) || index > (int64_t)sign_extend(high, size))
		return emu_raise(e, VEC_BR);
	return RUN_NEXT;
}

static int run_pusha(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	struct x86_state *s = e->s;
	uint64_t old = s->gpr[RSP];

	(void)next;
	for (unsigned i = 0; i < 8; i++) {
		int r = emu_push(e, i == RSP ? old : s->gpr[i], x->insn.opsize);
		if (r) {
			s->gpr[RSP] = old;
			return r;
		}
	}
	return RUN_NEXT;
}

static int run_popa(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	struct x86_state *s = e->s;
	uint64_t old = s->gpr[RSP], v[8];

	(void)next;
	for (int i = 7; i >= 0; i--) {
		int r = emu_pop(e, &v[i], x->insn.opsize);
		if (r) {
			s->gpr[RSP] = old;
			return r;
		}
	}
	for (unsigned i = 0; i < 8; i++)
		if (i != RSP)
			gpr_set(s, i, x->insn.opsize, false, v[i]);
	return RUN_NEXT;
}

exec_run legacy_handler(const struct x86_insn *in)
{
	if (in->mode == X86_MODE_64)
		return NULL;
	switch (in->mnemonic) {
	case ZYDIS_MNEMONIC_DAA:
	case ZYDIS_MNEMONIC_DAS:
		return run_decimal;
	case ZYDIS_MNEMONIC_AAA:
	case ZYDIS_MNEMONIC_AAS:
		return run_ascii;
	case ZYDIS_MNEMONIC_AAM:
		return run_aam;
	case ZYDIS_MNEMONIC_AAD:
		return run_aad;
	case ZYDIS_MNEMONIC_SALC:
		return run_salc;
	case ZYDIS_MNEMONIC_BOUND:
		return run_bound;
	case ZYDIS_MNEMONIC_PUSHA:
	case ZYDIS_MNEMONIC_PUSHAD:
		return run_pusha;
	case ZYDIS_MNEMONIC_POPA:
	case ZYDIS_MNEMONIC_POPAD:
		return run_popa;
	default:
		return NULL;
	}
}
