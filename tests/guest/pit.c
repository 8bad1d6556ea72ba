/* The 8254 (data sheet 231164) and the HPET (IA-PC HPET 1.0a): registers and modes. Rates are timer.c's. */
#include "pc.h"

const char guest_name[] = "pit";

enum { VEC = 0x61 };

static volatile unsigned ticks;

static void on_irq(struct frame *f)
{
	(void)f;
	ticks++;
	apic_write(APIC_EOI, 0);
}

/* --- PIT, channel 2: its gate is bit 0 of port 0x61, its output bit 5 --- */

static void gate(bool on)
{
	outb(0x61, on);
}

static bool out2(void)
{
	return inb(0x61) >> 5 & 1;
}

static void control(u8 word, u32 count)
{
	outb(0x43, word);
	outb(0x42, (u8)count);
	outb(0x42, (u8)(count >> 8));
}

static u16 count2(void)
{
	u8 low = inb(0x42);
	return (u16)(low | inb(0x42) << 8);
}

static u8 status2(void)
{
	outb(0x43, 0xe8);
	return inb(0x42);
}

/* Wait until the output is so; false if it takes seconds. */
static bool out2_becomes(bool level)
{
	u64 end = rdtsc() + 5 * tsc_hz();
	while (out2() != level)
		if (rdtsc() > end)
			return false;
	return true;
}

static void pit_registers(void)
{
	section("PIT: counts and status");
	gate(false);
	outb(0x43, 0xb0);
	CHECK_EQ(status2() & 0x7f, 0x70); /* null count: none is loaded yet */
	control(0xb0, 0x1234);
	wait_us(10);
	CHECK_EQ(status2(), 0x30); /* mode 0: OUT is low */
	CHECK_EQ(count2(), 0x1234); /* the gate holds it */
	CHECK_EQ(count2(), 0x1234);
	/* status and count at once: status first */
	outb(0x43, 0xc8);
	CHECK_EQ(inb(0x42), 0x30);
	CHECK_EQ(count2(), 0x1234);
	/* a latched count stays, and a second latch command is ignored until it is read */
	bool kept = false;
	for (unsigned i = 0; i < 20 && !kept; i++) { /* again where the host took so long that it wrapped */
		control(0xb0, 0xffff);
		gate(true);
		outb(0x43, 0x80);
		wait_us(100);
		outb(0x43, 0x80);
		u16 first = count2();
		outb(0x43, 0x80);
		u16 second = count2();
		kept = first >= second + 100; /* 119 ticks passed at least */
	}
	CHECK(kept);
	/* all modes in the status; modes 6 and 7 are 2 and 3 */
	gate(false);
	for (unsigned m = 0; m < 8; m++) {
		control((u8)(0xb0 | m << 1), 0x1000);
		CHECK_EQ(status2() & 0x0f, (m > 5 ? m - 4 : m) << 1);
	}
	/* one byte of it */
	outb(0x43, 0x90);
	outb(0x42, 0x56);
	wait_us(10);
	CHECK_EQ(status2() & 0x30, 0x10);
	CHECK_EQ(inb(0x42), 0x56);
	CHECK_EQ(inb(0x42), 0x56);
	outb(0x43, 0xa0);
	outb(0x42, 0x56);
	wait_us(10);
	CHECK_EQ(status2() & 0x30, 0x20);
	CHECK_EQ(inb(0x42), 0x56);
	/* BCD */
	control(0xb1, 0x9999);
	gate(true);
	bool digits = true;
	u16 last = 0x9999;
	for (unsigned i = 0; i < 50; i++) {
		outb(0x43, 0x80);
		u16 v = count2();
		digits &= (v & 15) < 10 && (v >> 4 & 15) < 10 && (v >> 8 & 15) < 10 && v >> 12 < 10;
		last = v < last ? v : last;
	}
	CHECK(digits);
	CHECK(last < 0x9999);
	section("PIT: port 0x61");
	outb(0x61, 0);
	CHECK_EQ(inb(0x61) & 0x0f, 0);
	outb(0x61, 0x0f);
	CHECK_EQ(inb(0x61) & 0x0f, 0x0f);
	outb(0x61, 0);
	/* the refresh bit goes on and off */
	unsigned changes = 0;
	u8 was = inb(0x61) & 16;
	u64 end = rdtsc() + 5 * tsc_hz();
	while (changes < 6 && rdtsc() < end) {
		u8 is = inb(0x61) & 16;
		changes += is != was;
		was = is;
	}
	CHECK_EQ(changes, 6);
}

static void pit_modes(void)
{
	section("PIT: modes");
	/* 0: low until the count is through, high then */
	gate(true);
	bool low = false;
	for (unsigned i = 0; i < 20 && !low; i++) {
		control(0xb0, 40000);
		low = !out2();
	}
	CHECK(low);
	CHECK(out2_becomes(true));
	/* the gate holds it up */
	gate(false);
	control(0xb0, 2000);
	wait_us(3000);
	CHECK(!out2());
	gate(true);
	CHECK(out2_becomes(true));
	/* 1: high; low from the gate's rise until the count is through; again at each rise */
	gate(false);
	control(0xb2, 40000);
	wait_us(100);
	CHECK(out2());
	unsigned lows = 0;
	for (unsigned i = 0; i < 20 && lows < 2; i++) {
		gate(true);
		wait_us(5);
		lows += !out2();
		gate(false); /* does not matter now */
		if (!out2_becomes(true))
			break;
	}
	CHECK_EQ(lows, 2);
	/* 2: high but for one tick */
	gate(true);
	control(0xb4, 10000);
	unsigned high = 0;
	for (unsigned i = 0; i < 100; i++)
		high += out2();
	CHECK(high > 50);
	outb(0x43, 0x80);
	CHECK(count2() <= 10000);
	gate(false);
	CHECK(out2());
	/* 3: half and half, counting by two */
	gate(true);
	control(0xb6, 2000);
	for (unsigned i = 0; i < 4; i++)
		CHECK(out2_becomes(i & 1));
	bool even = true;
	for (unsigned i = 0; i < 20; i++) {
		outb(0x43, 0x80);
		u16 v = count2();
		even &= !(v & 1) && v <= 2000;
	}
	CHECK(even);
	/* 4 and 5: high, whether triggered or not */
	control(0xb8, 60000);
	CHECK(out2());
	gate(false);
	control(0xba, 60000);
	CHECK(out2());
	gate(true);
	CHECK(out2());
	gate(false);
	section("PIT: channel 0");
	/* mode 0: its interrupt comes when the count is through, once, and not before */
	ticks = 0;
	route_to(2, 1 << 16, 0);
	outb(0x43, 0x30);
	outb(0x40, 0);
	route_to(2, VEC, 0);
	u64 start = rdtsc();
	outb(0x40, 16); /* 4096 */
	u64 end = start + 5 * tsc_hz();
	while (!ticks && rdtsc() < end)
		let_in();
	u64 took = rdtsc() - start;
	CHECK_EQ(ticks, 1);
	CHECK(took >= 4096 * (tsc_hz() / 1000) / 1193 * 99 / 100);
	wait_us(5000);
	let_in();
	CHECK_EQ(ticks, 1);
	route_to(2, 1 << 16, 0);
}

/* --- HPET --- */

enum { CAP = 0, CONFIG = 0x10, EVENTS = 0x20, COUNTER = 0xf0 };
#define T(n) (0x100 + 0x20 * (n))
enum { T_LEVEL = 2, T_ENABLE = 4, T_PERIODIC = 8, T_SET = 0x40, T_32 = 0x100 };

static bool tick_comes(unsigned n, unsigned us)
{
	u64 end = rdtsc() + us * (tsc_hz() / 1000000);
	while (ticks < n && rdtsc() < end)
		let_in();
	return ticks >= n;
}

static void hpet_registers(void)
{
	section("HPET: registers");
	u64 cap = hpet(CAP);
	CHECK((cap & 0xff) != 0);
	CHECK((cap >> 8 & 31) >= 2); /* three timers */
	CHECK(cap >> 13 & 1);	     /* 64 bits */
	CHECK(cap >> 15 & 1);	     /* legacy replacement */
	CHECK(cap >> 32 && cap >> 32 <= 100000000);
	hpet_write(CONFIG, 0);
	hpet_write(COUNTER, 0x123456789abcdef0);
	wait_us(20);
	CHECK_EQ(hpet(COUNTER), 0x123456789abcdef0);
	*(volatile u32 *)(HPET + COUNTER) = 0x11111111;
	CHECK_EQ(hpet(COUNTER), 0x1234567811111111);
	hpet_write(CONFIG, 1);
	wait_us(20);
	u64 v = hpet(COUNTER);
	CHECK(v > 0x1234567811111111 && v < 0x1234567911111111);
	hpet_write(CONFIG, 0);
	v = hpet(COUNTER);
	CHECK_EQ(hpet(COUNTER), v);
	hpet_write(CAP, 0);
	CHECK_EQ(hpet(CAP), cap);
	hpet_write(CONFIG, ~0ull);
	CHECK_EQ(hpet(CONFIG), 3);
	hpet_write(CONFIG, 0);
	for (unsigned n = 0; n < 3; n++) {
		u64 config = hpet(T(n));
		u32 routes = (u32)(config >> 32);
		CHECK(routes);
		CHECK(config >> 5 & 1);
		for (unsigned pin = 0; pin < 32; pin++) {
			hpet_write(T(n), (u64)pin << 9);
			CHECK_EQ((hpet(T(n)) >> 9 & 31) == pin, routes >> pin & 1 || pin == (hpet(T(n)) >> 9 & 31));
		}
		hpet_write(T(n), T_32);
		hpet_write(T(n) + 8, 0x1122334455667788);
		CHECK_EQ(hpet(T(n) + 8), 0x55667788);
		hpet_write(T(n), 0);
		hpet_write(T(n) + 8, ~0ull);
		CHECK_EQ(hpet(T(n) + 8), ~0ull);
	}
}

static void hpet_timers(void)
{
	section("HPET: matches");
	route_to(10, VEC, 0);
	hpet_write(CONFIG, 0);
	hpet_write(COUNTER, 1000);
	hpet_write(T(0), 10 << 9 | T_ENABLE);
	hpet_write(T(0) + 8, 100000); /* 1 ms from when it starts */
	ticks = 0;
	CHECK(!tick_comes(1, 3000)); /* it stands */
	hpet_write(CONFIG, 1);
	CHECK(tick_comes(1, 5000000));
	CHECK(hpet(COUNTER) >= 100000);
	CHECK(!tick_comes(2, 3000));
	/* one that is past does not come */
	hpet_write(T(0) + 8, hpet(COUNTER) - 1000);
	CHECK(!tick_comes(2, 3000));
	/* 32 bits: the counter's lower half meets it after its wrap */
	hpet_write(CONFIG, 0);
	hpet_write(COUNTER, 0xffff0000);
	hpet_write(T(0), 10 << 9 | T_ENABLE | T_32);
	hpet_write(T(0) + 8, 1000);
	ticks = 0;
	hpet_write(CONFIG, 1);
	CHECK(tick_comes(1, 5000000));
	CHECK(hpet(COUNTER) >= 0x100000000 + 1000);
	/* periodic: first match and period of their own; the comparator goes ahead */
	hpet_write(CONFIG, 0);
	hpet_write(COUNTER, 0);
	hpet_write(T(0), 10 << 9 | T_ENABLE | T_PERIODIC | T_SET);
	hpet_write(T(0) + 8, 500000);
	hpet_write(T(0) + 8, 200000);
	CHECK_EQ(hpet(T(0) + 8), 500000);
	ticks = 0;
	hpet_write(CONFIG, 1);
	CHECK(tick_comes(1, 5000000));
	CHECK(hpet(COUNTER) >= 500000);
	CHECK(tick_comes(3, 5000000));
	CHECK(hpet(COUNTER) >= 900000);
	u64 comparator = hpet(T(0) + 8);
	CHECK(comparator >= 700000 && comparator % 200000 == 100000);
	hpet_write(T(0), 10 << 9);
	let_in();
	section("HPET: status and levels");
	line_up(10);
	line_up(11);
	CHECK_EQ(hpet(EVENTS) & 7, 3);
	hpet_write(EVENTS, 4);
	CHECK_EQ(hpet(EVENTS) & 7, 3);
	hpet_write(EVENTS, 1);
	CHECK_EQ(hpet(EVENTS) & 7, 2);
	hpet_write(T(1), 11 << 9 | T_ENABLE); /* edges have no status */
	CHECK_EQ(hpet(EVENTS) & 7, 0);
	hpet_write(T(1), 11 << 9);
	hpet_write(T(0), 10 << 9);
	let_in();
	section("HPET: in the PIT's place");
	route_to(10, 1 << 16, 0);
	outb(0x43, 0x34); /* channel 0 at 1 kHz */
	outb(0x40, 0xa9);
	outb(0x40, 4);
	route_to(2, VEC, 0);
	ticks = 0;
	CHECK(tick_comes(2, 5000000));
	hpet_write(CONFIG, 3);
	let_in();
	ticks = 0;
	CHECK(!tick_comes(1, 5000)); /* the PIT is cut off */
	for (u64 ahead = 100000; !ticks && ahead < 1ull << 32; ahead *= 8) {
		hpet_write(T(0), 10 << 9 | T_ENABLE); /* the route does not count */
		hpet_write(T(0) + 8, hpet(COUNTER) + ahead);
		tick_comes(1, (unsigned)(ahead / 50));
	}
	CHECK(ticks >= 1);
	hpet_write(T(0), 10 << 9);
	let_in();
	hpet_write(CONFIG, 1);
	ticks = 0;
	CHECK(tick_comes(2, 5000000)); /* and back */
	route_to(2, 1 << 16, 0);
	outb(0x43, 0x30);
}

void guest_main(void)
{
	handlers[VEC] = on_irq;
	pit_registers();
	pit_modes();
	hpet_registers();
	hpet_timers();
}
