#include "device/hpet.h"
#include "devtest.h"

#define TIMER(n, reg) (HPET_BASE + 0x100 + 0x20 * (n) + (reg))

static uint64_t get(struct bench *b, uint64_t reg)
{
	return bus_read(&b->mmio, HPET_BASE + reg, 8);
}

static void put(struct bench *b, uint64_t reg, uint64_t value)
{
	bus_write(&b->mmio, HPET_BASE + reg, 8, value);
}

static struct hpet *start(struct bench *b)
{
	struct hpet *hpet;
	bench_start(b);
	struct hpet_config config = {
		.mmio = &b->mmio, .loop = b->loop, .base = HPET_BASE, .irq0 = bench_irq(b, 30), .irq8 = bench_irq(b, 31)
	};
	for (int i = 16; i < HPET_GSIS; i++)
		config.gsi[i] = bench_irq(b, i);
	assert_int_equal(hpet_create(&hpet, &config, NULL), 0);
	return hpet;
}

static void stop(struct bench *b, struct hpet *hpet)
{
	bench_halt(b);
	hpet_destroy(hpet);
	assert_int_equal(b->mmio.nregions, 0);
	bench_stop(b);
}

static void registers(void **state)
{
	(void)state;
	struct bench b;
	struct hpet *h = start(&b);
	assert_true(get(&b, 0) == ((uint64_t)HPET_PERIOD_FS << 32 | HPET_BLOCK_ID));
	assert_int_equal(bus_read(&b.mmio, HPET_BASE + 4, 4), HPET_PERIOD_FS);
	assert_true(get(&b, 0x100) == ((uint64_t)0x00ff0000 << 32 | 0x30));
	put(&b, 0x100, 17 << 9 | 0x4);
	assert_int_equal(bus_read(&b.mmio, TIMER(0, 0), 4), 17 << 9 | 0x34);
	put(&b, 0x100, 3 << 9); /* not routable: reads back as it was */
	assert_int_equal(bus_read(&b.mmio, TIMER(0, 0), 4), 17 << 9 | 0x30);
	assert_true(get(&b, 0x108) == UINT64_MAX);
	bus_write(&b.mmio, TIMER(0, 8), 4, 0x11223344);
	bus_write(&b.mmio, TIMER(0, 12), 4, 0x55667788);
	assert_true(get(&b, 0x108) == 0x5566778811223344ull);
	assert_true(get(&b, 0x3f8) == 0);
	stop(&b, h);
}

static void counter(void **state)
{
	(void)state;
	struct bench b;
	struct hpet *h = start(&b);
	assert_true(get(&b, 0xf0) == 0);
	put(&b, 0xf0, 0xfffffff0);
	bench_sleep_us(100);
	assert_true(get(&b, 0xf0) == 0xfffffff0); /* halted */
	uint64_t t0 = clock_ns();
	put(&b, 0x10, 1);
	bench_sleep_us(2000);
	uint64_t ticks = get(&b, 0xf0) - 0xfffffff0, most = (clock_ns() - t0) / 10;
	assert_true(ticks >= 200000 && ticks <= most);
	put(&b, 0x10, 0);
	uint64_t held = get(&b, 0xf0);
	assert_true(held >= 0xfffffff0 + 200000ull && get(&b, 0xf0) == held);
	stop(&b, h);
}

static void one_shot(void **state)
{
	(void)state;
	struct bench b;
	struct hpet *h = start(&b);
	bench_run(&b);
	put(&b, 0x10, 1);
	put(&b, 0x120, 18 << 9 | 0x4);
	put(&b, 0x128, get(&b, 0xf0) + 200000); /* 2 ms */
	assert_int_equal(bench_edges(&b, 18), 0);
	assert_true(bench_wait(&b, 18, 1));
	assert_true(get(&b, 0xf0) >= get(&b, 0x128));
	bench_sleep_us(5000);
	assert_int_equal(bench_edges(&b, 18), 1);
	/* A comparator in the past is not met. */
	put(&b, 0x128, get(&b, 0xf0) - 1000);
	bench_sleep_us(5000);
	assert_int_equal(bench_edges(&b, 18), 1);
	stop(&b, h);
}

static void periodic_as_linux_sets_it(void **state)
{
	(void)state;
	struct bench b;
	struct hpet *h = start(&b);
	bench_run(&b);
	put(&b, 0x10, 3); /* legacy replacement */
	uint64_t t0 = clock_ns(), first = (uint32_t)get(&b, 0xf0) + 100000;
	bus_write(&b.mmio, TIMER(0, 0), 4, 0x14c); /* enable, periodic, set value, 32 bits */
	bus_write(&b.mmio, TIMER(0, 8), 4, (uint32_t)first);
	bus_write(&b.mmio, TIMER(0, 8), 4, 100000); /* 1 ms */
	assert_int_equal(bus_read(&b.mmio, TIMER(0, 0), 4) & 0x40, 0);
	bench_sleep_us(100000);
	unsigned ticks = bench_edges(&b, 30);
	uint64_t ms = (clock_ns() - t0) / 1000000;
	assert_true(ticks >= 50 && ticks <= ms + 1);
	assert_int_equal((bus_read(&b.mmio, TIMER(0, 8), 4) - first) % 100000, 0);
	put(&b, 0x10, 0);
	unsigned n = bench_edges(&b, 30);
	bench_sleep_us(5000);
	assert_int_equal(bench_edges(&b, 30), n);
	stop(&b, h);
}

static void level_triggered(void **state)
{
	(void)state;
	struct bench b;
	struct hpet *h = start(&b);
	bench_run(&b);
	put(&b, 0x10, 1);
	put(&b, 0x140, 20 << 9 | 0x6);
	put(&b, 0x148, get(&b, 0xf0) + 50000);
	assert_true(bench_wait(&b, 20, 1));
	assert_int_equal(get(&b, 0x20), 4);
	assert_int_equal(b.level[20], 1);
	put(&b, 0x20, 3);
	assert_int_equal(b.level[20], 1);
	put(&b, 0x20, 4);
	assert_int_equal(b.level[20], 0);
	assert_int_equal(get(&b, 0x20), 0);
	stop(&b, h);
}

static void legacy_replacement(void **state)
{
	(void)state;
	struct bench b;
	struct hpet *h = start(&b);
	struct irq_line pit = hpet_gate_pit(h), rtc = hpet_gate_rtc(h);
	irq_set(&pit, 1);
	assert_int_equal(b.level[30], 1);
	put(&b, 0x10, 2);
	assert_int_equal(b.level[30], 0);
	irq_set(&pit, 0);
	irq_set(&pit, 1);
	irq_pulse(&rtc);
	assert_int_equal(b.edges[30], 1);
	assert_int_equal(b.edges[31], 0);
	put(&b, 0x10, 0);
	assert_int_equal(b.level[30], 1);
	irq_set(&pit, 0);
	irq_set(&rtc, 1);
	assert_int_equal(b.level[30], 0);
	assert_int_equal(b.level[31], 1);
	stop(&b, h);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(registers),	   cmocka_unit_test(counter),
		cmocka_unit_test(one_shot),	   cmocka_unit_test(periodic_as_linux_sets_it),
		cmocka_unit_test(level_triggered), cmocka_unit_test(legacy_replacement),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
