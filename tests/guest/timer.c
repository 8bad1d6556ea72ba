/*
 * Clocks and timers: all run at their rates against the TSC, and no timer fires early. The host may take the processor away at any moment, so
 * a rate is measured several times and the best is taken: that a clock can be read right, not that it always is.
 */
#include "guest.h"

const char guest_name[] = "timer";

enum { VEC = 0x51, VEC_IOAPIC = 0x52 };
enum { LVT_TIMER = 0x832, INITIAL = 0x838, CURRENT = 0x839, DIVIDE = 0x83e, DEADLINE = 0x6e0 };
#define HPET 0xfed00000ul
#define IOAPIC 0xfec00000ul
#define PM_TIMER 0x608
#define TRIES 40

static u64 tsc_hz;
static volatile unsigned ticks;
static volatile u64 fired_at;

static void on_timer(struct frame *f)
{
	(void)f;
	if (!ticks)
		fired_at = rdtsc();
	ticks++;
	eoi();
}

static u64 hpet(unsigned reg)
{
	return *(volatile u64 *)(HPET + reg);
}

static u64 read_pm(void)
{
	return inl(PM_TIMER);
}

static u64 read_hpet(void)
{
	return hpet(0xf0);
}

static u64 read_lapic(void)
{
	return ~rdmsr(CURRENT);
}

static u64 read_pit(void)
{
	outb(0x43, 0x80); /* latch channel 2 */
	u64 lo = inb(0x42), hi = inb(0x42);
	return ~(lo | hi << 8);
}

static u64 muldiv(u64 a, u64 b, u64 c)
{
	return (u64)((unsigned __int128)a * b / c);
}

unsigned __int128 __udivti3(unsigned __int128 a, unsigned __int128 b);
unsigned __int128 __udivti3(unsigned __int128 a, unsigned __int128 b)
{
	unsigned __int128 q = 0, r = 0;
	for (int i = 127; i >= 0; i--) {
		r = r << 1 | (a >> i & 1);
		q <<= 1;
		if (r >= b)
			r -= b, q |= 1;
	}
	return q;
}

/* Wait by the TSC. */
static void wait_us(u64 us)
{
	u64 end = rdtsc() + muldiv(us, tsc_hz, 1000000);
	while (rdtsc() < end)
		pause();
}

/* The TSC halfway through reading a clock, and how long that took. */
static u64 sample(u64 (*read)(void), u64 *value, u64 *took)
{
	u64 a = rdtsc();
	*value = read();
	u64 b = rdtsc();
	*took = b - a;
	return a + (b - a) / 2;
}

/* Best relative error of a clock of `hz` with `bits` bits over us microseconds, in parts per 10000. */
static u64 rate_error(u64 (*read)(void), u64 hz, unsigned bits, u64 us)
{
	u64 best = ~0ull;
	for (unsigned i = 0; i < TRIES && best > 50; i++) {
		u64 v0, v1, d0, d1;
		u64 t0 = sample(read, &v0, &d0);
		wait_us(us);
		u64 t1 = sample(read, &v1, &d1);
		u64 passed = (v1 - v0) & (bits == 64 ? ~0ull : (1ull << bits) - 1);
		u64 want = muldiv(t1 - t0, hz, tsc_hz);
		u64 error = muldiv(passed > want ? passed - want : want - passed, 10000, want);
		if (error < best)
			best = error;
	}
	return best;
}

static bool goes_up(u64 (*read)(void), u64 mask)
{
	u64 last = read();
	for (unsigned i = 0; i < 2000; i++) {
		u64 v = read();
		if (((v - last) & mask) > mask / 2)
			return false;
		last = v;
	}
	return true;
}

static u64 read_tsc(void)
{
	return rdtsc();
}

static void clocks(void)
{
	section("clocks");
	u32 r[4];
	cpuid(0x15, 0, r);
	CHECK(r[0] && r[1] && r[2]);
	tsc_hz = muldiv(r[2], r[1], r[0]);
	CHECK(tsc_hz > 100000000);
	CHECK(goes_up(read_tsc, ~0ull));
	CHECK(goes_up(read_pm, 0xffffff));
	CHECK(goes_up(read_hpet, ~0ull));
	/* PM timer: 3.579545 MHz, 24 bits */
	CHECK(rate_error(read_pm, 3579545, 24, 3000) <= 50);
	/* HPET: period in femtoseconds */
	u64 period = hpet(0) >> 32;
	CHECK(period && period <= 100000000);
	*(volatile u64 *)(HPET + 0x10) = 1;
	CHECK(rate_error(read_hpet, 1000000000000000 / period, 64, 3000) <= 50);
	/* PIT channel 2 in mode 2, gate open: 1.193182 MHz; counts down 65536 */
	outb(0x61, 1);
	outb(0x43, 0xb4);
	outb(0x42, 0);
	outb(0x42, 0);
	CHECK(rate_error(read_pit, 1193182, 16, 3000) <= 50);
	/* mode 0: the output rises when the count is through, not before */
	u64 best = ~0ull;
	bool early = false;
	for (unsigned i = 0; i < TRIES && best > 100; i++) {
		outb(0x43, 0xb0);
		u64 t0 = rdtsc();
		outb(0x42, 2386 & 0xff);
		outb(0x42, 2386 >> 8);
		while (!(inb(0x61) & 0x20))
			;
		u64 t1 = rdtsc(), want = muldiv(2386, tsc_hz, 1193182);
		early |= t1 - t0 < want - want / 200;
		u64 error = muldiv(t1 - t0 > want ? t1 - t0 - want : 0, 10000, want);
		best = error < best ? error : best;
	}
	CHECK(!early);
	CHECK(best <= 100 * guest_slow);
	outb(0x61, 0);
	if (skipping("IA32_TSC_ADJUST", "tsc-fixed"))
		return;
	/* TSC written and adjusted */
	u64 t = rdtsc();
	wrmsr(0x3b, rdmsr(0x3b) + (1ull << 40));
	CHECK(rdtsc() - t - (1ull << 40) < 1ull << 38);
	wrmsr(0x3b, rdmsr(0x3b) - (1ull << 40));
	CHECK(rdtsc() - t < 1ull << 38);
}

/* --- the LAPIC's timer --- */

static u64 lapic_hz;

static void arm(u32 mode, u32 divide, u32 count)
{
	ticks = 0;
	wrmsr(DIVIDE, divide);
	wrmsr(LVT_TIMER, VEC | mode);
	wrmsr(INITIAL, count);
}

static void wait_tick(void)
{
	while (!ticks)
		__asm__ volatile("sti; hlt; cli" : : : "memory");
}

static void lapic(void)
{
	section("LAPIC timer");
	handlers[VEC] = on_timer;
	/* its rate, by the current count */
	arm(1 << 16, 0xb, 0xffffffff);
	u64 v0, v1, d0, d1, best = ~0ull;
	for (unsigned i = 0; i < TRIES; i++) {
		u64 t0 = sample(read_lapic, &v0, &d0);
		wait_us(2000);
		u64 t1 = sample(read_lapic, &v1, &d1);
		if (d0 + d1 < best) {
			best = d0 + d1;
			lapic_hz = muldiv((u32)(v1 - v0), tsc_hz, t1 - t0);
		}
	}
	CHECK(lapic_hz > 1000000);
	CHECK(rate_error(read_lapic, lapic_hz, 32, 3000) <= 50);
	/* one-shot: once, never early, and about then */
	static const u8 divides[] = { 0xb, 0x0, 0x1, 0x2, 0x3, 0x8, 0x9, 0xa };
	bool early = false, once = true;
	for (unsigned k = 0; k < 8; k++) {
		best = ~0ull;
		for (unsigned i = 0; i < TRIES && best > 3000; i++) {
			u32 count = (u32)(lapic_hz / 1000) >> (k ? k : 0);
			u64 t0 = rdtsc();
			arm(0, divides[k], count);
			wait_tick();
			u64 want = tsc_hz / 1000;
			u64 took = fired_at - t0;
			early |= took < want - want / 100;
			best = took - want < best ? took - want : best;
			wait_us(50);
			once &= ticks == 1 && rdmsr(CURRENT) == 0;
		}
		CHECK(best < tsc_hz / 1000);
	}
	CHECK(!early);
	CHECK(once);
	/* stopped before it fires */
	arm(0, 0xb, (u32)(lapic_hz / 200));
	wrmsr(INITIAL, 0);
	sti();
	wait_us(7000);
	cli();
	CHECK_EQ(ticks, 0);
	/* masked */
	arm(1 << 16, 0xb, (u32)(lapic_hz / 1000));
	sti();
	wait_us(2000);
	cli();
	CHECK_EQ(ticks, 0);
	/* periodic: no more often than that, and in some window often enough (what the host makes late becomes one tick) */
	bool enough = false, too_many = false;
	for (unsigned i = 0; i < TRIES && !enough; i++) {
		u64 t0 = rdtsc();
		arm(1 << 17, 0xb, (u32)(lapic_hz / 1000));
		sti();
		wait_us(20000);
		cli();
		wrmsr(INITIAL, 0);
		u64 t1 = rdtsc();
		u64 most = muldiv(t1 - t0, 1000, tsc_hz) + 1;
		too_many |= ticks > most;
		enough = ticks >= 10;
		let_in();
	}
	CHECK(enough);
	CHECK(!too_many);

	section("TSC deadline");
	wrmsr(INITIAL, 0);
	wrmsr(LVT_TIMER, VEC | 2 << 17);
	early = false;
	best = ~0ull;
	for (unsigned i = 0; i < 20; i++) {
		ticks = 0;
		u64 at = rdtsc() + tsc_hz / 2000;
		wrmsr(DEADLINE, at);
		CHECK(rdmsr(DEADLINE) == at || rdtsc() >= at);
		wait_tick();
		early |= fired_at < at;
		best = fired_at - at < best ? fired_at - at : best;
		CHECK_EQ(rdmsr(DEADLINE), 0);
	}
	CHECK(!early);
	CHECK(best < tsc_hz / 1000);
	/* in the past: at once */
	ticks = 0;
	wrmsr(DEADLINE, 1);
	wait_tick();
	CHECK_EQ(ticks, 1);
	ticks = 0;
	wrmsr(DEADLINE, rdtsc() + tsc_hz / 1000);
	wrmsr(DEADLINE, 0);
	sti();
	wait_us(3000);
	cli();
	CHECK_EQ(ticks, 0);
	/* a storm: each handler's deadline follows at once */
	for (unsigned i = 0; i < 200; i++) {
		ticks = 0;
		wrmsr(DEADLINE, rdtsc() + i * 50);
		wait_tick();
	}
	CHECK(true);
	wrmsr(LVT_TIMER, 1 << 16);
}

/* --- by the IOAPIC --- */

static void ioapic(u32 reg, u32 value)
{
	*(volatile u32 *)IOAPIC = reg;
	*(volatile u32 *)(IOAPIC + 0x10) = value;
}

static void route(unsigned pin, u32 low)
{
	ioapic(0x10 + 2 * pin, 1 << 16);
	ioapic(0x11 + 2 * pin, 0);
	ioapic(0x10 + 2 * pin, low);
}

static void ioapic_timers(void)
{
	section("PIT and HPET interrupts");
	handlers[VEC_IOAPIC] = on_timer;
	/* PIT channel 0, mode 2, 1 kHz: pin 2 */
	outb(0x43, 0x34);
	outb(0x40, 1193 & 0xff);
	outb(0x40, 1193 >> 8);
	bool enough = false, too_many = false;
	for (unsigned i = 0; i < TRIES && !enough; i++) {
		ticks = 0;
		route(2, VEC_IOAPIC);
		u64 t0 = rdtsc();
		sti();
		wait_us(15000);
		cli();
		route(2, 1 << 16);
		u64 most = muldiv(rdtsc() - t0, 1000, tsc_hz) + 2;
		enough = ticks >= 8;
		too_many |= ticks > most + 100; /* ticks that were late are made up for */
		let_in();
	}
	CHECK(enough);
	CHECK(!too_many);
	/* HPET timer 0, one-shot and periodic, on a pin that it says it can use */
	u64 caps = hpet(0x100) >> 32;
	unsigned pin = 0;
	for (unsigned p = 3; p < 24; p++)
		if (caps >> p & 1 && !pin)
			pin = p;
	CHECK(pin);
	u64 hz = 1000000000000000 / (hpet(0) >> 32);
	route(pin, VEC_IOAPIC);
	bool early = false;
	u64 best = ~0ull;
	for (unsigned i = 0; i < 10; i++) {
		*(volatile u64 *)(HPET + 0x100) = (u64)pin << 9;
		ticks = 0;
		u64 t0 = rdtsc();
		u64 at = hpet(0xf0) + hz / 1000;
		*(volatile u64 *)(HPET + 0x108) = at;
		*(volatile u64 *)(HPET + 0x100) = (u64)pin << 9 | 4;
		while (!ticks && hpet(0xf0) < at + hz / 5)
			let_in();
		if (!ticks)
			continue; /* the host was away for that millisecond: the match was over when the timer was switched on */
		u64 took = fired_at - t0;
		early |= took < tsc_hz / 1000 - tsc_hz / 100000;
		best = took < best ? took : best;
		CHECK_EQ(ticks, 1);
	}
	CHECK(!early);
	CHECK(best < tsc_hz / 400);
	enough = false;
	for (unsigned i = 0; i < TRIES && !enough; i++) {
		*(volatile u64 *)(HPET + 0x100) = (u64)pin << 9 | 1 << 3 | 1 << 6 | 4;
		*(volatile u64 *)(HPET + 0x108) = hpet(0xf0) + hz / 1000;
		*(volatile u64 *)(HPET + 0x108) = hz / 1000;
		ticks = 0;
		sti();
		wait_us(15000);
		cli();
		*(volatile u64 *)(HPET + 0x100) = 0;
		enough = ticks >= 8;
		let_in();
	}
	CHECK(enough);
	route(pin, 1 << 16);
}

void guest_main(void)
{
	clocks();
	lapic();
	ioapic_timers();
}
