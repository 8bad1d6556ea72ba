/* Interrupts: where exactly they are taken, what holds them back, and that code in between does not notice. */
#include "guest.h"

const char guest_name[] = "irq";

#define USER_CODE VA(0x100)
#define USER_STACK VA(0x181)
#define PATIENCE 10000000000 /* TSC ticks, some seconds: how long an interrupt may take to strike on a loaded host */
enum { VEC = 0x41, VEC_LOW = 0x31, VEC_TIMER = 0x51 };
enum { MSR_TPR = 0x808, MSR_ICR = 0x830, MSR_LVT_TIMER = 0x832, MSR_TIMER_COUNT = 0x838, MSR_TIMER_DIV = 0x83e, MSR_SELF = 0x83f };

extern const u8 first_snippet[], last_snippet[];
__asm__(".pushsection .snippets, \"ax\"\n first_snippet:\n .popsection");
/* Each one's label `name_at` is where an interrupt that waits at the start is taken. */
#define TAKEN(name, text) SNIPPET(name, text); extern const u8 name##_at[];
TAKEN(sti_nop, "sti\n inc %eax\n sti_nop_at: inc %ebx\n ud2")
TAKEN(sti_long, "sti\n mov %rax, -8(%rsp)\n sti_long_at: mov -8(%rsp), %rcx\n ud2")
TAKEN(sti_sti, "sti\n sti\n sti_sti_at: inc %eax\n ud2")
TAKEN(sti_hlt, "sti\n hlt\n sti_hlt_at: inc %eax\n ud2")
TAKEN(sti_ret, "lea 1f(%rip), %rcx\n push %rcx\n sti\n ret\n nop\n 1: sti_ret_at: inc %eax\n ud2")
TAKEN(sti_jmp, "sti\n jmp sti_jmp_at\n inc %ebx\n sti_jmp_at: inc %eax\n ud2")
TAKEN(sti_call, "sti\n call sti_call_at\n sti_call_at: inc %eax\n ud2")
TAKEN(sti_ss, "mov %ss, %ecx\n sti\n mov %ecx, %ss\n inc %eax\n sti_ss_at: inc %ebx\n ud2")
TAKEN(sti_ss_ss, "mov %ss, %ecx\n sti\n mov %ecx, %ss\n mov %ecx, %ss\n inc %eax\n sti_ss_ss_at: inc %ebx\n ud2")
TAKEN(popf_if, "pushf\n orq $0x200, (%rsp)\n popf\n popf_if_at: inc %eax\n ud2")
TAKEN(sti_rep, "mov $0, %ecx\n sti\n rep stosb\n sti_rep_at: inc %eax\n ud2")
TAKEN(sti_cpuid, "sti\n cpuid\n sti_cpuid_at: inc %eax\n ud2")
TAKEN(sti_wait, "sti\n nop\n sti_wait_at: 1: pause\n jmp 1b")
TAKEN(cr8_low, "mov $3, %eax\n mov %rax, %cr8\n sti\n nop\n nop\n mov $2, %eax\n mov %rax, %cr8\n cr8_low_at: inc %ebx\n ud2")
SNIPPET(sti_cli, "sti\n cli\n nop\n nop\n ud2");
SNIPPET(sti_cli_loop, "mov $100, %ecx\n 1: sti\n cli\n dec %ecx\n jnz 1b\n ud2");
SNIPPET(no_if, "mov $1000, %ecx\n 1: dec %ecx\n jnz 1b\n ud2");
SNIPPET(pop_ss, ".byte 0x17\n ud2");
SNIPPET(to_user, "iretq");
SNIPPET(to_user_sys, "sysretq");
TAKEN(user_code, "user_code_at: inc %eax\n ud2")
SNIPPET(self_ipi, "mov $0x83f, %ecx\n mov $0x41, %eax\n xor %edx, %edx\n wrmsr\n nop\n nop\n nop\n nop\n ud2");
/* rbx times: everything that flags and registers can carry, into rax */
SNIPPET(mixer, "1: add %rcx, %rax\n adc %rdx, %r8\n rcl $1, %r9\n sbb %rdi, %r10\n cmp %rax, %r8\n setc %r11b\n adc $0, %r12\n mov %r12, -16(%rsp)\n"
	       "xor -16(%rsp), %r13\n push %r13\n pop %r14\n rcr $3, %r14\n adc %r14, %rax\n movq %rax, %xmm3\n paddq %xmm3, %xmm4\n movq %xmm4, %rsi\n"
	       "lea 7(%rsi,%rax), %rax\n dec %rbx\n jnz 1b\n ud2");
SNIPPET(caller, "1: call 2f\n add %rcx, %rax\n dec %rbx\n jnz 1b\n ud2\n 2: push %rbp\n mov %rsp, %rbp\n mov %rax, %rcx\n rol $5, %rcx\n leave\n ret");
SNIPPET(copier, "rep movsb\n ud2");
SNIPPET(filler, "rep stosq\n ud2");
SNIPPET(scanner, "repne scasb\n ud2");
SNIPPET(locker, "1: lock add %rcx, (%rdi)\n xchg %rax, 8(%rdi)\n lock xadd %rdx, 16(%rdi)\n dec %rbx\n jnz 1b\n ud2");
SNIPPET(spin, "1: cmpl $0, (%rdi)\n je 1b\n ud2");
SNIPPET(spin_self, "1: jmp 1b");
SNIPPET(spin_call, "1: call 2f\n jmp 1b\n 2: ret");
SNIPPET(spin_ind, "lea 1f(%rip), %rax\n 1: jmp *%rax");
SNIPPET(spin_loop, "1: mov $100, %ecx\n 2: loop 2b\n jmp 1b");
SNIPPET(spin_ret, "lea 1f(%rip), %rax\n 1: push %rax\n ret");
__asm__(".pushsection .snippets, \"ax\"\n last_snippet:\n .popsection");

static volatile unsigned taken;
static u64 taken_at, taken_cs, taken_flags;

static void on_irq(struct frame *f)
{
	taken++;
	taken_at = f->rip;
	taken_cs = f->cs;
	taken_flags = f->rflags;
	eoi();
}

static void on_irq_break(struct frame *f)
{
	on_irq(f);
	f->rip = (u64)pop_ss; /* out of an endless loop: #UD in kernel and user mode */
	if (f->cs == UCODE)
		f->rip += USER_CODE - (u64)first_snippet;
}

static u64 user_of(const u8 *code)
{
	return USER_CODE + (u64)(code - first_snippet);
}

static void shadows(void)
{
	static const struct {
		const u8 *code, *at;
		u64 rax, rbx;
	} t[] = {
		{ sti_nop, sti_nop_at, 1, 1 }, { sti_long, sti_long_at, 0, 0 }, { sti_sti, sti_sti_at, 1, 0 }, { sti_hlt, sti_hlt_at, 1, 0 },
		{ sti_ret, sti_ret_at, 1, 0 }, { sti_jmp, sti_jmp_at, 1, 0 }, { sti_call, sti_call_at, 1, 0 }, { sti_ss, sti_ss_at, 1, 1 },
		{ popf_if, popf_if_at, 1, 0 }, { sti_rep, sti_rep_at, 1, 0 }, { cr8_low, cr8_low_at, 2, 1 },
	};
	for (unsigned round = 0; round < 3; round++)
		for (unsigned i = 0; i < sizeof(t) / sizeof(t[0]); i++) {
			taken = 0;
			u8 vec = t[i].code == cr8_low ? VEC_LOW : VEC;
			wrmsr(MSR_SELF, vec);
			struct frame f = kernel_frame(t[i].code);
			exec(&f);
			CHECK_EQ(f.vector, UD);
			CHECK_EQ(taken, 1);
			CHECK_EQ(taken_at, (u64)t[i].at);
			CHECK_EQ(taken_flags & F_IF, F_IF);
			CHECK_EQ(f.rax, t[i].rax);
			CHECK_EQ(f.rbx, t[i].rbx);
			/* without one waiting the code is the same */
			if (t[i].code != sti_hlt) {
				taken = 0;
				f = kernel_frame(t[i].code);
				exec(&f);
				CHECK_EQ(taken, 0);
				CHECK_EQ(f.rax, t[i].rax);
			}
			wrmsr(MSR_TPR, 0);
		}
	/* A second MOV SS may or may not hold it back again: not earlier than behind the first one's successor. */
	taken = 0;
	wrmsr(MSR_SELF, VEC);
	struct frame f = kernel_frame(sti_ss_ss);
	exec(&f);
	CHECK_EQ(taken, 1);
	CHECK_EQ(f.rax, 1);
	const u8 *closed[] = { sti_cli, sti_cli_loop, no_if };
	for (unsigned i = 0; i < 3; i++) {
		taken = 0;
		wrmsr(MSR_SELF, VEC);
		f = kernel_frame(closed[i]);
		exec(&f);
		CHECK_EQ(f.vector, UD);
		CHECK_EQ(f.rflags & F_IF, 0);
		CHECK_EQ(taken, 0);
		sti();
		__asm__ volatile("nop");
		cli();
		CHECK_EQ(taken, 1);
	}
	handlers[VEC] = on_irq_break;
	taken = 0;
	wrmsr(MSR_SELF, VEC);
	f = kernel_frame(sti_wait);
	exec(&f);
	CHECK_EQ(taken, 1);
	CHECK_EQ(taken_at, (u64)sti_wait_at);
	handlers[VEC] = on_irq;
}

static void windows(void)
{
	if (section_unless("shadows", "late-window"))
		shadows();
	struct frame f = kernel_frame(pop_ss);
	exec(&f);
	CHECK_EQ(f.vector, UD);
	CHECK_EQ(f.rip, (u64)pop_ss);
	section("into user mode with one waiting");
	for (unsigned i = 0; i < 6; i++) {
		taken = 0;
		wrmsr(MSR_SELF, VEC);
		if (i & 1) {
			f = user_frame(user_of(user_code), USER_STACK); /* exec's IRET */
			f.rflags |= F_IF;
		} else {
			f = kernel_frame(to_user_sys);
			f.rcx = user_of(user_code);
			f.r11 = F_IF | 2;
			f.rsp = USER_STACK;
		}
		f.rax = 0;
		exec(&f);
		CHECK_EQ(f.vector, UD);
		CHECK_EQ(f.cs, UCODE);
		CHECK_EQ(taken, 1);
		CHECK_EQ(taken_at, user_of(user_code_at));
		CHECK_EQ(taken_cs, UCODE);
		CHECK_EQ(f.rax, 1);
	}
	if (!section_unless("to itself with interrupts on", "late-window"))
		return;
	for (unsigned i = 0; i < 10; i++) {
		taken = 0;
		f = kernel_frame(self_ipi);
		f.rflags |= F_IF;
		exec(&f);
		CHECK_EQ(f.vector, UD);
		CHECK_EQ(taken, 1);
		CHECK(taken_at > (u64)self_ipi && taken_at < (u64)self_ipi_end);
	}
}

/* --- priorities --- */

static u8 order[16];
static unsigned orders;

static void on_order(struct frame *f)
{
	if (orders < 16)
		order[orders++] = (u8)f->vector;
	eoi();
}

static void priorities(void)
{
	section("priorities");
	handlers[0x31] = handlers[0x41] = handlers[0x42] = handlers[0x61] = handlers[0xe1] = on_order;
	for (unsigned i = 0; i < 5; i++) {
		orders = 0;
		wrmsr(MSR_SELF, 0x41);
		wrmsr(MSR_SELF, 0xe1);
		wrmsr(MSR_SELF, 0x31);
		wrmsr(MSR_SELF, 0x42);
		wrmsr(MSR_SELF, 0x61);
		wrmsr(MSR_SELF, 0x42); /* once is enough */
		let_in();
		CHECK_EQ(orders, 5);
		static const u8 want[] = { 0xe1, 0x61, 0x42, 0x41, 0x31 };
		CHECK(equal(order, want, 5));
	}
	/* TPR */
	orders = 0;
	__asm__ volatile("mov %0, %%cr8" : : "r"(4ul));
	wrmsr(MSR_SELF, 0x41);
	wrmsr(MSR_SELF, 0x61);
	let_in();
	CHECK_EQ(orders, 1);
	CHECK_EQ(order[0], 0x61);
	CHECK_EQ(rdmsr(MSR_TPR), 0x40);
	wrmsr(MSR_TPR, 0);
	let_in();
	CHECK_EQ(orders, 2);
	handlers[0x31] = handlers[0x41] = on_irq;
}

/* --- NMI --- */

static volatile unsigned nmis, nmi_depth, nmi_deepest;

static void on_nmi(struct frame *f)
{
	(void)f;
	nmis++;
	if (++nmi_depth > nmi_deepest)
		nmi_deepest = nmi_depth;
	if (nmis == 1) {
		wrmsr(MSR_ICR, 0x400); /* to ourselves: waits for our IRET */
		for (volatile int i = 0; i < 100; i++)
			;
	}
	nmi_depth--;
}

static void nmi(void)
{
	section("NMI");
	handlers[NMI] = on_nmi;
	for (unsigned i = 0; i < 3; i++) {
		nmis = nmi_deepest = 0;
		wrmsr(MSR_ICR, 0x400); /* taken with IF clear */
		u64 end = rdtsc() + PATIENCE;
		while (nmis < 2 && rdtsc() < end)
			(void)inb(0x80);
		(void)inb(0x80);
		CHECK_EQ(nmis, 2);
		CHECK_EQ(nmi_deepest, 1);
	}
	handlers[NMI] = NULL;
}

/* --- a timer that strikes anywhere --- */

static volatile unsigned ticks;
static u64 watch_sum, watch_size, watch_code; /* a string instruction: rdi + rcx * size stays the same */
static bool watch_ok = true;
static volatile u64 watch_inside;

static void on_timer(struct frame *f)
{
	ticks++;
	/* leave nothing as it was that a handler may change */
	__asm__ volatile("pcmpeqb %%xmm7, %%xmm7" : : : "memory");
	if (watch_size && f->rip == watch_code) {
		watch_ok &= f->rdi + f->rcx * watch_size == watch_sum;
		watch_inside++;
	}
	eoi();
}

static void on_timer_break(struct frame *f)
{
	on_timer(f);
	if (ticks >= 3) {
		f->rip = (u64)pop_ss;
		if (f->cs == UCODE)
			f->rip += USER_CODE - (u64)first_snippet;
	}
}

static void timer_start(u32 count)
{
	wrmsr(MSR_TIMER_DIV, 0xb);
	wrmsr(MSR_LVT_TIMER, VEC_TIMER | 1 << 17);
	wrmsr(MSR_TIMER_COUNT, count);
}

static void timer_stop(void)
{
	wrmsr(MSR_TIMER_COUNT, 0);
	wrmsr(MSR_LVT_TIMER, 1 << 16);
}

static void mixed(const u8 *code, bool user, u64 n, u64 mem)
{
	struct frame f = user ? user_frame(user_of(code), USER_STACK - 64) : kernel_frame(code);
	f.rbx = n, f.rax = 1, f.rcx = 0x123456789abcdef, f.rdx = 0xfedcba9876543210, f.rdi = mem ? mem : 0x5555555555555555, f.r8 = 3, f.r9 = 5,
	f.r12 = 9, f.r13 = 11;
	struct frame want = f;
	__asm__ volatile("pxor %xmm4, %xmm4");
	exec(&want);
	unsigned before = ticks;
	bool ok = true;
	u64 end = rdtsc() + PATIENCE;
	while (rdtsc() < end) {
		struct frame got = f;
		got.rflags |= F_IF;
		__asm__ volatile("pxor %xmm4, %xmm4");
		exec(&got);
		cli();
		ok &= got.vector == UD && got.rsp == want.rsp;
		if (!mem)
			ok &= ((got.rflags ^ want.rflags) & STATUS) == 0 && got.rax == want.rax && got.r8 == want.r8 && got.r9 == want.r9 && got.r10 == want.r10 && got.r11 == want.r11 &&
			      got.r12 == want.r12 && got.r13 == want.r13 && got.r14 == want.r14 && got.rsi == want.rsi;
		if (ticks - before >= 5)
			break;
	}
	check_at(__FILE__, __LINE__, "the same result under interrupts", ok);
	check_at(__FILE__, __LINE__, "interrupts came", ticks != before);
}

static void storms(void)
{
	/* Where ring 0 is slow: less to do between two strikes. */
	unsigned turns = 5000 / guest_slow, pages = 511 / guest_slow;
	section("interrupts within computations");
	handlers[VEC_TIMER] = on_timer;
	timer_start(20000 * guest_slow);
	for (unsigned user = 0; user < 2; user++) {
		mixed(mixer, user, turns, 0);
		mixed(caller, user, turns, 0);
	}
	static u64 words[4];
	mixed(locker, false, turns, (u64)words);
	timer_stop();

	section("interrupts within string instructions");
	u8 *from = page_alloc(512), *to = page_alloc(512);
	for (u64 i = 0; i < 512 / guest_slow * 4096 / 8; i++)
		((u64 *)(void *)from)[i] = i * 0x9e3779b97f4a7c15;
	timer_start(5000 * guest_slow);
	bool done = true;
	u64 end = rdtsc() + PATIENCE;
	for (unsigned i = 0; rdtsc() < end && watch_inside < 5; i++) {
		struct frame f = kernel_frame(copier);
		f.rsi = (u64)from + 1, f.rdi = (u64)to + 3, f.rcx = pages * 4096;
		f.rflags |= F_IF;
		watch_code = (u64)copier, watch_size = 1, watch_sum = f.rdi + f.rcx;
		exec(&f);
		cli();
		done &= f.rcx == 0 && f.rdi == watch_sum;
		f = kernel_frame(filler);
		f.rdi = (u64)to + 4096 * 256 + 5, f.rcx = 4096 / 2 * pages / 8, f.rax = i;
		f.rflags |= F_IF;
		watch_code = (u64)filler, watch_size = 8, watch_sum = f.rdi + f.rcx * 8;
		exec(&f);
		cli();
		done &= f.rdi == watch_sum && ((u64 *)(void *)(to + 4096 * 256 + 5))[4096 / 2 * pages / 8 - 1] == i;
	}
	timer_stop();
	CHECK(done);
	CHECK(watch_ok);
	CHECK(watch_inside > 0);
	watch_size = 0;
	bool copied = true;
	for (unsigned i = 0; i < (pages / 2 - 5) * 4096; i += 777 * guest_slow)
		copied &= to[i + 3] == from[i + 1];
	CHECK(copied);

	section("out of endless loops");
	const u8 *loops[] = { spin, spin_self, spin_call, spin_ind, spin_loop, spin_ret };
	handlers[VEC_TIMER] = on_timer_break;
	static u32 zero;
	for (unsigned user = 0; user < 2; user++)
		for (unsigned i = 0; i < 6; i++) {
			if (user && i == 0)
				continue;
			ticks = 0;
			timer_start(20000 * guest_slow);
			struct frame f = user ? user_frame(user_of(loops[i]), USER_STACK - 64) : kernel_frame(loops[i]);
			if (loops[i] == spin_ret || loops[i] == spin_call)
				f.rsp = user ? USER_STACK - 64 : f.rsp;
			f.rdi = (u64)&zero;
			f.rflags |= F_IF;
			exec(&f);
			timer_stop();
			CHECK_EQ(f.vector, UD);
			CHECK(ticks >= 3);
			CHECK(f.rip == (u64)pop_ss || f.rip == user_of(pop_ss));
		}
	handlers[VEC_TIMER] = on_timer;
	section("HLT");
	timer_start(20000);
	ticks = 0;
	for (unsigned i = 0; i < 20; i++) {
		unsigned before = ticks;
		__asm__ volatile("sti; hlt; cli" : : : "memory");
		CHECK(ticks != before);
	}
	timer_stop();
	/* One that was left over comes before the HLT or wakes it; afterwards nothing more. */
	sti();
	for (volatile int i = 0; i < 1000; i++)
		;
	cli();
}

void guest_main(void)
{
	for (u64 p = (u64)first_snippet; p < (u64)last_snippet; p += 4096)
		map(USER_CODE + (p - (u64)first_snippet), (void *)p, P | W | U);
	map(USER_STACK - 4096, page_alloc(1), P | W | U);
	wrmsr(0xc0000081, (u64)0x20 << 48 | (u64)KCODE << 32);
	handlers[VEC] = handlers[VEC_LOW] = on_irq;
	windows();
	priorities();
	nmi();
	storms();
}
