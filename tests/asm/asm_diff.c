#include "asm_diff.h"

#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/time.h>
#include <unistd.h>

#include "asm_native.h"
#include "asm_trace.h"
#include "cpu/x86/insn.h"

/* --- the watch: programs that do not end; processor time, as the machine may be busy --- */

static struct asm_vm *volatile watched; /* the machine that runs, for the signal handler */

static void on_alarm(int sig, siginfo_t *info, void *context)
{
	(void)sig, (void)info;
	if (asm_native_expire(context))
		return;
	struct asm_vm *m = watched;
	if (m)
		asm_vm_expire(m);
}

static void watch(unsigned ms)
{
	struct itimerval t = { .it_value = { ms / 1000, (int)(ms % 1000) * 1000 }, .it_interval = { 0, ms ? 50000 : 0 } };

	setitimer(ITIMER_PROF, &t, NULL);
}

/* --- engines --- */

int asm_diff_open(struct asm_diff *d, unsigned only, struct error *err)
{
	static const struct {
		const char *name;
		unsigned debug;
	} modes[] = {
		{ "dbt", 0 },
		{ "dbt one-insn", ACCEL_DEBUG_ONE_INSN },
		{ "dbt tiny-tlb", ACCEL_DEBUG_TINY_TLB },
		{ "dbt checks-fail", ACCEL_DEBUG_CHECKS_FAIL },
		{ "dbt random-flush", ACCEL_DEBUG_RANDOM_FLUSH },
		{ "dbt poison-flags", ACCEL_DEBUG_POISON_FLAGS },
		{ "dbt no-chain", ACCEL_DEBUG_NO_CHAIN },
	};
	memset(d, 0, sizeof(*d));
	int r = asm_vm_create(&d->vm[0], "interp", &accel_interp, 0, err);
	if (r < 0)
		return r;
	d->n = 1;
	for (unsigned i = 0; i < sizeof(modes) / sizeof(modes[0]); i++) {
		if (only && !(only >> (i + 1) & 1))
			continue;
		r = asm_vm_create(&d->vm[d->n], modes[i].name, &accel_dbt, modes[i].debug, err);
		if (r < 0) {
			asm_diff_close(d);
			return r;
		}
		d->n++;
	}
	struct error why;
	d->native = asm_native_open(&why) == 0;
	if (!d->native)
		fprintf(stderr, "asm: no native runs: %s\n", why.text);
	struct sigaction sa = { .sa_sigaction = on_alarm, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART };
	sigfillset(&sa.sa_mask);
	sigaction(SIGPROF, &sa, NULL);
	return 0;
}

void asm_diff_close(struct asm_diff *d)
{
	watch(0);
	signal(SIGPROF, SIG_IGN);
	for (unsigned i = 0; i < d->n; i++)
		asm_vm_destroy(&d->vm[i]);
	if (d->native)
		asm_native_close();
	d->n = 0;
}

/* --- comparing --- */

__attribute__((format(printf, 2, 3))) static void say(struct asm_diff *d, const char *format, ...)
{
	size_t n = strlen(d->what);
	va_list ap;

	va_start(ap, format);
	vsnprintf(d->what + n, sizeof(d->what) - n, format, ap);
	va_end(ap);
}

/* A HLT at CPL 3 ends a program as one at CPL 0 does. */
static void even_out(struct asm_result *r, const struct asm_program *p)
{
	uint64_t at = r->s.rip - p->start;

	if (r->end == ASM_FAULT && r->vector == VEC_GP && r->error == 0 && at < p->len && r->code[at] == 0xf4) {
		r->end = ASM_HALTED;
		r->vector = 0;
		r->s.rip++;
	}
}

static const char *const gpr_names[16] = { "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
					   "r8",  "r9",	 "r10", "r11", "r12", "r13", "r14", "r15" };

static void compare_bytes(struct asm_diff *d, const char *what, const uint8_t *a, const uint8_t *b, unsigned n)
{
	if (!memcmp(a, b, n))
		return;
	unsigned i = 0, last = n - 1;
	while (a[i] == b[i])
		i++;
	while (a[last] == b[last])
		last--;
	say(d, " %s+%#x..%#x: %02x/%02x", what, i, last, a[i], b[i]);
}

static bool faults_in_mmx(const struct asm_result *r, const struct asm_program *p)
{
	uint64_t at = r->s.rip - p->start;
	struct x86_insn in;
	struct x86_vectors v;

	if (r->end != ASM_FAULT || at >= p->len || x86_decode(r->code + at, 15, asm_mode(p->compat), &in) < 0)
		return false;
	x86_vectors(&in, &v);
	return v.mmx;
}

/* MASKMOVQ, MASKMOVDQU: with nothing to store, faults are up to the processor (SDM 2B). */
static bool is_masked_store(const struct asm_result *r, const struct asm_program *p)
{
	uint64_t at = r->s.rip - p->start;
	struct x86_insn in;

	return at < p->len && x86_decode(r->code + at, 15, asm_mode(p->compat), &in) == 0 && in.map == MAP_0F && in.opcode == 0xf7;
}

static bool is_string(const struct asm_result *r, const struct asm_program *p)
{
	uint64_t at = r->s.rip - p->start;
	struct x86_insn in;

	return at < p->len && x86_decode(r->code + at, 15, asm_mode(p->compat), &in) == 0 && in.map == MAP_1BYTE && (in.opcode & 0xfc) == 0xa4;
}

/* A near CALL to an address that is not canonical: processors differ in whether the return address is on the stack when it faults. */
static bool calls_nowhere(const struct asm_result *r, const struct asm_program *p)
{
	uint64_t at = r->s.rip - p->start;
	struct x86_insn in;

	return r->end == ASM_FAULT && r->vector == VEC_GP && at < p->len && x86_decode(r->code + at, 15, asm_mode(p->compat), &in) == 0 &&
	       in.map == MAP_1BYTE && in.opcode == 0xff && (in.reg & 7) == 2;
}

/* x87 stores of ten bytes and more (FBSTP, FSTP m80, FNSTENV, FNSAVE) go in parts: a host may have stored some when the next one faults. */
static bool stores_in_parts(const struct asm_result *r, const struct asm_program *p)
{
	uint64_t at = r->s.rip - p->start;
	struct x86_insn in;

	if (r->end != ASM_FAULT || at >= p->len || x86_decode(r->code + at, 15, asm_mode(p->compat), &in) < 0 || in.map != MAP_1BYTE || !in.has_mem)
		return false;
	unsigned op = in.reg & 7;
	return (in.opcode == 0xdf && op == 6) || (in.opcode == 0xdb && op == 7) || (in.opcode == 0xd9 && op == 6) || (in.opcode == 0xdd && op == 6);
}

/* A 32-bit operand that goes on at offset 0: whether that is beyond a limit of 4 GiB is the processor's choice (SDM 3A 5.3). */
static bool wraps_at_4g(const struct asm_result *r, const struct asm_program *p)
{
	uint64_t at = r->s.rip - p->start;
	struct x86_insn in;

	if (!p->compat || r->end != ASM_FAULT || (r->vector != VEC_GP && r->vector != VEC_SS) || at >= p->len ||
	    x86_decode(r->code + at, 15, X86_MODE_32, &in) < 0 || !in.has_mem || in.addrsize != 4)
		return false;
	uint64_t offset = (uint64_t)in.disp + (in.base >= 0 ? r->s.gpr[in.base] : 0) + (in.index >= 0 ? r->s.gpr[in.index] * in.scale : 0);
	return (uint32_t)offset > UINT32_MAX - 64;
}

/* The code that faulted is not the program's own any more. */
static bool changed_itself(const struct asm_result *r, const struct asm_program *p)
{
	uint64_t at = r->s.rip - p->start;

	return at < p->len && memcmp(r->code + at, p->code + at, p->len - at < 15 ? p->len - at : 15);
}

/* Reference against other; empty d->what if they agree. */
static void compare(struct asm_diff *d, const struct asm_gen *g, const struct asm_program *p, const struct asm_result *a,
		    const struct asm_result *b, bool native)
{
	if (a->end == ASM_TIMEOUT || b->end == ASM_TIMEOUT) {
		if (a->end != b->end && !native)
			say(d, " one ends (%d/%d rip %#llx)", a->end, b->end, (unsigned long long)b->s.rip);
		return;
	}
	/* A near branch to an address that is not canonical: the translator faults on arriving there (as some processors do). */
	if (a->end == ASM_FAULT && b->end == ASM_FAULT && a->vector == VEC_GP && b->vector == VEC_GP && !native &&
	    !x86_canonical(b->s.rip + asm_base[p->base]))
		return;
	/* Of several reasons to fault, a host may find another first: a misaligned operand before its page, one string operand before
	 * the other. */
	if (native && a->end == ASM_FAULT && b->end == ASM_FAULT && a->s.rip == b->s.rip && a->vector != b->vector &&
	    a->vector >= VEC_SS && a->vector <= VEC_PF && b->vector >= VEC_SS && b->vector <= VEC_PF)
		return;
	if (native && b->end == ASM_FAULT && is_masked_store(b, p) && (a->end != ASM_FAULT || a->s.rip != b->s.rip))
		return;
	if (native && wraps_at_4g(b, p) && (a->end != ASM_FAULT || a->s.rip != b->s.rip))
		return;
	/* What no guest page is mapped at may be the harness' own memory. */
	if (native && a->vector == VEC_PF && !(a->error & PF_P) && a->cr2 - asm_base[p->base] >= ASM_SPAN)
		return;
	if (a->end != b->end || a->vector != b->vector) {
		say(d, " end %d/%d vector %u/%u (%s / %s)", a->end, b->end, a->vector, b->vector, a->why ? a->why : "", b->why ? b->why : "");
	} else if (a->end == ASM_FAULT) {
		/* What a host keeps from us: whether its page tables were filled; its own error codes of other vectors. */
		uint32_t error = b->error, ref = a->error;
		uint64_t cr2 = b->cr2;
		if (native) {
			ref = p->user ? ref : ref | (a->vector == VEC_PF ? PF_U : 0);
			error = a->vector == VEC_PF ? (error & ~1u) | (ref & 1) : ref;
		}
		if (ref != error)
			say(d, " error %#x/%#x", ref, error);
		/* Nor does it say which byte of a masked store it is about, or look at string operands in our order. */
		if (native && (a->cr2 - cr2 + 64 < 128 || is_string(a, p)))
			cr2 = a->cr2;
		if (a->cr2 != cr2)
			say(d, " cr2 %#llx/%#llx", (unsigned long long)a->cr2, (unsigned long long)cr2);
	}
	for (unsigned r = 0; r < 16; r++)
		if (a->s.gpr[r] != b->s.gpr[r])
			say(d, " %s %#llx/%#llx", gpr_names[r], (unsigned long long)a->s.gpr[r], (unsigned long long)b->s.gpr[r]);
	if (a->s.rip != b->s.rip)
		say(d, " rip %#llx/%#llx", (unsigned long long)a->s.rip, (unsigned long long)b->s.rip);
	uint64_t mask = FL_STATUS | FL_DF | (native ? 0 : FL_IF | FL_IOPL | FL_NT | FL_RF | FL_AC | FL_ID | FL_TF);
	uint64_t flags = (a->s.rflags ^ b->s.rflags) & mask;
	if (flags & FL_STATUS)
		flags &= ~(uint64_t)asm_gen_undefined(g, a->s.rip - (a->end == ASM_HALTED));
	if (flags & FL_STATUS && a->end == ASM_FAULT && !native)
		flags &= ~(uint64_t)asm_gen_dead(g, a->s.rip);
	/* In code that it changed, or that is not its own, nobody knows what is dead. */
	bool fetch = a->vector == VEC_PF && a->error & PF_I;
	if (flags & FL_STATUS && a->end == ASM_FAULT && !fetch && (a->s.rip - p->start >= p->len || changed_itself(a, p)))
		flags &= ~(uint64_t)FL_STATUS;
	if (flags)
		say(d, " flags %#llx/%#llx (%#llx)", (unsigned long long)a->s.rflags, (unsigned long long)b->s.rflags, (unsigned long long)flags);
	/* A host may have switched to MMX already when the operand of such an instruction faults. */
	if (!(native && faults_in_mmx(a, p)))
		compare_bytes(d, "x87", a->s.xsave, b->s.xsave, 24);
	if (!(native && faults_in_mmx(a, p)))
		compare_bytes(d, "st", a->s.xsave + 32, b->s.xsave + 32, 128);
	compare_bytes(d, "mxcsr", a->s.xsave + 24, b->s.xsave + 24, 4);
	compare_bytes(d, "xmm", a->s.xsave + 160, b->s.xsave + 160, 256);
	compare_bytes(d, "ymm", a->s.xsave + 576, b->s.xsave + 576, 256);
	bool parts = native && stores_in_parts(a, p);
	if (!parts)
		compare_bytes(d, "data", a->data, b->data, ASM_WINDOW);
	if (!parts && !(native && calls_nowhere(a, p)))
		compare_bytes(d, "stack", a->stack, b->stack, ASM_WINDOW);
	compare_bytes(d, "code", a->code, b->code, p->len);
	if (a->s.seg[SREG_FS].base != b->s.seg[SREG_FS].base || a->s.seg[SREG_GS].base != b->s.seg[SREG_GS].base)
		say(d, " fs/gs base");
	if (native)
		return;
	if (a->s.cpl != b->s.cpl || a->s.shadow != b->s.shadow || a->s.kernel_gs_base != b->s.kernel_gs_base)
		say(d, " cpl, shadow or kernel_gs_base");
	for (unsigned i = 0; i < SREG_COUNT; i++)
		if (a->s.seg[i].sel != b->s.seg[i].sel || a->s.seg[i].attr != b->s.seg[i].attr || a->s.seg[i].limit != b->s.seg[i].limit)
			say(d, " segment %u", i);
	if (a->s.cr0 != b->s.cr0 || a->s.cr2 != b->s.cr2 || a->s.cr3 != b->s.cr3 || a->s.cr4 != b->s.cr4)
		say(d, " control registers");
}

/* Say first who disagrees. */
static void name_pair(struct asm_diff *d, const char *other, const struct asm_result *ref)
{
	char head[96];
	int n = snprintf(head, sizeof(head), "interp/%s: (end %d vector %u rip %#llx)", other, ref->end, ref->vector,
			 (unsigned long long)ref->s.rip);

	memmove(d->what + n, d->what, sizeof(d->what) - (size_t)n);
	memcpy(d->what, head, (size_t)n);
	d->what[sizeof(d->what) - 1] = 0;
}

/* The difference in d->what, of reference and `other`: does it count? */
static bool excused(struct asm_diff *d, const struct asm_gen *g, const struct asm_program *p, const char *other, const struct asm_result *ref)
{
	name_pair(d, other, ref);
	if (!asm_trace_strays(&d->vm[0], g, p))
		return false;
	d->what[0] = 0;
	d->strays++;
	return true;
}

static bool run_once(struct asm_diff *d, const struct asm_gen *g, const struct asm_program *p)
{
	struct asm_result ref, other;

	for (unsigned i = 0; i < d->n; i++) {
		struct asm_result *r = i ? &other : &ref;
		watched = &d->vm[i];
		watch(i ? 1000 : 300);
		asm_vm_run(&d->vm[i], p, r);
		watch(0);
		watched = NULL;
		even_out(r, p);
		if (i == 0 && r->end == ASM_TIMEOUT) {
			d->timeouts++;
			return true;
		}
		if (i == 0 && r->end != ASM_HALTED)
			d->faults[r->vector & 31]++;
		if (i)
			compare(d, g, p, &ref, &other, false);
		if (d->what[0])
			return excused(d, g, p, d->vm[i].name, &ref);
	}
	if (!d->native || !p->native || (p->compat && !asm_native_compat()))
		return true;
	d->natives++;
	watch(1000);
	asm_native_run(p, &other);
	watch(0);
	even_out(&other, p);
	compare(d, g, p, &ref, &other, true);
	return !d->what[0] || excused(d, g, p, "native", &ref);
}

/* The same program somewhere else, with its pointers. */
static void move(struct asm_program *p, unsigned base)
{
	uint64_t from = asm_base[p->base], by = asm_base[base] - from;

	for (unsigned r = 0; r < 16; r++)
		if (p->s.gpr[r] - from < ASM_SPAN)
			p->s.gpr[r] += by;
	p->s.seg[SREG_FS].base += by;
	p->s.seg[SREG_GS].base += by;
	p->base = base;
	p->native = false;
}

/* A 32-bit program somewhere else: its labels are absolute addresses, so it is put together again. */
static bool run_moved32(struct asm_diff *d, const struct asm_gen *g)
{
	struct asm_gen moved = *g;
	struct asm_program p;
	uint64_t from = asm_base[g->start.base], by = asm_base[ASM_BASE_MOVED32] - from;

	for (unsigned r = 0; r < 8; r++)
		if ((uint32_t)moved.start.s.gpr[r] - from < ASM_SPAN)
			moved.start.s.gpr[r] += by;
	moved.start.s.seg[SREG_FS].base += by;
	moved.start.s.seg[SREG_GS].base += by;
	moved.start.base = ASM_BASE_MOVED32;
	return !asm_gen_assemble(&moved, &p) || run_once(d, &moved, &p);
}

bool asm_diff_run(struct asm_diff *d, const struct asm_gen *g)
{
	struct asm_program p;

	d->what[0] = 0;
	if (!asm_gen_assemble(g, &p))
		return true;
	d->programs++;
	if (!run_once(d, g, &p))
		return false;
	/* Again with other data and flags: now through what the first run left translated and linked. */
	p.fill = p.fill * 3 | 1;
	p.s.rflags ^= FL_STATUS;
	if (!run_once(d, g, &p))
		return false;
	if (p.compat)
		return run_moved32(d, g);
	if (!p.user || p.base != ASM_BASE_MOVES)
		return true;
	move(&p, ASM_BASE_MOVED);
	return run_once(d, g, &p);
}

void asm_diff_shrink(struct asm_diff *d, struct asm_gen *g)
{
	char what[sizeof(d->what)];

	memcpy(what, d->what, sizeof(what));
	for (bool again = true; again;) {
		again = false;
		for (unsigned i = g->n; i-- > 0 && g->n > 1;) {
			struct asm_gen less = *g;
			if (g->item[i].flow == FLOW_END)
				continue;
			asm_gen_drop(&less, i);
			if (!asm_gen_valid(&less) || asm_diff_run(d, &less))
				continue;
			*g = less;
			memcpy(what, d->what, sizeof(what));
			again = true;
		}
	}
	memcpy(d->what, what, sizeof(what));
}

bool asm_diff_seed(struct asm_diff *d, uint64_t seed)
{
	struct asm_gen g;
	uint64_t h = (seed + 7) * 0xd1342543de82ef95ull;
	unsigned size = 1 + (unsigned)(h >> 33) % 30, features = (unsigned)(h >> 50) & 3;

	if (seed & ASM_SEED_COMPAT)
		features |= ASM_GEN_COMPAT;
	else if ((h >> 55) % 4 == 0)
		features |= ASM_GEN_KERNEL;
	asm_gen_program(&g, seed, size, features);
	if (asm_diff_run(d, &g))
		return true;
	fprintf(stderr, "asm: seed %llu disagrees: %s\n", (unsigned long long)seed, d->what);
	asm_diff_shrink(d, &g);
	fprintf(stderr, "shortened: %s\n", d->what);
	asm_gen_print(&g, STDERR_FILENO);
	return false;
}
