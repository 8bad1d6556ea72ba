/*
 * The page walks outside long mode (SDM 3A 4.3, 4.4): 32-bit paging with 4K and 4M pages, PAE with 4K and 2M pages: rights of the entry at
 * each level by WP, SMEP and NXE, for kernel and user reads, writes and fetches; accessed and dirty bits; reserved bits; PSE off.
 */
#include "legacy.h"

const char guest_name[] = "paging32";

enum format { F_4K, F_4M, F_PAE_4K, F_PAE_2M, FORMATS };
static const char *const format_names[] = { "32-bit 4K", "32-bit 4M", "PAE 4K", "PAE 2M" };
enum { K_READ, K_WRITE, K_FETCH, U_READ, U_WRITE, U_FETCH, ACCESSES };
static const char *const access_names[] = { "kernel read", "kernel write", "kernel fetch", "user read", "user write", "user fetch" };
enum { PSE = 1 << 4, PAE = 1 << 5, SMEP = 1 << 20, WP = 1 << 16, NXE = 1 << 11 };
#define NEEDED "no-paging-32" /* a KVM with this defect can do none of it */
#define TEST 0x40000000u /* physical p of the first 8 MiB is tested at TEST + p */
#define USER 0x80000000u /* and mapped for user code at USER + p */

SNIPPET(do_read, ".code32\n mov 64(%edi), %eax\n ud2\n.code64");
SNIPPET(do_write, ".code32\n mov %eax, 64(%edi)\n ud2\n.code64");
SNIPPET(do_fetch, ".code32\n jmp *%edi\n.code64");

static u8 *target;
static bool strict;
static u32 *dir, *table;     /* 32-bit */
static u64 *pdpt, *pd, *pt; /* PAE: pd is of TEST */

static void build_tables(void)
{
	dir = page_alloc(1), table = page_alloc(1);
	pdpt = page_alloc(1), pd = page_alloc(1), pt = page_alloc(1);
	for (unsigned user = 0; user < 2; user++) {
		u32 base = user ? USER : 0, flags = P | W | (user ? U : 0);
		u64 *d = page_alloc(1);
		pdpt[base >> 30] = (u64)d | P;
		for (unsigned i = 0; i < 2; i++) { /* 4M each */
			u32 *t = page_alloc(1);
			dir[(base >> 22) + i] = (u32)(u64)t | flags;
			for (unsigned k = 0; k < 1024; k++)
				t[k] = (i << 22 | k << 12) | flags;
		}
		for (unsigned i = 0; i < 4; i++) { /* 2M each */
			u64 *t = page_alloc(1);
			d[i] = (u64)t | flags;
			for (unsigned k = 0; k < 512; k++)
				t[k] = (u64)(i << 21 | k << 12) | flags;
		}
	}
	pdpt[TEST >> 30] = (u64)pd | P;
}

/* Entry of level 1 or 2 of the path to the target. */
static u64 entry(enum format fmt, int level)
{
	u32 p = (u32)(u64)target;
	if (fmt >= F_PAE_4K)
		return level == 2 ? pd[p >> 21] : pt[p >> 12 & 511];
	return level == 2 ? dir[(TEST + p) >> 22] : table[p >> 12 & 1023];
}

static void set_entry(enum format fmt, int level, u64 value)
{
	u32 p = (u32)(u64)target;
	if (fmt >= F_PAE_4K && level == 2)
		pd[p >> 21] = value;
	else if (fmt >= F_PAE_4K)
		pt[p >> 12 & 511] = value;
	else if (level == 2)
		dir[(TEST + p) >> 22] = (u32)value;
	else
		table[p >> 12 & 1023] = (u32)value;
}

static int leaf_of(enum format fmt)
{
	return fmt == F_4M || fmt == F_PAE_2M ? 2 : 1;
}

static void build(enum format fmt, int at, u64 flags)
{
	u64 p = (u64)target, size = fmt == F_4M ? 4 << 20 : fmt == F_PAE_2M ? 2 << 20 : 4096;
	for (int level = 2; level >= leaf_of(fmt); level--) {
		u64 f = level == at ? flags : P | W | U;
		u64 a = level == leaf_of(fmt) ? p & ~(size - 1) : fmt >= F_PAE_4K ? (u64)pt : (u64)table;
		set_entry(fmt, level, a | f | (level == 2 && leaf_of(fmt) == 2 ? PS : 0));
	}
}

static struct legacy access(enum format fmt, unsigned how, u32 cr0, u32 cr4, u32 efer)
{
	static const u8 *const code[] = { do_read, do_write, do_fetch };
	struct legacy f = legacy_flat(code[how % 3]);
	if (how >= U_READ) {
		f.eip += USER;
		f.cs = LEGACY_UCODE;
		f.ss = f.ds = f.es = LEGACY_UDATA;
	}
	f.edi = TEST + (u32)(u64)target;
	f.cr0 = 0x80000011 | cr0;
	f.cr3 = (u32)(fmt >= F_PAE_4K ? (u64)pdpt : (u64)dir);
	f.cr4 |= PSE | cr4 | (fmt >= F_PAE_4K ? PAE : 0);
	f.efer = efer;
	exec_legacy(&f);
	return f;
}

static const char *cell_name(enum format fmt, int at, u64 flags, unsigned how, u32 cr0, u32 cr4, u32 efer)
{
	static char text[128];
	const char *part[] = { format_names[fmt], at == 2 ? "PDE" : "PTE", flags & W ? "W" : "-", flags & U ? "U" : "-", flags & NX ? "NX" : "-",
			       access_names[how], cr0 & WP ? "WP" : "", cr4 & SMEP ? "SMEP" : "", efer & NXE ? "NXE" : "" };
	unsigned n = 0;
	for (unsigned i = 0; i < sizeof(part) / sizeof(part[0]); i++) {
		for (const char *s = part[i]; *s; s++)
			text[n++] = *s;
		text[n++] = ' ';
	}
	text[n - 1] = 0;
	return text;
}

static unsigned bits(enum format fmt)
{
	unsigned r = entry(fmt, leaf_of(fmt)) & D ? 1 : 0;
	for (int level = 2; level >= leaf_of(fmt); level--)
		r |= entry(fmt, level) & A ? 1u << level : 0;
	return r;
}

static void check_access(enum format fmt, int at, u64 flags, unsigned how, u32 cr0, u32 cr4, u32 efer)
{
	bool user = how >= U_READ, write = how % 3 == 1, fetch = how % 3 == 2, nx = fetch && flags & NX;
	bool refused_nx = flags & NX && !(efer & NXE); /* reserved then */
	build(fmt, at, P | flags);
	struct legacy f = access(fmt, how, cr0, cr4, efer);
	bool ok = !refused_nx && !nx && (!user || flags & U) && !(fetch && !user && flags & U && cr4 & SMEP) &&
		  !(write && !(flags & W) && (user || cr0 & WP));
	bool i_bit = fetch && (cr4 & SMEP || (fmt >= F_PAE_4K && efer & NXE));
	u32 error = PF_P | (write ? PF_W : 0) | (user ? PF_U : 0) | (i_bit ? PF_I : 0) | (refused_nx ? PF_R : 0);
	unsigned want = ok ? (leaf_of(fmt) == 2 ? 4 : 6) | write : 0, mask = ok || strict ? 7 : 1;
	u64 got = f.vector | (u64)(f.vector == PF ? f.error : 0) << 8 | (u64)(bits(fmt) & mask) << 40;
	u64 expected = ok ? UD | (u64)want << 40 : PF | (u64)error << 8 | (u64)(want & mask) << 40;
	bool right = got == expected && (ok || f.cr2 == f.edi + (fetch ? 0 : 64));
	check_cell(right ? "" : cell_name(fmt, at, flags, how, cr0, cr4, efer), "vector, error << 8, D and A << 40", right ? expected : got, expected);
}

static void matrix(void)
{
	bool smep = CPU_HAS(7, 0, 1, 7);
	for (enum format fmt = F_4K; fmt < FORMATS; fmt++) {
		if (!section_unless(format_names[fmt], NEEDED))
			continue;
		for (unsigned c = 0; c < 8; c++) {
			u32 cr0 = c & 1 ? WP : 0, cr4 = c & 2 ? SMEP : 0, efer = c & 4 ? NXE : 0;
			if (cr4 && !smep)
				continue;
			for (int at = leaf_of(fmt); at < 3; at++)
				for (unsigned r = 0; r < (fmt >= F_PAE_4K ? 8 : 4); r++)
					for (unsigned how = 0; how < ACCESSES; how++)
						check_access(fmt, at, (r & 1 ? W : 0) | (r & 2 ? U : 0) | (r & 4 ? NX : 0), how, cr0, cr4, efer);
		}
	}
}

static void refused(const char *name, enum format fmt, int level, u64 set, u64 clear, u32 error)
{
	for (unsigned how = K_READ; how < ACCESSES; how++) {
		build(fmt, 0, 0);
		set_entry(fmt, level, (entry(fmt, level) | set) & ~clear);
		struct legacy f = access(fmt, how, WP, 0, fmt >= F_PAE_4K ? NXE : 0);
		u32 want = error | (how % 3 == 1 ? PF_W : 0) | (how >= U_READ ? PF_U : 0) | (how % 3 == 2 && fmt >= F_PAE_4K ? PF_I : 0);
		check_cell(name, access_names[how], (u64)f.vector << 32 | f.error, (u64)PF << 32 | want);
		check_cell(name, "D and A", strict ? bits(fmt) : bits(fmt) & 1, 0);
	}
}

static unsigned width;

static void absent(void)
{
	refused("32-bit PTE absent", F_4K, 1, 0, P, 0);
	refused("32-bit PDE absent", F_4K, 2, 0, P, 0);
	refused("4M PDE absent", F_4M, 2, 0, P, 0);
	refused("PAE PTE absent", F_PAE_4K, 1, 1ull << 62, P, 0);
	refused("PAE PDE absent", F_PAE_4K, 2, NX, P, 0);
	refused("4M PDE bit 21", F_4M, 2, 1 << 21, 0, PF_P | PF_R);
	refused("PAE PTE bit 62", F_PAE_4K, 1, 1ull << 62, 0, PF_P | PF_R);
	refused("PAE PDE bit 52", F_PAE_4K, 2, 1ull << 52, 0, PF_P | PF_R);
	if (width < 52)
		refused("PAE PTE address", F_PAE_4K, 1, 1ull << width, 0, PF_P | PF_R);
	refused("2M PDE bit 13", F_PAE_2M, 2, 1 << 13, 0, PF_P | PF_R);
	refused("2M PDE bit 20", F_PAE_2M, 2, 1 << 20, 0, PF_P | PF_R);
}

static void absent_pdpte(void)
{
	u64 old = pdpt[TEST >> 30];
	pdpt[TEST >> 30] = 0;
	build(F_PAE_4K, 0, 0);
	struct legacy f = access(F_PAE_4K, U_WRITE, WP, 0, NXE);
	check_cell("PDPTE absent", "vector and error", (u64)f.vector << 32 | f.error, (u64)PF << 32 | PF_W | PF_U);
	pdpt[TEST >> 30] = old;
}

static void without_pse(void)
{
	build(F_4K, 0, 0);
	set_entry(F_4K, 2, entry(F_4K, 2) | PS);
	struct legacy f = legacy_flat(do_read);
	*(u32 *)(void *)(target + 64) = 0x600d;
	f.edi = TEST + (u32)(u64)target;
	f.cr0 = 0x80000011, f.cr3 = (u32)(u64)dir;
	exec_legacy(&f);
	check_cell("PS without PSE", "vector", f.vector, UD);
	check_cell("PS without PSE", "value", f.eax, 0x600d);
}

static void pse36(void)
{
	if (CPU_HAS(1, 0, 3, 17) && width >= 36) {
		/* 4 GiB and more: there is no memory */
		build(F_4M, 0, 0);
		set_entry(F_4M, 2, entry(F_4M, 2) | 1 << 13);
		struct legacy f = access(F_4M, K_READ, WP, 0, 0);
		check_cell("bit 32 of the address", "vector", f.vector, UD);
		check_cell("bit 32 of the address", "value", f.eax, 0xffffffff);
	}
}

static void wrap(void)
{
	build(F_4K, 0, 0);
	struct legacy f = access(F_4K, K_READ, WP, 0, 0);
	check_cell("plain", "value", f.eax, 0x600d);
	f = legacy_flat(do_read);
	f.edi = (u32)-64; /* to address 0 */
	f.cr0 = 0x80000011, f.cr3 = (u32)(u64)dir;
	u32 first;
	__asm__ volatile("mov 0, %0" : "=r"(first));
	exec_legacy(&f);
	check_cell("address 0", "vector", f.vector, UD);
	check_cell("address 0", "value", f.eax, first);
}

void guest_main(void)
{
	u32 r[4];
	cpuid(0, 0, r);
	strict = r[1] == 0x68532020; /* "  Shanghai  ", see paging.c */
	target = page_alloc(1);
	copy(target, "\x0f\x0b", 2);
	build_tables();
	cpuid(0x80000008, 0, r);
	width = r[0] & 0xff;
	matrix();
	static const struct {
		const char *name;
		void (*run)(void);
	} others[] = { { "absent entries, reserved bits", absent }, { "a PDPTE that is absent", absent_pdpte }, { "without PSE the bit is ignored", without_pse },
		       { "PSE-36", pse36 }, { "wrap of addresses at 4 GiB", wrap } };
	for (unsigned i = 0; i < sizeof(others) / sizeof(others[0]); i++)
		if (section_unless(others[i].name, NEEDED))
			others[i].run();
}
