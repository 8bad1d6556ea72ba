/* The I/O APIC (82093AA, and the EOI register of later ones): registers, edges, levels and their ends, destinations, the PIC behind pin 0. */
#include "pc.h"

const char guest_name[] = "ioapic";

enum { VEC = 0x61, VEC2 = 0x62, LEVEL = 1 << 15, MASKED = 1 << 16, LOGICAL = 1 << 11, REMOTE_IRR = 1 << 14 };

static u32 taken[2][256], nmis;
static void (*in_handler)(void);

static void nothing(void)
{
}

static void drop_10(void)
{
	line_down(10);
}

static void on_irq(struct frame *f)
{
	__atomic_fetch_add(&taken[cpu()][f->vector], 1, __ATOMIC_RELEASE);
	in_handler();
	apic_write(APIC_EOI, 0);
}

static void on_irq_no_eoi(struct frame *f)
{
	taken[cpu()][f->vector]++;
}

static void on_pic(struct frame *f)
{
	taken[cpu()][f->vector]++;
	line_down(10);
	outb(0xa0, 0x20);
	outb(0x20, 0x20);
}

static void on_nmi(struct frame *f)
{
	(void)f;
	__atomic_fetch_add(&nmis, 1, __ATOMIC_RELEASE);
}

static void forget(void)
{
	fill(taken, 0, sizeof(taken));
	nmis = 0;
}

static u32 entry(unsigned pin)
{
	return ioapic(0x10 + 2 * pin);
}

static bool bit_of(unsigned set, unsigned vector)
{
	return apic(set + vector / 32) >> (vector & 31) & 1;
}

static void registers(void)
{
	section("registers");
	u32 version = ioapic(1);
	CHECK((version & 0xff) >= 0x11 && (version & 0xff) <= 0x2f);
	unsigned pins = (version >> 16 & 0xff) + 1;
	CHECK(pins >= 24);
	ioapic_write(0, 0xffffffff);
	CHECK_EQ(ioapic(0), 0x0f000000);
	ioapic_write(0, 0x05000000);
	CHECK_EQ(ioapic(0), 0x05000000);
	ioapic_write(1, 0);
	CHECK_EQ(ioapic(1), version);
	ioapic_write(0, 0);
	for (unsigned pin = 0; pin < pins; pin++) {
		CHECK_EQ(entry(pin), MASKED);
		ioapic_write(0x11 + 2 * pin, 0xff000000);
		CHECK_EQ(ioapic(0x11 + 2 * pin), 0xff000000);
		/* status and remote IRR are not ours to write */
		ioapic_write(0x10 + 2 * pin, 0x0001ffff & ~0x700u);
		CHECK_EQ(entry(pin), 0x0001afff & ~0x700u);
		ioapic_write(0x10 + 2 * pin, MASKED);
		ioapic_write(0x11 + 2 * pin, 0);
	}
	/* none there: nothing happens */
	ioapic_write(0x10 + 2 * pins, 0x12345);
	CHECK_EQ(ioapic(0x10 + 2 * pins), 0);
	/* the register is chosen by the low byte */
	*(volatile u8 *)IOAPIC = 1;
	CHECK_EQ(*(volatile u32 *)(IOAPIC + 0x10), version);
	CHECK_EQ(*(volatile u32 *)IOAPIC & 0xff, 1);
}

static void edges(void)
{
	section("edges");
	in_handler = nothing;
	/* COM1, whose line stays up */
	forget();
	route_to(4, VEC, 0);
	com_up();
	let_in();
	CHECK_EQ(taken[0][VEC], 1);
	CHECK_EQ(entry(4), VEC);
	CHECK(!bit_of(APIC_TMR, VEC));
	ioapic_write(0x18, VEC | MASKED);
	ioapic_write(0x18, VEC); /* no new edge */
	let_in();
	CHECK_EQ(taken[0][VEC], 1);
	com_down();
	com_up();
	let_in();
	CHECK_EQ(taken[0][VEC], 2);
	/* one that came while the pin was masked is lost */
	ioapic_write(0x18, VEC | MASKED);
	com_down();
	com_up();
	ioapic_write(0x18, VEC);
	let_in();
	CHECK_EQ(taken[0][VEC], 2);
	com_down();
	/* made level-triggered while up: asks, until it goes down */
	com_up();
	let_in();
	CHECK_EQ(taken[0][VEC], 3);
	com_down();
	route_to(4, MASKED, 0);
	/* HPET in edge mode: one an event, nothing to quiet */
	route_to(10, VEC, 0);
	for (u32 i = 1; i <= 3; i++) {
		hpet_write(0x10, 1);
		hpet_write(0x100, 10 << 9 | 4);
		/* a match that was over when it arrived never comes: again, then, further off */
		for (u64 ahead = 2000; taken[0][VEC] < 3 + i && ahead < 1ull << 30; ahead *= 4) {
			u64 at = hpet(0xf0) + ahead;
			hpet_write(0x108, at);
			while (taken[0][VEC] < 3 + i && hpet(0xf0) < at + 3000000)
				let_in();
		}
		CHECK_EQ(taken[0][VEC], 3 + i);
	}
	hpet_write(0x100, 10 << 9);
	route_to(10, MASKED, 0);
}

static void levels(void)
{
	section("levels");
	forget();
	in_handler = drop_10;
	route_to(10, VEC | LEVEL, 0);
	for (u32 i = 1; i <= 3; i++) {
		line_up(10);
		CHECK(entry(10) & REMOTE_IRR);
		CHECK(bit_of(APIC_IRR, VEC) && bit_of(APIC_TMR, VEC));
		let_in();
		CHECK_EQ(taken[0][VEC], i);
		CHECK(!(entry(10) & REMOTE_IRR));
	}
	/* no second one before the EOI, and another after it while the line is up */
	handlers[VEC] = on_irq_no_eoi;
	forget();
	line_up(10);
	let_in();
	CHECK_EQ(taken[0][VEC], 1);
	CHECK(entry(10) & REMOTE_IRR);
	CHECK(!bit_of(APIC_IRR, VEC) && bit_of(APIC_ISR, VEC));
	apic_write(APIC_EOI, 0);
	CHECK(bit_of(APIC_IRR, VEC));
	CHECK(entry(10) & REMOTE_IRR);
	let_in();
	CHECK_EQ(taken[0][VEC], 2);
	/* gone before the EOI: that is the end of it; up again meanwhile: one more */
	line_down(10);
	CHECK(entry(10) & REMOTE_IRR);
	apic_write(APIC_EOI, 0);
	CHECK(!(entry(10) & REMOTE_IRR));
	let_in();
	CHECK_EQ(taken[0][VEC], 2);
	line_up(10);
	let_in();
	line_down(10);
	line_up(10);
	apic_write(APIC_EOI, 0);
	let_in();
	CHECK_EQ(taken[0][VEC], 4);
	line_down(10);
	apic_write(APIC_EOI, 0);
	/* masked: waits for the mask to go */
	ioapic_write(0x24, VEC | LEVEL | MASKED);
	line_up(10);
	let_in();
	CHECK_EQ(taken[0][VEC], 4);
	CHECK(!(entry(10) & REMOTE_IRR));
	ioapic_write(0x24, VEC | LEVEL);
	CHECK(entry(10) & REMOTE_IRR);
	let_in();
	CHECK_EQ(taken[0][VEC], 5);
	/* masked between request and EOI: the EOI still ends it */
	ioapic_write(0x24, VEC | LEVEL | MASKED);
	CHECK(entry(10) & REMOTE_IRR);
	apic_write(APIC_EOI, 0);
	CHECK(!(entry(10) & REMOTE_IRR));
	let_in();
	CHECK_EQ(taken[0][VEC], 5);
	/* edge and back forgets the request: what software without an EOI register does */
	ioapic_write(0x24, VEC | LEVEL);
	CHECK(entry(10) & REMOTE_IRR);
	let_in();
	line_down(10);
	ioapic_write(0x24, VEC | MASKED);
	CHECK(!(entry(10) & REMOTE_IRR));
	ioapic_write(0x24, VEC | LEVEL);
	CHECK(!(entry(10) & REMOTE_IRR));
	apic_write(APIC_EOI, 0);
	/* two pins, one vector: one EOI ends both */
	forget();
	route_to(11, VEC | LEVEL, 0);
	line_up(10);
	line_up(11);
	let_in();
	CHECK_EQ(taken[0][VEC], 1);
	CHECK(entry(10) & entry(11) & REMOTE_IRR);
	line_down(10);
	line_down(11);
	apic_write(APIC_EOI, 0);
	CHECK(!((entry(10) | entry(11)) & REMOTE_IRR));
	route_to(11, MASKED, 0);

	section("directed EOI");
	if (apic(APIC_VERSION) >> 24 & 1) {
		apic_write(APIC_SVR, 0x11ff); /* no broadcasts */
		forget();
		line_up(10);
		let_in();
		line_down(10);
		apic_write(APIC_EOI, 0);
		CHECK(!bit_of(APIC_ISR, VEC));
		CHECK(entry(10) & REMOTE_IRR);
		*(volatile u32 *)(IOAPIC + 0x40) = VEC2; /* not its vector */
		CHECK(entry(10) & REMOTE_IRR);
		*(volatile u32 *)(IOAPIC + 0x40) = VEC;
		CHECK(!(entry(10) & REMOTE_IRR));
		line_up(10);
		let_in();
		CHECK_EQ(taken[0][VEC], 2);
		*(volatile u32 *)(IOAPIC + 0x40) = VEC; /* still up: asks again */
		CHECK(entry(10) & REMOTE_IRR);
		line_down(10);
		apic_write(APIC_EOI, 0);
		let_in();
		CHECK_EQ(taken[0][VEC], 3);
		apic_write(APIC_EOI, 0);
		*(volatile u32 *)(IOAPIC + 0x40) = VEC;
		apic_write(APIC_SVR, 0x1ff);
	}
	CHECK(!(entry(10) & REMOTE_IRR));
	route_to(10, MASKED, 0);
	handlers[VEC] = on_irq;
}

/* --- where they go --- */

static bool comes(u32 *p, u32 n)
{
	u64 end = rdtsc() + 10 * tsc_hz();
	while (__atomic_load_n(p, __ATOMIC_ACQUIRE) < n && rdtsc() < end)
		let_in();
	return __atomic_load_n(p, __ATOMIC_ACQUIRE) == n;
}

static void destinations(void)
{
	section("destinations and delivery modes");
	in_handler = drop_10;
	standby_leave = standby_there = false;
	run_on(1, stand_by, NULL);
	while (!standby_there)
		pause();
	static const struct {
		u32 low, dest, who; /* who: 1, 2, 3; 4: one of them */
	} t[] = {
		{ VEC, 0, 1 }, { VEC, 1, 2 }, { VEC, 0xff, 3 }, { VEC | LOGICAL, 1, 1 }, { VEC | LOGICAL, 2, 2 }, { VEC | LOGICAL, 3, 3 },
		{ VEC | LOGICAL | 0x100, 3, 4 }, { VEC | 0x100, 1, 2 },
	};
	for (unsigned i = 0; i < sizeof(t) / sizeof(t[0]); i++) {
		forget();
		route_to(10, t[i].low | (i & 1 ? LEVEL : 0), t[i].dest);
		line_up(10);
		if (t[i].who == 4) {
			u64 end = rdtsc() + 10 * tsc_hz();
			while (!(taken[0][VEC] + __atomic_load_n(&taken[1][VEC], __ATOMIC_ACQUIRE)) && rdtsc() < end)
				let_in();
			wait_us(100);
			CHECK_EQ(taken[0][VEC] + taken[1][VEC], 1);
		} else {
			CHECK(comes(&taken[0][VEC], t[i].who & 1));
			CHECK(comes(&taken[1][VEC], t[i].who >> 1 & 1));
		}
		let_in();
		/* the EOI of the last one may still be on its way */
		u64 end = rdtsc() + 10 * tsc_hz();
		while (entry(10) & REMOTE_IRR && rdtsc() < end)
			pause();
		CHECK(!(entry(10) & REMOTE_IRR));
		line_down(10);
		route_to(10, MASKED, 0);
		let_in();
	}
	/* nobody there: an edge is gone; a level stays and finds who comes */
	forget();
	route_to(10, VEC | LEVEL, 9);
	line_up(10);
	let_in();
	CHECK_EQ(taken[0][VEC] + taken[1][VEC], 0);
	route_to(10, VEC | LEVEL, 0);
	let_in();
	CHECK_EQ(taken[0][VEC], 1);
	/* NMI, to the other */
	handlers[NMI] = on_nmi;
	forget();
	route_to(10, 0x400, 1);
	line_up(10);
	CHECK(comes(&nmis, 1));
	line_down(10);
	route_to(10, 0x400, 0);
	line_up(10);
	CHECK(comes(&nmis, 2));
	line_down(10);
	route_to(10, MASKED, 0);
	standby_leave = true;
	wait_for(1);
	/* vectors below 16 are an error of who receives them */
	apic_write(APIC_ESR, 0);
	route_to(10, 0x0e, 0);
	line_up(10);
	let_in();
	line_down(10);
	route_to(10, MASKED, 0);
	apic_write(APIC_ESR, 0);
	CHECK_EQ(apic(APIC_ESR), 0x40);
}

static void virtual_wire(void)
{
	section("the PIC behind pin 0");
	handlers[0x2a] = on_pic;
	forget();
	apic_write(APIC_LINT0, 0x10700);
	/* initialised again, as all line 10 did so far is an edge that waits there */
	pic_init(0xfb);
	route_to(0, 0x700, 0); /* ExtINT */
	for (u32 i = 1; i <= 3; i++) {
		line_up(10);
		let_in();
		CHECK_EQ(taken[0][0x2a], i);
	}
	outb(0x21, 0xff);
	outb(0xa1, 0xff);
	route_to(0, MASKED, 0);
	for (unsigned i = 0; i < 8; i++)
		CHECK_EQ(apic(APIC_ISR + i), 0);
}

void guest_main(void)
{
	handlers[VEC] = handlers[VEC2] = on_irq;
	start_cpus();
	registers();
	edges();
	levels();
	destinations();
	virtual_wire();
}
