/*
 * KVM's paravirtual interface (Linux Documentation/virt/kvm/x86/cpuid.rst, msr.rst, hypercalls.rst): each feature that CPUID offers does its work, each
 * that it does not offer is not there.
 */
#include "pc.h"

const char guest_name[] = "pv";

enum { CLOCKSOURCE2 = 3, ASYNC_PF = 4, STEAL_TIME = 5, PV_EOI = 6, PV_SEND_IPI = 11, POLL_CONTROL = 12, ASYNC_PF_INT = 14, MIGRATION = 17, STABLE = 24 };
enum { MSR_WALL = 0x4b564d00, MSR_CLOCK = 0x4b564d01, MSR_STEAL = 0x4b564d03, MSR_EOI = 0x4b564d04 };
enum { HC_SEND_IPI = 10, HC_NONE = 999, ENOSYS_KVM = 1000 };
enum { VEC = 0x61, VEC_PV = 0x62 };

static u32 features;

static bool has(unsigned bit)
{
	return features >> bit & 1;
}

/* --- kvm-clock --- */

struct clock_page {
	u32 version, pad;
	u64 tsc, ns;
	u32 mul;
	int8_t shift;
	u8 flags, pad2[2];
};

static volatile struct clock_page *clocks; /* one a processor, 64 bytes apart */

static u64 clock_read(void)
{
	volatile struct clock_page *c = (volatile struct clock_page *)((volatile u8 *)clocks + 64 * cpu());
	u32 version;
	u64 ns;
	do {
		version = c->version & ~1u;
		__asm__ volatile("" : : : "memory");
		u64 delta = rdtsc() - c->tsc;
		delta = c->shift >= 0 ? delta << c->shift : delta >> -c->shift;
		ns = c->ns + (u64)((unsigned __int128)delta * c->mul >> 32);
		__asm__ volatile("" : : : "memory");
	} while (c->version != version);
	return ns;
}

static void clock_on(void *arg)
{
	(void)arg;
	wrmsr(MSR_CLOCK, (u64)clocks + 64 * cpu() + 1);
}

static void clock_off(void *arg)
{
	(void)arg;
	wrmsr(MSR_CLOCK, 0);
}

static volatile u64 other_ns;

static void clock_tell(void *arg)
{
	(void)arg;
	other_ns = clock_read();
}

static u64 hpet_ns(void)
{
	return *(volatile u64 *)(HPET + 0xf0) * ((*(volatile u64 *)HPET >> 32) / 1000000);
}

static void clock(void)
{
	section("kvm-clock");
	clocks = page_alloc(1);
	run_all(clock_on, NULL);
	CHECK_EQ(rdmsr(MSR_CLOCK), (u64)clocks + 1);
	CHECK(clocks->version && !(clocks->version & 1));
	CHECK(clocks->mul);
	CHECK_EQ(clocks->flags & 1, has(STABLE)); /* comparable between processors */
	bool back = false;
	u64 last = 0;
	for (unsigned i = 0; i < 200; i++) {
		u64 now = clock_read();
		back |= now < last;
		last = now;
	}
	CHECK(!back);
	/* Against the HPET: some 20 ms, each end bracketed by two looks at the clock. */
	*(volatile u64 *)(HPET + 0x10) = 1;
	u64 a0 = clock_read(), h0 = hpet_ns(), a1 = clock_read();
	while (hpet_ns() - h0 < 20000000)
		;
	u64 b0 = clock_read(), h1 = hpet_ns(), b1 = clock_read();
	u64 least = b0 - a1, most = b1 - a0, took = h1 - h0;
	CHECK(took + 20000 >= least && took <= most + 20000);
	/* The other processor's clock is between two looks at ours. */
	bool between = true;
	for (unsigned i = 0; i < 20 && guest_cpus > 1; i++) {
		u64 before = clock_read();
		run_on(1, clock_tell, NULL);
		wait_for(1);
		u64 after = clock_read();
		between &= before <= other_ns && other_ns <= after;
	}
	CHECK(between);
	volatile u32 *wall = page_alloc(1); /* version, seconds and nanoseconds of when the clock began */
	wrmsr(MSR_WALL, (u64)wall);
	CHECK(!(wall[0] & 1));
	CHECK(wall[1] > 1700000000u && wall[2] < 1000000000u);
	run_all(clock_off, NULL);
}

/* --- what CPUID does not offer --- */

static void absent(void)
{
	static const struct {
		u32 msr;
		u8 bit;
		u64 value; /* one that is legal where there is one */
	} t[] = { { 0x4b564d02, ASYNC_PF, 0 },	   { MSR_STEAL, STEAL_TIME, 0 }, { MSR_EOI, PV_EOI, 0 }, { 0x4b564d05, POLL_CONTROL, 1 },
		  { 0x4b564d06, ASYNC_PF_INT, 0 }, { 0x4b564d08, MIGRATION, 0 } };
	section("MSRs of features");
	for (unsigned i = 0; i < sizeof(t) / sizeof(t[0]); i++) {
		CHECK_EQ(wrmsr_fault(t[i].msr, t[i].value), has(t[i].bit) ? 0 : GP);
		CHECK_EQ(rdmsr_fault(t[i].msr, NULL), has(t[i].bit) ? 0 : GP);
	}
}

/* --- hypercalls --- */

/* VMCALL is Intel's, VMMCALL AMD's; either is right on our own processors, and KVM wants the host's. */
static u64 hypercall(u64 nr, u64 a, u64 b, u64 c, u64 d)
{
	u32 r[4];
	u64 result;
	cpuid(0, 0, r);
	if (r[1] == 0x68747541) /* "Auth" */
		__asm__ volatile("vmmcall" : "=a"(result) : "a"(nr), "b"(a), "c"(b), "d"(c), "S"(d) : "memory");
	else
		__asm__ volatile("vmcall" : "=a"(result) : "a"(nr), "b"(a), "c"(b), "d"(c), "S"(d) : "memory");
	return result;
}

static volatile unsigned taken, lazy;
static volatile u32 *eoi_word;

static void on_irq(struct frame *f)
{
	(void)f;
	taken++;
	/* Set: this end need not be told. A host may always clear it. */
	if (eoi_word && *eoi_word & 1) {
		*eoi_word &= ~1u;
		lazy++;
	} else {
		eoi();
	}
}

static void open_window(void)
{
	sti();
	for (volatile unsigned i = 0; i < 3000 && !taken; i++)
		pause();
	cli();
}

static void hypercalls(void)
{
	if (!section_unless("hypercalls", "no-hypercall"))
		return;
	CHECK_EQ(hypercall(HC_NONE, 0, 0, 0, 0), -(u64)ENOSYS_KVM);
	handlers[VEC_PV] = on_irq;
	taken = 0;
	u64 sent = hypercall(HC_SEND_IPI, 1, 0, 0, VEC_PV);
	CHECK_EQ(sent, has(PV_SEND_IPI) ? 1 : -(u64)ENOSYS_KVM);
	open_window();
	CHECK_EQ(taken, has(PV_SEND_IPI));
	handlers[VEC_PV] = NULL;
}

/* --- ends of interrupts --- */

static void ends(void)
{
	section("ends of interrupts");
	handlers[VEC] = on_irq;
	if (has(PV_EOI)) {
		eoi_word = page_alloc(1);
		wrmsr(MSR_EOI, (u64)eoi_word | 1);
		CHECK_EQ(rdmsr(MSR_EOI), (u64)eoi_word | 1);
	} else {
		CHECK(true);
	}
	bool all = true;
	for (unsigned i = 0; i < 50; i++) {
		taken = 0;
		apic_write(APIC_SELF, VEC);
		open_window();
		all &= taken == 1;
	}
	CHECK(all);
	bool clear = true;
	for (unsigned i = 0; i < 8; i++)
		clear &= apic(APIC_IRR + i) == 0 && apic(APIC_ISR + i) == 0;
	CHECK(clear);
	if (has(PV_EOI))
		wrmsr(MSR_EOI, 0);
	eoi_word = NULL;
	handlers[VEC] = NULL;
}

static void steal(void)
{
	section("steal time");
	if (!has(STEAL_TIME)) {
		CHECK(true);
		CHECK(true);
		return;
	}
	volatile u32 *page = page_alloc(1); /* steal (64), version, flags, preempted */
	wrmsr(MSR_STEAL, (u64)page | 1);
	CHECK_EQ(rdmsr(MSR_STEAL), (u64)page | 1);
	for (unsigned i = 0; i < 100; i++)
		(void)inb(0x3fd); /* it is written at entries: where we always answer */
	CHECK(page[2] && !(page[2] & 1));
	wrmsr(MSR_STEAL, 0);
}

void guest_main(void)
{
	u32 r[4];
	section("leaves");
	cpuid(1, 0, r);
	CHECK(r[2] >> 31);
	cpuid(0x40000000, 0, r);
	CHECK_EQ(r[1], 0x4b4d564b); /* KVMK VMKV M */
	CHECK_EQ(r[2], 0x564b4d56);
	CHECK_EQ(r[3], 0x4d);
	CHECK(r[0] >= 0x40000001);
	cpuid(0x40000001, 0, r);
	features = r[0];
	CHECK(has(CLOCKSOURCE2));
	CHECK_EQ(r[3] & 1, 0); /* nobody promised that vCPUs are never preempted */
	start_cpus();
	clock();
	absent();
	hypercalls();
	ends();
	steal();
	CHECK(lazy <= 50);
}
