#include <errno.h>
#include <stdio.h>

#include "devtest.h"

/* A device that remembers its accesses and reads as the offsets of its bytes. */
struct probe {
	char log[256];
};

static uint64_t probe_read(void *opaque, uint64_t offset, unsigned size)
{
	struct probe *p = opaque;
	char item[32];
	snprintf(item, sizeof(item), "r%u@%llx ", size, (unsigned long long)offset);
	strcat(p->log, item);
	uint64_t value = 0;
	for (unsigned i = 0; i < size; i++)
		value |= (offset + i) << 8 * i;
	return value;
}

static void probe_write(void *opaque, uint64_t offset, unsigned size, uint64_t value)
{
	struct probe *p = opaque;
	char item[48];
	snprintf(item, sizeof(item), "w%u@%llx=%llx ", size, (unsigned long long)offset, (unsigned long long)value);
	strcat(p->log, item);
}

static const struct bus_ops any_ops = { .name = "any", .read = probe_read, .write = probe_write };
static const struct bus_ops byte_ops = { .name = "byte", .max_size = 1, .read = probe_read, .write = probe_write };
static const struct bus_ops dword_ops = {
	.name = "dword", .min_size = 4, .max_size = 4, .read = probe_read, .write = probe_write
};

static void finds_and_refuses(void **state)
{
	(void)state;
	struct bench b;
	struct error err;
	struct probe p = { 0 };
	bench_start(&b);
	assert_int_equal(bus_map(&b.pio, 0x100, 0x10, &any_ops, &p, &err), 0);
	assert_int_equal(bus_map(&b.pio, 0x80, 0x10, &any_ops, &p, &err), 0);
	assert_int_equal(bus_map(&b.pio, 0x110, 0x10, &any_ops, &p, &err), 0);
	assert_int_equal(bus_map(&b.pio, 0x10f, 1, &byte_ops, &p, &err), -EEXIST);
	assert_non_null(strstr(err.text, "byte"));
	assert_non_null(strstr(err.text, "any"));
	assert_int_equal(bus_map(&b.pio, 0x70, 0x11, &byte_ops, &p, &err), -EEXIST);
	assert_int_equal(bus_map(&b.pio, 0x0, 0x1000, &byte_ops, &p, &err), -EEXIST);
	assert_int_equal(bus_map(&b.pio, 0x200, 0, &byte_ops, &p, &err), -EINVAL);
	assert_int_equal(bus_map(&b.pio, UINT64_MAX, 2, &byte_ops, &p, &err), -EINVAL);
	assert_int_equal(bus_map(&b.pio, UINT64_MAX, 1, &byte_ops, &p, &err), 0);
	assert_int_equal(bus_read(&b.pio, 0x108, 1), 8);
	assert_int_equal(bus_read(&b.pio, 0x7f, 1), 0xff);
	assert_int_equal(bus_read(&b.pio, 0x90, 4), 0xffffffff);
	bus_unmap(&b.pio, 0x108); /* not a base: nothing */
	bus_unmap(&b.pio, 0x100);
	assert_int_equal(bus_read(&b.pio, 0x108, 1), 0xff);
	assert_int_equal(bus_read(&b.pio, 0x118, 1), 8);
	bench_stop(&b);
}

static void fills_up(void **state)
{
	(void)state;
	struct bench b;
	struct error err;
	bench_start(&b);
	for (unsigned i = 0; i < BUS_MAX_REGIONS; i++)
		assert_int_equal(bus_map(&b.mmio, (i * 37 % BUS_MAX_REGIONS) * 16, 8, &any_ops, NULL, &err), 0);
	assert_int_equal(bus_map(&b.mmio, 1 << 20, 8, &any_ops, NULL, &err), -ENOSPC);
	for (int i = 1; i < b.mmio.nregions; i++)
		assert_true(b.mmio.region[i - 1].base < b.mmio.region[i].base);
	bench_stop(&b);
}

static void splits_and_widens(void **state)
{
	(void)state;
	struct bench b;
	struct probe p = { 0 };
	bench_start(&b);
	bus_map(&b.mmio, 0x1000, 8, &byte_ops, &p, NULL);
	bus_map(&b.mmio, 0x2000, 0x10, &dword_ops, &p, NULL);

	assert_int_equal(bus_read(&b.mmio, 0x1002, 4), 0x05040302);
	assert_string_equal(p.log, "r1@2 r1@3 r1@4 r1@5 ");
	p.log[0] = 0;
	bus_write(&b.mmio, 0x1002, 2, 0xabcd);
	assert_string_equal(p.log, "w1@2=cd w1@3=ab ");
	p.log[0] = 0;
	/* over the end: the rest is nobody's */
	assert_int_equal(bus_read(&b.mmio, 0x1006, 4), 0xffff0706);
	bus_write(&b.mmio, 0x1007, 4, 0x44332211);
	assert_string_equal(p.log, "r1@6 r1@7 w1@7=11 ");
	p.log[0] = 0;
	/* from nobody's into one */
	assert_int_equal(bus_read(&b.mmio, 0xffe, 4), 0x0100ffff);
	p.log[0] = 0;

	assert_int_equal(bus_read(&b.mmio, 0x2006, 2), 0x0706);
	assert_int_equal(bus_read(&b.mmio, 0x2005, 1), 0x05);
	assert_true(bus_read(&b.mmio, 0x2008, 8) == 0x0f0e0d0c0b0a0908ull);
	assert_string_equal(p.log, "r4@4 r4@4 r4@8 r4@c ");
	p.log[0] = 0;
	bus_write(&b.mmio, 0x2004, 2, 0x1234); /* smaller than it takes: dropped */
	bus_write(&b.mmio, 0x2008, 8, 0x1122334455667788ull);
	assert_string_equal(p.log, "w4@8=55667788 w4@c=11223344 ");
	bench_stop(&b);
}

static void read_only_device(void **state)
{
	(void)state;
	static const struct bus_ops nothing = { .name = "nothing" };
	struct bench b;
	bench_start(&b);
	bus_map(&b.mmio, 0, 16, &nothing, NULL, NULL);
	bus_write(&b.mmio, 0, 4, 1);
	assert_true(bus_read(&b.mmio, 0, 8) == UINT64_MAX);
	bench_stop(&b);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(finds_and_refuses),
		cmocka_unit_test(fills_up),
		cmocka_unit_test(splits_and_widens),
		cmocka_unit_test(read_only_device),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
