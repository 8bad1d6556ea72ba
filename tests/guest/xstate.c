/*
 * Extended states: what each form of XSAVE writes and XRSTOR takes (SDM 1 13.7-13.11), MXCSR's own rules, XCR0, CR0.TS; and each floating-point
 * exception by itself, masked and not, of SSE, AVX and x87. fpu.c has whole contexts and what may be used when.
 */
#include "guest.h"

const char guest_name[] = "xstate";

#define DATA VA(0x10)
enum { X87 = 1, SSE = 2, AVX = 4 };

SNIPPET(xsave, "xsave64 (%rdi)\n ud2");
SNIPPET(xsavec, "xsavec64 (%rdi)\n ud2");
SNIPPET(xsaveopt, "xsaveopt64 (%rdi)\n ud2");
SNIPPET(xrstor, "xrstor64 (%rdi)\n ud2");
SNIPPET(fxsave, "fxsave64 (%rdi)\n ud2");
SNIPPET(fxrstor, "fxrstor64 (%rdi)\n ud2");
SNIPPET(vzeroupper, "vzeroupper\n ud2");
SNIPPET(xgetbv, "xor %ecx, %ecx\n xgetbv\n ud2");
SNIPPET(fill_state, "mov $0x1111, %eax\n movd %eax, %xmm3\n vpbroadcastd %xmm3, %ymm3\n vpaddd %ymm3, %ymm3, %ymm15\n fninit\n fldpi\n fld1\n ldmxcsr (%rdi)\n ud2");
SNIPPET(store_state, "vmovdqu %ymm3, (%rdi)\n vmovdqu %ymm15, 32(%rdi)\n stmxcsr 64(%rdi)\n fnstcw 68(%rdi)\n fnstenv 72(%rdi)\n ud2");

static bool in_user;
static u8 *area, *second; /* 1 KiB each */

static struct frame run(const u8 *code, void *rdi, u64 mask)
{
	struct frame f = in_user ? user_frame(user_alias(code), USER_STACK_TOP - 64) : kernel_frame(code);
	f.rdi = (u64)rdi, f.rax = mask;
	exec(&f);
	return f;
}

static bool at(const struct frame *f, const u8 *code)
{
	return f->rip == (in_user ? user_alias(code) : (u64)code);
}

static u64 word(const u8 *p, unsigned offset)
{
	return *(const u64 *)(const void *)(p + offset);
}

static u32 get_mxcsr(void)
{
	u32 v;
	__asm__ volatile("stmxcsr %0" : "=m"(v));
	return v;
}

static void set_mxcsr(u32 v)
{
	__asm__ volatile("ldmxcsr %0" : : "m"(v));
}

static void load_known(u32 mxcsr)
{
	*(u32 *)(void *)second = mxcsr;
	run(fill_state, second, 0);
}

/* ymm3 is 0x1111 in each dword, ymm15 0x2222, two numbers on the x87 stack. */
static void check_state(const char *name, unsigned init, u32 mxcsr)
{
	fill(second, 0, 256);
	run(store_state, second, 0);
	u64 low = init & SSE ? 0 : 0x0000111100001111, high = init & AVX ? 0 : 0x0000111100001111;
	check_cell(name, "XMM3", word(second, 8), low);
	check_cell(name, "YMM3", word(second, 24), high);
	check_cell(name, "XMM15", word(second, 32), 2 * low);
	check_cell(name, "YMM15", word(second, 56), 2 * high);
	check_cell(name, "MXCSR", *(u32 *)(void *)(second + 64), mxcsr);
	check_cell(name, "tags", *(u16 *)(void *)(second + 72 + 8), init & X87 ? 0xffff : 0x0fff);
}

static const struct {
	const char *name;
	const u8 *code;
	bool compact, optional;
} forms[] = { { "XSAVE", xsave, false, false }, { "XSAVEOPT", xsaveopt, false, true }, { "XSAVEC", xsavec, true, true } };

static bool have(unsigned form)
{
	return !forms[form].optional || CPU_HAS(0xd, 1, 0, forms[form].compact);
}

/* Where the AVX part lies: no other extended state is asked for. */
enum { HEADER = 512, YMMH = 576, SIZE = 832 };

static void masks(void)
{
	section("what is saved, by the mask");
	for (unsigned form = 0; form < 3; form++)
		for (unsigned mask = 0; mask < 8; mask++) {
			if (!have(form))
				continue;
			const char *name = forms[form].name;
			load_known(0x3f80);
			fill(area, 0x55, 1024);
			fill(area + HEADER, 0, 64);
			if (!forms[form].compact)
				*(u64 *)(void *)(area + HEADER) = 1ull << 9; /* bits that are not asked for stay */
			struct frame f = run(forms[form].code, area, mask);
			check_cell(name, "vector", f.vector, UD);
			u64 bv = word(area, HEADER);
			check_cell(name, "XSTATE_BV", bv, mask | (forms[form].compact ? 0 : 1 << 9));
			check_cell(name, "XCOMP_BV", word(area, HEADER + 8), forms[form].compact ? 1ull << 63 | mask : 0);
			check_cell(name, "FCW", *(u16 *)(void *)area, mask & X87 ? 0x37f : 0x5555);
			/* MXCSR with SSE or AVX, standard form; with SSE alone in the compacted one (SDM 1 13.7, 13.10) */
			bool mxcsr = mask & (SSE | (forms[form].compact ? 0 : AVX));
			check_cell(name, "MXCSR", *(u32 *)(void *)(area + 24), mxcsr ? 0x3f80 : 0x55555555);
			check_cell(name, "XMM3", word(area, 160 + 48), mask & SSE ? 0x0000111100001111 : 0x5555555555555555);
			check_cell(name, "YMM3", word(area, YMMH + 48), mask & AVX ? 0x0000111100001111 : 0x5555555555555555);
			check_cell(name, "YMM15", word(area, YMMH + 240), mask & AVX ? 0x0000222200002222 : 0x5555555555555555);
			check_cell(name, "behind", word(area, SIZE), 0x5555555555555555);
			check_state(name, 0, 0x3f80);
			/* and restored from there, with nothing asked for that is not in it */
			if (!mask)
				continue;
			__asm__ volatile("vzeroall\n fninit");
			set_mxcsr(0x1f80);
			*(u64 *)(void *)(area + HEADER) = mask;
			f = run(xrstor, area, mask);
			check_cell(name, "restored: vector", f.vector, UD);
			check_state(name, 7 & ~mask, mxcsr ? 0x3f80 : 0x1f80);
		}
}

static void initial(void)
{
	section("initial states");
	for (unsigned form = 0; form < 3; form++) {
		if (!have(form))
			continue;
		const char *name = forms[form].name;
		for (unsigned gone = 1; gone < 8; gone++) {
			/* XRSTOR with XSTATE_BV clear makes them initial; MXCSR comes from memory in the standard form */
			load_known(0x3f80);
			fill(area, 0x55, 1024);
			fill(area + HEADER, 0, 64);
			*(u32 *)(void *)(area + 24) = 0x5f80;
			struct frame f = run(xrstor, area, gone);
			check_cell("XRSTOR", "vector", f.vector, UD);
			u32 mxcsr = gone & (SSE | AVX) ? 0x5f80 : 0x3f80;
			check_state("XRSTOR", gone, mxcsr);
			/* saved again: a component is in XSTATE_BV with its initial value, or neither in it nor (but for XSAVE) written */
			run(xrstor, area, gone);
			fill(area, 0x55, 1024);
			fill(area + HEADER, 0, 64);
			run(forms[form].code, area, 7);
			u64 bv = word(area, HEADER);
			check_cell(name, "what is not initial is in XSTATE_BV", (bv | gone) & 7, 7);
			if (bv & AVX) {
				check_cell(name, "YMM3", word(area, YMMH + 48), gone & AVX ? 0 : 0x0000111100001111);
			} else {
				u64 v = word(area, YMMH + 48);
				check_cell(name, "YMM3, initial", form == 0 && !v ? 0x5555555555555555 : v, 0x5555555555555555);
			}
			/* MXCSR as it is, whatever XSTATE_BV says: for the compacted form only with SSE in use */
			if (!forms[form].compact)
				check_cell(name, "MXCSR", *(u32 *)(void *)(area + 24), 0x1f80 | (mxcsr & 0x6000));
			__asm__ volatile("fninit\n vzeroall");
			run(xrstor, area, 7);
			check_state(name, gone, forms[form].compact && !(bv & SSE) ? 0x1f80 : mxcsr);
		}
	}
	/* the compacted form: MXCSR is initial with SSE */
	if (have(2)) {
		load_known(0x3f80);
		fill(area, 0x55, 1024);
		fill(area + HEADER, 0, 64);
		*(u64 *)(void *)(area + HEADER + 8) = 1ull << 63 | 7;
		struct frame f = run(xrstor, area, SSE);
		check_cell("XRSTOR, compacted", "vector", f.vector, UD);
		check_state("XRSTOR, compacted", SSE, 0x1f80);
		load_known(0x3f80);
		f = run(xrstor, area, AVX);
		check_state("XRSTOR, compacted", AVX, 0x3f80);
	}
	set_mxcsr(0x1f80);
}

static void refused(void)
{
	section("what XRSTOR refuses");
	static const struct {
		const char *name;
		u16 offset;
		u64 value;
		u8 mask, vector;
		bool compact;
	} t[] = {
		{ "XSTATE_BV bit 3", 512, 8, 7, GP, 0 }, { "XSTATE_BV bit 63", 512, 1ull << 63, 7, GP, 0 }, { "XCOMP_BV", 520, 1, 7, GP, 0 },
		{ "header byte 16", 528, 1, 7, GP, 0 }, { "header byte 23", 528, 1ull << 63, 7, GP, 0 }, { "header byte 24, not looked at", 536, 1, 7, UD, 0 },
		{ "MXCSR", 24, 0x10000, 7, GP, 0 }, { "MXCSR with AVX alone", 24, 0x10000, AVX, GP, 0 }, { "MXCSR with x87 alone", 24, 0x10000, X87, UD, 0 },
		{ "XSTATE_BV not in XCOMP_BV", 512, 7, 7, GP, 1 }, { "XCOMP_BV bit 3", 520, 8, 7, GP, 1 }, { "compacted, header byte 24", 536, 1, 7, GP, 1 },
		{ "compacted, header byte 63", 568, 1ull << 63, 7, GP, 1 }, { "compacted", 512, 3, 7, UD, 1 },
	};
	for (unsigned user = 0; user < 2; user++)
		for (unsigned i = 0; i < sizeof(t) / sizeof(t[0]); i++) {
			if (t[i].compact && !have(2))
				continue;
			in_user = user;
			fill(area, 0, 1024);
			*(u32 *)(void *)(area + 24) = 0x1f80;
			*(u16 *)(void *)area = 0x37f;
			*(u64 *)(void *)(area + HEADER) = t[i].compact ? 3 : 7;
			*(u64 *)(void *)(area + HEADER + 8) = t[i].compact ? 1ull << 63 | 3 : 0;
			*(u64 *)(void *)(area + t[i].offset) |= t[i].value;
			load_known(0x3f80);
			struct frame f = run(xrstor, area, t[i].mask);
			check_cell(t[i].name, "vector", f.vector, t[i].vector);
			if (t[i].vector == GP) {
				check_cell(t[i].name, "RIP", at(&f, xrstor), 1);
				check_state(t[i].name, 0, 0x3f80);
			}
		}
	in_user = false;
	section("XCR0");
	load_known(0x3f80);
	__asm__ volatile("xsetbv" : : "a"(3), "d"(0), "c"(0));
	u32 r[4];
	cpuid(0xd, 0, r);
	check_cell("XCR0 = 3", "size by CPUID", r[1], 576);
	struct frame f = run(xgetbv, NULL, 0);
	check_cell("XCR0 = 3", "XGETBV", f.rdx << 32 | f.rax, 3);
	fill(area, 0x55, 1024);
	fill(area + HEADER, 0, 64);
	f = run(xsave, area, 7);
	check_cell("XCR0 = 3", "XSTATE_BV", word(area, HEADER), 3);
	check_cell("XCR0 = 3", "YMM3", word(area, YMMH + 48), 0x5555555555555555);
	*(u64 *)(void *)(area + HEADER) = 7;
	f = run(xrstor, area, 7);
	check_cell("XCR0 = 3", "XRSTOR with AVX", f.vector, GP);
	f = run(vzeroupper, NULL, 0);
	check_cell("XCR0 = 3", "VZEROUPPER", at(&f, vzeroupper) << 8 | f.vector, 1 << 8 | UD);
	__asm__ volatile("xsetbv" : : "a"(7), "d"(0), "c"(0));
	check_state("XCR0 = 3 and back", 0, 0x3f80);
	cpuid(0xd, 0, r);
	check_cell("XCR0 = 7", "size by CPUID", r[1], 832);
	section("CR0.TS");
	bool no_ts = skipping("user mode: CR0.TS", "user-ts");
	static const u8 *const code[] = { xsave, xsavec, xsaveopt, xrstor, fxsave, fxrstor, vzeroupper };
	u64 cr0 = read_cr0();
	for (unsigned i = 0; i < sizeof(code) / sizeof(code[0]); i++) {
		if ((i == 1 && !have(2)) || (i == 2 && !have(1)))
			continue;
		for (unsigned user = 0; user < 2; user++) {
			in_user = user;
			if (user && no_ts)
				continue;
			write_cr0(cr0 | 8);
			f = run(code[i], area, 7);
			write_cr0(cr0);
			check_cell("TS", "vector", f.vector, NM);
			check_cell("TS", "RIP", at(&f, code[i]), 1);
		}
	}
	in_user = false;
	write_cr0(cr0 | 8);
	f = run(xgetbv, NULL, 0);
	write_cr0(cr0);
	check_cell("TS", "XGETBV", f.rdx << 32 | f.rax, 7);
}

/* --- exceptions one by one --- */

SNIPPET(s_mul, "movss (%rdi), %xmm0\n mulss 4(%rdi), %xmm0\n movd %xmm0, %eax\n ud2");
SNIPPET(s_div, "movss (%rdi), %xmm0\n divss 4(%rdi), %xmm0\n movd %xmm0, %eax\n ud2");
SNIPPET(v_mul, "vmovss (%rdi), %xmm0\n vmulss 4(%rdi), %xmm0, %xmm0\n vmovd %xmm0, %eax\n ud2");
SNIPPET(v_div, "vmovss (%rdi), %xmm0\n vdivss 4(%rdi), %xmm0, %xmm0\n vmovd %xmm0, %eax\n ud2");
SNIPPET(x_mul, "fninit\n fldcw 8(%rdi)\n flds (%rdi)\n fmuls 4(%rdi)\n fstps 12(%rdi)\n fnstsw %ax\n fwait\n ud2");
SNIPPET(x_div, "fninit\n fldcw 8(%rdi)\n flds (%rdi)\n fdivs 4(%rdi)\n fstps 12(%rdi)\n fnstsw %ax\n fwait\n ud2");

static void exceptions(void)
{
	section("floating-point exceptions one by one");
	/* flags: IE 1, DE 2, ZE 4, OE 8, UE 16, PE 32 */
	static const struct {
		const char *name;
		bool div;
		u32 a, b;
		u8 raised, first; /* all when masked; those of the unmasked one */
		u32 result;
	} t[] = {
		{ "invalid", true, 0, 0, 1, 1, 0xffc00000 }, { "denormal", false, 1, 0x4b000000, 2, 2, 0x00800000 }, { "zero divide", true, 0x3f800000, 0, 4, 4, 0x7f800000 },
		{ "overflow", false, 0x7f000000, 0x7f000000, 0x28, 8, 0x7f800000 }, { "underflow", false, 0x00800001, 0x3f000000, 0x30, 16, 0x00400000 },
		{ "precision", true, 0x3f800000, 0x40400000, 0x20, 32, 0x3eaaaaab }, { "signalling NaN", false, 0x7f800001, 0x3f800000, 1, 1, 0x7fc00001 },
		{ "nothing", false, 0x40000000, 0x40400000, 0, 0, 0x40c00000 },
	};
	u32 *d = (u32 *)DATA;
	for (unsigned user = 0; user < 2; user++)
		for (unsigned i = 0; i < sizeof(t) / sizeof(t[0]); i++)
			for (unsigned kind = 0; kind < 3; kind++)
				for (unsigned open = 0; open < 2; open++) {
					const u8 *code[] = { t[i].div ? s_div : s_mul, t[i].div ? v_div : v_mul, t[i].div ? x_div : x_mul };
					in_user = user;
					d[0] = t[i].a, d[1] = t[i].b, d[3] = 0;
					u32 masked = 0x3f & ~(open ? t[i].first : 0u);
					d[2] = 0x340 | masked;
					__asm__ volatile("fnclex");
					set_mxcsr(masked << 7);
					struct frame f = run(code[kind], d, 0);
					u32 mxcsr = get_mxcsr();
					set_mxcsr(0x1f80);
					__asm__ volatile("fnclex\n fninit");
					bool trap = open && t[i].first;
					if (kind == 2 && t[i].first == 16 && !open)
						continue; /* double extended range: the store alone underflows, as SSE */
					check_cell(t[i].name, kind == 2 ? "x87 vector" : kind ? "AVX vector" : "SSE vector", f.vector, trap ? kind == 2 ? MF : XM : UD);
					if (kind == 2)
						continue;
					u32 raised = trap ? t[i].first | (t[i].raised & (t[i].first == 8 || t[i].first == 16 ? 0x20u : 0)) : t[i].raised;
					/* with an exception to be taken PE may or may not be set with OE and UE: not looked at */
					u32 loose = trap ? 0x20 : 0;
					check_cell(t[i].name, "flags", (mxcsr & 0x3f) | loose, raised | loose);
					if (!trap)
						check_cell(t[i].name, "result", (u32)f.rax, t[i].result);
				}
	in_user = false;
	section("DAZ, FTZ");
	d[0] = 1, d[1] = 0x4b000000;
	set_mxcsr(0x1f80 | 1 << 6);
	struct frame f = run(s_mul, d, 0);
	check_cell("DAZ", "result", (u32)f.rax, 0);
	check_cell("DAZ", "flags", get_mxcsr() & 0x3f, 0);
	d[0] = 0x00800001, d[1] = 0x3f000000;
	set_mxcsr(0x1f80 | 1 << 15);
	f = run(s_mul, d, 0);
	check_cell("FTZ", "result", (u32)f.rax, 0);
	check_cell("FTZ", "flags", get_mxcsr() & 0x3f, 0x30);
	set_mxcsr(0x1f80);
}

void guest_main(void)
{
	if (!CPU_HAS(1, 0, 2, 28)) {
		print("no AVX here\n");
		return;
	}
	map_user_alias();
	u8 *page = page_alloc(1);
	map(DATA, page, P | W | U);
	area = (u8 *)DATA + 1024;
	second = (u8 *)DATA + 2048;
	masks();
	initial();
	refused();
	exceptions();
}
