/*
 * The local APIC of one processor: which registers there are in x2APIC and xAPIC mode, what faults, priorities, errors (SDM 3A chapter 10).
 * Its timer is timer.c's business, other processors ipi.c's.
 */
#include "pc.h"

const char guest_name[] = "lapic";

static u8 order[32];
static volatile unsigned orders;
static volatile bool end_it = true;

static void on_irq(struct frame *f)
{
	if (orders < sizeof(order))
		order[orders] = (u8)f->vector;
	orders++;
	if (end_it)
		apic_write(APIC_EOI, 0);
}

static bool bit_of(unsigned set, unsigned vector)
{
	return apic(set + vector / 32) >> (vector & 31) & 1;
}

static unsigned bits_of(unsigned set)
{
	unsigned n = 0;
	for (unsigned i = 0; i < 8; i++)
		for (u32 word = apic(set + i); word; word &= word - 1)
			n++;
	return n;
}

/* --- x2APIC: MSRs --- */

enum { NONE, R, W_, RW };

static unsigned x2_access(unsigned reg)
{
	switch (reg) {
	case APIC_ID:
	case APIC_VERSION:
	case APIC_PPR:
	case APIC_LDR:
	case APIC_ISR ... APIC_ISR + 7:
	case APIC_TMR ... APIC_TMR + 7:
	case APIC_IRR ... APIC_IRR + 7:
	case APIC_CURRENT:
		return R;
	case APIC_EOI:
	case APIC_SELF:
		return W_;
	case APIC_TPR:
	case APIC_SVR:
	case APIC_ESR:
	case APIC_ICR:
	case APIC_TIMER ... APIC_INITIAL:
	case APIC_DIVIDE:
		return RW;
	}
	return NONE;
}

static void x2apic_registers(void)
{
	section("x2APIC registers");
	u32 version = apic(APIC_VERSION);
	CHECK((version & 0xff) >= 0x10 && (version & 0xff) <= 0x1f);
	CHECK((version >> 16 & 0xff) >= 5);
	CHECK_EQ(apic(APIC_ID), 0);
	CHECK_EQ(apic(APIC_LDR), 1);
	for (unsigned reg = 0; reg < 0x100; reg++) {
		if (reg == 0x2f)
			continue; /* LVT CMCI: some have it */
		unsigned access = x2_access(reg);
		unsigned got = rdmsr_fault(0x800 + reg, NULL);
		if (got != (access & R ? 0 : GP))
			print("  (reading 0x8%x)\n", reg);
		CHECK_EQ(got, access & R ? 0 : GP);
		if (access == RW)
			continue;
		/* nothing that is not writable is; a vector to ourselves would come */
		got = reg == APIC_SELF ? 0 : wrmsr_fault(0x800 + reg, 0);
		if (got != (access & W_ ? 0 : GP))
			print("  (writing 0x8%x)\n", reg);
		CHECK_EQ(got, access & W_ ? 0 : GP);
	}
	section("x2APIC reserved bits");
	static const struct {
		u8 reg;
		u64 bad;
	} t[] = {
		{ APIC_TPR, 0x100 }, { APIC_TPR, 1ull << 32 }, { APIC_EOI, 1 }, { APIC_SVR, 0x5ff }, { APIC_SVR, 0x21ff }, { APIC_ESR, 1 }, { APIC_ICR, 1 << 13 | 0x40 },
		{ APIC_ICR, 1 << 16 | 0x40 }, { APIC_ICR, 1 << 20 | 0x40 }, { APIC_TIMER, 1 << 16 | 1 << 8 }, { APIC_TIMER, 1 << 16 | 1 << 19 },
		{ APIC_LINT0, 1 << 16 | 1 << 17 }, { APIC_LINT1, 1 << 16 | 1 << 11 }, { APIC_ERROR, 1 << 16 | 1 << 8 }, { APIC_INITIAL, 1ull << 32 },
		{ APIC_DIVIDE, 4 }, { APIC_DIVIDE, 1 << 4 }, { APIC_SELF, 0x141 },
	};
	for (unsigned i = 0; i < sizeof(t) / sizeof(t[0]); i++) {
		unsigned got = wrmsr_fault(0x800 + t[i].reg, t[i].bad);
		if (got != GP)
			print("  (0x8%x: 0x%lx)\n", t[i].reg, t[i].bad);
		CHECK_EQ(got, GP);
	}
	/* read-only bits that may be written */
	CHECK_EQ(wrmsr_fault(0x800 + APIC_LINT0, 1 << 16 | 1 << 12 | 1 << 14 | 0x44), 0);
	CHECK_EQ(apic(APIC_LINT0), 1 << 16 | 0x44);
	wrmsr(0x800 + APIC_LINT0, 1 << 16);
	/* what sticks */
	static const struct {
		u8 reg;
		u32 value;
	} s[] = {
		{ APIC_TPR, 0x5a }, { APIC_TPR, 0 }, { APIC_TIMER, 0x10051 }, { APIC_TIMER, 0x30052 }, { APIC_LINT1, 0x1a412 }, { APIC_LINT1, 0x10000 },
		{ APIC_ERROR, 0x10066 }, { APIC_DIVIDE, 0xa }, { APIC_SVR, 0x1e5 }, { APIC_SVR, 0x1ff },
	};
	for (unsigned i = 0; i < sizeof(s) / sizeof(s[0]); i++) {
		wrmsr(0x800 + s[i].reg, s[i].value);
		CHECK_EQ(rdmsr(0x800 + s[i].reg), s[i].value);
	}
	/* the ICR is one register of 64 bits; bit 12 is no state here */
	wrmsr(0x830, 0x1234567800000000 | 0x4041);
	CHECK_EQ(rdmsr(0x830), 0x1234567800004041);
	CHECK_EQ(bits_of(APIC_IRR), 0); /* nobody has that id */
}

static void modes(void)
{
	section("APIC_BASE");
	u64 base = rdmsr(0x1b);
	CHECK_EQ(base, XAPIC | 1 << 8 | 3 << 10);
	CHECK_EQ(wrmsr_fault(0x1b, base & ~(1ull << 10)), GP); /* x2APIC to xAPIC */
	CHECK_EQ(wrmsr_fault(0x1b, base & ~(1ull << 11)), GP); /* EXTD without EN */
	CHECK_EQ(wrmsr_fault(0x1b, base | 1), GP);
	CHECK_EQ(wrmsr_fault(0x1b, base | 1ull << 52), GP);
	wrmsr(0x808, 0x30);
	CHECK_EQ(wrmsr_fault(0x1b, base & ~(3ull << 10)), 0);
	u32 r[4];
	cpuid(1, 0, r);
	CHECK_EQ(r[3] >> 9 & 1, 0); /* CPUID shows that it is off */
	CHECK_EQ(rdmsr_fault(0x802, NULL), GP);
	CHECK_EQ(wrmsr_fault(0x1b, base), GP); /* off to x2APIC */
	CHECK_EQ(wrmsr_fault(0x1b, base & ~(1ull << 10)), 0);
	cpuid(1, 0, r);
	CHECK_EQ(r[3] >> 9 & 1, 1);
	CHECK_EQ(rdmsr_fault(0x802, NULL), GP); /* no MSRs in xAPIC mode */
	CHECK_EQ(xapic(APIC_TPR), 0);
	CHECK_EQ(xapic(APIC_SVR), 0xff);
	for (unsigned i = APIC_TIMER; i <= APIC_ERROR; i++)
		CHECK_EQ(xapic(i), 0x10000);
	xapic_write(APIC_SVR, 0x1ff);
}

/* --- xAPIC: the page --- */

static void xapic_registers(void)
{
	section("xAPIC registers");
	CHECK_EQ(xapic(APIC_ID), 0);
	CHECK_EQ(xapic(APIC_LDR), 0);
	CHECK_EQ(xapic(APIC_DFR), 0xffffffff);
	xapic_write(APIC_DFR, 0x0fffffff);
	CHECK_EQ(xapic(APIC_DFR), 0x0fffffff);
	xapic_write(APIC_DFR, 0xf0000000);
	CHECK_EQ(xapic(APIC_DFR), 0xffffffff);
	xapic_write(APIC_LDR, 0xa5123456);
	CHECK_EQ(xapic(APIC_LDR), 0xa5000000);
	static const struct {
		u8 reg;
		u32 value, kept;
	} t[] = {
		{ APIC_TPR, 0xffffff5a, 0x5a }, { APIC_TPR, 0, 0 }, { APIC_LINT0, 0x1ffff | 1 << 16, 0x1a7ff }, { APIC_ERROR, 0xffffffff, 0x100ff },
		{ APIC_DIVIDE, 0xfffffff6, 2 }, { APIC_ICR_HIGH, 0xffffffff, 0xff000000 }, { APIC_ICR_HIGH, 0x7f000000, 0x7f000000 },
	};
	for (unsigned i = 0; i < sizeof(t) / sizeof(t[0]); i++) {
		xapic_write(t[i].reg, t[i].value);
		CHECK_EQ(xapic(t[i].reg), t[i].kept);
	}
	xapic_write(APIC_LINT0, 0x10000);
	xapic_write(APIC_ERROR, 0x10000);
	/* software-disabled: entries are masked and stay so */
	xapic_write(APIC_LINT1, 0x400);
	xapic_write(APIC_SVR, 0xff);
	CHECK_EQ(xapic(APIC_LINT1), 0x10400);
	xapic_write(APIC_LINT1, 0x400);
	CHECK_EQ(xapic(APIC_LINT1), 0x10400);
	xapic_write(APIC_ICR_HIGH, 0);
	xapic_write(APIC_ICR, 0x4041);
	CHECK_EQ(bits_of(APIC_IRR), 0); /* nothing is accepted */
	xapic_write(APIC_SVR, 0x1ff);
	xapic_write(APIC_LINT1, 0x10000);
	/* an interrupt through the page, physical, logical, to itself */
	static const u32 icr[] = { 0x4041, 0x4842, 0x44043, 0x84044 };
	xapic_write(APIC_LDR, 0x04000000);
	for (unsigned i = 0; i < 4; i++) {
		xapic_write(APIC_ICR_HIGH, i == 1 ? 0x0c000000 : 0);
		orders = 0;
		xapic_write(APIC_ICR, icr[i]);
		CHECK_EQ(xapic(APIC_ICR) & 0x1000, 0); /* sent */
		CHECK(bit_of(APIC_IRR, icr[i] & 0xff));
		CHECK_EQ(bit_of(APIC_TMR, icr[i] & 0xff), 0);
		let_in();
		CHECK_EQ(orders, 1);
		CHECK_EQ(order[0], icr[i] & 0xff);
		CHECK_EQ(bits_of(APIC_IRR) + bits_of(APIC_ISR), 0);
	}
	xapic_write(APIC_LDR, 0);
}

/* --- priorities --- */

static void priorities(bool x2)
{
	section(x2 ? "priorities by MSR" : "priorities by page");
	/* IRR in, ISR on the way, highest first */
	end_it = false;
	orders = 0;
	static const u8 sent[] = { 0x41, 0x91, 0x63, 0x62, 0x9f, 0xef };
	for (unsigned i = 0; i < 6; i++) {
		if (x2)
			wrmsr(0x83f, sent[i]);
		else
			xapic_write(APIC_ICR, 0x44000 | sent[i]);
		CHECK(bit_of(APIC_IRR, sent[i]));
	}
	CHECK_EQ(bits_of(APIC_IRR), 6);
	CHECK_EQ(apic(APIC_PPR), 0);
	let_in();
	/* the highest one alone: others are not above it */
	CHECK_EQ(orders, 1);
	CHECK_EQ(order[0], 0xef);
	CHECK(bit_of(APIC_ISR, 0xef));
	CHECK_EQ(bits_of(APIC_IRR), 5);
	CHECK_EQ(apic(APIC_PPR), 0xe0);
	apic_write(APIC_EOI, 0);
	CHECK_EQ(bits_of(APIC_ISR), 0);
	let_in();
	CHECK_EQ(order[1], 0x9f);
	/* same class: waits */
	CHECK_EQ(orders, 2);
	CHECK_EQ(apic(APIC_PPR), 0x90);
	/* nested: a higher class interrupts, its EOI is the inner one's */
	apic_write(APIC_TPR, 0x20);
	CHECK_EQ(apic(APIC_PPR), 0x90);
	if (x2)
		wrmsr(0x83f, 0xa0);
	else
		xapic_write(APIC_ICR, 0x440a0);
	let_in();
	CHECK_EQ(orders, 3);
	CHECK_EQ(apic(APIC_PPR), 0xa0);
	CHECK_EQ(bits_of(APIC_ISR), 2);
	apic_write(APIC_EOI, 0);
	CHECK(!bit_of(APIC_ISR, 0xa0) && bit_of(APIC_ISR, 0x9f));
	apic_write(APIC_EOI, 0);
	CHECK_EQ(apic(APIC_PPR), 0x20);
	/* TPR: its class and those below are held back; CR8 is its upper half */
	end_it = true;
	apic_write(APIC_TPR, 0x65);
	u64 cr8;
	__asm__ volatile("mov %%cr8, %0" : "=r"(cr8));
	CHECK_EQ(cr8, 6);
	CHECK_EQ(apic(APIC_PPR), 0x65);
	let_in();
	CHECK_EQ(orders, 4);
	CHECK_EQ(order[3], 0x91);
	__asm__ volatile("mov %0, %%cr8" : : "r"(5ul));
	CHECK_EQ(apic(APIC_TPR), 0x50);
	let_in();
	CHECK_EQ(orders, 6);
	CHECK_EQ(order[4], 0x63);
	CHECK_EQ(order[5], 0x62);
	__asm__ volatile("mov %0, %%cr8" : : "r"(0ul));
	let_in();
	CHECK_EQ(orders, 7);
	CHECK_EQ(order[6], 0x41);
	/* twice the same is once; one in service and one waiting are two */
	orders = 0;
	for (unsigned i = 0; i < 3; i++)
		apic_write(x2 ? APIC_SELF : APIC_ICR, (x2 ? 0 : 0x44000) | 0x77);
	let_in();
	CHECK_EQ(orders, 1);
	end_it = false;
	apic_write(x2 ? APIC_SELF : APIC_ICR, (x2 ? 0 : 0x44000) | 0x77);
	let_in();
	apic_write(x2 ? APIC_SELF : APIC_ICR, (x2 ? 0 : 0x44000) | 0x77);
	CHECK(bit_of(APIC_ISR, 0x77) && bit_of(APIC_IRR, 0x77));
	end_it = true;
	apic_write(APIC_EOI, 0);
	let_in();
	CHECK_EQ(orders, 3);
	CHECK_EQ(bits_of(APIC_ISR) + bits_of(APIC_IRR), 0);
	/* an EOI too many does nothing */
	apic_write(APIC_EOI, 0);
	CHECK_EQ(bits_of(APIC_ISR), 0);
}

/* --- errors --- */

static u32 esr(void)
{
	apic_write(APIC_ESR, 0);
	return apic(APIC_ESR);
}

static void errors(bool x2)
{
	section(x2 ? "errors by MSR" : "errors by page");
	esr();
	CHECK_EQ(esr(), 0);
	orders = 0;
	apic_write(APIC_ERROR, 0x55);
	/* vectors 0 to 15 cannot be sent */
	if (x2)
		wrmsr(0x830, 0x400f);
	else
		xapic_write(APIC_ICR, 0x400f);
	CHECK_EQ(apic(APIC_ESR), 0); /* shown by the next write */
	CHECK_EQ(esr() & ~0x40u, 0x20);
	let_in();
	CHECK_EQ(orders, 1);
	CHECK_EQ(order[0], 0x55);
	CHECK_EQ(esr(), 0);
	if (x2) {
		wrmsr(0x83f, 5);
		CHECK_EQ(esr() & ~0x40u, 0x20);
	} else {
		/* a register that is none */
		(void)xapic(0x1);
		CHECK_EQ(esr(), 0x80);
		xapic_write(0x3, 0); /* and one that cannot be written: nothing happens */
		CHECK_EQ(xapic(APIC_VERSION) & 0xf0, 0x10);
	}
	let_in();
	CHECK_EQ(orders, 2);
	apic_write(APIC_ERROR, 0x10055);
	esr();
	wrmsr(0x1b, rdmsr(0x1b)); /* no change: nothing is lost */
	CHECK_EQ(apic(APIC_ERROR), 0x10055);
}

void guest_main(void)
{
	for (unsigned v = 0x30; v < 0xf0; v++)
		handlers[v] = on_irq;
	handlers[0xff] = on_irq;
	x2apic_registers();
	priorities(true);
	errors(true);
	modes();
	xapic_registers();
	priorities(false);
	errors(false);
	section("and back");
	to_x2apic();
	CHECK_EQ(rdmsr(0x802), 0);
	CHECK_EQ(rdmsr(0x80d), 1);
	wrmsr(0x83f, 0x88);
	orders = 0;
	let_in();
	CHECK_EQ(orders, 1);
}
