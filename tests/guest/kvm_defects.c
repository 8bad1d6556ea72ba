#include "kvm_defects.h"

#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/time.h>

#include "kvm_box.h"

enum { DB = 1, BP = 3, BR = 5, UD = 6, NM = 7, NP = 11, GP = 13, PF = 14, MF = 16 };
enum { RING0, RING3 };

#define CODE(name, text) \
	extern const uint8_t name[], name##_end[]; \
	__asm__(".pushsection .rodata\n" #name ":\n" text "\n" #name "_end:\n.popsection")

static void load(struct box *b, const uint8_t *code, const uint8_t *end, unsigned ring)
{
	box_load(b, code, (size_t)(end - code), ring);
	b->regs.rdi = BOX_DATA;
}
#define LOAD(b, name, ring) load(b, name, name##_end, ring)
#define RUN(b, name, ring) (LOAD(b, name, ring), box_run(b))

static uint64_t frame(struct box *b, unsigned n)
{
	return *box_word(b, b->regs.rsp + 8 * n);
}

/* --- memory --- */

CODE(torn, "mov $-1, %rax\n mov %rax, 0x1ffc(%rsi)\n hlt");
static bool torn_store(struct box *b)
{
	LOAD(b, torn, RING0);
	b->regs.rsi = BOX_PAGES + 0x50000;
	*box_word(b, BOX_PTE(BOX_PAGES + 0x52000)) = 0;
	return box_run(b) == PF && *box_word(b, 0x51ff8) != 0;
}

CODE(straddle, "mov $0x7ffffffffffc, %rax\n mov (%rax), %rax\n hlt");
static bool straddle_pf(struct box *b)
{
	return RUN(b, straddle, RING3) == PF;
}

CODE(misaligned, "fxsave 8(%rdi)\n ud2");
static bool fxsave_any(struct box *b)
{
	return RUN(b, misaligned, RING0) == UD;
}

/* It writes the two parts one after the other, then, and others can see it. */
CODE(split, "mov $-1, %rax\n lock xor %rax, 0x1ffc(%rsi)\n hlt");
static bool split_lock(struct box *b)
{
	LOAD(b, split, RING0);
	b->regs.rsi = BOX_PAGES + 0x50000;
	*box_word(b, BOX_PTE(BOX_PAGES + 0x52000)) &= ~2ull;
	return box_run(b) == PF && *box_word(b, 0x51ff8) != 0;
}

CODE(ins, "rep insl\n hlt");
static bool ins_restart(struct box *b)
{
	LOAD(b, ins, RING0);
	b->regs.rdx = 0x5f0;
	b->regs.rcx = 7;
	b->regs.rdi = BOX_PAGES + 0x51ff4;
	*box_word(b, BOX_PTE(BOX_PAGES + 0x52000)) = 0;
	int end = box_run(b);
	for (unsigned i = 0; i < 100 && end == BOX_OTHER && b->run->exit_reason == KVM_EXIT_IO; i++)
		end = box_go_on(b);
	return end == PF && b->regs.rcx == 7;
}

/* --- ring 3 --- */

CODE(int_80, "int $0x80\n hlt");
static bool user_int(struct box *b)
{
	return RUN(b, int_80, RING3) != 0x80;
}

CODE(show_flags, "pushf\n pop %rax\n ud2");
static bool user_if(struct box *b)
{
	return RUN(b, show_flags, RING3) == UD && b->regs.rax & 0x200;
}

CODE(cli_ud, "cli\n ud2");
static bool user_iopl(struct box *b)
{
	LOAD(b, cli_ud, RING3);
	b->regs.rflags |= 3 << 12;
	return box_run(b) == GP;
}

static void set_msr(struct box *b, uint32_t index, uint64_t value)
{
	struct {
		struct kvm_msrs head;
		struct kvm_msr_entry entry;
	} m = { .head.nmsrs = 1, .entry = { .index = index, .data = value } };
	ioctl(b->cpu, KVM_SET_SREGS, &b->sregs); /* EFER first */
	ioctl(b->cpu, KVM_SET_MSRS, &m);
}

CODE(syscall_hlt, "syscall\n ud2\n hlt");
static bool syscall_cpl(struct box *b)
{
	LOAD(b, syscall_hlt, RING3);
	set_msr(b, 0xc0000081, (uint64_t)BOX_KCODE << 32 | (uint64_t)BOX_KDATA << 48);
	set_msr(b, 0xc0000082, BOX_CODE + 4);
	set_msr(b, 0xc0000084, 0);
	return box_run(b) == GP; /* the HLT of the entry point is refused */
}

CODE(x87, "fld1\n ud2");
static bool user_ts(struct box *b)
{
	LOAD(b, x87, RING3);
	b->sregs.cr0 |= 8;
	bool wrong = box_run(b) != NM;
	b->sregs.cr0 &= ~8ull;
	return wrong;
}

CODE(bad_x87, "mov $0x800000000000, %rax\n fldl (%rax)\n hlt");
static bool user_fp_gp(struct box *b)
{
	return RUN(b, bad_x87, RING3) != GP;
}

CODE(divps, "movl $0x1d80, -4(%rsp)\n ldmxcsr -4(%rsp)\n pxor %xmm0, %xmm0\n pcmpeqd %xmm1, %xmm1\n pslld $25, %xmm1\n psrld $2, %xmm1\n"
	    "divps %xmm0, %xmm1\n ud2");
static bool user_xm(struct box *b)
{
	LOAD(b, divps, RING3);
	b->sregs.cr4 &= ~0x400ull; /* OSXMMEXCPT */
	bool wrong = box_run(b) != UD;
	b->sregs.cr4 |= 0x400;
	return wrong;
}

CODE(fsgsbase, "rdfsbase %rax\n hlt");
static bool fsgsbase_on(struct box *b)
{
	LOAD(b, fsgsbase, RING3);
	b->sregs.cr4 &= ~0x10000ull;
	return box_run(b) != UD;
}

/* --- returns --- */

CODE(sysret, "mov $0x800000000000, %rcx\n mov $2, %r11d\n 1: sysretq\n hlt");
static bool late_gp(struct box *b)
{
	return RUN(b, sysret, RING0) == GP && frame(b, 1) == 0x800000000000;
}

CODE(iret_data, "push $0x1b\n push %rsp\n push $2\n push $0x1b\n lea 1f(%rip), %rax\n push %rax\n iretq\n 1: ud2");
static bool iret_checks(struct box *b)
{
	return RUN(b, iret_data, RING0) != GP;
}

CODE(sysret_32, "mov $0x10000 + 1f - sysret_32, %ecx\n mov $2, %r11d\n sysretl\n 1: .byte 0x40, 0x90\n ud2"); /* 32-bit: inc %eax */
static bool sysret_compat(struct box *b)
{
	LOAD(b, sysret_32, RING0);
	*box_word(b, b->sregs.gdt.base + 0x30) = 0x00cffb000000ffff;
	*box_word(b, b->sregs.gdt.base + 0x38) = 0x00cff3000000ffff;
	b->sregs.gdt.limit = 0x3f;
	set_msr(b, 0xc0000081, 0x33ull << 48 | (uint64_t)BOX_KCODE << 32);
	return box_run(b) != UD || b->regs.rax != 1;
}

/* 32-bit code of the user, in long mode. */
static void load_32(struct box *b, const uint8_t *code, const uint8_t *end)
{
	load(b, code, end, RING3);
	b->sregs.cs.l = 0;
	b->sregs.cs.db = 1;
}

CODE(int3_32, "int3\n hlt");
static bool compat_int(struct box *b)
{
	load_32(b, int3_32, int3_32_end);
	return box_run(b) != BP;
}

CODE(bound_32, ".byte 0x62, 0x07\n hlt"); /* bound %eax, (%edi) */
static bool user_bound(struct box *b)
{
	load_32(b, bound_32, bound_32_end);
	*box_word(b, BOX_DATA) = 1ull << 32;
	b->regs.rax = 100;
	return box_run(b) != BR;
}

CODE(arpl_32, ".byte 0x63, 0xd8\n ud2"); /* arpl %bx, %ax */
static bool user_arpl(struct box *b)
{
	load_32(b, arpl_32, arpl_32_end);
	b->regs.rax = 0x70;
	b->regs.rbx = 3;
	return box_run(b) != UD || b->regs.rax != 0x73;
}

CODE(ud_32, "ud2");
static bool compat_base(struct box *b)
{
	load_32(b, ud_32, ud_32_end);
	*box_word(b, BOX_PTE(BOX_PAGES)) &= ~4ull; /* the supervisor's */
	b->sregs.cs.base = (uint32_t)(BOX_CODE - BOX_PAGES);
	b->regs.rip = BOX_PAGES;
	return box_run(b) != UD;
}

/* --- exceptions and interrupts --- */

CODE(tf_rep, "mov $3, %ecx\n rep stosb\n hlt");
static bool rep_step(struct box *b)
{
	LOAD(b, tf_rep, RING0);
	b->regs.rflags |= 0x100;
	if (box_run(b) != DB) /* behind the MOV */
		return true;
	/* on from there, by hand */
	uint64_t rsp = b->regs.rsp;
	b->regs.rip = frame(b, 0);
	b->regs.rflags = frame(b, 2);
	b->regs.rsp = *box_word(b, rsp + 24);
	return box_run(b) != DB || b->regs.rcx != 2;
}

CODE(tf_ss, "pushf\n orq $0x100, (%rsp)\n mov %ss, %eax\n popf\n mov %eax, %ss\n nop\n 1: nop\n hlt");
static bool ss_step(struct box *b)
{
	return RUN(b, tf_ss, RING0) != DB || frame(b, 0) != BOX_CODE + (uint64_t)(tf_ss_end - tf_ss) - 2;
}

CODE(ud2, "ud2\n hlt");
static bool np_df(struct box *b)
{
	LOAD(b, ud2, RING3);
	*box_word(b, b->sregs.idt.base + 16 * UD) &= ~(1ull << 47);
	return box_run(b) != NP;
}

CODE(window, "sti\n nop\n nop\n ud2");
static bool late_window(struct box *b)
{
	LOAD(b, window, RING0);
	b->run->request_interrupt_window = 1;
	int end = box_run(b);
	b->run->request_interrupt_window = 0;
	return end == UD;
}

/* Self-IPI 0x41 in x2APIC mode; its handler leaves by a port without an EOI. */
CODE(self_ipi, "mov $0x1b, %ecx\n mov $0xfee00d00, %eax\n xor %edx, %edx\n wrmsr\n mov $0x80f, %ecx\n mov $0x1ff, %eax\n wrmsr\n"
	       "mov $0x83f, %ecx\n mov $0x41, %eax\n wrmsr\n sti\n mov $100000, %ecx\n 1: dec %ecx\n jnz 1b\n out %al, $0x81");
static bool lapic_eoi(struct box *b)
{
	LOAD(b, self_ipi, RING0);
	memcpy(b->ram + b->sregs.idt.base + 0x3000 + 16 * 0x41, "\xe6\x80\xf4", 3); /* out %al, $0x80; hlt */
	struct kvm_lapic_state lapic;
	if (box_run(b) != BOX_OTHER || b->run->exit_reason != KVM_EXIT_IO || b->run->io.port != 0x80 || ioctl(b->cpu, KVM_GET_LAPIC, &lapic) < 0)
		return false;
	return !(lapic.regs[0x120] & 2); /* in service: vectors 64 and up */
}

CODE(adjust, "mov $0x3b, %ecx\n rdtsc\n mov %edx, %ebx\n xor %eax, %eax\n mov $0x100, %edx\n wrmsr\n rdtsc\n sub %ebx, %edx\n xor %eax, %eax\n"
	     "mov %edx, %ebx\n xor %edx, %edx\n wrmsr\n hlt");
static bool tsc_fixed(struct box *b)
{
	return RUN(b, adjust, RING0) == BOX_HLT && b->regs.rbx < 0x100;
}

/* --- what a guest is shown and kept from --- */

CODE(ask_1, "mov $1, %eax\n cpuid\n hlt");
static bool cpuid_or(struct box *b)
{
	enum { VME = 1 << 1, MCE = 1 << 7, MCA = 1 << 14, BASE = 0x078bfbff & ~(VME | MCE | MCA) };
	struct {
		struct kvm_cpuid2 head;
		struct kvm_cpuid_entry2 entry[4];
	} table = { .head.nent = 4,
		    .entry = { { .function = 0, .eax = 1 }, { .function = 1, .edx = BASE }, { .function = 0x80000000, .eax = 0x80000001 },
			       { .function = 0x80000001, .edx = 0x20100800 } } };
	LOAD(b, ask_1, RING0);
	return ioctl(b->cpu, KVM_SET_CPUID2, &table) == 0 && box_run(b) == BOX_HLT && (b->regs.rdx & (VME | MCE | MCA));
}

CODE(bad_pat, "mov $0x277, %ecx\n mov $2, %eax\n xor %edx, %edx\n wrmsr\n hlt");
CODE(bad_gs, "mov $0xc0000102, %ecx\n xor %eax, %eax\n mov $0x8000, %edx\n wrmsr\n hlt");
static bool msr_checks(struct box *b)
{
	return RUN(b, bad_pat, RING0) != GP || RUN(b, bad_gs, RING0) != GP;
}

CODE(mwait, "xor %eax, %eax\n xor %ecx, %ecx\n mwait\n hlt");
static bool mwait_nop(struct box *b)
{
	struct kvm_enable_cap cap = { .cap = KVM_CAP_DISABLE_QUIRKS2, .args[0] = KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS };
	ioctl(b->vm, KVM_ENABLE_CAP, &cap);
	return RUN(b, mwait, RING0) == BOX_HLT;
}

/* Either by Intel's instruction or AMD's, as the processor is. Without the quirk that rewrites the wrong one, and tries again and again where
 * nothing runs it. */
CODE(vmcall, "mov $0x7fff, %eax\n vmcall\n hlt");
CODE(vmmcall, "mov $0x7fff, %eax\n vmmcall\n hlt");
static bool no_hypercall(struct box *b)
{
	struct kvm_enable_cap cap = { .cap = KVM_CAP_DISABLE_QUIRKS2, .args[0] = KVM_X86_QUIRK_FIX_HYPERCALL_INSN };
	return ioctl(b->vm, KVM_ENABLE_CAP, &cap) == 0 && RUN(b, vmcall, RING0) != BOX_HLT && RUN(b, vmmcall, RING0) != BOX_HLT;
}

/* --- what ring 0 may load --- */

CODE(lgdt, "mov $0x800000000000, %rax\n mov %rax, 2(%rdi)\n lgdt (%rdi)\n hlt");
static bool lgdt_any(struct box *b)
{
	return RUN(b, lgdt, RING0) != GP;
}

CODE(ltr, "mov $0x28, %eax\n ltr %ax\n hlt");
static bool ltr_16(struct box *b)
{
	LOAD(b, ltr, RING0);
	*box_word(b, b->sregs.gdt.base + 0x28) = 0x67 | 0x81ull << 40;
	return box_run(b) != GP;
}

/* With PKU struck out of CPUID. */
CODE(set_pke, "mov %cr4, %rax\n bts $22, %rax\n mov %rax, %cr4\n hlt");
static bool cr4_any(struct box *b)
{
	struct {
		struct kvm_cpuid2 head;
		struct kvm_cpuid_entry2 entry[256];
	} k = { .head.nent = 256 };
	if (ioctl(b->kvm, KVM_GET_SUPPORTED_CPUID, &k) < 0)
		return false;
	for (unsigned i = 0; i < k.head.nent; i++)
		if (k.entry[i].function == 7 && !k.entry[i].index)
			k.entry[i].ecx &= ~(1u << 3);
	return ioctl(b->cpu, KVM_SET_CPUID2, &k) >= 0 && RUN(b, set_pke, RING0) == BOX_HLT;
}

/* All pages of the box are the user's. */
CODE(set_smap, "mov %cr4, %rax\n bts $21, %rax\n mov %rax, %cr4\n lea 1f(%rip), %rax\n lea (%rax,%rsi), %rax\n jmp *%rax\n 1: ud2");
static bool smap_fetch(struct box *b)
{
	LOAD(b, set_smap, RING0);
	b->regs.rsi = BOX_PAGES;
	return box_run(b) != UD;
}

/* --- 32-bit protected mode --- */

static void load32(struct box *b, const uint8_t *code, const uint8_t *end)
{
	load(b, code, end, RING0);
	*box_word(b, b->sregs.gdt.base + BOX_KCODE) = 0x00cf9b000000ffff;
	for (unsigned v = 0; v < 32; v++) {
		uint64_t at = *box_word(b, b->sregs.idt.base + 16 * UD) & 0xffff;
		at += (v - UD) * 16ull;
		*box_word(b, b->sregs.idt.base + 0x800 + 8 * v) = at | BOX_KCODE << 16 | 0x8eull << 40;
	}
	b->sregs.idt = (struct kvm_dtable){ .base = b->sregs.idt.base + 0x800, .limit = 0xff };
	b->sregs.cs.l = 0, b->sregs.cs.db = 1;
	b->sregs.efer = 0, b->sregs.cr4 = 0x610, b->sregs.cr0 = 0x33;
}

CODE(set_pg, ".code32\n mov %cr0, %eax\n bts $31, %eax\n mov %eax, %cr0\n hlt\n.code64");
static bool no_paging_32(struct box *b)
{
	load32(b, set_pg, set_pg_end);
	*box_word(b, b->sregs.cr3) = 0x83; /* 4 MiB */
	return box_run(b) != BOX_HLT;
}

static struct kvm_segment segment16(uint16_t paragraph, uint8_t type)
{
	return (struct kvm_segment){ .base = paragraph * 16u, .limit = 0xffff, .selector = paragraph, .type = type, .present = 1, .s = 1 };
}

static bool frame_base(struct box *b)
{
	load32(b, ud2, ud2_end);
	b->sregs.ss.base = 0x100000;
	if (box_run(b) != UD)
		return true;
	return (uint32_t)*box_word(b, 0x100000 + (uint32_t)b->regs.rsp) != BOX_CODE;
}

CODE(over, ".code32\n movw %fs:0xffffffff, %ax\n hlt\n.code64");
static bool down_limit(struct box *b)
{
	load32(b, over, over_end);
	b->sregs.fs.type = 7, b->sregs.fs.limit = 0xfff, b->sregs.fs.g = 0;
	return box_run(b) != GP;
}

CODE(swapgs, ".byte 0x0f, 0x01, 0xf8\n hlt");
static bool swapgs_32(struct box *b)
{
	load32(b, swapgs, swapgs_end);
	return box_run(b) != UD;
}

CODE(real_80, ".code16\n mov $0x4000, %sp\n int $0x80\n hlt\n .balign 16\n pushw $0x80\n mov $0x77, %bx\n hlt\n.code64");
static void on_alarm(int sig)
{
	(void)sig;
}

static bool real_int(struct box *b)
{
	load(b, real_80, real_80_end, RING0);
	b->sregs.cr0 = 0x10, b->sregs.cr4 = 0, b->sregs.efer = 0;
	b->sregs.idt = (struct kvm_dtable){ .base = 0, .limit = 0x3ff };
	b->sregs.cs = segment16(BOX_CODE / 16, 0xb);
	b->sregs.ss = b->sregs.ds = b->sregs.es = segment16(0, 3);
	*box_word(b, 0x200) = 16 | BOX_CODE / 16 << 16;
	b->regs.rip = 0;
	/* With the defect the kernel goes round and round until a signal comes. */
	struct sigaction old, nothing = { .sa_handler = on_alarm };
	const struct itimerval soon = { .it_value.tv_usec = 300000, .it_interval.tv_usec = 300000 }, never = { .it_value.tv_sec = 0 };
	sigaction(SIGALRM, &nothing, &old);
	setitimer(ITIMER_REAL, &soon, NULL);
	ioctl(b->cpu, KVM_SET_SREGS, &b->sregs);
	ioctl(b->cpu, KVM_SET_REGS, &b->regs);
	bool wrong = ioctl(b->cpu, KVM_RUN, 0) < 0 || ioctl(b->cpu, KVM_GET_REGS, &b->regs) < 0 || b->regs.rbx != 0x77;
	setitimer(ITIMER_REAL, &never, NULL);
	sigaction(SIGALRM, &old, NULL);
	return wrong;
}

/* --- breakpoints --- */

static void set_point(struct box *b, uint64_t at, uint64_t dr7)
{
	struct kvm_debugregs d = { .db[0] = at, .dr6 = 0xffff0ff0, .dr7 = 0x400 | dr7 };
	ioctl(b->cpu, KVM_SET_DEBUGREGS, &d);
}

CODE(nops, "nop\n nop\n ud2");
static bool user_bp(struct box *b)
{
	LOAD(b, nops, RING3);
	set_point(b, BOX_CODE + 1, 1);
	return box_run(b) != DB;
}

CODE(store, "mov %rax, (%rdi)\n nop\n ud2");
static bool data_bp(struct box *b)
{
	LOAD(b, store, RING0);
	set_point(b, BOX_DATA, 1 | 0xd << 16);
	return box_run(b) != DB;
}

CODE(out_80, "outb %al, $0x80\n nop\n ud2");
static bool io_bp(struct box *b)
{
	LOAD(b, out_80, RING0);
	b->sregs.cr4 |= 8;
	set_point(b, 0x80, 1 | 2 << 16);
	int end = box_run(b);
	if (end == BOX_OTHER && b->run->exit_reason == KVM_EXIT_IO)
		end = box_run(b);
	return end != DB;
}

CODE(tf_lfence, "lfence\n nop\n nop\n ud2");
static bool step_late(struct box *b)
{
	LOAD(b, tf_lfence, RING0);
	b->regs.rflags |= 0x100;
	return box_run(b) != DB || frame(b, 0) != BOX_CODE + 3;
}

/* --- more of ring 3 --- */

/* To ring 3 with RFLAGS from r8. */
#define TO_USER "push $0x1b\n push %rdi\n push %r8\n push $0x23\n lea 1f(%rip), %rax\n push %rax\n iretq\n 1: "
CODE(odd, "mov 1(%rdi), %ax\n ud2");
static bool user_am(struct box *b)
{
	LOAD(b, odd, RING3);
	b->regs.rflags |= 0x40000;
	return box_run(b) != UD;
}

CODE(tsc, "rdtsc\n ud2");
static bool user_tsd(struct box *b)
{
	LOAD(b, tsc, RING3);
	b->sregs.cr4 |= 4;
	return box_run(b) != GP;
}

CODE(sysenter, "sysenter\n ud2\n hlt");
static bool user_sysenter(struct box *b)
{
	LOAD(b, sysenter, RING3);
	set_msr(b, 0x174, BOX_KCODE);
	set_msr(b, 0x175, BOX_STACK);
	set_msr(b, 0x176, BOX_CODE + 4);
	return box_run(b) != BOX_HLT;
}

CODE(no_sce, "mov $0xc0000080, %ecx\n rdmsr\n and $~1, %eax\n wrmsr\n sysretq\n hlt");
static bool sce_any(struct box *b)
{
	return RUN(b, no_sce, RING0) != UD;
}

CODE(sysexit, "mov $0x174, %ecx\n mov $3, %eax\n xor %edx, %edx\n wrmsr\n lea 1f(%rip), %rdx\n mov %rsp, %rcx\n sysexitq\n 1: ud2");
static bool sysexit_null(struct box *b)
{
	return RUN(b, sysexit, RING0) != GP;
}

CODE(iopl, "mov %rsp, %rbx\n push $0x10\n push %rbx\n push $0x3002\n push $8\n lea 1f(%rip), %rax\n push %rax\n iretq\n 1: pushf\n pop %rax\n hlt");
static bool no_iopl(struct box *b)
{
	return RUN(b, iopl, RING0) != BOX_HLT || (b->regs.rax & 0x3000) != 0x3000;
}

CODE(lar, "mov $0x1b, %ecx\n lar %ecx, %eax\n ud2");
static bool user_lar(struct box *b)
{
	return RUN(b, lar, RING3) != UD || b->regs.rax != 0xcff300;
}

CODE(cr1, ".byte 0x0f, 0x20, 0xc8\n hlt");
static bool user_cr1(struct box *b)
{
	return RUN(b, cr1, RING3) != UD;
}

CODE(mf, "fninit\n movl $0x37b, -4(%rsp)\n fldcw -4(%rsp)\n fld1\n fldz\n fdivrp\n mov $2, %r8d\n" TO_USER "fwait\n ud2");
static bool user_mf(struct box *b)
{
	return RUN(b, mf, RING0) != MF;
}

CODE(lock_rdrand, ".byte 0xf0, 0x0f, 0xc7, 0xf0\n hlt");
static bool lock_any(struct box *b)
{
	return RUN(b, lock_rdrand, RING0) != UD;
}

CODE(cr0_high, "mov %cr0, %rax\n bts $32, %rax\n mov %rax, %cr0\n hlt");
static bool cr_high(struct box *b)
{
	return RUN(b, cr0_high, RING0) != GP;
}

CODE(fxsave_far, "mov $0x800000000000, %rax\n fxsave (%rax)\n hlt");
static bool noncanon_pf(struct box *b)
{
	return RUN(b, fxsave_far, RING0) != GP;
}

CODE(to_conforming, "mov $0x30, %eax\n mov %eax, %es\n mov $2, %r8d\n" TO_USER "mov %es, %ecx\n ud2");
static bool drop_conforming(struct box *b)
{
	LOAD(b, to_conforming, RING0);
	*box_word(b, b->sregs.gdt.base + 0x30) = 0x00af9f000000ffff;
	return box_run(b) != UD || b->regs.rcx != 0x30;
}

CODE(call_gate, "movl $0x33, 4(%rdi)\n lcall *(%rdi)\n hlt");
static bool user_gate(struct box *b)
{
	LOAD(b, call_gate, RING3);
	uint32_t at = BOX_CODE + (uint32_t)(call_gate_end - call_gate) - 1;
	*box_word(b, b->sregs.gdt.base + 0x30) = (at & 0xffff) | BOX_KCODE << 16 | 0xecull << 40 | (uint64_t)(at >> 16) << 48;
	b->sregs.gdt.limit = 0x3f;
	return box_run(b) != BOX_HLT;
}

CODE(div, "xor %ecx, %ecx\n div %ecx\n hlt");
static bool pf_df(struct box *b)
{
	LOAD(b, div, RING3);
	*box_word(b, b->sregs.idt.base) |= 1ull << 32; /* IST1 */
	*box_word(b, b->sregs.tr.base + 0x24) = BOX_PAGES + 0x52000;
	*box_word(b, BOX_PTE(BOX_PAGES + 0x51000)) = 0;
	return box_run(b) != PF;
}

static const struct probe {
	struct kvm_defect defect;
	bool (*found)(struct box *b);
	bool irqchip;
} probes[] = {
	{ { "torn-store", "in ring 0 a store into two pages, the second not there, has written the first when it faults" }, torn_store },
	{ { "straddle-pf", "an access from the last canonical address on raises #PF, not #GP" }, straddle_pf },
	{ { "fxsave-any", "in ring 0 FXSAVE does not raise #GP for an area that is not aligned" }, fxsave_any },
	{ { "split-lock", "in ring 0 a locked instruction across two pages is not atomic: it has written the first when the second faults" }, split_lock },
	{ { "ins-restart", "a REP INS that faults half way does not show in RCX and RDI what is done: it reads the port again" }, ins_restart },
	{ { "user-int", "INT n in ring 3 raises #UD" }, user_int },
	{ { "user-if", "PUSHF and SYSCALL in ring 3 show RFLAGS.IF set when it is not" }, user_if },
	{ { "user-iopl", "CLI and STI in ring 3 raise #GP although IOPL allows them" }, user_iopl },
	{ { "syscall-cpl", "SYSCALL in ring 3 jumps to LSTAR but stays in ring 3 (accel/kvm carries it out itself: nothing is skipped)" }, syscall_cpl },
	{ { "user-ts", "CR0.TS does not keep ring 3 from the FPU" }, user_ts },
	{ { "user-fp-gp", "a #GP of an FPU or AVX instruction in ring 3 arrives as #UD" }, user_fp_gp },
	{ { "user-xm", "without CR4.OSXMMEXCPT ring 3 gets #XM, not #UD" }, user_xm },
	{ { "fsgsbase-on", "RDFSBASE in ring 3 does not mind CR4.FSGSBASE" }, fsgsbase_on },
	{ { "late-gp", "the #GP of SYSRET or IRET to a non-canonical address comes when the return is done" }, late_gp },
	{ { "iret-checks", "IRET takes a data segment as CS" }, iret_checks },
	{ { "sysret-compat", "SYSRET to compatibility mode ends in 64-bit mode" }, sysret_compat },
	{ { "compat-int", "INT3 in 32-bit code of ring 3 raises #UD" }, compat_int },
	{ { "user-bound", "BOUND in ring 3 raises #UD" }, user_bound },
	{ { "user-arpl", "ARPL in ring 3 does nothing" }, user_arpl },
	{ { "compat-base", "UD2 in 32-bit code of ring 3 is looked for without the base of CS: #PF if that is not the user's" }, compat_base },
	{ { "rep-step", "in ring 0 TF traps once for a whole REP instruction" }, rep_step },
	{ { "ss-step", "in ring 0 MOV SS does not hold back a single-step trap" }, ss_step },
	{ { "np-df", "an exception whose gate is not present becomes #DF, not #NP" }, np_df },
	{ { "late-window", "in ring 0 the interrupt window opens up to a thousand instructions after STI" }, late_window },
	{ { "lapic-eoi", "KVM's own LAPIC has ended an interrupt when its handler starts" }, lapic_eoi, true },
	{ { "tsc-fixed", "IA32_TSC_ADJUST does not move the TSC" }, tsc_fixed },
	{ { "cpuid-or", "CPUID shows features of the host that KVM_SET_CPUID2 did not give" }, cpuid_or },
	{ { "msr-checks", "WRMSR takes values that raise #GP on processors: unknown memory types in IA32_PAT, a KERNEL_GS_BASE that is no address" }, msr_checks },
	{ { "no-hypercall", "neither VMCALL nor VMMCALL gets through in ring 0: KVM rewrites the instruction for ever" }, no_hypercall },
	{ { "mwait-nop", "MWAIT, which CPUID does not show, does nothing where #UD was asked for" }, mwait_nop },
	{ { "lgdt-any", "LGDT takes a base that is not canonical" }, lgdt_any },
	{ { "ltr-16", "LTR takes a 16-bit TSS in long mode" }, ltr_16 },
	{ { "cr4-any", "CR4.PKE can be set although CPUID has no PKU" }, cr4_any },
	{ { "smap-fetch", "SMAP keeps ring 0 from raising #UD on the user's pages: as if fetches were reads" }, smap_fetch },
	{ { "no-paging-32", "paging cannot be switched on outside long mode" }, no_paging_32 },
	{ { "frame-base", "an exception in ring 0 does not add the base of SS to where its frame goes" }, frame_base },
	{ { "down-limit", "an access over the end of an expand-down segment is let through" }, down_limit },
	{ { "user-bp", "DR0 to DR3 do not trigger in ring 3" }, user_bp },
	{ { "data-bp", "data breakpoints do not trigger in ring 0" }, data_bp },
	{ { "io-bp", "port breakpoints do not trigger in ring 0" }, io_bp },
	{ { "step-late", "in ring 0 TF traps late after LFENCE, SWAPGS or IN" }, step_late },
	{ { "drop-conforming", "a return to ring 3 drops a conforming code segment from ES" }, drop_conforming },
	{ { "user-gate", "a call gate does not take ring 3 to ring 0" }, user_gate },
	{ { "pf-df", "a page fault on the way to the handler of #DE becomes #DF" }, pf_df },
	{ { "swapgs-32", "SWAPGS is not #UD outside 64-bit mode" }, swapgs_32 },
	{ { "real-int", "INT 80h in real mode does not get to its handler" }, real_int },
	{ { "user-am", "RFLAGS.AC checks alignment in ring 3 although CR0.AM is clear" }, user_am },
	{ { "user-tsd", "CR4.TSD does not keep ring 3 from RDTSC" }, user_tsd },
	{ { "user-sysenter", "SYSENTER in ring 3 does not get to ring 0" }, user_sysenter },
	{ { "sce-any", "SYSRET does not mind EFER.SCE" }, sce_any },
	{ { "sysexit-null", "64-bit SYSEXIT takes a null selector with an RPL in IA32_SYSENTER_CS" }, sysexit_null },
	{ { "no-iopl", "IRET in ring 0 does not load IOPL" }, no_iopl },
	{ { "user-lar", "LAR in ring 3 does not find the GDT" }, user_lar },
	{ { "user-cr1", "MOV from CR1 in ring 3 raises #GP, not #UD" }, user_cr1 },
	{ { "user-mf", "#MF in ring 3 arrives as another exception" }, user_mf },
	{ { "lock-any", "LOCK before RDRAND is not refused" }, lock_any },
	{ { "cr-high", "MOV CR0 and CR4 do not look at bits 63 to 32" }, cr_high },
	{ { "noncanon-pf", "FXSAVE and IRET raise #PF at a non-canonical address" }, noncanon_pf },
};
#define PROBES (sizeof(probes) / sizeof(probes[0]))

static bool find(const struct probe *p)
{
	struct box b;
	if (!box_open(&b, p->irqchip))
		return false;
	bool found = p->found(&b);
	box_close(&b);
	return found;
}

void kvm_defects_find(char *names, size_t size)
{
	size_t n = 0;
	*names = 0;
	for (size_t i = 0; i < PROBES && n < size; i++)
		if (find(&probes[i]))
			n += (size_t)snprintf(names + n, size - n, "%s%s", n ? "," : "", probes[i].defect.name);
}

const struct kvm_defect *kvm_defect_named(const char *name, size_t length)
{
	for (size_t i = 0; i < PROBES; i++)
		if (strlen(probes[i].defect.name) == length && !strncmp(probes[i].defect.name, name, length))
			return &probes[i].defect;
	return NULL;
}

void kvm_defects_print(void)
{
	for (size_t i = 0; i < PROBES; i++)
		printf("%-8s %-14s %s\n", find(&probes[i]) ? "here" : "not here", probes[i].defect.name, probes[i].defect.what);
}
