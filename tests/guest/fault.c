/*
 * Faults at page edges: an instruction that faults has done nothing. Each operation is tried with its operand across two pages or on a
 * bad one, first in its block or in the midst of it, in kernel and in user mode; then state, memory, error code and CR2 are compared.
 */
#include "guest.h"

const char guest_name[] = "fault";

/* How the operand's address `a` is given. */
enum where { IN_RDI, PUSHED, POPPED, IN_RBP, IN_RSI };
/* KILLS: overwrites all status flags (perhaps but for CF). What they are when such an instruction faults is not promised: the translator reckons them
 * dead before it, and no handler can tell except by looking at the pushed flags. */
enum { RD = 1, WR = 2, RMW = 3, KILLS = 4 };

/* Alone, and between others that use memory under merged checks, with the carry flag live. */
#define OP(name, text) \
	__asm__(".pushsection .snippets, \"ax\"\n" #name "_a: " text "\n ud2\n" #name "_b: mov (%r12), %r13\n stc\n mov 8(%r12), %r14\n" #name "_c: " text \
		"\n mov 16(%r12), %r14\n ud2\n.popsection"); \
	extern const u8 name##_a[], name##_b[], name##_c[];

#define OPS(X) \
	X(mov_st, "mov %rax, (%rdi)", IN_RDI, 8, WR) \
	X(mov_st4, "mov %r9d, (%rdi)", IN_RDI, 4, WR) \
	X(mov_st2, "mov %dx, (%rdi)", IN_RDI, 2, WR) \
	X(mov_sti, "movq $5, (%rdi)", IN_RDI, 8, WR) \
	X(movnti_st, "movnti %rax, (%rdi)", IN_RDI, 8, WR) \
	X(add_m, "add %rax, (%rdi)", IN_RDI, 8, RMW | KILLS) \
	X(adc_m, "adc %r8, (%rdi)", IN_RDI, 8, RMW | KILLS) \
	X(lock_add, "lock add %rax, (%rdi)", IN_RDI, 8, RMW | KILLS) \
	X(inc_m, "incl (%rdi)", IN_RDI, 4, RMW | KILLS) \
	X(neg_m, "negq (%rdi)", IN_RDI, 8, RMW | KILLS) \
	X(shl_m, "shlq $3, (%rdi)", IN_RDI, 8, RMW | KILLS) \
	X(shld_m, "shld $3, %rax, (%rdi)", IN_RDI, 8, RMW | KILLS) \
	X(xchg_m, "xchg %rax, (%rdi)", IN_RDI, 8, RMW) \
	X(xchg_m10, "xchg %r10, (%rdi)", IN_RDI, 8, RMW) \
	X(xadd_m, "lock xadd %rbx, (%rdi)", IN_RDI, 8, RMW | KILLS) \
	X(cmpxchg_m, "cmpxchg %rbx, (%rdi)", IN_RDI, 8, RMW | KILLS) \
	X(lock_cmpxchg, "lock cmpxchg %r11, (%rdi)", IN_RDI, 8, RMW | KILLS) \
	X(cmpxchg8, "lock cmpxchg8b (%rdi)", IN_RDI, 8, RMW) \
	X(cmpxchg16, "lock cmpxchg16b (%rdi)", IN_RDI, 16, RMW) \
	X(bts_m, "btsl $5, (%rdi)", IN_RDI, 4, RMW) \
	X(sete_m, "setc (%rdi)", IN_RDI, 1, WR) \
	X(movups_st, "movups %xmm1, (%rdi)", IN_RDI, 16, WR) \
	X(vmovups_st, "vmovups %ymm1, (%rdi)", IN_RDI, 32, WR) \
	X(fstp_m, "fstl (%rdi)", IN_RDI, 8, WR) \
	X(fnstcw_m, "fnstcw (%rdi)", IN_RDI, 2, WR) \
	X(stmxcsr_m, "stmxcsr (%rdi)", IN_RDI, 4, WR) \
	X(stosq_m, "stosq", IN_RDI, 8, WR) \
	X(movsq_d, "movsq", IN_RDI, 8, WR) \
	X(pop_m, "popq (%rdi)", IN_RDI, 8, WR) \
	X(mov_ld, "mov (%rdi), %rax", IN_RDI, 8, RD) \
	X(mov_ld8, "mov (%rdi), %r8", IN_RDI, 8, RD) \
	X(mov_self, "mov (%rdi), %rdi", IN_RDI, 8, RD) \
	X(movzx_ld, "movzwl (%rdi), %eax", IN_RDI, 2, RD) \
	X(add_ld, "add (%rdi), %rax", IN_RDI, 8, RD | KILLS) \
	X(cmp_ld, "cmp (%rdi), %rax", IN_RDI, 8, RD | KILLS) \
	X(test_ld, "testl $1, (%rdi)", IN_RDI, 4, RD | KILLS) \
	X(imul_ld, "imul (%rdi), %rax", IN_RDI, 8, RD | KILLS) \
	X(mul_ld, "mulq (%rdi)", IN_RDI, 8, RD | KILLS) \
	X(bt_ld, "btl $5, (%rdi)", IN_RDI, 4, RD) \
	X(cmov_ld, "cmovc (%rdi), %rax", IN_RDI, 8, RD) \
	X(push_m, "pushq (%rdi)", IN_RDI, 8, RD) \
	X(jmp_m, "jmp *(%rdi)", IN_RDI, 8, RD) \
	X(call_m, "call *(%rdi)", IN_RDI, 8, RD) \
	X(movups_ld, "movups (%rdi), %xmm1", IN_RDI, 16, RD) \
	X(vaddpd_ld, "vaddpd (%rdi), %ymm1, %ymm1", IN_RDI, 32, RD) \
	X(fld_m, "fldl (%rdi)", IN_RDI, 8, RD) \
	X(fldcw_m, "fldcw (%rdi)", IN_RDI, 2, RD) \
	X(scasq_m, "scasq", IN_RDI, 8, RD | KILLS) \
	X(lodsq_m, "lodsq", IN_RSI, 8, RD) \
	X(movsq_s, "movsq", IN_RSI, 8, RD) \
	X(push_r, "push %rax", PUSHED, 8, WR) \
	X(push_r9, "push %r9", PUSHED, 8, WR) \
	X(push_rsp, "push %rsp", PUSHED, 8, WR) \
	X(push_i, "push $7", PUSHED, 8, WR) \
	X(push_w, "pushw %ax", PUSHED, 2, WR) \
	X(pushf_s, "pushf", PUSHED, 8, WR) \
	X(call_s, "call 1f\n 1: nop", PUSHED, 8, WR) \
	X(call_r, "call *%rbx", PUSHED, 8, WR) \
	X(enter_s, "enter $0, $0", PUSHED, 8, WR) \
	X(pop_r, "pop %rax", POPPED, 8, RD) \
	X(pop_r9, "pop %r9", POPPED, 8, RD) \
	X(pop_rsp, "pop %rsp", POPPED, 8, RD) \
	X(popf_s, "popf", POPPED, 8, RD | KILLS) \
	X(ret_s, "ret", POPPED, 8, RD) \
	X(ret_n, "ret $16", POPPED, 8, RD) \
	X(leave_s, "leave", IN_RBP, 8, RD) \
	X(rsp_st, "mov %rax, (%rsp)", POPPED, 8, WR) \
	X(rsp_ld, "mov (%rsp), %rax", POPPED, 8, RD) \
	X(rsp_add, "add %rax, (%rsp)", POPPED, 8, RMW | KILLS)

#define DEFINE(name, text, where, size, access) OP(name, text)
OPS(DEFINE)

static const struct op {
	const char *name;
	const u8 *alone, *block, *in_block;
	enum where where;
	unsigned size, access;
} ops[] = {
#define ENTRY(n, text, w, s, a) { #n, n##_a, n##_b, n##_c, w, s, a },
	OPS(ENTRY)
};

extern const u8 snippets_start[], snippets_end[];
__asm__(".pushsection .snippets, \"ax\"\n snippets_end: .popsection");

#define LEFT VA(1)
#define RIGHT VA(2)
#define GOOD VA(5)
#define STACK VA(7)
#define USER_CODE VA(0x100)

static u8 *page_l, *page_r, *good;
static u64 user_offset;
static bool torn; /* see edges */

static void set_operand(struct frame *f, const struct op *o, u64 a)
{
	f->rdi = f->rsi = GOOD + 512;
	switch (o->where) {
	case IN_RDI:
		f->rdi = a;
		break;
	case IN_RSI:
		f->rsi = a;
		break;
	case PUSHED:
		f->rsp = a + o->size;
		break;
	case POPPED:
		f->rsp = a;
		break;
	case IN_RBP:
		f->rbp = a;
		break;
	}
}

static void bad(const struct op *o, const char *what, u64 got, u64 want)
{
	print("FAIL %s: %s 0x%lx, not 0x%lx\n", o->name, what, got, want);
}

static bool same(const struct op *o, const char *what, u64 got, u64 want)
{
	if (got != want)
		bad(o, what, got, want);
	check_at(__FILE__, __LINE__, o->name, got == want);
	return got == want;
}

/* Run o at address a, in a block of its own or amid others; expect the fault. */
static void try_fault(const struct op *o, u64 a, bool block, bool user, unsigned vector, u64 error, u64 cr2)
{
	const u8 *code = block ? o->block : o->alone, *at = block ? o->in_block : o->alone;
	u64 off = user ? user_offset : 0;
	struct frame f = user ? user_frame((u64)code + off, STACK + 4096 - 256) : kernel_frame(code);
	f.rax = 0x1111111111111111, f.rbx = 0x222222222222, f.rcx = 0x3333, f.rdx = 0x4444, f.rbp = STACK + 512, f.r8 = 8, f.r9 = 9,
	f.r10 = 10, f.r11 = 11, f.r12 = GOOD, f.r13 = 13, f.r14 = 14, f.r15 = 15;
	f.rflags = 2 | F_ZF | F_SF | F_AF;
	f.rsp = STACK + 4096 - 256;
	set_operand(&f, o, a);
	struct frame want = f;
	u64 *l = (u64 *)(void *)(page_l + 4096 - 128), *r = (u64 *)(void *)page_r;
	for (unsigned i = 0; i < 16; i++)
		l[i] = 0x5a5a5a5a5a5a5a5a, r[i] = 0xa5a5a5a5a5a5a5a5;
	exec(&f);
	if (block) {
		want.r13 = *(u64 *)good;
		want.r14 = *(u64 *)(good + 8);
		want.rflags |= F_CF;
	}
	bool ok = same(o, "vector", f.vector, vector);
	ok = ok && same(o, "error code", f.error, error);
	if (vector == PF)
		same(o, "cr2", f.cr2, cr2);
	same(o, "rip", f.rip, (u64)at + off);
	u64 known = ~(u64)(o->access & KILLS ? F_RF | STATUS : F_RF);
	same(o, "flags", f.rflags & known, want.rflags & known);
	for (unsigned i = 0; i < 15; i++)
		if (!same(o, "a register is", (&f.rax)[i], (&want.rax)[i]))
			print("  (register %u, block %d, user %d, address 0x%lx)\n", i, block, user, a);
	same(o, "rsp", f.rsp, want.rsp);
	bool memory = true;
	for (unsigned i = 0; i < 16; i++)
		memory &= l[i] == 0x5a5a5a5a5a5a5a5a && r[i] == 0xa5a5a5a5a5a5a5a5;
	same(o, "memory kept", memory, 1);
}

static void edges(u64 right_flags, u64 left_flags, const char *name, unsigned access, u64 error)
{
	section(name);
	for (unsigned k = 0; k < sizeof(ops) / sizeof(ops[0]); k++) {
		const struct op *o = &ops[k];
		if (!(o->access & access))
			continue;
		u64 e = error | (o->access & WR ? PF_W : 0);
		for (unsigned v = 0; v < 4; v++) {
			bool block = v & 1, user = v & 2;
			bool across = (o->size < 16 || o->size == 32 || o->name[0] == 'm') && (user || !torn);
			u64 eu = e | (user ? PF_U : 0);
			if (user && o->where == IN_RSI)
				continue;
			/* The right page is bad. */
			map(LEFT, page_l, P | W | U);
			set_pte(RIGHT, right_flags ? (u64)page_r | right_flags : 0);
			invlpg(LEFT);
			invlpg(RIGHT);
			*(volatile u8 *)LEFT = *(volatile u8 *)LEFT; /* in the TLB */
			for (unsigned n = 1; across && n < o->size; n += n < 4 ? 1 : 3)
				try_fault(o, RIGHT - n, block, user, PF, eu, RIGHT);
			try_fault(o, RIGHT, block, user, PF, eu, RIGHT);
			try_fault(o, RIGHT + 64, block, user, PF, eu, RIGHT + 64);
			/* The left one is. */
			set_pte(LEFT, left_flags ? (u64)page_l | left_flags : 0);
			map(RIGHT, page_r, P | W | U);
			invlpg(LEFT);
			invlpg(RIGHT);
			*(volatile u8 *)RIGHT = *(volatile u8 *)RIGHT;
			for (unsigned n = 1; across && n < o->size; n += n < 4 ? 1 : 3)
				try_fault(o, RIGHT - n, block, user, PF, eu, RIGHT - n);
			try_fault(o, RIGHT - 64, block, user, PF, eu, RIGHT - 64);
		}
	}
}

static void not_canonical(void)
{
	section("non-canonical addresses");
	bool straddling = !skipping("from canonical to non-canonical", "straddle-pf");
	bool fp = !skipping("non-canonical operands of the FPU in ring 3", "user-fp-gp");
	static const u64 bad_address[] = { 0x800000000000, 0x7ffffffffffc, 0xffff7ffffffffff8, 0x8000000000000008, 0x8000000000000100 };
	for (unsigned k = 0; k < sizeof(ops) / sizeof(ops[0]); k++) {
		const struct op *o = &ops[k];
		for (unsigned i = 0; i < 5; i++) {
			if (o->size < 8 || (o->size == 16 && o->name[0] != 'm'))
				continue;
			if (i == 1 && !straddling)
				continue;
			unsigned v = o->where == PUSHED || o->where == POPPED || o->where == IN_RBP ? SS : GP;
			try_fault(o, bad_address[i], i & 1, false, v, 0, 0);
			if (fp || (o->name[0] != 'v' && o->name[0] != 'f'))
				try_fault(o, bad_address[i], !(i & 1), true, v, 0, 0);
		}
	}
}

SNIPPET(movaps_u, "movaps %xmm0, 1(%rdi)\n ud2");
SNIPPET(movaps_l, "movaps 8(%rdi), %xmm0\n ud2");
SNIPPET(cx16_u, "lock cmpxchg16b 8(%rdi)\n ud2");
SNIPPET(addps_u, "addps 4(%rdi), %xmm0\n ud2");

static void alignment(void)
{
	section("alignment of 16-byte operands");
	map(LEFT, page_l, P | W | U);
	map(RIGHT, page_r, P | W | U);
	invlpg(LEFT);
	invlpg(RIGHT);
	const u8 *code[] = { movaps_u, movaps_l, cx16_u, addps_u };
	for (unsigned i = 0; i < 4; i++)
		for (unsigned k = 0; k < 3; k++) {
			struct frame f = kernel_frame(code[i]);
			f.rdi = k == 0 ? LEFT : k == 1 ? RIGHT - 16 : RIGHT - 8 - 8 * (k == 2);
			exec(&f);
			CHECK_EQ(f.vector, GP);
			CHECK_EQ(f.error, 0);
			CHECK_EQ(f.rip, (u64)code[i]);
		}
}

/* --- what does work at edges --- */

SNIPPET(straddle, "push %rax\n push %rbx\n call 1f\n pop %rcx\n pop %rdx\n ud2\n 1: push %rcx\n mov 16(%rsp), %rsi\n addq $3, (%rsp)\n pop %rdi\n ret");
SNIPPET(frames, "push %rbp\n mov %rsp, %rbp\n sub $40, %rsp\n mov %rax, -8(%rbp)\n mov %rbx, -40(%rbp)\n mov -8(%rbp), %rcx\n mov (%rsp), %rdx\n leave\n ud2");
SNIPPET(nested, "enter $32, $3\n mov %rax, (%rsp)\n mov -8(%rbp), %rcx\n leave\n ud2");

static void straddling(void)
{
	section("stacks across pages");
	for (unsigned flags = 0; flags < 2; flags++) {
		u64 off = flags ? user_offset : 0;
		map(LEFT, page_l, P | W | U);
		/* neighbours in the wrong order physically */
		map(RIGHT, page_r, P | W | U);
		invlpg(LEFT);
		invlpg(RIGHT);
		for (u64 sp = RIGHT - 56; sp <= RIGHT + 80; sp++) {
			struct frame f = kernel_frame(straddle);
			if (flags)
				f = user_frame((u64)straddle + off, 0);
			f.rsp = sp, f.rax = 0xaaaa, f.rbx = 0xbbbb, f.rcx = 100;
			exec(&f);
			CHECK_EQ(f.vector, UD);
			CHECK_EQ(f.rcx, 0xbbbb);
			CHECK_EQ(f.rdx, 0xaaaa);
			CHECK_EQ(f.rsi, 0xbbbb);
			CHECK_EQ(f.rdi, 103);
			CHECK_EQ(f.rsp, sp);
			f = kernel_frame(frames);
			if (flags)
				f = user_frame((u64)frames + off, 0);
			f.rsp = sp, f.rax = 0xcccc, f.rbx = 0xdddd, f.rbp = 0xeeee;
			exec(&f);
			CHECK_EQ(f.vector, UD);
			CHECK_EQ(f.rcx, 0xcccc);
			CHECK_EQ(f.rdx, 0xdddd);
			CHECK_EQ(f.rbp, 0xeeee);
			CHECK_EQ(f.rsp, sp);
			f = kernel_frame(nested);
			if (flags)
				f = user_frame((u64)nested + off, 0);
			f.rsp = sp, f.rax = 1, f.rbp = GOOD + 1024;
			*(u64 *)(good + 1016) = 0x1234, *(u64 *)(good + 1008) = 0x5678;
			exec(&f);
			CHECK_EQ(f.vector, UD);
			CHECK_EQ(f.rcx, 0x1234);
			CHECK_EQ(f.rbp, GOOD + 1024);
			CHECK_EQ(f.rsp, sp);
		}
	}
	section("ENTER that runs into a bad page");
	set_pte(LEFT, 0);
	invlpg(LEFT);
	for (unsigned n = 0; n < 24; n += 8) {
		struct frame f = kernel_frame(nested);
		f.rsp = RIGHT + n, f.rbp = GOOD + 1024;
		exec(&f);
		CHECK_EQ(f.vector, PF);
		CHECK_EQ(f.error, PF_W);
		CHECK_EQ(f.cr2, RIGHT - 8);
		CHECK_EQ(f.rsp, RIGHT + n);
		CHECK_EQ(f.rbp, GOOD + 1024);
		CHECK_EQ(f.rip, (u64)nested);
	}
}

/* A loop that walks into a bad page: everything before is done, nothing behind. */
SNIPPET(walk, "1: movl $7, (%rdi)\n add $4, %rdi\n inc %eax\n jmp 1b");
SNIPPET(walk_rmw, "1: addb $1, (%rdi)\n lea 1(%rdi), %rdi\n inc %rax\n jmp 1b");
SNIPPET(walk_push, "1: push %rax\n inc %rax\n jmp 1b");
SNIPPET(walk_call, "1: inc %rax\n call 1b");

static void walking(void)
{
	section("loops into a bad page");
	map(LEFT, page_l, P | W | U);
	set_pte(RIGHT, 0);
	invlpg(RIGHT);
	for (int i = 0; i < 3; i++) {
		fill(page_l, 0, 4096);
		struct frame f = kernel_frame(walk);
		f.rdi = LEFT + 2;
		exec(&f);
		CHECK_EQ(f.vector, PF);
		CHECK_EQ(f.cr2, RIGHT);
		CHECK_EQ(f.rax, 1023);
		CHECK_EQ(f.rdi, RIGHT - 2);
		if (!torn)
			CHECK_EQ(page_l[4094], 0);
		CHECK_EQ(page_l[4090], 7);
		f = kernel_frame(walk_rmw);
		f.rdi = LEFT + 5;
		exec(&f);
		CHECK_EQ(f.vector, PF);
		CHECK_EQ(f.error, PF_W);
		CHECK_EQ(f.rax, 4091);
		CHECK_EQ(page_l[4095], 1);
		CHECK_EQ(f.rip, (u64)walk_rmw);
	}
	set_pte(LEFT, 0);
	map(RIGHT, page_r, P | W | U);
	invlpg(LEFT);
	invlpg(RIGHT);
	for (unsigned i = 0; i < 8; i++) {
		struct frame f = kernel_frame(walk_push);
		f.rsp = RIGHT + 4096 - 4 * (i & 1);
		exec(&f);
		CHECK_EQ(f.vector, PF);
		CHECK_EQ(f.cr2, i & 1 ? RIGHT - 4 : RIGHT - 8);
		CHECK_EQ(f.rsp, i & 1 ? RIGHT + 4 : RIGHT);
		CHECK_EQ(f.rax, i & 1 ? 511 : 512);
		f = kernel_frame(walk_call);
		f.rsp = RIGHT + 4096;
		exec(&f);
		CHECK_EQ(f.vector, PF);
		CHECK_EQ(f.rax, 513);
		CHECK_EQ(f.rsp, RIGHT);
		CHECK_EQ(*(u64 *)page_r, (u64)walk_call_end);
	}
}

/* The private stack of calls overflows and is forgotten: many calls without returns, many returns without calls. */
SNIPPET(deep, "1: push %rdi\n dec %rdi\n jz 2f\n call 1b\n 2: pop %rcx\n add %rcx, %rax\n ret");
SNIPPET(unbalanced, "1: call 2f\n 2: add $8, %rsp\n inc %eax\n dec %edi\n jnz 1b\n ret");
SNIPPET(returns, "mov %rdi, %rcx\n lea 2f(%rip), %rdx\n lea 3f(%rip), %rsi\n push %rsi\n 1: push %rdx\n loop 1b\n ret\n 2: inc %eax\n ret\n 3: ret");

static void calls(void)
{
	section("calls and returns out of balance");
	u8 *stack = page_alloc(128);
	for (int i = 0; i < 2; i++) {
		struct frame f = kernel_frame(deep);
		f.rsp = (u64)stack + 128 * 4096 - 8;
		*(u64 *)f.rsp = (u64)straddle_end - 0; /* somewhere; replaced below */
		static const u8 ud2[] = { 0x0f, 0x0b };
		*(u64 *)f.rsp = (u64)ud2;
		f.rdi = 20000;
		exec(&f);
		CHECK_EQ(f.vector, UD);
		CHECK_EQ(f.rax, 20000ul * 20001 / 2);
		f = kernel_frame(unbalanced);
		f.rsp = (u64)stack + 128 * 4096 - 8;
		*(u64 *)f.rsp = (u64)ud2;
		f.rdi = 20000;
		exec(&f);
		CHECK_EQ(f.vector, UD);
		CHECK_EQ(f.rax, 20000);
		f = kernel_frame(returns);
		f.rsp = (u64)stack + 128 * 4096 - 8;
		*(u64 *)f.rsp = (u64)ud2;
		f.rdi = 20000;
		exec(&f);
		CHECK_EQ(f.vector, UD);
		CHECK_EQ(f.rax, 20000);
	}
}

void guest_main(void)
{
	page_r = page_alloc(1); /* physically before its left neighbour */
	page_l = page_alloc(1);
	good = page_alloc(1);
	for (unsigned i = 0; i < 4096; i++)
		good[i] = (u8)(i * 7);
	map(GOOD, good, P | W | U);
	map(STACK, page_alloc(1), P | W | U);
	u64 first = (u64)mov_st_a & ~0xfffull;
	for (u64 a = first; a < (u64)snippets_end; a += 4096)
		map(USER_CODE + (a - first), (void *)a, P | W | U);
	user_offset = USER_CODE - first;
	torn = skipping("across two pages in ring 0", "torn-store");
	edges(0, 0, "not mapped", RD | WR, 0);
	edges(P | U, P | U, "read-only", WR, PF_P);
	not_canonical();
	alignment();
	straddling();
	walking();
	calls();
	section("supervisor pages from user mode");
	map(RIGHT, page_r, P | W);
	map(LEFT, page_l, P | W);
	invlpg(LEFT);
	invlpg(RIGHT);
	for (unsigned k = 0; k < sizeof(ops) / sizeof(ops[0]); k++)
		try_fault(&ops[k], RIGHT + 64, k & 1, true, PF, PF_P | PF_U | (ops[k].access & WR ? PF_W : 0), RIGHT + 64);
}
