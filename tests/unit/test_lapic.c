/*
 * The LAPIC and the wiring of PIC, IOAPIC and LAPICs: priorities, messages and destinations, modes, timers, EOI.
 * This program has its own clock and timers (they take the place of the library's), so time stands where it is put.
 */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/clock.h"
#include "irqchip/irqchip.h"
#include "vm/bus.h"

/* --- time --- */

#define TSC_HZ 2500000000ull
#define TSC_BASE 1000000ull

static uint64_t now_ns;
static struct vtimer *armed[16];

uint64_t clock_ns(void)
{
	return now_ns;
}

uint64_t clock_tsc_hz(void)
{
	return TSC_HZ;
}

uint64_t clock_ns_to_tsc(uint64_t ns)
{
	return TSC_BASE + clock_muldiv(ns, TSC_HZ, NS_PER_SEC);
}

void vtimer_init(struct vtimer *t, struct loop *loop, void (*fn)(void *opaque), void *opaque)
{
	*t = (struct vtimer){ .loop = loop, .fn = fn, .opaque = opaque, .slot = -1 };
}

void vtimer_cancel(struct vtimer *t)
{
	if (t->slot >= 0)
		armed[t->slot] = NULL;
	t->slot = -1;
}

void vtimer_arm(struct vtimer *t, uint64_t deadline_ns)
{
	vtimer_cancel(t);
	t->deadline = deadline_ns;
	for (t->slot = 0; armed[t->slot]; t->slot++)
		;
	armed[t->slot] = t;
}

/* What irqchip/irqfd.c refers to, and nothing here calls. */
int loop_add_fd(struct loop *loop, int fd, uint32_t events, void (*fn)(void *opaque, uint32_t revents), void *opaque)
{
	(void)loop, (void)fd, (void)events, (void)fn, (void)opaque;
	return -ENOSYS;
}

void loop_del_fd(struct loop *loop, int fd)
{
	(void)loop, (void)fd;
}

/* Let time pass at once to `ns`, then run each timer that is due once (again if it arms itself for the past). */
static void advance_to(uint64_t ns)
{
	now_ns = ns;
	for (int i = 0; i < 16; i++) {
		struct vtimer *t = armed[i];
		if (t && t->deadline <= now_ns) {
			vtimer_cancel(t);
			t->fn(t->opaque);
			i = -1;
		}
	}
}

/* --- a chip and what its CPUs saw --- */

struct cpu {
	_Atomic int kicks;
	int nmis, inits, sipis;
	uint8_t sipi_vector;
};

struct fixture {
	pthread_mutex_t lock;
	struct irqchip *chip;
	struct cpu cpu[20];
	struct lapic *l[20];
};

static void cpu_kick(void *opaque)
{
	((struct cpu *)opaque)->kicks++;
}

static void cpu_nmi(void *opaque)
{
	((struct cpu *)opaque)->nmis++;
}

static void cpu_init(void *opaque)
{
	((struct cpu *)opaque)->inits++;
}

static void cpu_sipi(void *opaque, uint8_t vector)
{
	struct cpu *c = opaque;
	c->sipis++;
	c->sipi_vector = vector;
}

static const struct lapic_cpu_ops cpu_ops = { cpu_kick, cpu_nmi, cpu_init, cpu_sipi };

static void enable(struct lapic *l)
{
	lapic_mmio_write(l, 0xf0, 4, 0x1ff);
}

static void to_x2apic(struct lapic *l)
{
	uint64_t base;
	assert_int_equal(lapic_rdmsr(l, MSR_APIC_BASE, &base), 0);
	assert_int_equal(lapic_wrmsr(l, MSR_APIC_BASE, base | APIC_BASE_EXTD), 0);
}

static void build(struct fixture *f, unsigned n)
{
	memset(f, 0, sizeof(*f));
	memset(armed, 0, sizeof(armed));
	now_ns = 1000000;
	pthread_mutex_init(&f->lock, NULL);
	assert_int_equal(irqchip_create(&f->chip, n, NULL, &f->lock, NULL), 0);
	for (unsigned i = 0; i < n; i++) {
		f->l[i] = irqchip_lapic(f->chip, i);
		lapic_attach(f->l[i], &cpu_ops, &f->cpu[i]);
		enable(f->l[i]);
	}
}

static void drop(struct fixture *f)
{
	irqchip_destroy(f->chip);
	pthread_mutex_destroy(&f->lock);
}

static int fixed(struct fixture *f, uint32_t dest, uint8_t vector)
{
	struct apic_msg msg = { .dest = dest, .vector = vector };
	return lapic_send(&f->chip->apics, &msg);
}

static void eoi(struct lapic *l)
{
	lapic_mmio_write(l, 0xb0, 4, 0);
}

static uint32_t reg(struct lapic *l, uint32_t offset)
{
	return (uint32_t)lapic_mmio_read(l, offset, 4);
}

static uint64_t msr(struct lapic *l, uint32_t index)
{
	uint64_t value = 0xdead;
	assert_int_equal(lapic_rdmsr(l, index, &value), 0);
	return value;
}

/* --- tests --- */

static void reset_values(void **state)
{
	(void)state;
	struct fixture f;
	build(&f, 2);
	struct lapic *l = f.l[1];
	lapic_reset(l, false);
	assert_int_equal(reg(l, 0x20), 1u << 24);
	assert_int_equal(reg(l, 0x30), 0x01050014);
	assert_int_equal(reg(l, 0xe0), 0xffffffff);
	assert_int_equal(reg(l, 0xf0), 0xff);
	for (uint32_t r = 0x320; r <= 0x370; r += 0x10)
		assert_int_equal(reg(l, r), 0x10000);
	assert_int_equal(msr(l, MSR_APIC_BASE), 0xfee00800);
	assert_int_equal(msr(f.l[0], MSR_APIC_BASE), 0xfee00900);
	assert_int_equal(fixed(&f, 1, 0x40), 0); /* software-disabled: takes nothing */
	lapic_mmio_write(l, 0x350, 4, 0x700);
	assert_int_equal(reg(l, 0x350), 0x10700); /* and its LVT stays masked */
	drop(&f);
}

static void priorities(void **state)
{
	(void)state;
	struct fixture f;
	build(&f, 1);
	struct lapic *l = f.l[0];
	assert_int_equal(lapic_ack(l), -1);
	assert_int_equal(fixed(&f, 0, 0x41), 1);
	assert_true(lapic_pending(l));
	assert_int_equal(f.cpu[0].kicks, 1);
	fixed(&f, 0, 0x81);
	fixed(&f, 0, 0x4f);
	assert_int_equal(f.cpu[0].kicks, 1); /* it knows already */
	assert_int_equal(reg(l, 0x220), 0x8002);
	assert_int_equal(lapic_ack(l), 0x81);
	assert_int_equal(reg(l, 0xa0), 0x80);
	assert_false(lapic_pending(l)); /* class 4 waits for class 8 */
	fixed(&f, 0, 0x8f);
	assert_false(lapic_pending(l)); /* so does the same class */
	fixed(&f, 0, 0x90);
	assert_int_equal(f.cpu[0].kicks, 2);
	assert_int_equal(lapic_ack(l), 0x90);
	eoi(l); /* ends 0x90, the highest in service */
	assert_false(lapic_pending(l));
	eoi(l);
	assert_int_equal(f.cpu[0].kicks, 3);
	assert_int_equal(lapic_ack(l), 0x8f);
	eoi(l);
	assert_int_equal(lapic_ack(l), 0x4f);
	eoi(l);
	assert_int_equal(lapic_ack(l), 0x41);
	eoi(l);
	eoi(l);
	assert_int_equal(lapic_ack(l), -1);
	drop(&f);
}

static void task_priority(void **state)
{
	(void)state;
	struct fixture f;
	build(&f, 1);
	struct lapic *l = f.l[0];
	lapic_mmio_write(l, 0x80, 4, 0x45);
	assert_int_equal(reg(l, 0xa0), 0x45);
	assert_int_equal(lapic_get_cr8(l), 4);
	fixed(&f, 0, 0x4f);
	assert_false(lapic_pending(l));
	lapic_set_cr8(l, 3);
	assert_int_equal(reg(l, 0x80), 0x30);
	assert_true(lapic_pending(l));
	assert_int_equal(f.cpu[0].kicks, 1);
	lapic_set_cr8(l, 15);
	assert_int_equal(lapic_ack(l), -1); /* it went away */
	lapic_set_cr8(l, 0);
	assert_int_equal(lapic_ack(l), 0x4f);
	lapic_set_cr8(l, 9);
	assert_int_equal(reg(l, 0xa0), 0x90); /* the greater of task and in-service */
	lapic_set_cr8(l, 2);
	assert_int_equal(reg(l, 0xa0), 0x40);
	drop(&f);
}

static void physical_destinations(void **state)
{
	(void)state;
	struct fixture f;
	build(&f, 4);
	assert_int_equal(fixed(&f, 2, 0x50), 1);
	assert_int_equal(lapic_ack(f.l[2]), 0x50);
	assert_false(lapic_pending(f.l[1]));
	assert_int_equal(fixed(&f, 9, 0x50), 0);
	assert_int_equal(fixed(&f, APIC_BROADCAST, 0x51), 4);
	for (int i = 0; i < 4; i++)
		assert_int_equal(lapic_ack(f.l[i]), i == 2 ? -1 : 0x51);
	drop(&f);
}

static void logical_destinations(void **state)
{
	(void)state;
	struct fixture f;
	build(&f, 4);
	struct apic_msg msg = { .logical = true, .vector = 0x60, .dest = 0x05 };
	for (unsigned i = 0; i < 4; i++)
		lapic_mmio_write(f.l[i], 0xd0, 4, 1u << (24 + i)); /* flat */
	assert_int_equal(lapic_send(&f.chip->apics, &msg), 2);
	assert_true(lapic_pending(f.l[0]));
	assert_false(lapic_pending(f.l[1]));
	assert_true(lapic_pending(f.l[2]));
	/* Cluster model: cluster in the high four bits, members in the low four. */
	for (unsigned i = 0; i < 4; i++) {
		lapic_mmio_write(f.l[i], 0xe0, 4, 0);
		assert_int_equal(reg(f.l[i], 0xe0), 0x0fffffff);
		lapic_mmio_write(f.l[i], 0xd0, 4, ((i / 2) << 4 | 1u << (i & 1)) << 24);
	}
	msg.vector = 0x61;
	msg.dest = 0x13;
	assert_int_equal(lapic_send(&f.chip->apics, &msg), 2);
	assert_true(reg(f.l[2], 0x230) & 2);
	assert_true(reg(f.l[3], 0x230) & 2);
	assert_false(reg(f.l[1], 0x230) & 2);
	drop(&f);
}

static void x2apic_destinations(void **state)
{
	(void)state;
	struct fixture f;
	build(&f, 18);
	for (int i = 0; i < 18; i++)
		to_x2apic(f.l[i]);
	assert_int_equal(msr(f.l[17], 0x802), 17);
	assert_int_equal(msr(f.l[17], 0x80d), 0x00010002);
	/* ICR, logical, cluster 1, members 0 and 1; fixed 0x70. */
	assert_int_equal(lapic_wrmsr(f.l[0], 0x830, 0x0001000300000870ull), 0);
	assert_int_equal(msr(f.l[0], 0x830), 0x0001000300000870ull);
	assert_int_equal(lapic_ack(f.l[16]), 0x70);
	assert_int_equal(lapic_ack(f.l[17]), 0x70);
	for (int i = 0; i < 16; i++)
		assert_false(lapic_pending(f.l[i]));
	/* Physical, 32 bits; broadcast. */
	lapic_wrmsr(f.l[0], 0x830, 0x0000000500000071ull);
	assert_int_equal(lapic_ack(f.l[5]), 0x71);
	lapic_wrmsr(f.l[0], 0x830, 0x0000010500000071ull);
	lapic_wrmsr(f.l[0], 0x830, 0xffffffff000000f0ull);
	for (int i = 0; i < 18; i++)
		assert_int_equal(lapic_ack(f.l[i]), 0xf0);
	/* An 8-bit all-ones destination of an MSI means everyone, too. */
	irqchip_msi(f.chip, 0xfeeff000, 0xf9);
	irqchip_msi(f.chip, 0xfeb00000, 0xfa);
	for (int i = 0; i < 18; i++)
		assert_false(lapic_pending(f.l[i])); /* same class as what is in service */
	assert_true(msr(f.l[3], 0x827) & 1u << 25);
	assert_false(msr(f.l[3], 0x827) & 1u << 26);
	drop(&f);
}

static void x2apic_faults(void **state)
{
	(void)state;
	struct fixture f;
	uint64_t value;
	build(&f, 1);
	struct lapic *l = f.l[0];
	assert_int_equal(lapic_rdmsr(l, 0x802, &value), -EPERM); /* xAPIC mode */
	assert_true(lapic_owns_gpa(l, 0xfee000f0));
	to_x2apic(l);
	assert_false(lapic_owns_gpa(l, 0xfee000f0));
	assert_int_equal(lapic_wrmsr(l, 0x802, 0), -EPERM);	/* read-only */
	assert_int_equal(lapic_rdmsr(l, 0x80b, &value), -EPERM); /* write-only */
	assert_int_equal(lapic_wrmsr(l, 0x80b, 1), -EPERM);	/* must be zero */
	assert_int_equal(lapic_wrmsr(l, 0x80b, 0), 0);
	assert_int_equal(lapic_rdmsr(l, 0x80e, &value), -EPERM); /* no DFR */
	assert_int_equal(lapic_rdmsr(l, 0x831, &value), -EPERM); /* ICR is one register */
	assert_int_equal(lapic_wrmsr(l, 0x80f, 0x1ffffull), -EPERM);
	assert_int_equal(lapic_wrmsr(l, 0x808, 1ull << 32), -EPERM);
	assert_int_equal(lapic_wrmsr(l, 0x83e, 4), -EPERM);
	assert_int_equal(lapic_wrmsr(l, 0x828, 1), -EPERM);
	assert_int_equal(lapic_rdmsr(l, 0x83f, &value), -EPERM);
	assert_int_equal(lapic_wrmsr(l, 0x83f, 0x55), 0); /* self IPI */
	assert_int_equal(lapic_ack(l), 0x55);
	assert_int_equal(lapic_rdmsr(l, 0x840, &value), -ENOENT);
	assert_int_equal(lapic_rdmsr(l, 0x10, &value), -ENOENT);
	drop(&f);
}

static void mode_transitions(void **state)
{
	(void)state;
	struct fixture f;
	build(&f, 1);
	struct lapic *l = f.l[0];
	uint64_t x = 0xfee00900, x2 = x | APIC_BASE_EXTD, off = x & ~APIC_BASE_EN;
	assert_int_equal(lapic_wrmsr(l, MSR_APIC_BASE, off | APIC_BASE_EXTD), -EPERM);
	assert_int_equal(lapic_wrmsr(l, MSR_APIC_BASE, x | 1), -EPERM);
	assert_int_equal(lapic_wrmsr(l, MSR_APIC_BASE, x2), 0);
	assert_int_equal(msr(l, 0x80f), 0x1ff); /* state carries over */
	assert_int_equal(lapic_wrmsr(l, MSR_APIC_BASE, x), -EPERM);
	lapic_reset(l, true);
	assert_int_equal(msr(l, MSR_APIC_BASE), x2); /* INIT keeps the mode */
	assert_int_equal(msr(l, 0x80f), 0xff);
	assert_int_equal(lapic_wrmsr(l, MSR_APIC_BASE, off), 0);
	assert_int_equal(lapic_wrmsr(l, MSR_APIC_BASE, x2), -EPERM);
	assert_int_equal(fixed(&f, 0, 0x40), 0);
	assert_false(lapic_owns_gpa(l, 0xfee00000));
	assert_int_equal(lapic_wrmsr(l, MSR_APIC_BASE, 0xfe000900), 0); /* moved */
	assert_true(lapic_owns_gpa(l, 0xfe000020));
	assert_false(lapic_owns_gpa(l, 0xfee00020));
	drop(&f);
}

static void ipi_shorthands(void **state)
{
	(void)state;
	struct fixture f;
	build(&f, 3);
	struct lapic *l = f.l[1];
	lapic_mmio_write(l, 0x300, 4, 0x40041); /* self */
	assert_int_equal(lapic_ack(l), 0x41);
	eoi(l);
	lapic_mmio_write(l, 0x300, 4, 0x80042); /* all */
	for (int i = 0; i < 3; i++) {
		assert_int_equal(lapic_ack(f.l[i]), 0x42);
		eoi(f.l[i]);
	}
	lapic_mmio_write(l, 0x300, 4, 0xc0043); /* all but self */
	assert_int_equal(lapic_ack(f.l[0]), 0x43);
	assert_int_equal(lapic_ack(l), -1);
	assert_int_equal(lapic_ack(f.l[2]), 0x43);
	lapic_mmio_write(l, 0x310, 4, 2u << 24);
	lapic_mmio_write(l, 0x300, 4, 0x00085); /* physical 2 */
	assert_int_equal(lapic_ack(f.l[2]), 0x85);
	assert_int_equal(reg(l, 0x300) & 0x1000, 0); /* always delivered */
	/* INIT, de-assert (nothing), start-up, NMI. */
	lapic_mmio_write(l, 0x300, 4, 0x0c500);
	lapic_mmio_write(l, 0x300, 4, 0x08500);
	lapic_mmio_write(l, 0x300, 4, 0x0069a);
	lapic_mmio_write(l, 0x300, 4, 0x00400);
	assert_int_equal(f.cpu[2].inits, 1);
	assert_int_equal(f.cpu[2].sipis, 1);
	assert_int_equal(f.cpu[2].sipi_vector, 0x9a);
	assert_int_equal(f.cpu[2].nmis, 1);
	lapic_mmio_write(l, 0x300, 4, 0xc0400); /* NMI to all others */
	assert_int_equal(f.cpu[0].nmis, 1);
	assert_int_equal(f.cpu[1].nmis, 0);
	assert_int_equal(f.cpu[2].nmis, 2);
	lapic_mmio_write(l, 0x300, 4, 0x40400); /* NMI to self: not a combination */
	assert_int_equal(f.cpu[1].nmis, 0);
	drop(&f);
}

static void lowest_priority(void **state)
{
	(void)state;
	struct fixture f;
	build(&f, 4);
	struct apic_msg msg = { .dest = APIC_BROADCAST, .delivery = APIC_LOWEST, .vector = 0x31 };
	lapic_set_cr8(f.l[0], 5);
	lapic_set_cr8(f.l[1], 2);
	lapic_set_cr8(f.l[2], 7);
	lapic_mmio_write(f.l[3], 0xf0, 4, 0xff); /* off: takes no part, however idle */
	assert_int_equal(lapic_send(&f.chip->apics, &msg), 1);
	assert_int_equal(lapic_ack(f.l[1]), 0x31);
	eoi(f.l[1]);
	for (int i = 0; i < 4; i++) {
		lapic_set_cr8(f.l[i], 0);
		enable(f.l[i]);
	}
	/* Equals take turns. */
	for (int i = 0; i < 4; i++)
		assert_int_equal(lapic_send(&f.chip->apics, &msg), 1);
	for (int i = 0; i < 4; i++)
		assert_int_equal(lapic_ack(f.l[i]), 0x31);
	drop(&f);
}

static void errors(void **state)
{
	(void)state;
	struct fixture f;
	build(&f, 1);
	struct lapic *l = f.l[0];
	lapic_mmio_write(l, 0x370, 4, 0xfe);
	assert_int_equal(fixed(&f, 0, 0x0f), 0);
	assert_int_equal(lapic_ack(l), 0xfe);
	assert_int_equal(reg(l, 0x280), 0); /* visible after a write only */
	lapic_mmio_write(l, 0x280, 4, 0);
	assert_int_equal(reg(l, 0x280), 0x40);
	lapic_mmio_write(l, 0x300, 4, 0x40005);
	lapic_mmio_read(l, 0x40, 4);
	lapic_mmio_write(l, 0x280, 4, 0);
	assert_int_equal(reg(l, 0x280), 0xa0);
	lapic_mmio_write(l, 0x280, 4, 0);
	assert_int_equal(reg(l, 0x280), 0);
	drop(&f);
}

static void one_shot(void **state)
{
	(void)state;
	struct fixture f;
	build(&f, 1);
	struct lapic *l = f.l[0];
	uint64_t start = now_ns;
	lapic_mmio_write(l, 0x320, 4, 0xec);
	lapic_mmio_write(l, 0x3e0, 4, 3); /* by 16 */
	lapic_mmio_write(l, 0x380, 4, 1000);
	assert_int_equal(reg(l, 0x390), 1000);
	advance_to(start + 8000);
	assert_int_equal(reg(l, 0x390), 500);
	advance_to(start + 15999);
	assert_false(lapic_pending(l));
	assert_int_equal(reg(l, 0x390), 1);
	advance_to(start + 16000);
	assert_int_equal(lapic_ack(l), 0xec);
	eoi(l);
	assert_int_equal(reg(l, 0x390), 0);
	assert_int_equal(reg(l, 0x380), 1000);
	advance_to(start + 100000);
	assert_false(lapic_pending(l));
	/* Masked: counts, without an interrupt. */
	lapic_mmio_write(l, 0x320, 4, 0x100ec);
	lapic_mmio_write(l, 0x380, 4, 1000);
	advance_to(now_ns + 20000);
	lapic_mmio_write(l, 0x320, 4, 0xec);
	assert_false(lapic_pending(l));
	/* Stopped by a zero count. */
	lapic_mmio_write(l, 0x380, 4, 1000);
	lapic_mmio_write(l, 0x380, 4, 0);
	advance_to(now_ns + 20000);
	assert_false(lapic_pending(l));
	/* A new divider applies to what is left. */
	lapic_mmio_write(l, 0x380, 4, 1000);
	start = now_ns;
	advance_to(start + 8000);
	lapic_mmio_write(l, 0x3e0, 4, 0xb); /* by 1 */
	assert_int_equal(reg(l, 0x390), 500);
	advance_to(start + 8500);
	assert_true(lapic_pending(l));
	drop(&f);
}

static void periodic(void **state)
{
	(void)state;
	struct fixture f;
	build(&f, 1);
	struct lapic *l = f.l[0];
	uint64_t start = now_ns;
	lapic_mmio_write(l, 0x320, 4, 0x200ec);
	lapic_mmio_write(l, 0x3e0, 4, 0xb);
	lapic_mmio_write(l, 0x380, 4, 1000000); /* 1 ms */
	for (int i = 1; i <= 3; i++) {
		advance_to(start + (uint64_t)i * 1000000 + 300); /* always a bit late: no drift */
		assert_int_equal(lapic_ack(l), 0xec);
		eoi(l);
	}
	assert_int_equal(reg(l, 0x390), 1000000 - 300);
	/* Ten periods late: one interrupt, then on in phase. */
	advance_to(start + 13500000);
	assert_int_equal(lapic_ack(l), 0xec);
	eoi(l);
	assert_false(lapic_pending(l));
	advance_to(start + 13999999);
	assert_false(lapic_pending(l));
	advance_to(start + 14000000);
	assert_int_equal(lapic_ack(l), 0xec);
	eoi(l);
	/* A period too short to serve does not keep the event loop busy. */
	lapic_mmio_write(l, 0x380, 4, 1);
	advance_to(now_ns + 1);
	assert_int_equal(lapic_ack(l), 0xec);
	assert_true(l->timer.deadline >= now_ns + 50000);
	drop(&f);
}

static void tsc_deadline(void **state)
{
	(void)state;
	struct fixture f;
	build(&f, 1);
	struct lapic *l = f.l[0];
	uint64_t tsc = clock_ns_to_tsc(now_ns), start = now_ns;
	assert_int_equal(lapic_wrmsr(l, MSR_TSC_DEADLINE, tsc + 1000), 0);
	assert_int_equal(msr(l, MSR_TSC_DEADLINE), 0); /* not in this mode */
	lapic_mmio_write(l, 0x320, 4, 0x400ec);
	lapic_wrmsr(l, MSR_TSC_DEADLINE, tsc + 25000); /* 10 us */
	assert_int_equal(msr(l, MSR_TSC_DEADLINE), tsc + 25000);
	lapic_mmio_write(l, 0x380, 4, 5);
	assert_int_equal(reg(l, 0x380), 0); /* the count is dead here */
	advance_to(start + 9999);
	assert_false(lapic_pending(l));
	advance_to(start + 10001);
	assert_true(clock_ns_to_tsc(now_ns) >= tsc + 25000);
	assert_int_equal(lapic_ack(l), 0xec);
	eoi(l);
	assert_int_equal(msr(l, MSR_TSC_DEADLINE), 0);
	lapic_wrmsr(l, MSR_TSC_DEADLINE, 5); /* long past: at once */
	assert_int_equal(lapic_ack(l), 0xec);
	eoi(l);
	lapic_wrmsr(l, MSR_TSC_DEADLINE, UINT64_MAX); /* never, and no overflow */
	assert_true(l->timer.deadline > now_ns + 1000 * NS_PER_SEC);
	lapic_wrmsr(l, MSR_TSC_DEADLINE, 0);
	assert_int_equal(l->timer.slot, -1);
	/* The guest's TSC differs from the host's, and moves. */
	lapic_set_tsc_offset(l, (uint64_t)-1000);
	tsc = clock_ns_to_tsc(now_ns) - 1000;
	start = now_ns;
	lapic_wrmsr(l, MSR_TSC_DEADLINE, tsc + 25000);
	lapic_set_tsc_offset(l, (uint64_t)-1000 - 25000);
	advance_to(start + 10001);
	assert_false(lapic_pending(l));
	advance_to(start + 20001);
	assert_int_equal(lapic_ack(l), 0xec);
	eoi(l);
	/* Leaving the mode disarms. */
	lapic_wrmsr(l, MSR_TSC_DEADLINE, tsc + 1000000);
	lapic_mmio_write(l, 0x320, 4, 0x000ec);
	lapic_mmio_write(l, 0x320, 4, 0x400ec);
	assert_int_equal(msr(l, MSR_TSC_DEADLINE), 0);
	assert_int_equal(l->timer.slot, -1);
	drop(&f);
}

static void stale_timer_call(void **state)
{
	(void)state;
	struct fixture f;
	build(&f, 1);
	struct lapic *l = f.l[0];
	lapic_mmio_write(l, 0x320, 4, 0xec);
	lapic_mmio_write(l, 0x380, 4, 1000);
	l->timer.fn(l->timer.opaque); /* was on its way when the timer was changed */
	assert_false(lapic_pending(l));
	advance_to(now_ns + 2000);
	assert_int_equal(lapic_ack(l), 0xec);
	drop(&f);
}

static void level_through_ioapic(void **state)
{
	(void)state;
	struct fixture f;
	build(&f, 2);
	struct irq_line line = irqchip_line(f.chip, 17);
	ioapic_write(&f.chip->ioapic, 0, 0x33);
	ioapic_write(&f.chip->ioapic, 0x10, 1u << 24);
	ioapic_write(&f.chip->ioapic, 0, 0x32);
	ioapic_write(&f.chip->ioapic, 0x10, 0x8061);
	irq_set(&line, 1);
	assert_int_equal(lapic_ack(f.l[1]), 0x61);
	assert_int_equal(reg(f.l[1], 0x1b0), 2); /* TMR: level */
	assert_false(lapic_pending(f.l[1]));
	eoi(f.l[1]);
	assert_int_equal(lapic_ack(f.l[1]), 0x61); /* line still high: again */
	irq_set(&line, 0);
	eoi(f.l[1]);
	assert_false(lapic_pending(f.l[1]));
	/* EOI broadcast suppressed: only the IOAPIC's own EOI register ends it. */
	lapic_mmio_write(f.l[1], 0xf0, 4, 0x11ff);
	irq_set(&line, 1);
	assert_int_equal(lapic_ack(f.l[1]), 0x61);
	eoi(f.l[1]);
	assert_false(lapic_pending(f.l[1]));
	ioapic_write(&f.chip->ioapic, 0x40, 0x61);
	assert_int_equal(lapic_ack(f.l[1]), 0x61);
	drop(&f);
}

static void setup_pic(struct irqchip *chip)
{
	for (int c = 0; c < 2; c++) {
		pic_write(&chip->pic, c, 0, 0x11);
		pic_write(&chip->pic, c, 1, c ? 0x28 : 0x20);
		pic_write(&chip->pic, c, 1, c ? 2 : 4);
		pic_write(&chip->pic, c, 1, 1);
		pic_write(&chip->pic, c, 1, 0);
	}
}

static void virtual_wire(void **state)
{
	(void)state;
	struct fixture f;
	build(&f, 2);
	struct irq_line line = irqchip_line(f.chip, 0);
	setup_pic(f.chip);
	irq_set(&line, 1);
	assert_false(lapic_pending(f.l[0])); /* LINT0 is masked after reset */
	lapic_virtual_wire(f.l[0]);
	assert_true(lapic_pending(f.l[0]));
	assert_int_equal(f.cpu[0].kicks, 1);
	assert_false(lapic_pending(f.l[1]));
	lapic_set_cr8(f.l[0], 15); /* priorities do not apply to ExtINT */
	assert_int_equal(lapic_ack(f.l[0]), 0x20);
	assert_false(lapic_pending(f.l[0]));
	assert_int_equal(lapic_ack(f.l[0]), -1); /* no spurious vector out of nothing */
	assert_int_equal(reg(f.l[0], 0x110), 0); /* and nothing in service */
	pic_write(&f.chip->pic, 0, 0, 0x20);
	irq_set(&line, 0);
	/* NMI by LINT1 of the bootstrap processor. */
	struct irq_line nmi = irqchip_nmi_line(f.chip);
	irq_pulse(&nmi);
	assert_int_equal(f.cpu[0].nmis, 1);
	assert_int_equal(f.cpu[1].nmis, 0);
	/* With the LAPIC switched off, INTR goes straight to the CPU. */
	lapic_wrmsr(f.l[0], MSR_APIC_BASE, 0xfee00100);
	irq_pulse(&line);
	assert_int_equal(lapic_ack(f.l[0]), 0x20);
	drop(&f);
}

static void extint_through_ioapic(void **state)
{
	(void)state;
	struct fixture f;
	build(&f, 2);
	struct irq_line line = irqchip_line(f.chip, 4);
	setup_pic(f.chip);
	ioapic_write(&f.chip->ioapic, 0, 0x11);
	ioapic_write(&f.chip->ioapic, 0x10, 1u << 24);
	ioapic_write(&f.chip->ioapic, 0, 0x10);
	ioapic_write(&f.chip->ioapic, 0x10, 0x700); /* pin 0: ExtINT to CPU 1 */
	irq_pulse(&line);
	assert_false(lapic_pending(f.l[0]));
	assert_int_equal(lapic_ack(f.l[1]), 0x24);
	assert_false(lapic_pending(f.l[1]));
	pic_write(&f.chip->pic, 0, 0, 0x20);
	irq_pulse(&line);
	assert_int_equal(lapic_ack(f.l[1]), 0x24);
	drop(&f);
}

static void gsi_routing(void **state)
{
	(void)state;
	struct fixture f;
	build(&f, 1);
	struct irq_line pit = irqchip_line(f.chip, 0), com1 = irqchip_line(f.chip, 4), pci = irqchip_line(f.chip, 20);
	irq_set(&pit, 1);
	irq_set(&com1, 1);
	irq_set(&pci, 1);
	assert_int_equal(f.chip->ioapic.line & ~1u, 1u << 2 | 1u << 4 | 1u << 20);
	assert_int_equal(f.chip->pic.chip[0].line, 0x11);
	assert_null(irqchip_line(f.chip, IOAPIC_PINS).fn);
	assert_null(irqchip_line(f.chip, -1).fn);
	drop(&f);
}

static void lint0_level(void **state)
{
	(void)state;
	struct fixture f;
	build(&f, 1);
	struct lapic *l = f.l[0];
	lapic_mmio_write(l, 0x350, 4, 0x8045); /* fixed, level */
	lapic_set_lint(l, 0, 1);
	assert_int_equal(lapic_ack(l), 0x45);
	assert_int_equal(reg(l, 0x350), 0xc045); /* remote IRR */
	eoi(l);
	assert_int_equal(lapic_ack(l), 0x45);
	lapic_set_lint(l, 0, 0);
	eoi(l);
	assert_int_equal(reg(l, 0x350), 0x8045);
	assert_false(lapic_pending(l));
	drop(&f);
}

/* Three processors interrupt each other, take what comes and end it, while a level line goes up and down: nothing is lost,
 * nothing stays behind. Under the thread sanitizer this is the test of the locking. */
#define STORM 5000

struct stormer {
	struct fixture *f;
	unsigned self;
	unsigned taken;
	struct irq_line line;
};

static void take_all(struct stormer *s)
{
	struct lapic *l = s->f->l[s->self];
	while (lapic_pending(l)) {
		if (lapic_ack(l) < 0)
			continue;
		s->taken++;
		/* The device of the level line is quiet once its handler ran. */
		pthread_mutex_lock(&s->f->lock);
		irq_set(&s->line, 0);
		pthread_mutex_unlock(&s->f->lock);
		lapic_wrmsr(l, 0x80b, 0);
	}
}

static void *storm(void *opaque)
{
	struct stormer *s = opaque;
	struct lapic *l = s->f->l[s->self];
	for (unsigned i = 0; i < STORM; i++) {
		uint64_t dest = (s->self + 1 + i % 2) % 3;
		lapic_wrmsr(l, 0x830, dest << 32 | (0x40 + i % 0x80));
		lapic_set_cr8(l, i % 5);
		take_all(s);
		if (i % 7 == 0) {
			pthread_mutex_lock(&s->f->lock);
			irq_set(&s->line, 1);
			pthread_mutex_unlock(&s->f->lock);
		}
		if (i % 11 == 0)
			irqchip_msi(s->f->chip, 0xfeeff000, 0x100 | 0x31); /* lowest priority */
	}
	return NULL;
}

static void storms(void **state)
{
	(void)state;
	struct fixture f;
	struct stormer s[3];
	pthread_t t[3];
	build(&f, 3);
	ioapic_write(&f.chip->ioapic, 0, 0x32);
	ioapic_write(&f.chip->ioapic, 0x10, 0x8035); /* pin 17: level, to 0, a vector of its own */
	for (unsigned i = 0; i < 3; i++) {
		to_x2apic(f.l[i]);
		s[i] = (struct stormer){ .f = &f, .self = i, .line = irqchip_line(f.chip, 17) };
	}
	for (unsigned i = 0; i < 3; i++)
		pthread_create(&t[i], NULL, storm, &s[i]);
	for (unsigned i = 0; i < 3; i++)
		pthread_join(t[i], NULL);
	for (unsigned round = 0; round < 2; round++) {
		for (unsigned i = 0; i < 3; i++) {
			lapic_set_cr8(f.l[i], 0);
			take_all(&s[i]);
		}
	}
	for (unsigned i = 0; i < 3; i++) {
		assert_false(lapic_pending(f.l[i]));
		assert_true(s[i].taken > 0 && atomic_load(&f.cpu[i].kicks) > 0);
		for (unsigned r = 0; r < 8; r++) {
			assert_int_equal(msr(f.l[i], 0x810 + r), 0);
			assert_int_equal(msr(f.l[i], 0x820 + r), 0);
		}
	}
	assert_int_equal(f.chip->ioapic.line & 1u << 17, 0);
	assert_false(f.chip->ioapic.rte[17] & IOAPIC_RTE_REMOTE_IRR);
	drop(&f);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(reset_values),		 cmocka_unit_test(priorities),
		cmocka_unit_test(task_priority),	 cmocka_unit_test(physical_destinations),
		cmocka_unit_test(logical_destinations),	 cmocka_unit_test(x2apic_destinations),
		cmocka_unit_test(x2apic_faults),	 cmocka_unit_test(mode_transitions),
		cmocka_unit_test(ipi_shorthands),	 cmocka_unit_test(lowest_priority),
		cmocka_unit_test(errors),		 cmocka_unit_test(one_shot),
		cmocka_unit_test(periodic),		 cmocka_unit_test(tsc_deadline),
		cmocka_unit_test(stale_timer_call),	 cmocka_unit_test(level_through_ioapic),
		cmocka_unit_test(virtual_wire),		 cmocka_unit_test(extint_through_ioapic),
		cmocka_unit_test(gsi_routing),		 cmocka_unit_test(lint0_level),
		cmocka_unit_test(storms),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
