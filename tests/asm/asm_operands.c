/* Operands, prefixes and single instructions at random; which of them are wanted. */
#include "asm_items.h"

#include <string.h>

/* --- what may be drawn --- */

static bool category_wanted(ZydisInstructionCategory c)
{
	switch (c) {
	case ZYDIS_CATEGORY_SYSTEM:
	case ZYDIS_CATEGORY_SYSCALL:
	case ZYDIS_CATEGORY_SYSRET:
	case ZYDIS_CATEGORY_INTERRUPT:
	case ZYDIS_CATEGORY_IO:
	case ZYDIS_CATEGORY_IOSTRINGOP:
	case ZYDIS_CATEGORY_RDWRFSGS:
	case ZYDIS_CATEGORY_XSAVE:
	case ZYDIS_CATEGORY_XSAVEOPT:
	case ZYDIS_CATEGORY_RDRAND:
	case ZYDIS_CATEGORY_RDSEED:
	case ZYDIS_CATEGORY_VTX:
	case ZYDIS_CATEGORY_SGX:
	case ZYDIS_CATEGORY_CET:
	case ZYDIS_CATEGORY_MPX:
	case ZYDIS_CATEGORY_PKU:
	case ZYDIS_CATEGORY_MOVDIR:
	case ZYDIS_CATEGORY_WAITPKG:
	case ZYDIS_CATEGORY_CLDEMOTE:
	case ZYDIS_CATEGORY_ENQCMD:
	case ZYDIS_CATEGORY_AMX_TILE:
	case ZYDIS_CATEGORY_UINTR:
	case ZYDIS_CATEGORY_TSX_LDTRK:
	case ZYDIS_CATEGORY_SERIALIZE:
	case ZYDIS_CATEGORY_KEYLOCKER:
	case ZYDIS_CATEGORY_KEYLOCKER_WIDE:
	case ZYDIS_CATEGORY_SEGOP:
	case ZYDIS_CATEGORY_CALL: /* made on purpose */
	case ZYDIS_CATEGORY_RET:
	case ZYDIS_CATEGORY_UNCOND_BR:
	case ZYDIS_CATEGORY_COND_BR:
	case ZYDIS_CATEGORY_STRINGOP:
	case ZYDIS_CATEGORY_PADLOCK:
	case ZYDIS_CATEGORY_AMD3DNOW:
	case ZYDIS_CATEGORY_XOP:
	case ZYDIS_CATEGORY_FMA4:
	case ZYDIS_CATEGORY_TBM:
		return false;
	default:
		return true;
	}
}

static bool mnemonic_wanted(ZydisMnemonic m)
{
	switch (m) {
	case ZYDIS_MNEMONIC_CPUID:
	case ZYDIS_MNEMONIC_RDTSC:
	case ZYDIS_MNEMONIC_RDTSCP:
	case ZYDIS_MNEMONIC_RDPMC:
	case ZYDIS_MNEMONIC_RDPID:
	case ZYDIS_MNEMONIC_MONITOR:
	case ZYDIS_MNEMONIC_MWAIT:
	case ZYDIS_MNEMONIC_POPFQ: /* made on purpose: TF and AC */
	case ZYDIS_MNEMONIC_POPF:
	case ZYDIS_MNEMONIC_PUSHF: /* shows the host's IF, RF */
	case ZYDIS_MNEMONIC_PUSHFQ:
	case ZYDIS_MNEMONIC_PUSHFD:
	case ZYDIS_MNEMONIC_POPFD:
	case ZYDIS_MNEMONIC_CLI:
	case ZYDIS_MNEMONIC_STI:
	case ZYDIS_MNEMONIC_STD: /* made on purpose */
	case ZYDIS_MNEMONIC_XBEGIN:
	case ZYDIS_MNEMONIC_XEND:
	case ZYDIS_MNEMONIC_XABORT:
	case ZYDIS_MNEMONIC_XTEST:
	case ZYDIS_MNEMONIC_FNSTENV: /* x87 pointers: not kept */
	case ZYDIS_MNEMONIC_FNSAVE:
	case ZYDIS_MNEMONIC_FXSAVE:
	case ZYDIS_MNEMONIC_FXSAVE64:
	case ZYDIS_MNEMONIC_FLDENV:
	case ZYDIS_MNEMONIC_FRSTOR:
	case ZYDIS_MNEMONIC_FXRSTOR:
	case ZYDIS_MNEMONIC_FXRSTOR64:
	case ZYDIS_MNEMONIC_CLFLUSH:
	case ZYDIS_MNEMONIC_CLFLUSHOPT:
	case ZYDIS_MNEMONIC_CLWB:
	case ZYDIS_MNEMONIC_CLZERO:
	case ZYDIS_MNEMONIC_LSL:
	case ZYDIS_MNEMONIC_LAR:
	case ZYDIS_MNEMONIC_VERR:
	case ZYDIS_MNEMONIC_VERW:
	case ZYDIS_MNEMONIC_SLDT:
	case ZYDIS_MNEMONIC_STR:
	case ZYDIS_MNEMONIC_SMSW:
	case ZYDIS_MNEMONIC_SGDT:
	case ZYDIS_MNEMONIC_SIDT:
	case ZYDIS_MNEMONIC_UD0:
	case ZYDIS_MNEMONIC_UD1:
	case ZYDIS_MNEMONIC_RSM:
	case ZYDIS_MNEMONIC_RCPPS: /* approximate, but the same on this host */
		return m == ZYDIS_MNEMONIC_RCPPS;
	default:
		return true;
	}
}

/* A mov from a segment register: selectors are Linux's at CPL 3 only. */
static bool reads_sreg(const struct x86_insn *in)
{
	return in->encoding == ZYDIS_INSTRUCTION_ENCODING_LEGACY && in->map == MAP_1BYTE && (in->opcode == 0x8c || in->opcode == 0x8e);
}

void asm_decoder_init(ZydisDecoder *decoder, bool compat)
{
	ZydisDecoderInit(decoder, compat ? ZYDIS_MACHINE_MODE_LONG_COMPAT_32 : ZYDIS_MACHINE_MODE_LONG_64,
			 compat ? ZYDIS_STACK_WIDTH_32 : ZYDIS_STACK_WIDTH_64);
}

bool asm_decode(bool compat, const uint8_t *bytes, unsigned n, struct x86_insn *in, ZydisDecodedInstruction *zi)
{
	ZydisDecoder decoder;

	if (x86_decode(bytes, n > 15 ? 15 : n, asm_mode(compat), in) < 0)
		return false;
	asm_decoder_init(&decoder, compat);
	return ZYAN_SUCCESS(ZydisDecoderDecodeInstruction(&decoder, NULL, bytes, n > 15 ? 15 : n, zi));
}

/* --- encoding --- */

struct asm_item *asm_item_new(struct asm_gen *g)
{
	struct asm_item *it = &g->item[g->n++];

	memset(it, 0, sizeof(*it));
	it->target = -1;
	it->compat = g->start.compat;
	return it;
}

void asm_put(struct asm_item *it, uint8_t b)
{
	it->bytes[it->len++] = b;
}

/* A REX prefix: not in 32-bit code, where it would be an instruction. */
void asm_put_rex(struct asm_item *it, unsigned b)
{
	if (!it->compat)
		asm_put(it, (uint8_t)b);
}

void asm_putn(struct asm_item *it, const void *p, unsigned n)
{
	memcpy(it->bytes + it->len, p, n);
	it->len += (uint8_t)n;
}

void asm_put32(struct asm_item *it, uint32_t v)
{
	asm_putn(it, &v, 4);
}

unsigned asm_pick(struct asm_gen *g, uint16_t mask)
{
	unsigned k = asm_below(g, (unsigned)__builtin_popcount(mask));

	for (unsigned r = 0; r < 16; r++)
		if (mask >> r & 1 && k-- == 0)
			return r;
	return 0;
}

unsigned asm_any_reg(struct asm_gen *g)
{
	return asm_below(g, g->start.compat ? 8 : 16);
}

/* A register that may be written. */
unsigned asm_free_reg(struct asm_gen *g)
{
	return asm_pick(g, (uint16_t)(~(g->pointers | g->indexes | g->kept) & (g->start.compat ? 0xff : 0xffff)));
}

const uint16_t asm_edges[ASM_EDGES] = { 0x1000, 0x2000, 0x4000, 0x5000, 0x7000 };

struct asm_operand asm_random_operand(struct asm_gen *g, bool aligned)
{
	struct asm_operand a = { .mem = !asm_one_in(g, 3), .rm = asm_any_reg(g) };

	if (!a.mem)
		return a;
	a.based = true;
	a.rm = asm_pick(g, g->pointers);
	unsigned kind = asm_below(g, 40);
	int32_t disp = (int32_t)asm_below(g, 512) - (asm_one_in(g, 3) ? 256 : 0);
	if (aligned && !asm_one_in(g, 10))
		disp &= ~31;
	else if (asm_one_in(g, 2))
		disp &= ~7;
	a.disp = asm_one_in(g, 5) ? 0 : disp;
	if (asm_one_in(g, 8)) /* neighbours: groups of accesses */
		a.disp = (int32_t)asm_below(g, 4) * 8;
	if (kind < 6) {
		a.rm = RSP;
		a.disp = (int32_t)asm_below(g, 24) * 8 - (asm_one_in(g, 3) ? 64 : 0);
	} else if (kind < 8) {
		a.rip = true;
		a.off = ASM_DATA + (asm_one_in(g, 8) ? asm_edges[asm_below(g, ASM_EDGES)] - asm_below(g, 70) : asm_below(g, 0x2000));
		if (aligned)
			a.off &= ~31u;
		if (g->start.compat) { /* the same encoding is an absolute address there */
			a.rip = false;
			a.based = false;
			a.disp = (int32_t)(asm_base[g->start.base] + a.off);
			a.sib = asm_one_in(g, 3);
		}
		return a;
	} else if (kind < 10) { /* FS, GS with an absolute displacement */
		a.seg = asm_one_in(g, 2) ? 0x64 : 0x65;
		a.based = false;
		a.disp &= 0xfff;
	} else if (kind < 11) {
		a.seg = asm_one_in(g, 2) ? 0x64 : 0x65;
		a.rm = asm_pick(g, g->indexes);
	} else if (kind < 12 && g->start.base == 0) { /* absolute */
		a.based = false;
		a.disp = (int32_t)(asm_base[0] + ASM_DATA + asm_below(g, 0x1f00));
		if (aligned)
			a.disp &= ~31;
	} else if (kind < 13 && g->start.base == 0) {
		a.addr32 = !g->start.compat || asm_one_in(g, 8); /* 16-bit addresses lead nowhere */
	} else if (kind < 14) { /* ES, CS, SS, DS do nothing */
		static const uint8_t none[] = { 0x26, 0x2e, 0x36, 0x3e };
		a.seg = none[asm_below(g, 4)];
	}
	if (asm_one_in(g, 4) && a.rm != RSP) {
		a.indexed = true;
		a.index = asm_pick(g, g->indexes);
		a.scale = asm_below(g, 4);
	}
	a.sib = asm_one_in(g, 10);
	a.disp_size = !a.disp && !asm_one_in(g, 8) ? 0 : a.disp == (int8_t)a.disp && !asm_one_in(g, 8) ? 1 : 4;
	return a;
}

unsigned asm_operand_rex(const struct asm_operand *a, unsigned reg)
{
	unsigned rex = reg & 8 ? 4 : 0;

	if (!a->mem)
		return rex | (a->rm & 8 ? 1 : 0);
	if (a->rip)
		return rex;
	return rex | (a->based && (a->rm & 8) ? 1 : 0) | (a->indexed && (a->index & 8) ? 2 : 0);
}

void asm_put_operand(struct asm_item *it, const struct asm_operand *a, unsigned reg)
{
	reg = (reg & 7) << 3;
	if (!a->mem) {
		asm_put(it, (uint8_t)(0xc0 | reg | (a->rm & 7)));
		return;
	}
	if (a->rip) {
		asm_put(it, (uint8_t)(reg | 5));
		it->fix_off = it->len;
		it->fix_size = 4;
		it->target_off = a->off;
		asm_put32(it, 0);
		return;
	}
	unsigned index = a->indexed ? (a->index & 7) << 3 : 0x20;
	if (!a->based && it->compat && !a->indexed && !a->sib) {
		asm_put(it, (uint8_t)(reg | 5));
		asm_put32(it, (uint32_t)a->disp);
		return;
	}
	if (!a->based) {
		asm_put(it, (uint8_t)(reg | 4));
		asm_put(it, (uint8_t)(a->scale << 6 | index | 5));
		asm_put32(it, (uint32_t)a->disp);
		return;
	}
	unsigned size = a->disp_size;
	if (!size && (a->rm & 7) == 5)
		size = 1;
	unsigned mod = size == 0 ? 0 : size == 1 ? 0x40 : 0x80;
	if (a->indexed || a->sib || (a->rm & 7) == 4) {
		asm_put(it, (uint8_t)(mod | reg | 4));
		asm_put(it, (uint8_t)(a->scale << 6 | index | (a->rm & 7)));
	} else {
		asm_put(it, (uint8_t)(mod | reg | (a->rm & 7)));
	}
	asm_putn(it, &a->disp, size);
}

/* Take the candidate whose immediate bytes are already behind it, if it may be run; sets its length. `first` is where its last
 * instruction starts. */
bool asm_accept(struct asm_gen *g, struct asm_item *it, unsigned first, int fpu)
{
	struct x86_insn in;
	ZydisDecodedInstruction zi;
	uint64_t imm = asm_rnd(g);

	if (asm_one_in(g, 2))
		imm = asm_one_in(g, 2) ? (uint64_t)(int64_t)(int8_t)imm : imm & 0x0f;
	memcpy(it->bytes + it->len, &imm, 8);
	if (!asm_decode(it->compat, it->bytes + first, it->len - first + 8u, &in, &zi))
		return false;
	if (!category_wanted(zi.meta.category) || !mnemonic_wanted(in.mnemonic) || in.vsib)
		return false;
	if (zi.meta.isa_set == ZYDIS_ISA_SET_SSE4A || zi.meta.isa_set == ZYDIS_ISA_SET_AVX512F_SCALAR)
		return false;
	if ((fpu > 0 && !in.fpu) || (fpu == 0 && in.fpu))
		return false;
	if (in.gpr_written & (uint16_t)(1u << g->counter))
		return false;
	if (in.gpr_written & (g->pointers | g->indexes | 1u << RSP) && !asm_one_in(g, 60))
		return false;
	if (!g->start.user && in.map == MAP_0F && in.opcode >= 0x20 && in.opcode <= 0x23)
		return false; /* control and debug registers: made on purpose */
	/* Bit strings reach where their register says. */
	bool bit_string = in.has_mem && in.map == MAP_0F && (in.opcode & 0xe7) == 0xa3 && !in.fpu;
	if (bit_string && !(g->indexes >> in.reg & 1) && !asm_one_in(g, 20))
		return false;
	if (in.fpu && in.map == MAP_0F && in.opcode == 0xae && in.has_mem && (in.reg & 7) == 2)
		return false; /* LDMXCSR of random bits */
	if (in.map == MAP_1BYTE && in.opcode == 0xd9 && in.has_mem && (in.reg & 7) == 5)
		return false; /* FLDCW likewise */
	if (reads_sreg(&in)) {
		if (in.opcode == 0x8e)
			return false;
		it->alien |= !g->start.user;
	}
	if (it->compat && in.encoding == ZYDIS_INSTRUCTION_ENCODING_LEGACY && (in.mnemonic == ZYDIS_MNEMONIC_PUSH || in.mnemonic == ZYDIS_MNEMONIC_POP) &&
	    (in.map == MAP_0F || in.opcode < 0x20)) {
		if (in.mnemonic == ZYDIS_MNEMONIC_POP)
			return false;
		it->alien = true; /* processors differ in how much they store */
	}
	it->len = (uint8_t)(first + in.len);
	if (it->fix_size)
		it->fix_end = it->len;
	return true;
}

void asm_put_prefixes(struct asm_gen *g, struct asm_item *it, const struct asm_operand *a)
{
	if (a->seg)
		asm_put(it, a->seg);
	if (a->addr32)
		asm_put(it, 0x67);
	if (asm_one_in(g, 120))
		asm_put_rex(it, 0x48 | asm_below(g, 8)); /* a REX that a legacy prefix makes void */
}

bool asm_legacy(struct asm_gen *g, struct asm_item *it, uint8_t prefix, unsigned map, uint8_t opcode, int fpu)
{
	struct asm_operand a = asm_random_operand(g, fpu > 0);
	unsigned reg = asm_any_reg(g);
	unsigned rex = asm_operand_rex(&a, reg) | (asm_one_in(g, 3) ? 8 : 0);

	if (asm_one_in(g, 2)) { /* more instructions without REX: AH..DH, MMX */
		reg &= 7;
		rex = asm_operand_rex(&a, reg);
	}
	asm_put_prefixes(g, it, &a);
	if (prefix)
		asm_put(it, prefix);
	if (fpu == 0 && a.mem && asm_one_in(g, 8))
		asm_put(it, 0xf0);
	if (rex || asm_one_in(g, 8))
		asm_put_rex(it, 0x40 | rex);
	if (map != MAP_1BYTE)
		asm_put(it, 0x0f);
	if (map == MAP_0F38)
		asm_put(it, 0x38);
	else if (map == MAP_0F3A)
		asm_put(it, 0x3a);
	asm_put(it, opcode);
	asm_put_operand(it, &a, reg);
	return asm_accept(g, it, 0, fpu);
}

bool asm_vex(struct asm_gen *g, struct asm_item *it, unsigned pp, unsigned map, uint8_t opcode, int fpu)
{
	struct asm_operand a = asm_random_operand(g, fpu > 0);
	unsigned reg = asm_any_reg(g), vvvv = asm_one_in(g, 3) ? 0 : asm_any_reg(g);
	unsigned rex = asm_operand_rex(&a, reg);
	bool w = asm_one_in(g, 2), l = fpu && asm_one_in(g, 2);

	if (a.seg)
		asm_put(it, a.seg);
	if (a.addr32)
		asm_put(it, 0x67);
	if (map == MAP_0F && !w && !(rex & 3) && asm_one_in(g, 2)) {
		asm_put(it, 0xc5);
		asm_put(it, (uint8_t)((rex & 4 ? 0 : 0x80) | (~vvvv & 15) << 3 | (l ? 4 : 0) | pp));
	} else {
		asm_put(it, 0xc4);
		asm_put(it, (uint8_t)((~rex & 7) << 5 | map));
		asm_put(it, (uint8_t)((w ? 0x80 : 0) | (~vvvv & 15) << 3 | (l ? 4 : 0) | pp));
	}
	asm_put(it, opcode);
	asm_put_operand(it, &a, reg);
	return asm_accept(g, it, 0, fpu);
}
