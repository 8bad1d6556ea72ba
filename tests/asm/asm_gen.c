#include "asm_gen.h"

#include <Zydis/Zydis.h>
#include <cpuid.h>
#include <stdio.h>
#include <string.h>

#include "cpu/x86/insn.h"

static uint64_t rnd(struct asm_gen *g)
{
	g->rng ^= g->rng << 13, g->rng ^= g->rng >> 7, g->rng ^= g->rng << 17;
	return g->rng * 0x2545f4914f6cdd1dull;
}

static unsigned below(struct asm_gen *g, unsigned n)
{
	return (unsigned)((rnd(g) >> 24) % n);
}

static bool one_in(struct asm_gen *g, unsigned n)
{
	return below(g, n) == 0;
}

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

static void decoder_init(ZydisDecoder *decoder, bool compat)
{
	ZydisDecoderInit(decoder, compat ? ZYDIS_MACHINE_MODE_LONG_COMPAT_32 : ZYDIS_MACHINE_MODE_LONG_64,
			 compat ? ZYDIS_STACK_WIDTH_32 : ZYDIS_STACK_WIDTH_64);
}

static bool decode(bool compat, const uint8_t *bytes, unsigned n, struct x86_insn *in, ZydisDecodedInstruction *zi)
{
	ZydisDecoder decoder;

	if (x86_decode(bytes, n > 15 ? 15 : n, asm_mode(compat), in) < 0)
		return false;
	decoder_init(&decoder, compat);
	return ZYAN_SUCCESS(ZydisDecoderDecodeInstruction(&decoder, NULL, bytes, n > 15 ? 15 : n, zi));
}

/* --- undefined flags --- */

/* Flags that the manual leaves undefined after it (SDM 2, the instructions' pages), given those undefined before. */
static uint16_t undefined_after(const struct x86_insn *in, const ZydisDecodedInstruction *zi, uint16_t before)
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
		undef = 0;
		break;
	default:
		break;
	}
	return (uint16_t)((before & ~in->flags_killed) | (undef & (in->flags_killed | in->flags_maybe)));
}

/* Through an item from its byte `from`... to the instruction at `upto` (or its end). *bad: an undefined flag is read. */
static uint16_t item_undefined(const struct asm_item *it, uint16_t undef, unsigned upto, bool *bad)
{
	for (unsigned at = 0; at < it->len && at < upto;) {
		struct x86_insn in;
		ZydisDecodedInstruction zi;
		if (!decode(it->compat, it->bytes + at, it->len - at, &in, &zi))
			break;
		if (in.flags_read & undef)
			*bad = true;
		undef = undefined_after(&in, &zi, undef);
		at += in.len;
	}
	return undef;
}

/* The flags undefined before each item; false if one is read. */
static bool flow_undefined(const struct asm_gen *g, uint16_t before[ASM_ITEMS + 1])
{
	bool changed = true, bad = false;
	uint16_t returned = 0;

	memset(before, 0, (ASM_ITEMS + 1) * sizeof(*before));
	while (changed) {
		changed = false;
		for (unsigned i = 0; i < g->n; i++) {
			const struct asm_item *it = &g->item[i];
			uint16_t after = item_undefined(it, before[i], ASM_ITEM_BYTES, &bad);
			unsigned to[2], n = 0;
			if (it->flow == FLOW_NEXT || it->flow == FLOW_COND)
				to[n++] = i + 1;
			if (it->flow != FLOW_NEXT && it->target >= 0 && it->flow != FLOW_RET)
				to[n++] = (unsigned)it->target;
			for (unsigned k = 0; k < n; k++)
				if (to[k] <= g->n && (before[to[k]] | after) != before[to[k]])
					before[to[k]] |= after, changed = true;
			if (it->flow == FLOW_RET && (returned | after) != returned)
				returned |= after, changed = true;
			if (it->flow == FLOW_CALL && (before[i + 1] | returned) != before[i + 1])
				before[i + 1] |= returned, changed = true;
		}
	}
	return !bad;
}

/* --- assembling --- */

static uint32_t item_offsets(const struct asm_gen *g, uint32_t at[ASM_ITEMS + 1])
{
	uint32_t pos = g->start.start;

	for (unsigned i = 0; i < g->n; i++) {
		at[i] = pos;
		pos += g->item[i].len;
	}
	at[g->n] = pos;
	return pos;
}

static bool hides_syscall(const uint8_t *p, unsigned n)
{
	for (unsigned i = 0; i + 1 < n; i++)
		if ((p[i] == 0x0f && (p[i + 1] == 0x05 || p[i + 1] == 0x34)) || p[i] == 0xcd)
			return true;
	return false;
}

bool asm_gen_assemble(const struct asm_gen *g, struct asm_program *out)
{
	uint32_t at[ASM_ITEMS + 1];
	uint16_t undef[ASM_ITEMS + 1];

	if (!flow_undefined(g, undef))
		return false;
	*out = g->start;
	/* Unmasked x87 exceptions keep a store from its operand's fault: natively only without. */
	out->native = g->start.user && asm_base_native(g->start.base) && !g->start.upper && (g->start.s.xsave[0] & 0x3f) == 0x3f;
#ifdef __SANITIZE_ADDRESS__
	/* The sanitizer's shadow is memory where the guest has none: a stray store there would not fault. */
	out->native = false;
#endif
	out->len = item_offsets(g, at) - g->start.start;
	if (out->len > ASM_PROGRAM_MAX - 16)
		return false;
	for (unsigned i = 0; i < g->n; i++) {
		const struct asm_item *it = &g->item[i];
		uint8_t *p = out->code + (at[i] - g->start.start);
		memcpy(p, it->bytes, it->len);
		if (it->alien)
			out->native = false;
		if (!it->fix_size)
			continue;
		int64_t rel = (int64_t)(it->target >= 0 ? at[it->target] : it->target_off) + it->fix_add - (int64_t)(at[i] + it->fix_end);
		if (it->fix_abs)
			rel += (int64_t)(asm_base[g->start.base] + at[i] + it->fix_end);
		else if (it->fix_size == 1 && (rel < -128 || rel > 127))
			return false;
		memcpy(p + it->fix_off, &rel, it->fix_size);
	}
	/* Whoever falls off the end halts. */
	memset(out->code + out->len, 0xf4, 16);
	out->len += 16;
	if (out->native && hides_syscall(out->code, out->len))
		return false;
	return true;
}

bool asm_gen_valid(const struct asm_gen *g)
{
	struct asm_program p;

	return asm_gen_assemble(g, &p);
}

uint16_t asm_gen_undefined(const struct asm_gen *g, uint64_t rip)
{
	uint32_t at[ASM_ITEMS + 1];
	uint16_t undef[ASM_ITEMS + 1];
	bool bad = false;

	item_offsets(g, at);
	flow_undefined(g, undef);
	for (unsigned i = 0; i < g->n; i++)
		if (rip >= at[i] && rip < at[i + 1])
			return item_undefined(&g->item[i], undef[i], (unsigned)(rip - at[i]), &bad);
	/* Behind the end, or somewhere wild: whatever any path leaves. */
	uint16_t all = undef[g->n];
	for (unsigned i = 0; i < g->n; i++)
		all |= item_undefined(&g->item[i], undef[i], ASM_ITEM_BYTES, &bad);
	return all;
}

/* An item that ends within an instruction: the bytes behind it belong to that, and what they read is not in the items. */
static bool is_cut(bool compat, const uint8_t *bytes, unsigned n)
{
	ZydisDecoder decoder;
	ZydisDecodedInstruction zi;

	decoder_init(&decoder, compat);
	return n < 15 && ZydisDecoderDecodeInstruction(&decoder, NULL, bytes, n, &zi) == ZYDIS_STATUS_NO_MORE_DATA;
}

/* Flags read from item i's byte `from` on, of those not yet overwritten; code[i] is the item as assembled. */
static uint16_t live_from(const struct asm_gen *g, const uint8_t *const code[], unsigned i, unsigned from, uint16_t open,
			  uint16_t seen[ASM_ITEMS])
{
	uint16_t live = 0;

	while (open) {
		if (i >= g->n)
			return live | open;
		const struct asm_item *it = &g->item[i];
		if (!from) {
			if (!(open & ~seen[i]))
				return live;
			seen[i] |= open;
		}
		for (unsigned at = from; at < it->len;) {
			struct x86_insn in;
			ZydisDecodedInstruction zi;
			if (!decode(it->compat, code[i] + at, it->len - at, &in, &zi))
				return is_cut(it->compat, code[i] + at, it->len - at) ? live : live | open; /* cut: nobody knows */
			live |= in.flags_read & open;
			if (in.mnemonic == ZYDIS_MNEMONIC_PUSHFQ || in.mnemonic == ZYDIS_MNEMONIC_PUSHFD || in.mnemonic == ZYDIS_MNEMONIC_PUSHF || in.mnemonic == ZYDIS_MNEMONIC_HLT)
				live |= open;
			open &= (uint16_t)~in.flags_killed;
			at += in.len;
		}
		from = 0;
		if (it->flow == FLOW_RET || it->flow == FLOW_END)
			return live | open;
		if (it->flow != FLOW_NEXT)
			live |= live_from(g, code, it->target >= 0 ? (unsigned)it->target : g->n, 0, open, seen);
		if (it->flow == FLOW_JUMP || it->flow == FLOW_CALL)
			return live;
		i++;
	}
	return live;
}

/* Does an instruction of the item of `len` bytes begin at `off`? */
static bool is_boundary(bool compat, const uint8_t *code, unsigned len, unsigned off)
{
	unsigned at = 0;

	while (at < off) {
		struct x86_insn in;
		if (x86_decode(code + at, len - at, asm_mode(compat), &in) < 0)
			return false;
		at += in.len;
	}
	return at == off;
}

uint16_t asm_gen_dead(const struct asm_gen *g, uint64_t rip)
{
	uint32_t at[ASM_ITEMS + 1];
	uint16_t seen[ASM_ITEMS] = { 0 };
	const uint8_t *code[ASM_ITEMS];
	struct asm_program p;

	if (!asm_gen_assemble(g, &p))
		return 0;
	item_offsets(g, at);
	for (unsigned i = 0; i < g->n; i++)
		code[i] = p.code + (at[i] - p.start);
	for (unsigned i = 0; i < g->n; i++)
		if (rip >= at[i] && rip < at[i + 1] && !is_boundary(g->start.compat, code[i], g->item[i].len, (unsigned)(rip - at[i])))
			return FL_STATUS; /* a wild jump into an instruction: nobody knows */
		else if (rip >= at[i] && rip < at[i + 1])
			return (uint16_t)(FL_STATUS & ~live_from(g, code, i, (unsigned)(rip - at[i]), FL_STATUS, seen));
	return 0;
}

bool asm_gen_strange(const struct asm_gen *g, const struct asm_program *p, uint64_t rip, const uint8_t bytes[15])
{
	uint32_t at[ASM_ITEMS + 1];
	struct x86_insn in;
	ZydisDecodedInstruction zi;

	if (!decode(g->start.compat, bytes, 15, &in, &zi) || !undefined_after(&in, &zi, 0))
		return false;
	item_offsets(g, at);
	for (unsigned i = 0; i < g->n; i++) {
		if (rip < at[i] || rip >= at[i + 1])
			continue;
		const uint8_t *code = p->code + (at[i] - p->start);
		return rip + in.len > at[i + 1] || !is_boundary(g->start.compat, code, g->item[i].len, (unsigned)(rip - at[i])) ||
		       memcmp(bytes, code + (rip - at[i]), in.len) != 0;
	}
	return true;
}

void asm_gen_drop(struct asm_gen *g, unsigned i)
{
	for (unsigned k = 0; k < g->n; k++)
		if (g->item[k].target > (int)i)
			g->item[k].target--;
	memmove(&g->item[i], &g->item[i + 1], (g->n - i - 1) * sizeof(g->item[0]));
	g->n--;
	if (g->functions > i)
		g->functions--;
	for (unsigned k = 0; k < g->n; k++)
		if (g->item[k].target >= (int)g->n)
			g->item[k].target = (int16_t)(g->n - 1);
}

/* --- encoding --- */

static struct asm_item *item_new(struct asm_gen *g)
{
	struct asm_item *it = &g->item[g->n++];

	memset(it, 0, sizeof(*it));
	it->target = -1;
	it->compat = g->start.compat;
	return it;
}

static void put(struct asm_item *it, uint8_t b)
{
	it->bytes[it->len++] = b;
}

/* A REX prefix: not in 32-bit code, where it would be an instruction. */
static void put_rex(struct asm_item *it, unsigned b)
{
	if (!it->compat)
		put(it, (uint8_t)b);
}

static void putn(struct asm_item *it, const void *p, unsigned n)
{
	memcpy(it->bytes + it->len, p, n);
	it->len += (uint8_t)n;
}

static void put32(struct asm_item *it, uint32_t v)
{
	putn(it, &v, 4);
}

static unsigned pick_mask(struct asm_gen *g, uint16_t mask)
{
	unsigned k = below(g, (unsigned)__builtin_popcount(mask));

	for (unsigned r = 0; r < 16; r++)
		if (mask >> r & 1 && k-- == 0)
			return r;
	return 0;
}

static unsigned any_reg(struct asm_gen *g)
{
	return below(g, g->start.compat ? 8 : 16);
}

/* A register that may be written. */
static unsigned free_reg(struct asm_gen *g)
{
	return pick_mask(g, (uint16_t)(~(g->pointers | g->indexes | g->kept) & (g->start.compat ? 0xff : 0xffff)));
}

/* ModRM and what follows; prefixes that go with it are left to the caller. */
struct operand {
	bool mem, rip, addr32;
	uint8_t seg; /* prefix byte or 0 */
	unsigned rm, index;
	bool indexed, based, sib;
	unsigned scale, disp_size;
	int32_t disp;
	uint32_t off; /* RIP-relative: target from the base */
};

static const uint16_t interesting_edges[] = { 0x1000, 0x2000, 0x4000, 0x5000, 0x7000 };

static struct operand random_operand(struct asm_gen *g, bool aligned)
{
	struct operand a = { .mem = !one_in(g, 3), .rm = any_reg(g) };

	if (!a.mem)
		return a;
	a.based = true;
	a.rm = pick_mask(g, g->pointers);
	unsigned kind = below(g, 40);
	int32_t disp = (int32_t)below(g, 512) - (one_in(g, 3) ? 256 : 0);
	if (aligned && !one_in(g, 10))
		disp &= ~31;
	else if (one_in(g, 2))
		disp &= ~7;
	a.disp = one_in(g, 5) ? 0 : disp;
	if (one_in(g, 8)) /* neighbours: groups of accesses */
		a.disp = (int32_t)below(g, 4) * 8;
	if (kind < 6) {
		a.rm = RSP;
		a.disp = (int32_t)below(g, 24) * 8 - (one_in(g, 3) ? 64 : 0);
	} else if (kind < 8) {
		a.rip = true;
		a.off = ASM_DATA + (one_in(g, 8) ? interesting_edges[below(g, 5)] - below(g, 70) : below(g, 0x2000));
		if (aligned)
			a.off &= ~31u;
		if (g->start.compat) { /* the same encoding is an absolute address there */
			a.rip = false;
			a.based = false;
			a.disp = (int32_t)(asm_base[g->start.base] + a.off);
			a.sib = one_in(g, 3);
		}
		return a;
	} else if (kind < 10) { /* FS, GS with an absolute displacement */
		a.seg = one_in(g, 2) ? 0x64 : 0x65;
		a.based = false;
		a.disp &= 0xfff;
	} else if (kind < 11) {
		a.seg = one_in(g, 2) ? 0x64 : 0x65;
		a.rm = pick_mask(g, g->indexes);
	} else if (kind < 12 && g->start.base == 0) { /* absolute */
		a.based = false;
		a.disp = (int32_t)(asm_base[0] + ASM_DATA + below(g, 0x1f00));
		if (aligned)
			a.disp &= ~31;
	} else if (kind < 13 && g->start.base == 0) {
		a.addr32 = !g->start.compat || one_in(g, 8); /* 16-bit addresses lead nowhere */
	} else if (kind < 14) { /* ES, CS, SS, DS do nothing */
		static const uint8_t none[] = { 0x26, 0x2e, 0x36, 0x3e };
		a.seg = none[below(g, 4)];
	}
	if (one_in(g, 4) && a.rm != RSP) {
		a.indexed = true;
		a.index = pick_mask(g, g->indexes);
		a.scale = below(g, 4);
	}
	a.sib = one_in(g, 10);
	a.disp_size = !a.disp && !one_in(g, 8) ? 0 : a.disp == (int8_t)a.disp && !one_in(g, 8) ? 1 : 4;
	return a;
}

static unsigned operand_rex(const struct operand *a, unsigned reg)
{
	unsigned rex = reg & 8 ? 4 : 0;

	if (!a->mem)
		return rex | (a->rm & 8 ? 1 : 0);
	if (a->rip)
		return rex;
	return rex | (a->based && (a->rm & 8) ? 1 : 0) | (a->indexed && (a->index & 8) ? 2 : 0);
}

static void put_operand(struct asm_item *it, const struct operand *a, unsigned reg)
{
	reg = (reg & 7) << 3;
	if (!a->mem) {
		put(it, (uint8_t)(0xc0 | reg | (a->rm & 7)));
		return;
	}
	if (a->rip) {
		put(it, (uint8_t)(reg | 5));
		it->fix_off = it->len;
		it->fix_size = 4;
		it->target_off = a->off;
		put32(it, 0);
		return;
	}
	unsigned index = a->indexed ? (a->index & 7) << 3 : 0x20;
	if (!a->based && it->compat && !a->indexed && !a->sib) {
		put(it, (uint8_t)(reg | 5));
		put32(it, (uint32_t)a->disp);
		return;
	}
	if (!a->based) {
		put(it, (uint8_t)(reg | 4));
		put(it, (uint8_t)(a->scale << 6 | index | 5));
		put32(it, (uint32_t)a->disp);
		return;
	}
	unsigned size = a->disp_size;
	if (!size && (a->rm & 7) == 5)
		size = 1;
	unsigned mod = size == 0 ? 0 : size == 1 ? 0x40 : 0x80;
	if (a->indexed || a->sib || (a->rm & 7) == 4) {
		put(it, (uint8_t)(mod | reg | 4));
		put(it, (uint8_t)(a->scale << 6 | index | (a->rm & 7)));
	} else {
		put(it, (uint8_t)(mod | reg | (a->rm & 7)));
	}
	putn(it, &a->disp, size);
}

/* Take the candidate whose immediate bytes are already behind it, if it may be run; sets its length. `first` is where its last
 * instruction starts. */
static bool accept(struct asm_gen *g, struct asm_item *it, unsigned first, int fpu)
{
	struct x86_insn in;
	ZydisDecodedInstruction zi;
	uint64_t imm = rnd(g);

	if (one_in(g, 2))
		imm = one_in(g, 2) ? (uint64_t)(int64_t)(int8_t)imm : imm & 0x0f;
	memcpy(it->bytes + it->len, &imm, 8);
	if (!decode(it->compat, it->bytes + first, it->len - first + 8u, &in, &zi))
		return false;
	if (!category_wanted(zi.meta.category) || !mnemonic_wanted(in.mnemonic) || in.vsib)
		return false;
	if (zi.meta.isa_set == ZYDIS_ISA_SET_SSE4A || zi.meta.isa_set == ZYDIS_ISA_SET_AVX512F_SCALAR)
		return false;
	if ((fpu > 0 && !in.fpu) || (fpu == 0 && in.fpu))
		return false;
	if (in.gpr_written & (uint16_t)(1u << g->counter))
		return false;
	if (in.gpr_written & (g->pointers | g->indexes | 1u << RSP) && !one_in(g, 60))
		return false;
	if (!g->start.user && in.map == MAP_0F && in.opcode >= 0x20 && in.opcode <= 0x23)
		return false; /* control and debug registers: made on purpose */
	/* Bit strings reach where their register says. */
	bool bit_string = in.has_mem && in.map == MAP_0F && (in.opcode & 0xe7) == 0xa3 && !in.fpu;
	if (bit_string && !(g->indexes >> in.reg & 1) && !one_in(g, 20))
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

static void put_prefixes(struct asm_gen *g, struct asm_item *it, const struct operand *a)
{
	if (a->seg)
		put(it, a->seg);
	if (a->addr32)
		put(it, 0x67);
	if (one_in(g, 120))
		put_rex(it, 0x48 | below(g, 8)); /* a REX that a legacy prefix makes void */
}

static bool legacy(struct asm_gen *g, struct asm_item *it, uint8_t prefix, unsigned map, uint8_t opcode, int fpu)
{
	struct operand a = random_operand(g, fpu > 0);
	unsigned reg = any_reg(g);
	unsigned rex = operand_rex(&a, reg) | (one_in(g, 3) ? 8 : 0);

	if (one_in(g, 2)) { /* more instructions without REX: AH..DH, MMX */
		reg &= 7;
		rex = operand_rex(&a, reg);
	}
	put_prefixes(g, it, &a);
	if (prefix)
		put(it, prefix);
	if (fpu == 0 && a.mem && one_in(g, 8))
		put(it, 0xf0);
	if (rex || one_in(g, 8))
		put_rex(it, 0x40 | rex);
	if (map != MAP_1BYTE)
		put(it, 0x0f);
	if (map == MAP_0F38)
		put(it, 0x38);
	else if (map == MAP_0F3A)
		put(it, 0x3a);
	put(it, opcode);
	put_operand(it, &a, reg);
	return accept(g, it, 0, fpu);
}

static bool vex(struct asm_gen *g, struct asm_item *it, unsigned pp, unsigned map, uint8_t opcode, int fpu)
{
	struct operand a = random_operand(g, fpu > 0);
	unsigned reg = any_reg(g), vvvv = one_in(g, 3) ? 0 : any_reg(g);
	unsigned rex = operand_rex(&a, reg);
	bool w = one_in(g, 2), l = fpu && one_in(g, 2);

	if (a.seg)
		put(it, a.seg);
	if (a.addr32)
		put(it, 0x67);
	if (map == MAP_0F && !w && !(rex & 3) && one_in(g, 2)) {
		put(it, 0xc5);
		put(it, (uint8_t)((rex & 4 ? 0 : 0x80) | (~vvvv & 15) << 3 | (l ? 4 : 0) | pp));
	} else {
		put(it, 0xc4);
		put(it, (uint8_t)((~rex & 7) << 5 | map));
		put(it, (uint8_t)((w ? 0x80 : 0) | (~vvvv & 15) << 3 | (l ? 4 : 0) | pp));
	}
	put(it, opcode);
	put_operand(it, &a, reg);
	return accept(g, it, 0, fpu);
}

/* --- classes of items --- */

static bool gen_int(struct asm_gen *g, struct asm_item *it)
{
	static const uint8_t one[] = { 0x63, 0x69, 0x6b, 0x80, 0x81, 0x83, 0x84, 0x85, 0x86, 0x87, 0x88, 0x89, 0x8a, 0x8b, 0x8c, 0x8d,
				       0x90, 0x91, 0x95, 0x98, 0x99, 0x9e, 0x9f, 0xa8, 0xa9, 0xb0, 0xb4, 0xb7, 0xb8, 0xbb, 0xbf, 0xc0,
				       0xc1, 0xc6, 0xc7, 0xd0, 0xd1, 0xd2, 0xd3, 0xd7, 0xf5, 0xf6, 0xf7, 0xf8, 0xf9, 0xfc, 0xfe, 0xff };
	static const uint8_t two[] = { 0xa3, 0xa4, 0xa5, 0xab, 0xac, 0xad, 0xaf, 0xb0, 0xb1, 0xb3, 0xb6, 0xb7, 0xb8, 0xba,
				       0xbb, 0xbc, 0xbd, 0xbe, 0xbf, 0xc0, 0xc1, 0xc3, 0xc7, 0xc8, 0xca, 0xcd, 0xcf, 0x0d,
				       0x18, 0x1e, 0x1f };
	unsigned map = MAP_0F;
	uint8_t opcode;

	switch (below(g, 16)) {
	case 0 ... 5:
		map = MAP_1BYTE;
		opcode = (uint8_t)(below(g, 8) << 3 | below(g, 6));
		break;
	case 6 ... 11:
		map = MAP_1BYTE;
		opcode = one_in(g, 3) ? 0x88 | (uint8_t)below(g, 4) : one[below(g, sizeof(one))];
		break;
	case 12:
		opcode = (uint8_t)((one_in(g, 2) ? 0x40 : 0x90) | below(g, 16));
		break;
	case 13:
		map = one_in(g, 2) ? MAP_0F : MAP_1BYTE;
		opcode = (uint8_t)below(g, 256);
		break;
	default:
		opcode = two[below(g, sizeof(two))];
		break;
	}
	uint8_t prefix = one_in(g, 4) ? 0x66 : one_in(g, 10) ? (one_in(g, 3) ? 0xf2 : 0xf3) : 0;
	return legacy(g, it, prefix, map, opcode, 0);
}

/* What 64-bit mode does not have. */
static bool gen_32(struct asm_gen *g, struct asm_item *it)
{
	static const uint8_t plain[] = { 0x27, 0x2f, 0x37, 0x3f, 0xd6, 0xd4, 0xd5, 0xa0, 0xa1, 0xa2, 0xa3, 0x60, 0x98 };
	uint16_t taken = g->pointers | g->indexes | g->kept;
	uint8_t op = plain[below(g, sizeof(plain))];

	switch (below(g, 10)) {
	case 0 ... 3: /* inc, dec */
		if (one_in(g, 6))
			put(it, 0x66);
		put(it, (uint8_t)(0x40 | below(g, 2) << 3 | free_reg(g)));
		return true;
	case 4: /* bound: from a table of small numbers it faults, mostly */
		return legacy(g, it, one_in(g, 4) ? 0x66 : 0, MAP_1BYTE, 0x62, 0);
	case 5: /* 82: as 80 */
		return legacy(g, it, 0, MAP_1BYTE, 0x82, 0);
	case 6: /* pusha; add esp, 32 (or popa) */
		put(it, 0x60);
		if (one_in(g, 2))
			put(it, 0x61);
		else
			put(it, 0x83), put(it, 0xc4), put(it, 0x20);
		return true;
	case 7: /* mov edx, label behind; mov ecx, esp; sysenter */
		if (taken & (1u << RCX | 1u << RDX))
			return false;
		it->alien = true;
		put(it, 0xba);
		it->fix_abs = true;
		it->fix_size = 4;
		it->fix_off = it->len;
		put32(it, 0);
		put(it, 0x89), put(it, 0xe1), put(it, 0x0f), put(it, 0x34);
		it->fix_end = it->len;
		it->fix_add = (int8_t)it->len;
		it->target = (int16_t)(g->n - 1);
		return true;
	default:
		break;
	}
	if (taken >> RAX & 1 && op != 0xa2 && op != 0xa3 && op != 0x60)
		return false;
	if (op >= 0xa0 && op <= 0xa3) {
		if (one_in(g, 4))
			put(it, one_in(g, 2) ? 0x64 : 0x65);
		if (one_in(g, 6))
			put(it, 0x66);
		bool seg = it->len && it->bytes[0] != 0x66;
		put(it, op);
		put32(it, seg ? below(g, 0x800) : (uint32_t)asm_base[g->start.base] + ASM_DATA + below(g, one_in(g, 8) ? 0x8000 : 0x2000));
		return true;
	}
	if (op == 0x60)
		return false;
	put(it, op);
	if (op == 0xd4 || op == 0xd5)
		put(it, one_in(g, 3) ? (uint8_t)rnd(g) : 10);
	return true;
}

static bool gen_bmi(struct asm_gen *g, struct asm_item *it)
{
	static const uint8_t v[] = { 0xf2, 0xf3, 0xf5, 0xf6, 0xf7 };

	switch (below(g, 8)) {
	case 0:
		return legacy(g, it, one_in(g, 3) ? 0x66 : 0, MAP_0F38, 0xf0 | (uint8_t)below(g, 2), 0); /* MOVBE */
	case 1:
		return legacy(g, it, 0xf2, MAP_0F38, 0xf0 | (uint8_t)below(g, 2), 0); /* CRC32 */
	case 2:
		return legacy(g, it, one_in(g, 2) ? 0x66 : 0xf3, MAP_0F38, 0xf6, 0); /* ADCX, ADOX */
	case 3:
		return vex(g, it, 3, MAP_0F3A, 0xf0, 0); /* RORX */
	default:
		return vex(g, it, below(g, 4), MAP_0F38, v[below(g, sizeof(v))], 0);
	}
}

static bool gen_fpu(struct asm_gen *g, struct asm_item *it)
{
	static const uint8_t prefixes[] = { 0, 0x66, 0x66, 0x66, 0xf2, 0xf3 };

	switch (below(g, 8)) {
	case 0:
	case 1:
	case 2:
		return legacy(g, it, prefixes[below(g, 6)], one_in(g, 3) ? (one_in(g, 2) ? MAP_0F38 : MAP_0F3A) : MAP_0F,
			      (uint8_t)below(g, 256), 1);
	case 3:
	case 4:
		return vex(g, it, below(g, 4), one_in(g, 2) ? MAP_0F : 1 + below(g, 3), (uint8_t)below(g, 256), 1);
	case 5: { /* moves: what compilers make most of */
		static const uint8_t moves[] = { 0x10, 0x11, 0x28, 0x29, 0x6e, 0x6f, 0x7e, 0x7f, 0xd6 };
		return legacy(g, it, prefixes[below(g, 6)], MAP_0F, moves[below(g, sizeof(moves))], 1);
	}
	default:
		return legacy(g, it, 0, MAP_1BYTE, (uint8_t)(0xd8 | below(g, 8)), 1);
	}
}

static void put_reg_op(struct asm_item *it, uint8_t opcode, unsigned reg)
{
	if (reg & 8)
		put(it, 0x41);
	put(it, (uint8_t)(opcode | (reg & 7)));
}

static void put_lea_label(struct asm_item *it, unsigned reg, int target)
{
	if (it->compat) { /* mov reg, label */
		put(it, (uint8_t)(0xb8 | reg));
		it->fix_off = it->len;
		it->fix_size = 4;
		it->fix_abs = true;
		put32(it, 0);
		it->fix_end = it->len;
		it->target = (int16_t)target;
		return;
	}
	put_rex(it, 0x48 | (reg & 8 ? 4 : 0));
	put(it, 0x8d);
	put(it, (uint8_t)(0x05 | (reg & 7) << 3));
	it->fix_off = it->len;
	it->fix_size = 4;
	put32(it, 0);
	it->fix_end = it->len;
	it->target = (int16_t)target;
}

static void put_mov_imm32(struct asm_item *it, unsigned reg, uint32_t v)
{
	put_reg_op(it, 0xb8, reg);
	put32(it, v);
}

/* lea reg, [pointer + disp32] */
static void put_lea_pointer(struct asm_gen *g, struct asm_item *it, unsigned reg, int32_t disp)
{
	unsigned base = pick_mask(g, g->pointers);

	put_rex(it, 0x48 | (reg & 8 ? 4 : 0) | (base & 8 ? 1 : 0));
	put(it, 0x8d);
	put(it, (uint8_t)(0x80 | (reg & 7) << 3 | (base & 7)));
	if ((base & 7) == 4)
		put(it, 0x24);
	put32(it, (uint32_t)disp);
}

static bool gen_stack(struct asm_gen *g, struct asm_item *it)
{
	unsigned reg = any_reg(g);
	struct operand a;

	switch (below(g, 16)) {
	case 0 ... 3:
		put_reg_op(it, 0x50, reg);
		return true;
	case 4 ... 6:
		put_reg_op(it, 0x58, one_in(g, 60) ? RSP : free_reg(g));
		return true;
	case 7:
		put(it, 0x68);
		put32(it, (uint32_t)rnd(g));
		return true;
	case 8:
		if (one_in(g, 8))
			put(it, 0x66);
		put(it, 0x6a);
		put(it, (uint8_t)rnd(g));
		return true;
	case 9: /* push or pop memory; 16 bits now and then */
		a = random_operand(g, false);
		if (!a.mem)
			return false;
		put_prefixes(g, it, &a);
		if (one_in(g, 12))
			put(it, 0x66);
		if (operand_rex(&a, 0))
			put(it, (uint8_t)(0x40 | operand_rex(&a, 0)));
		reg = one_in(g, 3);
		put(it, reg ? 0x8f : 0xff);
		put_operand(it, &a, reg ? 0 : 6);
		it->fix_end = it->len;
		return true;
	case 10: { /* add, sub rsp, imm8; and rsp, -16 */
		int8_t imm = (int8_t)(below(g, 8) * 8);
		put_rex(it, 0x48);
		put(it, 0x83);
		unsigned op = below(g, 5);
		put(it, op == 4 ? 0xe4 : op & 1 ? 0xc4 : 0xec);
		put(it, op == 4 ? 0xf0 : (uint8_t)imm);
		return true;
	}
	case 11: /* lea rsp, [rsp + disp8] */
		put_rex(it, 0x48), put(it, 0x8d), put(it, 0x64), put(it, 0x24);
		put(it, (uint8_t)((below(g, 16) - 8) * 8));
		return true;
	case 12: /* push rbp; mov rbp, rsp; sub rsp, imm8; mov [rbp - 8], reg; leave; pop rbp */
		if (g->counter == RBP || g->pointers >> RBP & 1 || g->indexes >> RBP & 1)
			return false;
		put(it, 0x55);
		put_rex(it, 0x48), put(it, 0x89), put(it, 0xe5);
		put_rex(it, 0x48), put(it, 0x83), put(it, 0xec), put(it, 0x20);
		put_rex(it, 0x48 | (reg & 8 ? 4 : 0)), put(it, 0x89), put(it, (uint8_t)(0x45 | (reg & 7) << 3)), put(it, 0xf8);
		put(it, 0xc9);
		return true;
	case 13: /* enter imm16, level; leave */
		if (g->counter == RBP || g->pointers >> RBP & 1 || g->indexes >> RBP & 1)
			return false;
		put(it, 0xc8), put(it, (uint8_t)(below(g, 8) * 8)), put(it, 0), put(it, one_in(g, 3) ? (uint8_t)below(g, 4) : 0);
		if (!one_in(g, 4))
			put(it, 0xc9);
		return true;
	case 14: { /* pushfq; xor byte [rsp], status bits; popfq */
		put(it, 0x9c);
		put(it, 0x80), put(it, 0x34), put(it, 0x24), put(it, (uint8_t)rnd(g) & 0xd5);
		if (one_in(g, 2))
			put(it, 0x80), put(it, 0x74), put(it, 0x24), put(it, 1), put(it, 0x08); /* OF */
		put(it, 0x9d);
		return true;
	}
	default: /* pushfq; pop reg; and reg, status and DF */
		reg = free_reg(g);
		put(it, 0x9c);
		put_reg_op(it, 0x58, reg);
		put_rex(it, 0x48 | (reg & 8 ? 1 : 0)), put(it, 0x81), put(it, (uint8_t)(0xe0 | (reg & 7)));
		put32(it, FL_STATUS | FL_DF);
		return true;
	}
}

static bool gen_string(struct asm_gen *g, struct asm_item *it)
{
	static const uint8_t ops[] = { 0xa4, 0xa5, 0xa6, 0xa7, 0xaa, 0xab, 0xac, 0xad, 0xae, 0xaf, 0xa4, 0xa5, 0xaa, 0xab };
	uint16_t used = 1u << RSI | 1u << RDI | 1u << RCX;
	uint8_t op = ops[below(g, sizeof(ops))];
	bool down = one_in(g, 6), rep = !one_in(g, 4);

	if ((g->pointers | g->indexes | g->kept) & used)
		return false;
	put_lea_pointer(g, it, RSI, (int32_t)below(g, 0x400) - (one_in(g, 20) ? 0x1000 : 0));
	put_lea_pointer(g, it, RDI, (int32_t)below(g, 0x400) + (one_in(g, 20) ? 0x800 : 0));
	put_mov_imm32(it, RCX, one_in(g, 8) ? below(g, 3) : below(g, one_in(g, 6) ? 0x400 : 0x40));
	if (down)
		put(it, 0xfd);
	if (one_in(g, 30))
		put(it, one_in(g, 2) ? 0x64 : 0x65);
	if (one_in(g, 40) && g->start.base == 0)
		put(it, 0x67);
	if (one_in(g, 4))
		put(it, 0x66);
	if (rep)
		put(it, one_in(g, 3) ? 0xf2 : 0xf3);
	if (one_in(g, 2))
		put_rex(it, 0x48);
	put(it, op);
	if (down)
		put(it, 0xfc);
	return true;
}

static bool gen_div(struct asm_gen *g, struct asm_item *it)
{
	struct operand a = random_operand(g, false);
	bool w = one_in(g, 2), byte = one_in(g, 4);

	/* Make the dividend small, most of the time. */
	if (!one_in(g, 4)) {
		if (one_in(g, 2))
			put_rex(it, w ? 0x48 : 0x40), put(it, 0x99); /* cdq, cqo */
		else if (!((g->pointers | g->indexes | g->kept) >> RDX & 1))
			put(it, 0x31), put(it, 0xd2);
	}
	unsigned first = it->len;
	put_prefixes(g, it, &a);
	if (one_in(g, 6))
		put(it, 0x66);
	unsigned rex = operand_rex(&a, 0) | (w ? 8 : 0);
	if (rex)
		put_rex(it, 0x40 | rex);
	put(it, byte ? 0xf6 : 0xf7);
	put_operand(it, &a, 6 | below(g, 2));
	return accept(g, it, first, 0);
}

/* A store into the immediate of an instruction further on. */
static bool gen_smc(struct asm_gen *g, struct asm_item *it)
{
	unsigned reg = free_reg(g);

	/* mov dword [rip + x], imm32; nops; mov reg, imm32 <- x; in 32-bit code the address is absolute */
	put(it, 0xc7), put(it, 0x05), put32(it, 0), put32(it, (uint32_t)rnd(g));
	unsigned end = it->len;
	for (unsigned k = below(g, 4); k; k--)
		put(it, 0x90);
	put_mov_imm32(it, reg, (uint32_t)rnd(g));
	uint32_t rel = it->len - 4u - end;
	memcpy(it->bytes + 2, &rel, 4);
	if (it->compat) {
		it->fix_abs = true;
		it->fix_size = 4;
		it->fix_off = 2;
		it->fix_add = (int8_t)(it->len - 4);
		it->target = (int16_t)(g->n - 1);
	}
	return true;
}

/* User-level, but with a life of their own in the translator: SYSCALL (to a SYSRET), CPUID, FS and GS bases. */
static bool gen_helped(struct asm_gen *g, struct asm_item *it)
{
	uint16_t taken = g->pointers | g->indexes | g->kept;
	unsigned reg = free_reg(g);

	switch (g->start.compat ? 1 : below(g, 5)) {
	case 0:
		if (!g->start.user || taken & (1u << RCX | 1u << R11))
			return false;
		it->alien = true;
		put(it, 0x0f), put(it, 0x05);
		return true;
	case 1: {
		static const uint32_t leaf[] = { 0, 1, 7, 0xd, 0x80000000, 0x80000001, 0x80000008, 0x40000000 };
		if (taken & (1u << RAX | 1u << RBX | 1u << RCX | 1u << RDX))
			return false;
		it->alien = true;
		put_mov_imm32(it, RAX, leaf[below(g, 8)]);
		put_mov_imm32(it, RCX, below(g, 3));
		put(it, 0x0f), put(it, 0xa2);
		return true;
	}
	case 2: /* rdfsbase, rdgsbase */
		put(it, 0xf3), put(it, (uint8_t)((one_in(g, 3) ? 0x40 : 0x48) | (reg & 8 ? 1 : 0))), put(it, 0x0f), put(it, 0xae);
		put(it, (uint8_t)(0xc0 | below(g, 2) << 3 | (reg & 7)));
		return true;
	default: /* lea reg, [pointer + disp]; wrfsbase or wrgsbase reg */
		put_lea_pointer(g, it, reg, (int32_t)below(g, 0x200));
		put(it, 0xf3), put_rex(it, 0x48 | (reg & 8 ? 1 : 0)), put(it, 0x0f), put(it, 0xae);
		put(it, (uint8_t)(0xd0 | below(g, 2) << 3 | (reg & 7)));
		return true;
	}
}

static bool gen_kernel(struct asm_gen *g, struct asm_item *it)
{
	static const uint8_t swapgs[] = { 0x0f, 0x01, 0xf8 };
	unsigned reg = free_reg(g);

	it->kernel = it->alien = true;
	if (g->start.smap && one_in(g, 2)) {
		unsigned how = below(g, 8);
		if (how)
			put(it, 0x0f), put(it, 0x01), put(it, how < 5 ? 0xcb : 0xca); /* STAC, CLAC */
		else /* pushfq; xor byte [rsp + 2], AC; popfq */
			put(it, 0x9c), put(it, 0x80), put(it, 0x74), put(it, 0x24), put(it, 2), put(it, 4), put(it, 0x9d);
		return true;
	}
	switch (below(g, 10)) {
	case 9: /* pushfq; xor byte [rsp + 1], IF or DF or IOPL; popfq; cld */
		put(it, 0x9c);
		put(it, 0x80), put(it, 0x74), put(it, 0x24), put(it, 1), put(it, (uint8_t)rnd(g) & 0x36);
		put(it, 0x9d), put(it, 0xfc);
		break;
	case 0:
		put(it, 0xfa);
		break;
	case 1:
		put(it, 0xfb);
		break;
	case 2: /* swapgs; mov reg, gs:[disp]; swapgs */
		putn(it, swapgs, 3);
		if (!one_in(g, 3)) {
			put(it, 0x65), put_rex(it, 0x48 | (reg & 8 ? 4 : 0)), put(it, 0x8b), put(it, (uint8_t)(0x04 | (reg & 7) << 3));
			put(it, 0x25), put32(it, below(g, 64) * 8);
		}
		putn(it, swapgs, 3);
		break;
	case 3: /* pushfq; pop reg */
		put(it, 0x9c);
		put_reg_op(it, 0x58, reg);
		break;
	case 4: /* mov reg, cr3; mov cr3, reg */
		put(it, 0x40 | (reg & 8 ? 1 : 0)), put(it, 0x0f), put(it, 0x20), put(it, (uint8_t)(0xd8 | (reg & 7)));
		put(it, 0x40 | (reg & 8 ? 1 : 0)), put(it, 0x0f), put(it, 0x22), put(it, (uint8_t)(0xd8 | (reg & 7)));
		break;
	case 5: { /* invlpg [pointer] */
		unsigned p = pick_mask(g, g->pointers & 0xefef);
		if ((p & 7) == 5 || (p & 7) == 4)
			return false;
		if (p & 8)
			put(it, 0x41);
		put(it, 0x0f), put(it, 0x01), put(it, (uint8_t)(0x38 | (p & 7)));
		break;
	}
	case 6: { /* mov reg, ss; push reg; mov reg, rsp; ...: an IRET to the next instruction */
		/* push ss (as mov), push rsp+8, pushfq, push cs, push label; iretq */
		put(it, 0x40 | (reg & 8 ? 1 : 0)), put(it, 0x8c), put(it, (uint8_t)(0xd0 | (reg & 7)));
		put_reg_op(it, 0x50, reg);
		put(it, 0x48 | (reg & 8 ? 4 : 0)), put(it, 0x8d), put(it, (uint8_t)(0x44 | (reg & 7) << 3)), put(it, 0x24), put(it, 8);
		put_reg_op(it, 0x50, reg);
		put(it, 0x9c);
		put(it, 0x40 | (reg & 8 ? 1 : 0)), put(it, 0x8c), put(it, (uint8_t)(0xc8 | (reg & 7)));
		put_reg_op(it, 0x50, reg);
		put_rex(it, 0x48 | (reg & 8 ? 4 : 0)), put(it, 0x8d), put(it, (uint8_t)(0x05 | (reg & 7) << 3));
		put32(it, reg & 8 ? 4 : 3); /* past push reg; iretq */
		put_reg_op(it, 0x50, reg);
		put_rex(it, 0x48), put(it, 0xcf);
		break;
	}
	case 7: /* clts; mov reg, cr0; and the like are the stepper's */
		put(it, 0x0f), put(it, 0x06);
		break;
	default:
		put(it, 0x0f), put(it, 0x20), put(it, (uint8_t)(0xc0 | (reg & 7)));
		if (reg & 8)
			return false;
		break;
	}
	return true;
}

/* Condition codes: those that read AF do not exist; anything goes that is defined. */
static bool gen_branch(struct asm_gen *g, struct asm_item *it, unsigned self, unsigned main_end)
{
	unsigned reg = free_reg(g);
	/* Forward by up to 8 items; the count of items behind is not known yet: cut later. */
	int target = (int)(self + 1 + below(g, 6));

	switch (below(g, 16)) {
	case 0 ... 6:
		it->flow = FLOW_COND;
		if (one_in(g, 2)) {
			put(it, (uint8_t)(0x70 | below(g, 16)));
			put(it, 0);
			it->fix_size = 1;
		} else {
			put(it, 0x0f), put(it, (uint8_t)(0x80 | below(g, 16))), put32(it, 0);
			it->fix_size = 4;
		}
		break;
	case 7:
		it->flow = FLOW_JUMP;
		put(it, 0xe9), put32(it, 0);
		it->fix_size = 4;
		break;
	case 8: /* jrcxz, jecxz */
		it->flow = FLOW_COND;
		if (one_in(g, 6))
			put(it, 0x67);
		put(it, 0xe3), put(it, 0);
		it->fix_size = 1;
		break;
	case 9: /* lea reg, label; jmp reg (or push reg; ret) */
		it->flow = FLOW_JUMP;
		put_lea_label(it, reg, target);
		if (one_in(g, 3)) {
			put_reg_op(it, 0x50, reg);
			put(it, 0xc3);
		} else {
			if (reg & 8)
				put(it, 0x41);
			put(it, 0xff), put(it, (uint8_t)(0xe0 | (reg & 7)));
		}
		return true;
	case 10: /* lea reg, label; mov [rsp - 64], reg; jmp [rsp - 64] */
		it->flow = FLOW_JUMP;
		put_lea_label(it, reg, target);
		put_rex(it, 0x48 | (reg & 8 ? 4 : 0)), put(it, 0x89), put(it, (uint8_t)(0x44 | (reg & 7) << 3)), put(it, 0x24), put(it, 0xc0);
		put(it, 0xff), put(it, 0x64), put(it, 0x24), put(it, 0xc0);
		return true;
	case 11 ... 12: /* back, while the counter lasts */
		it->flow = FLOW_COND;
		target = (int)(self - below(g, self < 8 ? self + 1 : 8));
		if (g->counter == RCX && one_in(g, 2)) {
			/* jrcxz +2; loop back */
			put(it, 0xe3), put(it, 2), put(it, one_in(g, 4) ? 0xe0 | (uint8_t)below(g, 2) : 0xe2), put(it, 0);
			it->fix_size = 1;
		} else {
			/* sub counter, 1; jg back */
			put_rex(it, 0x48 | (g->counter & 8 ? 1 : 0)), put(it, 0x83), put(it, (uint8_t)(0xe8 | (g->counter & 7))), put(it, 1);
			put(it, 0x0f), put(it, 0x8f), put32(it, 0);
			it->fix_size = 4;
		}
		break;
	default: /* calls: placed for real when functions exist */
		it->flow = FLOW_CALL;
		target = (int)main_end;
		switch (below(g, 3)) {
		case 0:
			put_lea_label(it, reg, target);
			if (reg & 8)
				put(it, 0x41);
			put(it, 0xff), put(it, (uint8_t)(0xd0 | (reg & 7)));
			return true;
		case 1:
			put_lea_label(it, reg, target);
			put_rex(it, 0x48 | (reg & 8 ? 4 : 0)), put(it, 0x89), put(it, (uint8_t)(0x44 | (reg & 7) << 3)), put(it, 0x24), put(it, 0xb0);
			put(it, 0xff), put(it, 0x54), put(it, 0x24), put(it, 0xb0);
			return true;
		default:
			put(it, 0xe8), put32(it, 0);
			it->fix_size = 4;
			break;
		}
		break;
	}
	it->fix_off = it->len - it->fix_size;
	it->fix_end = it->len;
	it->target = (int16_t)target;
	return true;
}

/* --- programs --- */

static void random_item(struct asm_gen *g, unsigned features, bool function)
{
	for (;;) {
		unsigned self = g->n, kind = below(g, 32);
		struct asm_item *it = item_new(g);
		bool ok;
		if (g->start.compat && one_in(g, 8))
			ok = gen_32(g, it);
		else if (kind < 12)
			ok = gen_int(g, it);
		else if (kind < 14)
			ok = gen_bmi(g, it);
		else if (kind < 18)
			ok = gen_stack(g, it);
		else if (kind < 19)
			ok = gen_string(g, it);
		else if (kind < 20)
			ok = one_in(g, 3) && gen_div(g, it);
		else if (kind < 21)
			ok = one_in(g, 3) && gen_smc(g, it);
		else if (kind < 25)
			ok = !function && gen_branch(g, it, self, ASM_ITEMS);
		else if (kind < 27)
			ok = features & ASM_GEN_KERNEL ? gen_kernel(g, it) : one_in(g, 3) && gen_helped(g, it);
		else
			ok = features & ASM_GEN_FPU && gen_fpu(g, it);
		/* A function's body must find its return address again, most of the time. */
		if (ok && function && kind >= 14 && kind < 18 && !one_in(g, 8))
			ok = false;
		if (ok)
			return;
		g->n--;
	}
}

static void simple_item(struct asm_gen *g, const char *bytes, unsigned n, unsigned flow)
{
	struct asm_item *it = item_new(g);

	putn(it, bytes, n);
	it->flow = (uint8_t)flow;
}

static void item_insert(struct asm_gen *g, unsigned i, const char *bytes, unsigned n)
{
	memmove(&g->item[i + 1], &g->item[i], (g->n - i) * sizeof(g->item[0]));
	g->n++;
	for (unsigned k = 0; k < g->n; k++)
		if (k != i && g->item[k].target > (int)i)
			g->item[k].target++;
	if (g->functions >= i)
		g->functions++;
	struct asm_item *it = &g->item[i];
	memset(it, 0, sizeof(*it));
	it->target = -1;
	it->compat = g->start.compat;
	putn(it, bytes, n);
}

/* 32-bit registers; the upper halves are not for 32-bit code to see, and processors may lose them: only between our own engines. */
static void random_state_compat(struct asm_gen *g)
{
	bool upper = one_in(g, 4);

	for (unsigned r = 0; r < 8; r++)
		g->start.s.gpr[r] = (uint32_t)g->start.s.gpr[r] | (upper ? rnd(g) << 32 : 0);
	g->start.upper = upper;
}

static void random_state(struct asm_gen *g, unsigned features)
{
	struct asm_program *p = &g->start;
	struct x86_state *s = &p->s;
	uint64_t base = asm_base[p->base];

	for (unsigned r = 0; r < 16; r++) {
		uint64_t v = rnd(g);
		switch (below(g, 6)) {
		case 0:
			v &= 0xff;
			break;
		case 1:
			v = (uint64_t)(int64_t)(int32_t)v;
			break;
		case 2:
			v = (1ull << (v & 63)) - (v >> 63);
			break;
		default:
			break;
		}
		if (g->pointers >> r & 1) {
			v = base + ASM_DATA + 0x400 + (below(g, 0x1800) & (one_in(g, 4) ? ~0u : ~63u));
			unsigned odd = below(g, features & ASM_GEN_WILD ? 12 : 60);
			if (odd == 0)
				v = rnd(g);
			else if (odd == 1)
				v = base + ASM_DATA + interesting_edges[below(g, 5)] - below(g, 600) + 64;
			else if (odd == 2)
				v = base + ASM_DATA + 0x1000 - below(g, 128);
			else if (odd == 3)
				v = below(g, 2) ? 0x7ffffffffff0 + below(g, 32) : 0;
			else if (odd < 8)
				v = base + ASM_DATA + 0x4000 + below(g, 0x3000);
		} else if (g->indexes >> r & 1) {
			v = below(g, 64);
			if (one_in(g, 20))
				v = (uint64_t)-(int64_t)v;
		}
		s->gpr[r] = v;
	}
	if (p->compat)
		random_state_compat(g);
	s->gpr[g->counter] = below(g, 12) + 1;
	s->gpr[RSP] = base + ASM_STACK + 0x2000 + below(g, 0x200) * 8;
	if (one_in(g, 6))
		s->gpr[RSP] = base + ASM_STACK + 0x1000 * (1 + below(g, 4)) - below(g, 16) * 8; /* next to a page's end */
	if (one_in(g, 30))
		s->gpr[RSP] += below(g, 8);
	s->rflags = FL_FIXED | FL_IF | (rnd(g) & FL_STATUS);
	s->seg[SREG_FS].base = base + ASM_DATA + 0x1000 + below(g, 128) * 8;
	s->seg[SREG_GS].base = base + ASM_DATA + 0x4000 + below(g, 256) * 8;
	/* FPU: all the components explicit. */
	uint8_t *x = s->xsave;
	uint8_t noise[ASM_WINDOW];
	asm_fill(noise, rnd(g) | 1);
	memset(x, 0, sizeof(s->xsave));
	memcpy(x + 160, noise, 256);
	memcpy(x + 576, noise + 256, 256);
	uint16_t fcw = (uint16_t)(0x7f | below(g, 16) << 8);
	uint32_t mxcsr = 0x1f80 | (one_in(g, 3) ? below(g, 4) << 13 : 0) | (one_in(g, 8) ? 0x8040 : 0);
	if (one_in(g, 16)) { /* some exceptions unmasked */
		mxcsr &= ~(uint32_t)(below(g, 64) << 7);
		fcw &= (uint16_t)~below(g, 64);
	}
	memcpy(x, &fcw, 2);
	x[3] = (uint8_t)(below(g, 8) << 3); /* TOP */
	x[4] = one_in(g, 2) ? 0 : (uint8_t)rnd(g);
	memcpy(x + 24, &mxcsr, 4);
	for (unsigned i = 0; i < 8; i++) {
		long double v = (long double)(int64_t)(rnd(g) >> below(g, 60)) / (long double)(1 + below(g, 99));
		memcpy(x + 32 + i * 16, &v, 10);
		if (one_in(g, 12))
			x[32 + i * 16 + 9] |= 0x7f, x[32 + i * 16 + 8] = 0xff; /* NaN or infinity, or not valid at all */
	}
	uint64_t bv = XCR0_SUPPORTED;
	memcpy(x + 512, &bv, 8);
}

void asm_gen_program(struct asm_gen *g, uint64_t seed, unsigned size, unsigned features)
{
	for (;; seed = seed * 0x5851f42d4c957f2dull + 1) {
		memset(g, 0, sizeof(*g));
		g->rng = (seed + 1) * 0x9e3779b97f4a7c15ull | 1;
		for (int i = 0; i < 4; i++)
			rnd(g);
		/* Registers: three or four pointers, two indexes, one counter; the rest is free. */
		bool compat = g->start.compat = features & ASM_GEN_COMPAT;
		g->kept = 1u << RSP;
		while (__builtin_popcount(g->pointers) < (compat ? 2 : 4))
			g->pointers |= (uint16_t)(1u << any_reg(g)) & ~g->kept;
		while (__builtin_popcount(g->indexes) < (compat ? 1 : 2))
			g->indexes |= (uint16_t)(1u << any_reg(g)) & (uint16_t)~(g->kept | g->pointers);
		uint16_t taken = g->pointers | g->indexes | g->kept;
		g->counter = one_in(g, 3) && !(taken >> RCX & 1) ? RCX : (uint8_t)pick_mask(g, (uint16_t)(~taken & (compat ? 0xff : 0xffff)));
		g->kept |= (uint16_t)(1u << g->counter);
		struct asm_program *p = &g->start;
		p->user = !(features & ASM_GEN_KERNEL) && !one_in(g, 3);
		p->base = p->user || one_in(g, 3) ? below(g, 2) : below(g, ASM_BASES_GENERATED);
		if (compat) {
			p->user = true;
			p->base = 0;
		}
		p->clean = one_in(g, 8);
		p->smap = features & ASM_GEN_KERNEL && one_in(g, 2);
		p->fill = rnd(g) | 1;
		/* Anywhere in the code pages; sometimes so that it goes over a page's end. */
		p->start = below(g, 14) * 4096 + (one_in(g, 4) ? 4096 - below(g, 200) : below(g, 4096));
		random_state(g, features);
		if (p->smap && one_in(g, 2))
			p->s.rflags |= FL_AC;

		while (g->n < size)
			random_item(g, features, false);
		/* The end, then functions. */
		simple_item(g, "\xf4", 1, FLOW_END);
		g->functions = g->n;
		unsigned nfunctions = 1 + below(g, 2), entry[2];
		for (unsigned f = 0; f < nfunctions; f++) {
			entry[f] = g->n;
			for (unsigned k = below(g, 5); k; k--)
				random_item(g, features, true);
			if (one_in(g, 8))
				simple_item(g, "\xc2\x08\x00", 3, FLOW_RET);
			else
				simple_item(g, "\xc3", 1, FLOW_RET);
		}
		for (unsigned i = 0; i < g->functions; i++) {
			struct asm_item *it = &g->item[i];
			if (it->flow == FLOW_CALL)
				it->target = (int16_t)entry[below(g, nfunctions)];
			else if (it->target >= (int)g->functions)
				it->target = (int16_t)(g->functions - 1);
		}
		/* Where an undefined flag would be read, define them all first. */
		for (unsigned tries = 0; tries < 24 && g->n < ASM_ITEMS - 1; tries++) {
			uint16_t before[ASM_ITEMS + 1];
			if (flow_undefined(g, before))
				break;
			for (unsigned i = 0; i < g->n; i++) {
				bool bad = false;
				item_undefined(&g->item[i], before[i], ASM_ITEM_BYTES, &bad);
				if (bad) {
					item_insert(g, i, g->start.compat ? "\x39\xe5" : "\x48\x39\xe5", g->start.compat ? 2 : 3); /* cmp rbp, rsp */
					break;
				}
			}
		}
		if (asm_gen_valid(g))
			return;
	}
}

void asm_gen_print(const struct asm_gen *g, int fd)
{
	static const char *const names[16] = { "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
					       "r8",  "r9",  "r10", "r11", "r12", "r13", "r14", "r15" };
	struct asm_program p;
	uint32_t at[ASM_ITEMS + 1];

	dprintf(fd, "base %#llx, CPL %d%s%s%s\n", (unsigned long long)asm_base[g->start.base], g->start.user ? 3 : 0, g->start.compat ? ", 32-bit" : "",
		g->start.clean ? ", clean page tables" : "", g->start.smap ? ", SMAP" : "");
	for (unsigned r = 0; r < 16; r++)
		dprintf(fd, "%-4s%016llx%s", names[r], (unsigned long long)g->start.s.gpr[r], r % 4 == 3 ? "\n" : "  ");
	dprintf(fd, "flags %llx fs %llx gs %llx\n", (unsigned long long)g->start.s.rflags, (unsigned long long)g->start.s.seg[SREG_FS].base,
		(unsigned long long)g->start.s.seg[SREG_GS].base);
	if (!asm_gen_assemble(g, &p)) {
		dprintf(fd, "(not valid)\n");
		return;
	}
	item_offsets(g, at);
	ZydisFormatter f;
	ZydisDecoder d;
	ZydisFormatterInit(&f, ZYDIS_FORMATTER_STYLE_INTEL);
	decoder_init(&d, g->start.compat);
	for (unsigned i = 0; i < g->n; i++)
		for (uint32_t a = at[i]; a < at[i + 1];) {
			ZydisDecodedInstruction in;
			ZydisDecodedOperand op[ZYDIS_MAX_OPERAND_COUNT];
			char text[128] = "?";
			const uint8_t *code = p.code + (a - p.start);
			if (!ZYAN_SUCCESS(ZydisDecoderDecodeFull(&d, code, at[i + 1] - a, &in, op)))
				in.length = 1;
			else
				ZydisFormatterFormatInstruction(&f, &in, op, in.operand_count_visible, text, sizeof(text), asm_base[p.base] + a,
								NULL);
			dprintf(fd, "%3u %05x  ", i, a);
			for (unsigned k = 0; k < 15; k++)
				dprintf(fd, k < in.length ? "%02x" : "  ", code[k]);
			dprintf(fd, " %s\n", text);
			a += in.length;
		}
}
