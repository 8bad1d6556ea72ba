/* Between kernel and user mode: SYSCALL, SYSRET, IRET, interrupts and exceptions of all kinds, single steps, segment bases. */
#include "guest.h"

const char guest_name[] = "user";

#define USER_CODE VA(0x100)
#define USER_STACK (VA(0x181))
#define DATA VA(0x190)

extern const u8 first_snippet[], last_snippet[];
__asm__(".pushsection .snippets, \"ax\"\n first_snippet:\n .popsection");
SNIPPET(syscall_1, "stc\n syscall\n .globl syscall_1_next\n syscall_1_next: ud2");
SNIPPET(sysret_1, "sysretq");
SNIPPET(sysret_32, "sysretl");
SNIPPET(iretq_1, "iretq");
SNIPPET(int3_1, "int3\n ud2");
SNIPPET(int_80, "int $0x80\n ud2");
SNIPPET(int_81, "int $0x81\n ud2");
SNIPPET(int_bp, ".byte 0xcd, 3\n ud2");
SNIPPET(icebp, ".byte 0xf1\n ud2");
SNIPPET(ud2_1, "ud2");
SNIPPET(hlt_1, "hlt\n ud2");
SNIPPET(cli_1, "cli\n ud2");
SNIPPET(sti_1, "sti\n ud2");
SNIPPET(in_1, "in $0x80, %al\n ud2");
SNIPPET(cr3_1, "mov %cr3, %rax\n ud2");
SNIPPET(to_cr3, "mov %rax, %cr3\n ud2");
SNIPPET(rdmsr_1, "rdmsr\n ud2");
SNIPPET(wrmsr_1, "wrmsr\n ud2");
SNIPPET(invlpg_1, "invlpg (%rsp)\n ud2");
SNIPPET(swapgs_1, "swapgs\n ud2");
SNIPPET(lgdt_1, "lgdt (%rsp)\n ud2");
SNIPPET(clts_1, "clts\n ud2");
SNIPPET(dr_1, "mov %dr7, %rax\n ud2");
SNIPPET(ltr_1, "ltr %ax\n ud2");
SNIPPET(div_0, "xor %ecx, %ecx\n mov $5, %eax\n cltd\n .globl div_0_at\n div_0_at: div %ecx\n ud2");
SNIPPET(div_over, "mov $1, %ecx\n mov $2, %edx\n .globl div_over_at\n div_over_at: div %ecx\n ud2");
SNIPPET(idiv_min, "mov $-1, %ecx\n mov $0x80000000, %eax\n cltd\n .globl idiv_min_at\n idiv_min_at: idiv %ecx\n ud2");
SNIPPET(div_mem, "xor %edx, %edx\n movl $0, -8(%rsp)\n .globl div_mem_at\n div_mem_at: divl -8(%rsp)\n ud2");
SNIPPET(lock_bad, ".byte 0xf0, 0x90\n ud2");
SNIPPET(long_insn, ".byte 0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x90,0x90\n ud2");
SNIPPET(too_long, ".byte 0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x90\n ud2");
SNIPPET(jmp_noncanon, "jmp *%rax");
SNIPPET(ret_noncanon, "push %rax\n ret");
SNIPPET(flags_all, "pushf\n pop %rax\n ud2");
SNIPPET(popf_1, "push %rax\n popf\n pushf\n pop %rbx\n ud2");
SNIPPET(popf_w, "push %rax\n popfw\n pushf\n pop %rbx\n ud2");
SNIPPET(sahf_1, "mov $0xffff, %eax\n sahf\n lahf\n pushf\n pop %rbx\n ud2");
SNIPPET(segs, "mov %ds, %eax\n mov %es, %ecx\n mov %fs, %edx\n mov %gs, %ebx\n mov %cs, %esi\n mov %ss, %edi\n ud2");
SNIPPET(fsgs, "mov %fs:0, %rax\n mov %gs:8, %rbx\n mov %rcx, %fs:16(%rdi)\n mov %gs:(,%rdi,8), %rdx\n .byte 0x64\n lea 5(%rdi), %rsi\n ud2");
SNIPPET(fsgsbase, "rdfsbase %rax\n rdgsbase %rbx\n wrfsbase %rcx\n wrgsbase %rdx\n mov %fs:0, %rsi\n mov %gs:0, %rdi\n rdfsbase %r8\n rdgsbase %r9d\n ud2");
SNIPPET(wrfs_bad, "wrfsbase %rcx\n ud2");
SNIPPET(steps, "mov $1, %eax\n add $2, %eax\n push %rax\n pop %rcx\n jmp 1f\n ud2\n 1: call 2f\n nop\n ud2\n 2: inc %ecx\n ret");
SNIPPET(step_rep, "mov $3, %ecx\n rep stosb\n nop\n ud2");
SNIPPET(step_sys, "nop\n syscall\n .globl step_sys_next\n step_sys_next: nop\n ud2");
SNIPPET(set_tf, "pushf\n orq $0x100, (%rsp)\n popf\n nop\n .globl set_tf_at\n set_tf_at: nop\n ud2");
SNIPPET(set_tf_ss, "pushf\n orq $0x100, (%rsp)\n mov %ss, %eax\n popf\n mov %eax, %ss\n nop\n .globl set_tf_ss_at\n set_tf_ss_at: nop\n ud2");
SNIPPET(sys_loop, "1: mov %ecx, %r15d\n syscall\n mov %r15d, %ecx\n add %rax, %rbx\n dec %ecx\n jnz 1b\n ud2");
SNIPPET(compat, ".byte 0x40, 0x90\n ud2"); /* 32-bit: inc %eax; nop */
__asm__(".pushsection .snippets, \"ax\"\n last_snippet:\n .popsection");
extern const u8 syscall_1_next[], div_0_at[], div_over_at[], idiv_min_at[], div_mem_at[], set_tf_at[], set_tf_ss_at[], step_sys_next[];

/* What LSTAR points at: traps with the state as SYSCALL left it, or returns rcx-independent answers. */
SNIPPET(entry_ud, "ud2");
SNIPPET(entry_sum, "mov $3, %eax\n sysretq");
SNIPPET(entry_stack, "swapgs\n mov %rsp, %gs:8\n mov %gs:0, %rsp\n push %rcx\n push %r11\n call 1f\n pop %r11\n pop %rcx\n mov %gs:8, %rsp\n swapgs\n sysretq\n"
		     "1: lea 1(%rdi), %rax\n ret");
SNIPPET(entry_iret, "mov %rsp, %r10\n mov $0x101010, %eax\n lea iret_stack+128(%rip), %rsp\n push $0x2b\n push %r10\n push %r11\n push $0x33\n push %rcx\n iretq");
u64 iret_stack[16] __attribute__((aligned(16)));

static u64 user_of(const void *code)
{
	return USER_CODE + (u64)((const u8 *)code - first_snippet);
}

static struct frame run(const u8 *code, bool user, u64 rflags)
{
	struct frame f = user ? user_frame(user_of(code), USER_STACK) : kernel_frame(code);
	f.rflags |= rflags;
	exec(&f);
	return f;
}

static void expect(const u8 *code, bool user, unsigned vector, u64 error, const u8 *at)
{
	struct frame f = run(code, user, 0);
	CHECK_EQ(f.vector, vector);
	CHECK_EQ(f.error, error);
	CHECK_EQ(f.rip, user ? user_of(at) : (u64)at);
	CHECK_EQ(f.cs, user ? UCODE : KCODE);
	CHECK_EQ(f.ss, user ? UDATA : KDATA);
	CHECK_EQ(f.rsp, user ? USER_STACK : kernel_frame(code).rsp);
}

static void exceptions(void)
{
	section("exceptions");
	bool user_int = !skipping("INT n in ring 3", "user-int");
	for (int user = 0; user < 2; user++) {
		expect(int3_1, user, BP, 0, int3_1 + 1);
		expect(int_bp, user, BP, 0, int_bp + 2);
		if (!user || user_int) {
			expect(int_80, user, 0x80, 0, int_80 + 2);
			expect(int_81, user, user ? GP : 0x81, user ? 0x81 * 8 + 2 : 0, user ? int_81 : int_81 + 2);
		}
		expect(icebp, user, DB, 0, icebp + 1);
		expect(ud2_1, user, UD, 0, ud2_1);
		expect(div_0, user, DE, 0, div_0_at);
		expect(div_over, user, DE, 0, div_over_at);
		expect(idiv_min, user, DE, 0, idiv_min_at);
		expect(div_mem, user, DE, 0, div_mem_at);
		expect(lock_bad, user, UD, 0, lock_bad);
		expect(too_long, user, GP, 0, too_long);
		expect(long_insn, user, UD, 0, long_insn + 16);
	}
	section("privileged instructions");
	const u8 *privileged[] = { hlt_1, cli_1, sti_1, in_1, cr3_1, to_cr3, rdmsr_1, wrmsr_1, invlpg_1, swapgs_1, lgdt_1, clts_1, dr_1, ltr_1 };
	for (unsigned i = 0; i < sizeof(privileged) / sizeof(privileged[0]); i++)
		expect(privileged[i], true, GP, 0, privileged[i]);
	bool iopl = !skipping("IOPL 3", "user-iopl");
	for (unsigned i = 0; i < 3 && iopl; i++) {
		struct frame f = run(cli_1, true, 3 << 12 | F_IF);
		CHECK_EQ(f.vector, UD);
		CHECK_EQ(f.rflags & F_IF, 0);
		f = run(sti_1, true, 3 << 12);
		CHECK_EQ(f.vector, UD);
		CHECK_EQ(f.rflags & F_IF, F_IF);
		f = run(in_1, true, 3 << 12);
		CHECK_EQ(f.vector, UD);
	}
	section("jumps to nowhere");
	for (int user = 0; user < 2; user++) {
		struct frame f = user ? user_frame(user_of(jmp_noncanon), USER_STACK) : kernel_frame(jmp_noncanon);
		f.rax = 0x800000000000;
		exec(&f);
		CHECK_EQ(f.vector, GP);
		CHECK_EQ(f.error, 0);
		f = user ? user_frame(user_of(ret_noncanon), USER_STACK) : kernel_frame(ret_noncanon);
		f.rax = 0xffff7fffffffffff;
		exec(&f);
		CHECK_EQ(f.vector, GP);
		f = user ? user_frame(user_of(jmp_noncanon), USER_STACK) : kernel_frame(jmp_noncanon);
		f.rax = 0x7ffffffff000;
		exec(&f);
		CHECK_EQ(f.vector, PF);
		CHECK_EQ(f.cr2, 0x7ffffffff000);
		CHECK_EQ(f.rip, 0x7ffffffff000);
		CHECK_EQ(f.error, PF_I | (user ? PF_U : 0));
	}
}

/* --- flags --- */

static void flags(void)
{
	section("flags through IRET, PUSHF, POPF");
	unsigned rings = skipping("IF in ring 3", "user-if") ? 1 : 2;
	static const u64 bits[] = { F_CF, F_PF, F_AF, F_ZF, F_SF, F_DF, F_OF, F_IF, F_AC, F_ID, STATUS, STATUS | F_DF | F_ID | F_AC, 0 };
	for (unsigned user = 0; user < rings; user++)
		for (unsigned i = 0; i < sizeof(bits) / sizeof(bits[0]); i++) {
			struct frame f = run(flags_all, user, bits[i]);
			CHECK_EQ(f.vector, UD);
			CHECK_EQ(f.rax, bits[i] | 2);
			CHECK_EQ(f.rflags & ~(u64)F_RF, bits[i] | 2);
			f = user ? user_frame(user_of(popf_1), USER_STACK) : kernel_frame(popf_1);
			f.rax = bits[i];
			exec(&f);
			CHECK_EQ(f.rbx, (bits[i] & ~(user ? (u64)F_IF : 0)) | 2);
			/* IOPL, VIF, VIP, VM, RF: as POPF's table says */
			f = user ? user_frame(user_of(popf_1), USER_STACK) : kernel_frame(popf_1);
			f.rax = bits[i] | 3 << 12 | 1 << 16 | 1 << 17 | 1 << 19 | 1 << 20 | 0xffffffff00000000 | 1 << 15 | 8;
			exec(&f);
			CHECK_EQ(f.vector, UD);
			CHECK_EQ(f.rbx, user ? (bits[i] & ~(u64)F_IF) | 2 : bits[i] | 2 | 3 << 12);
			f = user ? user_frame(user_of(popf_1), USER_STACK) : kernel_frame(popf_1);
			f.rflags |= 3 << 12;
			f.rax = bits[i];
			exec(&f);
			CHECK_EQ(f.rbx, bits[i] | 2 | (user ? 3 << 12 : 0));
			f = user ? user_frame(user_of(popf_w), USER_STACK) : kernel_frame(popf_w);
			f.rflags |= F_ID | F_AC;
			f.rax = bits[i];
			f.rsp &= ~15ull;
			exec(&f);
			if (f.vector == UD)
				CHECK_EQ(f.rbx & 0xfffff, ((bits[i] & 0xffff & ~(user ? (u64)F_IF : 0)) | 2 | F_AC));
			/* SYSCALL and SYSRET carry them all; SFMASK clears some */
			if (!user)
				continue;
			wrmsr(0xc0000082, (u64)entry_ud);
			wrmsr(0xc0000084, i & 1 ? 0x47700 : 0);
			f = run(syscall_1, true, bits[i]);
			CHECK_EQ(f.vector, UD);
			CHECK_EQ(f.rip, (u64)entry_ud);
			CHECK_EQ(f.cs, KCODE);
			CHECK_EQ(f.ss, KDATA);
			CHECK_EQ(f.rcx, user_of(syscall_1_next));
			CHECK_EQ(f.r11, bits[i] | 2 | F_CF);
			CHECK_EQ(f.rflags & ~(u64)F_RF, ((bits[i] | F_CF) & ~(i & 1 ? 0x47700ull : 0)) | 2);
			CHECK_EQ(f.rsp, USER_STACK);
			f = kernel_frame(sysret_1);
			f.rcx = user_of(flags_all);
			f.r11 = bits[i];
			f.rsp = USER_STACK;
			exec(&f);
			CHECK_EQ(f.vector, UD);
			CHECK_EQ(f.cs, UCODE);
			CHECK_EQ(f.ss, UDATA);
			CHECK_EQ(f.rax, bits[i] | 2);
		}
	struct frame f = run(sahf_1, true, F_OF);
	CHECK_EQ(f.rbx & STATUS, STATUS);
	CHECK_EQ(f.rax & 0xff00, 0xd700);
	/* PUSHF shows no RF; IRET with NT faults */
	f = kernel_frame(iretq_1);
	f.rflags |= F_NT;
	exec(&f);
	CHECK_EQ(f.vector, GP);
	CHECK_EQ(f.rip, (u64)iretq_1);
}

/* --- SYSCALL paths --- */

static void syscalls(void)
{
	section("system calls");
	static u64 percpu[4];
	u64 *stack = page_alloc(1);
	percpu[0] = (u64)stack + 4096;
	wrmsr(0xc0000084, 0x47700);
	wrmsr(0xc0000102, (u64)percpu);
	wrmsr(0xc0000101, 0x1234);
	const u8 *entries[] = { entry_sum, entry_stack, entry_iret };
	for (unsigned k = 0; k < 3; k++) {
		wrmsr(0xc0000082, (u64)entries[k]);
		struct frame f = user_frame(user_of(sys_loop), USER_STACK);
		f.rcx = 300, f.rdi = 41, f.rbp = 7;
		exec(&f);
		CHECK_EQ(f.vector, UD);
		CHECK_EQ(f.rbx, 300ul * (k == 0 ? 3 : k == 1 ? 42 : 0x101010));
		CHECK_EQ(f.cs, UCODE);
		CHECK_EQ(f.ss, UDATA);
		CHECK_EQ(f.rsp, USER_STACK);
		CHECK_EQ(f.rbp, 7);
		CHECK_EQ(rdmsr(0xc0000101), 0x1234);
		CHECK_EQ(rdmsr(0xc0000102), (u64)percpu);
	}
}

static void returns(void)
{
	if (!section_unless("returns that must not be", "late-gp,iret-checks"))
		return;
	struct frame f = kernel_frame(sysret_1);
	f.rcx = 0x800000000000;
	f.r11 = 2;
	exec(&f);
	CHECK_EQ(f.vector, GP);
	CHECK_EQ(f.cs, KCODE); /* at CPL 0, as on Intel */
	CHECK_EQ(f.rip, (u64)sysret_1);
	u64 good[5] = { user_of(ud2_1), UCODE, 2, USER_STACK, UDATA };
	static u64 fr[5] __attribute__((aligned(64)));
	static const struct {
		unsigned i;
		u64 value;
		unsigned vector, error;
	} bad[] = {
		{ 0, 0x800000000000, GP, 0 }, { 1, 0, GP, 0 }, { 1, 0x200 | 3, GP, 0x200 }, { 1, KCODE | 3, GP, KCODE }, { 1, UDATA, GP, UDATA & ~3 },
		{ 4, 0, GP, 0 }, { 4, KDATA, GP, KDATA }, { 4, KDATA | 3, GP, KDATA }, { 4, UCODE, GP, UCODE & ~3 },
	};
	for (unsigned i = 0; i < sizeof(bad) / sizeof(bad[0]); i++)
		for (unsigned k = 0; k < 2; k++) {
			copy(fr, good, sizeof(fr));
			fr[bad[i].i] = bad[i].value;
			f = kernel_frame(iretq_1);
			f.rsp = (u64)fr;
			f.rflags |= F_CF | F_ZF;
			exec(&f);
			CHECK_EQ(f.vector, bad[i].vector);
			CHECK_EQ(f.error, bad[i].error);
			CHECK_EQ(f.rip, (u64)iretq_1);
			CHECK_EQ(f.rsp, (u64)fr);
			CHECK_EQ(f.cs, KCODE);
			CHECK_EQ(f.rflags & STATUS, F_CF | F_ZF);
		}
	/* IRET within the kernel takes RSP and SS from the frame too; a null SS will do. */
	for (unsigned i = 0; i < 4; i++) {
		fr[0] = (u64)ud2_1, fr[1] = KCODE, fr[2] = 2 | (i & 1 ? F_CF | F_DF : 0), fr[3] = 0x123456789, fr[4] = i & 2 ? 0 : KDATA;
		f = kernel_frame(iretq_1);
		f.rsp = (u64)fr;
		exec(&f);
		CHECK_EQ(f.vector, UD);
		CHECK_EQ(f.rsp, 0x123456789);
		CHECK_EQ(f.ss, fr[4]);
		CHECK_EQ(f.rflags & ~(u64)F_RF, fr[2]);
	}
	/* RF set by IRET is gone after one instruction and harmless. */
	fr[0] = (u64)flags_all, fr[1] = KCODE, fr[2] = 2 | F_RF, fr[3] = kernel_frame(ud2_1).rsp, fr[4] = KDATA;
	f = kernel_frame(iretq_1);
	f.rsp = (u64)fr;
	exec(&f);
	CHECK_EQ(f.rax & F_RF, 0);
}

static void compatibility(void)
{
	section("compatibility mode");
	struct frame f = user_frame(user_of(compat) & 0xffffffff, 0x1000);
	u8 *low = page_alloc(1);
	COPY(low, compat);
	*pte_of(boot_pml4, VA(0x1f0), 1) = 0;
	/* identity-mapped memory is the kernel's: map a user page low, at 0xc0000000 (no RAM there) */
	u64 *pd = pte_of(boot_pml4, 0xc0000000, 2), old = *pd;
	u64 *pdpte = pte_of(boot_pml4, 0xc0000000, 3), old3 = *pdpte;
	u64 *pt = page_alloc(1);
	pt[0] = (u64)low | P | W | U;
	*pd = (u64)pt | P | W | U;
	*pdpte |= U;
	write_cr4(read_cr4() ^ 1 << 7);
	write_cr4(read_cr4() ^ 1 << 7);
	for (unsigned i = 0; i < 3; i++) {
		f.rip = 0xc0000000;
		f.cs = 0x23;
		f.ss = UDATA;
		f.rax = 0x1ffffffff;
		f.vector = 0;
		exec(&f);
		CHECK_EQ(f.vector, UD);
		CHECK_EQ(f.rip, 0xc0000002);
		CHECK_EQ(f.cs, 0x23);
		CHECK_EQ((u32)f.rax, 0);
	}
	if (!skipping("SYSRET to it", "sysret-compat")) {
		f = kernel_frame(sysret_32);
		f.rcx = 0xc0000000, f.r11 = 2, f.rax = 6;
		exec(&f);
		CHECK_EQ(f.vector, UD);
		CHECK_EQ(f.cs, 0x23);
		CHECK_EQ((u32)f.rax, 7);
	}
	*pd = old;
	*pdpte = old3;
	write_cr4(read_cr4() ^ 1 << 7);
	write_cr4(read_cr4() ^ 1 << 7);
}

/* --- segments --- */

static void bases(void)
{
	section("FS and GS");
	bool can_be_off = !skipping("FSGSBASE switched off", "fsgsbase-on");
	u64 *d = page_alloc(1);
	map(DATA, d, P | W | U);
	for (unsigned i = 0; i < 512; i++)
		d[i] = 1000 + i;
	for (unsigned user = 0; user < 2; user++)
		for (unsigned i = 0; i < 3; i++) {
			wrmsr(0xc0000100, DATA + 80);
			wrmsr(0xc0000101, DATA + 800);
			struct frame f = user ? user_frame(user_of(fsgs), USER_STACK) : kernel_frame(fsgs);
			f.rcx = 77, f.rdi = 16;
			exec(&f);
			CHECK_EQ(f.vector, UD);
			CHECK_EQ(f.rax, i ? 1010 : 1010);
			CHECK_EQ(f.rbx, 1101);
			CHECK_EQ(d[14], 77);
			CHECK_EQ(f.rdx, 1116);
			CHECK_EQ(f.rsi, 21);
			d[14] = 1014;
			/* not without CR4.FSGSBASE */
			if (can_be_off)
				expect(fsgsbase, user, UD, 0, fsgsbase);
			write_cr4(read_cr4() | 1 << 16);
			f = user ? user_frame(user_of(fsgsbase), USER_STACK) : kernel_frame(fsgsbase);
			f.rcx = DATA + 8, f.rdx = DATA + 16;
			exec(&f);
			CHECK_EQ(f.vector, UD);
			CHECK_EQ(f.rip, (user ? user_of(fsgsbase_end) : (u64)fsgsbase_end) - 2);
			CHECK_EQ(f.rax, DATA + 80);
			CHECK_EQ(f.rbx, DATA + 800);
			CHECK_EQ(f.rsi, 1001);
			CHECK_EQ(f.rdi, 1002);
			CHECK_EQ(f.r8, DATA + 8);
			CHECK_EQ(f.r9, (u32)(DATA + 16));
			CHECK_EQ(rdmsr(0xc0000100), DATA + 8);
			CHECK_EQ(rdmsr(0xc0000101), DATA + 16);
			f = user ? user_frame(user_of(wrfs_bad), USER_STACK) : kernel_frame(wrfs_bad);
			f.rcx = 0x800000000000;
			exec(&f);
			CHECK_EQ(f.vector, GP);
			CHECK_EQ(rdmsr(0xc0000100), DATA + 8);
			write_cr4(read_cr4() & ~(1ull << 16));
			/* a base near the end of the canonical range: the sum counts */
			wrmsr(0xc0000100, 0x7ffffffff000);
			f = user ? user_frame(user_of(fsgs), USER_STACK) : kernel_frame(fsgs);
			f.rdi = 16;
			exec(&f);
			CHECK_EQ(f.vector, PF);
			CHECK_EQ(f.cr2, 0x7ffffffff000);
		}
	wrmsr(0xc0000100, 0);
	wrmsr(0xc0000101, 0);
	struct frame f = run(segs, true, 0);
	CHECK_EQ(f.rsi, UCODE);
	CHECK_EQ(f.rdi, UDATA);
	CHECK_EQ(f.rdx | f.rbx, 0);
}

/* --- single step --- */

static u64 trail[64];
static unsigned trail_n;

static void on_step(struct frame *f)
{
	if (trail_n < 64)
		trail[trail_n++] = f->rip;
	u64 dr6;
	__asm__ volatile("mov %%dr6, %0" : "=r"(dr6));
	CHECK_EQ(dr6 & 0x4000, 0x4000);
	__asm__ volatile("mov %0, %%dr6" : : "r"(0xffff0ff0ul));
	if (f->rip == (u64)entry_sum)
		f->rflags &= ~(u64)F_TF;
}

static void single_step(void)
{
	section("single steps");
	bool rep_stops = !skipping("each turn of a REP instruction", "rep-step"), ss_holds = !skipping("MOV SS", "ss-step");
	handlers[DB] = on_step;
	wrmsr(0xc0000084, 0x47700);
	wrmsr(0xc0000082, (u64)entry_sum);
	static const u8 lengths[] = { 5, 8, 9, 10 };
	for (unsigned user = 0; user < 2; user++)
		for (unsigned i = 0; i < 2; i++) {
			u64 base = user ? user_of(steps) : (u64)steps;
			trail_n = 0;
			struct frame f = run(steps, user, F_TF);
			CHECK_EQ(f.vector, UD);
			CHECK_EQ(f.rcx, 4);
			CHECK_EQ(trail_n, 9);
			for (unsigned k = 0; k < 4; k++)
				CHECK_EQ(trail[k], base + lengths[k]);
			CHECK_EQ(trail[4], base + 14);
			CHECK_EQ(trail[5], base + 22);
			CHECK_EQ(trail[6], base + 24);
			CHECK_EQ(trail[7], base + 19);
			CHECK_EQ(trail[8], base + 20);
			CHECK_EQ(f.rflags & F_TF, F_TF);
			/* each turn of a string instruction */
			trail_n = 0;
			f = user ? user_frame(user_of(step_rep), USER_STACK) : kernel_frame(step_rep);
			f.rdi = DATA;
			f.rflags |= F_TF;
			exec(&f);
			CHECK_EQ(f.vector, UD);
			CHECK_EQ(f.rdi, DATA + 3);
			if (user || rep_stops)
				CHECK_EQ(trail_n, 5);
			/* switched on by POPF: the trap comes after the instruction behind it */
			trail_n = 0;
			f = run(set_tf, user, 0);
			CHECK_EQ(f.vector, UD);
			CHECK_EQ(trail_n, 2);
			CHECK_EQ(trail[0], user ? user_of(set_tf_at) : (u64)set_tf_at);
			/* MOV SS holds it back once more */
			if (!user && ss_holds) {
				trail_n = 0;
				f = run(set_tf_ss, user, 0);
				CHECK_EQ(f.vector, UD);
				CHECK_EQ(trail_n, 2);
				CHECK_EQ(trail[0], (u64)set_tf_ss_at);
			}
		}
	/* a fault wins over the trap */
	trail_n = 0;
	struct frame f = run(ud2_1, true, F_TF);
	CHECK_EQ(f.vector, UD);
	CHECK_EQ(trail_n, 0);
	/* SYSCALL with TF: SFMASK clears it, so the entry runs free, and SYSRET brings it back */
	f = run(step_sys, true, F_TF);
	CHECK_EQ(f.vector, UD);
	CHECK_EQ(f.rax, 3);
	CHECK_EQ(trail[0], user_of(step_sys) + 1);
	/* the trap of SYSRET itself: on the instruction behind, or behind that */
	CHECK(trail_n >= 2 && (trail[1] == user_of(step_sys_next) || trail[1] == user_of(step_sys_next) + 1));
	CHECK_EQ(trail[trail_n - 1], user_of(step_sys_next) + 1);
	handlers[DB] = NULL;
	if (skipping("INT n with TF", "user-int"))
		return;
	f = run(int_80, true, F_TF);
	CHECK_EQ(f.vector, 0x80);
	CHECK_EQ(f.rflags & F_TF, F_TF);
}

/* --- delivery --- */

static void delivery(void)
{
	section("stacks of handlers");
	/* without IST: RSP0 from user mode, the same stack from kernel mode, 16-byte aligned */
	extern u8 show_rsp[];
	bool user_int = !skipping("from ring 3 by INT n", "user-int");
	set_gate(0x80, show_rsp, 0, 3);
	for (unsigned n = 0; n < 16; n++) {
		struct frame f = kernel_frame(int_80);
		u64 sp = f.rsp - 64 - n;
		f.rsp = sp;
		exec(&f);
		CHECK_EQ(f.vector, UD);
		CHECK_EQ(f.rbx, (sp & ~15ull) - 40);
		CHECK_EQ(f.rcx, sp);
		if (!user_int)
			continue;
		f = user_frame(user_of(int_80), USER_STACK - n);
		exec(&f);
		CHECK_EQ(f.vector, UD);
		CHECK_EQ(f.rbx, *(u64 *)((u8 *)tss_of(0) + 4) - 40);
		CHECK_EQ(f.rcx, USER_STACK - n);
		CHECK_EQ(f.cs, KCODE);
	}
	set_gate(0x80, (void *)(vectors + 16 * 0x80), 2, 3);
	section("double faults");
	/* a page fault whose gate is not present becomes #DF; #NP while delivering #GP too */
	extern u64 idt[][2];
	u64 pf[2] = { idt[PF][0], idt[PF][1] };
	idt[PF][0] &= ~(1ull << 47);
	struct frame f = kernel_frame(jmp_noncanon);
	f.rax = VA(0x1ff);
	exec(&f);
	CHECK_EQ(f.vector, DF);
	CHECK_EQ(f.error, 0);
	CHECK_EQ(f.cr2, VA(0x1ff));
	f = user_frame(user_of(jmp_noncanon), USER_STACK);
	f.rax = VA(0x1ff);
	exec(&f);
	CHECK_EQ(f.vector, DF);
	CHECK_EQ(f.cs, UCODE);
	idt[PF][0] = pf[0];
	if (skipping("#NP in the delivery of #UD", "np-df"))
		return;
	u64 ud = idt[UD][0];
	idt[UD][0] &= ~(1ull << 47);
	f = run(ud2_1, true, 0);
	CHECK_EQ(f.vector, NP); /* #UD is benign: serially */
	CHECK_EQ(f.error, UD * 8 + 2 + 1);
	idt[UD][0] = ud;
}
__asm__(".pushsection .snippets, \"ax\"\n show_rsp: mov %rsp, %rbx\n mov 24(%rsp), %rcx\n ud2\n .popsection");

void guest_main(void)
{
	for (u64 p = (u64)first_snippet; p < (u64)last_snippet; p += 4096)
		map(USER_CODE + (p - (u64)first_snippet), (void *)p, P | W | U);
	map(USER_STACK - 4096, page_alloc(1), P | W | U);
	map(DATA, page_alloc(1), P | W | U);
	wrmsr(0xc0000081, (u64)0x20 << 48 | (u64)KCODE << 32);
	exceptions();
	flags();
	syscalls();
	returns();
	compatibility();
	bases();
	single_step();
	delivery();
}
