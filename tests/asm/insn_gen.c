#include "insn_gen.h"

#include <cpuid.h>
#include <string.h>

#include "cpu/x86/insn.h"
#include "cpu/x86/state.h"

void insn_gen_init(struct insn_gen *g, uint64_t seed, unsigned classes, uint8_t base, uint32_t mem_size)
{
	*g = (struct insn_gen){ .rng = seed * 0x9e3779b97f4a7c15 + 0x632be59bd9b4e019, .classes = classes, .base = base, .mem_size = mem_size };
	for (int i = 0; i < 4; i++)
		insn_gen_random(g);
}

uint64_t insn_gen_random(struct insn_gen *g)
{
	if (!g->rng)
		g->rng = 1;
	g->rng ^= g->rng << 13;
	g->rng ^= g->rng >> 7;
	g->rng ^= g->rng << 17;
	return g->rng * 0x2545f4914f6cdd1d;
}

static unsigned below(struct insn_gen *g, unsigned n)
{
	return (unsigned)((insn_gen_random(g) >> 24) % n);
}

static bool one_in(struct insn_gen *g, unsigned n)
{
	return below(g, n) == 0;
}

/* --- what the host has --- */

struct isa {
	uint16_t set; /* ZydisISASet */
	uint32_t leaf, subleaf;
	uint8_t reg, bit; /* reg 0..3 = eax..edx; 0xff: always there */
};

enum { ALWAYS = 0xff };

static const struct isa isas[] = {
	{ ZYDIS_ISA_SET_I86, 0, 0, ALWAYS, 0 },
	{ ZYDIS_ISA_SET_I186, 0, 0, ALWAYS, 0 },
	{ ZYDIS_ISA_SET_I386, 0, 0, ALWAYS, 0 },
	{ ZYDIS_ISA_SET_I486REAL, 0, 0, ALWAYS, 0 },
	{ ZYDIS_ISA_SET_I486, 0, 0, ALWAYS, 0 },
	{ ZYDIS_ISA_SET_PENTIUMREAL, 0, 0, ALWAYS, 0 },
	{ ZYDIS_ISA_SET_PPRO, 0, 0, ALWAYS, 0 },
	{ ZYDIS_ISA_SET_CMOV, 0, 0, ALWAYS, 0 },
	{ ZYDIS_ISA_SET_LONGMODE, 0, 0, ALWAYS, 0 },
	{ ZYDIS_ISA_SET_FAT_NOP, 0, 0, ALWAYS, 0 },
	{ ZYDIS_ISA_SET_X87, 0, 0, ALWAYS, 0 },
	{ ZYDIS_ISA_SET_FCMOV, 0, 0, ALWAYS, 0 },
	{ ZYDIS_ISA_SET_PENTIUMMMX, 0, 0, ALWAYS, 0 },
	{ ZYDIS_ISA_SET_SSE, 0, 0, ALWAYS, 0 },
	{ ZYDIS_ISA_SET_SSE2, 0, 0, ALWAYS, 0 },
	{ ZYDIS_ISA_SET_SSE2MMX, 0, 0, ALWAYS, 0 },
	{ ZYDIS_ISA_SET_LAHF, 0x80000001, 0, 2, 0 },
	{ ZYDIS_ISA_SET_SSE3, 1, 0, 2, 0 },
	{ ZYDIS_ISA_SET_SSE3X87, 1, 0, 2, 0 },
	{ ZYDIS_ISA_SET_PCLMULQDQ, 1, 0, 2, 1 },
	{ ZYDIS_ISA_SET_SSSE3, 1, 0, 2, 9 },
	{ ZYDIS_ISA_SET_SSSE3MMX, 1, 0, 2, 9 },
	{ ZYDIS_ISA_SET_FMA, 1, 0, 2, 12 },
	{ ZYDIS_ISA_SET_CMPXCHG16B, 1, 0, 2, 13 },
	{ ZYDIS_ISA_SET_SSE4, 1, 0, 2, 19 },
	{ ZYDIS_ISA_SET_SSE42, 1, 0, 2, 20 },
	{ ZYDIS_ISA_SET_MOVBE, 1, 0, 2, 22 },
	{ ZYDIS_ISA_SET_POPCNT, 1, 0, 2, 23 },
	{ ZYDIS_ISA_SET_AES, 1, 0, 2, 25 },
	{ ZYDIS_ISA_SET_AVX, 1, 0, 2, 28 },
	{ ZYDIS_ISA_SET_AVXAES, 1, 0, 2, 25 },
	{ ZYDIS_ISA_SET_F16C, 1, 0, 2, 29 },
	{ ZYDIS_ISA_SET_LZCNT, 0x80000001, 0, 2, 5 },
	{ ZYDIS_ISA_SET_BMI1, 7, 0, 1, 3 },
	{ ZYDIS_ISA_SET_AVX2, 7, 0, 1, 5 },
	{ ZYDIS_ISA_SET_BMI2, 7, 0, 1, 8 },
	{ ZYDIS_ISA_SET_ADOX_ADCX, 7, 0, 1, 19 },
	{ ZYDIS_ISA_SET_SHA, 7, 0, 1, 29 },
	{ ZYDIS_ISA_SET_GFNI, 7, 0, 2, 8 },
	{ ZYDIS_ISA_SET_AVX_GFNI, 7, 0, 2, 8 },
	{ ZYDIS_ISA_SET_VAES, 7, 0, 2, 9 },
	{ ZYDIS_ISA_SET_VPCLMULQDQ, 7, 0, 2, 10 },
	{ ZYDIS_ISA_SET_AVX_VNNI, 7, 1, 0, 4 },
};

static bool host_has(ZydisISASet set)
{
	for (unsigned i = 0; i < sizeof(isas) / sizeof(isas[0]); i++) {
		const struct isa *a = &isas[i];
		uint32_t r[4];
		if (a->set != set)
			continue;
		if (a->reg == ALWAYS)
			return true;
		if (!__get_cpuid_count(a->leaf, a->subleaf, &r[0], &r[1], &r[2], &r[3]))
			return false;
		return r[a->reg] >> a->bit & 1;
	}
	return false;
}

/* --- judging a candidate --- */

static bool unwanted(ZydisMnemonic m)
{
	switch (m) {
	case ZYDIS_MNEMONIC_DIV: /* made by divide() */
	case ZYDIS_MNEMONIC_IDIV:
	case ZYDIS_MNEMONIC_CALL:
	case ZYDIS_MNEMONIC_JMP:
	case ZYDIS_MNEMONIC_PUSH:
	case ZYDIS_MNEMONIC_POP:
	case ZYDIS_MNEMONIC_UD0:
	case ZYDIS_MNEMONIC_UD1:
	case ZYDIS_MNEMONIC_UD2:
	case ZYDIS_MNEMONIC_RDRAND:
	case ZYDIS_MNEMONIC_RDSEED:
	case ZYDIS_MNEMONIC_CLFLUSH:
	case ZYDIS_MNEMONIC_RSM:
	case ZYDIS_MNEMONIC_CPUID:
	case ZYDIS_MNEMONIC_LDMXCSR: /* could unmask exceptions */
	case ZYDIS_MNEMONIC_VLDMXCSR:
	case ZYDIS_MNEMONIC_FLDCW:
	case ZYDIS_MNEMONIC_FLDENV:
	case ZYDIS_MNEMONIC_FRSTOR:
	case ZYDIS_MNEMONIC_FNSTENV: /* show the instruction pointer */
	case ZYDIS_MNEMONIC_FNSAVE:
	case ZYDIS_MNEMONIC_FXSAVE:
	case ZYDIS_MNEMONIC_FXSAVE64:
	case ZYDIS_MNEMONIC_FXRSTOR:
	case ZYDIS_MNEMONIC_FXRSTOR64:
	case ZYDIS_MNEMONIC_MASKMOVQ: /* addresses in RDI */
	case ZYDIS_MNEMONIC_MASKMOVDQU:
	case ZYDIS_MNEMONIC_VMASKMOVDQU:
	case ZYDIS_MNEMONIC_LSS:
	case ZYDIS_MNEMONIC_LFS:
	case ZYDIS_MNEMONIC_LGS:
		return true;
	default:
		return false;
	}
}

static uint16_t undefined_after(const struct insn_gen *g, const struct x86_insn *in, const ZydisDecodedInstruction *zi)
{
	uint16_t undef = zi->cpu_flags ? zi->cpu_flags->undefined & FL_STATUS : 0;

	switch (in->mnemonic) {
	case ZYDIS_MNEMONIC_SHL:
	case ZYDIS_MNEMONIC_SHR:
	case ZYDIS_MNEMONIC_SAR:
		undef |= FL_AF | FL_OF | FL_CF; /* OF unless by 1; CF if the count exceeds a narrow operand */
		break;
	case ZYDIS_MNEMONIC_ROL:
	case ZYDIS_MNEMONIC_ROR:
	case ZYDIS_MNEMONIC_RCL:
	case ZYDIS_MNEMONIC_RCR:
		undef |= FL_OF;
		break;
	case ZYDIS_MNEMONIC_SHLD:
	case ZYDIS_MNEMONIC_SHRD:
		undef |= FL_STATUS;
		break;
	case ZYDIS_MNEMONIC_BSF:
	case ZYDIS_MNEMONIC_BSR:
		undef |= FL_STATUS & ~FL_ZF;
		break;
	case ZYDIS_MNEMONIC_FCOMI:
	case ZYDIS_MNEMONIC_FCOMIP:
	case ZYDIS_MNEMONIC_FUCOMI:
	case ZYDIS_MNEMONIC_FUCOMIP:
		return (g->undefined & ~in->flags_killed);
	default:
		break;
	}
	return (g->undefined & ~in->flags_killed) | (undef & (in->flags_killed | in->flags_maybe));
}

/* Whether the candidate is an instruction of the classes asked for that stays within bounds; its length, or 0. */
static unsigned accept(struct insn_gen *g, const uint8_t *bytes, unsigned n, bool fpu_only)
{
	struct x86_insn in;
	ZydisDecoder decoder;
	ZydisDecoderContext context;
	ZydisDecodedInstruction zi;

	if (x86_decode(bytes, n, X86_MODE_64, &in))
		return 0;
	ZydisDecoderInit(&decoder, ZYDIS_MACHINE_MODE_LONG_64, ZYDIS_STACK_WIDTH_64);
	if (!ZYAN_SUCCESS(ZydisDecoderDecodeInstruction(&decoder, &context, bytes, n, &zi)))
		return 0;
	if (!host_has(zi.meta.isa_set) || unwanted(in.mnemonic) || (fpu_only && !in.fpu))
		return 0;
	if (in.gpr_written & (1u << g->base | 1u << RSP))
		return 0;
	if (in.has_mem && (in.base != g->base || in.vsib || in.mem_size > 64))
		return 0;
	bool bit_string = in.has_mem && in.map == MAP_0F && (in.opcode & 0xe7) == 0xa3 && !in.fpu;
	if (bit_string || (in.has_mem && in.map == MAP_0F && in.opcode == 0xae))
		return 0;
	/* Elements in two pages of undefined behaviour: a 16-bit SHLD by more than 16 has an undefined result too. */
	if ((in.mnemonic == ZYDIS_MNEMONIC_SHLD || in.mnemonic == ZYDIS_MNEMONIC_SHRD || in.mnemonic == ZYDIS_MNEMONIC_BSWAP) &&
	    in.opsize == 2)
		return 0;
	/* BSF and BSR of zero: the destination is undefined. */
	if (g->strict_flags && (in.mnemonic == ZYDIS_MNEMONIC_BSF || in.mnemonic == ZYDIS_MNEMONIC_BSR))
		return 0;
	if (g->strict_flags && (in.flags_read & g->undefined))
		return 0;
	g->undefined = undefined_after(g, &in, &zi);
	return in.len;
}

/* --- encoding --- */

struct out {
	uint8_t *p;
	unsigned n;
};

static void put(struct out *o, uint8_t b)
{
	o->p[o->n++] = b;
}

static void put32(struct out *o, uint32_t v)
{
	memcpy(o->p + o->n, &v, 4);
	o->n += 4;
}

/* A register that may be destroyed. */
static unsigned free_reg(struct insn_gen *g)
{
	for (;;) {
		unsigned r = below(g, 16);
		if (r != RSP && r != g->base)
			return r;
	}
}

static void mov_imm32(struct out *o, unsigned reg, uint32_t v)
{
	if (reg & 8)
		put(o, 0x41);
	put(o, 0xb8 | (reg & 7));
	put32(o, v);
}

/* lea reg, [base + disp32] */
static void lea_base(struct insn_gen *g, struct out *o, unsigned reg, uint32_t disp)
{
	put(o, 0x48 | (reg & 8 ? 4 : 0) | (g->base & 8 ? 1 : 0));
	put(o, 0x8d);
	put(o, 0x80 | (reg & 7) << 3 | (g->base & 7));
	if ((g->base & 7) == 4)
		put(o, 0x24);
	put32(o, disp);
}

/* How the operand in ModRM.rm is to be encoded. */
struct operand {
	bool mem, indexed;
	unsigned rm, index, scale;
	uint32_t disp;
};

static void modrm(struct insn_gen *g, struct out *o, const struct operand *a, unsigned reg)
{
	if (!a->mem) {
		put(o, 0xc0 | (reg & 7) << 3 | (a->rm & 7));
		return;
	}
	bool sib = a->indexed || (g->base & 7) == 4;
	put(o, 0x80 | (reg & 7) << 3 | (sib ? 4 : g->base & 7));
	if (sib)
		put(o, (uint8_t)(a->scale << 6 | (a->indexed ? (a->index & 7) << 3 : 0x20) | (g->base & 7)));
	put32(o, a->disp);
}

static unsigned rex_bits(const struct insn_gen *g, const struct operand *a, unsigned reg)
{
	unsigned rex = reg & 8 ? 4 : 0;

	if (a->mem)
		return rex | (g->base & 8 ? 1 : 0) | (a->indexed && (a->index & 8) ? 2 : 0);
	return rex | (a->rm & 8 ? 1 : 0);
}

/* A random operand; memory ones inside the buffer with room for 64 bytes. Emits the set-up of an index register. */
static struct operand random_operand(struct insn_gen *g, struct out *o, bool aligned)
{
	struct operand a = { .mem = one_in(g, 2), .rm = below(g, 16) };

	if (!a.mem)
		return a;
	a.disp = below(g, g->mem_size - 128);
	if (aligned || one_in(g, 3))
		a.disp &= ~31u;
	if (one_in(g, 5)) {
		a.indexed = true;
		a.index = free_reg(g);
		a.scale = below(g, 4);
		a.disp &= ~63u;
		uint32_t index = aligned ? 32u >> a.scale : below(g, 64) >> a.scale;
		mov_imm32(o, a.index, index);
		if (aligned)
			a.disp &= ~31u;
	}
	return a;
}

/* --- the classes --- */

static uint8_t legacy_int_opcode(struct insn_gen *g, unsigned *map)
{
	static const uint8_t one[] = { 0x63, 0x69, 0x6b, 0x80, 0x81, 0x83, 0x84, 0x85, 0x86, 0x87, 0x88, 0x89, 0x8a, 0x8b, 0x8d, 0x90,
				       0x91, 0x95, 0x98, 0x99, 0x9e, 0x9f, 0xa8, 0xa9, 0xb0, 0xb4, 0xb7, 0xb8, 0xbb, 0xbf, 0xc0, 0xc1,
				       0xc6, 0xc7, 0xd0, 0xd1, 0xd2, 0xd3, 0xf5, 0xf6, 0xf7, 0xf8, 0xf9, 0xfe, 0xff };
	static const uint8_t two[] = { 0xa3, 0xa4, 0xa5, 0xab, 0xac, 0xad, 0xaf, 0xb0, 0xb1, 0xb3, 0xb6, 0xb7, 0xb8, 0xba,
				       0xbb, 0xbc, 0xbd, 0xbe, 0xbf, 0xc0, 0xc1, 0xc3, 0xc7, 0xc8, 0xca, 0xcd, 0xcf };
	switch (below(g, 8)) {
	case 0:
	case 1:
	case 2:
		*map = MAP_1BYTE;
		return (uint8_t)(below(g, 8) << 3 | below(g, 6));
	case 3:
	case 4:
		*map = MAP_1BYTE;
		return one[below(g, sizeof(one))];
	case 5:
		*map = MAP_0F;
		return (uint8_t)((one_in(g, 2) ? 0x40 : 0x90) | below(g, 16));
	default:
		*map = MAP_0F;
		return two[below(g, sizeof(two))];
	}
}

/* Emit a legacy-encoded candidate: prefixes, opcode, ModRM and 8 bytes of immediate, of which the decoder takes what it needs. */
static unsigned legacy(struct insn_gen *g, uint8_t *buf, uint8_t prefix, unsigned map, uint8_t opcode, bool fpu)
{
	struct out o = { buf, 0 };
	struct operand a = random_operand(g, &o, fpu || (map == MAP_0F && opcode == 0xc7)); /* CMPXCHG16B */
	unsigned reg = below(g, 16), start = o.n;
	bool mmx_free = fpu && one_in(g, 2);
	unsigned rex = rex_bits(g, &a, reg) | (one_in(g, 3) ? 8 : 0);

	if (map == MAP_0F && (opcode == 0x38 || opcode == 0x3a)) /* escapes to the other maps */
		return 0;
	if (mmx_free) { /* more instructions without REX */
		reg &= 7;
		rex &= a.mem ? 3 : 0;
		a.rm &= 7;
	}
	if (prefix)
		put(&o, prefix);
	if (!fpu && a.mem && one_in(g, 8))
		put(&o, 0xf0);
	if (rex || (!fpu && one_in(g, 3)))
		put(&o, (uint8_t)(0x40 | rex));
	if (map != MAP_1BYTE)
		put(&o, 0x0f);
	if (map == MAP_0F38)
		put(&o, 0x38);
	else if (map == MAP_0F3A)
		put(&o, 0x3a);
	put(&o, opcode);
	modrm(g, &o, &a, reg);
	uint64_t imm = insn_gen_random(g);
	memcpy(o.p + o.n, &imm, 8);
	unsigned room = o.n - start + 8;
	unsigned len = accept(g, buf + start, room > 15 ? 15 : room, fpu);
	return len ? start + len : 0;
}

static unsigned gen_int(struct insn_gen *g, uint8_t *buf)
{
	unsigned map;
	uint8_t opcode = legacy_int_opcode(g, &map);
	uint8_t prefix = one_in(g, 4) ? 0x66 : map == MAP_0F && one_in(g, 6) ? 0xf3 : 0;

	return legacy(g, buf, prefix, map, opcode, false);
}

static unsigned vex(struct insn_gen *g, uint8_t *buf, unsigned pp, unsigned map, uint8_t opcode, bool fpu)
{
	struct out o = { buf, 0 };
	struct operand a = random_operand(g, &o, fpu);
	unsigned reg = below(g, 16), vvvv = one_in(g, 3) ? 0 : below(g, 16), start = o.n;
	unsigned rex = rex_bits(g, &a, reg);
	bool w = one_in(g, 2), l = fpu && one_in(g, 2);

	put(&o, 0xc4);
	put(&o, (uint8_t)((~rex & 7) << 5 | map));
	put(&o, (uint8_t)((w ? 0x80 : 0) | (~vvvv & 15) << 3 | (l ? 4 : 0) | pp));
	put(&o, opcode);
	modrm(g, &o, &a, reg);
	uint64_t imm = insn_gen_random(g);
	memcpy(o.p + o.n, &imm, 8);
	unsigned room = o.n - start + 8;
	unsigned len = accept(g, buf + start, room > 15 ? 15 : room, fpu);
	return len ? start + len : 0;
}

static unsigned gen_bmi(struct insn_gen *g, uint8_t *buf)
{
	static const uint8_t v[] = { 0xf2, 0xf3, 0xf5, 0xf6, 0xf7 };

	switch (below(g, 8)) {
	case 0:
		return legacy(g, buf, one_in(g, 3) ? 0x66 : 0, MAP_0F38, 0xf0 | below(g, 2), false); /* MOVBE */
	case 1:
		return legacy(g, buf, 0xf2, MAP_0F38, 0xf0 | below(g, 2), false); /* CRC32 */
	case 2:
		return legacy(g, buf, one_in(g, 2) ? 0x66 : 0xf3, MAP_0F38, 0xf6, false); /* ADCX, ADOX */
	case 3:
		return vex(g, buf, 3, MAP_0F3A, 0xf0, false); /* RORX */
	default:
		return vex(g, buf, below(g, 4), MAP_0F38, v[below(g, sizeof(v))], false);
	}
}

static unsigned gen_sse(struct insn_gen *g, uint8_t *buf)
{
	static const uint8_t prefixes[] = { 0, 0x66, 0x66, 0x66, 0xf2, 0xf3 };
	unsigned map = one_in(g, 3) ? (one_in(g, 2) ? MAP_0F38 : MAP_0F3A) : MAP_0F;

	return legacy(g, buf, prefixes[below(g, 6)], map, (uint8_t)below(g, 256), true);
}

static unsigned gen_avx(struct insn_gen *g, uint8_t *buf)
{
	return vex(g, buf, below(g, 4), one_in(g, 2) ? MAP_0F : 1 + below(g, 3), (uint8_t)below(g, 256), true);
}

static unsigned gen_x87(struct insn_gen *g, uint8_t *buf)
{
	return legacy(g, buf, 0, MAP_1BYTE, (uint8_t)(0xd8 | below(g, 8)), true);
}

static unsigned gen_mmx(struct insn_gen *g, uint8_t *buf)
{
	static const uint8_t ranges[] = { 0x60, 0x70, 0xd0, 0xe0, 0xf0 };

	return legacy(g, buf, 0, MAP_0F, (uint8_t)(ranges[below(g, 5)] | below(g, 16)), true);
}

/* xor edx, edx (or cdq); mov r32, divisor; div r32, with a dividend that fits. */
static unsigned gen_div(struct insn_gen *g, uint8_t *buf)
{
	struct out o = { buf, 0 };
	bool is_signed = one_in(g, 2), w = one_in(g, 2);
	unsigned reg;

	if (g->base == RAX || g->base == RDX)
		return 0;
	do
		reg = free_reg(g);
	while (reg == RAX || reg == RDX);
	uint32_t divisor = (uint32_t)insn_gen_random(g) >> below(g, 31);
	mov_imm32(&o, reg, divisor ? divisor & 0x7fffffff : 1);
	if (!(divisor & 0x7fffffff))
		mov_imm32(&o, reg, 7);
	if (is_signed && w)
		put(&o, 0x48);
	if (is_signed) {
		put(&o, 0x99); /* cdq, cqo */
	} else {
		put(&o, 0x31);
		put(&o, 0xd2);
	}
	unsigned rex = (w ? 8 : 0) | (reg & 8 ? 1 : 0);
	if (rex)
		put(&o, (uint8_t)(0x40 | rex));
	put(&o, 0xf7);
	put(&o, 0xc0 | (is_signed ? 7 : 6) << 3 | (reg & 7));
	g->undefined = FL_STATUS;
	return o.n;
}

static unsigned gen_stack(struct insn_gen *g, uint8_t *buf)
{
	struct out o = { buf, 0 };
	unsigned reg = below(g, 16);

	if (g->depth && one_in(g, 2)) {
		reg = free_reg(g);
		if (reg & 8)
			put(&o, 0x41);
		put(&o, 0x58 | (reg & 7));
		g->depth--;
		return o.n;
	}
	if (g->depth + 1 >= INSN_GEN_STACK_DEPTH)
		return 0;
	g->depth++;
	switch (below(g, 3)) {
	case 0:
		put(&o, 0x68);
		put32(&o, (uint32_t)insn_gen_random(g));
		break;
	case 1: { /* push qword [base + disp] */
		struct operand a = { .mem = true, .disp = below(g, g->mem_size - 8) };
		if (g->base & 8)
			put(&o, 0x41);
		put(&o, 0xff);
		modrm(g, &o, &a, 6);
		break;
	}
	default:
		if (reg & 8)
			put(&o, 0x41);
		put(&o, 0x50 | (reg & 7));
	}
	return o.n;
}

/* lea rsi; lea rdi; mov ecx; rep op. */
static unsigned gen_string(struct insn_gen *g, uint8_t *buf)
{
	static const uint8_t ops[] = { 0xa4, 0xa5, 0xa6, 0xa7, 0xaa, 0xab, 0xac, 0xad, 0xae, 0xaf };
	struct out o = { buf, 0 };
	uint8_t op = ops[below(g, sizeof(ops))];
	uint32_t half = g->mem_size / 2;

	if (g->base == RSI || g->base == RDI || g->base == RCX || g->base == RAX)
		return 0;
	lea_base(g, &o, RSI, below(g, half));
	lea_base(g, &o, RDI, below(g, half));
	bool compare = op == 0xa6 || op == 0xa7 || op == 0xae || op == 0xaf;
	mov_imm32(&o, RCX, below(g, half / 8));
	bool rep = !one_in(g, 4);
	if (rep)
		put(&o, compare && one_in(g, 2) ? 0xf2 : 0xf3);
	if (one_in(g, 2))
		put(&o, 0x48);
	put(&o, op);
	if (compare && !rep)
		g->undefined = 0;
	return o.n;
}

unsigned insn_gen_next(struct insn_gen *g, uint8_t *out)
{
	static unsigned (*const make[])(struct insn_gen *, uint8_t *) = { gen_int, gen_div, gen_bmi, gen_stack, gen_string,
									  gen_sse, gen_avx, gen_x87, gen_mmx };
	for (;;) {
		unsigned k = below(g, 9);
		if (!(g->classes >> k & 1))
			continue;
		/* Integer code is what there is most of. */
		unsigned n = make[(g->classes & GEN_INT) && one_in(g, 3) ? 0 : k](g, out);
		if (n)
			return n;
	}
}

size_t insn_gen_sequence(struct insn_gen *g, uint8_t *out, unsigned count)
{
	size_t n = 0;

	for (unsigned i = 0; i < count; i++)
		n += insn_gen_next(g, out + n);
	return n;
}
