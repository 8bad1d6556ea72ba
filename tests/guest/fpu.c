/* The x87, SSE and AVX state: kept over interrupts and between contexts, saved and restored in every form, and its exceptions. */
#include "guest.h"

const char guest_name[] = "fpu";

#define USER_CODE VA(0x100)
#define USER_STACK VA(0x181)
#define DATA VA(0x190)

extern const u8 first_snippet[], last_snippet[];
__asm__(".pushsection .snippets, \"ax\"\n first_snippet:\n .popsection");
#define LOAD(n) " vmovdqu " #n "*32(%rdi), %ymm" #n "\n"
#define STORE(n) " vmovdqu %ymm" #n ", " #n "*32(%rsi)\n"
#define ALL(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15)
#define LOAD87(n) " fldl 520+" #n "*8(%rdi)\n"
SNIPPET(load_all, ALL(LOAD) "fninit\n" LOAD87(0) LOAD87(1) LOAD87(2) LOAD87(3) LOAD87(4) LOAD87(5) LOAD87(6) LOAD87(7) " ldmxcsr (%rdx)\n fldcw 4(%rdx)\n ud2");
SNIPPET(store_all, ALL(STORE) "stmxcsr 512(%rsi)\n fnstcw 516(%rsi)\n fnstsw 518(%rsi)\n fstpl 520(%rsi)\n fstpl 528(%rsi)\n fstpl 536(%rsi)\n fstpl 544(%rsi)\n"
			  "fstpl 552(%rsi)\n fstpl 560(%rsi)\n fstpl 568(%rsi)\n fstpl 576(%rsi)\n ud2");
SNIPPET(do_fxsave, "fxsave64 (%rdi)\n ud2");
SNIPPET(do_fxrstor, "fxrstor64 (%rdi)\n ud2");
SNIPPET(do_xsave, "xsave64 (%rdi)\n ud2");
SNIPPET(do_xsave32, "xsave (%rdi)\n ud2");
SNIPPET(do_xsavec, "xsavec64 (%rdi)\n ud2");
SNIPPET(do_xsaveopt, "xsaveopt64 (%rdi)\n ud2");
SNIPPET(do_xrstor, "xrstor64 (%rdi)\n ud2");
SNIPPET(do_fnsave, "fnsave (%rdi)\n ud2");
SNIPPET(do_frstor, "frstor (%rdi)\n ud2");
SNIPPET(x87_div0, "fld1\n fldz\n .globl x87_div0_at\n x87_div0_at: fdivrp %st, %st(1)\n nop\n .globl x87_div0_next\n x87_div0_next: fwait\n ud2");
SNIPPET(x87_div0_ns, "fld1\n fldz\n fdivrp %st, %st(1)\n fnstsw %ax\n fnclex\n fwait\n ud2");
SNIPPET(sse_div0, "xorps %xmm1, %xmm1\n .globl sse_div0_at\n sse_div0_at: divps %xmm1, %xmm0\n ud2");
SNIPPET(sse_div0_mem, "add $1, %rax\n .globl sse_div0_mem_at\n sse_div0_mem_at: divps (%rdi), %xmm0\n ud2");
SNIPPET(avx_div0, "vxorps %xmm1, %xmm1, %xmm1\n .globl avx_div0_at\n avx_div0_at: vdivps %ymm1, %ymm0, %ymm0\n ud2");
SNIPPET(sse_inexact, "cvtsd2si %xmm0, %rax\n stmxcsr -8(%rsp)\n mov -8(%rsp), %ecx\n ud2");
SNIPPET(ldmxcsr_bad, "ldmxcsr (%rdi)\n ud2");
SNIPPET(use_x87, "fld1\n ud2");
SNIPPET(use_mmx, "pxor %mm0, %mm0\n ud2");
SNIPPET(use_sse, "addps %xmm0, %xmm0\n ud2");
SNIPPET(use_avx, "vaddps %ymm0, %ymm0, %ymm0\n ud2");
SNIPPET(use_wait, "fwait\n ud2");
SNIPPET(use_fxsave, "fxsave (%rdi)\n ud2");
SNIPPET(use_xsave, "xsave (%rdi)\n ud2");
SNIPPET(use_ldmxcsr, "ldmxcsr (%rdi)\n ud2");
SNIPPET(use_movnti, "movnti %eax, (%rdi)\n lfence\n ud2");
SNIPPET(use_prefetch, "prefetcht0 (%rdi)\n sfence\n ud2");
SNIPPET(use_bmi, "andn %eax, %ecx, %edx\n rorx $3, %rax, %rdx\n ud2");
SNIPPET(use_emms, "emms\n ud2");
/* CR0.TS set by a callee, then the FPU used in the same function and in loops: rdi is the function. */
SNIPPET(set_ts, "mov %cr0, %rax\n or $8, %rax\n mov %rax, %cr0\n ret");
SNIPPET(clear_ts, "clts\n ret");
SNIPPET(ts_then_use, "addps %xmm0, %xmm0\n call *%rdi\n .globl ts_then_use_at\n ts_then_use_at: addps %xmm1, %xmm1\n ud2");
SNIPPET(ts_then_call, "call ts_fn\n call *%rdi\n call ts_fn\n ud2\n ts_fn: addps %xmm0, %xmm0\n ret");
SNIPPET(ts_then_ind, "lea ts_fn(%rip), %rbx\n call *%rbx\n call *%rdi\n call *%rbx\n ud2");
extern const u8 ts_fn[];
SNIPPET(vzero, "vzeroupper\n ud2");
SNIPPET(movsd_upper, "movsd (%rdi), %xmm3\n movaps %xmm5, %xmm4\n vmovaps %xmm7, %xmm6\n ud2");
SNIPPET(sum, "1: addpd %xmm1, %xmm0\n vaddpd %ymm2, %ymm3, %ymm3\n fadd %st(1), %st\n paddd %xmm5, %xmm4\n dec %rcx\n jnz 1b\n ud2");
__asm__(".pushsection .snippets, \"ax\"\n .globl ts_fn\n last_snippet:\n .popsection");
extern const u8 x87_div0_at[], x87_div0_next[], sse_div0_at[], sse_div0_mem_at[], avx_div0_at[], ts_then_use_at[];

static u64 user_of(const u8 *code)
{
	return USER_CODE + (u64)(code - first_snippet);
}

static struct frame frame(const u8 *code, bool user)
{
	return user ? user_frame(user_of(code), USER_STACK - 64) : kernel_frame(code);
}

struct context {
	u64 ymm[16][4];
	u32 mxcsr;
	u16 cw, sw;
	u64 st[8]; /* doubles, in the order of FLD */
} __attribute__((aligned(64)));

static struct context *data; /* user-accessible: [0..7] */
static u8 (*area)[1024];
static u32 (*control)[2];

/* Contents k, without floating point code. */
static void make(struct context *c, unsigned k)
{
	for (unsigned i = 0; i < 16; i++)
		for (unsigned j = 0; j < 4; j++) /* doubles in [1, 2) */
			c->ymm[i][j] = 0x3ff0000000000000 | ((u64)(i + 1) * (j + 3) * (k + 1) * 0x9e3779b97f4a7c15 >> 12);
	for (unsigned i = 0; i < 8; i++)
		c->st[i] = 0x4000000000000000 | (u64)(i + 1) * (k + 1) * 0x123456789abc;
	c->mxcsr = k & 1 ? 0x1f80 : 0x7fa0;
	c->cw = k & 2 ? 0x37f : 0x27f;
}

static bool loaded = true; /* load() is called a number of times that depends on time: it counts no checks */

static void load(const struct context *c, unsigned k, bool user)
{
	struct frame f = frame(load_all, user);
	control[k][0] = c->mxcsr;
	control[k][1] = c->cw;
	f.rdi = (u64)c, f.rdx = (u64)control[k];
	exec(&f);
	loaded &= f.vector == UD;
}

static bool holds(const struct context *c, bool user)
{
	struct context *got = &data[7];
	struct frame f = frame(store_all, user);
	f.rsi = (u64)got;
	exec(&f);
	bool ok = f.vector == UD && equal(got->ymm, c->ymm, sizeof(c->ymm)) && got->mxcsr == c->mxcsr && got->cw == c->cw;
	for (unsigned i = 0; i < 8; i++)
		ok &= got->st[i] == c->st[7 - i];
	return ok;
}

static void do_on(const u8 *code, void *p, bool user, u32 rfbm)
{
	struct frame f = frame(code, user);
	f.rdi = (u64)p;
	f.rax = rfbm;
	exec(&f);
	CHECK_EQ(f.vector, UD);
	CHECK_EQ(f.rip, (user ? user_of(code) : (u64)code) + (f.rip & 15));
}

static void saving(void)
{
	section("save and restore");
	static const struct {
		const u8 *save, *restore;
		bool avx, x87_all;
	} forms[] = {
		{ do_xsave, do_xrstor, true, true }, { do_xsavec, do_xrstor, true, true }, { do_xsaveopt, do_xrstor, true, true },
		{ do_fxsave, do_fxrstor, false, true },
	};
	for (unsigned user = 0; user < 2; user++)
		for (unsigned k = 0; k < 4; k++) {
			if (forms[k].save == do_xsavec && !CPU_HAS(0xd, 1, 0, 1))
				continue;
			/* several contexts take turns, in areas that lie across pages too */
			for (unsigned i = 0; i < 3; i++) {
				fill(area[2 * i], 0, 1024);
				load(&data[i], i, user);
				do_on(forms[k].save, area[2 * i] + 512 * (i & 1), user, 7);
				CHECK(holds(&data[i], user));
			}
			for (unsigned round = 0; round < 9; round++) {
				unsigned i = round * 5 % 3;
				do_on(forms[k].restore, area[2 * i] + 512 * (i & 1), user, 7);
				if (!forms[k].avx) { /* the upper halves are not its business: those of the last loaded */
					struct context c = data[i];
					do_on(do_xsave, area[7], user, 7);
					for (unsigned r = 0; r < 16; r++)
						copy(&c.ymm[r][2], area[7] + 576 + 16 * r, 16);
					CHECK(holds(&c, user));
				} else {
					CHECK(holds(&data[i], user));
				}
				do_on(forms[k].restore, area[2 * i] + 512 * (i & 1), user, 7);
				do_on(forms[k].save, area[2 * i] + 512 * (i & 1), user, 7);
			}
		}
	section("parts of the state");
	for (unsigned i = 0; i < 3; i++) {
		load(&data[0], 0, false);
		fill(area[0], 0, 1024);
		do_on(do_xsave, area[0], false, 7);
		CHECK_EQ(*(u64 *)(void *)(area[0] + 512), 7);
		CHECK_EQ(*(u64 *)(void *)(area[0] + 520), 0);
		load(&data[1], 1, false);
		/* only SSE comes back */
		do_on(do_xrstor, area[0], false, 2);
		struct context c = data[1];
		for (unsigned r = 0; r < 16; r++)
			copy(c.ymm[r], data[0].ymm[r], 16);
		c.mxcsr = data[0].mxcsr;
		do_on(do_xsave, area[2], false, 7);
		for (unsigned r = 0; r < 8; r++) /* x87: still those of 1 */
			CHECK(equal(area[2] + 32 + 16 * r, area[2] + 32 + 16 * r, 10));
		CHECK(holds(&c, false));
		/* initial state where the header says so */
		load(&data[1], 1, false);
		*(u64 *)(void *)(area[0] + 512) = 1;
		do_on(do_xrstor, area[0], false, 7);
		c = data[0];
		fill(c.ymm, 0, sizeof(c.ymm));
		CHECK(holds(&c, false));
		/* XSAVE with fewer bits leaves the rest of the area and of the header */
		fill(area[4], 0x55, 1024);
		fill(area[4] + 512, 0, 64);
		*(u64 *)(void *)(area[4] + 512) = 4;
		load(&data[2], 2, false);
		do_on(do_xsave, area[4], false, 2);
		CHECK_EQ(*(u64 *)(void *)(area[4] + 512), 6);
		CHECK_EQ(area[4][0], 0x55);
		CHECK_EQ(area[4][576], 0x55);
		CHECK(equal(area[4] + 160, data[2].ymm[0], 16));
		CHECK(equal(area[4] + 160 + 15 * 16, data[2].ymm[15], 16));
	}
	/* compacted format */
	if (CPU_HAS(0xd, 1, 0, 1)) {
		load(&data[1], 1, false);
		fill(area[0], 0, 1024);
		do_on(do_xsavec, area[0], false, 7);
		CHECK_EQ(*(u64 *)(void *)(area[0] + 520), 1ull << 63 | 7);
		do_on(do_xsavec, area[2], false, 6);
		CHECK_EQ(*(u64 *)(void *)(area[2] + 520), 1ull << 63 | 6);
		CHECK(equal(area[2] + 576, (u8 *)data[1].ymm[0] + 16, 16));
	}
	section("areas that will not do");
	struct frame f = kernel_frame(do_xsave);
	f.rdi = (u64)area[0] + 32, f.rax = 7;
	exec(&f);
	CHECK_EQ(f.vector, GP);
	if (!skipping("FXSAVE to where it is not aligned", "fxsave-any")) {
		f = kernel_frame(do_fxsave);
		f.rdi = (u64)area[0] + 8;
		exec(&f);
		CHECK_EQ(f.vector, GP);
	}
	static const struct {
		unsigned at;
		u64 value;
	} bad[] = { { 24, 0xffff0000 }, { 512, 8 }, { 512, 1ull << 62 }, { 520, 1 }, { 520, 1ull << 63 | 8 }, { 528, 1 } };
	for (unsigned i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		load(&data[0], 0, false);
		fill(area[0], 0, 1024);
		do_on(do_xsave, area[0], false, 7);
		*(u64 *)(void *)(area[0] + bad[i].at) |= bad[i].value;
		load(&data[1], 1, false);
		f = kernel_frame(do_xrstor);
		f.rdi = (u64)area[0], f.rax = 7;
		exec(&f);
		CHECK_EQ(f.vector | i << 8, GP | i << 8);
		CHECK_EQ(f.rip, (u64)do_xrstor);
		CHECK(holds(&data[1], false));
	}
	/* a page that is missing: nothing loaded, nothing lost */
	for (unsigned i = 0; i < 2; i++) {
		u64 edge = DATA + 4 * 4096;
		load(&data[0], 0, false);
		*(u64 *)(edge - 64) = 7;
		f = kernel_frame(i ? do_xrstor : do_xsave);
		f.rdi = edge - 512 - 64 * i, f.rax = 7;
		exec(&f);
		CHECK_EQ(f.vector, PF);
		CHECK_EQ(f.error, i ? 0 : PF_W);
		CHECK(f.cr2 >= edge && f.cr2 < edge + 832);
		CHECK(holds(&data[0], false));
	}
	fill(area[0], 0, 1024);
	load(&data[1], 1, false);
	do_on(do_fnsave, area[0], false, 0);
	load(&data[2], 2, false);
	do_on(do_frstor, area[0], false, 0);
	struct context c = data[2];
	c.cw = data[1].cw;
	struct context *got = &data[7];
	f = kernel_frame(store_all);
	f.rsi = (u64)got;
	exec(&f);
	CHECK_EQ(got->st[0], data[1].st[7]);
	CHECK(equal(got->ymm, c.ymm, sizeof(c.ymm)));
}

/* --- over interrupts and exceptions --- */

static volatile unsigned ticks;
static u8 timer_area[1024] __attribute__((aligned(64)));

static void on_timer(struct frame *f)
{
	(void)f;
	ticks++;
	__asm__ volatile("xsave64 (%0)\n fninit\n vpcmpeqb %%ymm0, %%ymm0, %%ymm0\n vmovaps %%ymm0, %%ymm3\n vzeroall\n xrstor64 (%0)"
			 : : "r"(timer_area), "a"(7), "d"(0) : "memory");
	wrmsr(0x80b, 0);
}

static void interrupted(void)
{
	section("over interrupts");
	handlers[0x51] = on_timer;
	for (unsigned user = 0; user < 2; user++) {
		load(&data[1], 1, user);
		struct frame f = frame(sum, user);
		f.rcx = 3000 / (guest_slow * guest_slow);
		exec(&f);
		do_on(do_xsave, area[0], user, 7);
		wrmsr(0x83e, 0xb);
		wrmsr(0x832, 0x51 | 1 << 17);
		wrmsr(0x838, 15000 * guest_slow);
		unsigned before = ticks;
		bool ok = true;
		u64 end = rdtsc() + 10000000000; /* some seconds, for loaded hosts */
		while (rdtsc() < end && ticks - before < 5) {
			load(&data[1], 1, user);
			f = frame(sum, user);
			f.rcx = 3000 / (guest_slow * guest_slow);
			f.rflags |= F_IF;
			exec(&f);
			cli();
			fill(area[2], 0, 1024);
			struct frame g = frame(do_xsave, user);
			g.rdi = (u64)area[2], g.rax = 7;
			exec(&g);
			ok &= equal(area[0] + 24, area[2] + 24, 4) && equal(area[0] + 32, area[2] + 32, 384) && equal(area[0] + 576, area[2] + 576, 256);
		}
		wrmsr(0x838, 0);
		sti();
		__asm__ volatile("nop; nop");
		cli();
		CHECK(ok);
		CHECK(ticks != before);
	}
	CHECK(loaded);
}

static void exceptions(void)
{
	section("x87 exceptions");
	for (unsigned user = 0; user < 2; user++)
		for (unsigned i = 0; i < 2; i++) {
			__asm__ volatile("fninit");
			struct frame f = frame(x87_div0, user);
			exec(&f);
			CHECK_EQ(f.vector, UD); /* masked */
			__asm__ volatile("fninit");
			static u16 cw = 0x37b; /* divide by zero not masked */
			__asm__ volatile("fldcw %0" : : "m"(cw));
			f = frame(x87_div0, user);
			exec(&f);
			CHECK_EQ(f.vector, MF);
			CHECK_EQ(f.error, 0);
			CHECK_EQ(f.rip, user ? user_of(x87_div0_next) : (u64)x87_div0_next);
			__asm__ volatile("fnclex\n fninit\n fldcw %0" : : "m"(cw));
			f = frame(x87_div0_ns, user);
			exec(&f);
			CHECK_EQ(f.vector, UD);
			CHECK_EQ(f.rax & 0x8084, 0x8084);
			__asm__ volatile("fninit");
		}
	section("SSE and AVX exceptions");
	bool no_xm_user = !skipping("CR4.OSXMMEXCPT in ring 3", "user-xm");
	static u32 open = 0x1f80 & ~(1u << 9), normal = 0x1f80;
	for (unsigned user = 0; user < 2; user++)
		for (unsigned i = 0; i < 3; i++) {
			static const struct {
				const u8 *code, *at;
			} t[] = { { sse_div0, sse_div0_at }, { sse_div0_mem, sse_div0_mem_at }, { avx_div0, avx_div0_at } };
			load(&data[0], 0, user);
			__asm__ volatile("ldmxcsr %0" : : "m"(open));
			struct frame f = frame(t[i].code, user);
			fill((void *)(DATA + 64 * 100), 0, 16);
			f.rdi = DATA + 64 * 100;
			exec(&f);
			CHECK_EQ(f.vector, XM);
			CHECK_EQ(f.rip, user ? user_of(t[i].at) : (u64)t[i].at);
			u32 mxcsr;
			__asm__ volatile("stmxcsr %0\n ldmxcsr %1" : "=m"(mxcsr) : "m"(normal));
			CHECK_EQ(mxcsr & 0x3f & 4, 4);
			/* without OSXMMEXCPT it is #UD */
			if (user && !no_xm_user)
				continue;
			write_cr4(read_cr4() & ~(1ull << 10));
			__asm__ volatile("ldmxcsr %0" : : "m"(open));
			f = frame(t[i].code, user);
			f.rdi = DATA + 64 * 100;
			exec(&f);
			CHECK_EQ(f.vector, UD);
			CHECK_EQ(f.rip, user ? user_of(t[i].at) : (u64)t[i].at);
			write_cr4(read_cr4() | 1 << 10);
			__asm__ volatile("ldmxcsr %0" : : "m"(normal));
		}
	struct frame f = frame(ldmxcsr_bad, false);
	static u32 bad = 0x10000;
	f.rdi = (u64)&bad;
	exec(&f);
	CHECK_EQ(f.vector, GP);
	/* flags and rounding stay with the context */
	static u32 down = 0x3f80, up = 0x5f80;
	static const double three_halves = 1.5;
	for (unsigned i = 0; i < 4; i++) {
		__asm__ volatile("ldmxcsr %0\n movsd %1, %%xmm0" : : "m"(*(i & 1 ? &down : &up)), "m"(three_halves));
		f = frame(sse_inexact, i & 2);
		exec(&f);
		CHECK_EQ(f.rax, i & 1 ? 1 : 2);
		CHECK_EQ(f.rcx, (i & 1 ? down : up) | 0x20);
	}
	__asm__ volatile("ldmxcsr %0" : : "m"(normal));
}

/* --- who may use it --- */

static void availability(void)
{
	section("CR0.TS, CR0.EM, CR4, XCR0");
	unsigned rings = skipping("TS, EM and CR4 in ring 3", "user-ts") ? 1 : 2;
	u64 cr0 = read_cr0(), cr4 = read_cr4();
	static const struct {
		const u8 *code;
		/* vectors: with TS, with EM, without OSFXSR, without OSXSAVE, with XCR0 = 1 */
		u8 ts, em, fxsr, xsave, xcr0;
	} t[] = {
		{ use_x87, NM, NM, UD, UD, UD }, { use_mmx, NM, UD, UD, UD, UD }, { use_sse, NM, UD, UD, UD, UD }, { use_avx, NM, UD, UD, UD, UD },
		{ use_wait, NM, UD, UD, UD, UD }, { use_fxsave, NM, NM, UD, UD, UD }, { use_xsave, NM, UD, UD, UD, UD }, { use_ldmxcsr, NM, UD, UD, UD, UD },
		{ use_movnti, UD, UD, UD, UD, UD }, { use_prefetch, UD, UD, UD, UD, UD }, { use_bmi, UD, UD, UD, UD, UD }, { use_emms, NM, UD, UD, UD, UD },
	};
	static u32 normal[256] __attribute__((aligned(64)));
	for (unsigned i = 0; i < sizeof(t) / sizeof(t[0]); i++)
		for (unsigned user = 0; user < rings; user++) {
			u64 at = user ? user_of(t[i].code) : (u64)t[i].code;
			u8 *mem = user ? (u8 *)(DATA + 64 * 120) : (u8 *)normal;
			for (unsigned k = 0; k < 6; k++) {
				__asm__ volatile("fninit");
				fill(mem, 0, 832);
				*(u32 *)(void *)mem = 0x1f80;
				if (k == 1)
					write_cr0(cr0 | 8);
				if (k == 2)
					write_cr0(cr0 | 4);
				if (k == 3)
					write_cr4(cr4 & ~(1ull << 9));
				if (k == 4)
					write_cr4(cr4 & ~(1ull << 18));
				if (k == 5)
					__asm__ volatile("xsetbv" : : "a"(1), "d"(0), "c"(0));
				struct frame f = frame(t[i].code, user);
				f.rdi = (u64)mem, f.rax = 1;
				exec(&f);
				write_cr0(cr0);
				write_cr4(cr4);
				if (k == 5)
					__asm__ volatile("xsetbv" : : "a"(7), "d"(0), "c"(0));
				unsigned want = (u8[]){ UD, t[i].ts, t[i].em, t[i].fxsr, t[i].xsave, t[i].xcr0 }[k];
				CHECK_EQ(f.vector, want);
				/* UD: at the instruction itself, or at the UD2 behind */
				bool first = f.rip == at;
				bool refused = want == NM || (k == 2 && (t[i].code == use_mmx || t[i].code == use_sse || t[i].code == use_avx ||
									   t[i].code == use_ldmxcsr || t[i].code == use_emms)) ||
					       (k == 3 && (t[i].code == use_sse || t[i].code == use_ldmxcsr)) ||
					       (k == 4 && (t[i].code == use_avx || t[i].code == use_xsave)) || (k == 5 && t[i].code == use_avx);
				/* EM and AVX, EM and XSAVE: manuals differ */
				if (k == 2 && (t[i].code == use_avx || t[i].code == use_xsave))
					continue;
				check_at(__FILE__, __LINE__, "refused at the right place", first == refused);
				if (first != refused)
					print("  insn %u user %u case %u vector %lu rip 0x%lx\n", i, user, k, f.vector, f.rip);
			}
		}
	section("TS set on the way");
	for (unsigned i = 0; i < 4; i++) {
		static const u8 *code[] = { ts_then_use, ts_then_call, ts_then_ind };
		for (unsigned k = 0; k < 3; k++) {
			struct frame f = kernel_frame(code[k]);
			f.rdi = (u64)clear_ts;
			exec(&f);
			CHECK_EQ(f.vector, UD);
			f = kernel_frame(code[k]);
			f.rdi = (u64)set_ts;
			exec(&f);
			write_cr0(cr0);
			CHECK_EQ(f.vector, NM);
			CHECK_EQ(f.rip, k == 0 ? (u64)ts_then_use_at : (u64)ts_fn);
		}
	}
}

static void halves(void)
{
	section("upper halves");
	for (unsigned i = 0; i < 2; i++) {
		load(&data[2], 2, i);
		struct frame f = frame(movsd_upper, i);
		f.rdi = (u64)&data[3];
		exec(&f);
		struct context c = data[2];
		c.ymm[3][0] = data[3].ymm[0][0], c.ymm[3][1] = 0;
		c.ymm[4][0] = c.ymm[5][0], c.ymm[4][1] = c.ymm[5][1];
		c.ymm[6][0] = c.ymm[7][0], c.ymm[6][1] = c.ymm[7][1], c.ymm[6][2] = c.ymm[6][3] = 0;
		CHECK(holds(&c, i));
		load(&data[2], 2, i);
		f = frame(vzero, i);
		exec(&f);
		c = data[2];
		for (unsigned r = 0; r < 16; r++)
			c.ymm[r][2] = c.ymm[r][3] = 0;
		CHECK(holds(&c, i));
	}
}

void guest_main(void)
{
	for (u64 p = (u64)first_snippet; p < (u64)last_snippet; p += 4096)
		map(USER_CODE + (p - (u64)first_snippet), (void *)p, P | W | U);
	map(USER_STACK - 4096, page_alloc(1), P | W | U);
	/* four pages, the middle two not in order */
	u8 *pool = page_alloc(4);
	map(DATA, pool, P | W | U);
	map(DATA + 4096, pool + 8192, P | W | U);
	map(DATA + 8192, pool + 4096, P | W | U);
	map(DATA + 12288, pool + 12288, P | W | U);
	data = (void *)DATA;
	area = (void *)(DATA + 8192 - 2048); /* area[1] .. across pages */
	area = (void *)(DATA + 8192);
	control = (void *)(DATA + 8192 - 512);
	for (unsigned k = 0; k < 6; k++)
		make(&data[k], k);
	if (!CPU_HAS(1, 0, 2, 28)) {
		print("no AVX here\n");
		return;
	}
	saving();
	halves();
	exceptions();
	availability();
	interrupted();
}
