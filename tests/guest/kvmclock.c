/*
 * kvm-clock closely (Linux Documentation/virt/kvm/x86/msr.rst), by its new and old MSRs: the page, its protocol, the rate against the TSC and the HPET,
 * wall time against the RTC; MSRs beside it, and hypercalls that are refused. What else the paravirtual leaves promise is pv.c's.
 */
#include "pc.h"

const char guest_name[] = "kvmclock";

enum { WALL = 0x4b564d00, SYSTEM = 0x4b564d01, OLD_WALL = 0x11, OLD_SYSTEM = 0x12 };
enum { BIT_CLOCK = 0, BIT_CLOCK2 = 3, BIT_STABLE = 24 };

static u32 offered;

static bool has(unsigned bit)
{
	return offered >> bit & 1;
}

/* --- kvm-clock --- */

struct time_info {
	u32 version, pad0;
	u64 tsc, system;
	u32 mul;
	signed char shift;
	u8 flags, pad[2];
} __attribute__((packed));

struct wall {
	u32 version, sec, nsec;
};

static struct time_info *info[2];

/* Nanoseconds for so many ticks. */
static u64 scale(u64 ticks, u32 mul, int shift)
{
	ticks = shift < 0 ? ticks >> -shift : ticks << shift;
	return (u64)((unsigned __int128)ticks * mul >> 32);
}

/* The protocol: the version is odd while it changes. */
static u64 now(const struct time_info *page)
{
	const volatile struct time_info *p = page;
	u32 before;
	u64 ns;
	do {
		before = p->version;
		__asm__ volatile("lfence" : : : "memory");
		ns = p->system + scale(rdtsc() - p->tsc, p->mul, p->shift);
		__asm__ volatile("lfence" : : : "memory");
	} while (before & 1 || p->version != before);
	return ns;
}

static void set_clock(void *msr)
{
	wrmsr((u32)(u64)msr, (u64)info[cpu()] | 1);
}

static u64 differs(u64 a, u64 b)
{
	return a > b ? a - b : b - a;
}

/* Against the TSC and the HPET, over some milliseconds: the best of a few tries, in parts of 10000. */
static void rates(void)
{
	u64 hz = tsc_hz(), period = hpet(0) >> 32, best_tsc = ~0ull, best_hpet = ~0ull;
	hpet_write(0x10, 1);
	for (unsigned i = 0; i < 20 && (best_tsc > 10 || best_hpet > 100); i++) {
		u64 t0 = rdtsc(), c0 = now(info[0]), h0 = hpet(0xf0);
		wait_us(5000);
		u64 t1 = rdtsc(), c1 = now(info[0]), h1 = hpet(0xf0);
		u64 by_tsc = (t1 - t0) * 1000 / (hz / 1000000), by_hpet = (h1 - h0) * (period / 1000) / 1000, passed = c1 - c0;
		u64 e = differs(passed, by_tsc) * 10000 / passed;
		best_tsc = e < best_tsc ? e : best_tsc;
		e = differs(passed, by_hpet) * 10000 / passed;
		best_hpet = e < best_hpet ? e : best_hpet;
	}
	CHECK(best_tsc <= 10);
	CHECK(best_hpet <= 100);
}

static u32 lock;
static u64 last, backwards;

static void forwards(void *arg)
{
	(void)arg;
	for (unsigned i = 0; i < 2000 / guest_slow; i++) {
		while (__atomic_exchange_n(&lock, 1, __ATOMIC_ACQUIRE))
			pause();
		u64 t = now(info[cpu()]);
		if (t < last)
			backwards++;
		last = t;
		__atomic_store_n(&lock, 0, __ATOMIC_RELEASE);
	}
}

static void clock_of(u32 msr)
{
	for (unsigned i = 0; i < guest_cpus; i++) {
		info[i] = (struct time_info *)(void *)((u8 *)page_alloc(1) + 64 * i);
		fill(info[i], 0xee, sizeof(*info[i]));
		info[i]->version = 6;
	}
	run_all(set_clock, (void *)(u64)msr);
	CHECK_EQ(rdmsr(msr), (u64)info[0] | 1);
	for (unsigned i = 0; i < guest_cpus; i++) {
		struct time_info *p = info[i];
		CHECK_EQ(p->version & 1, 0);
		CHECK(p->version);
		CHECK(p->tsc <= rdtsc());
		/* 10 seconds of ticks are 10 seconds, to a thousandth */
		CHECK(differs(scale(10 * tsc_hz(), p->mul, p->shift), 10000000000) < 10000000);
		if (has(BIT_STABLE) && msr == SYSTEM) /* the old numbers are those of before that bit */
			CHECK_EQ(p->flags & 1, 1);
		CHECK_EQ(p->flags & ~3, 0);
		CHECK_EQ(*((u8 *)p + sizeof(*p)), 0);
	}
	u64 before = now(info[0]);
	bool up = true;
	for (unsigned i = 0; i < 1000 / guest_slow; i++) {
		u64 t = now(info[0]);
		up &= t >= before;
		before = t;
	}
	CHECK(up);
	last = 0;
	run_all(forwards, NULL);
	CHECK_EQ(backwards, 0);
	rates();
	/* off: the page is ours again */
	wrmsr(msr, 0);
	fill(info[0], 0x5a, sizeof(*info[0]));
	wait_us(2000);
	CHECK_EQ(info[0]->version, 0x5a5a5a5a);
	CHECK_EQ(rdmsr(msr), 0);
	/* no memory there: no clock, and nothing else happens */
	CHECK_EQ(wrmsr_fault(msr, 0x7ff0000001), 0);
	wrmsr(msr, (u64)info[0] | 1);
	CHECK_EQ(info[0]->version & 1, 0);
	CHECK(now(info[0]) >= before);
}

/* --- wall clock --- */

static unsigned rtc(u8 reg)
{
	outb(0x70, reg);
	u8 v = inb(0x71);
	return (v >> 4) * 10u + (v & 15);
}

/* Seconds since 1970 by the RTC, whose registers are BCD and of 24 hours (status B is as firmware leaves it: set here). */
static u64 rtc_time(void)
{
	outb(0x70, 0x0b);
	outb(0x71, 2);
	u64 again, t = 0;
	do {
		again = t;
		outb(0x70, 0x0a);
		while (inb(0x71) & 0x80)
			outb(0x70, 0x0a);
		u64 y = 2000 + rtc(9), m = rtc(8), d = rtc(7);
		/* days from civil, March-based years */
		y -= m <= 2;
		u64 doy = (153 * (m > 2 ? m - 3 : m + 9) + 2) / 5 + d - 1, days = y * 365 + y / 4 - y / 100 + y / 400 + doy - 719468;
		t = days * 86400 + rtc(4) * 3600ul + rtc(2) * 60ul + rtc(0);
	} while (t != again);
	return t;
}

static void wall_of(u32 msr)
{
	struct wall *w = page_alloc(1);
	w->version = 7;
	wrmsr(msr, (u64)w);
	CHECK_EQ(w->version & 1, 0);
	CHECK(w->nsec < 1000000000);
	CHECK(w->sec > 1600000000);
	u64 real = w->sec + (w->nsec + now(info[0])) / 1000000000;
	CHECK(differs(real, rtc_time()) <= 2);
	u32 version = w->version;
	wrmsr(msr, (u64)w);
	CHECK(w->version != version && !(w->version & 1));
}

/* --- beside it --- */

static void nobodys(void)
{
	section("MSRs that nobody promised");
	static const u32 none[] = { 0x4b564cff, 0x4b564d09, 0x4b564d20, 0x4b564dff, 0x4b564e00, 0x40000000, 0x40000020 };
	for (unsigned i = 0; i < sizeof(none) / sizeof(none[0]); i++) {
		CHECK_EQ(rdmsr_fault(none[i], NULL), GP);
		CHECK_EQ(wrmsr_fault(none[i], 0), GP);
	}
}

SNIPPET(vmcall, "vmcall\n ud2");
SNIPPET(vmmcall, "vmmcall\n ud2");

static void hypercalls(void)
{
	if (!section_unless("hypercalls", "no-hypercall"))
		return;
	/* one that nobody knows: -KVM_ENOSYS, and registers as they were. In user mode none is for them. */
	const u8 *code[] = { vmcall, vmmcall };
	map_user_alias();
	for (unsigned i = 0; i < 2; i++)
		for (unsigned user = 0; user < 2; user++) {
			struct frame f = user ? user_frame(user_alias(code[i]), USER_STACK_TOP - 64) : kernel_frame(code[i]);
			f.rax = 0x7fff, f.rbx = 1, f.rcx = 2, f.rdx = 3, f.rsi = 4;
			exec(&f);
			CHECK_EQ(f.vector, UD);
			CHECK_EQ(f.rip - (user ? user_alias(code[i]) : (u64)code[i]), 3);
			CHECK_EQ(f.rax, user ? -1ull : -1000ull);
			CHECK(f.rbx == 1 && f.rcx == 2 && f.rdx == 3 && f.rsi == 4);
		}
}

void guest_main(void)
{
	section("leaves");
	u32 r[4];
	CHECK(CPU_HAS(1, 0, 2, 31));
	cpuid(0x40000000, 0, r);
	CHECK_EQ(r[0], 0x40000001);
	CHECK(r[1] == 0x4b4d564b && r[2] == 0x564b4d56 && r[3] == 0x4d); /* KVMKVMKVM */
	cpuid(0x40000001, 0, r);
	offered = r[0];
	CHECK(has(BIT_CLOCK2));
	CHECK(has(1)); /* no delay at ports: nothing to see */
	start_cpus();
	section("clock");
	clock_of(SYSTEM);
	section("wall clock");
	wall_of(WALL);
	section("clock and wall clock by the old numbers");
	if (has(BIT_CLOCK)) {
		clock_of(OLD_SYSTEM);
		wall_of(OLD_WALL);
	}
	nobodys();
	hypercalls();
}
