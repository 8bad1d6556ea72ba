/* What CPUID says: it is of one piece, hides what it must, follows the state, and what it shows is there. */
#include "guest.h"

const char guest_name[] = "cpuid";

enum { EAX, EBX, ECX, EDX };

#define USER_CODE VA(0x100)
#define USER_STACK VA(0x181)

extern const u8 first_snippet[], last_snippet[];
__asm__(".pushsection .snippets, \"ax\"\n first_snippet:\n .popsection");
SNIPPET(do_cpuid, "cpuid\n ud2");
SNIPPET(do_avx, "vaddps %ymm0, %ymm0, %ymm0\n ud2");
SNIPPET(do_xsetbv, "xsetbv\n ud2");
SNIPPET(do_xgetbv, "xgetbv\n ud2");
SNIPPET(to_cr4, "mov %rax, %cr4\n ud2");
SNIPPET(use_pni, "haddpd %xmm0, %xmm0\n ud2");
SNIPPET(use_ssse3, "pshufb %xmm0, %xmm0\n ud2");
SNIPPET(use_sse4_1, "ptest %xmm0, %xmm0\n ud2");
SNIPPET(use_sse4_2, "crc32b %al, %ecx\n ud2");
SNIPPET(use_popcnt, "popcnt %rax, %rax\n ud2");
SNIPPET(use_cx16, "push $0\n push $0\n push $0\n and $-16, %rsp\n cmpxchg16b (%rsp)\n ud2");
SNIPPET(use_movbe, "push $0\n movbe (%rsp), %eax\n ud2");
SNIPPET(use_aes, "aesenc %xmm0, %xmm0\n ud2");
SNIPPET(use_pclmul, "pclmulqdq $0, %xmm0, %xmm0\n ud2");
SNIPPET(use_sha, "sha1msg1 %xmm0, %xmm0\n ud2");
SNIPPET(use_bmi1, "andn %eax, %ecx, %edx\n ud2");
SNIPPET(use_bmi2, "rorx $3, %rax, %rdx\n ud2");
SNIPPET(use_lzcnt, "lzcnt %rax, %rax\n ud2");
SNIPPET(use_adx, "adcx %rax, %rax\n ud2");
SNIPPET(use_rdrand, "rdrand %rax\n ud2");
SNIPPET(use_rdseed, "rdseed %rax\n ud2");
SNIPPET(use_rdtscp, "rdtscp\n ud2");
SNIPPET(use_rdpid, "rdpid %rax\n ud2");
SNIPPET(use_lahf, "lahf\n ud2");
SNIPPET(use_prefetchw, "prefetchw (%rsp)\n ud2");
SNIPPET(use_f16c, "vcvtph2ps %xmm0, %ymm0\n ud2");
SNIPPET(use_fma, "vfmadd132ps %ymm0, %ymm0, %ymm0\n ud2");
SNIPPET(use_avx2, "vpaddd %ymm0, %ymm0, %ymm0\n ud2");
SNIPPET(use_xsave, "sub $0x1000, %rsp\n and $-64, %rsp\n xor %eax, %eax\n xor %edx, %edx\n xsave (%rsp)\n ud2");
SNIPPET(use_xsaveopt, "sub $0x400, %rsp\n and $-64, %rsp\n xor %eax, %eax\n xor %edx, %edx\n xsaveopt (%rsp)\n ud2");
SNIPPET(use_xsavec, "sub $0x400, %rsp\n and $-64, %rsp\n xor %eax, %eax\n xor %edx, %edx\n xsavec (%rsp)\n ud2");
SNIPPET(use_invpcid, "push $0\n push $0\n mov $2, %eax\n invpcid (%rsp), %rax\n ud2");
SNIPPET(use_fsgsbase, "rdfsbase %rax\n ud2");
SNIPPET(use_monitor, "lea (%rsp), %rax\n xor %ecx, %ecx\n xor %edx, %edx\n monitor\n ud2");
SNIPPET(use_mwait, "xor %eax, %eax\n xor %ecx, %ecx\n mwait\n ud2");
SNIPPET(use_vmxoff, "vmxoff\n ud2");
SNIPPET(use_clgi, "clgi\n ud2");
__asm__(".pushsection .snippets, \"ax\"\n last_snippet:\n .popsection");

static u32 reg(u32 leaf, u32 sub, int r)
{
	u32 out[4];
	cpuid(leaf, sub, out);
	return out[r];
}

static bool has(u32 leaf, u32 sub, int r, int bit)
{
	u32 max = reg(leaf & 0x80000000, 0, EAX);
	return leaf <= max && (reg(leaf, sub, r) >> bit & 1);
}

static struct frame run(const u8 *code)
{
	struct frame f = kernel_frame(code);
	exec(&f);
	return f;
}

/* --- the leaves --- */

static void leaves(void)
{
	section("leaves");
	u32 r[4], max = reg(0, 0, EAX);
	CHECK(max >= 0xd);
	CHECK(reg(0x80000000, 0, EAX) >= 0x80000008);
	cpuid(0, 0, r);
	for (int i = 0; i < 12; i++) {
		u32 c = r[(const int[]){ EBX, EDX, ECX }[i / 4]] >> (i % 4 * 8) & 0xff;
		CHECK(c >= ' ' && c < 127); /* a vendor */
	}
	/* Past the last there is nothing, whichever rule the processor has. */
	static const u32 outside[] = { 0x7fffffff, 0x8fffffff, 0xc0000000 };
	for (unsigned i = 0; i < 3; i++) {
		cpuid(outside[i], 0, r);
		CHECK_EQ(r[0] | r[1] | r[2] | r[3], 0);
	}
	/* The registers' upper halves become zero, and flags stay. */
	struct frame f = kernel_frame(do_cpuid);
	f.rax = f.rbx = f.rdx = ~0ull;
	f.rax = 0xffffffff00000000;
	f.rcx = 0xffffffff00000000;
	f.rflags |= STATUS;
	exec(&f);
	CHECK_EQ(f.vector, UD);
	CHECK_EQ(f.rax, max);
	CHECK_EQ((f.rbx | f.rcx | f.rdx) >> 32, 0);
	CHECK_EQ(f.rflags & STATUS, STATUS);
	/* The same in ring 3. */
	static const u32 asked[] = { 0, 1, 4, 7, 0xb, 0x40000000, 0x80000001, 0x80000008 };
	for (unsigned i = 0; i < sizeof(asked) / sizeof(asked[0]); i++) {
		cpuid(asked[i], 0, r);
		struct frame u = user_frame(USER_CODE + (u64)(do_cpuid - first_snippet), USER_STACK);
		u.rax = asked[i];
		u.rcx = 0;
		exec(&u);
		CHECK_EQ(u.vector, UD);
		CHECK_EQ(u.rax, r[EAX]);
		CHECK_EQ(u.rbx, r[EBX]);
		CHECK_EQ(u.rcx, r[ECX]);
		CHECK_EQ(u.rdx, r[EDX]);
	}
}

static void identity(void)
{
	section("identity");
	u32 r[4];
	CHECK(has(1, 0, ECX, 31)); /* a VM */
	CHECK_EQ(reg(1, 0, EBX) >> 24, 0);
	cpuid(0x40000000, 0, r);
	CHECK(r[EAX] >= 0x40000001);
	CHECK_EQ(r[EBX], 0x4b4d564b); /* KVMKVMKVM */
	CHECK_EQ(r[ECX], 0x564b4d56);
	CHECK_EQ(r[EDX], 0x4d);
	CHECK(reg(0x40000001, 0, EAX) >> 3 & 1);
	CHECK(reg(0x80000002, 0, EAX)); /* it has a name */
	u32 sizes = reg(0x80000008, 0, EAX);
	CHECK((sizes & 0xff) >= 36 && (sizes & 0xff) <= 52);
	CHECK_EQ(sizes >> 8 & 0xff, 48);
	CHECK(has(0x80000007, 0, EDX, 8)); /* the TSC is steady */
	cpuid(0x15, 0, r);
	CHECK(!r[EAX] || r[EBX]);
	if (r[EAX] && reg(0x16, 0, EAX)) {
		u64 mhz = (u64)r[ECX] * r[EBX] / r[EAX] / 1000000;
		CHECK(mhz + 1 >= reg(0x16, 0, EAX) && mhz <= reg(0x16, 0, EAX) + 1ull);
	}
}

static void topology(void)
{
	section("topology and caches");
	u32 r[4];
	for (u32 sub = 0; sub < 4; sub++) {
		cpuid(0xb, sub, r);
		CHECK_EQ(r[EDX], 0); /* the x2APIC id */
		CHECK_EQ(r[ECX], sub == 0 ? 1 << 8 : sub == 1 ? 1 | 2 << 8 : sub);
		if (sub < 2)
			CHECK((1u << r[EAX]) >= r[EBX] && r[EBX]);
		if (sub == 1)
			CHECK_EQ(r[EBX], guest_cpus);
		if (sub >= 2)
			CHECK_EQ(r[EAX] | r[EBX], 0);
	}
	/* Caches end, and have sizes; AMD's are elsewhere. */
	u32 leaf = reg(4, 0, EAX) & 0x1f ? 4 : 0x8000001d, sub = 0;
	if (leaf == 4 || has(0x80000001, 0, ECX, 22)) {
		for (; sub < 16; sub++) {
			cpuid(leaf, sub, r);
			if (!(r[EAX] & 0x1f))
				break;
			CHECK((r[EAX] & 0x1f) <= 3);
			CHECK((r[EBX] & 0xfff) == 63);
			if (leaf == 4)
				CHECK((r[EAX] >> 26) + 1 >= guest_cpus);
		}
		CHECK(sub && sub < 16);
	}
}

/* --- features --- */

static void hidden(void)
{
	section("what is hidden");
	static const struct {
		u32 leaf;
		u8 reg, bit;
	} bits[] = {
		{ 1, ECX, 2 }, { 1, ECX, 3 }, { 1, ECX, 4 }, { 1, ECX, 5 }, { 1, ECX, 6 }, { 1, ECX, 7 }, { 1, ECX, 8 }, { 1, ECX, 14 }, { 1, ECX, 15 },
		{ 1, ECX, 18 }, { 1, EDX, 21 }, { 1, EDX, 22 }, { 1, EDX, 29 }, { 7, EBX, 2 }, { 7, EBX, 12 }, { 7, EBX, 14 }, { 7, EBX, 15 }, { 7, EBX, 25 },
		{ 7, ECX, 5 }, { 7, ECX, 13 }, { 7, ECX, 16 }, { 7, ECX, 30 }, { 7, EDX, 5 }, { 7, EDX, 18 }, { 7, EDX, 19 }, { 0x80000001, ECX, 2 },
		{ 0x80000001, ECX, 3 }, { 0x80000001, ECX, 10 }, { 0x80000001, ECX, 12 }, { 0x80000001, ECX, 23 }, { 0x80000001, ECX, 29 },
	};
	for (unsigned i = 0; i < sizeof(bits) / sizeof(bits[0]); i++)
		if (has(bits[i].leaf, 0, bits[i].reg, bits[i].bit)) {
			print("leaf %x register %u bit %u\n", bits[i].leaf, bits[i].reg, bits[i].bit);
			CHECK(false);
		}
	static const u32 empty[] = { 3, 5, 0xa, 0xf, 0x10, 0x12, 0x14, 0x8000000a, 0x8000001f };
	for (unsigned i = 0; i < sizeof(empty) / sizeof(empty[0]); i++) {
		u32 r[4];
		cpuid(empty[i], 0, r);
		CHECK_EQ(r[0] | r[1] | r[2] | r[3], 0);
	}
	CHECK_EQ(reg(6, 0, EAX) & ~4u, 0); /* of power and heat only: the APIC timer never stops */
	CHECK_EQ(reg(6, 0, ECX), 0);
	CHECK_EQ(run(use_vmxoff).vector, UD);
	CHECK_EQ(run(use_clgi).vector, UD);
}

static void idle_instructions(void)
{
	if (section_unless("MONITOR and MWAIT are not there", "mwait-nop")) {
		CHECK_EQ(run(use_monitor).vector, UD);
		CHECK_EQ(run(use_mwait).vector, UD);
	}
}

static void present(void)
{
	section("what is shown is there");
	static const struct {
		u32 leaf, sub;
		u8 reg, bit;
		const u8 *code;
	} insns[] = {
		{ 1, 0, ECX, 0, use_pni }, { 1, 0, ECX, 1, use_pclmul }, { 1, 0, ECX, 9, use_ssse3 }, { 1, 0, ECX, 12, use_fma }, { 1, 0, ECX, 13, use_cx16 },
		{ 1, 0, ECX, 19, use_sse4_1 }, { 1, 0, ECX, 20, use_sse4_2 }, { 1, 0, ECX, 22, use_movbe }, { 1, 0, ECX, 23, use_popcnt }, { 1, 0, ECX, 25, use_aes },
		{ 1, 0, ECX, 26, use_xsave }, { 1, 0, ECX, 28, do_avx }, { 1, 0, ECX, 29, use_f16c }, { 1, 0, ECX, 30, use_rdrand }, { 7, 0, EBX, 3, use_bmi1 },
		{ 7, 0, EBX, 5, use_avx2 }, { 7, 0, EBX, 8, use_bmi2 }, { 7, 0, EBX, 10, use_invpcid }, { 7, 0, EBX, 18, use_rdseed }, { 7, 0, EBX, 19, use_adx },
		{ 7, 0, EBX, 29, use_sha }, { 7, 0, ECX, 22, use_rdpid }, { 0xd, 1, EAX, 0, use_xsaveopt }, { 0xd, 1, EAX, 1, use_xsavec },
		{ 0x80000001, 0, ECX, 0, use_lahf }, { 0x80000001, 0, ECX, 5, use_lzcnt }, { 0x80000001, 0, ECX, 8, use_prefetchw },
		{ 0x80000001, 0, EDX, 27, use_rdtscp },
	};
	u64 cr4 = read_cr4();
	if (has(1, 0, ECX, 26)) {
		write_cr4(cr4 | 1 << 18);
		struct frame f = kernel_frame(do_xsetbv);
		f.rax = has(1, 0, ECX, 28) ? 7 : 3;
		f.rcx = f.rdx = 0;
		exec(&f);
		CHECK_EQ(f.vector, UD);
	}
	for (unsigned i = 0; i < sizeof(insns) / sizeof(insns[0]); i++) {
		if (!has(insns[i].leaf, insns[i].sub, insns[i].reg, insns[i].bit))
			continue;
		struct frame f = run(insns[i].code);
		if (f.vector != UD || f.rip <= (u64)insns[i].code)
			print("leaf %x register %u bit %u: vector %lu\n", insns[i].leaf, insns[i].reg, insns[i].bit, f.vector);
		CHECK(f.vector == UD && f.rip > (u64)insns[i].code); /* the UD2 behind it */
	}
	/* What CPUID and control bits decide together. */
	if (!has(7, 0, ECX, 22))
		CHECK_EQ(run(use_rdpid).rip, (u64)use_rdpid);
	write_cr4(cr4);
}

static void dependencies(void)
{
	section("what needs what");
	static const struct {
		u32 leaf, sub;
		u8 reg, bit;
		u32 nleaf;
		u8 nreg, nbit;
	} needs[] = {
		{ 1, 0, ECX, 28, 1, ECX, 26 }, { 1, 0, ECX, 12, 1, ECX, 28 }, { 1, 0, ECX, 29, 1, ECX, 28 }, { 7, 0, EBX, 5, 1, ECX, 28 }, { 7, 0, EBX, 16, 7, EBX, 5 },
		{ 0xd, 1, EAX, 0, 1, ECX, 26 }, { 0xd, 1, EAX, 1, 1, ECX, 26 }, { 7, 0, EBX, 10, 1, ECX, 17 }, { 1, 0, ECX, 9, 1, ECX, 0 },
		{ 1, 0, ECX, 19, 1, ECX, 9 }, { 1, 0, ECX, 20, 1, ECX, 19 }, { 1, 0, ECX, 28, 1, ECX, 20 }, { 1, 0, ECX, 21, 1, EDX, 9 }, { 1, 0, ECX, 24, 1, EDX, 9 },
	};
	for (unsigned i = 0; i < sizeof(needs) / sizeof(needs[0]); i++)
		CHECK(!has(needs[i].leaf, needs[i].sub, needs[i].reg, needs[i].bit) || has(needs[i].nleaf, 0, needs[i].nreg, needs[i].nbit));
}

/* --- what follows the state --- */

static u64 set_cr4(u64 value)
{
	struct frame f = kernel_frame(to_cr4);
	f.rax = value;
	exec(&f);
	return f.vector;
}

static void state(void)
{
	section("what follows the state");
	u64 cr4 = read_cr4() & ~(1ull << 18);
	write_cr4(cr4);
	CHECK(!has(1, 0, ECX, 27)); /* OSXSAVE */
	CHECK_EQ(run(do_avx).rip, (u64)do_avx);
	CHECK_EQ(run(do_avx).vector, UD);
	CHECK_EQ(run(do_xsetbv).vector, UD);
	if (!has(1, 0, ECX, 26)) {
		CHECK_EQ(set_cr4(cr4 | 1 << 18), GP);
		CHECK_EQ(reg(0xd, 0, EAX), 0);
		return;
	}
	write_cr4(cr4 | 1 << 18);
	CHECK(has(1, 0, ECX, 27));
	bool avx = has(1, 0, ECX, 28);
	static const u32 masks[] = { 1, 3, 7, 3, 1 };
	for (unsigned i = 0; i < 5; i++) {
		struct frame f = kernel_frame(do_xsetbv);
		f.rax = masks[i];
		f.rcx = f.rdx = 0;
		exec(&f);
		if (masks[i] == 7 && !avx) {
			CHECK_EQ(f.vector, GP);
			continue;
		}
		CHECK_EQ(f.vector, UD);
		CHECK_EQ(reg(0xd, 0, EBX), masks[i] == 7 ? 832 : 576);
		CHECK((reg(0xd, 0, EAX) & masks[i]) == masks[i]);
		CHECK(reg(0xd, 0, ECX) >= reg(0xd, 0, EBX));
		f = run(do_avx);
		CHECK_EQ(f.vector, UD);
		CHECK_EQ(f.rip > (u64)do_avx, masks[i] == 7);
		f = kernel_frame(do_xgetbv);
		f.rcx = 0;
		exec(&f);
		CHECK_EQ(f.rax | f.rdx << 32, masks[i]);
	}
	CHECK(!avx || reg(0xd, 2, EAX) == 256);
	CHECK(!avx || reg(0xd, 2, EBX) == 576);
	CHECK_EQ(has(0xd, 0, EAX, 2), avx);
	write_cr4(cr4);
	if (!has(1, 0, ECX, 26))
		return;
	CHECK(!has(1, 0, ECX, 27));
}

/* Bits of CR4 that belong to features that are not shown are reserved. */
static void reserved(void)
{
	if (!section_unless("control bits of what is not shown", "cr4-any"))
		return;
	static const struct {
		u8 cr4, reg, bit;
		u32 leaf;
	} bits[] = { { 13, ECX, 5, 1 }, { 11, ECX, 2, 7 }, { 12, ECX, 16, 7 }, { 16, EBX, 0, 7 }, { 17, ECX, 17, 1 }, { 18, ECX, 26, 1 }, { 20, EBX, 7, 7 },
		     { 21, EBX, 20, 7 }, { 22, ECX, 3, 7 }, { 24, ECX, 31, 7 } };
	u64 cr4 = read_cr4();
	for (unsigned i = 0; i < sizeof(bits) / sizeof(bits[0]); i++) {
		if (has(bits[i].leaf, 0, bits[i].reg, bits[i].bit))
			continue;
		if (set_cr4(cr4 | 1ull << bits[i].cr4) != GP) {
			print("CR4 bit %u\n", bits[i].cr4);
			CHECK(false);
		}
		write_cr4(cr4);
	}
}

void guest_main(void)
{
	static u8 code[4096] __attribute__((aligned(4096))), stack[4096] __attribute__((aligned(4096)));
	copy(code, first_snippet, (size_t)(last_snippet - first_snippet));
	map(USER_CODE, code, P | U | W);
	map(VA(0x180), stack, P | U | W);
	leaves();
	identity();
	topology();
	if (section_unless("nothing is shown but what was given", "cpuid-or"))
		CHECK(!has(1, 0, EDX, 1) && !has(1, 0, EDX, 7) && !has(1, 0, EDX, 14)); /* VME, MCE, MCA */
	hidden();
	idle_instructions();
	present();
	dependencies();
	state();
	reserved();
}
