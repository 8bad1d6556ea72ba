/*
 * Segments and gates: loads and far transfers by every kind of descriptor, the IDT's gates, stacks of handlers (IST, RSP0), and what a
 * second fault on the way makes of the first (EXT, #DF; SDM 3A 6.13, 6.15 tables 6-4, 6-5). In 64-bit mode.
 */
#include "guest.h"

const char guest_name[] = "desc";

extern u64 gdt[], idt[][2];

/* --- descriptors, in a GDT of our own behind a copy of the common one: access byte, and 0xf00 of limit with G, D, L --- */

#define SELECTORS(X) \
	X(S_DATA, 0x93 | 0xcf00) X(S_DATA_NP, 0x13 | 0xcf00) X(S_DATA_RO, 0x91 | 0xcf00) X(S_DATA_DOWN, 0x97 | 0xcf00) X(S_DATA3, 0xf3 | 0xcf00) \
	X(S_DATA3_NP, 0x73 | 0xcf00) X(S_DATA3_RO, 0xf1 | 0xcf00) X(S_CODE, 0x9b | 0xaf00) X(S_CODE_NP, 0x1b | 0xaf00) X(S_CODE_XO, 0x99 | 0xaf00) \
	X(S_CODE_LD, 0x9b | 0xef00) X(S_CODE32, 0x9b | 0xcf00) X(S_CODE3, 0xfb | 0xaf00) X(S_CONF, 0x9f | 0xaf00) X(S_CONF3, 0xff | 0xaf00) \
	X(S_CONF_NP, 0x1f | 0xaf00) X(S_CODE3_NP, 0x7b | 0xaf00) X(S_TSS16, 0x81) X(S_TSS16_HIGH, 0) X(S_LDT, 0x82) X(S_LDT_HIGH, 0) X(S_LDT_NP, 0x02) \
	X(S_LDT_NP_HIGH, 0) X(S_TSS_NP, 0x09) X(S_TSS_NP_HIGH, 0) X(S_TSS_BUSY, 0x8b) X(S_TSS_BUSY_HIGH, 0) X(S_INT_GATE, 0x8e) X(S_INT_GATE_HIGH, 0) \
	X(S_GATE, 0x8c) X(S_GATE_HIGH, 0) X(S_RESERVED, 0x80) X(S_RESERVED_HIGH, 0) X(S_FRESH, 0x92 | 0xcf00) X(S_FRESH_CODE, 0x9a | 0xaf00)
enum {
	S_START = 15 * 8, /* the copy has 16 */
#define ENUM(name, attr) name##_, name = name##_ + 7,
	SELECTORS(ENUM) S_END_,
	S_AFTER = S_END_ + 7
};
static const u16 attributes[] = {
#define ATTRIBUTE(name, attr) attr,
	SELECTORS(ATTRIBUTE)
};

static u64 table[256] __attribute__((aligned(16)));

struct table_pointer {
	u16 limit;
	u64 base;
} __attribute__((packed));

static void load_gdt(void)
{
	for (unsigned i = 0; i < 16; i++)
		table[i] = gdt[i];
	for (unsigned i = 0; i < sizeof(attributes) / 2; i++) {
		u64 a = attributes[i];
		bool high = !a, system = !(a & 0x10);
		table[16 + i] = high ? 0 : (system ? 0x67 : 0xffff) | (a & 0xff) << 40 | (a >> 8 & 0xff) << 48;
	}
	struct table_pointer p = { S_AFTER - 1, (u64)table };
	__asm__ volatile("lgdt %0\n lldt %w1" : : "m"(p), "r"(0)); /* after RESET there is an LDT at address 0 (SDM 3A table 10-1) */
}

#define DATA VA(0x10)
#define ABSENT VA(0x14)
#define LOW 0xc0000000ull /* a user page that far pointers reach */

/* --- loads and far transfers --- */

SNIPPET(op_ds, "mov %ecx, %ds\n ud2");
SNIPPET(op_es, "mov %ecx, %es\n ud2");
SNIPPET(op_fs, "mov %ecx, %fs\n ud2");
SNIPPET(op_gs, "mov %ecx, %gs\n ud2");
SNIPPET(op_pop_fs, "pop %fs\n ud2");
SNIPPET(op_lgs, "lgs (%rsp), %eax\n ud2");
SNIPPET(op_ss, "mov %ecx, %ss\n ud2");
SNIPPET(op_lss, "lss (%rsp), %eax\n ud2");
SNIPPET(op_lldt, "lldt %cx\n ud2");
SNIPPET(op_ltr, "ltr %cx\n ud2");
SNIPPET(op_ljmp, "ljmp *(%rdi)");
SNIPPET(op_lcall, "lcall *(%rdi)");
SNIPPET(op_lret, "lretq");
SNIPPET(op_lretn, "lretq $16");
SNIPPET(op_iret, "iretq");
SNIPPET(landing, "ud2");

enum op { O_DATA, O_SS, O_LLDT, O_LTR, O_JUMP, O_RETURN, O_RETURN_SS };
enum { OK = UD };
#define SEL 0xffff /* the error code is the selector without RPL */

static const struct row {
	const char *name;
	u8 op, user;
	u16 sel;
	u8 vector;
	u16 error;
} rows[] = {
#define R(op, user, sel, vector, error) { #op " " #sel, op, user, sel, vector, error },
	R(O_DATA, 0, S_DATA, OK, 0) R(O_DATA, 0, S_DATA_NP, NP, SEL) R(O_DATA, 0, S_DATA_RO, OK, 0) R(O_DATA, 0, S_DATA_DOWN, OK, 0)
	R(O_DATA, 0, S_DATA3, OK, 0) R(O_DATA, 0, S_DATA3 | 3, OK, 0) R(O_DATA, 0, S_DATA | 3, GP, SEL) R(O_DATA, 0, S_DATA | 1, GP, SEL)
	R(O_DATA, 0, S_CODE, OK, 0) R(O_DATA, 0, S_CODE | 3, GP, SEL) R(O_DATA, 0, S_CODE_XO, GP, SEL) R(O_DATA, 0, S_CONF | 3, OK, 0)
	R(O_DATA, 0, S_CODE_NP, NP, SEL) R(O_DATA, 0, S_TSS_BUSY, GP, SEL) R(O_DATA, 0, S_LDT, GP, SEL) R(O_DATA, 0, S_GATE, GP, SEL)
	R(O_DATA, 0, S_RESERVED, GP, SEL) R(O_DATA, 0, S_AFTER, GP, SEL) R(O_DATA, 0, S_AFTER | 3, GP, SEL) R(O_DATA, 0, S_DATA | 4, GP, SEL)
	R(O_DATA, 0, 0xfff8, GP, SEL) R(O_DATA, 0, 0, OK, 0) R(O_DATA, 0, 3, OK, 0)
	R(O_DATA, 1, S_DATA, GP, SEL) R(O_DATA, 1, S_DATA3 | 3, OK, 0) R(O_DATA, 1, S_DATA3, OK, 0) R(O_DATA, 1, S_CODE, GP, SEL)
	R(O_DATA, 1, S_CONF, OK, 0) R(O_DATA, 1, S_DATA3_NP | 3, NP, SEL) R(O_DATA, 1, S_CODE3 | 3, OK, 0) R(O_DATA, 1, 0, OK, 0)
	R(O_SS, 0, S_DATA, OK, 0) R(O_SS, 0, S_DATA_RO, GP, SEL) R(O_SS, 0, S_DATA_DOWN, OK, 0) R(O_SS, 0, S_DATA3, GP, SEL)
	R(O_SS, 0, S_DATA | 3, GP, SEL) R(O_SS, 0, S_DATA3 | 3, GP, SEL) R(O_SS, 0, S_DATA_NP, SS, SEL) R(O_SS, 0, S_DATA3_NP, GP, SEL)
	R(O_SS, 0, S_CODE, GP, SEL) R(O_SS, 0, S_TSS_BUSY, GP, SEL) R(O_SS, 0, S_AFTER, GP, SEL) R(O_SS, 0, S_DATA | 4, GP, SEL) R(O_SS, 0, 0, OK, 0)
	R(O_SS, 0, 3, GP, 0) R(O_SS, 0, 1, GP, 0)
	R(O_SS, 1, S_DATA3 | 3, OK, 0) R(O_SS, 1, 0, GP, 0) R(O_SS, 1, 3, GP, 0) R(O_SS, 1, S_DATA3, GP, SEL) R(O_SS, 1, S_DATA3_NP | 3, SS, SEL)
	R(O_SS, 1, S_DATA, GP, SEL) R(O_SS, 1, S_DATA | 3, GP, SEL) R(O_SS, 1, S_DATA3_RO | 3, GP, SEL)
	R(O_LLDT, 0, S_LDT_NP, NP, SEL) R(O_LLDT, 0, S_DATA, GP, SEL) R(O_LLDT, 0, S_TSS_BUSY, GP, SEL) R(O_LLDT, 0, S_LDT | 4, GP, SEL)
	R(O_LLDT, 0, S_AFTER, GP, SEL) R(O_LLDT, 0, S_LDT | 3, OK, 0) R(O_LLDT, 0, S_LDT, OK, 0) R(O_LLDT, 0, 3, OK, 0) R(O_LLDT, 0, 0, OK, 0)
	R(O_LLDT, 1, S_LDT, GP, 0)
	R(O_LTR, 0, 0, GP, 0) R(O_LTR, 0, 3, GP, 0) R(O_LTR, 0, S_TSS_BUSY, GP, SEL) R(O_LTR, 0, S_TSS_NP, NP, SEL) R(O_LTR, 0, S_DATA, GP, SEL)
	R(O_LTR, 0, S_TSS16, GP, SEL) R(O_LTR, 0, S_LDT, GP, SEL) R(O_LTR, 0, S_AFTER, GP, SEL) R(O_LTR, 0, S_TSS_NP | 4, GP, SEL)
	R(O_JUMP, 0, S_CODE, OK, 0) R(O_JUMP, 0, S_CODE_NP, NP, SEL) R(O_JUMP, 0, S_CODE_XO, OK, 0) R(O_JUMP, 0, S_CODE_LD, GP, SEL)
	R(O_JUMP, 0, S_CODE3, GP, SEL) R(O_JUMP, 0, S_CODE3 | 3, GP, SEL) R(O_JUMP, 0, S_CODE | 3, GP, SEL) R(O_JUMP, 0, S_CONF, OK, 0)
	R(O_JUMP, 0, S_CONF | 3, OK, 0) R(O_JUMP, 0, S_CONF3, GP, SEL) R(O_JUMP, 0, S_CONF_NP, NP, SEL) R(O_JUMP, 0, S_DATA, GP, SEL)
	R(O_JUMP, 0, S_TSS_BUSY, GP, SEL) R(O_JUMP, 0, S_TSS_NP, GP, SEL) R(O_JUMP, 0, S_INT_GATE, GP, SEL) R(O_JUMP, 0, S_LDT, GP, SEL) R(O_JUMP, 0, 0, GP, 0)
	R(O_JUMP, 0, 3, GP, 0) R(O_JUMP, 0, S_AFTER, GP, SEL) R(O_JUMP, 0, S_CODE | 4, GP, SEL) R(O_JUMP, 0, S_RESERVED, GP, SEL)
	R(O_JUMP, 1, S_CODE3 | 3, OK, 0) R(O_JUMP, 1, S_CODE3, OK, 0) R(O_JUMP, 1, S_CODE, GP, SEL) R(O_JUMP, 1, S_CODE | 3, GP, SEL)
	R(O_JUMP, 1, S_CONF, OK, 0) R(O_JUMP, 1, S_CONF3 | 3, OK, 0) R(O_JUMP, 1, S_CODE3_NP | 3, NP, SEL) R(O_JUMP, 1, S_DATA3 | 3, GP, SEL)
	R(O_RETURN, 0, S_CODE, OK, 0) R(O_RETURN, 0, S_CODE_NP, NP, SEL) R(O_RETURN, 0, S_CODE_LD, GP, SEL) R(O_RETURN, 0, S_CODE3, GP, SEL)
	R(O_RETURN, 0, S_CODE | 3, GP, SEL) R(O_RETURN, 0, S_CODE | 1, GP, SEL) R(O_RETURN, 0, S_CONF, OK, 0) R(O_RETURN, 0, S_CONF3, GP, SEL)
	R(O_RETURN, 0, S_DATA, GP, SEL) R(O_RETURN, 0, S_TSS_BUSY, GP, SEL) R(O_RETURN, 0, 0, GP, 0) R(O_RETURN, 0, 3, GP, 0) R(O_RETURN, 0, S_AFTER, GP, SEL)
	R(O_RETURN, 0, S_CODE3 | 3, OK, 0) R(O_RETURN, 0, S_CONF | 3, OK, 0) R(O_RETURN, 0, S_CONF3 | 3, OK, 0) R(O_RETURN, 0, S_CODE3_NP | 3, NP, SEL)
	R(O_RETURN, 1, S_CODE3 | 3, OK, 0) R(O_RETURN, 1, S_CONF | 3, OK, 0) R(O_RETURN, 1, S_CODE3, GP, SEL) R(O_RETURN, 1, S_CODE, GP, SEL)
	R(O_RETURN, 1, S_CODE3_NP | 3, NP, SEL) R(O_RETURN, 1, 3, GP, 0)
	R(O_RETURN_SS, 0, 0, GP, 0) R(O_RETURN_SS, 0, 3, GP, 0) R(O_RETURN_SS, 0, S_DATA, GP, SEL) R(O_RETURN_SS, 0, S_DATA3, GP, SEL)
	R(O_RETURN_SS, 0, S_DATA3_NP | 3, SS, SEL) R(O_RETURN_SS, 0, S_DATA3_RO | 3, GP, SEL) R(O_RETURN_SS, 0, S_CODE3 | 3, GP, SEL)
	R(O_RETURN_SS, 0, S_AFTER | 3, GP, SEL) R(O_RETURN_SS, 0, S_DATA3 | 3, OK, 0)
};

static void try_row(const struct row *r, const u8 *code, u64 returns)
{
	u64 target = r->user || (r->op >= O_RETURN && (r->sel & 3) == 3) || r->op == O_RETURN_SS ? LOW : (u64)landing;
	struct frame f = r->user ? user_frame(user_alias(code), 0) : kernel_frame(code);
	u64 *m = (u64 *)DATA;
	bool outer = !r->user && (r->op == O_RETURN_SS || (r->sel & 3) == 3);
	f.rcx = r->sel;
	f.rdi = f.rsp = DATA;
	f.rflags |= F_CF | F_ZF;
	m[8] = m[9] = 0;
	if (r->op == O_DATA || r->op == O_SS) {
		m[0] = code == op_pop_fs ? r->sel : (u64)r->sel << 32 | 0x1234;
	} else if (r->op == O_JUMP) {
		m[0] = target | (u64)r->sel << 32;
		f.rsp = DATA + 72;
	} else if (r->op >= O_RETURN) {
		u16 ss = r->op == O_RETURN_SS ? r->sel : r->user || outer ? UDATA : KDATA;
		u16 cs = r->op == O_RETURN_SS ? S_CODE3 | 3 : r->sel;
		u64 with[] = { target, cs, 2 | F_CF | F_ZF, DATA + 256, ss };
		u64 without[] = { target, cs, DATA + 256, ss };
		u64 popped[] = { target, cs, 0, 0, DATA + 256, ss };
		copy(m, code == op_iret ? with : code == op_lretn ? popped : without, 48);
	}
	u64 rsp = f.rsp;
	exec(&f);
	u16 cs = r->user ? UCODE : KCODE;
	check_cell(r->name, "vector", f.vector, r->vector);
	check_cell(r->name, "error code", f.error, r->error == SEL ? r->sel & ~3u : r->error);
	check_cell(r->name, "status flags", f.rflags & STATUS, F_CF | F_ZF);
	if (r->vector != OK) {
		check_cell(r->name, "RIP", f.rip, r->user ? user_alias(code) : (u64)code);
		check_cell(r->name, "RSP", f.rsp, rsp);
		check_cell(r->name, "CS", f.cs, cs);
		return;
	}
	switch (r->op) {
	case O_JUMP:
	case O_RETURN:
	case O_RETURN_SS:
		cs = r->op == O_RETURN_SS ? S_CODE3 | 3 : r->op == O_RETURN ? r->sel : (r->sel & ~3) | (r->user ? 3 : 0);
		check_cell(r->name, "CS", f.cs, cs);
		check_cell(r->name, "RIP", f.rip, target);
		if (r->op == O_JUMP && code == op_lcall) {
			check_cell(r->name, "pushed", m[8] & 0xffffffff, (u32)((r->user ? user_alias(op_lcall_end) : (u64)op_lcall_end)));
			check_cell(r->name, "RSP", f.rsp, rsp - 8);
		} else if (r->op != O_JUMP) {
			check_cell(r->name, "RSP", f.rsp, outer || code == op_iret ? DATA + 256 + (code == op_lretn ? 16 : 0) : rsp + returns);
		}
		break;
	case O_SS:
		check_cell(r->name, "SS", f.ss, r->sel);
	}
}

static void selectors(void)
{
	section("segment loads, far jumps, calls and returns");
	static const struct {
		u8 op, returns;
		const u8 *code;
	} ops[] = { { O_DATA, 0, op_ds }, { O_DATA, 0, op_es }, { O_DATA, 0, op_fs }, { O_DATA, 0, op_gs }, { O_DATA, 0, op_pop_fs }, { O_DATA, 0, op_lgs },
		    { O_SS, 0, op_ss }, { O_SS, 0, op_lss }, { O_LLDT, 0, op_lldt }, { O_LTR, 0, op_ltr }, { O_JUMP, 0, op_ljmp }, { O_JUMP, 0, op_lcall },
		    { O_RETURN, 16, op_lret }, { O_RETURN, 32, op_lretn }, { O_RETURN, 40, op_iret }, { O_RETURN_SS, 0, op_lret }, { O_RETURN_SS, 0, op_lretn },
		    { O_RETURN_SS, 0, op_iret } };
	bool no_iret = skipping("IRET", "iret-checks"), no_ltr = skipping("LTR", "ltr-16");
	for (unsigned i = 0; i < sizeof(rows) / sizeof(rows[0]); i++)
		for (unsigned k = 0; k < sizeof(ops) / sizeof(ops[0]); k++)
			if (ops[k].op == rows[i].op && !(no_iret && ops[k].code == op_iret) && !(no_ltr && ops[k].op == O_LTR))
				try_row(&rows[i], ops[k].code, ops[k].returns);
	check_cell("accessed bit", "of what was looked at only", table[S_FRESH / 8] >> 40 & 1, 0);
	__asm__ volatile("mov %0, %%ds\n mov %1, %%ds" : : "r"(S_FRESH), "r"(KDATA));
	check_cell("accessed bit", "by MOV DS", table[S_FRESH / 8] >> 40 & 1, 1);
	static const struct row fresh = { "accessed bit", O_JUMP, 0, S_FRESH_CODE, OK, 0 };
	try_row(&fresh, op_ljmp, 0);
	check_cell("accessed bit", "by far JMP", table[S_FRESH_CODE / 8] >> 40 & 1, 1);
}

SNIPPET(inquire, "xor %eax, %eax\n xor %ebx, %ebx\n xor %r8d, %r8d\n verr %cx\n setz %r8b\n verw %cx\n setz %al\n lea (%r8,%rax,2), %r8d\n"
		 "xor %eax, %eax\n lar %ecx, %edx\n setz %al\n lea (%r8,%rax,4), %r8d\n lsl %ecx, %ebx\n setz %al\n lea (%r8,%rax,8), %r8d\n ud2");

/* VERR 1, VERW 2, LAR 4, LSL 8 succeed (SDM 2A, 2B: LAR table 3-53, LSL table 3-56, 64-bit columns). */
static void inquiries(void)
{
	section("VERR, VERW, LAR, LSL");
	bool no_user = skipping("inquiries in user mode", "user-lar");
	static const struct {
		const char *name;
		u16 sel;
		u8 kernel, user;
	} t[] = {
#define Q(sel, kernel, user) { #sel, sel, kernel, user },
		Q(S_DATA, 15, 0) Q(S_DATA | 3, 0, 0) Q(S_DATA_NP, 15, 0) Q(S_DATA_RO, 13, 0) Q(S_DATA3 | 3, 15, 15) Q(S_DATA3, 15, 15) Q(S_CODE, 13, 0)
		Q(S_CODE_XO, 12, 0) Q(S_CONF, 13, 13) Q(S_CONF | 3, 13, 13) Q(S_TSS_BUSY, 12, 0) Q(S_TSS_NP, 12, 0) Q(S_LDT, 12, 0) Q(S_INT_GATE, 0, 0)
		Q(S_GATE, 4, 0) Q(S_RESERVED, 0, 0) Q(S_TSS16, 0, 0) Q(0, 0, 0) Q(3, 0, 0) Q(S_AFTER, 0, 0) Q(S_DATA | 4, 0, 0)
	};
	for (unsigned i = 0; i < sizeof(t) / sizeof(t[0]); i++)
		for (unsigned user = 0; user < 2; user++) {
			if (user && no_user)
				continue;
			struct frame f = user ? user_frame(user_alias(inquire), DATA) : kernel_frame(inquire);
			u64 d = table[(t[i].sel & 0x7ff) / 8];
			u8 want = user ? t[i].user : t[i].kernel;
			f.rcx = t[i].sel;
			f.rdx = 0x77;
			exec(&f);
			check_cell(t[i].name, user ? "answers in user mode" : "answers in kernel mode", f.r8, want);
			check_cell(t[i].name, "LAR", f.rdx, want & 4 ? d >> 32 & 0xf0ff00 : 0x77);
			check_cell(t[i].name, "LSL", f.rbx, want & 8 ? (d >> 55 & 1 ? 0xffffffff : 0x67) : 0);
		}
}

SNIPPET(show_ds, "mov %ds, %eax\n mov %es, %ebx\n mov %fs, %ecx\n mov %gs, %edx\n ud2");

static void dropped(void)
{
	if (!section_unless("data segments dropped on the way out", "drop-conforming"))
		return;
	u64 *m = (u64 *)DATA;
	for (unsigned i = 0; i < 2; i++) {
		__asm__ volatile("mov %0, %%ds\n mov %1, %%es\n mov %2, %%fs\n mov %3, %%gs" : : "r"(S_DATA), "r"(S_CONF), "r"(S_DATA3 | 3), "r"(S_CODE));
		struct frame f = kernel_frame(i ? op_iret : op_lret);
		u64 with[] = { user_alias(show_ds), UCODE, 2, DATA + 256, UDATA };
		u64 without[] = { user_alias(show_ds), UCODE, DATA + 256, UDATA };
		copy(m, i ? with : without, 40);
		f.rsp = DATA;
		exec(&f);
		__asm__ volatile("mov %0, %%ds\n mov %0, %%es\n mov %1, %%fs\n mov %1, %%gs" : : "r"(KDATA), "r"(0));
		const char *name = i ? "IRET" : "far RET";
		check_cell(name, "DS, DPL 0", f.rax, 0);
		check_cell(name, "ES, conforming code", f.rbx, S_CONF);
		check_cell(name, "FS, DPL 3", f.rcx, S_DATA3 | 3);
		check_cell(name, "GS, code of DPL 0", f.rdx, 0);
	}
}

/* --- call gates --- */

SNIPPET(gate_in, "mov %rsp, %rbx\n mov (%rsp), %rcx\n mov 8(%rsp), %rdx\n mov 16(%rsp), %rsi\n mov 24(%rsp), %r8\n mov %ss, %r9d\n ud2");

static void gates(void)
{
	section("call gates");
	bool no_user = skipping("call gates in user mode", "user-gate");
	static const struct {
		const char *name;
		u8 user, jmp, access, rpl;
		u16 target, high;
		u8 vector;
		u16 error;
	} t[] = {
		{ "same level", 0, 0, 0x8c, 0, S_CODE, 0, OK, 0 }, { "from user mode", 1, 0, 0xec, 3, S_CODE, 0, OK, 0 },
		{ "RPL of the target ignored", 0, 0, 0x8c, 0, S_CODE | 3, 0, OK, 0 }, { "JMP, same level", 0, 1, 0x8c, 0, S_CODE, 0, OK, 0 },
		{ "DPL below CPL", 1, 0, 0x8c, 0, S_CODE, 0, GP, S_GATE }, { "DPL below RPL", 0, 0, 0x8c, 3, S_CODE, 0, GP, S_GATE },
		{ "not present", 0, 0, 0x0c, 0, S_CODE, 0, NP, S_GATE }, { "not present, DPL first", 1, 0, 0x0c, 3, S_CODE, 0, GP, S_GATE },
		{ "null target", 0, 0, 0x8c, 0, 0, 0, GP, 0 }, { "32-bit target", 0, 0, 0x8c, 0, S_CODE32, 0, GP, S_CODE32 },
		{ "data target", 0, 0, 0x8c, 0, S_DATA, 0, GP, S_DATA }, { "target not present", 0, 0, 0x8c, 0, S_CODE_NP, 0, NP, S_CODE_NP },
		{ "target L and D", 0, 0, 0x8c, 0, S_CODE_LD, 0, GP, S_CODE_LD }, { "target of DPL 3", 0, 0, 0x8c, 0, S_CODE3, 0, GP, S_CODE3 },
		{ "target outside", 0, 0, 0x8c, 0, S_AFTER, 0, GP, S_AFTER }, { "upper type", 0, 0, 0x8c, 0, S_CODE, 0x100, GP, S_GATE },
		{ "JMP to an inner level", 1, 1, 0xec, 3, S_CODE, 0, GP, S_CODE }, { "JMP to conforming", 1, 1, 0xec, 3, S_CONF, 0, OK, 0 },
		{ "CALL to conforming", 1, 0, 0xec, 3, S_CONF, 0, OK, 0 }, { "16-bit gate", 0, 0, 0x84, 0, S_CODE, 0, GP, S_GATE },
		{ "task gate", 0, 0, 0x85, 0, S_CODE, 0, GP, S_GATE },
	};
	u64 *m = (u64 *)DATA, rsp0 = *(u64 *)(void *)((u8 *)tss_of(0) + 4);
	for (unsigned i = 0; i < sizeof(t) / sizeof(t[0]); i++) {
		if (no_user && t[i].user)
			continue;
		bool conforming = t[i].target == S_CONF, inner = t[i].user && !conforming;
		u64 at = conforming && t[i].user ? user_alias(gate_in) : (u64)gate_in;
		table[S_GATE / 8] = (at & 0xffff) | (u64)t[i].target << 16 | (u64)t[i].access << 40 | (at >> 16 & 0xffff) << 48;
		table[S_GATE / 8 + 1] = at >> 32 | (u64)t[i].high << 32;
		const u8 *code = t[i].jmp ? op_ljmp : op_lcall;
		struct frame f = t[i].user ? user_frame(user_alias(code), 0) : kernel_frame(code);
		f.rdi = DATA, f.rsp = DATA + 256;
		m[0] = 0x12345678 | (u64)(S_GATE | t[i].rpl) << 32; /* the offset does not count */
		exec(&f);
		check_cell(t[i].name, "vector", f.vector, t[i].vector);
		check_cell(t[i].name, "error code", f.error, t[i].error);
		u64 next = t[i].user ? user_alias(op_lcall_end) : (u64)op_lcall_end;
		if (t[i].vector != OK) {
			check_cell(t[i].name, "RIP", f.rip, t[i].user ? user_alias(code) : (u64)code);
			check_cell(t[i].name, "RSP", f.rsp, DATA + 256);
			continue;
		}
		check_cell(t[i].name, "CS", f.cs, (t[i].target & ~3) | (t[i].user && conforming ? 3 : 0));
		check_cell(t[i].name, "RIP", f.rip, at + gate_in_end - gate_in - 2);
		check_cell(t[i].name, "RSP", f.rbx, t[i].jmp ? DATA + 256 : inner ? rsp0 - 32 : DATA + 240);
		if (t[i].jmp)
			continue;
		check_cell(t[i].name, "pushed RIP", f.rcx, next);
		check_cell(t[i].name, "pushed CS", f.rdx, t[i].user ? UCODE : KCODE);
		if (inner) {
			check_cell(t[i].name, "pushed RSP", f.rsi, DATA + 256);
			check_cell(t[i].name, "pushed SS", f.r8, UDATA);
			check_cell(t[i].name, "SS", f.r9, 0);
		}
	}
}

/* --- gates of the IDT --- */

SNIPPET(int_90, "int $0x90\n ud2");
SNIPPET(use_x87, "fld1\n ud2");
SNIPPET(show, "mov %rsp, %rbx\n mov (%rsp), %rcx\n mov 8(%rsp), %rdx\n mov 16(%rsp), %rsi\n mov 24(%rsp), %r8\n mov 32(%rsp), %r9\n mov %ss, %r10d\n"
	      "pushf\n pop %r11\n ud2");

/* Error codes: the IDT entry's, the target's, none; each with EXT if it was not INT n. */
enum { E_IDT, E_SEL, E_ZERO };

static void set_raw_gate(unsigned vector, u64 to, u16 sel, u8 access, unsigned ist)
{
	idt[vector][0] = (to & 0xffff) | (u64)sel << 16 | (u64)ist << 32 | (u64)access << 40 | (to >> 16 & 0xffff) << 48;
	idt[vector][1] = to >> 32;
}

static void interrupts(void)
{
	section("gates in the IDT");
	static const struct {
		const char *name;
		u16 sel;
		u8 access, vector, error;
		bool far;
	} t[] = {
		{ "interrupt gate", S_CODE, 0x8e, OK, 0, 0 }, { "trap gate", S_CODE, 0x8f, OK, 0, 0 }, { "execute-only", S_CODE_XO, 0x8e, OK, 0, 0 },
		{ "conforming", S_CONF, 0x8e, OK, 0, 0 }, { "RPL ignored", S_CODE | 3, 0x8e, OK, 0, 0 }, { "not present", S_CODE, 0x0e, NP, E_IDT, 0 },
		{ "16-bit", S_CODE, 0x86, GP, E_IDT, 0 }, { "task gate", S_CODE, 0x85, GP, E_IDT, 0 }, { "call gate", S_CODE, 0x8c, GP, E_IDT, 0 },
		{ "zero", S_CODE, 0x80, GP, E_IDT, 0 }, { "not a system type", S_CODE, 0x9e, GP, E_IDT, 0 }, { "type before P", S_CODE, 0x06, GP, E_IDT, 0 },
		{ "null target", 0, 0x8e, GP, E_ZERO, 0 }, { "null target, RPL 3", 3, 0x8e, GP, E_ZERO, 0 }, { "data target", S_DATA, 0x8e, GP, E_SEL, 0 },
		{ "target not present", S_CODE_NP, 0x8e, NP, E_SEL, 0 }, { "32-bit target", S_CODE32, 0x8e, GP, E_SEL, 0 },
		{ "target L and D", S_CODE_LD, 0x8e, GP, E_SEL, 0 }, { "target of DPL 3", S_CODE3, 0x8e, GP, E_SEL, 0 },
		{ "TSS as target", S_TSS_BUSY, 0x8e, GP, E_SEL, 0 }, { "target outside", S_AFTER, 0x8e, GP, E_SEL, 0 },
		{ "target in the LDT", S_CODE | 4, 0x8e, GP, E_SEL, 0 }, { "not canonical", S_CODE, 0x8e, GP, E_ZERO, 1 },
	};
	u64 nm[2] = { idt[NM][0], idt[NM][1] }, cr0 = read_cr0();
	for (unsigned i = 0; i < sizeof(t) / sizeof(t[0]); i++)
		for (unsigned hw = 0; hw < 2; hw++) {
			unsigned vector = hw ? NM : 0x90;
			const u8 *code = hw ? use_x87 : int_90;
			set_raw_gate(vector, t[i].far ? 0x800000000000 : (u64)show, t[i].sel, t[i].access, 0);
			if (hw)
				write_cr0(cr0 | 8);
			struct frame f = kernel_frame(code);
			f.rsp = DATA + 1024;
			f.rflags |= F_CF | F_IF | F_NT | F_AC | F_DF | F_ID;
			exec(&f);
			write_cr0(cr0);
			u32 error = t[i].error == E_IDT ? vector * 8 + 2 : t[i].error == E_SEL ? t[i].sel & ~3u : 0;
			check_cell(t[i].name, "vector", f.vector, t[i].vector);
			if (t[i].vector != OK) {
				check_cell(t[i].name, hw ? "error code with EXT" : "error code", f.error, error | hw);
				check_cell(t[i].name, "RIP", f.rip, (u64)code);
				check_cell(t[i].name, "RSP", f.rsp, DATA + 1024);
				continue;
			}
			u64 flags = 2 | F_CF | F_IF | F_NT | F_AC | F_DF | F_ID;
			check_cell(t[i].name, "RIP", f.rip, (u64)show_end - 2);
			check_cell(t[i].name, "CS", f.cs, t[i].sel & ~3u);
			check_cell(t[i].name, "RSP", f.rbx, DATA + 1024 - 40);
			check_cell(t[i].name, "pushed RIP", f.rcx, (u64)code + (hw ? 0 : 2));
			check_cell(t[i].name, "pushed CS", f.rdx, KCODE);
			check_cell(t[i].name, "pushed RFLAGS", f.rsi, flags | (hw ? F_RF : 0));
			check_cell(t[i].name, "pushed RSP", f.r8, DATA + 1024);
			check_cell(t[i].name, "pushed SS", f.r9, KDATA);
			check_cell(t[i].name, "SS", f.r10, KDATA);
			check_cell(t[i].name, "RFLAGS inside", f.r11, flags & ~(u64)(F_NT | (t[i].access & 1 ? 0 : F_IF)));
		}
	idt[NM][0] = nm[0], idt[NM][1] = nm[1];
	set_raw_gate(0x90, (u64)show, S_CODE, 0x8e, 0);
	struct table_pointer p = { 0x90 * 16 + 14, (u64)idt };
	__asm__ volatile("lidt %0" : : "m"(p));
	struct frame f = kernel_frame(int_90);
	exec(&f);
	check_cell("half outside the IDT", "vector", f.vector, GP);
	check_cell("half outside the IDT", "error code", f.error, 0x90 * 8 + 2);
	__asm__ volatile("lidt %0" : : "m"(idt_ptr));
	if (!section_unless("from user mode through a conforming segment", "user-int"))
		return;
	set_raw_gate(0x90, LOW, S_CONF, 0xee, 0);
	f = user_frame(user_alias(int_90), DATA + 1000);
	exec(&f);
	check_cell("conforming", "vector", f.vector, UD);
	check_cell("conforming", "CS", f.cs, S_CONF | 3);
	check_cell("conforming", "RIP", f.rip, LOW);
	check_cell("conforming", "RSP", f.rsp, ((DATA + 1000) & ~15ull) - 40);
	check_cell("conforming", "SS", f.ss, UDATA);
}

static u64 *ist_of(unsigned n)
{
	return (u64 *)(void *)((u8 *)tss_of(0) + 0x1c + 8 * n);
}

static void stacks(void)
{
	section("IST and RSP0");
	bool no_user = skipping("IST and RSP0 from user mode", "user-int");
	u64 saved[8], rsp0 = *(u64 *)(void *)((u8 *)tss_of(0) + 4);
	for (unsigned n = 1; n < 8; n++) {
		saved[n] = *ist_of(n);
		if (n > 3)
			*ist_of(n) = DATA + 256 * n + n; /* to be aligned */
	}
	for (unsigned n = 0; n < 8; n++)
		for (unsigned user = 0; user < (no_user ? 1 : 2); user++) {
			set_raw_gate(0x90, (u64)show, KCODE, 0xee, n);
			struct frame f = user ? user_frame(user_alias(int_90), DATA + 101) : kernel_frame(int_90);
			f.rsp = DATA + 101;
			exec(&f);
			const char *name = user ? "from user mode" : "from kernel mode";
			u64 top = n ? *ist_of(n) : user ? rsp0 : DATA + 101;
			check_cell(name, "vector", f.vector, UD);
			check_cell(name, "RSP", f.rbx, (top & ~15ull) - 40);
			check_cell(name, "pushed RSP", f.r8, DATA + 101);
			check_cell(name, "pushed SS", f.r9, user ? UDATA : KDATA);
			check_cell(name, "SS", f.r10, user ? 0 : KDATA);
		}
	for (unsigned n = 1; n < 8; n++)
		*ist_of(n) = saved[n];
	section("a TSS that is too short");
	for (unsigned hw = 0; hw < 2; hw++) {
		u64 desc = table[8], cr0 = read_cr0();
		u64 nm = idt[NM][0];
		/* IST1 is within, IST2 is not */
		table[8] = (desc & ~(0xffffull | 2ull << 40)) | 0x32;
		__asm__ volatile("ltr %0" : : "r"((u16)0x40));
		set_raw_gate(0x90, (u64)show, KCODE, 0xee, 2);
		idt[NM][0] = (nm & ~(7ull << 32)) | 2ull << 32;
		struct frame f = kernel_frame(hw ? use_x87 : int_90);
		write_cr0(hw ? cr0 | 8 : cr0);
		exec(&f);
		write_cr0(cr0);
		check_cell("IST outside the TSS", "vector", f.vector, TS);
		check_cell("IST outside the TSS", "error code", f.error, 0x40 | hw);
		idt[NM][0] = nm;
		table[8] = desc & ~(2ull << 40);
		__asm__ volatile("ltr %0" : : "r"((u16)0x40));
	}
}

/* --- a fault on the way to a handler --- */

SNIPPET(f_ud, "ud2");
SNIPPET(f_de, "div %ecx");
SNIPPET(f_gp, "hlt");
SNIPPET(f_pf, "mov (%r9), %al");
SNIPPET(f_ss, "mov (%rbp), %al");
SNIPPET(f_np, "mov %r8d, %ds");
SNIPPET(f_bp, "int3");
SNIPPET(f_ac, "mov 1(%rdi), %ax");

/* The first fault's gate is spoilt; then what comes of it. */
enum spoil { NO_GATE, NO_TARGET, NO_STACK, BAD_STACK };

static void double_faults(void)
{
	section("faults while delivering");
	bool no_np = skipping("gates that are not present, and benign exceptions", "np-df"), no_pf = skipping("absent stacks", "pf-df"), no_nm = skipping("#NM", "user-ts");
	enum class { SOFT, BENIGN, CONTRIBUTORY, PAGE };
	static const struct {
		const char *name;
		const u8 *code;
		u8 vector, class;
	} first[] = { { "#UD", f_ud, UD, BENIGN }, { "#DE", f_de, DE, CONTRIBUTORY }, { "#GP", f_gp, GP, CONTRIBUTORY }, { "#PF", f_pf, PF, PAGE },
		      { "#SS", f_ss, SS, CONTRIBUTORY }, { "#NP", f_np, NP, CONTRIBUTORY }, { "INT3", f_bp, BP, SOFT }, { "#NM", use_x87, NM, BENIGN },
		      { "#AC", f_ac, AC, BENIGN } };
	static const char *what[] = { "gate not present", "null target", "stack absent", "stack not canonical" };
	u64 cr0 = read_cr0(), ist3 = *ist_of(3);
	for (unsigned i = 0; i < sizeof(first) / sizeof(first[0]); i++)
		for (unsigned s = NO_GATE; s <= BAD_STACK; s++) {
			u8 v = first[i].vector, class = first[i].class;
			if ((no_np && (s == NO_GATE || class <= BENIGN)) || (no_pf && s == NO_STACK && class == CONTRIBUTORY) || (no_nm && v == NM))
				continue;
			/* the second fault's own handler must be whole */
			if ((s == NO_GATE && v == NP) || (s == NO_TARGET && v == GP) || (s == BAD_STACK && v == SS))
				class = CONTRIBUTORY;
			u64 old[2] = { idt[v][0], idt[v][1] };
			*ist_of(3) = s == NO_STACK ? ABSENT + 4096 : s == BAD_STACK ? 0x800000000000 + 64 : ist3;
			set_raw_gate(v, (u64)(vectors + 16 * v), s == NO_TARGET ? 0 : KCODE, s == NO_GATE ? 0x6e : 0xee, s >= NO_STACK ? 3 : 1);
			write_cr0(cr0 | 1 << 18 | (v == NM ? 8 : 0));
			struct frame f = user_frame(user_alias(first[i].code), DATA + 512);
			f.rdi = DATA, f.rbp = 0x800000000000, f.r8 = S_DATA3_NP, f.r9 = ABSENT + 8;
			f.rflags |= v == AC ? F_AC : 0;
			exec(&f);
			write_cr0(cr0);
			idt[v][0] = old[0], idt[v][1] = old[1];
			static const u8 second[] = { NP, GP, PF, SS };
			bool twice = class == PAGE || (class == CONTRIBUTORY && s != NO_STACK);
			u32 ext = class != SOFT, error = s == NO_GATE ? v * 8u + 2 + ext : s == NO_STACK ? PF_W : ext;
			check_cell(first[i].name, what[s], f.vector, twice ? DF : second[s]);
			check_cell(first[i].name, "error code", f.error, twice ? 0 : error);
			check_cell(first[i].name, "RIP", f.rip, user_alias(first[i].code));
			check_cell(first[i].name, "CS", f.cs, UCODE);
			check_cell(first[i].name, "RSP", f.rsp, DATA + 512);
			if (s == NO_STACK)
				check_cell(first[i].name, "CR2's page", f.cr2 >> 12, ABSENT >> 12);
			else if (v == PF)
				check_cell(first[i].name, "CR2", f.cr2, ABSENT + 8);
		}
	*ist_of(3) = ist3;
}

void guest_main(void)
{
	map_user_alias();
	u8 *page = page_alloc(1);
	map(DATA, page_alloc(1), P | W | U);
	/* 0xc0000000 becomes a user page: UD2. There is no memory that the identity map would need there. */
	u64 *pdpte = pte_of(boot_pml4, LOW, 3), *pde = pte_of(boot_pml4, LOW, 2);
	u64 *pt = page_alloc(1);
	page[0] = 0x0f, page[1] = 0x0b;
	pt[0] = (u64)page | P | W | U;
	*pdpte |= U;
	*pde = (u64)pt | P | W | U;
	write_cr4(read_cr4() ^ 1 << 7);
	write_cr4(read_cr4() ^ 1 << 7);
	load_gdt();
	selectors();
	inquiries();
	dropped();
	gates();
	interrupts();
	stacks();
	double_faults();
}
