/*
 * String instructions: MOVS, STOS, LODS, CMPS, SCAS, INS, OUTS, with and without REP.
 *
 * Page runs: as long as DF is clear, both sides are RAM and segment limits allow, a run of elements up to the end of the page is
 * done at once; otherwise element by element. Registers are exact after every element or run, so a fault in the middle
 * restarts where it happened (SDM 2B REP). After rep_limit elements the step ends with rip unchanged: an interrupt can come in.
 */
#include "cpu/x86/exec.h"

enum { PAGE = 4096, REP_LIMIT = 4096 };

/* One string instruction while it runs. */
struct string {
	const struct x86_insn *in;
	unsigned size;	   /* of an element */
	unsigned addrsize;
	bool down;	   /* DF */
	bool rep;
};

static struct string string_begin(const struct emu *e, const struct x86_insn *in)
{
	return (struct string){
		.in = in,
		.size = in->opsize,
		.addrsize = in->addrsize,
		.down = e->s->rflags & FL_DF,
		.rep = in->rep != 0,
	};
}

static uint64_t index_get(const struct emu *e, const struct string *t, unsigned reg)
{
	return e->s->gpr[reg] & size_mask(t->addrsize);
}

static void index_move(struct emu *e, const struct string *t, unsigned reg, uint64_t elements)
{
	uint64_t bytes = elements * t->size;

	gpr_set_addr(e->s, reg, t->addrsize, e->s->gpr[reg] + (t->down ? -bytes : bytes));
}

static void count_down(struct emu *e, const struct string *t, uint64_t elements)
{
	if (t->rep)
		gpr_set_addr(e->s, RCX, t->addrsize, e->s->gpr[RCX] - elements);
}

/* --- page runs --- */

struct run {
	uint8_t *hva;
	uint64_t gpa;
	uint64_t n; /* elements */
};

/* How many of `n` elements from seg:reg upwards lie in one page of RAM and are accessible; 0 if not even one can be done this
 * way. Never faults: the element by element path does that. */
static uint64_t page_run(struct emu *e, const struct string *t, enum x86_sreg seg, unsigned reg, bool write, uint64_t n,
			 struct run *out)
{
	uint64_t offset = index_get(e, t, reg), linear;
	struct emu_page page;
	uint32_t error;

	bool alignment_checks = e->s->cpl == 3 && (e->s->rflags & FL_AC) && (e->s->cr0 & CR0_AM);
	if (t->down || alignment_checks || e->debug.data)
		return 0;
	if (emu_linear(e, seg, offset, t->size, write, &linear))
		return 0;
	uint64_t fit = (PAGE - (linear & (PAGE - 1))) / t->size;
	if (n > fit)
		n = fit;
	if (n < 2) /* none at all where the first element crosses the page */
		return 0;
	/* Up to where the offset wraps. */
	uint64_t wrap = size_mask(t->addrsize) - offset;
	if (t->addrsize != 8 && n * t->size - 1 > wrap)
		n = (wrap + 1) / t->size;
	if (n < 2 || emu_linear(e, seg, offset, (unsigned)(n * t->size), write, &linear))
		return 0;
	if (e->ops->translate(e->opaque, linear, write ? MMU_WRITE : MMU_READ, emu_user(e), &page, &error) || !page.hva)
		return 0;
	out->hva = page.hva;
	out->gpa = page.gpa;
	out->n = n;
	return n;
}

static void run_written(struct emu *e, const struct string *t, const struct run *r, uint64_t n)
{
	if (e->ops->ram_written)
		e->ops->ram_written(e->opaque, r->gpa, (unsigned)(n * t->size));
}

static uint64_t element(const uint8_t *p, unsigned size)
{
	uint64_t v = 0;

	switch (size) {
	case 1:
		return *p;
	case 2:
		memcpy(&v, p, 2);
		return v;
	case 4:
		memcpy(&v, p, 4);
		return v;
	default:
		memcpy(&v, p, 8);
		return v;
	}
}

static void copy_run(uint8_t *dst, const uint8_t *src, uint64_t n, unsigned size)
{
	uint64_t bytes = n * size;

	/* A destination ahead of the source and overlapping it repeats a pattern: element by element. */
	if (dst > src && (uint64_t)(dst - src) < bytes) {
		for (uint64_t i = 0; i < n; i++) {
			uint64_t v = element(src + i * size, size);
			memcpy(dst + i * size, &v, size);
		}
		return;
	}
	memmove(dst, src, bytes);
}

static void fill_run(uint8_t *dst, uint64_t value, uint64_t n, unsigned size)
{
	if (size == 1 || value == 0) {
		memset(dst, (int)(value & 0xff), n * size);
		return;
	}
	for (uint64_t i = 0; i < n; i++)
		memcpy(dst + i * size, &value, size);
}

/* --- flags of a comparison --- */

/* a - b in `size` bytes. */
static void compare_flags(struct x86_state *s, uint64_t a, uint64_t b, unsigned size)
{
	uint64_t mask = size_mask(size), sign = 1ull << (size * 8 - 1), d = (a - b) & mask, f = 0;

	a &= mask;
	b &= mask;
	if (a < b)
		f |= FL_CF;
	if (d == 0)
		f |= FL_ZF;
	if (d & sign)
		f |= FL_SF;
	if ((a ^ b) & (a ^ d) & sign)
		f |= FL_OF;
	if ((a ^ b ^ d) & 0x10)
		f |= FL_AF;
	if (!__builtin_parity((unsigned)(d & 0xff)))
		f |= FL_PF;
	s->rflags = (s->rflags & ~(uint64_t)FL_STATUS) | f;
}

/* --- the operations: each does up to *n elements and sets *n to how many --- */

typedef int (*string_op)(struct emu *e, const struct string *t, uint64_t *n);

static int op_movs(struct emu *e, const struct string *t, uint64_t *n)
{
	struct run src, dst;
	uint64_t v = 0;

	if (*n > 1 && page_run(e, t, t->in->seg, RSI, false, *n, &src) && page_run(e, t, SREG_ES, RDI, true, src.n, &dst)) {
		*n = dst.n;
		copy_run(dst.hva, src.hva, dst.n, t->size);
		run_written(e, t, &dst, dst.n);
	} else {
		int r = emu_read(e, t->in->seg, index_get(e, t, RSI), &v, t->size);
		if (!r)
			r = emu_write(e, SREG_ES, index_get(e, t, RDI), &v, t->size);
		if (r)
			return r;
		*n = 1;
	}
	index_move(e, t, RSI, *n);
	index_move(e, t, RDI, *n);
	return 0;
}

static int op_stos(struct emu *e, const struct string *t, uint64_t *n)
{
	uint64_t v = e->s->gpr[RAX];
	struct run dst;

	if (*n > 1 && page_run(e, t, SREG_ES, RDI, true, *n, &dst)) {
		*n = dst.n;
		fill_run(dst.hva, v & size_mask(t->size), dst.n, t->size);
		run_written(e, t, &dst, dst.n);
	} else {
		int r = emu_write(e, SREG_ES, index_get(e, t, RDI), &v, t->size);
		if (r)
			return r;
		*n = 1;
	}
	index_move(e, t, RDI, *n);
	return 0;
}

static int op_lods(struct emu *e, const struct string *t, uint64_t *n)
{
	uint64_t v = 0;
	int r = emu_read(e, t->in->seg, index_get(e, t, RSI), &v, t->size);

	if (r)
		return r;
	*n = 1;
	gpr_set(e->s, RAX, t->size, false, v);
	index_move(e, t, RSI, 1);
	return 0;
}

/* Whether a repeated comparison ends after an element (REPE while equal, REPNE while different). */
static bool compare_ends(const struct string *t, uint64_t a, uint64_t b)
{
	return t->in->rep == 0xf3 ? a != b : a == b;
}

static int op_scas(struct emu *e, const struct string *t, uint64_t *n)
{
	uint64_t a = e->s->gpr[RAX] & size_mask(t->size), b = 0, done = 0;
	struct run src;

	if (*n > 1 && page_run(e, t, SREG_ES, RDI, false, *n, &src)) {
		do
			b = element(src.hva + done++ * t->size, t->size);
		while (done < src.n && !compare_ends(t, a, b));
	} else {
		int r = emu_read(e, SREG_ES, index_get(e, t, RDI), &b, t->size);
		if (r)
			return r;
		done = 1;
	}
	*n = done;
	index_move(e, t, RDI, done);
	compare_flags(e->s, a, b, t->size);
	return 0;
}

static int op_cmps(struct emu *e, const struct string *t, uint64_t *n)
{
	uint64_t a = 0, b = 0, done = 0;
	struct run left, right;

	if (*n > 1 && page_run(e, t, t->in->seg, RSI, false, *n, &left) &&
	    page_run(e, t, SREG_ES, RDI, false, left.n, &right)) {
		do {
			a = element(left.hva + done * t->size, t->size);
			b = element(right.hva + done * t->size, t->size);
			done++;
		} while (done < right.n && !compare_ends(t, a, b));
	} else {
		int r = emu_read(e, t->in->seg, index_get(e, t, RSI), &a, t->size);
		if (!r)
			r = emu_read(e, SREG_ES, index_get(e, t, RDI), &b, t->size);
		if (r)
			return r;
		done = 1;
	}
	*n = done;
	index_move(e, t, RSI, done);
	index_move(e, t, RDI, done);
	compare_flags(e->s, a, b, t->size);
	return 0;
}

/* Whether a store of `size` bytes would succeed, before a port is read that must not be read twice. */
static int probe_write(struct emu *e, uint64_t offset, unsigned size)
{
	uint64_t linear;
	struct emu_page page;
	uint32_t error;
	int r = emu_linear(e, SREG_ES, offset, size, true, &linear);

	for (unsigned i = 0; !r && i < size; i += size - 1 ? size - 1 : 1) {
		uint64_t a = linear + i;
		if (!x86_code64(e->s))
			a = (uint32_t)a;
		if (e->ops->translate(e->opaque, a, MMU_WRITE, emu_user(e), &page, &error))
			r = emu_raise_pf(e, a, error);
	}
	return r;
}

static int op_ins(struct emu *e, const struct string *t, uint64_t *n)
{
	uint16_t port = (uint16_t)e->s->gpr[RDX];
	uint32_t value = 0;
	int r = emu_io_allowed(e, port, t->size);

	if (!r)
		r = probe_write(e, index_get(e, t, RDI), t->size);
	if (r)
		return r;
	emu_touch_io(e, port, t->size);
	if (e->ops->pio(e->opaque, port, t->size, false, &value))
		e->stop = true;
	r = emu_write(e, SREG_ES, index_get(e, t, RDI), &value, t->size);
	if (r)
		return r;
	*n = 1;
	index_move(e, t, RDI, 1);
	return 0;
}

static int op_outs(struct emu *e, const struct string *t, uint64_t *n)
{
	uint16_t port = (uint16_t)e->s->gpr[RDX];
	uint32_t value = 0;
	int r = emu_io_allowed(e, port, t->size);

	if (!r)
		r = emu_read(e, t->in->seg, index_get(e, t, RSI), &value, t->size);
	if (r)
		return r;
	emu_touch_io(e, port, t->size);
	if (e->ops->pio(e->opaque, port, t->size, true, &value))
		e->stop = true;
	*n = 1;
	index_move(e, t, RSI, 1);
	return 0;
}

/* --- repetition --- */

static int repeat(struct emu *e, const struct string *t, string_op op, bool compares)
{
	struct x86_state *s = e->s;
	uint64_t budget = e->rep_limit ? e->rep_limit : REP_LIMIT;

	if (s->rflags & FL_TF) /* a trap after every iteration */
		budget = 1;
	for (;;) {
		uint64_t left = index_get(e, t, RCX), n = left < budget ? left : budget;
		if (!left)
			return RUN_NEXT;
		int r = op(e, t, &n);
		if (r)
			return r;
		count_down(e, t, n);
		budget -= n;
		if (left == n || (compares && !(s->rflags & FL_ZF) == (t->in->rep == 0xf3)))
			return RUN_NEXT;
		if (!budget || e->stop || e->debug.hit)
			return RUN_AGAIN;
	}
}

/* A repeated string with 32-bit addresses clears the upper halves of what it uses before it starts: also if the count is 0 or the
 * first element faults. No manual says so; Intel processors do it, with RSI and RDI for MOVS and STOS only. */
static void cut_registers(struct x86_state *s, const struct string *t, string_op op)
{
	if (!t->rep || t->addrsize != 4)
		return;
	s->gpr[RCX] = (uint32_t)s->gpr[RCX];
	if (op == op_movs)
		s->gpr[RSI] = (uint32_t)s->gpr[RSI];
	if (op == op_movs || op == op_stos)
		s->gpr[RDI] = (uint32_t)s->gpr[RDI];
}

static int run_string(struct emu *e, const struct exec_entry *x, string_op op, bool compares)
{
	struct string t = string_begin(e, &x->insn);
	cut_registers(e->s, &t, op);
	uint64_t one = 1, flags = e->s->rflags;
	int r = t.rep ? repeat(e, &t, op, compares) : op(e, &t, &one);

	/* A fault in the middle of a comparison: the flags are those before it (SDM 2B REP). */
	if (compares && r == EMU_FAULT)
		e->s->rflags = flags;
	return r;
}

static int run_movs(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	(void)next;
	return run_string(e, x, op_movs, false);
}

static int run_stos(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	(void)next;
	return run_string(e, x, op_stos, false);
}

static int run_lods(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	(void)next;
	return run_string(e, x, op_lods, false);
}

static int run_scas(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	(void)next;
	return run_string(e, x, op_scas, true);
}

static int run_cmps(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	(void)next;
	return run_string(e, x, op_cmps, true);
}

static int run_ins(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	(void)next;
	return run_string(e, x, op_ins, false);
}

static int run_outs(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	(void)next;
	return run_string(e, x, op_outs, false);
}

/* --- IN, OUT, XLAT --- */

static int run_in_out(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	const struct x86_insn *in = &x->insn;
	uint16_t port = in->opcode & 8 ? (uint16_t)e->s->gpr[RDX] : (uint8_t)in->imm;
	bool write = in->opcode & 2;
	uint32_t value = (uint32_t)(e->s->gpr[RAX] & size_mask(in->opsize));
	int r = emu_io_allowed(e, port, in->opsize);

	(void)next;
	if (r)
		return r;
	emu_touch_io(e, port, in->opsize);
	if (e->ops->pio(e->opaque, port, in->opsize, write, &value))
		e->stop = true;
	if (!write)
		gpr_set(e->s, RAX, in->opsize, false, value);
	return RUN_NEXT;
}

static int run_xlat(struct emu *e, const struct exec_entry *x, uint64_t next)
{
	uint64_t v = 0, a = e->s->gpr[RBX] + (uint8_t)e->s->gpr[RAX];
	int r = emu_read(e, x->insn.seg, a & size_mask(x->insn.addrsize), &v, 1);

	(void)next;
	if (!r)
		gpr_set(e->s, RAX, 1, false, v);
	return r;
}

exec_run string_handler(const struct x86_insn *in)
{
	if (in->encoding != ZYDIS_INSTRUCTION_ENCODING_LEGACY || in->map != MAP_1BYTE)
		return NULL;
	switch (in->opcode) {
	case 0x6c:
	case 0x6d:
		return run_ins;
	case 0x6e:
	case 0x6f:
		return run_outs;
	case 0xa4:
	case 0xa5:
		return run_movs;
	case 0xa6:
	case 0xa7:
		return run_cmps;
	case 0xaa:
	case 0xab:
		return run_stos;
	case 0xac:
	case 0xad:
		return run_lods;
	case 0xae:
	case 0xaf:
		return run_scas;
	case 0xe4:
	case 0xe5:
	case 0xe6:
	case 0xe7:
	case 0xec:
	case 0xed:
	case 0xee:
	case 0xef:
		return run_in_out;
	case 0xd7:
		return run_xlat;
	default:
		return NULL;
	}
}
