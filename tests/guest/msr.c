/* The MSR policy (docs/cpu.md) as a guest meets it: what it keeps, what is constant, ignored or refused; caches and power. */
#include "guest.h"

const char guest_name[] = "msr";

#define USER_CODE VA(0x100)
#define USER_STACK VA(0x181)

SNIPPET(do_rdmsr, "rdmsr\n ud2");
SNIPPET(do_wrmsr, "wrmsr\n ud2");
SNIPPET(do_rdpmc, "rdpmc\n ud2");
SNIPPET(do_wbinvd, "wbinvd\n ud2");
SNIPPET(do_invd, "invd\n ud2");
SNIPPET(to_cr0, "mov %rax, %cr0\n ud2");

/* True, or false for #GP(0) at the instruction; anything else fails. */
static bool try(const u8 *code, u32 index, u64 *value)
{
	struct frame f = kernel_frame(code);
	f.rcx = index | 0xdead00000000; /* only ECX counts */
	f.rax = (u32)*value | (code == do_wrmsr ? 0xbeef00000000 : ~0ull << 32);
	f.rdx = *value >> 32 | 0xbeef00000000;
	exec(&f);
	if (f.vector == UD && f.rip == (u64)code + 2) {
		if (code == do_rdmsr) {
			CHECK_EQ(f.rax >> 32 | f.rdx >> 32, 0);
			*value = f.rax | f.rdx << 32;
		}
		return true;
	}
	CHECK_EQ(f.vector, GP);
	CHECK_EQ(f.error, 0);
	CHECK_EQ(f.rip, (u64)code);
	return false;
}

static bool reads(u32 index, u64 *value)
{
	*value = 0;
	return try(do_rdmsr, index, value);
}

static bool writes(u32 index, u64 value)
{
	return try(do_wrmsr, index, &value);
}

/* --- registers --- */

static void kept(void)
{
	section("registers of the guest's own");
	bool checked = !skipping("values that they cannot hold", "msr-checks");
	static const struct {
		u32 index;
		u64 good, bad; /* bad 0: none */
	} msrs[] = {
		{ 0x174, 0x12345678, 0 }, { 0x175, 0xffff800000001234, 0 }, { 0x176, 0x00007fffffffffff, 0 },
		{ 0x277, 0x0407050600070106, 0x0407050600070206 }, { 0x277, 0x0606060606060606, 0x0306060606060606 }, { 0x2ff, 0xc06, 0xc02 }, { 0x2ff, 0x800, 0x1000 },
		{ 0x200, 0xc0000000, 0xc0000002 }, { 0x201, 0xfc0000800, 0xfc0000001 }, { 0x20e, 0x1006, 0x1007 }, { 0x20f, 0xffffff000, 0xfff000000000f000 },
		{ 0x250, 0x0606060606060606, 0x0606060606060602 }, { 0x258, 0, 0x0200000000000000 }, { 0x26f, 0x0505050505050505, 0x0605050505050503 },
		{ 0xc0000081, 0x0023001000000000, 0 }, { 0xc0000082, 0xffffffff81000000, 0x8000000000000000 }, { 0xc0000083, 0x1234, 0x0000800000000000 },
		{ 0xc0000084, 0x47700, 0 }, { 0xc0000102, 0xffff888000000000, 0x0000900000000000 }, { 0xc0000103, 0xfff, 0 },
	};
	for (unsigned i = 0; i < sizeof(msrs) / sizeof(msrs[0]); i++) {
		u64 old, v;
		if ((msrs[i].index == 0xc0000103 && !CPU_HAS(0x80000001, 0, 3, 27)) || !reads(msrs[i].index, &old)) {
			CHECK(msrs[i].index == 0xc0000103);
			continue;
		}
		bool ok = writes(msrs[i].index, msrs[i].good) && reads(msrs[i].index, &v) && v == msrs[i].good;
		if (checked && msrs[i].bad && writes(msrs[i].index, msrs[i].bad))
			ok = false;
		ok = ok && reads(msrs[i].index, &v) && v == msrs[i].good && writes(msrs[i].index, old);
		if (!ok)
			print("MSR %x with %lx, %lx: %lx\n", msrs[i].index, msrs[i].good, msrs[i].bad, v);
		CHECK(ok);
	}
	/* Intel's processors raise #GP, AMD's take 32 bits, KVM makes it canonical: only that what is kept can be an address. */
	u64 v;
	if (!checked)
		return;
	writes(0x175, 0x0000800000000000);
	CHECK(reads(0x175, &v) && ((int64_t)(v << 16) >> 16) == (int64_t)v);
	writes(0x175, 0);
}

static void efer(void)
{
	section("EFER");
	u64 old, v;
	CHECK(reads(0xc0000080, &old));
	CHECK(old & 1 << 10 && old & 1 << 8);
	CHECK(!writes(0xc0000080, old & ~(1ull << 8))); /* long mode cannot be left while paging is on */
	CHECK(!writes(0xc0000080, old | 1 << 12));      /* no SVM */
	CHECK(!writes(0xc0000080, old | 1 << 13));      /* no LMSLE */
	CHECK(!writes(0xc0000080, old | 1 << 1));
	CHECK(writes(0xc0000080, old ^ 1));
	CHECK(reads(0xc0000080, &v) && v == (old ^ 1));
	CHECK(writes(0xc0000080, old));
}

static void constants(void)
{
	section("constants");
	/* Powers, heat, microcode, machine checks: what a guest may ask and cannot change. */
	static const struct {
		u32 index;
		u64 value;
		bool ignored; /* a write is; else it raises #GP */
	} msrs[] = {
		{ 0x0, 0, true }, { 0x17, 0, false }, { 0x2a, 0, true }, { 0x3a, 1, false }, { 0x79, 0, true }, { 0x8b, 0, true }, { 0xce, 0, false },
		{ 0xe7, 0, true }, { 0xe8, 0, true }, { 0xfe, 0x508, false }, { 0x140, 0, true }, { 0x179, 0, false }, { 0x17a, 0, true }, { 0x198, 0, false },
		{ 0x199, 0, true }, { 0x19a, 0, true }, { 0x19b, 0, true }, { 0x19c, 0, true }, { 0x1a0, 0x1801, true }, { 0x1d9, 0, true }, { 0x606, 0, false },
		{ 0xc0010020, 0, true },
	};
	for (unsigned i = 0; i < sizeof(msrs) / sizeof(msrs[0]); i++) {
		u64 v = 0;
		bool ok = reads(msrs[i].index, &v) && v == msrs[i].value;
		ok = ok && writes(msrs[i].index, ~0ull) == msrs[i].ignored && writes(msrs[i].index, 0) == msrs[i].ignored;
		ok = ok && reads(msrs[i].index, &v) && v == msrs[i].value;
		if (!ok)
			print("MSR %x: %lx\n", msrs[i].index, v);
		CHECK(ok);
	}
}

static void refused(void)
{
	section("what is refused");
	static const u32 msrs[] = {
		0x2, 0x6, 0x33, 0x34, 0x8c, 0x9b, 0x9e, 0xc1, 0xc8, 0xcf, 0xe1, 0xe2, 0x123, 0x17b, 0x186, 0x18d, 0x1a2, 0x1a4, 0x1aa, 0x1ad, 0x1b0, 0x1b1, 0x1c4,
		0x1c8, 0x1db, 0x1f2, 0x1fc, 0x280, 0x309, 0x345, 0x38d, 0x38f, 0x3f1, 0x3f8, 0x3fd, 0x400, 0x403, 0x47f, 0x480, 0x48b, 0x491, 0x4c1, 0x560, 0x570,
		0x600, 0x610, 0x611, 0x619, 0x620, 0x630, 0x639, 0x64e, 0x680, 0x6c0, 0x6e1, 0x770, 0x774, 0x900, 0xc80, 0xc8f, 0xd90, 0xda0, 0x2000, 0x40000000,
		0x40000001, 0x40000073, 0x4b564d40, 0x80000000, 0xc000007f, 0xc0000104, 0xc0000200, 0xc0010000, 0xc0010004, 0xc001001a, 0xc0010062,
		0xc0010111, 0xc0010114, 0xc0010117, 0xc0010140, 0xc0010200, 0xc001029b, 0xc00102b1, 0xc0011030, 0xc0012000, 0xffffffff,
	};
	for (unsigned i = 0; i < sizeof(msrs) / sizeof(msrs[0]); i++) {
		u64 v;
		bool r = reads(msrs[i], &v), w = writes(msrs[i], 0);
		if (r || w)
			print("MSR %x: %s %s\n", msrs[i], r ? "read" : "", w ? "written" : "");
		CHECK(!r && !w);
	}
}

static void interrupt_controller(void)
{
	section("the LAPIC's and the clock's");
	u64 v;
	CHECK(reads(0x1b, &v));
	CHECK_EQ(v & 0xbff, 0x900); /* the boot processor's, enabled */
	CHECK(!writes(0x1b, v | 1));
	CHECK(reads(0x6e0, &v));
	CHECK(writes(0x6e0, 0));
	if (!(v & 1 << 10)) {
		u64 base;
		CHECK(reads(0x1b, &base));
		if (!(base & 1 << 10)) {
			CHECK(!reads(0x802, &v)); /* not in x2APIC mode */
			CHECK(!writes(0x80b, 0));
		}
	}
	if (CPU_HAS(0x40000001, 0, 0, 3)) {
		CHECK(reads(0x4b564d01, &v));
		CHECK(writes(0x4b564d01, 0));
		CHECK(writes(0x4b564d00, 0) || true);
	}
}

static void time_stamp(void)
{
	if (!section_unless("the time-stamp counter", "tsc-fixed"))
		return;
	u64 adjust, before, after, v;
	CHECK(reads(0x3b, &adjust));
	before = rdtsc();
	CHECK(writes(0x10, before + (1ull << 40)));
	v = rdtsc();
	CHECK(v >= before + (1ull << 40));
	CHECK(reads(0x3b, &after));
	CHECK(after - adjust > (1ull << 39));
	CHECK(reads(0x10, &v));
	CHECK(writes(0x3b, adjust));
	CHECK(reads(0x3b, &v) && v == adjust);
	v = rdtsc();
	CHECK(v > before && v < before + (1ull << 40));
	if (CPU_HAS(0x80000001, 0, 3, 27)) {
		u32 a, d, c;
		wrmsr(0xc0000103, 0x12345678);
		__asm__ volatile("rdtscp" : "=a"(a), "=d"(d), "=c"(c));
		CHECK_EQ(c, 0x12345678);
		wrmsr(0xc0000103, 0);
	}
}

/* --- caches, counters, ring 3 --- */

static u64 vector_of(const u8 *code, u64 rax)
{
	struct frame f = kernel_frame(code);
	f.rax = rax;
	f.rcx = 0;
	exec(&f);
	return f.vector;
}

static void caches(void)
{
	section("cache control");
	static volatile u64 data[64];
	for (unsigned i = 0; i < 64; i++)
		data[i] = i * 0x1111;
	u64 start = rdtsc();
	for (unsigned i = 0; i < 50; i++)
		CHECK_EQ(vector_of(do_wbinvd, 0), UD);
	CHECK(rdtsc() - start < 10000000000); /* it is not the host's caches that are written back */
	CHECK_EQ(vector_of(do_invd, 0), UD);
	for (unsigned i = 0; i < 64; i++)
		CHECK_EQ(data[i], i * 0x1111); /* INVD throws nothing away */
	u64 cr0 = read_cr0();
	CHECK_EQ(vector_of(to_cr0, (cr0 & ~(1ull << 30)) | 1 << 29), GP); /* NW without CD */
	CHECK_EQ(vector_of(to_cr0, cr0 | 1 << 30), UD);
	CHECK_EQ(read_cr0() & 1 << 30, 1 << 30);
	data[5] = 7;
	CHECK_EQ(data[5], 7);
	CHECK_EQ(vector_of(to_cr0, cr0), UD);
}

static void counters(void)
{
	section("performance counters");
	CHECK_EQ(vector_of(do_rdpmc, 0), GP);
}

static void user_mode(void)
{
	section("ring 3");
	static u8 code[4096] __attribute__((aligned(4096))), stack[4096] __attribute__((aligned(4096)));
	map(USER_CODE, code, P | U | W);
	map(VA(0x180), stack, P | U | W);
	static const struct {
		const u8 *from, *end;
	} all[] = { { do_rdmsr, do_rdmsr_end }, { do_wrmsr, do_wrmsr_end }, { do_wbinvd, do_wbinvd_end }, { do_invd, do_invd_end } };
	for (unsigned i = 0; i < 4; i++) {
		copy(code, all[i].from, (size_t)(all[i].end - all[i].from));
		struct frame f = user_frame(USER_CODE, USER_STACK);
		f.rcx = 0xfe;
		exec(&f);
		CHECK_EQ(f.vector, GP);
		CHECK_EQ(f.error, 0);
		CHECK_EQ(f.rip, USER_CODE);
	}
}

void guest_main(void)
{
	kept();
	efer();
	constants();
	refused();
	interrupt_controller();
	time_stamp();
	caches();
	counters();
	user_mode();
}
