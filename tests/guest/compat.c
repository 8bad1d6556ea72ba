/* Compatibility mode: 32-bit user code under a 64-bit kernel. Every way in and out, segments that are not flat, addresses that wrap,
 * the same bytes as 32-bit and as 64-bit code. */
#include "guest.h"

const char guest_name[] = "compat";

enum { CODE32 = 0x23, KCODE32 = 0x18, BR = 5, OF = 4 };
/* Free descriptors of a guest with one processor. */
enum { SEL_DATA = 0x53, SEL_DATA2 = 0x5b, SEL_CODE = 0x63, SEL_GATE = 0x73 };
/* Where user code sees its pages, below 4 GiB: code, data behind it, a stack; the last page of all. */
#define LOW 0xc0000000u
#define CODE LOW
#define DATA (LOW + 0x10000u)
#define STACK (LOW + 0x21000u)
#define LAST 0xfffff000u

extern u64 gdt[];
extern const u8 first_snippet[], last_snippet[];
__asm__(".pushsection .snippets, \"ax\"\n first_snippet:\n .popsection");
#define SNIPPET32(name, text) SNIPPET(name, ".code32\n" text "\n ud2\n .code64")

SNIPPET32(regs, "inc %eax\n dec %ecx\n push %eax\n pop %edx\n push $-3\n pop %ebx\n push %esp\n pop %esi\n pusha\n add $32, %esp\n lea -1(%eax,%ecx,4), %edi");
SNIPPET32(upper, "mov 4(%eax), %ebx\n mov (%edi,%ecx,4), %edx\n incb (%esi)\n add $0, %ebp");
SNIPPET32(upper_loop, "xor %eax, %eax\n 1: inc %eax\n loop 1b\n jecxz 2f\n ud2\n 2: mov %ebp, %ebp\n push %ebp\n mov %esp, %ebp\n sub $16, %esp\n leave\n nop");
SNIPPET32(upper_leave, "leave\n nop");
SNIPPET32(upper_string, "rep movsb\n lodsb\n stosl\n nop");
SNIPPET32(upper_jecxz, "jecxz 1f\n mov $1, %eax\n ud2\n 1: mov $2, %eax");
SNIPPET32(div_0, "xor %ecx, %ecx\n mov $5, %eax\n cltd\n .globl div_0_at\n div_0_at: div %ecx");
SNIPPET32(int3_1, "int3");
SNIPPET32(into_1, "mov $0x7fffffff, %eax\n inc %eax\n into");
SNIPPET32(into_0, "xor %eax, %eax\n into");
SNIPPET32(bound_1, "bound %eax, (%ebx)");
SNIPPET32(int_80, "int $0x80");
SNIPPET32(int_81, "int $0x81");
SNIPPET32(syscall_1, "syscall");
SNIPPET32(sysexit_1, "sysexit");
SNIPPET32(hlt_1, "hlt");
SNIPPET32(load_1, "mov (%eax), %ecx");
SNIPPET32(store_1, "mov %ecx, (%eax)");
SNIPPET32(push_1, "push %eax");
SNIPPET32(pop_1, "pop %eax");
SNIPPET32(arpl_1, "arpl %cx, %ax\n setz %bl");
SNIPPET32(inquire, "lar %ax, %ecx\n setz %bl\n lsl %ax, %edx\n setz %bh\n verr %ax\n setz %al\n verw %di\n setz %ah");
SNIPPET32(gs_load, "mov %gs:(%eax), %ecx\n add %gs:4(%eax), %ecx");
SNIPPET32(gs_store, "mov %ecx, %gs:(%eax)");
SNIPPET32(fs_load, "mov %fs:(%eax), %ecx");
SNIPPET32(ds_load, "mov (%eax), %ecx\n add 4(%eax), %ecx\n mov 8(%eax), %edx");
SNIPPET32(cs_load, "mov %cs:(%eax), %ecx");
SNIPPET32(cs_store, "mov %ecx, %cs:(%eax)");
SNIPPET32(set_ds, "mov %ebx, %ds\n mov (%eax), %ecx");
SNIPPET32(set_gs, "mov %ebx, %gs\n mov %gs:(%eax), %ecx");
SNIPPET32(les_1, "les (%eax), %ecx\n mov %es:(%ecx), %edx");
SNIPPET32(moffs, "mov 0xc0010008, %eax\n mov %eax, 0xc0010010\n mov 0xc0010009, %al");
SNIPPET32(addr16, "mov $0x1234, %eax\n addr16 mov (%bx), %ecx");
SNIPPET32(both_modes, ".byte 0x40, 0x90, 0x48, 0x01, 0xd8"); /* inc eax; nop; dec eax; add eax, ebx / rex nop; add rax, rbx */
SNIPPET32(jump_wrap, "mov $7, %eax\n jmp *%ecx");
SNIPPET32(callee, "1: push %ecx\n call 3f\n pop %ecx\n loop 1b\n call *%esi\n ret $4\n 3: add $3, %eax\n ret");
SNIPPET32(sysenter_1, "sysenter");
SNIPPET32(sysenter_loop, "1: mov %ecx, %ebx\n call 9f\n 9: pop %edx\n add $2f - 9b, %edx\n mov %esp, %ebp\n sysenter\n ud2\n"
			 "2: add %eax, %esi\n mov %ebx, %ecx\n loop 1b");
SNIPPET32(int_loop, "1: int $0x80\n add %eax, %esi\n loop 1b");
SNIPPET32(to64, "ljmp *(%eax)");
SNIPPET32(lcall64, "lcall *(%eax)\n .globl lcall64_next\n lcall64_next: inc %ebx");
SNIPPET(from32, "mov $0x123456789, %r9\n mov %r9, %r10\n add %rax, %r10\n ud2");
SNIPPET(from32_ret, "mov %rsp, %r9\n add $5, %rcx\n lretl");
SNIPPET(landing_64, "call 1f\n .globl landing_at\n landing_at: .byte 0x40, 0x90, 0x40, 0x90\n ud2\n"
		    " 1: ljmp *(%rax)");
SNIPPET32(landing_32, "ret");
SNIPPET(landing_ret64, "ret");
SNIPPET32(jump_both, "jmp *%ecx"); /* the same in 64-bit code */
SNIPPET32(wrap_esp, "add $0x20, %esp\n mov -0x20(%esp), %eax\n nop");
SNIPPET(retf_user, "retfq");
SNIPPET(gate_entry, "ud2");
SNIPPET(gate_entry_ret, "inc %rbx\n lretq");
SNIPPET(entry_ud, "ud2");
SNIPPET(entry_sysretl, "mov %rdx, %rcx\n mov $2, %r11d\n mov %rbp, %rsp\n mov $3, %eax\n sysretl");
SNIPPET(entry_sysexit, "mov %rbp, %rcx\n mov $5, %eax\n sysexitl");
SNIPPET(entry_iret, "mov $7, %eax\n push $0x2b\n push %rbp\n push $2\n push $0x23\n push %rdx\n iretq");
SNIPPET(gate_iret, "mov $9, %eax\n iretq");
SNIPPET(code16, ".code16\n mov $0xffff, %ax\n inc %ax\n push %ax\n mov $0x1234, %bx\n addr32 mov (%ecx), %dx\n ud2\n .code64");
__asm__(".pushsection .snippets, \"ax\"\n last_snippet:\n .popsection");
extern const u8 div_0_at[], landing_at[], lcall64_next[];

static u8 *data, *stack; /* DATA and the page below STACK, as the kernel sees them */
static u8 *last;

static u32 at(const void *code)
{
	return CODE + (u32)((const u8 *)code - first_snippet);
}

static void map_low(u32 va, const void *page)
{
	map(va, page, P | W | U | A | D);
	invlpg(va);
}

static void prepare(void)
{
	*pte_of(boot_pml4, LOW, 3) |= U;
	*pte_of(boot_pml4, LOW, 2) = 0;
	*pte_of(boot_pml4, LAST, 2) = 0;
	write_cr4(read_cr4() & ~0x80ull); /* those were global */
	write_cr4(read_cr4() | 0x80);
	unsigned pages = (unsigned)(last_snippet - first_snippet) / 0x1000 + 1;
	u8 *code = page_alloc(pages);
	copy(code, first_snippet, (size_t)(last_snippet - first_snippet));
	for (unsigned i = 0; i < pages; i++)
		map_low(CODE + i * 0x1000, code + i * 0x1000);
	data = page_alloc(2);
	stack = page_alloc(1);
	last = page_alloc(1);
	map_low(DATA, data);
	map_low(DATA + 0x1000, data + 0x1000);
	map_low(STACK - 0x1000, stack);
	map_low(LAST, last);
	set_gate(0x80, (void *)(vectors + 0x80 * 16), 0, 3);
}

static void data_segments(u16 ds, u16 es, u16 fs, u16 gs)
{
	__asm__ volatile("mov %0, %%ds\n\tmov %1, %%es\n\tmov %2, %%fs\n\tmov %3, %%gs" : : "r"(ds), "r"(es), "r"(fs), "r"(gs) : "memory");
}

static void flat(void)
{
	data_segments(UDATA, UDATA, UDATA, UDATA);
}

static u64 descriptor(u32 base, u32 limit, u32 type_and_flags) /* type: bits 8..15 and 20..23 of the upper half */
{
	return (limit & 0xffff) | (u64)(base & 0xffffff) << 16 | (u64)type_and_flags << 32 | (u64)(limit >> 16 & 0xf) << 48 | (u64)(base >> 24) << 56;
}

enum { DATA_RW = 0x40f200, DATA_RO = 0x40f000, DATA_DOWN = 0x40f600, CODE_32 = 0x40fa00, CODE_16 = 0xfa00, PAGES = 0x800000 };

static void set_desc(unsigned sel, u64 d)
{
	gdt[sel >> 3] = d;
}

static struct frame frame32(const u8 *code)
{
	struct frame f = user_frame(at(code), STACK - 0x100);
	f.cs = CODE32;
	return f;
}

static struct frame run(const u8 *code)
{
	struct frame f = frame32(code);
	exec(&f);
	return f;
}

static void registers(void)
{
	section("registers and stack");
	for (int i = 0; i < 3; i++) {
		struct frame f = frame32(regs);
		f.rax = 0xffffffff;
		f.rcx = 5;
		exec(&f);
		CHECK_EQ(f.vector, UD);
		CHECK_EQ(f.cs, CODE32);
		CHECK_EQ(f.ss, UDATA);
		CHECK_EQ(f.rip, at(regs_end) - 2);
		CHECK_EQ(f.rsp, STACK - 0x100);
		CHECK_EQ(f.rax, 0);
		CHECK_EQ(f.rcx, 4);
		CHECK_EQ(f.rdx, 0);
		CHECK_EQ(f.rbx, 0xfffffffd);
		CHECK_EQ(f.rsi, STACK - 0x100);
		CHECK_EQ(f.rdi, 15);
		CHECK_EQ(*(u32 *)(stack + 0x1000 - 0x104), 0); /* PUSHA: EAX first, ESP as it was */
		CHECK_EQ(*(u32 *)(stack + 0x1000 - 0x114), STACK - 0x100);
	}
	section("upper halves are not looked at");
	*(u32 *)(data + 0x24) = 0x11223344;
	*(u32 *)(data + 0x30) = 0x55667788;
	data[0x40] = 1;
	for (int i = 0; i < 3; i++) {
		struct frame f = frame32(upper);
		f.rax = 0xdeadbeef00000000 | (DATA + 0x20);
		f.rdi = 0xffffffff00000000 | (DATA + 0x38);
		f.rcx = 0x12345678fffffffe;
		f.rsi = 0x8000000000000000 | (DATA + 0x40);
		f.rbp = 0xaaaaaaaa00000001;
		exec(&f);
		CHECK_EQ(f.vector, UD);
		CHECK_EQ(f.rbx, 0x11223344);
		CHECK_EQ(f.rdx, 0x55667788);
		CHECK_EQ(f.rbp, 1);
		CHECK_EQ(data[0x40], 2 + i);
		f = frame32(upper_loop);
		f.rcx = 0x777700000005;
		f.rbp = 0x777700000006;
		exec(&f);
		CHECK_EQ(f.vector, UD);
		CHECK_EQ(f.rax, 5);
		CHECK_EQ(f.rcx, 0);
		CHECK_EQ(f.rbp, 6);
		CHECK_EQ(f.rsp, STACK - 0x100);
		f = frame32(upper_leave);
		f.rbp = 0x777700000000 | (STACK - 0x40);
		*(u32 *)(stack + 0x1000 - 0x40) = 0xabcdef;
		exec(&f);
		CHECK_EQ((u32)f.rbp, 0xabcdef); /* processors keep the upper half or do not */
		CHECK_EQ(f.rsp, STACK - 0x3c);
		f = frame32(upper_string);
		f.rcx = 0x9999000000000008;
		f.rsi = 0x9999000000000000 | (DATA + 0x20);
		f.rdi = 0x9999000000000000 | (DATA + 0x80);
		exec(&f);
		CHECK_EQ(f.vector, UD);
		CHECK_EQ((u32)f.rcx, 0);
		CHECK_EQ(f.rsi, DATA + 0x29);
		CHECK_EQ(f.rdi, DATA + 0x8c);
		CHECK_EQ(*(u32 *)(data + 0x84), 0x11223344);
		f = frame32(upper_jecxz);
		f.rcx = 0x100000000;
		exec(&f);
		CHECK_EQ(f.rax, 2);
	}
}

static void expect(const u8 *code, unsigned vector, u64 error, u32 rip)
{
	for (int i = 0; i < 2; i++) {
		struct frame f = run(code);
		CHECK_EQ(f.vector, vector);
		CHECK_EQ(f.error, error);
		CHECK_EQ(f.rip, rip);
		CHECK_EQ(f.cs, CODE32);
		CHECK_EQ(f.ss, UDATA);
		CHECK_EQ(f.rsp, STACK - 0x100);
	}
}

static void exceptions(void)
{
	if (!section_unless("exceptions", "compat-int,user-bound"))
		return;
	expect(div_0, DE, 0, at(div_0_at));
	expect(int3_1, BP, 0, at(int3_1) + 1);
	expect(into_0, UD, 0, at(into_0_end) - 2);
	set_gate(OF, (void *)(vectors + OF * 16), 0, 3);
	expect(into_1, OF, 0, at(into_1_end) - 2);
	expect(int_80, 0x80, 0, at(int_80) + 2);
	expect(int_81, GP, 0x81 * 8 + 2, at(int_81));
	expect(syscall_1, UD, 0, at(syscall_1));
	expect(sysexit_1, GP, 0, at(sysexit_1));
	expect(hlt_1, GP, 0, at(hlt_1));
	((u32 *)data)[0] = (u32)-5, ((u32 *)data)[1] = 9;
	for (int v = -8; v < 14; v++) {
		struct frame f = frame32(bound_1);
		f.rax = (u32)v;
		f.rbx = DATA;
		exec(&f);
		CHECK_EQ(f.vector, v < -5 || v > 9 ? BR : UD);
	}
	struct frame f = frame32(load_1);
	f.rax = DATA + 0x5ffe;
	exec(&f);
	CHECK_EQ(f.vector, PF);
	CHECK_EQ(f.cr2, DATA + 0x5ffe);
	CHECK_EQ(f.error, PF_U);
	f = frame32(store_1);
	f.rax = 0x100000; /* the kernel's */
	exec(&f);
	CHECK_EQ(f.vector, PF);
	CHECK_EQ(f.error, PF_U | PF_W | PF_P);
	CHECK_EQ(f.cs, CODE32);
	f = frame32(load_1);
	f.rip = DATA + 0x7000;
	exec(&f);
	CHECK_EQ(f.vector, PF);
	CHECK_EQ(f.rip, DATA + 0x7000);
	CHECK_EQ(f.error, PF_U | PF_I);
}

static void entries(void)
{
	if (!section_unless("SYSENTER, INT 0x80, and the ways back", "user-sysenter,sysret-compat,user-int"))
		return;
	wrmsr(0x174, 0);
	expect(sysenter_1, GP, 0, at(sysenter_1));
	wrmsr(0x174, KCODE);
	wrmsr(0x175, kernel_frame(entry_ud).rsp);
	wrmsr(0x176, (u64)entry_ud);
	for (int i = 0; i < 3; i++) {
		struct frame f = frame32(sysenter_1);
		f.rflags |= STATUS | F_IF | F_DF;
		f.rax = 0x1234;
		exec(&f);
		CHECK_EQ(f.vector, UD);
		CHECK_EQ(f.rip, (u64)entry_ud);
		CHECK_EQ(f.cs, KCODE);
		CHECK_EQ(f.ss, KDATA);
		CHECK_EQ(f.rsp, kernel_frame(entry_ud).rsp);
		CHECK_EQ(f.rflags & ~(u64)F_RF, STATUS | F_DF | 2);
		CHECK_EQ(f.rax, 0x1234);
	}
	wrmsr(0xc0000081, (u64)KCODE << 32 | (u64)CODE32 << 48);
	static const u8 *const entry[] = { entry_sysretl, entry_iret };
	for (unsigned e = 0; e < 2; e++) {
		wrmsr(0x176, (u64)entry[e]);
		struct frame f = frame32(sysenter_loop);
		f.rcx = 1000;
		f.rsi = 0;
		exec(&f);
		CHECK_EQ(f.vector, UD);
		CHECK_EQ(f.cs, CODE32);
		CHECK_EQ(f.ss, UDATA);
		CHECK_EQ(f.rip, at(sysenter_loop_end) - 2);
		CHECK_EQ(f.rsp, STACK - 0x100);
		CHECK_EQ(f.rsi, 1000 * (e ? 7 : 3));
	}
	/* SYSEXIT goes to SYSENTER_CS + 16, which is another selector in this table; what it loads is fixed. */
	wrmsr(0x176, (u64)entry_sysexit);
	struct frame f = frame32(sysenter_loop);
	f.rcx = 1;
	exec(&f);
	CHECK_EQ(f.vector, UD);
	CHECK_EQ(f.cs, KCODE + 16 + 3);
	CHECK_EQ(f.ss, KCODE + 24 + 3);
	CHECK_EQ(f.rsp, STACK - 0x100);
	CHECK_EQ(f.rip, at(sysenter_loop_end) - 2);
	CHECK_EQ(f.rax, 5);
	set_gate(0x80, (void *)gate_iret, 0, 3);
	f = frame32(int_loop);
	f.rcx = 1000;
	f.rsi = 1;
	f.rflags |= F_CF;
	exec(&f);
	CHECK_EQ(f.vector, UD);
	CHECK_EQ(f.rsi, 9001);
	CHECK_EQ(f.cs, CODE32);
	CHECK_EQ(f.rsp, STACK - 0x100);
	set_gate(0x80, (void *)(vectors + 0x80 * 16), 0, 3);
}

static void far_return(void)
{
	section("far return from the kernel");
	struct frame f = kernel_frame(retf_user);
	u64 *s = (u64 *)f.rsp - 4;
	s[0] = at(regs), s[1] = CODE32, s[2] = STACK - 0x80, s[3] = UDATA;
	f.rsp = (u64)s;
	f.rcx = 5;
	exec(&f);
	CHECK_EQ(f.vector, UD);
	CHECK_EQ(f.cs, CODE32);
	CHECK_EQ(f.rip, at(regs_end) - 2);
	CHECK_EQ(f.rsp, STACK - 0x80);
}

static void far_pointer(u32 offset, u16 sel)
{
	*(u32 *)(data + 0x100) = offset;
	*(u16 *)(data + 0x104) = sel;
}

static void far_transfers(void)
{
	section("far transfers between 32-bit and 64-bit code");
	for (int i = 0; i < 3; i++) {
		far_pointer(at(from32), UCODE);
		struct frame f = frame32(to64);
		f.rax = DATA + 0x100;
		exec(&f);
		CHECK_EQ(f.vector, UD);
		CHECK_EQ(f.cs, UCODE);
		CHECK_EQ(f.r10, 0x123456789 + DATA + 0x100);
		far_pointer(at(from32_ret), UCODE);
		f = frame32(lcall64);
		f.rax = DATA + 0x100;
		f.rbx = f.rcx = 1;
		exec(&f);
		CHECK_EQ(f.vector, UD);
		CHECK_EQ(f.cs, CODE32);
		CHECK_EQ(f.rip, at(lcall64_end) - 2);
		CHECK_EQ(f.rbx, 2);
		CHECK_EQ(f.rcx, 6);
		CHECK_EQ(f.r9, STACK - 0x108);
		CHECK_EQ(f.rsp, STACK - 0x100);
		/* A 64-bit call, with its return too: so often that all is linked. */
		far_pointer(at(landing_ret64), UCODE);
		for (int k = 0; k < 3; k++) {
			f = user_frame(at(landing_64), STACK - 0x100);
			f.rax = DATA + 0x100;
			exec(&f);
			CHECK_EQ(f.vector, UD);
			CHECK_EQ(f.cs, UCODE);
			CHECK_EQ(f.rax, DATA + 0x100);
			CHECK_EQ(f.rsp, STACK - 0x100);
		}
		/* The return is done by 32-bit code: it is 32-bit code that runs there then. */
		far_pointer(at(landing_32), CODE32);
		f = user_frame(at(landing_64), STACK - 0x100);
		f.rax = DATA + 0x100;
		exec(&f);
		CHECK_EQ(f.vector, UD);
		CHECK_EQ(f.cs, CODE32);
		CHECK_EQ(f.rip, at(landing_at) + 4);
		CHECK_EQ(f.rax, DATA + 0x102);
		CHECK_EQ(f.rsp, STACK - 0x104);
	}
}

static void call_gates(void)
{
	if (!section_unless("call gates from 32-bit code", "user-gate"))
		return;
	u64 entry = (u64)gate_entry;
	gdt[SEL_GATE >> 3] = (entry & 0xffff) | (u64)KCODE << 16 | 0xecull << 40 | (entry >> 16 & 0xffff) << 48;
	gdt[(SEL_GATE >> 3) + 1] = entry >> 32;
	far_pointer(0, SEL_GATE);
	struct frame f = frame32(lcall64);
	f.rax = DATA + 0x100;
	exec(&f);
	CHECK_EQ(f.vector, UD);
	CHECK_EQ(f.rip, (u64)gate_entry);
	CHECK_EQ(f.cs, KCODE);
	u64 *s = (u64 *)f.rsp;
	CHECK_EQ(s[0], at(lcall64_next));
	CHECK_EQ(s[1], CODE32);
	CHECK_EQ(s[2], STACK - 0x100);
	CHECK_EQ(s[3], UDATA);
	entry = (u64)gate_entry_ret;
	gdt[SEL_GATE >> 3] = (entry & 0xffff) | (u64)KCODE << 16 | 0xecull << 40 | (entry >> 16 & 0xffff) << 48;
	for (int i = 0; i < 3; i++) {
		f = frame32(lcall64);
		f.rax = DATA + 0x100;
		f.rbx = 0;
		exec(&f);
		CHECK_EQ(f.vector, UD);
		CHECK_EQ(f.cs, CODE32);
		CHECK_EQ(f.rbx, 2);
		CHECK_EQ(f.rsp, STACK - 0x100);
	}
}

static void same_bytes(void)
{
	section("the same bytes in both modes");
	for (int i = 0; i < 6; i++) {
		struct frame f = i & 1 ? frame32(both_modes) : user_frame(at(both_modes), STACK - 0x100);
		f.rax = 0x1ffffffff;
		f.rbx = 0x300000001;
		exec(&f);
		CHECK_EQ(f.vector, UD);
		CHECK_EQ(f.cs, i & 1 ? CODE32 : UCODE);
		CHECK_EQ(f.rax, i & 1 ? 0 : 0x500000000);
	}
	for (int i = 0; i < 12; i++) { /* by way of an indirect jump; some in a row */
		bool compat = i % 4 > 1;
		struct frame f = compat ? frame32(jump_both) : user_frame(at(jump_both), STACK - 0x100);
		f.rax = 0x1ffffffff;
		f.rbx = 0x300000001;
		f.rcx = at(both_modes);
		exec(&f);
		CHECK_EQ(f.vector, UD);
		CHECK_EQ(f.cs, compat ? CODE32 : UCODE);
		CHECK_EQ(f.rax, compat ? 0 : 0x500000000);
	}
}

static struct frame access(const u8 *code, u32 eax)
{
	struct frame f = frame32(code);
	f.rax = eax;
	f.rcx = 0x5a5a5a5a;
	exec(&f);
	return f;
}

static void segments(void)
{
	section("FS and GS");
	for (unsigned i = 0; i < 64; i++)
		((u32 *)data)[i] = 0x1000 + i;
	for (int i = 0; i < 3; i++) {
		set_desc(SEL_DATA, descriptor(DATA + 0x10, 0xfffff, DATA_RW | PAGES));
		data_segments(UDATA, UDATA, SEL_DATA, SEL_DATA);
		struct frame f = access(gs_load, 0x20);
		CHECK_EQ(f.vector, UD);
		CHECK_EQ(f.rcx, 0x100c + 0x100d);
		f = access(gs_load, (u32)-8); /* below the base: 4 GiB on, and round */
		CHECK_EQ(f.rcx, 0x1002 + 0x1003);
		f = access(fs_load, 4);
		CHECK_EQ(f.rcx, 0x1005);
		/* The same code without that segment. */
		data_segments(UDATA, UDATA, 0, 0);
		f = access(gs_load, 0x20);
		CHECK_EQ(f.vector, GP);
		CHECK_EQ(f.error, 0);
		CHECK_EQ(f.rip, at(gs_load));
		CHECK_EQ(access(fs_load, 4).vector, GP);
		/* With a limit; read-only; expanding down; without a page behind it. */
		set_desc(SEL_DATA2, descriptor(DATA + 0x40, 0x1f, DATA_RW));
		data_segments(UDATA, UDATA, 0, SEL_DATA2);
		f = access(gs_load, 0x18);
		CHECK_EQ(f.vector, UD);
		CHECK_EQ(f.rcx, 0x1016 + 0x1017);
		f = access(gs_load, 0x1c);
		CHECK_EQ(f.vector, GP);
		CHECK_EQ(f.rip, at(gs_load) + 3);
		CHECK_EQ(f.rcx, 0x1017);
		set_desc(SEL_DATA2, descriptor(DATA, 0xfffff, DATA_RO | PAGES));
		data_segments(UDATA, UDATA, 0, SEL_DATA2);
		CHECK_EQ(access(gs_load, 0).rcx, 0x1000 + 0x1001);
		f = access(gs_store, 0x80);
		CHECK_EQ(f.vector, GP);
		CHECK_EQ(*(u32 *)(data + 0x80), 0x1020);
		set_desc(SEL_DATA2, descriptor(DATA, 0x3f, DATA_DOWN));
		data_segments(UDATA, UDATA, 0, SEL_DATA2);
		CHECK_EQ(access(gs_load, 0x3c).vector, GP);
		CHECK_EQ(access(gs_load, 0x40).rcx, 0x1010 + 0x1011);
		flat();
		f = frame32(set_gs);
		f.rax = 0x20;
		f.rbx = SEL_DATA;
		exec(&f);
		CHECK_EQ(f.vector, UD);
		CHECK_EQ(f.rcx, 0x100c);
		flat();
	}
	for (int i = 0; i < 12; i++) { /* by way of an indirect jump; some in a row with that segment, some without */
		data_segments(UDATA, UDATA, 0, i % 4 > 1 ? 0 : UDATA);
		struct frame f = frame32(jump_both);
		f.rax = DATA + 0x20;
		f.rcx = at(gs_load);
		exec(&f);
		CHECK_EQ(f.vector, i % 4 > 1 ? GP : UD);
		CHECK_EQ(f.rip, i % 4 > 1 ? at(gs_load) : at(gs_load_end) - 2);
	}
}

static void data_and_code(void)
{
	if (!section_unless("DS, ES, CS, SS", "compat-base"))
		return;
	for (int i = 0; i < 3; i++) {
		flat();
		struct frame f = access(ds_load, DATA + 0x10);
		CHECK_EQ(f.rcx, 0x1004 + 0x1005);
		CHECK_EQ(f.rdx, 0x1006);
		data_segments(0, UDATA, 0, 0);
		f = access(ds_load, DATA + 0x10);
		CHECK_EQ(f.vector, GP);
		CHECK_EQ(f.rip, at(ds_load));
		set_desc(SEL_DATA2, descriptor(DATA + 0x40, 0x1f, DATA_RW));
		data_segments(SEL_DATA2, UDATA, 0, 0);
		f = access(ds_load, 0x14);
		CHECK_EQ(f.rcx, 0x1015 + 0x1016);
		CHECK_EQ(f.rdx, 0x1017);
		f = access(ds_load, 0x18);
		CHECK_EQ(f.vector, GP);
		CHECK_EQ(f.rip, at(ds_load) + 5);
		flat();
		f = frame32(set_ds);
		f.rax = 8;
		f.rbx = SEL_DATA2;
		exec(&f);
		CHECK_EQ(f.rcx, 0x1012);
		flat();
		CHECK_EQ(access(cs_load, DATA).rcx, 0x1000);
		f = access(cs_store, DATA);
		CHECK_EQ(f.vector, GP);
		CHECK_EQ(f.rip, at(cs_store));
		far_pointer(0x18, SEL_DATA2);
		f = access(les_1, DATA + 0x100);
		CHECK_EQ(f.vector, UD);
		CHECK_EQ(f.rcx, 0x18);
		CHECK_EQ(f.rdx, 0x1016);
		flat();
		/* A stack segment that is not flat. */
		set_desc(SEL_DATA2, descriptor(STACK - 0x1000, 0xeff, DATA_RW));
		f = frame32(push_1);
		f.ss = SEL_DATA2;
		f.rsp = 0xf00;
		f.rax = 0x7654 + (u64)i;
		exec(&f);
		CHECK_EQ(f.vector, UD);
		CHECK_EQ(f.ss, SEL_DATA2);
		CHECK_EQ(f.rsp, 0xefc);
		CHECK_EQ(*(u32 *)(stack + 0xefc), 0x7654 + i);
		f = frame32(pop_1);
		f.ss = SEL_DATA2;
		f.rsp = 0xefd;
		exec(&f);
		CHECK_EQ(f.vector, SS);
		CHECK_EQ(f.error, 0);
		CHECK_EQ(f.rip, at(pop_1));
		/* Code with a base and a limit. */
		set_desc(SEL_CODE, descriptor(CODE, (u32)(regs_end - first_snippet) - 1, CODE_32));
		f = frame32(regs);
		f.cs = SEL_CODE;
		f.rip = (u64)(regs - first_snippet);
		exec(&f);
		CHECK_EQ(f.vector, UD);
		CHECK_EQ(f.rip, (u64)(regs_end - first_snippet) - 2);
		CHECK_EQ(f.cs, SEL_CODE);
		set_desc(SEL_CODE, descriptor(CODE, (u32)(regs_end - first_snippet) - 4, CODE_32));
		f = frame32(regs);
		f.cs = SEL_CODE;
		f.rip = (u64)(regs - first_snippet);
		exec(&f);
		CHECK_EQ(f.vector, GP);
		CHECK_EQ(f.error, 0);
		/* 16-bit code. */
		set_desc(SEL_CODE, descriptor(CODE, 0xffff, CODE_16));
		f = frame32(code16);
		f.cs = SEL_CODE;
		f.rip = (u64)(code16 - first_snippet);
		f.rcx = DATA + 4;
		f.rax = 0xabcd0000;
		f.rdx = 0;
		exec(&f);
		CHECK_EQ(f.vector, UD);
		CHECK_EQ(f.rax, 0xabcd0000);
		CHECK_EQ(f.rsp, STACK - 0x102);
		CHECK_EQ((u16)f.rbx, 0x1234);
		CHECK_EQ(f.rdx, 0x1001);
	}
}

static void inquiries(void)
{
	if (!section_unless("LAR, LSL, VERR, VERW, ARPL", "user-lar,user-arpl"))
		return;
	set_desc(SEL_DATA2, descriptor(DATA, 0x12345, DATA_RO));
	struct frame f = frame32(inquire);
	f.rax = SEL_DATA2;
	f.rdi = UDATA;
	exec(&f);
	CHECK_EQ(f.vector, UD);
	CHECK_EQ((u16)f.rbx, 0x101);
	CHECK_EQ(f.rcx & 0xf0fe00, 0x40f000); /* the limit's part is undefined; whether it was accessed is a matter of taste */
	CHECK_EQ(f.rdx, 0x12345);
	CHECK_EQ((u16)f.rax, 0x101);
	f = frame32(inquire);
	f.rax = KCODE;
	f.rdi = SEL_DATA2;
	exec(&f);
	CHECK_EQ((u16)f.rbx, 0);
	CHECK_EQ((u16)f.rax, 0);
	for (unsigned a = 0; a < 16; a++) {
		f = frame32(arpl_1);
		f.rax = 0x70 + (a & 3);
		f.rcx = a >> 2;
		f.rbx = 0;
		exec(&f);
		CHECK_EQ(f.rax, 0x70 + ((a & 3) < a >> 2 ? a >> 2 : (a & 3)));
		CHECK_EQ(f.rbx, (a & 3) < a >> 2);
	}
}

static void addresses(void)
{
	section("addresses");
	for (unsigned i = 0; i < 64; i++)
		((u32 *)data)[i] = 0x2000 + i;
	for (int i = 0; i < 3; i++) {
		struct frame f = run(moffs);
		CHECK_EQ(f.vector, UD);
		CHECK_EQ(f.rax, 0x2020);
		CHECK_EQ(((u32 *)data)[4], 0x2002);
		f = frame32(addr16);
		f.rbx = 0xc0010010;
		exec(&f);
		CHECK_EQ(f.vector, PF);
		CHECK_EQ(f.cr2, 0x10);
		/* Up to the last byte of all. */
		*(u32 *)(last + 0xffc) = 0xfeedface;
		f = access(load_1, LAST + 0xffc);
		CHECK_EQ(f.vector, UD);
		CHECK_EQ(f.rcx, 0xfeedface);
		f = frame32(push_1);
		f.rsp = LAST + 0x10;
		f.rax = 0x99;
		exec(&f);
		CHECK_EQ(f.vector, UD);
		CHECK_EQ(f.rsp, LAST + 0xc);
		CHECK_EQ(*(u32 *)(last + 0xc), 0x99);
		f = frame32(push_1); /* round the end of the address space */
		f.rsp = 0;
		f.rax = 0x77 + (u64)i;
		exec(&f);
		CHECK_EQ(f.vector, UD);
		CHECK_EQ(f.rsp, 0xfffffffc);
		CHECK_EQ(*(u32 *)(last + 0xffc), 0x77 + i);
		f = frame32(pop_1);
		f.rsp = 0xfffffffc;
		exec(&f);
		CHECK_EQ(f.rsp, 0);
		CHECK_EQ(f.rax, 0x77 + i);
		/* RSP has gone round, the accesses have not. */
		*(u32 *)(last + 0xff0) = 0x12121212;
		f = frame32(wrap_esp);
		f.rsp = LAST + 0xff0;
		exec(&f);
		CHECK_EQ(f.vector, UD);
		CHECK_EQ(f.rsp, 0x10);
		CHECK_EQ(f.rax, 0x12121212);
		/* Code there, which goes on at 0: the kernel's. */
		fill(last + 0xff0, 0x90, 16);
		f = frame32(jump_wrap);
		f.rcx = LAST + 0xff0;
		exec(&f);
		CHECK_EQ(f.vector, PF);
		CHECK_EQ(f.rip, 0);
		CHECK_EQ(f.cr2, 0);
		CHECK_EQ(f.error, PF_U | PF_P | PF_I);
		CHECK_EQ(f.rax, 7);
	}
	section("calls and returns");
	for (int i = 0; i < 3; i++) {
		struct frame f = frame32(callee);
		u32 *s = (u32 *)(stack + 0x1000 - 0x100);
		s[0] = at(pop_1);
		s[1] = 0x1111;
		s[2] = 0x2222;
		f.rcx = 200;
		f.rax = 0;
		f.rsi = at(callee_end) - 2 - 4; /* the last function: add, ret */
		exec(&f);
		CHECK_EQ(f.vector, UD);
		CHECK_EQ(f.rip, at(pop_1) + 1);
		CHECK_EQ(f.rax, 0x2222);
		CHECK_EQ(f.rsp, STACK - 0x100 + 12);
	}
}

void guest_main(void)
{
	prepare();
	flat();
	registers();
	exceptions();
	entries();
	far_return();
	far_transfers();
	call_gates();
	same_bytes();
	segments();
	data_and_code();
	inquiries();
	flat();
	addresses();
}
