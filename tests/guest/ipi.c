/*
 * Messages between processors: destinations in x2APIC and xAPIC mode, shorthands, INIT and SIPI, NMIs, and what ends a HLT (SDM 3A 8.4, 10.6).
 */
#include "pc.h"

const char guest_name[] = "ipi";

enum { VEC = 0x71, VEC_AFTER = 0x31, MAX = 4 }; /* AFTER: of lower priority, taken when nothing else waits */

static u32 got[MAX], after[MAX], nmis[MAX];
static volatile bool leave, ready[MAX];
static volatile u8 ldr[MAX];
static volatile u32 dfr;

static void on_vec(struct frame *f)
{
	__atomic_fetch_add(f->vector == VEC ? &got[cpu()] : &after[cpu()], 1, __ATOMIC_RELEASE);
	apic_write(APIC_EOI, 0);
}

/* run_on's, which may come when the mode has changed already. */
static void on_wake(struct frame *f)
{
	(void)f;
	apic_write(APIC_EOI, 0);
}

static void on_nmi(struct frame *f)
{
	(void)f;
	__atomic_fetch_add(&nmis[cpu()], 1, __ATOMIC_RELEASE);
}

static u32 load(const u32 *p)
{
	return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}

/* Wait until *p is at least n: some seconds, for hosts with other things to do. */
static bool comes_to(const u32 *p, u32 n)
{
	u64 end = rdtsc() + 10 * tsc_hz();
	while (load(p) < n && rdtsc() < end)
		pause();
	return load(p) >= n;
}

/* --- destinations --- */

static void set_logical(void)
{
	if (x2apic_on())
		return;
	xapic_write(APIC_DFR, dfr);
	xapic_write(APIC_LDR, (u32)ldr[cpu()] << 24);
}

/* The others sit here with interrupts open, in the mode that is tried. */
static void station(void *to_page)
{
	if (to_page)
		to_xapic();
	set_logical();
	ready[cpu()] = true;
	sti();
	while (!leave)
		pause();
	cli();
	if (to_page)
		to_x2apic();
}

static void man_stations(bool page)
{
	leave = false;
	for (unsigned i = 1; i < guest_cpus; i++) {
		ready[i] = false;
		run_on(i, station, page ? (void *)1 : NULL);
		while (!ready[i])
			pause();
	}
	if (page)
		to_xapic();
	set_logical();
}

static void leave_stations(void)
{
	leave = true;
	if (!x2apic_on())
		to_x2apic();
	for (unsigned i = 1; i < guest_cpus; i++)
		wait_for(i);
}

static void send(u32 dest, u32 low)
{
	if (x2apic_on()) {
		wrmsr(0x830, (u64)dest << 32 | low);
		return;
	}
	xapic_write(APIC_ICR_HIGH, dest << 24);
	xapic_write(APIC_ICR, low);
	while (xapic(APIC_ICR) & 0x1000)
		pause();
}

/* Send it; these processors get it once, the others do not. */
static void expect(u32 dest, u32 low, unsigned who)
{
	fill(got, 0, sizeof(got));
	fill(after, 0, sizeof(after));
	send(dest, low | VEC);
	send(0, 0x84000 | VEC_AFTER); /* all */
	let_in();
	unsigned seen = 0;
	for (unsigned i = 0; i < guest_cpus; i++) {
		CHECK(comes_to(&after[i], 1));
		seen |= (unsigned)(load(&got[i]) == 1) << i;
		CHECK(load(&got[i]) <= 1);
	}
	if (seen != who)
		print("  (destination 0x%x, command 0x%x)\n", dest, low);
	CHECK_EQ(seen, who);
}

/* One of these processors gets it. */
static void expect_one(u32 dest, u32 low, unsigned of)
{
	fill(got, 0, sizeof(got));
	fill(after, 0, sizeof(after));
	send(dest, low | VEC);
	send(0, 0x84000 | VEC_AFTER);
	let_in();
	u32 n = 0, others = 0;
	for (unsigned i = 0; i < guest_cpus; i++) {
		CHECK(comes_to(&after[i], 1));
		*(of >> i & 1 ? &n : &others) += load(&got[i]);
	}
	CHECK_EQ(n, 1);
	CHECK_EQ(others, 0);
}

static void shorthands(void)
{
	unsigned all = (1u << guest_cpus) - 1;
	for (unsigned logical = 0; logical < 2; logical++) {
		expect(0x77, logical << 11 | 0x44000, 1);
		expect(0x77, logical << 11 | 0x84000, all);
		expect(0x77, logical << 11 | 0xc4000, all & ~1u);
	}
}

static void x2apic(void)
{
	section("x2APIC destinations");
	unsigned all = (1u << guest_cpus) - 1;
	man_stations(false);
	for (unsigned i = 0; i < guest_cpus; i++)
		expect(i, 0x4000, 1u << i);
	expect(0x77, 0x4000, 0);
	expect(0xff, 0x4000, 0); /* an id like any other */
	expect(0x100, 0x4000, 0);
	expect(0xffffffff, 0x4000, all);
	expect(0xffffffff, 0x4800, all);
	/* logical: cluster, and one bit for each of its members */
	for (unsigned mask = 1; mask <= all; mask++)
		expect(mask, 0x4800, mask);
	expect(0x10001, 0x4800, 0);
	expect(0xfff0, 0x4800, 0);
	expect(0xffff, 0x4800, all);
	shorthands();
	leave_stations();
}

static void xapic_flat(void)
{
	section("xAPIC destinations, flat");
	unsigned all = (1u << guest_cpus) - 1;
	dfr = 0xffffffff;
	for (unsigned i = 0; i < guest_cpus; i++)
		ldr[i] = (u8)(0x10 << i);
	man_stations(true);
	for (unsigned i = 0; i < guest_cpus; i++)
		expect(i, 0x4000, 1u << i);
	expect(0x77, 0x4000, 0);
	expect(0xff, 0x4000, all);
	expect(0xff, 0x4800, all);
	for (unsigned mask = 1; mask <= all; mask++)
		expect(mask << 4 | 0xf, 0x4800, mask);
	expect(0x0f, 0x4800, 0);
	shorthands();
	/* lowest priority: one of them */
	expect_one(0xf0, 0x4900, all);
	expect_one(0x60, 0x4900, 6 & all);
	expect_one(0x20, 0x4900, 2);
	leave_stations();
}

static void xapic_cluster(void)
{
	section("xAPIC destinations, clusters");
	unsigned all = (1u << guest_cpus) - 1;
	dfr = 0x0fffffff;
	for (unsigned i = 0; i < guest_cpus; i++)
		ldr[i] = (u8)((i / 2 + 3) << 4 | 1 << (i & 1) * 2); /* clusters 3 and 4, members 0 and 2 */
	man_stations(true);
	expect(0x31, 0x4800, 1);
	expect(0x34, 0x4800, 2);
	expect(0x35, 0x4800, 3);
	expect(0x3f, 0x4800, 3);
	expect(0x3a, 0x4800, 0);
	expect(0x41, 0x4800, 4 & all);
	expect(0x4f, 0x4800, 0xc & all);
	expect(0x51, 0x4800, 0);
	expect(0x01, 0x4800, 0);
	expect(0xff, 0x4800, all);
	expect(1, 0x4000, 2); /* physical as ever */
	expect_one(0x35, 0x4900, 3);
	leave_stations();
}

/* --- start-up --- */

extern u8 trampoline[], trampoline_end[];
extern u32 ap_next;
static u32 hellos;

static void hello(void *arg)
{
	(void)arg;
	__atomic_fetch_add(&hellos, 1, __ATOMIC_RELEASE);
}

static void wait_up(unsigned n)
{
	u64 end = rdtsc() + 10 * tsc_hz();
	while (!ap_is_up(n, false) && rdtsc() < end)
		pause();
	CHECK(ap_is_up(n, false));
}

/* Until told, in HLT with interrupts off: only NMI and INIT end that. */
static void deaf(void *arg)
{
	(void)arg;
	ready[cpu()] = true;
	for (;;)
		__asm__ volatile("cli; hlt");
}

static void open_loop(void *arg)
{
	(void)arg;
	sti();
	ready[cpu()] = true;
	for (;;)
		pause();
}

static void start_again(unsigned n, u8 page, unsigned sipis)
{
	copy((void *)(page * 4096ul), trampoline, (size_t)(trampoline_end - trampoline));
	__atomic_store_n(&ap_next, n, __ATOMIC_RELEASE);
	ap_is_up(n, true);
	for (unsigned i = 0; i < sipis; i++)
		send(n, 0x4600 | page);
	wait_up(n);
	hellos = 0;
	run_on(n, hello, NULL);
	wait_for(n);
	CHECK_EQ(hellos, 1);
}

static void startup(void)
{
	section("INIT and SIPI");
	unsigned n = guest_cpus - 1;
	/* one that runs does not mind a SIPI */
	for (unsigned i = 0; i < 3; i++)
		send(n, 0x4608);
	hellos = 0;
	run_on(n, hello, NULL);
	wait_for(n);
	CHECK_EQ(hellos, 1);
	void (*const states[])(void *) = { deaf, open_loop };
	for (unsigned i = 0; i < 4; i++) {
		ready[n] = false;
		run_on(n, states[i & 1], NULL);
		while (!ready[n])
			pause();
		if (i & 1)
			send(n, 0x4000 | VEC_AFTER);
		send(n, 0xc500); /* INIT, level, assert */
		send(n, 0x8500); /* de-assert: nothing */
		if (i == 2) {
			/* waits for SIPI: neither interrupts nor run_on's wake-ups start it */
			send(n, 0x4000 | VEC);
			for (unsigned k = 0; k < 1000; k++)
				pause();
		}
		start_again(n, i < 2 ? 8 : 9, 1 + (i & 1));
	}
	/* nothing that waited before is there now */
	fill(got, 0, sizeof(got));
	ready[n] = false;
	run_on(n, deaf, NULL);
	while (!ready[n])
		pause();
	send(n, 0x4000 | VEC);
	send(n, 0x4500);
	start_again(n, 8, 1);
	CHECK_EQ(load(&got[n]), 0);
}

/* --- NMI and HLT --- */

static volatile u32 awake[MAX];

/* HLTs with interrupts off, counted; ended by `leave`. */
static void doze(void *arg)
{
	(void)arg;
	ready[cpu()] = true;
	while (!leave) {
		__asm__ volatile("hlt" : : : "memory");
		__atomic_fetch_add((u32 *)&awake[cpu()], 1, __ATOMIC_RELEASE);
	}
}

static void sleepers(void)
{
	section("HLT with interrupts off");
	handlers[NMI] = on_nmi;
	fill(nmis, 0, sizeof(nmis));
	fill((void *)awake, 0, sizeof(awake));
	fill(got, 0, sizeof(got));
	leave = false;
	for (unsigned i = 1; i < guest_cpus; i++) {
		ready[i] = false;
		run_on(i, doze, NULL);
		while (!ready[i])
			pause();
	}
	for (unsigned round = 1; round <= 3; round++) {
		/* a maskable one does not wake it, an NMI does */
		send(0, 0xc4000 | VEC);
		wait_us(300);
		for (unsigned i = 1; i < guest_cpus; i++)
			CHECK_EQ(awake[i], round - 1);
		if (round == 3)
			leave = true;
		if (round == 2)
			for (unsigned i = 1; i < guest_cpus; i++)
				send(i, 0x4400);
		else
			send(0, 0xc4400);
		for (unsigned i = 1; i < guest_cpus; i++) {
			CHECK(comes_to(&nmis[i], round));
			CHECK(comes_to((u32 *)&awake[i], round));
		}
	}
	for (unsigned i = 1; i < guest_cpus; i++) {
		wait_for(i);
		CHECK_EQ(nmis[i], 3);
	}
	/* and now, with interrupts on, the maskable one, once */
	for (unsigned i = 1; i < guest_cpus; i++) {
		CHECK(comes_to(&got[i], 1));
		CHECK_EQ(got[i], 1);
	}
	CHECK_EQ(nmis[0], 0);
}

void guest_main(void)
{
	handlers[VEC] = handlers[VEC_AFTER] = on_vec;
	start_cpus();
	handlers[IRQ_WAKE] = on_wake;
	x2apic();
	xapic_flat();
	xapic_cluster();
	startup();
	sleepers();
}
