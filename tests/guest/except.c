/*
 * Exceptions raised by instructions: vector, error code, RIP (at the instruction for faults, behind it for traps), RF in the pushed flags,
 * CR2, and that nothing else changed. Undefined opcodes and LOCK in the wrong place are tables of bytes. See desc.c for segments and gates.
 */
#include "guest.h"

const char guest_name[] = "except";

enum { OF = 4 };
enum { K = 1, UM = 2 }; /* tried in kernel mode, in user mode */
enum { FAULT, TRAP, NONE, BRANCH }; /* RIP at the instruction, behind it; no exception at all, at a branch */

#define DATA VA(0x10)	/* read and write, user too */
#define RODATA VA(0x12) /* read only, user too */
#define ABSENT VA(0x14)
#define SYSTEM VA(0x16) /* the kernel's */
#define CODE VA(0x18)	/* for opcode bytes; user too */
#define NONCANON 0x800000000000ull

/* rdi: DATA, rsi: not canonical, rbp: not canonical, rbx: RODATA, r9: ABSENT, r8: SYSTEM, rax = 5, rcx = rdx = 0, r10: top bit only.
 * X(name, before, instruction, kind, modes, vector, error) */
#define ROWS(X) \
	X(div_reg, "", "div %ecx", FAULT, K | UM, DE, 0) \
	X(idiv_reg, "", "idiv %rcx", FAULT, K | UM, DE, 0) \
	X(div_mem, "movl $0, (%rdi)", "divl (%rdi)", FAULT, K | UM, DE, 0) \
	X(div8_over, "mov $0x1000, %eax\n mov $0x10, %cl", "div %cl", FAULT, K | UM, DE, 0) \
	X(div8_fits, "mov $0xfff, %eax\n mov $0x10, %cl", "div %cl", NONE, K | UM, UD, 0) \
	X(idiv8_min, "mov $-256, %eax\n mov $2, %cl", "idiv %cl", NONE, K | UM, UD, 0) \
	X(idiv8_over, "mov $256, %eax\n mov $2, %cl", "idiv %cl", FAULT, K | UM, DE, 0) \
	X(div16_over, "mov $1, %edx\n mov $1, %ecx", "div %cx", FAULT, K | UM, DE, 0) \
	X(div64_over, "mov $1, %edx\n mov $1, %ecx", "div %rcx", FAULT, K | UM, DE, 0) \
	X(idiv64_min, "mov $-1, %rcx\n mov %r10, %rax\n cqto", "idiv %rcx", FAULT, K | UM, DE, 0) \
	X(idiv32_min, "mov $-1, %ecx\n mov $0x80000000, %eax\n cltd", "idiv %ecx", FAULT, K | UM, DE, 0) \
	X(idiv16_min, "mov $-1, %ecx\n mov $0x8000, %eax\n cwtd", "idiv %cx", FAULT, K | UM, DE, 0) \
	X(int3, "", "int3", TRAP, K | UM, BP, 0) \
	X(int_3, "", ".byte 0xcd, 3", TRAP, K | UM, BP, 0) \
	X(int_4, "", "int $4", TRAP, K | UM, OF, 0) \
	X(int_80, "", "int $0x80", TRAP, K | UM, 0x80, 0) \
	X(int_81, "", "int $0x81", TRAP, K, 0x81, 0) \
	X(int_81_dpl, "", "int $0x81", FAULT, UM, GP, 0x81 * 8 + 2) \
	X(int_0, "", "int $0", TRAP, K, DE, 0) \
	X(int_0_dpl, "", "int $0", FAULT, UM, GP, 2) \
	X(int_6_dpl, "", "int $6", FAULT, UM, GP, UD * 8 + 2) \
	X(int_13_dpl, "", "int $13", FAULT, UM, GP, GP * 8 + 2) \
	X(int_ff_dpl, "", "int $255", FAULT, UM, GP, 255 * 8 + 2) \
	X(icebp, "", ".byte 0xf1", TRAP, K | UM, DB, 0) \
	X(ud2, "", ".byte 0x0f, 0x0b, 0x0f, 0x0b", FAULT, K | UM, UD, 0) \
	X(ud2_prefixed, "", ".byte 0x66, 0x48, 0x0f, 0x0b", FAULT, K | UM, UD, 0) \
	X(hlt_user, "", "hlt", FAULT, UM, GP, 0) \
	X(wbinvd_user, "", "wbinvd", FAULT, UM, GP, 0) \
	X(invd_user, "", "invd", FAULT, UM, GP, 0) \
	X(lidt_user, "", "lidt (%rdi)", FAULT, UM, GP, 0) \
	X(lldt_user, "", "lldt %ax", FAULT, UM, GP, 0) \
	X(lmsw_user, "", "lmsw %ax", FAULT, UM, GP, 0) \
	X(cr8_user, "", "mov %cr8, %rax", FAULT, UM, GP, 0) \
	X(xsetbv_user, "", "xsetbv", FAULT, UM, GP, 0) \
	X(sysret_user, "", "sysretq", FAULT, UM, GP, 0) \
	X(out_user, "", "outb %al, $0x80", FAULT, UM, GP, 0) \
	X(ins_user, "mov $0x80, %edx", "insb", FAULT, UM, GP, 0) \
	X(outs_user, "mov $0x80, %edx\n mov %rdi, %rsi", "outsl", FAULT, UM, GP, 0) \
	X(rdpmc, "mov $0x1234, %ecx", "rdpmc", FAULT, K | UM, GP, 0) \
	X(rdmsr_none, "mov $0x12345, %ecx", "rdmsr", FAULT, K, GP, 0) \
	X(wrmsr_none, "mov $0x12345, %ecx", "wrmsr", FAULT, K, GP, 0) \
	X(efer_reserved, "mov $0xc0000080, %ecx\n rdmsr\n or $2, %eax", "wrmsr", FAULT, K, GP, 0) \
	X(efer_lme, "mov $0xc0000080, %ecx\n rdmsr\n and $~0x100, %eax", "wrmsr", FAULT, K, GP, 0) \
	X(lstar_bad, "mov $0xc0000082, %ecx\n mov $0x8000, %edx", "wrmsr", FAULT, K, GP, 0) \
	X(fs_base_bad, "mov $0xc0000100, %ecx\n mov $0x8000, %edx", "wrmsr", FAULT, K, GP, 0) \
	X(kernel_gs_bad, "mov $0xc0000102, %ecx\n mov $0xffff7fff, %edx", "wrmsr", FAULT, K, GP, 0) \
	X(sysenter_esp_bad, "mov $0x175, %ecx\n mov $0x8000, %edx", "wrmsr", FAULT, K, GP, 0) \
	X(pat_bad, "mov $0x277, %ecx\n mov $2, %eax", "wrmsr", FAULT, K, GP, 0) \
	X(apic_base_bad, "mov $0x1b, %ecx\n rdmsr\n or $0x80000000, %edx", "wrmsr", FAULT, K, GP, 0) \
	X(cr0_pe, "mov %cr0, %rax\n and $~1, %rax", "mov %rax, %cr0", FAULT, K, GP, 0) \
	X(cr0_pg, "mov %cr0, %rax\n btr $31, %rax", "mov %rax, %cr0", FAULT, K, GP, 0) \
	X(cr0_nw, "mov %cr0, %rax\n bts $29, %rax", "mov %rax, %cr0", FAULT, K, GP, 0) \
	X(cr0_high, "mov %cr0, %rax\n bts $32, %rax", "mov %rax, %cr0", FAULT, K, GP, 0) \
	X(cr3_high, "mov %cr3, %rax\n bts $52, %rax", "mov %rax, %cr3", FAULT, K, GP, 0) \
	X(cr3_63, "mov %cr3, %rax\n bts $63, %rax", "mov %rax, %cr3", FAULT, K, GP, 0) \
	X(cr4_pae, "mov %cr4, %rax\n btr $5, %rax", "mov %rax, %cr4", FAULT, K, GP, 0) \
	X(cr4_reserved, "mov %cr4, %rax\n bts $15, %rax", "mov %rax, %cr4", FAULT, K, GP, 0) \
	X(cr4_high, "mov %cr4, %rax\n bts $36, %rax", "mov %rax, %cr4", FAULT, K, GP, 0) \
	X(cr8_16, "mov $16, %eax", "mov %rax, %cr8", FAULT, K, GP, 0) \
	X(xcr_1, "mov $1, %ecx\n mov $7, %eax", "xsetbv", FAULT, K, GP, 0) \
	X(xcr0_no_x87, "mov $6, %eax", "xsetbv", FAULT, K, GP, 0) \
	X(xcr0_avx_alone, "mov $5, %eax", "xsetbv", FAULT, K, GP, 0) \
	X(xcr0_high, "mov $7, %eax\n mov $0x80, %edx", "xsetbv", FAULT, K, GP, 0) \
	X(lgdt_bad, "mov %rsi, 2(%rdi)", "lgdt (%rdi)", FAULT, K, GP, 0) \
	X(lidt_bad, "mov %rsi, 2(%rdi)", "lidt (%rdi)", FAULT, K, GP, 0) \
	X(load, "", "mov (%rsi), %rax", FAULT, K | UM, GP, 0) \
	X(load_bp, "", "mov (%rbp), %rax", FAULT, K | UM, SS, 0) \
	X(load_bp_disp, "", "mov 16(%rbp,%rcx,8), %al", FAULT, K | UM, SS, 0) \
	X(load_bp_fs, "", "mov %fs:(%rbp), %rax", FAULT, K | UM, GP, 0) \
	X(load_sp, "mov %rsi, %rsp", "mov (%rsp), %rax", FAULT, K | UM, SS, 0) \
	X(store_bp, "", "mov %rax, (%rbp)", FAULT, K | UM, SS, 0) \
	X(load_edge, "", "mov -4(%rsi), %rax", FAULT, K | UM, GP, 0) \
	X(store_edge, "", "movw $1, -1(%rsi)", FAULT, K | UM, GP, 0) \
	X(load_upper_edge, "mov $0xffff800000000000, %rsi", "mov -1(%rsi), %al", FAULT, K | UM, GP, 0) \
	X(push_bad, "mov %rsi, %rsp", "push %rax", FAULT, K | UM, PF, -1) \
	X(push_bad_8, "lea 8(%rsi), %rsp", "push %rax", FAULT, K | UM, SS, 0) \
	X(pop_bad, "mov %rsi, %rsp", "pop %rax", FAULT, K | UM, SS, 0) \
	X(call_bad_sp, "lea 8(%rsi), %rsp", "call 1f\n1:", FAULT, K | UM, SS, 0) \
	X(ret_bad_sp, "mov %rsi, %rsp", "ret", FAULT, K | UM, SS, 0) \
	X(leave_bad, "", "leave", FAULT, K | UM, SS, 0) \
	X(enter_bad, "lea 8(%rsi), %rsp", "enter $0, $0", FAULT, K | UM, SS, 0) \
	X(pushf_bad, "lea 8(%rsi), %rsp", "pushf", FAULT, K | UM, SS, 0) \
	X(iret_bad, "mov %rsi, %rsp", "iretq", FAULT, K | UM, SS, 0) \
	X(jmp_mem_bad, "", "jmp *(%rsi)", FAULT, K | UM, GP, 0) \
	X(call_mem_bad, "", "call *(%rbp)", FAULT, K | UM, SS, 0) \
	X(ljmp_mem_bad, "", "ljmp *(%rsi)", FAULT, K | UM, GP, 0) \
	X(lods_bad, "", "lodsb", FAULT, K | UM, GP, 0) \
	X(movs_bad, "", "movsq", FAULT, K | UM, GP, 0) \
	X(stos_bad, "mov %rsi, %rdi", "stosb", FAULT, K | UM, GP, 0) \
	X(rep_stos_bad, "mov %rsi, %rdi\n mov $4, %ecx", "rep stosb", FAULT, K | UM, GP, 0) \
	X(rep_none, "", "rep movsb", NONE, K | UM, UD, 0) \
	X(xlat_bad, "mov %rsi, %rbx", "xlat", FAULT, K | UM, GP, 0) \
	X(fxsave_bad, "", "fxsave (%rsi)", FAULT, K | UM, GP, 0) \
	X(sse_bad, "", "movups (%rsi), %xmm0", FAULT, K | UM, GP, 0) \
	X(sse_bad_bp, "", "movups %xmm0, (%rbp)", FAULT, K | UM, SS, 0) \
	X(x87_bad, "", "fldl (%rsi)", FAULT, K | UM, GP, 0) \
	X(clflush_bad, "", "clflush (%rsi)", FAULT, K | UM, GP, 0) \
	X(bts_far, "mov %rdi, %r11\n mov $1, %eax\n shl $50, %rax", "bts %rax, (%r11)", FAULT, K | UM, GP, 0) \
	X(lea_bad, "", "lea (%rsi), %rax", NONE, K | UM, UD, 0) \
	X(nop_bad, "", "nopl (%rsi)", NONE, K | UM, UD, 0) \
	X(prefetch_bad, "", "prefetcht0 (%rsi)", NONE, K | UM, UD, 0) \
	X(invlpg_bad, "", "invlpg (%rsi)", NONE, K, UD, 0) \
	X(fetch_absent, "", "jmp *%r9", TRAP, 0, PF, 0) \
	X(pf_load, "", "mov (%r9), %al", FAULT, K, PF, 0) \
	X(pf_load_user, "", "mov (%r9), %al", FAULT, UM, PF, PF_U) \
	X(pf_store, "", "mov %al, (%r9)", FAULT, K, PF, PF_W) \
	X(pf_store_user, "", "mov %al, (%r9)", FAULT, UM, PF, PF_U | PF_W) \
	X(pf_rmw_user, "", "lock incl (%r9)", FAULT, UM, PF, PF_U | PF_W) \
	X(pf_ro, "", "mov %al, (%rbx)", FAULT, K, PF, PF_P | PF_W) \
	X(pf_ro_user, "", "xchg %al, (%rbx)", FAULT, UM, PF, PF_P | PF_W | PF_U) \
	X(pf_ro_cmpxchg, "", "lock cmpxchg %cl, (%rbx)", FAULT, K, PF, PF_P | PF_W) \
	X(ro_cmp, "", "cmp %al, (%rbx)", NONE, K | UM, UD, 0) \
	X(pf_system, "", "mov (%r8), %al", FAULT, UM, PF, PF_P | PF_U) \
	X(pf_system_store, "", "orb $0, (%r8)", FAULT, UM, PF, PF_P | PF_U | PF_W) \
	X(clflush_absent, "", "clflush (%r9)", FAULT, UM, PF, PF_U) \
	X(prefetch_absent, "", "prefetchnta (%r9)", NONE, K | UM, UD, 0) \
	X(cmov_absent, "cmp %eax, %eax", "cmovne (%r9), %eax", FAULT, K, PF, 0) \
	X(movaps_odd, "", "movaps 8(%rdi), %xmm0", FAULT, K | UM, GP, 0) \
	X(movaps_odd_bp, "lea 8(%rdi), %rbp", "movaps %xmm0, (%rbp)", FAULT, K | UM, GP, 0) \
	X(addps_odd, "", "addps 4(%rdi), %xmm0", FAULT, K | UM, GP, 0) \
	X(vaddps_odd, "", "vaddps 4(%rdi), %ymm0, %ymm0", NONE, K | UM, UD, 0) \
	X(vmovaps_odd, "", "vmovaps 16(%rdi), %ymm0", FAULT, K | UM, GP, 0) \
	X(cx16_odd, "", "cmpxchg16b 8(%rdi)", FAULT, K | UM, GP, 0) \
	X(cx16_odd_ro, "", "cmpxchg16b 8(%rbx)", FAULT, K | UM, GP, 0) \
	X(movaps_odd_absent, "add $8, %r9", "movaps (%r9), %xmm0", FAULT, K | UM, GP, 0) \
	X(movaps_odd_ro, "", "movaps %xmm0, 4(%rbx)", FAULT, K | UM, GP, 0) \
	X(vmovdqa_odd_absent, "", "vmovdqa %ymm0, -16(%r9)", FAULT, K | UM, GP, 0) \
	X(movups_odd_absent, "add $8, %r9", "movups -8(%r9), %xmm0", FAULT, K, PF, 0) \
	X(ldmxcsr_bad, "movl $0x10000, (%rdi)", "ldmxcsr (%rdi)", FAULT, K | UM, GP, 0) \
	X(jmp_bad, "", "jmp *%rsi", BRANCH, K | UM, GP, 0) \
	X(call_bad, "", "call *%rsi", BRANCH, K | UM, GP, 0) \
	X(ret_bad, "push %rsi", "ret", BRANCH, K | UM, GP, 0) \
	X(jcc_taken, "", "jmp 1f\n1:", NONE, K | UM, UD, 0)

#define DEFINE(name, before, insn, kind, modes, vector, error) \
	SNIPPET(row_##name, before "\n.globl at_" #name ", next_" #name "\nat_" #name ": " insn "\nnext_" #name ": ud2"); \
	extern const u8 at_##name[], next_##name[];
ROWS(DEFINE)

static const struct row {
	const char *name;
	const u8 *code, *at, *next;
	u8 kind, modes, vector;
	u32 error;
} rows[] = {
#define ENTRY(n, before, insn, k, m, v, e) { #n, row_##n, at_##n, next_##n, k, m, v, (u32)(e) },
	ROWS(ENTRY)
};

static struct frame start(const u8 *code, bool user)
{
	struct frame f = user ? user_frame(user_alias(code), USER_STACK_TOP - 64) : kernel_frame(code);
	f.rax = 5, f.rbx = RODATA, f.rbp = NONCANON, f.rsi = NONCANON, f.rdi = DATA, f.r8 = SYSTEM, f.r9 = ABSENT, f.r10 = 1ull << 63;
	f.rflags |= F_CF | F_PF;
	return f;
}

static const char *mode_name(const char *name, bool user)
{
	static char text[64];
	const char *prefix = user ? "user " : "kernel ";
	unsigned n = 0;
	for (const char *s = prefix; *s; s++)
		text[n++] = *s;
	for (; *name && n < sizeof(text) - 1; name++)
		text[n++] = *name;
	text[n] = 0;
	return text;
}

/* Rows that a KVM with this defect cannot run; some leave a processor behind that can run nothing. */
static const struct {
	const char *row, *defect;
	u8 modes;
} not_on[] = {
	{ "int_80", "user-int", UM }, { "int_81_dpl", "user-int", UM }, { "int_0_dpl", "user-int", UM }, { "int_6_dpl", "user-int", UM },
	{ "int_13_dpl", "user-int", UM }, { "int_ff_dpl", "user-int", UM }, { "lstar_bad", "msr-checks", K }, { "fs_base_bad", "msr-checks", K },
	{ "kernel_gs_bad", "msr-checks", K }, { "sysenter_esp_bad", "msr-checks", K }, { "pat_bad", "msr-checks", K }, { "cr0_high", "cr-high", K },
	{ "cr4_high", "cr-high", K }, { "lgdt_bad", "lgdt-any", K }, { "lidt_bad", "lgdt-any", K }, { "load_edge", "straddle-pf", K | UM },
	{ "store_edge", "straddle-pf", K | UM }, { "iret_bad", "noncanon-pf", K | UM }, { "fxsave_bad", "noncanon-pf", K | UM }, { "x87_bad", "user-fp-gp", UM },
	{ "addps_odd", "user-fp-gp", UM }, { "vmovaps_odd", "user-fp-gp", UM }, { "vmovdqa_odd_absent", "user-fp-gp", UM }, { "ldmxcsr_bad", "user-fp-gp", UM },
};

static bool same_text(const char *a, const char *b)
{
	while (*a && *a == *b)
		a++, b++;
	return *a == *b;
}

static bool cannot_run(const char *row, bool user)
{
	for (unsigned i = 0; i < sizeof(not_on) / sizeof(not_on[0]); i++)
		if (same_text(not_on[i].row, row) && not_on[i].modes & (user ? UM : K))
			return skipping(mode_name(row, user), not_on[i].defect);
	return false;
}

static void instructions(void)
{
	section("instructions that fault and trap");
	for (unsigned i = 0; i < sizeof(rows) / sizeof(rows[0]); i++)
		for (unsigned user = 0; user < 2; user++) {
			const struct row *r = &rows[i];
			if (!(r->modes & (user ? UM : K)) || cannot_run(r->name, user))
				continue;
			struct frame f = start(r->code, user);
			const char *name = mode_name(r->name, user);
			const u8 *at = r->kind == FAULT || r->kind == BRANCH ? r->at : r->next;
			exec(&f);
			if (r->error == (u32)-1) { /* at the last canonical address: no memory there */
				check_cell(name, "vector", f.vector, PF);
				check_cell(name, "CR2", f.cr2, NONCANON - 8);
				continue;
			}
			check_cell(name, "vector", f.vector, r->vector);
			check_cell(name, "error code", f.error, r->error);
			/* A branch to a non-canonical address faults itself; the translator, like some processors, faults at the target. */
			u64 want = user ? user_alias(at) : (u64)at;
			check_cell(name, "RIP", r->kind == BRANCH && f.rip == NONCANON ? want : f.rip, want);
			check_cell(name, "CS", f.cs, user ? UCODE : KCODE);
			check_cell(name, "SS", f.ss, user ? UDATA : KDATA);
			/* SDM 3B 17.3.1.1: faults push RF set; here the undefined opcode behind a row that does nothing, too. */
			check_cell(name, "RF", !!(f.rflags & F_RF), r->kind != TRAP);
			if (r->vector == PF)
				check_cell(name, "CR2", f.cr2, r->error & PF_P ? (r->name[3] == 's' ? SYSTEM : RODATA) : ABSENT);
		}
	for (unsigned user = 0; user < 2; user++) {
		struct frame f = start(row_fetch_absent, user);
		exec(&f);
		check_cell(mode_name("fetch_absent", user), "vector", f.vector, PF);
		check_cell(mode_name("fetch_absent", user), "error code", f.error, PF_I | (user ? PF_U : 0));
		check_cell(mode_name("fetch_absent", user), "CR2", f.cr2, ABSENT);
		check_cell(mode_name("fetch_absent", user), "RIP", f.rip, ABSENT);
	}
}

/* --- bytes --- */

/* Kernel mode unless ANY. Behind the bytes there are INT3s, so that whatever is executed ends there. */
struct bytes {
	u8 n, b[15];
};
#define B(...) { sizeof((u8[]){ __VA_ARGS__ }), { __VA_ARGS__ } }

/* SDM 2A-2D appendix A, tables: not in 64-bit mode, reserved for UD, or without the form that the operand asks for. */
static const struct bytes undefined[] = {
	B(0x06), B(0x07), B(0x0e), B(0x16), B(0x17), B(0x1e), B(0x1f), B(0x27), B(0x2f), B(0x37), B(0x3f), B(0x60), B(0x61), B(0x82, 0xc0, 1), B(0x9a),
	B(0xce), B(0xd4, 10), B(0xd5, 10), B(0xd6), B(0xea), B(0x0f, 0x0b), B(0x0f, 0xb9, 0xc0), B(0x0f, 0xff, 0xc0), B(0x0f, 0x04), B(0x0f, 0x0a),
	B(0x0f, 0x0c), B(0x0f, 0x24, 0xc0), B(0x0f, 0x26, 0xc0), B(0x0f, 0x36), B(0x0f, 0x39), B(0x0f, 0x3f), B(0x0f, 0xaa) /* RSM outside SMM */,
	B(0x0f, 0x00, 0xf0) /* group 6 /6 */, B(0x0f, 0x00, 0xf8), B(0x0f, 0xba, 0xc0, 1) /* group 8 /0 */, B(0x0f, 0xba, 0xd8, 1),
	B(0x0f, 0xc7, 0xc8) /* CMPXCHG8B of a register */, B(0x0f, 0xc7, 0x0f + 0xc1) /* group 9 /2, register */, B(0xfe, 0xd0) /* group 4 /2 */,
	B(0xff, 0xf8) /* group 5 /7 */, B(0xff, 0xd8) /* far call through a register */, B(0xff, 0xe8), B(0x8d, 0xc0) /* LEA of a register */,
	B(0x8e, 0xc8) /* MOV to CS */, B(0x8e, 0xf0), B(0x8e, 0xf8), B(0x8c, 0xf0), B(0x0f, 0x20, 0xc8) /* CR1 */, B(0x0f, 0x22, 0xe8) /* CR5 */,
	B(0x0f, 0x20, 0xf8) /* CR7 */, B(0x44, 0x0f, 0x20, 0xc8) /* CR9 */, B(0x44, 0x0f, 0x21, 0xc0) /* DR8 */, B(0x0f, 0x01, 0xfb + 4) /* SWAPGS group */,
	B(0x0f, 0xb2, 0xc0) /* LSS of a register */, B(0x0f, 0xb4, 0xc0), B(0x0f, 0xc3, 0xc0) /* MOVNTI to a register */, B(0x0f, 0xe7, 0xc0),
	B(0x0f, 0x2b, 0xc0), B(0x0f, 0x12 + 1, 0xc0) /* MOVLPS to a register */, B(0x0f, 0xf0, 0xc0), B(0xf2, 0x0f, 0xf0, 0xc0), B(0xc6, 0xc8, 1),
	B(0xc7, 0xc8, 1, 0, 0, 0), B(0x8f, 0xc8 + 1), B(0xd9, 0xd1), B(0xd9, 0xe2), B(0xd9, 0x08), B(0xdb, 0x20), B(0xdd, 0x28), B(0x0f, 0x71, 0xc0, 1),
	B(0x0f, 0x72, 0xc8, 1), B(0x0f, 0x73, 0xc0, 1), B(0x66, 0x0f, 0x71, 0x10, 1), B(0xf3, 0x0f, 0x58 - 0x2, 0xc0), B(0x66, 0x0f, 0x53, 0xc0),
	B(0x66, 0xc5, 0xf8, 0x58, 0xc0) /* VEX behind 66, REX, LOCK */, B(0x48, 0xc5, 0xf8, 0x58, 0xc0), B(0xf0, 0xc5, 0xf8, 0x58, 0xc0),
	B(0xc5, 0xf0, 0x28, 0xc0) /* VMOVAPS with VVVV */, B(0xc5, 0xfc, 0x50, 0x07) /* VMOVMSKPS from memory */, B(0x0f, 0x50, 0x07),
	B(0xc5, 0xf8, 0x04, 0xc0), B(0x0f, 0x38, 0x10, 0xc0), B(0x0f, 0x3a, 0x08, 0xc0, 1), B(0x0f, 0x38, 0x0f, 0xc0),
};

/* LOCK where it may not be (SDM 2A LOCK): registers as destination, instructions not in the list, loads. */
static const struct bytes locked_badly[] = {
	B(0xf0, 0x90), B(0xf0, 0x89, 0x07) /* mov */, B(0xf0, 0x01, 0xc0) /* add to a register */, B(0xf0, 0x03, 0x07) /* add from memory */,
	B(0xf0, 0x39, 0x07) /* cmp */, B(0xf0, 0x83, 0x3f, 1), B(0xf0, 0x85, 0x07) /* test */, B(0xf0, 0xf7, 0x07, 1, 0, 0, 0), B(0xf0, 0x87, 0xc1), /* xchg */
	B(0xf0, 0xff, 0xc0) /* inc eax */, B(0xf0, 0xff, 0x37) /* push */, B(0xf0, 0xf7, 0x27) /* mul */, B(0xf0, 0xd1, 0x27) /* shl */,
	B(0xf0, 0x0f, 0xa3, 0x07) /* bt */, B(0xf0, 0x0f, 0xba, 0x27, 1), B(0xf0, 0x0f, 0xab, 0xc0) /* bts of a register */, B(0xf0, 0x0f, 0xb1, 0xc1),
	B(0xf0, 0x0f, 0xc1, 0xc1) /* xadd */, B(0xf0, 0xeb, 0), B(0xf0, 0xe8, 0, 0, 0, 0), B(0xf0, 0xc3), B(0xf0, 0xa4) /* movs */, B(0xf0, 0xaa),
	B(0xf0, 0x50), B(0xf0, 0x8d, 0x07), B(0xf0, 0x0f, 0x0b), B(0xf0, 0xcc), B(0xf0, 0xcd, 0x80), B(0xf0, 0x0f, 0xa2) /* cpuid */, B(0xf0, 0x0f, 0x31),
	B(0xf0, 0x0f, 0x58, 0x07) /* addps */, B(0xf0, 0x69, 0x07, 1, 0, 0, 0), B(0xf0, 0x0f, 0xaf, 0x07), B(0xf0, 0x86, 0xc8), B(0xf0, 0x0f, 0x05),
	B(0xf0, 0x0f, 0xc7, 0xf0) /* rdrand */, B(0xf0, 0xfa), B(0xf0, 0xf4), B(0xf0, 0x0f, 0x08), B(0xf0, 0xdd, 0x07), B(0xf0, 0x0f, 0xa4, 0x07, 1),
};

/* And where it may: these run. */
static const struct bytes locked_well[] = {
	B(0xf0, 0x01, 0x07), B(0xf0, 0x83, 0x07, 1), B(0xf0, 0x48, 0x11, 0x07), B(0xf0, 0x21, 0x07), B(0xf0, 0x29, 0x07), B(0xf0, 0x09, 0x07), B(0xf0, 0x31, 0x07),
	B(0xf0, 0x19, 0x07), B(0xf0, 0xff, 0x07), B(0xf0, 0xfe, 0x0f), B(0xf0, 0xf7, 0x17), B(0xf0, 0xf6, 0x1f), B(0xf0, 0x87, 0x07), B(0xf0, 0x0f, 0xb1, 0x0f),
	B(0xf0, 0x0f, 0xc1, 0x0f), B(0xf0, 0x0f, 0xab, 0x0f), B(0xf0, 0x0f, 0xba, 0x2f, 1), B(0xf0, 0x0f, 0xba, 0x37, 1), B(0xf0, 0x0f, 0xba, 0x3f, 1),
	B(0xf0, 0x0f, 0xc7, 0x0f), B(0x66, 0xf0, 0x01, 0x07), B(0xf2, 0xf0, 0x01, 0x07), B(0xf0, 0xf3, 0x87, 0x07),
};

static const char *hex_name(const char *what, const struct bytes *x, bool user)
{
	static char text[80];
	unsigned n = 0;
	for (const char *s = mode_name(what, user); *s; s++)
		text[n++] = *s;
	for (unsigned i = 0; i < x->n; i++) {
		text[n++] = ' ';
		text[n++] = "0123456789abcdef"[x->b[i] >> 4];
		text[n++] = "0123456789abcdef"[x->b[i] & 15];
	}
	text[n] = 0;
	return text;
}

static void try_bytes(const struct bytes *table, unsigned n, const char *what, unsigned vector)
{
	section(what);
	bool no_cr = table == undefined && skipping("user mode: control and debug registers that are not there", "user-cr1");
	bool no_rdrand = table == locked_badly && skipping("RDRAND", "lock-any");
	for (unsigned i = 0; i < n; i++)
		for (unsigned user = 0; user < 2; user++) {
			const struct bytes *x = &table[i];
			const u8 *op = x->b + (x->b[0] == 0x44);
			if ((no_cr && user && op[0] == 0x0f && op[1] >= 0x20 && op[1] <= 0x23) || (no_rdrand && x->b[2] == 0xc7 && x->b[3] == 0xf0))
				continue;
			const char *name = hex_name(what, x, user);
			u8 *code = (u8 *)CODE + 1024;
			fill(code, 0xcc, 64);
			copy(code, x->b, x->n);
			struct frame f = start(NULL, user);
			f.rip = (u64)code;
			f.r15 = 77;
			exec(&f);
			check_cell(name, "vector", f.vector, vector);
			check_cell(name, "RIP", f.rip, (u64)code + (vector == BP ? x->n + 1 : 0));
			check_cell(name, "R15", f.r15, 77);
		}
}

#define TRY(table, what, vector) try_bytes(table, sizeof(table) / sizeof(table[0]), what, vector)

/* SDM 2A 2.3.11: 15 bytes; more is #GP(0), whatever comes then. */
static void length(void)
{
	section("length of instructions");
	static const u8 prefixes[] = { 0x66, 0x2e, 0x67, 0x3e, 0xf3, 0x64 };
	for (unsigned user = 0; user < 2; user++)
		for (unsigned n = 12; n < 18; n++)
			for (unsigned k = 0; k < sizeof(prefixes); k++)
				for (unsigned edge = 0; edge < 2; edge++) {
					/* At the end of the page the next is absent: within 15 bytes nobody looks there. */
					u8 *code = (u8 *)CODE + (edge ? 4096 - (n < 15 ? n + 1 : 15) : 256);
					u8 *end = (u8 *)CODE + 4096;
					for (unsigned i = 0; i < n && code + i < end; i++)
						code[i] = prefixes[k];
					if (code + n < end)
						code[n] = 0x90;
					if (code + n + 1 < end)
						code[n + 1] = 0xcc;
					struct frame f = start(NULL, user);
					f.rip = (u64)code;
					exec(&f);
					const char *name = user ? "prefixes, user" : "prefixes, kernel";
					if (n > 14) {
						check_cell(name, "vector", f.vector, GP);
						check_cell(name, "error code", f.error, 0);
						check_cell(name, "RIP", f.rip, (u64)code);
					} else {
						check_cell(name, "vector", f.vector, edge ? PF : BP);
						check_cell(name, "RIP", f.rip, edge ? (u64)end : (u64)code + n + 2);
					}
				}
}

/* --- alignment --- */

/* X(name, instruction, required alignment) with rdi = DATA + 1..: SDM 3A table 6-7. */
#define ALIGNED(X) \
	X(mov8, "mov (%rdi), %al", 1) \
	X(mov16, "mov (%rdi), %ax", 2) \
	X(mov32, "mov (%rdi), %eax", 4) \
	X(mov64, "mov (%rdi), %rax", 8) \
	X(st16, "mov %ax, (%rdi)", 2) \
	X(st32, "mov %eax, (%rdi)", 4) \
	X(st64, "mov %rax, (%rdi)", 8) \
	X(add32, "add %eax, (%rdi)", 4) \
	X(lock64, "lock add %rax, (%rdi)", 8) \
	X(xchg32, "xchg %eax, (%rdi)", 4) \
	X(cmpxchg64, "lock cmpxchg %rcx, (%rdi)", 8) \
	X(movzx16, "movzwl (%rdi), %eax", 2) \
	X(movsx32, "movslq (%rdi), %rax", 4) \
	X(push_mem, "push (%rdi)", 8) \
	X(jmp_mem, "mov %rdi, %r11\n mov %rdi, %rdi\n cmpq $0, (%r11)", 8) \
	X(push, "mov %rdi, %rsp\n push %rax", 8) \
	X(pop, "mov %rdi, %rsp\n pop %rax", 8) \
	X(call, "mov %rdi, %rsp\n call 1f\n 1:", 8) \
	X(lods32, "mov %rdi, %rsi\n lodsl", 4) \
	X(stos16, "stosw", 2) \
	X(movs64, "lea 64(%rdi), %rsi\n and $-8, %rsi\n movsq", 8) \
	X(cmps32, "lea 64(%rdi), %rsi\n and $-8, %rsi\n cmpsl", 4) \
	X(scas64, "scasq", 8) \
	X(fld32, "flds (%rdi)", 4) \
	X(fld64, "fldl (%rdi)", 8) \
	X(fild16, "filds (%rdi)", 2) \
	X(movss, "movss (%rdi), %xmm0", 4) \
	X(movsd, "movsd %xmm0, (%rdi)", 8) \
	X(movq, "movq (%rdi), %xmm0", 8) \
	X(cvtsi, "cvtsi2sd (%rdi), %xmm0", 4) \
	X(bt32, "btl $3, (%rdi)", 4) \
	X(stosb, "stosb", 1) \
	X(lea, "lea (%rdi), %rax", 1)
#define DEFINE_AC(name, text, align) SNIPPET(ac_##name, text "\n ud2");
ALIGNED(DEFINE_AC)

static void alignment(void)
{
	section("alignment checks");
	static const struct {
		const char *name;
		const u8 *code;
		unsigned align;
	} t[] = {
#define ENTRY_AC(n, text, a) { "#AC " #n, ac_##n, a },
		ALIGNED(ENTRY_AC)
	};
	u64 cr0 = read_cr0();
	bool always = skipping("CR0.AM clear", "user-am");
	for (unsigned i = 0; i < sizeof(t) / sizeof(t[0]); i++)
		for (unsigned how = 0; how < 4; how += how || !always ? 1 : 2) /* user, user without AM, user without AC, kernel */
			for (unsigned off = 0; off < 9; off++) {
				write_cr0(how == 1 ? cr0 : cr0 | 1 << 18);
				struct frame f = start(t[i].code, how < 3);
				__asm__ volatile("fninit");
				f.rdi = DATA + 512 + off;
				f.rflags |= how == 2 ? 0 : F_AC;
				exec(&f);
				write_cr0(cr0);
				bool bad = how == 0 && off & (t[i].align - 1);
				check_cell(t[i].name, "vector", f.vector, bad ? AC : UD);
				if (bad)
					check_cell(t[i].name, "error code", f.error, 0);
			}
}

/* --- device not available, floating point: one row each, the rest is in fpu.c --- */

SNIPPET(use_x87, "fld1\n ud2");
SNIPPET(use_sse, "xorps %xmm0, %xmm0\n ud2");
SNIPPET(wait_mf, "fwait\n ud2");

static void floating(void)
{
	section("#NM, #MF, #XM");
	u64 cr0 = read_cr0();
	bool no_ts = skipping("user mode: TS", "user-ts"), no_mf = skipping("user mode: #MF", "user-mf");
	for (unsigned user = 0; user < 2; user++) {
		const u8 *code[] = { use_x87, use_sse, wait_mf };
		for (unsigned i = 0; i < 3; i++) {
			if (user && no_ts)
				break;
			write_cr0(cr0 | 8);
			struct frame f = start(code[i], user);
			exec(&f);
			write_cr0(cr0);
			check_cell("TS", "vector", f.vector, NM);
			check_cell("TS", "RIP", f.rip, user ? user_alias(code[i]) : (u64)code[i]);
			check_cell("TS", "RF", !!(f.rflags & F_RF), 1);
			/* MP decides for WAIT alone (SDM 3A table 9-2) */
			write_cr0((cr0 & ~2ull) | 8);
			f = start(code[i], user);
			exec(&f);
			write_cr0(cr0);
			check_cell("TS without MP", "vector", f.vector, i == 2 ? UD : NM);
		}
		if (user && no_mf)
			continue;
		static const u16 cw = 0x37b;
		static const double zero;
		__asm__ volatile("fninit\n fldcw %0\n fld1\n fdivl %1" : : "m"(cw), "m"(zero));
		struct frame f = start(wait_mf, user);
		exec(&f);
		check_cell("unmasked x87 exception", "vector", f.vector, MF);
		check_cell("unmasked x87 exception", "RIP", f.rip, user ? user_alias(wait_mf) : (u64)wait_mf);
		check_cell("unmasked x87 exception", "RF", !!(f.rflags & F_RF), 1);
		__asm__ volatile("fninit");
	}
}

void guest_main(void)
{
	map_user_alias();
	map(DATA, page_alloc(1), P | W | U);
	map(RODATA, page_alloc(1), P | U);
	map(SYSTEM, page_alloc(1), P | W);
	map(CODE, page_alloc(1), P | W | U);
	instructions();
	TRY(undefined, "undefined opcodes", UD);
	TRY(locked_badly, "LOCK misused", UD);
	TRY(locked_well, "LOCK used", BP);
	length();
	alignment();
	floating();
}
