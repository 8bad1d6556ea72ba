/*
 * Debug registers and single steps (SDM 3B 17.2, 17.3): breakpoints of instructions, data and ports by type, length and place, what DR6 and
 * the pushed RF and TF are, RF, GD, DR4 and DR5, TF over all kinds of instructions, and debug traps put off by MOV SS. In kernel and user mode.
 */
#include "guest.h"

const char guest_name[] = "debug";

#define DATA VA(0x10)
enum { B0 = 1, B1 = 2, B2 = 4, B3 = 8, BD = 1 << 13, BS = 1 << 14 };
enum { EXEC, WRITE, IO, ACCESS };
enum { LEN1, LEN2, LEN8, LEN4 };
#define DR6_CLEAR 0xffff0ff0ull
#define DR7_CLEAR 0x400ull

#define DR(n) \
	static u64 read_dr##n(void) \
	{ \
		u64 v; \
		__asm__ volatile("mov %%dr" #n ", %0" : "=r"(v)); \
		return v; \
	} \
	static void write_dr##n(u64 v) \
	{ \
		__asm__ volatile("mov %0, %%dr" #n : : "r"(v)); \
	}
DR(0)
DR(1)
DR(2)
DR(3)
DR(6)
DR(7)

/* Breakpoint n: enabled locally, or globally if n is odd. */
static void set_point(unsigned n, u64 at, unsigned type, unsigned len)
{
	void (*const write[])(u64) = { write_dr0, write_dr1, write_dr2, write_dr3 };
	write[n](at);
	write_dr7((read_dr7() & ~(0xfull << (16 + 4 * n) | 3ull << 2 * n)) | (n & 1 ? 2ull : 1ull) << 2 * n | (u64)(type | len << 2) << (16 + 4 * n));
}

static void clear_points(void)
{
	write_dr7(DR7_CLEAR);
}

/* --- what happened --- */

static struct hit {
	u64 rip, flags, rcx;
	u32 dr6;
} hits[64];
static unsigned nhits;
static bool keep_going = true; /* set RF behind instruction breakpoints */

static void on_debug(struct frame *f)
{
	u64 dr6 = read_dr6();
	if (nhits < 64)
		hits[nhits++] = (struct hit){ f->rip, f->rflags, f->rcx, (u32)dr6 };
	write_dr6(DR6_CLEAR);
	if (keep_going)
		f->rflags |= F_RF;
	else
		clear_points();
}

static bool in_user;

static u64 place(const u8 *code)
{
	return in_user ? user_alias(code) : (u64)code;
}

static struct frame start(const u8 *code)
{
	struct frame f = in_user ? user_frame(user_alias(code), USER_STACK_TOP - 64) : kernel_frame(code);
	f.rdi = DATA + 256;
	nhits = 0;
	return f;
}

static struct frame run(const u8 *code, u64 rflags)
{
	struct frame f = start(code);
	f.rflags |= rflags;
	exec(&f);
	return f;
}

static void check_hit(const char *name, unsigned n, u64 rip, u64 dr6)
{
	check_cell(name, "RIP", n < nhits ? hits[n].rip : 0, rip);
	check_cell(name, "DR6", n < nhits ? hits[n].dr6 : 0, DR6_CLEAR | dr6);
}

/* --- instructions --- */

#define L(name) ".globl " #name "\n" #name ": "
SNIPPET(code, "mov $1, %eax\n" L(code_2) "add $2, %eax\n" L(code_3) "mov %eax, (%rdi)\n" L(code_4) "lea (%rax,%rax), %ecx\n" L(code_5) "dec %ecx\n jnz code_5\n ud2");
SNIPPET(faulting, L(faulting_at) "hlt\n ud2");
SNIPPET(popf_rf, "pushf\n orq $0x10000, (%rsp)\n popf\n" L(popf_rf_at) "nop\n ud2");
extern const u8 code_2[], code_3[], code_4[], code_5[], faulting_at[], popf_rf_at[];

static void instructions(void)
{
	for (unsigned user = 0; user < 2; user++)
		for (unsigned round = 0; round < 2; round++) {
			if (!round && !section_unless(user ? "instruction breakpoints in user mode" : "instruction breakpoints in kernel mode", user ? "user-bp" : ""))
				break;
			in_user = user;
			struct frame f = run(code, 0); /* known before */
			check_cell("none", "hits", nhits, 0);
			for (unsigned n = 0; n < 4; n++) {
				static const u8 *const at[] = { code, code_2, code_3, code_4 };
				set_point(n, place(at[n]), EXEC, LEN1);
				f = run(code, 0);
				check_cell("one", "hits", nhits, 1);
				check_hit("one", 0, place(at[n]), 1u << n);
				/* SDM 3A 2.3, RF: not set in what an instruction breakpoint pushes */
				check_cell("one", "pushed RF and TF", hits[0].flags & (F_RF | F_TF), 0);
				check_cell("one", "vector", f.vector, UD);
				check_cell("one", "RAX", f.rax, 3);
				clear_points();
			}
			for (unsigned n = 0; n < 4; n++)
				set_point(n, place(n == 0 ? code_4 : n == 1 ? code_2 : n == 2 ? code_5 : code_2), EXEC, LEN1);
			run(code, 0);
			check_cell("four", "hits", nhits, 8);
			check_hit("four", 0, place(code_2), B1 | B3);
			check_hit("four", 1, place(code_4), B0);
			for (unsigned i = 2; i < 8; i++)
				check_hit("four", i, place(code_5), B2);
			clear_points();
			set_point(0, place(code_2) + 1, EXEC, LEN1);
			run(code, 0);
			check_cell("second byte", "hits", nhits, 0);
			clear_points();
			/* without RF it would hit again: one more instruction only if the point is gone */
			keep_going = false;
			set_point(0, place(code_3), EXEC, LEN1);
			f = run(code, 0);
			check_cell("cleared in the handler", "hits", nhits, 1);
			check_cell("cleared in the handler", "vector", f.vector, UD);
			keep_going = true;
			/* RF from the frame: the first instruction runs, its neighbour does not escape */
			set_point(0, place(code_2), EXEC, LEN1);
			set_point(1, place(code_3), EXEC, LEN1);
			f = start(code_2);
			f.rax = 1;
			f.rflags |= F_RF;
			exec(&f);
			check_cell("RF", "hits", nhits, 1);
			check_hit("RF", 0, place(code_3), B1);
			clear_points();
			/* POPF does not set it */
			set_point(0, place(popf_rf_at), EXEC, LEN1);
			run(popf_rf, 0);
			check_cell("POPF", "hits", nhits, 1);
			clear_points();
			/* a breakpoint comes before the instruction's own fault, which then pushes RF */
			if (user) {
				set_point(2, place(faulting_at), EXEC, LEN1);
				f = run(faulting, 0);
				check_cell("before a fault", "hits", nhits, 1);
				check_cell("before a fault", "vector", f.vector, GP);
				check_cell("before a fault", "pushed RF", f.rflags & F_RF, F_RF);
				clear_points();
			}
			run(code, 0);
			check_cell("none left", "hits", nhits, 0);
		}
}

/* --- data --- */

#define ACCESSES(X) X(1, "movb %al, (%rdi)", "movb (%rdi), %al") X(2, "movw %ax, (%rdi)", "movw (%rdi), %ax") X(4, "movl %eax, (%rdi)", "movl (%rdi), %eax") \
	X(8, "mov %rax, (%rdi)", "mov (%rdi), %rax") X(16, "movups %xmm0, (%rdi)", "movups (%rdi), %xmm0")
#define DEFINE(size, store, load) \
	SNIPPET(store_##size, store "\n" L(store_##size##_next) "nop\n ud2"); \
	SNIPPET(load_##size, load "\n" L(load_##size##_next) "nop\n ud2"); \
	extern const u8 store_##size##_next[], load_##size##_next[];
ACCESSES(DEFINE)

static void data(void)
{
	if (!section_unless("data breakpoints by length and place", "data-bp,user-bp"))
		return;
	static const struct {
		unsigned size;
		const u8 *code[2], *next[2];
	} t[] = {
#define ENTRY(size, store, load) { size, { store_##size, load_##size }, { store_##size##_next, load_##size##_next } },
		ACCESSES(ENTRY)
	};
	static const u8 sizes[] = { 1, 2, 8, 4 }; /* by the encoding of LEN */
	for (unsigned len = 0; len < 4; len++)
		for (unsigned kind = 0; kind < 2; kind++) {
			unsigned wrong = 0, first = 0;
			set_point(len, DATA + 256 + 16 + (len == LEN2 ? 3 : len), kind ? ACCESS : WRITE, len); /* low bits of the address do not count */
			u64 at = (DATA + 256 + 16 + (len == LEN2 ? 3 : len)) & ~(u64)(sizes[len] - 1);
			for (unsigned i = 0; i < sizeof(t) / sizeof(t[0]); i++)
				for (unsigned load = 0; load < 2; load++)
					for (unsigned off = 0; off < 32; off += i & 1 ? 1 : 3) {
						in_user = off & 4;
						struct frame f = start(t[i].code[load]);
						f.rdi = DATA + 256 + off;
						exec(&f);
						bool hit = f.rdi + t[i].size > at && f.rdi < at + sizes[len] && (kind || !load);
						bool ok = nhits == hit && f.vector == UD;
						if (hit)
							ok = ok && hits[0].rip == place(t[i].next[load]) && hits[0].dr6 == (DR6_CLEAR | 1u << len) && !(hits[0].flags & F_RF);
						if (!ok && !wrong++)
							first = t[i].size << 16 | load << 8 | off;
					}
			clear_points();
			static const char *const names[] = { "1 byte", "2 bytes", "8 bytes", "4 bytes" };
			check_cell(names[len], kind ? "accesses wrong" : "writes wrong", wrong, 0);
			if (wrong)
				print("  first: size << 16 | load << 8 | offset: 0x%x\n", first);
		}
}

/* X(name, code with the label name_next where the trap is taken, hits, type) with the breakpoint at DATA + 256, 8 bytes */
#define DATA_CASES(X) \
	X(d_rmw, "incl (%rdi)\n" L(d_rmw_next) "nop", 1, WRITE) \
	X(d_lock, "lock xadd %rax, (%rdi)\n" L(d_lock_next) "nop", 1, ACCESS) \
	X(d_cmp, "cmpl $5, (%rdi)\n" L(d_cmp_next) "nop", 1, ACCESS) \
	X(d_cmp_w, "cmpl $5, (%rdi)\n" L(d_cmp_w_next) "nop", 0, WRITE) \
	X(d_push, "lea 8(%rdi), %rsp\n push %rax\n" L(d_push_next) "nop", 1, WRITE) \
	X(d_pop, "mov %rdi, %rsp\n pop %rax\n" L(d_pop_next) "nop", 1, ACCESS) \
	X(d_call, "lea 8(%rdi), %rsp\n call d_call_next\n nop\n" L(d_call_next) "nop", 1, WRITE) \
	X(d_ret, "lea d_ret_next(%rip), %rax\n mov %rax, (%rdi)\n mov %rdi, %rsp\n ret\n" L(d_ret_next) "nop", 2, ACCESS) \
	X(d_jmp, "lea d_jmp_next(%rip), %rax\n mov %rax, (%rdi)\n jmp *(%rdi)\n nop\n" L(d_jmp_next) "nop", 1, -1) \
	X(d_movs, "lea 64(%rdi), %rsi\n movsq\n" L(d_movs_next) "nop", 1, WRITE) \
	X(d_movs_src, "mov %rdi, %rsi\n lea 64(%rdi), %rdi\n movsb\n" L(d_movs_src_next) "nop", 1, ACCESS) \
	X(d_stos, "stosb\n" L(d_stos_next) "nop", 1, WRITE) \
	X(d_fst, "fninit\n fldz\n fstpl (%rdi)\n" L(d_fst_next) "nop", 1, WRITE) \
	X(d_movnti, "movnti %rax, (%rdi)\n" L(d_movnti_next) "nop", 1, WRITE) \
	X(d_bts, "btsl $3, (%rdi)\n" L(d_bts_next) "nop", 1, WRITE) \
	X(d_xchg, "xchg %al, 7(%rdi)\n" L(d_xchg_next) "nop", 1, WRITE) \
	X(d_past, "movq $0, 8(%rdi)\n movq $0, -8(%rdi)\n" L(d_past_next) "nop", 0, ACCESS) \
	X(d_lea, "lea (%rdi), %rax\n prefetcht0 (%rdi)\n" L(d_lea_next) "nop", 0, ACCESS) \
	X(d_block, "mov %rax, 16(%rdi)\n mov 24(%rdi), %rcx\n mov %rax, (%rdi)\n" L(d_block_next) "mov 32(%rdi), %rdx\n mov %rax, 40(%rdi)", 1, WRITE) \
	X(d_fxsave, "and $-16, %rdi\n fxsave -256(%rdi)\n" L(d_fxsave_next) "nop", 1, WRITE)
#define DEFINE_DATA(name, text, n, type) \
	SNIPPET(name, text "\n ud2"); \
	extern const u8 name##_next[];
DATA_CASES(DEFINE_DATA)
SNIPPET(d_rep, L(d_rep_at) "rep stosb\n" L(d_rep_next) "nop\n ud2");
SNIPPET(d_ss, "mov (%rdi), %ss\n" L(d_ss_1) "nop\n" L(d_ss_2) "nop\n ud2");
SNIPPET(d_fault, "mov %rax, (%rdi)\n ud2");
extern const u8 d_rep_at[], d_rep_next[], d_ss_1[], d_ss_2[];

static void data_cases(void)
{
	if (!section_unless("data breakpoints by instruction", "data-bp,user-bp"))
		return;
	static const struct {
		const char *name;
		const u8 *code, *next;
		unsigned hits;
		int type;
	} t[] = {
#define ENTRY_DATA(n, text, h, type) { #n, n, n##_next, h, type },
		DATA_CASES(ENTRY_DATA)
	};
	for (unsigned user = 0; user < 2; user++) {
		in_user = user;
		for (unsigned i = 0; i < sizeof(t) / sizeof(t[0]); i++) {
			if (t[i].type < 0)
				continue;
			set_point(3, DATA + 256, (unsigned)t[i].type, LEN8);
			struct frame f = start(t[i].code);
			exec(&f);
			clear_points();
			check_cell(t[i].name, "vector", f.vector, UD);
			check_cell(t[i].name, "hits", nhits, t[i].hits);
			if (t[i].hits)
				check_hit(t[i].name, t[i].hits - 1, place(t[i].next), B3);
		}
		/* each iteration of a string instruction; RF in what is pushed but for the last */
		set_point(0, DATA + 256 + 4, WRITE, LEN2);
		struct frame f = start(d_rep);
		f.rcx = 6;
		exec(&f);
		clear_points();
		check_cell("rep stos", "hits", nhits, 2);
		check_hit("rep stos", 0, place(d_rep_at), B0);
		check_hit("rep stos", 1, place(d_rep_next), B0);
		check_cell("rep stos", "RCX", hits[0].rcx, 1);
		check_cell("rep stos", "pushed RF", hits[0].flags & F_RF, F_RF);
		check_cell("rep stos", "pushed RF at the end", hits[1].flags & F_RF, 0);
		/* two at once, and with TF */
		set_point(0, DATA + 256, WRITE, LEN4);
		set_point(1, DATA + 256 + 3, ACCESS, LEN1);
		f = start(store_4);
		exec(&f);
		check_hit("two", 0, place(store_4_next), B0 | B1);
		f = start(store_4);
		f.rflags |= F_TF;
		exec(&f);
		check_hit("two and TF", 0, place(store_4_next), B0 | B1 | BS);
		check_hit("two and TF", 1, place(store_4_next) + 1, BS);
		check_cell("two and TF", "hits", nhits, 2);
		clear_points();
		/* an instruction that faults has not accessed anything */
		set_point(0, DATA + 4096 - 4, WRITE, LEN4);
		f = start(d_fault);
		f.rdi = DATA + 4096 - 4;
		exec(&f);
		check_cell("faulting", "vector", f.vector, PF);
		check_cell("faulting", "hits", nhits, 0);
		clear_points();
		/* MOV SS: put off until after the next instruction (SDM 3A 6.8.3) */
		*(u64 *)(DATA + 256) = user ? UDATA : KDATA;
		set_point(0, DATA + 256, ACCESS, LEN2);
		f = start(d_ss);
		exec(&f);
		check_cell("MOV SS", "hits", nhits, 1);
		check_hit("MOV SS", 0, place(d_ss_2), B0);
		clear_points();
	}
}

/* --- ports --- */

SNIPPET(io_out, "out %al, $0x80\n" L(io_out_next) "nop\n ud2");
SNIPPET(io_in, "mov $0x80, %dx\n in %dx, %al\n" L(io_in_next) "nop\n ud2");
SNIPPET(io_outw, "mov $0x7f, %dx\n xor %eax, %eax\n out %ax, %dx\n" L(io_outw_next) "nop\n ud2");
SNIPPET(io_outs, "mov $0x80, %dx\n mov %rdi, %rsi\n outsb\n" L(io_outs_next) "nop\n ud2");
SNIPPET(io_other, "out %al, $0x84\n" L(io_other_next) "nop\n ud2");
extern const u8 io_out_next[], io_in_next[], io_outw_next[], io_outs_next[], io_other_next[];

static void ports(void)
{
	if (!section_unless("port breakpoints", "io-bp"))
		return;
	static const struct {
		const char *name;
		const u8 *code, *next;
		u8 hits;
	} t[] = { { "out", io_out, io_out_next, 1 }, { "in", io_in, io_in_next, 1 }, { "out of a word before", io_outw, io_outw_next, 1 },
		  { "outs", io_outs, io_outs_next, 1 }, { "another port", io_other, io_other_next, 0 } };
	u64 cr4 = read_cr4();
	in_user = false;
	write_cr4(cr4 | 8);
	set_point(1, 0x80, IO, LEN4);
	for (unsigned i = 0; i < sizeof(t) / sizeof(t[0]); i++) {
		run(t[i].code, 0);
		check_cell(t[i].name, "hits", nhits, t[i].hits);
		if (t[i].hits)
			check_hit(t[i].name, 0, place(t[i].next), B1);
	}
	/* memory at that address is another thing */
	set_point(1, DATA + 256, IO, LEN4);
	run(store_4, 0);
	check_cell("memory", "hits", nhits, 0);
	clear_points();
	write_cr4(cr4);
}

/* --- the registers themselves --- */

SNIPPET(to_dr7, "mov %rax, %dr7\n ud2");
SNIPPET(to_dr6, "mov %rax, %dr6\n ud2");
SNIPPET(from_dr0, "mov %dr0, %rax\n ud2");
SNIPPET(from_dr4, ".byte 0x0f, 0x21, 0xe0\n ud2");
SNIPPET(to_dr5, ".byte 0x0f, 0x23, 0xe8\n ud2");
SNIPPET(from_dr5, ".byte 0x0f, 0x21, 0xe8\n ud2");

static void registers(void)
{
	section("debug registers");
	in_user = false;
	write_dr6(0);
	/* bits 11 (bus locks) and 16 (RTM) can be cleared where there is the feature */
	check_cell("DR6", "of 0", read_dr6() | 1 << 11 | 1 << 16, DR6_CLEAR);
	write_dr6(0xffffffff);
	check_cell("DR6", "of ones", read_dr6() & 0xffff1fff, 0xffff0fff);
	write_dr6(DR6_CLEAR);
	write_dr7(0);
	check_cell("DR7", "of 0", read_dr7(), DR7_CLEAR);
	write_dr7(0x300);
	check_cell("DR7", "LE, GE", read_dr7(), 0x700);
	clear_points();
	write_dr0(0xfedcba9876543210);
	check_cell("DR0", "64 bits", read_dr0(), 0xfedcba9876543210);
	write_dr1(1), write_dr2(~2ull), write_dr3(3ull << 62);
	check_cell("DR1", "kept", read_dr1(), 1);
	check_cell("DR2", "kept", read_dr2(), ~2ull);
	check_cell("DR3", "kept", read_dr3(), 3ull << 62);
	write_dr0(0);
	static const struct {
		const char *name;
		const u8 *code;
		u64 value;
		u8 de, user, vector;
	} t[] = {
		{ "DR7 bit 32", to_dr7, 1ull << 32 | 0x400, 0, 0, GP }, { "DR6 bit 63", to_dr6, 1ull << 63, 0, 0, GP }, { "DR7 in user mode", to_dr7, 0x400, 0, 1, GP },
		{ "DR0 in user mode", from_dr0, 0, 0, 1, GP }, { "DR4", from_dr4, 0, 0, 0, UD }, { "DR4 with DE", from_dr4, 0, 1, 0, UD },
		{ "DR5 written", to_dr5, 0x701, 0, 0, UD }, { "DR5 with DE", to_dr5, 0x701, 1, 0, UD },
	};
	u64 cr4 = read_cr4();
	for (unsigned i = 0; i < sizeof(t) / sizeof(t[0]); i++) {
		clear_points();
		write_cr4(cr4 | (t[i].de ? 8 : 0));
		in_user = t[i].user;
		struct frame f = start(t[i].code);
		f.rax = t[i].value;
		exec(&f);
		write_cr4(cr4);
		check_cell(t[i].name, "vector", f.vector, t[i].vector);
		bool moved = t[i].vector == UD && !t[i].de;
		if (!t[i].user)
			check_cell(t[i].name, "RIP", f.rip, place(t[i].code) + (moved ? 3 : 0));
		if (t[i].code == from_dr4 && moved)
			check_cell(t[i].name, "is DR6", f.rax, DR6_CLEAR);
		if (t[i].code == to_dr5)
			check_cell(t[i].name, "is DR7", read_dr7(), moved ? 0x701 : DR7_CLEAR);
	}
	clear_points();
	section("general detect");
	for (unsigned i = 0; i < 2; i++) {
		in_user = false;
		write_dr7(DR7_CLEAR | 1 << 13);
		const u8 *c = i ? from_dr5 : to_dr7;
		struct frame f = start(c);
		f.rax = 0x401;
		/* The handler sees GD clear; it sets RF, so the access runs then: as a fault it starts again. */
		exec(&f);
		check_cell("GD", "hits", nhits, 1);
		check_hit("GD", 0, (u64)c, BD);
		check_cell("GD", "vector behind", f.vector, UD);
		check_cell("GD", "DR7", read_dr7(), i ? 0x400 : 0x401);
		clear_points();
	}
}

/* --- single steps --- */

/* Straight-line code; each T writes down where it is. */
__asm__(".macro T insn:vararg\n .pushsection .rodata.trail\n .quad 9f\n .popsection\n9: \\insn\n.endm");
__asm__(".pushsection .rodata.trail, \"a\"\n.globl trail_1, trail_2, trail_1_end, trail_2_end\ntrail_1:\n.popsection");
SNIPPET(steps,
	"T nop\nT mov $5, %eax\nT push %rax\nT pop %rcx\nT xor %edx, %edx\nT jz 1f\n ud2\n1: T jnz 2f\nT call 3f\n2: ud2\n3: T pop %rbx\nT lea 4f(%rip), %rbx\nT jmp *%rbx\n"
	"ud2\n4: T push %rbx\nT lea 5f(%rip), %rax\nT push %rax\nT ret\n ud2\n5: T pop %rbx\nT mov %rax, (%rdi)\nT mov (%rdi), %rdx\nT lock incl (%rdi)\nT pushf\nT popf\n"
	"T cpuid\nT xgetbv\nT rdtsc\nT movups %xmm0, (%rdi)\nT fninit\nT fwait\nT mov $1, %ecx\nT loop 6f\n6: T enter $8, $0\nT leave\nT movsb\nT cld\nT xchg %ax, %ax\n"
	"T pause\nT lfence\nT xor %edx, %edx\nT div %r8\nT imul %rax, %rax\nT sete %al\nT cmpxchg %rcx, (%rdi)\nT ud2");
__asm__(".pushsection .rodata.trail\ntrail_1_end:\ntrail_2:\n.popsection");
SNIPPET(kernel_steps,
	"T cli\nT mov %cr0, %rax\nT mov %rax, %cr0\nT mov %cr3, %rax\nT mov %rax, %cr3\nT mov %cr4, %rax\nT mov %rax, %cr4\nT mov $0xc0000082, %ecx\nT rdmsr\nT wrmsr\n"
	"T invlpg (%rdi)\nT swapgs\nT swapgs\nT inb $0x80, %al\nT outb %al, $0x80\nT clts\nT wbinvd\nT hlt\nT mov %ds, %eax\nT mov %eax, %ds\nT xor %ecx, %ecx\nT xgetbv\nT xsetbv\n"
	"T sti\nT cli\nT mov %cr8, %rax\nT mov %rax, %cr8\nT mov %dr3, %rax\nT mov %rax, %dr3\nT sgdt (%rdi)\nT lgdt (%rdi)\nT str %eax\nT lldt %r9w\nT ud2");
__asm__(".pushsection .rodata.trail\ntrail_2_end:\n.popsection");
extern const u64 trail_1[], trail_1_end[], trail_2[], trail_2_end[];
SNIPPET(tf_rep, "rep stosb\n" L(tf_rep_next) "nop\n ud2");
SNIPPET(tf_ss, "mov %ss, %eax\n" L(tf_ss_1) "mov %eax, %ss\n nop\n" L(tf_ss_2) "nop\n ud2");
SNIPPET(tf_popf, "pushf\n" L(tf_popf_1) "andq $~0x100, (%rsp)\n" L(tf_popf_2) "popf\n" L(tf_popf_3) "nop\n ud2");
SNIPPET(tf_int, "nop\n" L(tf_int_1) "int $0x80\n" L(tf_int_2) "nop\n" L(tf_int_3) "nop\n ud2");
SNIPPET(tf_icebp, ".byte 0xf1\n" L(tf_icebp_1) "nop\n ud2");
extern const u8 tf_rep_next[], tf_ss_1[], tf_ss_2[], tf_popf_1[], tf_popf_2[], tf_popf_3[], tf_int_1[], tf_int_2[], tf_int_3[], tf_icebp_1[];

static void on_80(struct frame *f)
{
	(void)f;
}

static void single_steps(void)
{
	static const char *const names[] = { "single steps in kernel mode", "single steps in user mode", "single steps over privileged instructions" };
	for (unsigned k = 0; k < 3; k++) {
		if (!section_unless(names[k], k == 1 ? "" : "step-late"))
			continue;
		in_user = k == 1;
		const u8 *c = k < 2 ? steps : kernel_steps;
		const u64 *trail = k < 2 ? trail_1 : trail_2;
		unsigned n = (unsigned)((k < 2 ? trail_1_end : trail_2_end) - trail);
		struct frame f = start(c);
		f.rflags |= F_TF;
		f.rsi = DATA + 512, f.r8 = 3;
		exec(&f);
		const char *name = names[k];
		check_cell(name, "vector", f.vector, UD);
		check_cell(name, "steps", nhits, n - 1);
		for (unsigned i = 0; i + 1 < n; i++)
			check_hit(name, i, trail[i + 1] - (u64)c + place(c), BS);
		check_cell(name, "TF at the end", f.rflags & F_TF, F_TF);
	}
	for (unsigned user = 0; user < 2; user++) {
		if (!section_unless(user ? "special steps in user mode" : "special steps in kernel mode", user ? "user-int" : "rep-step,ss-step"))
			continue;
		in_user = user;
		struct frame f = start(tf_rep);
		f.rcx = 3;
		f.rflags |= F_TF;
		exec(&f);
		check_cell("rep", "steps", nhits, 4);
		check_hit("rep", 0, place(tf_rep), BS);
		check_hit("rep", 1, place(tf_rep), BS);
		check_hit("rep", 2, place(tf_rep_next), BS);
		check_cell("rep", "pushed RF", hits[0].flags & F_RF, F_RF);
		check_cell("rep", "pushed RF at the end", hits[2].flags & F_RF, 0);
		check_cell("rep", "RCX", hits[0].rcx, 2);
		run(tf_ss, F_TF);
		check_cell("MOV SS", "steps", nhits, 3);
		check_hit("MOV SS", 0, place(tf_ss_1), BS);
		check_hit("MOV SS", 1, place(tf_ss_2), BS);
		f = run(tf_popf, F_TF);
		check_cell("POPF", "steps", nhits, 3);
		check_hit("POPF", 2, place(tf_popf_3), BS);
		check_cell("POPF", "pushed TF", hits[2].flags & F_TF, 0);
		check_cell("POPF", "TF at the end", f.rflags & F_TF, 0);
		handlers[0x80] = on_80;
		run(tf_int, F_TF);
		handlers[0x80] = NULL;
		check_cell("INT", "steps", nhits, 3);
		check_hit("INT", 0, place(tf_int_1), BS);
		check_hit("INT", 1, place(tf_int_3), BS); /* the trap of IRET's TF: after the instruction it returns to */
		run(tf_icebp, 0);
		check_cell("INT1", "hits", nhits, 1);
		check_hit("INT1", 0, place(tf_icebp_1), 0);
	}
}

void guest_main(void)
{
	map_user_alias();
	map(DATA, page_alloc(1), P | W | U);
	handlers[DB] = on_debug;
	registers();
	instructions();
	data();
	data_cases();
	ports();
	single_steps();
}
