/*
 * Modes and the ways between them: 32-bit and 16-bit protected mode without paging, the same code in compatibility mode, real mode with its
 * interrupt table, unreal mode, CR0.PE toggled under cached descriptors, and what each mode refuses. Every check leaves long mode and comes
 * back. paging32.c has the legacy page tables.
 */
#include "legacy.h"

const char guest_name[] = "mode";

enum { OF = 4, BR = 5 };
enum { FAULT, TRAP, NONE }; /* EIP at the instruction; behind it; nothing happens but the UD2 behind */

#define CODE16 0x3000 /* where 16-bit code is copied to */
#define AREA 0x4000   /* 4 KiB of data */
#define STACK 0x6000

enum { SMALL = LEGACY_FREE, DOWN = SMALL + 8, DOWN16 = DOWN + 8, RO = DOWN16 + 8, XO = RO + 8, NOT_PRESENT = XO + 8, GATE = NOT_PRESENT + 8, BIG16 = GATE + 8,
       SHORT_CODE = BIG16 + 8, CONFORMING = SHORT_CODE + 8, USMALL = CONFORMING + 8 };

static void descriptors(void)
{
	legacy_descriptor(SMALL, AREA, 0xfff, 0x93, 4);
	legacy_descriptor(DOWN, AREA, 0xfff, 0x97, 4);
	legacy_descriptor(DOWN16, AREA, 0xfff, 0x97, 0);
	legacy_descriptor(RO, AREA, 0xfff, 0x91, 4);
	legacy_descriptor(XO, 0, 0xfffff, 0x99, 12);
	legacy_descriptor(NOT_PRESENT, 0, 0xfffff, 0x13, 12);
	legacy_descriptor(BIG16, 0, 0xfffff, 0x93, 8);
	legacy_descriptor(SHORT_CODE, 0, 0xfff, 0x9b, 4);
	legacy_descriptor(CONFORMING, 0, 0xfffff, 0x9f, 12);
	legacy_descriptor(USMALL, AREA, 0xfff, 0xf3, 4);
}

/* 32-bit code. edi: AREA; ds, es flat; fs: SMALL, gs: DOWN; ebp = 0, eax = 5. The area holds 0, 4, 0x8000, SMALL ...
 * X(name, before, instruction, kind, vector, error, EAX at the end) */
#define ROWS32(X) \
	X(limit_last, "", "movb %fs:0xfff, %al", NONE, UD, 0, 0x77) \
	X(limit_past, "", "movb %fs:0x1000, %al", FAULT, GP, 0, 5) \
	X(limit_word, "", "movw %fs:0xfff, %ax", FAULT, GP, 0, 5) \
	X(limit_dword, "", "movl %eax, %fs:0xffd", FAULT, GP, 0, 5) \
	X(limit_negative, "", "movb %fs:-1, %al", FAULT, GP, 0, 5) \
	X(down_below, "", "movb %gs:0xfff, %al", FAULT, GP, 0, 5) \
	X(down_above, "", "movb %gs:0x1000, %ah", NONE, UD, 0, -1) \
	X(down_top, "movl $0, %gs:0xfffffffc", "movl %gs:0xfffffffc, %eax", NONE, UD, 0, 0) \
	X(down_over, "", "movw %gs:0xffffffff, %ax", FAULT, GP, 0, 5) \
	X(down16_top, "mov $96, %eax\n mov %eax, %es", "movb %es:0xffff, %ah", NONE, UD, 0, -1) \
	X(down16_over, "mov $96, %eax\n mov %eax, %es", "movb %es:0x10000, %al", FAULT, GP, 0, 96) \
	X(ro_read, "mov $104, %eax\n mov %eax, %es", "movb %es:4, %al", NONE, UD, 0, 4) \
	X(ro_write, "mov $104, %eax\n mov %eax, %es", "movb %al, %es:0", FAULT, GP, 0, 104) \
	X(ro_inc, "mov $104, %eax\n mov %eax, %es", "incl %es:0", FAULT, GP, 0, 104) \
	X(cs_write, "", "movb %al, %cs:0x4000", FAULT, GP, 0, 5) \
	X(cs_read, "", "movb %cs:0x4004, %al", NONE, UD, 0, 4) \
	X(null_read, "xor %eax, %eax\n mov %eax, %es", "movb %es:0, %al", FAULT, GP, 0, 0) \
	X(null_lea, "xor %eax, %eax\n mov %eax, %es", ".byte 0x26\n lea 7, %eax", NONE, UD, 0, 7) \
	X(ds_xo, "mov $112, %eax", "mov %eax, %ds", FAULT, GP, 112, 112) \
	X(ds_np, "mov $120, %eax", "mov %eax, %ds", FAULT, NP, 120, 120) \
	X(ds_outside, "mov $0x100, %eax", "mov %eax, %ds", FAULT, GP, 0x100, 0x100) \
	X(ss_null, "xor %eax, %eax", "mov %eax, %ss", FAULT, GP, 0, 0) \
	X(ss_np, "mov $120, %eax", "mov %eax, %ss", FAULT, SS, 120, 120) \
	X(bp_limit, "mov %esp, %ecx\n mov $80, %eax\n mov %eax, %ss\n mov $0xf00, %esp", "movb 0x1000(%ebp), %al", FAULT, SS, 0, 80) \
	X(ss_limit, "mov $80, %eax\n mov %eax, %ss\n mov $0xf00, %esp", "movl %ss:0xffe, %eax", FAULT, SS, 0, 80) \
	X(pop_limit, "mov $80, %eax\n mov %eax, %ss\n mov $0xffe, %esp", "pop %eax", FAULT, SS, 0, 80) \
	X(leave_limit, "mov $80, %eax\n mov %eax, %ss\n mov $0xf00, %esp\n mov $0x2000, %ebp", "leave", FAULT, SS, 0, 80) \
	X(wrap_32, "movl $9, 0x4010\n mov $-16, %eax", "movl 0x4020(%eax), %eax", NONE, UD, 0, 9) \
	X(jmp_limit, "", "ljmp $144, $0x1000", FAULT, GP, 0, 5) \
	X(bound_in, "mov $4, %eax", "bound %eax, (%edi)", NONE, UD, 0, 4) \
	X(bound_out, "", "bound %eax, (%edi)", FAULT, BR, 0, 5) \
	X(bound_below, "mov $-1, %eax", "bound %eax, (%edi)", FAULT, BR, 0, -1) \
	X(into_taken, "mov $0x7fffffff, %eax\n inc %eax", "into", TRAP, OF, 0, 0x80000000) \
	X(into_not, "", "into", NONE, UD, 0, 5) \
	X(int_n, "", "int $0x80", TRAP, 0x80, 0, 5) \
	X(int_3, "", "int3", TRAP, BP, 0, 5) \
	X(icebp, "", ".byte 0xf1", TRAP, DB, 0, 5) \
	X(aam, "mov $47, %al", "aam", NONE, UD, 0, 0x407) \
	X(aam_0, "", "aam $0", FAULT, DE, 0, 5) \
	X(aad, "mov $0x407, %eax", "aad", NONE, UD, 0, 47) \
	X(daa, "mov $0x3c, %al\n clc", "daa", NONE, UD, 0, 0x42) \
	X(rex_is_inc, "", ".byte 0x40, 0x48, 0x40", NONE, UD, 0, 6) \
	X(pusha, "push $3", "pusha\n popa\n pop %eax", NONE, UD, 0, 3) \
	X(push_es, "mov %edi, %eax", "push %es\n pop %eax", NONE, UD, 0, 0x10) \
	X(pop_cs, "", ".byte 0x0f, 0xff, 0xc0", FAULT, UD, 0, 5) \
	X(les, "", "les 8(%edi), %eax", NONE, UD, 0, 0x8000) \
	X(les_reg, "", ".byte 0xc4, 0xc0", FAULT, UD, 0, 5) \
	X(arpl, "mov $3, %ecx\n mov $0x10, %eax", "arpl %cx, %ax", NONE, UD, 0, 0x13) \
	X(far_jmp, "", "ljmp $0x18, $1f\n ud2\n1: inc %eax", NONE, UD, 0, 6) \
	X(far_call, "", "lcall $0x18, $1f\n jmp 2f\n1: inc %eax\n lret\n2:", NONE, UD, 0, 6) \
	X(far_conforming, "", "ljmp $152, $1f\n1: mov %cs, %eax", NONE, UD, 0, 152) \
	X(far_data, "", "ljmp $0x10, $0", FAULT, GP, 0x10, 5) \
	X(far_null, "", "ljmp $0, $0", FAULT, GP, 0, 5) \
	X(far_np, "", "lcall $120, $0", FAULT, GP, 120, 5) \
	X(far_rpl, "", "ljmp $0x1b, $0", FAULT, GP, 0x18, 5) \
	X(smsw, "", "smsw %eax\n and $1, %eax", NONE, UD, 0, 1) \
	X(lmsw_keeps_pe, "xor %eax, %eax\n lmsw %ax\n clts", "smsw %eax\n and $15, %eax", NONE, UD, 0, 1) \
	X(lmsw_ts, "mov $9, %eax\n lmsw %ax\n smsw %ecx\n clts", "lea (%ecx), %eax\n and $15, %eax", NONE, UD, 0, 9) \
	X(swapgs, "", ".byte 0x0f, 0x01, 0xf8", FAULT, UD, 0, 5) \
	X(rdfsbase, "", ".byte 0xf3, 0x0f, 0xae, 0xc0", FAULT, UD, 0, 5) \
	X(sysexit_no_cs, "mov $0x174, %ecx\n xor %eax, %eax\n xor %edx, %edx\n wrmsr", "sysexit", FAULT, GP, 0, 0) \
	X(sysenter_no_cs, "mov $0x174, %ecx\n xor %eax, %eax\n xor %edx, %edx\n wrmsr", "sysenter", FAULT, GP, 0, 0) \
	X(lock_nop, "", ".byte 0xf0, 0x90", FAULT, UD, 0, 5) \
	X(loop_cx, "mov $0x10002, %ecx\n 1: inc %eax", ".byte 0x67\n loop 1b\n lea (%ecx,%eax), %eax", NONE, UD, 0, 0x10007) \
	X(jmp_16, "", "jmp 1f\n1: movw $7, %ax", NONE, UD, 0, 7) \
	X(addr_16, "mov $0x14004, %ebx", "movl %ds:(%bx), %eax", NONE, UD, 0, 4) \
	X(enter_leave, "push $7\n mov %esp, %ebp", "enter $8, $1\n leave\n pop %eax", NONE, UD, 0, 7) \
	X(cmpxchg8b, "movl $1, (%esp)\n movl $2, 4(%esp)\n mov $1, %eax\n mov $2, %edx\n mov $3, %ebx\n mov $4, %ecx", "cmpxchg8b (%esp)\n pop %eax\n pop %ebx", NONE, UD, \
	  0, 3)

#define DEFINE32(name, before, insn, kind, vector, error, eax) \
	SNIPPET(r32_##name, ".code32\n" before "\n.globl at32_" #name ", next32_" #name "\nat32_" #name ": " insn "\nnext32_" #name ": ud2\n.code64"); \
	extern const u8 at32_##name[], next32_##name[];
ROWS32(DEFINE32)

struct row {
	const char *name;
	const u8 *code, *at, *next;
	u8 kind, vector;
	u32 error, eax;
};

static const struct row rows32[] = {
#define ENTRY32(n, before, insn, k, v, e, a) { #n, r32_##n, at32_##n, next32_##n, k, v, e, (u32)(a) },
	ROWS32(ENTRY32)
};

static void fill_area(void)
{
	u32 *area = (u32 *)AREA;
	fill(area, 0x77, 4096);
	area[0] = 0, area[1] = 4, area[2] = 0x8000, area[3] = SMALL;
}

static void check_row(const struct row *r, u64 vector, u64 error, u64 eip, u32 eax)
{
	const u8 *at = r->kind == FAULT ? r->at : r->next;
	if (!check_cell(r->name, "vector", vector, r->vector))
		return;
	check_cell(r->name, "error code", error, r->error);
	check_cell(r->name, "EIP", eip, (u32)(u64)at);
	if (r->eax != (u32)-1)
		check_cell(r->name, "EAX", eax, r->eax);
}

/* Rows that a KVM with this defect cannot run. */
static bool cannot_run(const struct row *r)
{
	if (r->code == r32_down_over)
		return skipping("32-bit: over the end of an expand-down segment", "down-limit");
	if (r->code == r32_bp_limit || r->code == r32_ss_limit || r->code == r32_pop_limit || r->code == r32_leave_limit)
		return skipping("32-bit: limits of a stack with a base", "frame-base");
	return r->code == r32_swapgs && skipping("32-bit: SWAPGS", "swapgs-32");
}

static void protected32(void)
{
	section("32-bit protected mode");
	for (unsigned i = 0; i < sizeof(rows32) / sizeof(rows32[0]); i++) {
		const struct row *r = &rows32[i];
		if (cannot_run(r))
			continue;
		struct legacy f = legacy_flat(r->code);
		fill_area();
		f.eax = 5, f.edi = AREA, f.fs = SMALL, f.gs = DOWN;
		exec_legacy(&f);
		check_row(r, f.vector, f.error, f.eip, f.eax);
		check_cell(r->name, "EFER.LMA", f.efer >> 10 & 1, 0);
		check_cell(r->name, "CR0.PE", f.cr0 & 1, 1);
	}
}

/* The same under long mode: what segments do is the same (SDM 3A 3.4.4 says only 64-bit mode is different). */
static void compatibility(void)
{
	section("the same in compatibility mode");
	struct {
		u16 limit;
		u64 base;
	} __attribute__((packed)) ours = { 255, (u64)legacy_gdt }, common;
	__asm__ volatile("sgdt %0\n lgdt %1" : "=m"(common) : "m"(ours));
	for (unsigned i = 0; i < sizeof(rows32) / sizeof(rows32[0]); i++) {
		const struct row *r = &rows32[i];
		if (cannot_run(r))
			continue;
		fill_area();
		struct frame f = kernel_frame(r->code);
		f.cs = LEGACY_CODE;
		f.rsp = STACK;
		f.rax = 5, f.rdi = AREA;
		__asm__ volatile("mov %0, %%fs\n mov %1, %%gs\n mov %2, %%ds\n mov %2, %%es" : : "r"(SMALL), "r"(DOWN), "r"(LEGACY_DATA));
		exec(&f);
		__asm__ volatile("mov %0, %%ds\n mov %0, %%es\n mov %1, %%fs\n mov %1, %%gs\n clts" : : "r"(KDATA), "r"(0));
		check_row(r, f.vector, f.error, f.rip, (u32)f.rax);
	}
	__asm__ volatile("lgdt %0" : : "m"(common));
}

/* --- user mode in legacy protected mode: stacks from the TSS, call gates with parameters, ports --- */

#define ROWS_USER(X) \
	X(user_int, "", "int $0x80", TRAP, 0x80, 0, 5) \
	X(user_int_dpl, "", "int $0x40", FAULT, GP, 0x40 * 8 + 2, 5) \
	X(user_int3, "", "int3", TRAP, BP, 0, 5) \
	X(user_ud, "", "ud2", FAULT, UD, 0, 5) \
	X(user_cli, "", "cli", FAULT, GP, 0, 5) \
	X(user_hlt, "", "hlt", FAULT, GP, 0, 5) \
	X(user_cr0, "", "mov %cr0, %eax", FAULT, GP, 0, 5) \
	X(user_smsw, "", "smsw %eax\n and $1, %eax", NONE, UD, 0, 1) \
	X(user_ds_kernel, "mov $0x10, %ecx", "mov %ecx, %ds", FAULT, GP, 0x10, 5) \
	X(user_ss_null, "xor %ecx, %ecx", "mov %ecx, %ss", FAULT, GP, 0, 5) \
	X(user_jmp_kernel, "", "ljmp $0x18, $0", FAULT, GP, 0x18, 5) \
	X(user_conforming, "", "ljmp $152, $1f\n1: mov %cs, %eax", NONE, UD, 0, 155) \
	X(user_port, "", "inb $0x80, %al", FAULT, GP, 0, 5) \
	X(user_port_ok, "", "inb $0x70, %al\n mov $1, %eax", NONE, UD, 0, 1) \
	X(user_port_wide, "", "inw $0x7f, %ax", FAULT, GP, 0, 5) \
	X(user_port_outside, "mov $0x3f8, %edx", "outb %al, %dx", FAULT, GP, 0, 5) \
	X(user_popf_iopl, "push $0x3202\n popf\n", "pushf\n pop %eax", NONE, UD, 0, 0x202) \
	X(user_gate, "push $0x11\n push $0x22", "lcall $131, $0\n add %esp, %eax", NONE, UD, 0, 0x33 + STACK)
#define DEFINE_USER DEFINE32
ROWS_USER(DEFINE_USER)
static const struct row rows_user[] = { ROWS_USER(ENTRY32) };

SNIPPET(gate_in, ".code32\n mov 8(%esp), %eax\n add 12(%esp), %eax\n mov %cs, %ecx\n mov 20(%esp), %edx\n lret $8\n.code64");

static void user32(void)
{
	if (!section_unless("user mode under 32-bit protected mode", "user-int,user-gate"))
		return;
	u32 at = (u32)(u64)gate_in;
	legacy_gdt[GATE / 8] = (at & 0xffff) | LEGACY_CODE << 16 | 2ull << 32 | 0xecull << 40 | (u64)(at >> 16) << 48;
	fill(&legacy_tss[26], 0xff, 32);
	((u8 *)legacy_tss)[104 + 0x70 / 8] = 0x7e; /* 0x70 and 0x7f allowed */
	((u8 *)legacy_tss)[104 + 0x78 / 8] = 0x7f;
	for (unsigned i = 0; i < sizeof(rows_user) / sizeof(rows_user[0]); i++) {
		const struct row *r = &rows_user[i];
		struct legacy f = legacy_flat(r->code);
		f.cs = LEGACY_UCODE;
		f.ss = f.ds = f.es = LEGACY_UDATA;
		f.eflags = 0x202;
		f.eax = 5;
		exec_legacy(&f);
		check_row(r, f.vector, f.error, f.eip, f.eax);
		check_cell(r->name, "CS", f.cs, r->code == r32_user_conforming ? CONFORMING | 3 : LEGACY_UCODE);
		check_cell(r->name, "SS", f.ss, LEGACY_UDATA);
		if (r->code == r32_user_gate) {
			check_cell(r->name, "CS inside", f.ecx, LEGACY_CODE);
			check_cell(r->name, "pushed SS", f.edx, LEGACY_UDATA);
		}
	}
	/* and with IOPL 3 */
	struct legacy f = legacy_flat(r32_user_port);
	f.cs = LEGACY_UCODE;
	f.ss = f.ds = f.es = LEGACY_UDATA;
	f.eflags = 0x3002;
	exec_legacy(&f);
	check_cell("user_port, IOPL 3", "vector", f.vector, UD);
}

/* --- 16 bits: X as before; code is copied to CODE16, and these offsets are in it --- */

/* di: AREA, bp = 0, sp: STACK. Operands and addresses of 16 bits in a segment of 64 KiB. */
#define ROWS16(X) \
	X(push_word, "mov %sp, %bx\n pushw $7\n mov %sp, %cx", "sub %cx, %bx\n mov %bx, %ax\n add $2, %sp", NONE, UD, 0, 2) \
	X(push_dword, "mov %sp, %bx\n pushl $7", "sub %sp, %bx\n mov %bx, %ax\n add $4, %sp", NONE, UD, 0, 4) \
	X(call_ret, "mov %sp, %bx", "call 1f\n 1: sub %sp, %bx\n mov %bx, %ax\n add $2, %sp", NONE, UD, 0, 2) \
	X(call_ret_32, "mov %sp, %bx", "calll 1f\n 1: sub %sp, %bx\n mov %bx, %ax\n add $4, %sp", NONE, UD, 0, 4) \
	X(pushf_popf, "pushw $0x8d5\n popfw", "pushfw\n pop %ax", NONE, UD, 0, 0x8d7) \
	X(wrap_byte, "mov $0xffff, %bx", "mov 0x4005(%bx), %al", NONE, UD, 0, 4) \
	X(limit_word, "mov $0xffff, %bx", "mov (%bx), %ax", FAULT, GP, 0, 5) \
	X(limit_32, "mov $0x10000, %ebx", "mov (%ebx), %al", FAULT, GP, 0, 5) \
	X(limit_ss, "mov $0xffff, %bp", "mov (%bp), %ax", FAULT, SS, 0, 5) \
	X(enter_leave, "mov %sp, %ax\n mov %sp, %bx", "enter $4, $0\n sub %sp, %bx\n leave\n mov %bx, %ax", NONE, UD, 0, 6) \
	X(loop_cx, "mov $0x10003, %ecx\n 1: inc %ax", "loop 1b", NONE, UD, 0, 8) \
	X(jcxz, "mov $0x10000, %ecx", "jcxz 1f\n inc %ax\n1:", NONE, UD, 0, 5) \
	X(jecxz, "mov $0x10000, %ecx", "jecxz 1f\n inc %ax\n1:", NONE, UD, 0, 6) \
	X(lods_wrap, "mov $0xffff, %si\n cld", "lodsb\n mov %si, %ax", NONE, UD, 0, 0) \
	X(stos_wrap, "mov $0xfffe, %di\n mov $2, %cx\n mov $0x5a, %al\n cld", "rep stosb\n mov %di, %ax", NONE, UD, 0, 0) \
	X(xlat_wrap, "mov $0xffff, %bx\n movb $1, %al\n push %es\n", "pop %es\n movzbw %al, %ax", NONE, UD, 0, 1) \
	X(int3, "", "int3", TRAP, BP, 0, 5) \
	X(int_n, "", "int $0x80", TRAP, 0x80, 0, 5) \
	X(into, "mov $0x7fff, %ax\n inc %ax", "into", TRAP, OF, 0, 0x8000) \
	X(bound, "mov $0x9000, %ax\n", "bound %ax, 0x4000", FAULT, BR, 0, 0x9000) \
	X(div, "xor %cx, %cx\n", "div %cx", FAULT, DE, 0, 5) \
	X(div_over, "mov $1, %dx\n mov $1, %cx", "div %cx", FAULT, DE, 0, 5) \
	X(ud2, "", "ud2", FAULT, UD, 0, 5) \
	X(lock_nop, "", ".byte 0xf0, 0x90", FAULT, UD, 0, 5) \
	X(mov_cs, "", ".byte 0x8e, 0xc8", FAULT, UD, 0, 5) \
	X(lds_reg, "", ".byte 0xc5, 0xf8, 0x77", FAULT, UD, 0, 5) \
	X(jmp_past, "", "data32 jmp . + 0x20000", FAULT, GP, 0, 5) \
	X(movzx_32, "movl $0x12345678, %eax", "movw $0, %ax", NONE, UD, 0, 0x12340000) \
	X(lea_32, "mov $0x10, %ebx", "leal 0x12345(%ebx,%ebx,2), %eax", NONE, UD, 0, 0x12375) \
	X(lea_16, "mov $0x10, %bx\n mov $0xfff8, %si", "lea 8(%bx,%si), %ax", NONE, UD, 0, 0x10) \
	X(pusha, "pusha\n popa", "pushal\n popal", NONE, UD, 0, 5) \
	X(smsw_reg, "", "smsw %ecx\n and $0xfffe, %cx\n or $0x10, %cx\n mov %cx, %ax", NONE, UD, 0, 0x10) \
	X(cr0_read, "mov %cr0, %eax", "mov %eax, %cr0\n mov $1, %eax", NONE, UD, 0, 1) \
	X(rdmsr, "mov $0xc0000080, %ecx\n rdmsr\n mov %ax, %bx", "and $0x500, %ax", NONE, UD, 0, -1) \
	X(insn_crossing, "mov $1, %ax", "addl $0x10000, %eax", NONE, UD, 0, 0x10001)
#define DEFINE16(name, before, insn, kind, vector, error, eax) \
	SNIPPET(r16_##name, ".code16\n" before "\n.globl at16_" #name ", next16_" #name "\nat16_" #name ": " insn "\nnext16_" #name ": ud2\n.code64"); \
	extern const u8 at16_##name[], next16_##name[];
ROWS16(DEFINE16)
#define ENTRY16(n, before, insn, k, v, e, a) { #n, r16_##n, at16_##n, next16_##n, k, v, e, (u32)(a) },
static const struct row rows16[] = { ROWS16(ENTRY16) };

/* Real mode alone: ds and es are AREA's paragraph less 0x400. */
#define ROWS_REAL(X) \
	X(int_flags, "sti\n std", "int $0x21", TRAP, 0x21, 0, 5) \
	X(limit_word_es, "mov $0xffff, %bx", "mov %es:(%bx), %ax", FAULT, GP, 0, 5) \
	X(lldt, "", "lldt %ax", FAULT, UD, 0, 5) \
	X(ltr, "", "ltr %ax", FAULT, UD, 0, 5) \
	X(sldt, "", "sldt %ax", FAULT, UD, 0, 5) \
	X(str, "", "str %ax", FAULT, UD, 0, 5) \
	X(verr, "", "verr %ax", FAULT, UD, 0, 5) \
	X(lar, "", "lar %ax, %cx", FAULT, UD, 0, 5) \
	X(lsl, "", "lsl %ax, %cx", FAULT, UD, 0, 5) \
	X(arpl, "", ".byte 0x63, 0xc8", FAULT, UD, 0, 5) \
	X(sysenter, "", "sysenter", FAULT, GP, 0, 5) \
	X(far_jmp, "ljmp $0x301, $1f - r16_far_jmp - 16\n .fill 16, 1, 0x0f\n", "1: mov %cs, %ax", NONE, UD, 0, -1) \
	X(far_call, "", "lcall $0x300, $1f - r16_far_call\n jmp 2f\n 1: inc %ax\n lret\n 2:", NONE, UD, 0, 6) \
	X(far_call_32, "", "lcalll $0x300, $1f - r16_far_call_32\n jmp 2f\n 1: inc %ax\n lretl\n 2:", NONE, UD, 0, 6) \
	X(far_past, "", "ljmpl $0x300, $0x10000", FAULT, GP, 0, 5) \
	X(iret, "pushf\n push %cs\n push $1f - r16_iret", "iret\n1:", NONE, UD, 0, 5) \
	X(iret_32, "pushfl\n pushl $0x300\n pushl $1f - r16_iret_32", "iretl\n1:", NONE, UD, 0, 5) \
	X(popf_iopl, "pushw $0x7002\n popf\n pushf\n pop %ax", "pushw $2\n popf", NONE, UD, 0, 0x7002) \
	X(segment, "mov $0x100, %ax\n mov %ax, %es\n mov $0x3004, %bx", "mov %es:(%bx), %al\n xor %ah, %ah", NONE, UD, 0, 4) \
	X(segment_high, "mov $0xffff, %ax\n mov %ax, %es\n mov %es:0x14, %eax", "cmp $3, %eax\n sete %al\n movzbl %al, %eax", NONE, UD, 0, 1) \
	X(no_big_segments, "mov $0x100000, %ebx", "addr32 mov (%ebx), %al", FAULT, GP, 0, 5) \
	X(unreal, "lgdtl 0x4100\n mov %cr0, %eax\n or $1, %al\n mov %eax, %cr0\n mov $136, %bx\n mov %bx, %ds\n and $0xfe, %al\n mov %eax, %cr0\n mov $0x100000, %ebx", \
	  "addr32 mov (%ebx), %eax", NONE, UD, 0, 0x1badb002) \
	X(unreal_stays, "lgdtl 0x4100\n mov %cr0, %eax\n or $1, %al\n mov %eax, %cr0\n mov $136, %bx\n mov %bx, %ds\n and $0xfe, %al\n mov %eax, %cr0\n mov $1, %bx\n" \
	  "mov %bx, %ds\n mov $0xffff4, %ebx", "addr32 mov (%ebx), %eax", NONE, UD, 0, 3) \
	X(pe_toggled, "lgdtl 0x4100\n mov $1, %ax\n lmsw %ax\n mov %ds, %bx\n mov $0x4004, %bx\n mov (%bx), %cl\n mov %cr0, %eax\n and $0xfe, %al\n mov %eax, %cr0", \
	  "movzbw %cl, %ax", NONE, UD, 0, -1) \
	X(pe_and_back, "lgdtl 0x4100\n mov %cr0, %eax\n or $1, %al\n mov %eax, %cr0\n ljmp $48, $1f - r16_pe_and_back + 0x3000\n1: mov $56, %bx\n mov %bx, %es\n" \
	  "mov %cs, %cx\n mov %cr0, %eax\n and $0xfe, %al\n mov %eax, %cr0\n ljmp $0x300, $2f - r16_pe_and_back\n2: movzwl %cx, %eax", "nop", NONE, UD, 0, 48) \
	X(pe_32, "lgdtl 0x4100\n mov %cr0, %eax\n or $1, %al\n mov %eax, %cr0\n ljmpl $24, $1f - r16_pe_32 + 0x3000\n.code32\n1: mov $0x12345678, %edx\n" \
	  "ljmp $48, $3f - r16_pe_32 + 0x3000\n.code16\n3: mov %cr0, %eax\n and $0xfe, %al\n mov %eax, %cr0\n ljmp $0x300, $2f - r16_pe_32\n2: mov %edx, %eax", \
	  "nop", NONE, UD, 0, 0x12345678) \
	X(sgdt_16, "lgdtw 0x4108\n sgdtl 0x4120", "movl 0x4122, %eax\n and $0xffffff, %eax", NONE, UD, 0, 0x345678) \
	X(lidt_moved, "lidtl 0x4110", "int $0x60", TRAP, 0x61, 0, 5)
ROWS_REAL(DEFINE16)
static const struct row rows_real[] = { ROWS_REAL(ENTRY16) };

static void run16(const struct row *r, bool real)
{
	struct legacy f = legacy_flat(NULL);
	fill_area();
	u32 *area = (u32 *)AREA;
	/* at 0x4100: our GDT; 0x4108: one with bits above 24; 0x4110: an IDT at 0x2000 */
	area[64] = 255 | (u32)(u64)legacy_gdt << 16, area[65] = (u32)(u64)legacy_gdt >> 16;
	area[66] = 255 | 0x5678 << 16, area[67] = 0x1234;
	area[68] = 0x3ff | 0x2000 << 16, area[69] = 0;
	u32 *moved = (u32 *)0x2000;
	for (u32 v = 0; v < 128; v++)
		moved[v] = ((u32)(legacy_real_vectors - legacy_low) + 8 * (v + 1)) | LEGACY_LOW / 16 << 16;
	copy((void *)CODE16, r->code, (size_t)(r->next - r->code) + 2);
	f.eip = real ? 0 : CODE16;
	f.cs = real ? CODE16 / 16 : LEGACY_CODE16;
	f.ss = f.ds = f.es = real ? 0 : LEGACY_DATA16;
	f.cr0 = real ? 0x10 : 0x11;
	f.eax = 5, f.edi = AREA;
	exec_legacy(&f);
	u32 want = (real ? 0 : CODE16) + (u32)((r->kind == FAULT ? r->at : r->next) - r->code);
	if (real && r->code == r16_far_jmp)
		want -= 16;
	if (!check_cell(r->name, "vector", f.vector, r->vector))
		return;
	check_cell(r->name, "error code", f.error, r->error);
	check_cell(r->name, "IP", f.eip, want);
	if (r->eax != (u32)-1)
		check_cell(r->name, "EAX", f.eax, r->eax);
	if (!real)
		return;
	check_cell(r->name, "CS", f.cs, r->code == r16_far_jmp ? 0x301 : CODE16 / 16);
	check_cell(r->name, "SP", f.esp, STACK);
	if (r->code == r16_int_flags)
		check_cell(r->name, "pushed flags", f.eflags & 0x600, 0x600);
}

static void sixteen(void)
{
	section("16-bit protected mode");
	for (unsigned i = 0; i < sizeof(rows16) / sizeof(rows16[0]); i++)
		run16(&rows16[i], false);
	section("real mode");
	for (unsigned i = 0; i < sizeof(rows16) / sizeof(rows16[0]); i++)
		if (rows16[i].code != r16_int_n || !skipping("INT 80h in real mode", "real-int"))
			run16(&rows16[i], true);
	for (unsigned i = 0; i < sizeof(rows_real) / sizeof(rows_real[0]); i++)
		run16(&rows_real[i], true);
}

/* --- what the switches refuse --- */

SNIPPET(to_cr0, ".code32\n mov %eax, %cr0\n ud2\n.code64");
SNIPPET(to_cr3, ".code32\n mov %eax, %cr3\n ud2\n.code64");
SNIPPET(to_cr4, ".code32\n mov %eax, %cr4\n ud2\n.code64");

static void refusals(void)
{
	section("switches that are refused");
	u32 *bad = page_alloc(1);
	bad[0] = P | 2; /* PAE: reserved bit 1 of a PDPTE */
	static const struct {
		const char *name;
		const u8 *code;
		u32 value, efer, cr4, cr0;
		u8 vector;
	} t[] = {
		{ "PG without PE", to_cr0, 0x80000010, 0, 0, 0x11, GP }, { "NW without CD", to_cr0, 0x20000011, 0, 0, 0x11, GP },
		{ "LME without PAE", to_cr0, 0x80000011, 0x100, 0, 0x11, GP }, { "PCIDE outside long mode", to_cr4, 1 << 17, 0, 0, 0x11, GP },
		{ "CR4 reserved", to_cr4, 1 << 15, 0, 0, 0x11, GP }, { "CD alone", to_cr0, 0x40000011, 0, 0, 0x11, UD },
		{ "PAE without paging, any CR3", to_cr3, 0xffffffff, 0, 0x20, 0x11, UD },
	};
	for (unsigned i = 0; i < sizeof(t) / sizeof(t[0]); i++) {
		if (t[i].code == to_cr4 && t[i].value == 1 << 17 && !CPU_HAS(1, 0, 2, 17))
			continue;
		struct legacy f = legacy_flat(t[i].code);
		f.eax = t[i].value, f.efer = t[i].efer, f.cr4 = t[i].cr4, f.cr0 = t[i].cr0;
		exec_legacy(&f);
		check_cell(t[i].name, "vector", f.vector, t[i].vector);
		check_cell(t[i].name, "EIP", f.eip, (u32)(u64)t[i].code + (t[i].vector == UD ? 3 : 0));
	}
	struct legacy f = legacy_flat(to_cr0);
	f.eax = 0x80000011, f.cr4 = 0x20, f.cr3 = (u32)(u64)bad;
	exec_legacy(&f);
	check_cell("PAE with a bad PDPTE", "vector", f.vector, GP);
}

void guest_main(void)
{
	descriptors();
	protected32();
	compatibility();
	user32();
	sixteen();
	refusals();
}
