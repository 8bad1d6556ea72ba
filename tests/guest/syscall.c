/*
 * SYSCALL, SYSRET, SYSENTER, SYSEXIT, SWAPGS and FSGSBASE in 64-bit mode: what selectors, flags and addresses come out, what is refused, and
 * that the descriptors do not matter; UMIP and TSD. compat.c has the ways in from 32-bit code, user.c whole system calls.
 * The model is Intel's (SDM 2B, 3A 5.8.7, 5.8.8). Where AMD's manual says otherwise the vendor decides: SYSENTER and SYSEXIT are #UD in long
 * mode, SYSRET to a non-canonical RCX faults behind the return, null selectors keep the base of FS and GS.
 */
#include "guest.h"

const char guest_name[] = "syscall";

enum { EFER = 0xc0000080, STAR = 0xc0000081, LSTAR, CSTAR, SFMASK, FS_BASE = 0xc0000100, GS_BASE, KERNEL_GS_BASE };
enum { SYSENTER_CS = 0x174, SYSENTER_ESP, SYSENTER_EIP };
#define LOW 0xc0000000ull /* a user page below 4 GiB: 32-bit code reads the same UD2 */
#define NONCANON 0x800000000000ull

SNIPPET(do_syscall, "syscall\n .globl after_syscall\n after_syscall: ud2");
SNIPPET(do_sysret, "sysretq");
SNIPPET(do_sysret32, "sysretl");
SNIPPET(do_sysenter, "sysenter\n ud2");
SNIPPET(do_sysexit, "sysexitq");
SNIPPET(do_sysexit32, "sysexitl");
SNIPPET(entry, "ud2");
extern const u8 after_syscall[];

static bool amd;

static u64 place(const u8 *code, bool user)
{
	return user ? user_alias(code) : (u64)code;
}

static struct frame start(const u8 *code, bool user)
{
	return user ? user_frame(user_alias(code), USER_STACK_TOP) : kernel_frame(code);
}

/* --- SYSCALL --- */

static void syscalls(void)
{
	static const u64 masks[] = { 0, 0xffffffff, F_CF, F_TF, F_IF, F_DF, F_AC, F_NT, F_RF, F_ID, 3 << 12, STATUS, 0x47700, 2, 1ull << 31 };
	static const u64 flags[] = { 0, STATUS, STATUS | F_DF | F_AC | F_ID, F_IF, 3 << 12, F_RF, F_NT };
	wrmsr(LSTAR, (u64)entry);
	wrmsr(STAR, (u64)0x20 << 48 | (u64)KCODE << 32 | 0x12345678);
	check_cell("STAR", "read back", rdmsr(STAR), (u64)0x20 << 48 | (u64)KCODE << 32 | 0x12345678);
	for (unsigned user = 0; user < 2; user++) {
		if (!section_unless(user ? "SYSCALL in user mode: flags by SFMASK" : "SYSCALL in kernel mode: flags by SFMASK", user ? "user-if" : "no-iopl"))
			continue;
		for (unsigned m = 0; m < sizeof(masks) / sizeof(masks[0]); m++)
			for (unsigned i = 0; i < sizeof(flags) / sizeof(flags[0]); i++) {
				wrmsr(SFMASK, masks[m]);
				struct frame f = start(do_syscall, user);
				u64 rsp = f.rsp;
				f.rflags |= flags[i];
				exec(&f);
				u64 now = (flags[i] | 2) & ~(u64)F_RF;
				const char *name = user ? "SYSCALL from user mode" : "SYSCALL from kernel mode";
				check_cell(name, "RIP", f.rip, (u64)entry);
				check_cell(name, "RCX", f.rcx, place(after_syscall, user));
				check_cell(name, "R11", f.r11, now);
				check_cell(name, "RFLAGS", f.rflags & ~(u64)F_RF, (now & ~masks[m]) | 2);
				check_cell(name, "CS, SS", f.cs << 16 | f.ss, KCODE << 16 | KDATA);
				check_cell(name, "RSP", f.rsp, rsp);
			}
	}
	wrmsr(SFMASK, 0x47700);
}

static void stars(void)
{
	static const u16 bases[] = { 0x08, 0x0b, 0x10, 0xf00, 0xffe8, 4 };
	for (unsigned i = 0; i < sizeof(bases) / 2; i++) {
		wrmsr(STAR, (u64)bases[i] << 32);
		struct frame f = start(do_syscall, true);
		exec(&f);
		check_cell("STAR", "vector", f.vector, UD);
		check_cell("STAR", "CS", f.cs, bases[i] & ~3);
		check_cell("STAR", "SS", f.ss, (bases[i] & ~3) + 8);
		check_cell("STAR", "RIP", f.rip, (u64)entry);
	}
}

static void no_sce(void)
{
	u64 efer = rdmsr(EFER);
	const u8 *code[] = { do_syscall, do_sysret, do_sysret32 };
	for (unsigned i = 0; i < 3; i++)
		for (unsigned user = 0; user < 2; user++) {
			wrmsr(EFER, efer & ~1ull);
			struct frame f = start(code[i], user);
			exec(&f);
			wrmsr(EFER, efer);
			check_cell("no SCE", "vector", f.vector, UD);
			check_cell("no SCE", "RIP", f.rip, place(code[i], user));
		}
}

/* --- SYSRET --- */

static void sysrets(void)
{
	static const u16 bases[] = { 0x20, 0x23, 0x21, 0xf00, 0xffe0 };
	for (unsigned wide = 0; wide < 2; wide++) {
		if (!section_unless(wide ? "SYSRET: 64-bit" : "SYSRET: 32-bit", wide ? "" : "sysret-compat"))
			continue;
		for (unsigned i = 0; i < sizeof(bases) / 2; i++) {
			wrmsr(STAR, (u64)bases[i] << 48 | (u64)KCODE << 32);
			struct frame f = kernel_frame(wide ? do_sysret : do_sysret32);
			u64 rsp = f.rsp;
			f.rcx = wide ? user_alias(entry) : LOW | 0x1234500000000;
			f.r11 = 2;
			exec(&f);
			const char *name = wide ? "SYSRET, 64-bit" : "SYSRET, 32-bit";
			check_cell(name, "vector", f.vector, UD);
			check_cell(name, "RIP", f.rip, wide ? user_alias(entry) : LOW);
			check_cell(name, "CS", f.cs, (u16)(bases[i] + (wide ? 16 : 0)) | 3);
			check_cell(name, "SS", f.ss, (u16)(bases[i] + 8) | 3);
			check_cell(name, "RSP", f.rsp, rsp);
		}
	}
	section("SYSRET: flags");
	wrmsr(STAR, (u64)0x20 << 48 | (u64)KCODE << 32);
	static const u64 flags[] = { 0, ~0ull & ~(u64)(F_TF | F_NT), STATUS, F_IF, 3 << 12, F_RF, 1 << 17, F_AC | F_ID };
	u64 iopl = skipping("IOPL by SYSRET", "no-iopl") ? 3 << 12 : 0;
	for (unsigned i = 0; i < sizeof(flags) / sizeof(flags[0]); i++) {
		struct frame f = kernel_frame(do_sysret);
		f.rcx = user_alias(entry), f.r11 = flags[i] & ~iopl;
		exec(&f);
		/* (R11 & 3C7FD7H) | 2: without RF and VM. The fault pushes RF. */
		check_cell("SYSRET", "RFLAGS", f.rflags & ~(u64)F_RF, (flags[i] & ~iopl & 0x3c7fd7) | 2);
	}
	section("SYSRET: refused");
	struct frame f = start(do_sysret, true);
	exec(&f);
	check_cell("SYSRET in user mode", "vector", f.vector, GP);
	/* canonical, but not there */
	f = kernel_frame(do_sysret);
	f.rcx = 0x7ffffffff000, f.r11 = 2;
	exec(&f);
	check_cell("SYSRET to an absent page", "vector", f.vector, PF);
	check_cell("SYSRET to an absent page", "error code", f.error, PF_U | PF_I);
	check_cell("SYSRET to an absent page", "CS", f.cs, UCODE);
	f = kernel_frame(do_sysret);
	f.rcx = (u64)entry, f.r11 = 2;
	exec(&f);
	check_cell("SYSRET to the kernel's page", "error code", f.error, PF_P | PF_U | PF_I);
	if (!section_unless("SYSRET: to no address", "late-gp"))
		return;
	static const u64 bad[] = { NONCANON, 0xffff7fffffffffff, 1ull << 63, 0x7fffffffffff + 1 };
	for (unsigned i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		f = kernel_frame(do_sysret);
		f.rcx = bad[i], f.r11 = 2 | F_CF;
		exec(&f);
		check_cell("SYSRET to nowhere", "vector", f.vector, GP);
		check_cell("SYSRET to nowhere", "CS", f.cs, amd ? UCODE : KCODE);
		check_cell("SYSRET to nowhere", "RIP", f.rip, amd ? bad[i] : (u64)do_sysret);
		check_cell("SYSRET to nowhere", "CF", f.rflags & F_CF, amd ? F_CF : 0);
	}
}

/* --- SYSENTER, SYSEXIT --- */

static void sysenters(void)
{
	if (amd) {
		section("SYSENTER");
		struct frame f = start(do_sysenter, true);
		exec(&f);
		check_cell("SYSENTER in long mode on AMD", "vector", f.vector, UD);
		return;
	}
	wrmsr(SYSENTER_EIP, (u64)entry);
	wrmsr(SYSENTER_ESP, 0xffff800000012345);
	static const u16 segments[] = { 0x08, 0x0b, 0xf00, 0xffc0, 0, 3 };
	for (unsigned user = 0; user < 2; user++) {
		if (!section_unless(user ? "SYSENTER in user mode" : "SYSENTER in kernel mode", user ? "user-sysenter" : ""))
			continue;
		for (unsigned i = 0; i < sizeof(segments) / 2; i++) {
			bool refused = !(segments[i] & 0xfffc);
			u64 flags = STATUS | F_IF | F_DF | F_AC | F_RF | F_NT;
			wrmsr(SYSENTER_CS, segments[i]);
			struct frame f = start(do_sysenter, user);
			f.rflags |= flags;
			f.rcx = 7, f.r11 = 8;
			exec(&f);
			const char *name = user ? "SYSENTER from user mode" : "SYSENTER from kernel mode";
			check_cell(name, "vector", f.vector, refused ? GP : UD);
			check_cell(name, "RIP", f.rip, refused ? place(do_sysenter, user) : (u64)entry);
			check_cell(name, "RCX, R11", f.rcx << 8 | f.r11, 0x708);
			if (refused)
				continue;
			check_cell(name, "RSP", f.rsp, 0xffff800000012345);
			check_cell(name, "CS", f.cs, segments[i] & ~3);
			check_cell(name, "SS", f.ss, (u16)((segments[i] & ~3) + 8));
			check_cell(name, "RFLAGS", f.rflags & ~(u64)F_RF, 2 | (flags & ~(u64)(F_IF | F_RF)));
		}
	}
	section("SYSEXIT");
	bool any_cs = skipping("selector 3 in SYSEXIT", "sysexit-null");
	for (unsigned i = 0; i < sizeof(segments) / 2; i++)
		for (unsigned wide = 0; wide < 2; wide++) {
			bool refused = !(segments[i] & 0xfffc);
			wrmsr(SYSENTER_CS, segments[i]);
			if (any_cs && wide && segments[i] == 3)
				continue;
			const u8 *code = wide ? do_sysexit : do_sysexit32;
			struct frame f = kernel_frame(code);
			f.rdx = wide ? user_alias(entry) : LOW | 0x1234500000000;
			f.rcx = 0x0000700000012345;
			f.rflags |= STATUS | F_AC | F_DF;
			exec(&f);
			const char *name = wide ? "SYSEXIT, 64-bit" : "SYSEXIT, 32-bit";
			check_cell(name, "vector", f.vector, refused ? GP : UD);
			if (refused) {
				check_cell(name, "RIP", f.rip, (u64)code);
				continue;
			}
			check_cell(name, "RIP", f.rip, wide ? user_alias(entry) : LOW);
			check_cell(name, "RSP", f.rsp, wide ? 0x0000700000012345 : 0x12345);
			check_cell(name, "CS", f.cs, (u16)((segments[i] & ~3) + (wide ? 32 : 16)) | 3);
			check_cell(name, "SS", f.ss, (u16)((segments[i] & ~3) + (wide ? 40 : 24)) | 3);
			check_cell(name, "RFLAGS", f.rflags & ~(u64)F_RF, 2 | STATUS | F_AC | F_DF);
		}
	wrmsr(SYSENTER_CS, KCODE);
	for (unsigned i = 0; i < 3; i++) {
		struct frame f = start(do_sysexit, i == 2);
		f.rdx = i == 0 ? NONCANON : user_alias(entry), f.rcx = i == 1 ? NONCANON : 0;
		exec(&f);
		static const char *const names[] = { "SYSEXIT to nowhere", "SYSEXIT with no stack", "SYSEXIT in user mode" };
		check_cell(names[i], "vector", f.vector, GP);
		check_cell(names[i], "RIP", f.rip, place(do_sysexit, i == 2));
	}
	wrmsr(SYSENTER_CS, 0);
}

/* --- FS, GS --- */

SNIPPET(do_swapgs, "swapgs\n mov %gs:0, %rax\n swapgs\n mov %gs:0, %rbx\n ud2");
SNIPPET(rdfs, "rdfsbase %rax\n rdgsbase %rbx\n rdfsbase %ecx\n rdgsbase %r15d\n ud2");
SNIPPET(wrfs, "wrfsbase %rax\n wrgsbase %rbx\n ud2");
SNIPPET(wrfs32, "wrfsbase %eax\n wrgsbase %ebx\n ud2");
SNIPPET(lock_rdfs, ".byte 0xf0, 0xf3, 0x0f, 0xae, 0xc0\n ud2");
SNIPPET(load_fs, "mov %ecx, %fs\n mov %ecx, %gs\n ud2");

static void bases(void)
{
	section("SWAPGS");
	static u64 a = 0xa, b = 0xb;
	u64 cr4 = read_cr4();
	wrmsr(GS_BASE, (u64)&b);
	wrmsr(KERNEL_GS_BASE, (u64)&a);
	struct frame f = start(do_swapgs, false);
	exec(&f);
	check_cell("SWAPGS", "swapped", f.rax, 0xa);
	check_cell("SWAPGS", "and back", f.rbx, 0xb);
	f = start(do_swapgs, true);
	exec(&f);
	check_cell("SWAPGS in user mode", "vector", f.vector, GP);
	if (!section_unless("FSGSBASE", "fsgsbase-on"))
		return;
	for (unsigned user = 0; user < 2; user++) {
		const char *name = user ? "user" : "kernel";
		static const u8 *const code[] = { rdfs, wrfs, wrfs32 };
		wrmsr(FS_BASE, 0x123456789abc);
		wrmsr(GS_BASE, 0xffff800087654321);
		for (unsigned i = 0; i < 3; i++) {
			f = start(code[i], user);
			exec(&f);
			check_cell(name, "without CR4.FSGSBASE", f.vector << 48 | f.rip, (u64)UD << 48 | place(code[i], user));
		}
		write_cr4(cr4 | 1 << 16);
		f = start(rdfs, user);
		exec(&f);
		check_cell(name, "RDFSBASE", f.rax, 0x123456789abc);
		check_cell(name, "RDGSBASE", f.rbx, 0xffff800087654321);
		check_cell(name, "RDFSBASE, 32-bit", f.rcx, 0x56789abc);
		check_cell(name, "RDGSBASE, 32-bit", f.r15, 0x87654321);
		f = start(wrfs32, user);
		f.rax = 0xffffffff12345678, f.rbx = NONCANON | 5;
		exec(&f);
		check_cell(name, "WRFSBASE, 32-bit", rdmsr(FS_BASE), 0x12345678);
		check_cell(name, "WRGSBASE, 32-bit", rdmsr(GS_BASE), 5);
		f = start(wrfs, user);
		f.rax = 0x7fffffffffff, f.rbx = NONCANON;
		exec(&f);
		check_cell(name, "WRGSBASE, not canonical", f.vector, GP);
		check_cell(name, "WRFSBASE before it", rdmsr(FS_BASE), 0x7fffffffffff);
		check_cell(name, "GS base kept", rdmsr(GS_BASE), 5);
		f = start(lock_rdfs, user);
		exec(&f);
		check_cell(name, "LOCK", f.vector << 48 | f.rip, (u64)UD << 48 | place(lock_rdfs, user));
		write_cr4(cr4);
		/* loading the selectors */
		wrmsr(FS_BASE, 0x123456789abc);
		wrmsr(GS_BASE, 0x123456789abc);
		f = start(load_fs, user);
		f.rcx = UDATA;
		exec(&f);
		check_cell(name, "base of a descriptor", rdmsr(FS_BASE) | rdmsr(GS_BASE), 0);
		wrmsr(FS_BASE, 0x123456789abc);
		wrmsr(GS_BASE, 0x123456789abc);
		f = start(load_fs, user);
		f.rcx = 0;
		exec(&f);
		if (!amd || CPU_HAS(0x80000021, 0, 0, 6))
			check_cell(name, "base of a null selector", rdmsr(FS_BASE) | rdmsr(GS_BASE), 0);
	}
	wrmsr(FS_BASE, 0);
	wrmsr(GS_BASE, 0);
}

/* --- what CR4 keeps from user mode --- */

SNIPPET(do_sgdt, "sgdt -16(%rsp)\n ud2");
SNIPPET(do_sidt, "sidt -16(%rsp)\n ud2");
SNIPPET(do_sldt, "sldt %eax\n ud2");
SNIPPET(do_str, "str %eax\n ud2");
SNIPPET(do_smsw, "smsw %eax\n ud2");
SNIPPET(do_smsw_mem, "smsw -16(%rsp)\n ud2");
SNIPPET(do_rdtsc, "rdtsc\n ud2");
SNIPPET(do_rdtscp, "rdtscp\n ud2");
SNIPPET(do_rdpmc, "mov $0, %ecx\n rdpmc\n ud2");

static void kept(void)
{
	section("UMIP");
	u64 cr4 = read_cr4();
	static const u8 *const umip[] = { do_sgdt, do_sidt, do_sldt, do_str, do_smsw, do_smsw_mem };
	static const char *const names[] = { "SGDT", "SIDT", "SLDT", "STR", "SMSW", "SMSW to memory" };
	for (unsigned i = 0; i < 6; i++)
		for (unsigned on = 0; on < 2; on++)
			for (unsigned user = 0; user < 2; user++) {
				if (on && !CPU_HAS(7, 0, 2, 2))
					continue;
				write_cr4(cr4 | (on ? 1 << 11 : 0));
				struct frame f = start(umip[i], user);
				exec(&f);
				write_cr4(cr4);
				check_cell(names[i], on ? "with UMIP" : "without UMIP", f.vector, on && user ? GP : UD);
				if (!on && umip[i] == do_smsw)
					check_cell(names[i], "value", f.rax, read_cr0());
			}
	section("TSD, PCE");
	bool no_tsd = skipping("user mode: TSD", "user-tsd");
	for (unsigned on = 0; on < 2; on++)
		for (unsigned user = 0; user < 2; user++) {
			if (on && user && no_tsd)
				continue;
			const u8 *code[] = { do_rdtsc, do_rdtscp };
			for (unsigned i = 0; i < 2; i++) {
				if (i && !CPU_HAS(0x80000001, 0, 3, 27))
					continue;
				write_cr4(cr4 | (on ? 4 : 0));
				struct frame f = start(code[i], user);
				exec(&f);
				write_cr4(cr4);
				check_cell(i ? "RDTSCP" : "RDTSC", on ? "with TSD" : "without TSD", f.vector, on && user ? GP : UD);
			}
		}
	struct frame f = start(do_rdpmc, true);
	exec(&f);
	check_cell("RDPMC", "without PCE in user mode", f.vector, GP);
}

void guest_main(void)
{
	u32 r[4];
	cpuid(0, 0, r);
	amd = r[1] == 0x68747541 || r[1] == 0x6f677948; /* AuthenticAMD, HygonGenuine */
	map_user_alias();
	u8 *page = page_alloc(1);
	u64 *pt = page_alloc(1);
	page[0] = 0x0f, page[1] = 0x0b;
	pt[0] = (u64)page | P | W | U;
	*pte_of(boot_pml4, LOW, 3) |= U;
	*pte_of(boot_pml4, LOW, 2) = (u64)pt | P | W | U;
	write_cr4(read_cr4() ^ 1 << 7);
	write_cr4(read_cr4() ^ 1 << 7);
	syscalls();
	section("SYSCALL: selectors from STAR alone");
	stars();
	section("SYSCALL from pages that the supervisor must not read"); /* whoever carries it out */
	if (CPU_HAS(7, 0, 1, 20)) {
		write_cr4(read_cr4() | 1 << 21);
		stars();
		write_cr4(read_cr4() & ~(1ull << 21));
	}
	if (section_unless("without EFER.SCE", "sce-any"))
		no_sce();
	sysrets();
	sysenters();
	bases();
	kept();
}
