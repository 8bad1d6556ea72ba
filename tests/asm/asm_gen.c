#include "asm_gen.h"

#include <cpuid.h>
#include <stdio.h>
#include <string.h>

#include "asm_items.h"

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
		if (!asm_decode(it->compat, it->bytes + at, it->len - at, &in, &zi))
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

	asm_decoder_init(&decoder, compat);
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
			if (!asm_decode(it->compat, code[i] + at, it->len - at, &in, &zi))
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

	if (!asm_decode(g->start.compat, bytes, 15, &in, &zi) || !undefined_after(&in, &zi, 0))
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

/* --- programs --- */

static void simple_item(struct asm_gen *g, const char *bytes, unsigned n, unsigned flow)
{
	struct asm_item *it = asm_item_new(g);

	asm_putn(it, bytes, n);
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
	asm_putn(it, bytes, n);
}

/* 32-bit registers; the upper halves are not for 32-bit code to see, and processors may lose them: only between our own engines. */
static void random_state_compat(struct asm_gen *g)
{
	bool upper = asm_one_in(g, 4);

	for (unsigned r = 0; r < 8; r++)
		g->start.s.gpr[r] = (uint32_t)g->start.s.gpr[r] | (upper ? asm_rnd(g) << 32 : 0);
	g->start.upper = upper;
}

static void random_state(struct asm_gen *g, unsigned features)
{
	struct asm_program *p = &g->start;
	struct x86_state *s = &p->s;
	uint64_t base = asm_base[p->base];

	for (unsigned r = 0; r < 16; r++) {
		uint64_t v = asm_rnd(g);
		switch (asm_below(g, 6)) {
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
			v = base + ASM_DATA + 0x400 + (asm_below(g, 0x1800) & (asm_one_in(g, 4) ? ~0u : ~63u));
			unsigned odd = asm_below(g, features & ASM_GEN_WILD ? 12 : 60);
			if (odd == 0)
				v = asm_rnd(g);
			else if (odd == 1)
				v = base + ASM_DATA + asm_edges[asm_below(g, ASM_EDGES)] - asm_below(g, 600) + 64;
			else if (odd == 2)
				v = base + ASM_DATA + 0x1000 - asm_below(g, 128);
			else if (odd == 3)
				v = asm_below(g, 2) ? 0x7ffffffffff0 + asm_below(g, 32) : 0;
			else if (odd < 8)
				v = base + ASM_DATA + 0x4000 + asm_below(g, 0x3000);
		} else if (g->indexes >> r & 1) {
			v = asm_below(g, 64);
			if (asm_one_in(g, 20))
				v = (uint64_t)-(int64_t)v;
		}
		s->gpr[r] = v;
	}
	if (p->compat)
		random_state_compat(g);
	s->gpr[g->counter] = asm_below(g, 12) + 1;
	s->gpr[RSP] = base + ASM_STACK + 0x2000 + asm_below(g, 0x200) * 8;
	if (asm_one_in(g, 6))
		s->gpr[RSP] = base + ASM_STACK + 0x1000 * (1 + asm_below(g, 4)) - asm_below(g, 16) * 8; /* next to a page's end */
	if (asm_one_in(g, 30))
		s->gpr[RSP] += asm_below(g, 8);
	s->rflags = FL_FIXED | FL_IF | (asm_rnd(g) & FL_STATUS);
	s->seg[SREG_FS].base = base + ASM_DATA + 0x1000 + asm_below(g, 128) * 8;
	s->seg[SREG_GS].base = base + ASM_DATA + 0x4000 + asm_below(g, 256) * 8;
	/* FPU: all the components explicit. */
	uint8_t *x = s->xsave;
	uint8_t noise[ASM_WINDOW];
	asm_fill(noise, asm_rnd(g) | 1);
	memset(x, 0, sizeof(s->xsave));
	memcpy(x + 160, noise, 256);
	memcpy(x + 576, noise + 256, 256);
	uint16_t fcw = (uint16_t)(0x7f | asm_below(g, 16) << 8);
	uint32_t mxcsr = 0x1f80 | (asm_one_in(g, 3) ? asm_below(g, 4) << 13 : 0) | (asm_one_in(g, 8) ? 0x8040 : 0);
	if (asm_one_in(g, 16)) { /* some exceptions unmasked */
		mxcsr &= ~(uint32_t)(asm_below(g, 64) << 7);
		fcw &= (uint16_t)~asm_below(g, 64);
	}
	memcpy(x, &fcw, 2);
	x[3] = (uint8_t)(asm_below(g, 8) << 3); /* TOP */
	x[4] = asm_one_in(g, 2) ? 0 : (uint8_t)asm_rnd(g);
	memcpy(x + 24, &mxcsr, 4);
	for (unsigned i = 0; i < 8; i++) {
		long double v = (long double)(int64_t)(asm_rnd(g) >> asm_below(g, 60)) / (long double)(1 + asm_below(g, 99));
		memcpy(x + 32 + i * 16, &v, 10);
		if (asm_one_in(g, 12))
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
			asm_rnd(g);
		/* Registers: three or four pointers, two indexes, one counter; the rest is free. */
		bool compat = g->start.compat = features & ASM_GEN_COMPAT;
		g->kept = 1u << RSP;
		while (__builtin_popcount(g->pointers) < (compat ? 2 : 4))
			g->pointers |= (uint16_t)(1u << asm_any_reg(g)) & ~g->kept;
		while (__builtin_popcount(g->indexes) < (compat ? 1 : 2))
			g->indexes |= (uint16_t)(1u << asm_any_reg(g)) & (uint16_t)~(g->kept | g->pointers);
		uint16_t taken = g->pointers | g->indexes | g->kept;
		g->counter = asm_one_in(g, 3) && !(taken >> RCX & 1) ? RCX : (uint8_t)asm_pick(g, (uint16_t)(~taken & (compat ? 0xff : 0xffff)));
		g->kept |= (uint16_t)(1u << g->counter);
		struct asm_program *p = &g->start;
		p->user = !(features & ASM_GEN_KERNEL) && !asm_one_in(g, 3);
		p->base = p->user || asm_one_in(g, 3) ? asm_below(g, 2) : asm_below(g, ASM_BASES_GENERATED);
		if (compat) {
			p->user = true;
			p->base = 0;
		}
		p->clean = asm_one_in(g, 8);
		p->smap = features & ASM_GEN_KERNEL && asm_one_in(g, 2);
		p->fill = asm_rnd(g) | 1;
		/* Anywhere in the code pages; sometimes so that it goes over a page's end. */
		p->start = asm_below(g, 14) * 4096 + (asm_one_in(g, 4) ? 4096 - asm_below(g, 200) : asm_below(g, 4096));
		random_state(g, features);
		if (p->smap && asm_one_in(g, 2))
			p->s.rflags |= FL_AC;

		while (g->n < size)
			asm_random_item(g, features, false);
		/* The end, then functions. */
		simple_item(g, "\xf4", 1, FLOW_END);
		g->functions = g->n;
		unsigned nfunctions = 1 + asm_below(g, 2), entry[2];
		for (unsigned f = 0; f < nfunctions; f++) {
			entry[f] = g->n;
			for (unsigned k = asm_below(g, 5); k; k--)
				asm_random_item(g, features, true);
			if (asm_one_in(g, 8))
				simple_item(g, "\xc2\x08\x00", 3, FLOW_RET);
			else
				simple_item(g, "\xc3", 1, FLOW_RET);
		}
		for (unsigned i = 0; i < g->functions; i++) {
			struct asm_item *it = &g->item[i];
			if (it->flow == FLOW_CALL)
				it->target = (int16_t)entry[asm_below(g, nfunctions)];
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
	asm_decoder_init(&d, g->start.compat);
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
