/* The IOAPIC: registers, triggers, remote IRR and its ends, masks. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "irqchip/ioapic.h"

struct sink {
	struct apic_msg last;
	int n;
	int taken; /* what deliver answers */
};

static int deliver(void *opaque, const struct apic_msg *msg)
{
	struct sink *s = opaque;
	s->last = *msg;
	s->n++;
	return s->taken;
}

static void setup(struct ioapic *io, struct sink *s)
{
	*s = (struct sink){ .taken = 1 };
	ioapic_init(io, deliver, s);
}

static uint32_t get(struct ioapic *io, uint8_t reg)
{
	ioapic_write(io, 0, reg);
	return ioapic_read(io, 0x10);
}

static void put(struct ioapic *io, uint8_t reg, uint32_t value)
{
	ioapic_write(io, 0, reg);
	ioapic_write(io, 0x10, value);
}

static void set_rte(struct ioapic *io, int pin, uint64_t rte)
{
	put(io, (uint8_t)(0x11 + 2 * pin), (uint32_t)(rte >> 32));
	put(io, (uint8_t)(0x10 + 2 * pin), (uint32_t)rte);
}

static void registers(void **state)
{
	(void)state;
	struct ioapic io;
	struct sink s;
	setup(&io, &s);
	assert_int_equal(get(&io, 1), 0x001f0020);
	put(&io, 0, 0xff000000);
	assert_int_equal(get(&io, 0), 0x0f000000);
	put(&io, 1, 0);
	assert_int_equal(get(&io, 1), 0x001f0020);
	assert_int_equal(get(&io, 0x10), 0x00010000); /* masked after reset */
	set_rte(&io, 31, ~0ull);
	assert_int_equal(get(&io, 0x4e), 0x0001afff); /* status and remote IRR are read-only */
	assert_int_equal(get(&io, 0x4f), 0xff000000);
	put(&io, 0x50, 1);
	assert_int_equal(get(&io, 0x50), 0);
	assert_int_equal(get(&io, 0x02), 0x0f000000);
	assert_int_equal(s.n, 0);
}

static void edge(void **state)
{
	(void)state;
	struct ioapic io;
	struct sink s;
	setup(&io, &s);
	ioapic_set_line(&io, 4, 1);
	ioapic_set_line(&io, 4, 0);
	set_rte(&io, 4, 0x0300000000000834ull); /* vector 0x34, logical 3 */
	assert_int_equal(s.n, 0); /* an edge while masked is lost */
	ioapic_set_line(&io, 4, 1);
	assert_int_equal(s.n, 1);
	assert_int_equal(s.last.vector, 0x34);
	assert_int_equal(s.last.dest, 3);
	assert_true(s.last.logical);
	assert_false(s.last.level);
	ioapic_set_line(&io, 4, 1);
	assert_int_equal(s.n, 1);
	ioapic_set_line(&io, 4, 0);
	ioapic_set_line(&io, 4, 1);
	assert_int_equal(s.n, 2); /* no EOI needed */
	assert_false(get(&io, 0x18) & IOAPIC_RTE_REMOTE_IRR);
	set_rte(&io, 5, 0xff00000000000440ull); /* NMI to all */
	ioapic_set_line(&io, 5, 1);
	assert_int_equal(s.last.delivery, APIC_NMI);
	assert_int_equal(s.last.dest, APIC_BROADCAST);
}

static void level(void **state)
{
	(void)state;
	struct ioapic io;
	struct sink s;
	setup(&io, &s);
	set_rte(&io, 16, 0x8051);
	ioapic_set_line(&io, 16, 1);
	assert_int_equal(s.n, 1);
	assert_true(s.last.level);
	assert_true(get(&io, 0x30) & IOAPIC_RTE_REMOTE_IRR);
	ioapic_set_line(&io, 16, 0);
	ioapic_set_line(&io, 16, 1);
	assert_int_equal(s.n, 1); /* in flight: not sent twice */
	ioapic_eoi(&io, 0x50);
	assert_int_equal(s.n, 1); /* another vector */
	ioapic_eoi(&io, 0x51);
	assert_int_equal(s.n, 2); /* the line is still high */
	ioapic_set_line(&io, 16, 0);
	ioapic_eoi(&io, 0x51);
	assert_int_equal(s.n, 2);
	assert_false(get(&io, 0x30) & IOAPIC_RTE_REMOTE_IRR);
	/* Two pins that share a vector. */
	set_rte(&io, 17, 0x8051);
	ioapic_set_line(&io, 16, 1);
	ioapic_set_line(&io, 17, 1);
	assert_int_equal(s.n, 4);
	ioapic_write(&io, 0x40, 0x51); /* the EOI register does the same */
	assert_int_equal(s.n, 6);
}

static void masked_level(void **state)
{
	(void)state;
	struct ioapic io;
	struct sink s;
	setup(&io, &s);
	set_rte(&io, 10, 0x1a060); /* masked, level, active low */
	ioapic_set_line(&io, 10, 1);
	assert_int_equal(s.n, 0);
	set_rte(&io, 10, 0x0a060);
	assert_int_equal(s.n, 1); /* a level waits behind the mask */
	set_rte(&io, 10, 0x1a060); /* masked with one in flight */
	assert_true(get(&io, 0x24) & IOAPIC_RTE_REMOTE_IRR);
	ioapic_eoi(&io, 0x60);
	assert_int_equal(s.n, 1);
	set_rte(&io, 10, 0x0a060);
	assert_int_equal(s.n, 2);
	/* Mask + edge + level clears remote IRR: the way to end one without an EOI. */
	set_rte(&io, 10, 0x12060);
	assert_false(get(&io, 0x24) & IOAPIC_RTE_REMOTE_IRR);
	set_rte(&io, 10, 0x0a060);
	assert_int_equal(s.n, 3);
}

static void nobody_took_it(void **state)
{
	(void)state;
	struct ioapic io;
	struct sink s;
	setup(&io, &s);
	s.taken = 0;
	set_rte(&io, 11, 0x8061);
	ioapic_set_line(&io, 11, 1);
	assert_int_equal(s.n, 1);
	assert_false(get(&io, 0x26) & IOAPIC_RTE_REMOTE_IRR); /* not waiting for an EOI that will not come */
	s.taken = 1;
	ioapic_set_line(&io, 11, 1);
	assert_int_equal(s.n, 2);
	assert_true(get(&io, 0x26) & IOAPIC_RTE_REMOTE_IRR);
	ioapic_set_line(&io, IOAPIC_PINS, 1);
	ioapic_set_line(&io, -1, 1);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(registers),	cmocka_unit_test(edge),		  cmocka_unit_test(level),
		cmocka_unit_test(masked_level), cmocka_unit_test(nobody_took_it),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
