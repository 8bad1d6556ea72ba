/*
 * Where accesses are checked.
 *
 * Accesses off RSP go through the stack window: one check for all of them while RSP changes by constants only. Other accesses with the
 * same registers in their address, unmodified in between, are merged into a group with one check. A check clobbers the status flags, so it is
 * placed at a point where they are dead: at the first access, or earlier as far as its registers are the same ("hoisting"); only where
 * there is none are the flags saved around it.
 *
 * A merged check that fails leads to the unmerged block at that point (MODE_NOMERGE): it never raises a fault itself, so it may look at more
 * than the guest will touch. Still a group is not hoisted over a branch, nor made a write check by a store behind a branch:
 * what runs rarely must not make what runs often fail.
 */
#include "accel/dbt/block.h"

/* Constant change of RSP by this instruction; false if it is not a constant. */
static bool rsp_change(const struct block_insn *g, int64_t *delta)
{
	const struct x86_insn *in = &g->in;
	unsigned word = insn_word(g);
	*delta = 0;
	switch (g->cls) {
	case CLS_PUSH:
	case CLS_PUSH_MEM:
	case CLS_PUSHF:
		*delta = -(int64_t)word;
		return true;
	case CLS_POP:
	case CLS_POPF:
		*delta = word;
		return opcode_gpr(&g->in) != RSP || g->cls == CLS_POPF;
	case CLS_LEAVE:
		return false;
	default:
		break;
	}
	if (!(in->gpr_written & 1u << RSP))
		return true;
	if (g->cls == CLS_PLAIN && in->map == MAP_1BYTE && (in->opcode == 0x81 || in->opcode == 0x83) && in->mod == 3 &&
	    in->rm == RSP && in->opsize == word && ((in->reg & 7) == 0 || (in->reg & 7) == 5)) {
		*delta = (in->reg & 7) == 0 ? in->imm : -in->imm;
		return true;
	}
	if (g->cls == CLS_LEA && in->opsize == word && in->reg == RSP && g->ea.base == RSP && g->ea.index < 0) {
		*delta = g->ea.disp;
		return true;
	}
	return false;
}

/* The access off RSP that goes through the stack window. */
static bool stack_access(const struct block_insn *g, int64_t *off, unsigned *len, bool *write)
{
	*len = insn_word(g);
	*write = true;
	switch (g->cls) {
	case CLS_PUSH:
	case CLS_PUSH_MEM:
	case CLS_PUSHF:
	case CLS_CALL:
	case CLS_CALL_IND:
		*off = -(int64_t)*len;
		return true;
	case CLS_POP:
	case CLS_RET:
		*off = 0;
		*write = false;
		return true;
	case CLS_PLAIN:
		if (!g->in.has_mem || g->ea.base != RSP || g->ea.index >= 0 || g->ea.seg != SREG_DS)
			return false;
		*off = g->ea.disp;
		*len = g->in.mem_size;
		return g->ea.disp > -GROUP_SPAN && g->ea.disp < GROUP_SPAN;
	default:
		return false;
	}
}

/* An access by address registers (or a constant address) that can be in a group. */
static bool general_access(const struct block_insn *g)
{
	return g->cls == CLS_PLAIN && g->in.has_mem && g->acc == ACC_NONE;
}

static uint16_t address_regs(const struct block_insn *g)
{
	return (uint16_t)((g->ea.base >= 0 ? 1u << g->ea.base : 0) | (g->ea.index >= 0 ? 1u << g->ea.index : 0));
}

static bool same_address(const struct block_insn *a, const struct block_insn *b)
{
	return a->ea.base == b->ea.base && a->ea.index == b->ea.index && a->ea.seg == b->ea.seg && a->ea.rip == b->ea.rip &&
	       (a->ea.index < 0 || a->ea.scale == b->ea.scale);
}

/* Does instruction g change the value of an address with these registers and segment? */
static bool changes(const struct block_insn *g, uint16_t regs, uint8_t seg)
{
	return (g->in.gpr_written & regs) || ((seg == SREG_GS || seg == SREG_FS) && (g->cls == CLS_SWAPGS || g->cls == CLS_WRITE_BASE));
}

static void add_check(struct block *b, struct check c)
{
	c.save_flags = b->insn[c.at].live_in != 0;
	b->check[b->nchecks++] = c;
}

/* One stack epoch: instructions [first, end), in which RSP (or for a LEAVE at `first`: RBP) moves by constants. */
static void plan_epoch(struct block *b, unsigned first, unsigned end, bool from_leave)
{
	int64_t delta[BLOCK_MAX + 1];
	delta[first] = 0;
	for (unsigned i = first; i < end; i++) {
		int64_t d;
		if (i == first && from_leave)
			d = insn_word(&b->insn[i]); /* origin is RBP: RSP becomes that plus a word */
		else
			rsp_change(&b->insn[i], &d);
		delta[i + 1] = delta[i] + d;
	}
	unsigned barrier = first; /* checks may not go before this */
	for (unsigned i = first; i < end;) {
		struct block_insn *g = &b->insn[i];
		int64_t off;
		unsigned len;
		bool write, writes;
		if (i == first && from_leave) {
			off = 0;
			len = insn_word(g);
			writes = false;
		} else if (!stack_access(g, &off, &len, &writes)) {
			i++;
			continue;
		}
		/* Everything from here that fits the span. */
		int64_t lo = off + delta[i], hi = lo + len;
		unsigned last = i;
		g->acc = ACC_STACK;
		for (unsigned j = i + 1; j < end; j++) {
			if (!stack_access(&b->insn[j], &off, &len, &write))
				continue;
			int64_t l = off + delta[j], h = l + len;
			l = l < lo ? l : lo;
			h = h > hi ? h : hi;
			if (h - l > GROUP_SPAN)
				break;
			lo = l;
			hi = h;
			last = j;
			writes |= write;
			b->insn[j].acc = ACC_STACK;
		}
		unsigned at = i;
		/* Only as far as the address can be said from there: changes of RSP may add up to more than 32 bits. */
		for (unsigned k = i + 1; k-- > barrier && fits32(lo - delta[k]);)
			if (b->insn[k].live_in == 0) {
				at = k;
				break;
			}
		bool rbp = from_leave && at == first;
		add_check(b, (struct check){ .at = (uint16_t)at, .stack = true, .write = writes, .base = rbp ? H_RBP : GSP, .index = -1,
					     .lo = lo - (rbp ? 0 : delta[at]), .len = (unsigned)(hi - lo) });
		/* Go on with the first access that did not fit. */
		barrier = last + 1;
		i = last + 1;
	}
}

static void plan_stack(struct block *b)
{
	unsigned first = 0;
	bool from_leave = false;
	for (unsigned i = 0; i < b->n; i++) {
		int64_t d;
		bool leave = b->insn[i].cls == CLS_LEAVE;
		if (!leave && rsp_change(&b->insn[i], &d))
			continue;
		/* A LEAVE belongs to the epoch that it starts; another change of RSP to the one that it ends. */
		unsigned end = leave ? i : i + 1;
		if (end > first)
			plan_epoch(b, first, end, from_leave);
		first = end;
		from_leave = leave;
	}
	if (b->n > first)
		plan_epoch(b, first, b->n, from_leave);
}

static void plan_groups(struct block *b)
{
	for (unsigned i = 0; i < b->n; i++) {
		struct block_insn *g = &b->insn[i];
		if (!general_access(g) || g->grp_busy)
			continue;
		uint16_t regs = address_regs(g);
		int64_t lo = g->ea.disp, hi = lo + g->in.mem_size;
		bool write = g->in.mem_written, branch = false;
		unsigned members = 1, last = i;
		uint64_t member_mask = 1ull << i;
		bool constant = g->ea.base < 0 && g->ea.index < 0 && g->ea.seg == SREG_DS;
		if (constant && ((uint64_t)lo ^ (uint64_t)(hi - 1)) & PAGE_MASK)
			continue; /* a constant address is compared by its page alone: what crosses is checked by itself */
		for (unsigned j = i; j + 1 < b->n; j++) {
			struct block_insn *prev = &b->insn[j], *h = &b->insn[j + 1];
			if (changes(prev, regs, g->ea.seg) || h->cls == CLS_BITSTRING)
				break;
			branch |= prev->cls == CLS_JCC;
			if (!general_access(h) || !same_address(g, h))
				continue;
			int64_t l = h->ea.disp < lo ? h->ea.disp : lo;
			int64_t e = h->ea.disp + h->in.mem_size > hi ? h->ea.disp + h->in.mem_size : hi;
			if (e - l > GROUP_SPAN || (constant && ((uint64_t)l ^ (uint64_t)(e - 1)) & PAGE_MASK))
				continue;
			if (h->in.mem_written && !write && branch)
				continue;
			write |= h->in.mem_written;
			lo = l;
			hi = e;
			members++;
			member_mask |= 1ull << (j + 1);
			last = j + 1;
		}
		/* Where: flags dead, address the same, no branch in between, GRP free. */
		int at = -1;
		for (unsigned k = i;; k--) {
			if (b->insn[k].live_in == 0) {
				at = (int)k;
				break;
			}
			if (k == 0)
				break;
			const struct block_insn *p = &b->insn[k - 1];
			if (p->cls == CLS_JCC || p->grp_busy || p->cls == CLS_BITSTRING || changes(p, regs, g->ea.seg))
				break;
		}
		if (members == 1 && (at < 0 || at == (int)i))
			continue; /* a check of its own is as good */
		if (at < 0)
			at = (int)i;
		if (!fits32(lo) && !constant)
			continue;
		add_check(b, (struct check){ .at = (uint16_t)at, .write = write, .base = g->ea.base, .index = g->ea.index, .scale = g->ea.scale,
					     .seg = g->ea.seg, .rip = g->ea.rip, .lo = lo, .len = (unsigned)(hi - lo) });
		for (unsigned k = (unsigned)at; k <= last; k++) {
			b->insn[k].grp_busy = true;
			if (member_mask >> k & 1) {
				b->insn[k].acc = ACC_GROUP;
				b->insn[k].grp_off = (int32_t)(b->insn[k].ea.disp - lo);
			}
		}
	}
}

void dbt_plan(struct block *b)
{
	b->nchecks = 0;
	if (!(b->mode & MODE_NOMERGE)) {
		plan_stack(b);
		plan_groups(b);
	}
	for (unsigned i = 0; i < b->n; i++) {
		struct block_insn *g = &b->insn[i];
		if (g->acc == ACC_NONE && g->cls == CLS_PLAIN && g->in.has_mem)
			g->acc = ACC_SINGLE;
	}
}
