/* The pair of 8259As (data sheet 231468) behind the LAPIC's LINT0: programming, priorities, modes, polling, edges and levels. */
#include "pc.h"

const char guest_name[] = "pic";

enum { MASTER = 0x20, SLAVE = 0xa0, BASE = 0x20 };

static u8 order[32];
static volatile unsigned orders;
static void (*in_handler)(unsigned irq);

/* What a driver does: quiet the device. */
static void quiet(unsigned irq)
{
	switch (irq) {
	case 1:
		key_down();
		break;
	case 4:
		com_down();
		break;
	case 10:
	case 11:
		line_down(irq);
		break;
	}
}

static void nonspecific(unsigned irq)
{
	if (irq >= 8)
		outb(SLAVE, 0x20);
	outb(MASTER, 0x20);
}

static void quiet_and_end(unsigned irq)
{
	quiet(irq);
	nonspecific(irq);
}

static void quiet_the_third(unsigned irq)
{
	if (orders == 4)
		quiet(irq);
	nonspecific(irq);
}

static void on_irq(struct frame *f)
{
	unsigned irq = (unsigned)f->vector - BASE;
	if (orders < sizeof(order))
		order[orders] = (u8)irq;
	orders++;
	in_handler(irq);
}

static void mask(unsigned m)
{
	outb(MASTER + 1, (u8)m);
	outb(SLAVE + 1, (u8)(m >> 8));
}

#define ONLY(irq) (0xffffu & ~(1u << (irq)) & ~4u)

static void setup(u8 icw4_master, u8 icw4_slave)
{
	outb(MASTER, 0x11);
	outb(MASTER + 1, BASE);
	outb(MASTER + 1, 4);
	outb(MASTER + 1, icw4_master);
	outb(SLAVE, 0x11);
	outb(SLAVE + 1, BASE + 8);
	outb(SLAVE + 1, 2);
	outb(SLAVE + 1, icw4_slave);
	mask(0xffff);
}

static unsigned both(u8 ocw3)
{
	outb(MASTER, ocw3);
	outb(SLAVE, ocw3);
	return inb(MASTER) | (unsigned)inb(SLAVE) << 8;
}

static unsigned irr(void)
{
	return both(0x0a);
}

static unsigned isr(void)
{
	return both(0x0b);
}

static bool came(unsigned n, u32 first, u32 second, u32 third)
{
	const u32 want[] = { first, second, third };
	bool ok = orders == n;
	for (unsigned i = 0; i < n && i < 3; i++)
		ok &= order[i] == want[i];
	return ok;
}

static void programming(void)
{
	section("programming");
	setup(1, 1);
	CHECK_EQ(inb(MASTER + 1), 0xff);
	CHECK_EQ(inb(SLAVE + 1), 0xff);
	mask(0x5aa5);
	CHECK_EQ(inb(MASTER + 1), 0xa5);
	CHECK_EQ(inb(SLAVE + 1), 0x5a);
	outb(MASTER, 0x11); /* ICW1 clears the mask */
	outb(MASTER + 1, BASE);
	outb(MASTER + 1, 4);
	outb(MASTER + 1, 1);
	CHECK_EQ(inb(MASTER + 1), 0);
	mask(0xffff);
	CHECK_EQ(irr() & 0x0c12, 0);
	CHECK_EQ(isr(), 0);
	/* edge or level: which inputs can be */
	outb(0x4d0, 0xff);
	outb(0x4d1, 0xff);
	CHECK_EQ(inb(0x4d0), 0xf8);
	CHECK_EQ(inb(0x4d1), 0xde);
	outb(0x4d0, 0);
	outb(0x4d1, 0);
	CHECK_EQ(inb(0x4d0) | inb(0x4d1), 0);
}

static void basic(void)
{
	section("requests and acknowledges");
	setup(1, 1);
	in_handler = quiet_and_end;
	static const u8 irqs[] = { 1, 4, 10, 11 };
	for (unsigned i = 0; i < 4; i++) {
		unsigned n = irqs[i], bit = 1u << n;
		orders = 0;
		n == 1 ? key_up() : n == 4 ? com_up() : line_up(n);
		CHECK_EQ(irr() & bit, bit); /* masked ones are seen, too */
		let_in();
		CHECK_EQ(orders, 0);
		mask(ONLY(n));
		let_in();
		CHECK(came(1, n, 0, 0));
		CHECK_EQ(isr(), 0);
		CHECK_EQ(irr() & bit, 0);
		mask(0xffff);
	}
	/* in service until EOI, the cascade too */
	in_handler = quiet;
	orders = 0;
	mask(ONLY(10));
	line_up(10);
	let_in();
	CHECK_EQ(orders, 1);
	CHECK_EQ(isr(), 1 << 10 | 1 << 2);
	outb(MASTER, 0x62); /* specific: IR2 */
	CHECK_EQ(isr(), 1 << 10);
	line_up(10); /* the slave's own in service holds it back */
	let_in();
	CHECK_EQ(orders, 1);
	outb(SLAVE, 0x62);
	let_in();
	CHECK_EQ(orders, 2);
	nonspecific(10);
	CHECK_EQ(isr(), 0);
	mask(0xffff);
}

static void raise_all(void)
{
	mask(0xffff);
	orders = 0;
	line_up(11);
	line_up(10);
	key_up();
	com_up();
}

static void priorities(void)
{
	section("priorities");
	setup(1, 1);
	in_handler = quiet_and_end;
	raise_all();
	mask(0xffff & ~(1u << 1 | 1u << 4 | 1u << 10 | 1u << 11 | 4));
	let_in();
	CHECK(came(4, 1, 10, 11));
	CHECK_EQ(order[3], 4);
	/* nesting: what is in service holds back its like and those below */
	in_handler = quiet;
	raise_all();
	mask(ONLY(10) & ONLY(4));
	let_in();
	CHECK(came(1, 10, 0, 0));
	mask(ONLY(10) & ONLY(4) & ONLY(11));
	let_in();
	CHECK_EQ(orders, 1);
	mask(ONLY(10) & ONLY(4) & ONLY(11) & ONLY(1));
	let_in();
	CHECK(came(2, 10, 1, 0));
	CHECK_EQ(isr(), 1 << 10 | 1 << 2 | 1 << 1);
	outb(MASTER, 0x20); /* the highest: IR1 */
	CHECK_EQ(isr(), 1 << 10 | 1 << 2);
	nonspecific(10);
	let_in();
	CHECK(came(3, 10, 1, 11));
	nonspecific(11);
	let_in();
	CHECK_EQ(orders, 4);
	CHECK_EQ(order[3], 4);
	nonspecific(4);
	CHECK_EQ(isr(), 0);
	/* rotation: IR3 the lowest, so IR4 is first, then IR1, then the slave */
	in_handler = quiet_and_end;
	outb(MASTER, 0xc0 | 3);
	raise_all();
	mask(ONLY(10) & ONLY(4) & ONLY(1));
	let_in();
	CHECK(came(3, 4, 1, 10));
	/* and by itself, on EOI: who was served is last. IR7 last; IR1, served, goes there: then IR2 before IR1 */
	outb(MASTER, 0xc0 | 7);
	in_handler = quiet;
	raise_all();
	mask(ONLY(1));
	let_in();
	CHECK(came(1, 1, 0, 0));
	outb(MASTER, 0xa0); /* rotate on non-specific EOI */
	key_up();
	in_handler = quiet_and_end;
	mask(ONLY(1) & ONLY(10) & ONLY(11) & ONLY(4));
	let_in();
	CHECK_EQ(orders, 5);
	CHECK(order[1] == 10 && order[2] == 11 && order[3] == 4 && order[4] == 1);
	outb(MASTER, 0xc0 | 7);
	mask(0xffff);
}

static void modes(void)
{
	section("automatic EOI");
	setup(3, 3);
	in_handler = quiet;
	raise_all();
	mask(ONLY(10) & ONLY(4) & ONLY(1));
	let_in();
	CHECK(came(3, 1, 10, 4));
	CHECK_EQ(isr(), 0);
	quiet(11);
	section("special mask");
	setup(1, 1);
	raise_all();
	mask(ONLY(1));
	let_in();
	CHECK(came(1, 1, 0, 0)); /* in service */
	mask(ONLY(4));
	let_in();
	CHECK_EQ(orders, 1);
	outb(MASTER, 0x68); /* on: masked IR1 inhibits no more */
	mask(ONLY(4));
	outb(MASTER + 1, (u8)(ONLY(4) | 2));
	let_in();
	CHECK(came(2, 1, 4, 0));
	CHECK_EQ(isr() & 0xff, 0x12);
	outb(MASTER, 0x64);
	outb(MASTER, 0x61);
	outb(MASTER, 0x48); /* off */
	CHECK_EQ(isr(), 0);
	quiet(10);
	quiet(11);
	mask(0xffff);
	section("special fully nested");
	setup(0x11, 1);
	in_handler = quiet;
	orders = 0;
	line_up(11);
	mask(ONLY(11) & ONLY(10));
	let_in();
	CHECK(came(1, 11, 0, 0));
	line_up(10); /* higher in the slave: the master lets it through although IR2 is in service */
	let_in();
	CHECK(came(2, 11, 10, 0));
	outb(SLAVE, 0x62);
	CHECK_EQ(isr(), 1 << 11 | 1 << 2);
	outb(SLAVE, 0x63);
	outb(MASTER, 0x62);
	mask(0xffff);
}

static void polling(void)
{
	section("polling");
	setup(1, 1);
	outb(MASTER, 0x0c);
	CHECK_EQ(inb(MASTER) & 0x80, 0);
	raise_all();
	mask(ONLY(10) & ONLY(1) & ONLY(4));
	outb(MASTER, 0x0c);
	CHECK_EQ(inb(MASTER) & 0x87, 0x81);
	CHECK_EQ(isr() & 0xff, 2); /* the read was the acknowledge */
	quiet(1);
	outb(MASTER, 0x20);
	outb(MASTER, 0x0c);
	CHECK_EQ(inb(MASTER) & 0x87, 0x82); /* ask the slave */
	outb(SLAVE, 0x0c);
	CHECK_EQ(inb(SLAVE) & 0x87, 0x82);
	quiet(10);
	nonspecific(10);
	outb(MASTER, 0x0c);
	CHECK_EQ(inb(MASTER) & 0x87, 0x84);
	quiet(4);
	outb(MASTER, 0x20);
	outb(MASTER, 0x0c);
	CHECK_EQ(inb(MASTER) & 0x80, 0);
	quiet(11);
	let_in();
	CHECK_EQ(orders, 0);
	mask(0xffff);
}

static void edges_and_levels(void)
{
	section("edges and levels");
	setup(1, 1);
	in_handler = nonspecific;
	orders = 0;
	/* edge: a line that stays up asks once */
	mask(ONLY(10));
	line_up(10);
	let_in();
	CHECK_EQ(orders, 1);
	CHECK(line_is_up(10));
	/* ICW1 forgets edges: a line that is up does not ask anew */
	setup(1, 1);
	mask(ONLY(10));
	let_in();
	CHECK_EQ(orders, 1);
	line_down(10);
	line_up(10);
	let_in();
	CHECK_EQ(orders, 2);
	line_down(10);
	/* level: asks while it is up */
	outb(0x4d1, 4);
	CHECK_EQ(inb(0x4d1), 4);
	in_handler = quiet_and_end;
	orders = 0;
	line_up(10);
	let_in();
	CHECK_EQ(orders, 1);
	in_handler = quiet_the_third;
	line_up(10);
	let_in();
	CHECK_EQ(orders, 4);
	mask(0xffff);
	line_up(10);
	CHECK_EQ(irr() & 1 << 10, 1 << 10);
	line_down(10);
	CHECK_EQ(irr() & 1 << 10, 0); /* no edge is kept */
	unsigned n = orders;
	mask(ONLY(10));
	let_in();
	CHECK_EQ(orders, n);
	outb(0x4d1, 0);
	/* a mask, LINT0's and the processor's */
	line_up(10);
	apic_write(APIC_LINT0, 0x10700);
	let_in();
	CHECK_EQ(orders, n);
	in_handler = quiet_and_end;
	apic_write(APIC_LINT0, 0x700);
	let_in();
	CHECK_EQ(orders, n + 1);
	/* the LAPIC knows nothing of these: no EOI, no TPR */
	__asm__ volatile("mov %0, %%cr8" : : "r"(15ul));
	line_up(10);
	let_in();
	CHECK_EQ(orders, n + 2);
	__asm__ volatile("mov %0, %%cr8" : : "r"(0ul));
	for (unsigned i = 0; i < 8; i++)
		CHECK_EQ(apic(APIC_ISR + i), 0);
	CHECK_EQ(isr(), 0);
	mask(0xffff);
}

void guest_main(void)
{
	for (unsigned v = BASE; v < BASE + 16; v++)
		handlers[v] = on_irq;
	apic_write(APIC_LINT0, 0x700);
	programming();
	basic();
	priorities();
	modes();
	polling();
	edges_and_levels();
}
