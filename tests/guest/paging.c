/*
 * The page walk of 64-bit mode as a matrix (SDM 3A 4.5-4.8): rights of one entry at every level and page size, by WP, SMEP, SMAP with AC,
 * and NXE, for reads, writes and fetches of the kernel, of the user, and of the processor itself on behalf of user code (a descriptor);
 * accessed and dirty bits exactly; reserved bits; what PCIDs refuse. paging32.c has the legacy formats, tlb.c the flushes.
 */
#include "guest.h"

const char guest_name[] = "paging";

extern u64 gdt[];

#define BASE 0x600000000000ull /* a PML4 entry of its own; physical address p of the first GiB is seen at BASE + p */
enum { SMEP = 1 << 20, SMAP = 1 << 21, WP = 1 << 16, PCIDE = 1 << 17 };
enum { K_READ, K_WRITE, K_FETCH, U_READ, U_WRITE, U_FETCH, I_READ, I_WRITE, ACCESSES };
static const char *const access_names[] = { "kernel read", "kernel write", "kernel fetch", "user read", "user write", "user fetch", "implicit read", "implicit write" };

SNIPPET(do_read, "mov 64(%rdi), %rax\n ud2");
SNIPPET(do_write, "mov %rax, 64(%rdi)\n ud2");
SNIPPET(do_fetch, "jmp *%rdi");
SNIPPET(do_implicit, "mov %ecx, %ds\n ud2");
SNIPPET(do_rmw, "lock incq 64(%rdi)\n ud2");
SNIPPET(read_then_write, "mov 64(%rdi), %rax\n mov %rax, 64(%rdi)\n ud2");

static u8 *target;
static u64 va, *pml4e, *pdpt, *pd, *pt;
static bool strict; /* our own processor: no bit is set by an access that faults. Others may (SDM 3A 4.8). */
static u64 cr0, cr4;
static int largest; /* leaves: level 3 only where CPUID has 1 GiB pages */

/* The path's entries by level (1: PTE), as the page size has them; flags for the one at `at`, all rights elsewhere. */
static u64 *entry(int level)
{
	u64 p = (u64)target;
	return level == 4 ? pml4e : level == 3 ? &pdpt[p >> 30] : level == 2 ? &pd[p >> 21 & 511] : &pt[p >> 12 & 511];
}

static void build(int leaf, int at, u64 flags)
{
	u64 p = (u64)target, next[] = { 0, 0, (u64)pt, (u64)pd, (u64)pdpt };
	for (int level = 4; level >= leaf; level--) {
		u64 f = level == at ? flags : P | W | U;
		u64 a = level > leaf ? next[level] : p & ~((1ull << (12 + 9 * (level - 1))) - 1);
		*(volatile u64 *)entry(level) = a | f | (level == leaf && level > 1 ? PS : 0);
	}
	invlpg(va);
}

static struct frame access(unsigned how, bool ac)
{
	static const u8 *const code[] = { do_read, do_write, do_fetch, do_read, do_write, do_fetch, do_implicit, do_implicit };
	bool user = how >= U_READ;
	/* The descriptor that implicit accesses want: accessed already, or to be marked. */
	*(u64 *)(void *)(target + 128) = how == I_WRITE ? 0x00cff2000000ffff : 0x00cff3000000ffff;
	struct frame f = user ? user_frame(user_alias(code[how]), USER_STACK_TOP) : kernel_frame(code[how]);
	f.rdi = va;
	f.rcx = 128 | 7;
	f.rflags |= ac ? F_AC : 0;
	exec(&f);
	return f;
}

/* Accessed and dirty bits of the path: A of level n in bit n, D of the leaf in bit 0. */
static unsigned bits(int leaf)
{
	unsigned r = 0;
	for (int level = 4; level >= leaf; level--)
		r |= *entry(level) & A ? 1u << level : 0;
	return r | (*entry(leaf) & D ? 1 : 0);
}

static const char *cell_name(int leaf, int at, u64 flags, unsigned how, u64 with0, u64 with4, bool ac)
{
	static char text[128];
	static const char *const sizes[] = { "", "4K", "2M", "1G" }, *const levels[] = { "", "PTE", "PDE", "PDPTE", "PML4E" };
	const char *part[] = { sizes[leaf], levels[at], flags & W ? "W" : "-", flags & U ? "U" : "-", flags & NX ? "NX" : "-", access_names[how],
			       with0 & WP ? "WP" : "", with4 & SMEP ? "SMEP" : "", with4 & SMAP ? "SMAP" : "", ac ? "AC" : "" };
	unsigned n = 0;
	for (unsigned i = 0; i < sizeof(part) / sizeof(part[0]); i++) {
		for (const char *s = part[i]; *s; s++)
			text[n++] = *s;
		if (*part[i])
			text[n++] = ' ';
	}
	text[n - 1] = 0;
	return text;
}

/* SDM 3A 4.6.1: may it, with these rights on the path? */
static bool allowed(u64 flags, unsigned how, u64 with0, u64 with4, bool ac)
{
	bool fetch = how == K_FETCH || how == U_FETCH, write = how == K_WRITE || how == U_WRITE || how == I_WRITE;
	bool user = how >= U_READ && how <= U_FETCH, implicit = how >= I_READ;
	if (fetch && flags & NX)
		return false;
	if (user)
		return flags & U && (!write || flags & W);
	if (flags & U && (fetch ? with4 & SMEP : with4 & SMAP && (implicit || !ac)))
		return false;
	return !write || flags & W || !(with0 & WP);
}

static void check_access(int leaf, int at, u64 flags, unsigned how, u64 with0, u64 with4, bool ac)
{
	build(leaf, at, P | flags);
	struct frame f = access(how, ac);
	bool ok = allowed(flags, how, with0, with4, ac);
	bool fetch = how == K_FETCH || how == U_FETCH, user = how >= U_READ && how <= U_FETCH;
	bool write = how == K_WRITE || how == U_WRITE || how == I_WRITE;
	/* A descriptor is read before it is marked: refused as a read if reads are. */
	u32 error = PF_P | (user ? PF_U : 0) | (fetch ? PF_I : 0) | (write && (how != I_WRITE || allowed(flags, I_READ, with0, with4, ac)) ? PF_W : 0);
	unsigned got = bits(leaf), all = 0x1e & -(1u << leaf), want = ok ? all | write : 0;
	if (!ok && how == I_WRITE && error & PF_W)
		want = all; /* by the read */
	unsigned mask = ok || strict ? 0x1f : 1;
	u64 state = (f.vector & 0xff) | (f.vector == PF ? f.error : 0) << 8 | (u64)(got & mask) << 40;
	u64 expected = ok ? UD | (u64)want << 40 : PF | (u64)error << 8 | (u64)(want & mask) << 40;
	bool right = state == expected && (ok || f.cr2 == va + (fetch ? 0 : how >= I_READ ? 128 : 64) || (how == I_WRITE && f.cr2 - va - 132 < 2) /* of the byte or its word */);
	if (right && ok && fetch)
		right = f.rip == va;
	check_cell(right ? "" : cell_name(leaf, at, flags, how, with0, with4, ac), "vector, error << 8, D and A << 40", right ? expected : state, expected);
	if (!right && state == expected)
		print("  CR2 0x%lx RIP 0x%lx\n", f.cr2, f.rip);
}

static void matrix(void)
{
	if (largest == 2)
		section_if(false, "1 GiB pages", "leaves of 1 GiB");
	unsigned cell = 0; /* a slow processor tries one in ten */
	bool no_fetch = false, smep = CPU_HAS(7, 0, 1, 7), smap = CPU_HAS(7, 0, 1, 20);
	if (!smap)
		section_if(false, "SMAP", "rights at every level, with SMAP");
	for (unsigned c = 0; c < 16; c++) {
		u64 with0 = c & 1 ? WP : 0, with4 = (c & 2 ? SMEP : 0) | (c & 12 ? SMAP : 0);
		bool ac = (c & 12) == 8;
		if ((c & 12) == 12 || (with4 & SMEP && !smep) || (with4 & SMAP && !smap))
			continue;
		if (c == 0)
			section("rights at every level");
		if (c == 4)
			section("rights at every level, with SMAP");
		if (c == 4 && smap)
			no_fetch = skipping("kernel fetches with SMAP", "smap-fetch");
		write_cr0((cr0 & ~(u64)WP) | with0);
		write_cr4(cr4 | with4);
		for (int leaf = 1; leaf <= largest; leaf++)
			for (int at = leaf; at < 5; at++)
				for (unsigned r = 0; r < 8; r++)
					for (unsigned how = 0; how < ACCESSES; how++)
						if (!(no_fetch && with4 & SMAP && how == K_FETCH) && cell++ % guest_slow == 0)
							check_access(leaf, at, (r & 1 ? W : 0) | (r & 2 ? U : 0) | (r & 4 ? NX : 0), how, with0, with4, ac);
		write_cr0(cr0);
		write_cr4(cr4);
	}
}

/* --- entries that are absent, or have bits that must be zero --- */

static void refused(const char *name, int leaf, int level, u64 set, u64 clear, u32 error, bool nxe_off)
{
	static const u32 how_error[] = { 0, PF_W, PF_I, PF_U, PF_U | PF_W, PF_U | PF_I };
	for (unsigned how = K_READ; how <= U_FETCH; how++) {
		build(leaf, 0, 0);
		*entry(level) = (*entry(level) | set) & ~clear;
		invlpg(va);
		u64 efer = rdmsr(0xc0000080);
		if (nxe_off)
			wrmsr(0xc0000080, efer & ~0x800ull);
		struct frame f = access(how, false);
		wrmsr(0xc0000080, efer);
		u32 want = error | (how_error[how] & ~(nxe_off ? (u32)PF_I : 0));
		check_cell(name, access_names[how], f.vector << 32 | f.error, (u64)PF << 32 | want);
		check_cell(name, "CR2", f.cr2, va + (how == K_FETCH || how == U_FETCH ? 0 : 64));
		check_cell(name, "D and A", strict ? bits(leaf) : bits(leaf) & 1, 0);
	}
}

static void reserved(void)
{
	static const char *const names[4][5] = { { "" }, { "", "4K PTE", "4K PDE", "4K PDPTE", "4K PML4E" }, { "", "", "2M PDE", "2M PDPTE", "2M PML4E" },
						 { "", "", "", "1G PDPTE", "1G PML4E" } };
	u32 r[4];
	cpuid(0x80000008, 0, r);
	unsigned width = r[0] & 0xff;
	section("absent entries");
	for (int leaf = 1; leaf <= largest; leaf++)
		for (int level = leaf; level < 5; level++) {
			refused(names[leaf][level], leaf, level, 0, P, 0, false);
			refused(names[leaf][level], leaf, level, 1ull << 51 | NX, P, 0, false); /* nothing else in it counts */
		}
	section("reserved bits");
	for (int leaf = 1; leaf <= largest; leaf++)
		for (int level = leaf; level < 5; level++) {
			const char *name = names[leaf][level];
			/* SDM 3A 4.7: P is set in the error code with RSVD */
			if (width < 52) {
				refused(name, leaf, level, 1ull << 51, 0, PF_P | PF_R, false);
				refused(name, leaf, level, 1ull << width, 0, PF_P | PF_R, false);
			}
			refused(name, leaf, level, NX, 0, PF_P | PF_R, true);
			if (level == 4)
				refused(name, leaf, level, PS, 0, PF_P | PF_R, false);
			if (level == leaf && leaf > 1)
				for (int b = 13; b < 12 + 9 * (leaf - 1); b += 3)
					refused(name, leaf, level, 1ull << b, 0, PF_P | PF_R, false);
			/* an entry above that denies does not hide a reserved bit below */
			if (level == leaf && width < 52 && leaf < 3)
				for (unsigned how = U_READ; how <= U_WRITE; how++) {
					build(leaf, 4, P);
					*entry(leaf) |= 1ull << 51;
					invlpg(va);
					struct frame f = access(how, false);
					check_cell(name, "denied above, reserved below", f.vector << 32 | f.error,
						   (u64)PF << 32 | PF_P | PF_R | PF_U | (how == U_WRITE ? PF_W : 0));
				}
		}
	if (largest == 2)
		refused("PDPTE without 1G pages", 1, 3, PS, 0, PF_P | PF_R, false);
	/* Bits that are not: ignored 9-11, 52-58, PAT, PWT, PCD. */
	section("ignored bits");
	for (int leaf = 1; leaf <= largest; leaf++)
		for (int level = leaf; level < 5; level++) {
			u64 pat = level == leaf && leaf > 1 ? 1 << 12 : 0;
			build(leaf, level, P | W | U | 7ull << 52 | 7 << 9 | 3 << 3 | pat | (level > leaf ? D | G : 0));
			struct frame f = access(K_WRITE, false);
			check_cell(names[leaf][level], "ignored bits", f.vector, UD);
		}
}

/* --- accessed and dirty bits over time --- */

static void dirty(void)
{
	section("dirty bits behind clean translations");
	for (int leaf = 1; leaf <= largest; leaf++)
		for (unsigned user = 0; user < 2; user++) {
			static const u8 *const code[] = { read_then_write, do_rmw, do_write };
			for (unsigned i = 0; i < 3; i++) {
				build(leaf, 0, 0);
				for (unsigned k = 0; k < 2; k++) { /* clean, read first; then cleaned without a flush after a read */
					struct frame f = user ? user_frame(user_alias(do_read), USER_STACK_TOP) : kernel_frame(do_read);
					f.rdi = va;
					exec(&f);
					check_cell("read", "D", !!(*entry(leaf) & D), k ? 1 : 0);
					f = user ? user_frame(user_alias(code[i]), USER_STACK_TOP) : kernel_frame(code[i]);
					f.rdi = va;
					exec(&f);
					check_cell("write", "vector", f.vector, UD);
					check_cell("write", "D and A", bits(leaf), (0x1e & -(1u << leaf)) | 1);
				}
				/* cleared with a flush: comes back */
				*entry(leaf) &= ~(u64)(A | D);
				invlpg(va);
				access(user ? U_READ : K_READ, false);
				check_cell("cleared", "D and A", bits(leaf), 0x1e & -(1u << leaf));
				access(user ? U_WRITE : K_WRITE, false);
				check_cell("cleared", "D", *entry(leaf) & D, D);
			}
		}
	section("writes across pages");
	/* a second page behind the first: the pages' own entries, in the table of 4K pages */
	u64 *second = entry(1) + 1;
	for (unsigned absent = 0; absent < 2; absent++)
		for (unsigned first = 0; first < 2; first++) {
			build(1, 0, 0);
			*second = ((u64)target + 4096) | W | U | (absent && !first ? 0 : P);
			if (absent && first)
				*entry(1) &= ~(u64)P;
			invlpg(va + 4096);
			struct frame f = kernel_frame(do_write);
			f.rdi = va + 4096 - 64 - 4;
			exec(&f);
			check_cell("across", "vector", f.vector, absent ? PF : UD);
			if (absent)
				check_cell("across", "CR2", f.cr2, first ? va + 4092 : va + 4096);
			if (!absent) {
				check_cell("across", "first D and A", *entry(1) & (A | D), A | D);
				check_cell("across", "second D and A", *second & (A | D), A | D);
			}
		}
	*second = 0;
}

/* --- PCIDs --- */

SNIPPET(to_cr4, "mov %rax, %cr4\n ud2");
SNIPPET(to_cr3, "mov %rax, %cr3\n ud2");
SNIPPET(do_invpcid, "invpcid (%rdi), %rsi\n ud2");

static void pcids(void)
{
	if (!section_if(CPU_HAS(1, 0, 2, 17), "PCID", "what PCIDs refuse"))
		return;
	u64 cr3 = read_cr3();
	static u64 d[2];
	struct frame f;
	write_cr3(cr3 | 8); /* PWT: bit 3 of a PCID too */
	f = kernel_frame(to_cr4), f.rax = cr4 | PCIDE;
	exec(&f);
	check_cell("CR4.PCIDE with CR3[11:0] not 0", "vector", f.vector, GP);
	write_cr3(cr3);
	f = kernel_frame(to_cr3), f.rax = cr3 | 1ull << 63;
	exec(&f);
	check_cell("CR3 bit 63 without PCIDE", "vector", f.vector, GP);
	if (!CPU_HAS(7, 0, 1, 10))
		return;
	static const struct {
		const char *name;
		bool pcide;
		u64 type, d0, d1;
		u8 vector;
	} t[] = {
		{ "type 4", 1, 4, 0, 0, GP }, { "type 2^32", 1, 1ull << 32, 0, 0, GP }, { "reserved bits", 1, 1, 0x1000, 0, GP },
		{ "reserved bits, type 2", 1, 2, 1ull << 63, 0, GP }, { "type 0, not canonical", 1, 0, 1, 0x800000000000, GP },
		{ "type 1, not canonical", 1, 1, 1, 0x800000000000, UD }, { "type 0", 1, 0, 0xfff, 0x1000, UD }, { "type 3", 1, 3, 0, 0, UD },
		{ "PCID without PCIDE, type 0", 0, 0, 1, 0x1000, GP }, { "PCID without PCIDE, type 1", 0, 1, 1, 0, GP },
		{ "PCID without PCIDE, type 2", 0, 2, 1, 0, UD }, { "PCID 0 without PCIDE", 0, 1, 0, 0, UD },
	};
	for (unsigned i = 0; i < sizeof(t) / sizeof(t[0]); i++)
		for (unsigned user = 0; user < 2; user++) {
			write_cr4(cr4 | (t[i].pcide ? PCIDE : 0));
			u64 *desc = user ? (u64 *)(USER_STACK_TOP - 64) : d;
			desc[0] = t[i].d0, desc[1] = t[i].d1;
			f = user ? user_frame(user_alias(do_invpcid), USER_STACK_TOP) : kernel_frame(do_invpcid);
			f.rdi = (u64)desc, f.rsi = t[i].type;
			exec(&f);
			check_cell(t[i].name, user ? "user" : "kernel", f.vector, user ? GP : t[i].vector);
		}
	write_cr4(cr4 | PCIDE);
	write_cr3(cr3 | 1);
	f = kernel_frame(to_cr4), f.rax = cr4;
	exec(&f);
	check_cell("CR4.PCIDE cleared with a PCID", "vector", f.vector, UD);
	write_cr4(cr4);
	write_cr3(cr3);
}

/* --- protection keys, five levels: absent, so their bits are refused --- */

static void absent_features(void)
{
	if (!section_unless("features that are not there", "cr4-any"))
		return;
	static const struct {
		const char *name;
		u8 leaf_reg, bit, cr4_bit;
	} t[] = { { "PKU", 2, 3, 22 }, { "LA57", 2, 16, 12 }, { "CET", 2, 7, 23 }, { "SMAP", 1, 20, 21 }, { "SMEP", 1, 7, 20 }, { "UMIP", 2, 2, 11 } };
	for (unsigned i = 0; i < sizeof(t) / sizeof(t[0]); i++) {
		u32 r[4];
		cpuid(7, 0, r);
		bool has = r[t[i].leaf_reg] >> t[i].bit & 1;
		/* LA57 cannot change in long mode; CET has needs of its own */
		bool refused_anyway = t[i].cr4_bit == 12;
		if (has && t[i].cr4_bit == 23)
			continue;
		struct frame f = kernel_frame(to_cr4);
		f.rax = cr4 | 1ull << t[i].cr4_bit;
		exec(&f);
		write_cr4(cr4);
		check_cell(t[i].name, "its bit in CR4", f.vector, has && !refused_anyway ? UD : GP);
	}
}

void guest_main(void)
{
	u32 r[4];
	cpuid(0, 0, r);
	strict = r[1] == 0x68532020; /* "  Shanghai  " */
	map_user_alias();
	target = page_alloc(2);
	copy(target, "\x0f\x0b", 2);
	va = BASE + (u64)target;
	pdpt = page_alloc(1), pd = page_alloc(1), pt = page_alloc(1);
	pml4e = &boot_pml4[BASE >> 39 & 511];
	cr0 = read_cr0(), cr4 = read_cr4();
	largest = CPU_HAS(0x80000001, 0, 3, 26) ? 3 : 2;
	/* An LDT in the tested page: loading a segment from it is an access of the processor. Processor 1's place in the GDT. */
	gdt[10] = 0xfff | (va & 0xffffff) << 16 | 0x82ull << 40 | (va >> 24 & 0xff) << 56;
	gdt[11] = va >> 32;
	__asm__ volatile("lldt %w0" : : "r"(0x50));
	matrix();
	reserved();
	dirty();
	pcids();
	absent_features();
}
