/* Re-encoding of one instruction for 64-bit mode with renamed registers and a replaced memory operand. */
#include "cpu/x86/insn.h"

#include <errno.h>
#include <string.h>

#include "cpu/x86/state.h"

/* Where the new encoding differs from the old one; filled step by step, then emitted. */
struct encoding {
	uint8_t opcode;
	uint8_t reg, rm; /* numbers with their extension bit */
	uint8_t vvvv;
	bool rex_w;
	bool has_modrm, mem;
	bool need_rex; /* SPL, BPL, SIL, DIL */
	bool no_rex;   /* AH, CH, DH, BH */
};

/* Legacy encodings: where the opcode starts with its escape bytes; prefixes and REX end there. */
static unsigned escape_off(const struct x86_insn *in)
{
	return in->opcode_off - (in->map == MAP_1BYTE ? 0 : in->map == MAP_0F ? 1 : 2);
}

/* The REX prefix of a legacy encoding, or 0. It counts only directly before the opcode. */
static uint8_t insn_rex(const struct x86_insn *in)
{
	unsigned off = escape_off(in);
	if (in->mode != X86_MODE_64 || off == 0 || (in->bytes[off - 1] & 0xf0) != 0x40)
		return 0;
	return in->bytes[off - 1];
}

unsigned x86_high_byte(const struct x86_insn *in)
{
	unsigned mask = 0;

	if (!in->byte_ops || in->encoding != ZYDIS_INSTRUCTION_ENCODING_LEGACY)
		return 0;
	if (insn_rex(in)) /* numbers 4..7 are SPL..DIL then (SDM 2A table 3-1) */
		return 0;
	if ((in->byte_ops & OPND_REG) && in->reg >= 4 && in->reg < 8)
		mask |= 1;
	if ((in->byte_ops & OPND_RM) && in->rm >= 4 && in->rm < 8)
		mask |= 2;
	if ((in->byte_ops & OPND_OPCODE) && (in->opcode & 4))
		mask |= 4;
	return mask;
}

/* Opcodes of 16/32-bit mode that do not exist or mean something else in 64-bit mode, stack and branch instructions included
 * (their operand size becomes 64). */
static bool legacy_only(const struct x86_insn *in)
{
	uint8_t op = in->opcode;

	if (in->map == MAP_0F)
		return op == 0xa0 || op == 0xa1 || op == 0xa8 || op == 0xa9 || (op & 0xf0) == 0x80 || op == 0x05 ||
		       op == 0x07 || op == 0x34 || op == 0x35 || op == 0x20 || op == 0x21 || op == 0x22 || op == 0x23 ||
		       op == 0x00 || op == 0x01;
	if (in->map != MAP_1BYTE)
		return false;
	if (op < 0x40)
		return (op & 7) >= 6; /* PUSH/POP sreg, DAA, DAS, AAA, AAS */
	if (op < 0x50)
		return false; /* INC/DEC: converted */
	if (op < 0x64 || (op >= 0x68 && op < 0x80 && op != 0x69 && op != 0x6b))
		return true;
	if (op == 0xff)
		return (in->reg & 7) >= 2;
	switch (op) {
	case 0x8f:
	case 0x9a:
	case 0x9c:
	case 0x9d:
	case 0xc2:
	case 0xc3:
	case 0xc4:
	case 0xc5:
	case 0xc8:
	case 0xc9:
	case 0xca:
	case 0xcb:
	case 0xcc:
	case 0xcd:
	case 0xce:
	case 0xcf:
	case 0xd4:
	case 0xd5:
	case 0xd6:
	case 0xe8:
	case 0xe9:
	case 0xea:
	case 0xeb:
		return true;
	default:
		return false;
	}
}

/* Memory addressed by implied registers: the address size and segment cannot be changed. */
static bool implicit_memory(const struct x86_insn *in)
{
	if (in->map == MAP_0F)
		return in->opcode == 0xf7 && in->fpu; /* MASKMOVQ, MASKMOVDQU */
	if (in->map != MAP_1BYTE || in->encoding != ZYDIS_INSTRUCTION_ENCODING_LEGACY)
		return false;
	uint8_t op = in->opcode;
	return (op >= 0xa4 && op <= 0xa7) || (op >= 0xaa && op <= 0xaf) || (op >= 0x6c && op <= 0x6f) || op == 0xd7 ||
	       (op >= 0xe0 && op <= 0xe3);
}

/* Register form and memory form of ModRM.rm must be the same operation. */
static bool rm_memory_equal(const struct x86_insn *in)
{
	switch (in->mnemonic) {
	case ZYDIS_MNEMONIC_BT:
	case ZYDIS_MNEMONIC_BTS:
	case ZYDIS_MNEMONIC_BTR:
	case ZYDIS_MNEMONIC_BTC:
		return in->opcode == 0xba; /* a register bit offset reaches beyond a memory operand */
	case ZYDIS_MNEMONIC_PEXTRB:
	case ZYDIS_MNEMONIC_PEXTRW:
	case ZYDIS_MNEMONIC_VPEXTRB:
	case ZYDIS_MNEMONIC_VPEXTRW:
	case ZYDIS_MNEMONIC_NOP: /* the memory forms are prefetches */
		return false;
	default:
		break;
	}
	if (in->encoding == ZYDIS_INSTRUCTION_ENCODING_LEGACY) {
		if (in->map == MAP_0F && (in->opcode <= 0x01 || (in->opcode >= 0x20 && in->opcode <= 0x23) ||
					   in->opcode == 0xae || in->opcode == 0xc7))
			return false;
		if (in->map == MAP_1BYTE && (in->opcode == 0x8c || in->opcode == 0x8e))
			return false;
	}
	return in->gpr_ops & OPND_RM;
}

/* VEX.W is ignored outside 64-bit mode where it would choose a 64-bit GPR. */
static bool vex_w_is_gpr(const struct x86_insn *in)
{
	switch (in->mnemonic) {
	case ZYDIS_MNEMONIC_VMOVD:
	case ZYDIS_MNEMONIC_VPINSRD:
	case ZYDIS_MNEMONIC_VPEXTRD:
	case ZYDIS_MNEMONIC_VCVTSI2SD:
	case ZYDIS_MNEMONIC_VCVTSI2SS:
	case ZYDIS_MNEMONIC_VCVTSI2SH:
	case ZYDIS_MNEMONIC_VCVTUSI2SD:
	case ZYDIS_MNEMONIC_VCVTUSI2SS:
	case ZYDIS_MNEMONIC_VCVTUSI2SH:
		return true;
	default:
		return in->gpr_ops;
	}
}

/* ModRM, SIB and displacement of [base + index + disp]. `e->reg` low bits go into ModRM.reg. */
static int emit_memory(uint8_t *out, const struct encoding *e, const struct x86_rewrite *rw)
{
	uint8_t reg = (e->reg & 7) << 3;
	uint8_t index = rw->mem_index < 0 ? 4 : rw->mem_index & 7;
	int n = 0;

	if (rw->mem_base < 0) {
		out[n++] = reg | 4;
		out[n++] = index << 3 | 5;
		memcpy(out + n, &rw->mem_disp, 4);
		return n + 4;
	}
	uint8_t base = rw->mem_base & 7;
	bool sib = rw->mem_index >= 0 || base == 4;
	bool disp8 = rw->mem_disp == (int8_t)rw->mem_disp;
	uint8_t mod = rw->mem_disp == 0 && base != 5 ? 0 : disp8 ? 0x40 : 0x80;
	out[n++] = mod | reg | (sib ? 4 : base);
	if (sib)
		out[n++] = index << 3 | base;
	if (mod == 0x40) {
		out[n++] = (uint8_t)rw->mem_disp;
	} else if (mod == 0x80) {
		memcpy(out + n, &rw->mem_disp, 4);
		n += 4;
	}
	return n;
}

static int emit_vex(uint8_t *out, const struct x86_insn *in, const struct encoding *e, uint8_t rex)
{
	uint8_t last = in->bytes[in->opcode_off - 1];
	int n = 0;

	uint8_t tail = (last & 7) | (~e->vvvv & 15) << 3; /* L, pp */
	if (!(rex & 0x0b) && in->map == MAP_0F) {
		out[n++] = 0xc5;
		out[n++] = tail | (rex & 4 ? 0 : 0x80);
	} else {
		out[n++] = 0xc4;
		out[n++] = (uint8_t)(~rex & 7) << 5 | in->map;
		out[n++] = tail | (rex & 8 ? 0x80 : 0);
	}
	return n;
}

/* SDM 2A 2.7.1: 62 [R X B R' 0 mmm] [W vvvv 1 pp] [z L'L b V' aaa]; R, X, B, R', vvvv and V' are inverted. */
static int emit_evex(uint8_t *out, const struct x86_insn *in, const struct encoding *e, const struct x86_rewrite *rw)
{
	enum { R = 0x80, X = 0x40, B = 0x20, R2 = 0x10 };
	const uint8_t *old = in->bytes + in->opcode_off - 3;
	uint8_t p0 = old[0], p1 = old[1], p2 = old[2];

	if (in->mode != X86_MODE_64) {
		/* Eight registers, and W does not choose 64-bit GPRs. */
		p0 |= R | X | B | R2;
		p1 |= 0x40;
		p2 |= 0x08;
		if (vex_w_is_gpr(in))
			p1 &= 0x7f;
	}
	if (in->gpr_ops & OPND_REG)
		p0 = (p0 & ~R) | R2 | (e->reg & 8 ? 0 : R);
	if (e->mem)
		p0 = (p0 & ~B) | X | (rw->mem_base >= 8 ? 0 : B);
	else if (in->gpr_ops & OPND_RM)
		p0 = (p0 & ~B) | X | (e->rm & 8 ? 0 : B);
	out[0] = 0x62;
	out[1] = p0;
	out[2] = p1;
	out[3] = p2;
	return 4;
}

static int emit_legacy(uint8_t *out, const struct x86_insn *in, const struct encoding *e, uint8_t rex)
{
	int n = 0;

	if (rex || e->need_rex) {
		if (e->no_rex)
			return -ENOTSUP;
		out[n++] = 0x40 | rex;
	}
	if (in->map != MAP_1BYTE)
		out[n++] = 0x0f;
	if (in->map == MAP_0F38)
		out[n++] = 0x38;
	else if (in->map == MAP_0F3A)
		out[n++] = 0x3a;
	return n;
}

static bool has_prefix66(const struct x86_insn *in)
{
	return in->encoding == ZYDIS_INSTRUCTION_ENCODING_LEGACY && memchr(in->bytes, 0x66, escape_off(in));
}

/* 0x66 selects the operand size, rather than being part of the opcode. */
static bool prefix66_is_size(const struct x86_insn *in)
{
	uint8_t op = in->opcode;

	if (in->map == MAP_1BYTE)
		return true;
	if (in->map == MAP_0F)
		return (op & 0xf0) == 0x40 || (op >= 0xa0 && op <= 0xc1 && op != 0xae) || op >= 0xc8 ? !in->fpu :
		       op == 0xc7 ? in->mod == 3 : op == 0x02 || op == 0x03 || op == 0x0d || (op & 0xf8) == 0x18;
	return in->map == MAP_0F38 && (op == 0xf0 || op == 0xf1); /* MOVBE, CRC32 */
}

/* XACQUIRE and XRELEASE hints are dropped: no transactions on behalf of a guest. */
static bool keep_rep(const struct x86_insn *in)
{
	if (!in->rep || in->encoding != ZYDIS_INSTRUCTION_ENCODING_LEGACY || in->lock || (in->gpr_ops & OPND_OPCODE))
		return false; /* F3 before XCHG r8: processors differ whether that is PAUSE */
	if (in->map != MAP_1BYTE)
		return true;
	return !((in->opcode >= 0x86 && in->opcode <= 0x89) || in->opcode == 0xc6 || in->opcode == 0xc7);
}

/* Original REX.W or VEX.W; VEX.vvvv. */
static void read_vex_rex(const struct x86_insn *in, struct encoding *e)
{
	if (in->encoding == ZYDIS_INSTRUCTION_ENCODING_EVEX)
		return;
	if (in->encoding == ZYDIS_INSTRUCTION_ENCODING_VEX) {
		uint8_t last = in->bytes[in->opcode_off - 1];
		unsigned start = 0;
		while (in->bytes[start] != 0xc4 && in->bytes[start] != 0xc5) /* prefixes 67, segments */
			start++;
		e->vvvv = (~last >> 3) & 15;
		e->rex_w = in->bytes[start] == 0xc4 && (last & 0x80);
		if (in->mode != X86_MODE_64) {
			e->vvvv &= 7;
			if (vex_w_is_gpr(in))
				e->rex_w = false;
		}
		return;
	}
	e->rex_w = insn_rex(in) & 8;
}

int x86_rewrite(const struct x86_insn *in, const struct x86_rewrite *rw, uint8_t out[X86_REWRITE_MAX])
{
	bool legacy = in->encoding == ZYDIS_INSTRUCTION_ENCODING_LEGACY;
	struct encoding e = { .opcode = in->opcode, .reg = in->reg, .rm = in->rm, .has_modrm = in->has_modrm };
	uint8_t rex = 0;
	int n = 0;

	if (in->vsib || (in->encoding == ZYDIS_INSTRUCTION_ENCODING_EVEX && (rw->mem_index >= 0 || rw->mem_disp || rw->rm_to_mem)) ||
	    (rw->mem_index == RSP && (in->has_mem || rw->rm_to_mem)))
		return -ENOTSUP;
	if (in->mode != X86_MODE_64 && legacy && legacy_only(in))
		return -ENOTSUP;
	if (implicit_memory(in) && (in->addrsize != 8 || in->seg == SREG_FS || in->seg == SREG_GS))
		return -ENOTSUP;
	read_vex_rex(in, &e);

	unsigned high = x86_high_byte(in);
	e.no_rex = high;
	if ((in->gpr_ops & OPND_REG) && !(high & 1)) {
		e.reg = rw->map[in->reg];
		e.need_rex |= (in->byte_ops & OPND_REG) && e.reg >= 4;
	}
	if (in->gpr_ops & OPND_VVVV)
		e.vvvv = rw->map[e.vvvv];
	e.mem = in->has_mem;
	if (rw->rm_to_mem && in->has_modrm && in->mod == 3) {
		if (!rm_memory_equal(in) || (high & 2))
			return -ENOTSUP;
		e.mem = true;
	} else if ((in->gpr_ops & OPND_RM) && !(high & 2)) {
		e.rm = rw->map[in->rm];
		e.need_rex |= (in->byte_ops & OPND_RM) && e.rm >= 4;
	}
	if (in->gpr_ops & OPND_OPCODE) {
		if (in->mode != X86_MODE_64 && in->map == MAP_1BYTE && (in->opcode & 0xf0) == 0x40) {
			/* INC r, DEC r: REX prefixes in 64-bit mode; FF /0, FF /1 instead. */
			e.has_modrm = true;
			e.opcode = 0xff;
			e.reg = (in->opcode >> 3) & 1;
			e.rm = rw->map[in->opcode & 7];
		} else if (!(high & 4)) {
			e.rm = rw->map[(in->opcode & 7) | (insn_rex(in) & 1) << 3];
			e.need_rex |= (in->byte_ops & OPND_OPCODE) && e.rm >= 4;
			e.opcode = (in->opcode & ~7) | (e.rm & 7);
		}
	} else if (in->has_mem && !in->has_modrm) {
		/* A0..A3, MOV with a direct address: 8A, 8B, 88, 89 with ModRM. */
		e.has_modrm = true;
		e.opcode = 0x88 | (in->opcode & 1) | (in->opcode & 2 ? 0 : 2);
		e.reg = rw->map[RAX];
		e.need_rex |= !(in->opcode & 1) && e.reg >= 4;
	} else if (in->mode != X86_MODE_64 && in->map == MAP_1BYTE && in->opcode == 0x82) {
		e.opcode = 0x80; /* the alias that 64-bit mode dropped */
	}

	if (e.rex_w)
		rex |= 8;
	if (e.has_modrm && (e.reg & 8))
		rex |= 4;
	if (e.mem) {
		if (rw->mem_base >= 8)
			rex |= 1;
		if (rw->mem_index >= 8)
			rex |= 2;
	} else if (e.rm & 8) {
		rex |= 1;
	}

	bool size66 = has_prefix66(in);
	if (in->mode == X86_MODE_16 && legacy && prefix66_is_size(in))
		size66 = !size66;
	if (keep_rep(in))
		out[n++] = in->rep;
	if (size66 && legacy)
		out[n++] = 0x66;
	if (in->lock && !rw->drop_lock)
		out[n++] = 0xf0;
	if (e.mem && rw->gs)
		out[n++] = 0x65;
	int r;
	if (legacy)
		r = emit_legacy(out + n, in, &e, rex);
	else if (in->encoding == ZYDIS_INSTRUCTION_ENCODING_VEX)
		r = emit_vex(out + n, in, &e, rex);
	else
		r = emit_evex(out + n, in, &e, rw);
	if (r < 0)
		return r;
	n += r;
	out[n++] = e.opcode;
	if (e.mem)
		n += emit_memory(out + n, &e, rw);
	else if (e.has_modrm)
		out[n++] = 0xc0 | (e.reg & 7) << 3 | (e.rm & 7);
	/* Immediates, VEX is4 included: all that follows the address. */
	unsigned tail = in->opcode_off + 1;
	if (in->disp_len)
		tail = in->disp_off + in->disp_len;
	else if (in->has_modrm)
		tail = in->modrm_off + 1 + (in->mod != 3 && in->addrsize != 2 && (in->bytes[in->modrm_off] & 7) == 4);
	if (n + (in->len - tail) > X86_REWRITE_MAX)
		return -ENOTSUP;
	memcpy(out + n, in->bytes + tail, in->len - tail);
	n += (int)(in->len - tail);
	/* VBLENDVPS, VBLENDVPD, VPBLENDVB: a register in bits 7:4 of the last byte, bit 7 ignored outside 64-bit mode. */
	if (!legacy && in->mode != X86_MODE_64 && in->map == MAP_0F3A && in->opcode >= 0x4a && in->opcode <= 0x4c)
		out[n - 1] &= 0x7f;
	return n;
}
