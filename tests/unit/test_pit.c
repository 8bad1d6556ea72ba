#include "device/pit.h"
#include "devtest.h"

static struct pit *start(struct bench *b)
{
	struct pit *pit;
	bench_start(b);
	struct pit_config config = { .pio = &b->pio, .loop = b->loop, .irq = bench_irq(b, 0) };
	assert_int_equal(pit_create(&pit, &config, NULL), 0);
	return pit;
}

static void stop(struct bench *b, struct pit *pit)
{
	bench_halt(b);
	pit_destroy(pit);
	assert_int_equal(b->pio.nregions, 0);
	bench_stop(b);
}

static void program(struct bench *b, unsigned counter, unsigned mode, uint16_t count)
{
	outb(b, 0x43, (uint8_t)(counter << 6 | 0x30 | mode << 1));
	outb(b, (uint16_t)(0x40 + counter), (uint8_t)count);
	outb(b, (uint16_t)(0x40 + counter), (uint8_t)(count >> 8));
}

static uint16_t read_latched(struct bench *b, unsigned counter)
{
	outb(b, 0x43, (uint8_t)(counter << 6));
	uint8_t low = inb(b, (uint16_t)(0x40 + counter));
	return (uint16_t)(low | inb(b, (uint16_t)(0x40 + counter)) << 8);
}

static uint8_t read_status(struct bench *b, unsigned counter)
{
	outb(b, 0x43, (uint8_t)(0xe0 | 2u << counter));
	return inb(b, (uint16_t)(0x40 + counter));
}

static void counts_down_in_real_time(void **state)
{
	(void)state;
	struct bench b;
	struct pit *pit = start(&b);
	program(&b, 0, 2, 0); /* 65536: 54.9 ms */
	uint64_t t0 = clock_ns();
	uint16_t first = read_latched(&b, 0);
	bench_sleep_us(5000);
	uint16_t second = read_latched(&b, 0);
	uint64_t ticks = clock_muldiv(clock_ns() - t0, PIT_HZ, NS_PER_SEC);
	unsigned gone = (uint16_t)(first - second); /* a fresh 65536 reads as 0 */
	assert_true(gone >= 5000 * 1193 / 1000 - 2 && gone <= ticks % 65536 + 2);
	stop(&b, pit);
}

static void mode_3_counts_by_two(void **state)
{
	(void)state;
	struct bench b;
	struct pit *pit = start(&b);
	program(&b, 0, 3, 1001);
	for (int i = 0; i < 1000; i++) {
		uint16_t v = read_latched(&b, 0);
		assert_true(v <= 1000 && v % 2 == 0);
	}
	stop(&b, pit);
}

static void latch_holds_and_readback(void **state)
{
	(void)state;
	struct bench b;
	struct pit *pit = start(&b);
	program(&b, 0, 2, 0xff00);
	outb(&b, 0x43, 0x00);
	bench_sleep_us(100);
	outb(&b, 0x43, 0x00); /* ignored: still latched */
	bench_sleep_us(100);
	unsigned held = inb(&b, 0x40);
	held |= (unsigned)inb(&b, 0x40) << 8;
	uint16_t fresh = read_latched(&b, 0);
	assert_true(held - fresh >= 200);

	/* status first, then count, when both are latched */
	outb(&b, 0x43, 0xc2);
	uint8_t status = inb(&b, 0x40);
	assert_int_equal(status & 0x3f, 0x34); /* low/high, mode 2, binary */
	unsigned count = inb(&b, 0x40);
	count |= (unsigned)inb(&b, 0x40) << 8;
	assert_true(count <= 0xff00 && count > 0);

	/* null count from the control word until the count is in */
	outb(&b, 0x43, 0x30);
	assert_int_equal(read_status(&b, 0) & 0xc0, 0x40); /* mode 0: OUT low */
	outb(&b, 0x40, 0xff);
	outb(&b, 0x40, 0xff);
	bench_sleep_us(10);
	assert_int_equal(read_status(&b, 0) & 0x40, 0);
	stop(&b, pit);
}

static void byte_modes_and_bcd(void **state)
{
	(void)state;
	struct bench b;
	struct pit *pit = start(&b);
	outb(&b, 0x43, 0x24); /* counter 0, high byte only, mode 2 */
	outb(&b, 0x40, 0x80);
	assert_true(inb(&b, 0x40) >= 0x70 && inb(&b, 0x40) <= 0x80);
	outb(&b, 0x43, 0x35); /* BCD, mode 2: 0 means 10000 */
	outb(&b, 0x40, 0);
	outb(&b, 0x40, 0);
	for (int i = 0; i < 200; i++) {
		uint16_t v = read_latched(&b, 0);
		for (int d = 0; d < 16; d += 4)
			assert_true((v >> d & 15) <= 9);
	}
	stop(&b, pit);
}

static void port_61(void **state)
{
	(void)state;
	struct bench b;
	struct pit *pit = start(&b);
	/* What Linux does to calibrate: mode 0 on counter 2, wait for OUT2. */
	outb(&b, 0x61, 0x01);
	program(&b, 2, 0, 6000); /* 5 ms */
	assert_int_equal(inb(&b, 0x61) & 0x20, 0);
	bench_sleep_us(5500);
	assert_int_equal(inb(&b, 0x61) & 0x21, 0x21);
	/* The gate stops it. */
	program(&b, 2, 0, 6000);
	outb(&b, 0x61, 0x00);
	bench_sleep_us(100);
	uint16_t held = read_latched(&b, 2);
	bench_sleep_us(1000);
	assert_int_equal(read_latched(&b, 2), held);
	assert_int_equal(inb(&b, 0x61) & 0x20, 0);
	outb(&b, 0x61, 0x01);
	bench_sleep_us(5500);
	assert_int_equal(inb(&b, 0x61) & 0x20, 0x20);
	/* Mode 1 waits for the gate's edge. */
	outb(&b, 0x61, 0x00);
	program(&b, 2, 1, 2000);
	assert_int_equal(inb(&b, 0x61) & 0x20, 0x20);
	outb(&b, 0x61, 0x01);
	bench_sleep_us(10);
	assert_int_equal(inb(&b, 0x61) & 0x20, 0);
	bench_sleep_us(2500);
	assert_int_equal(inb(&b, 0x61) & 0x20, 0x20);
	/* The refresh bit toggles. */
	unsigned seen = 0;
	for (int i = 0; i < 2000; i++)
		seen |= 1u << (inb(&b, 0x61) >> 4 & 1);
	assert_int_equal(seen, 3);
	stop(&b, pit);
}

static void interrupts(void **state)
{
	(void)state;
	struct bench b;
	struct pit *pit = start(&b);
	bench_run(&b);
	unsigned before = bench_edges(&b, 0);
	uint64_t t0 = clock_ns();
	program(&b, 0, 2, 1193); /* 1 kHz */
	bench_sleep_us(100000);
	unsigned ticks = bench_edges(&b, 0) - before;
	uint64_t ms = (clock_ns() - t0) / 1000000;
	assert_true(ticks >= 50 && ticks <= ms + 2);

	/* One-shot: mode 4 rises once, mode 0 stays up. */
	program(&b, 0, 4, 1193);
	bench_sleep_us(1000);
	before = bench_edges(&b, 0);
	bench_sleep_us(5000);
	program(&b, 0, 0, 1193);
	pthread_mutex_lock(&b.lock);
	assert_int_equal(b.level[0], 0);
	before = b.edges[0];
	pthread_mutex_unlock(&b.lock);
	assert_true(bench_wait(&b, 0, before + 1));
	bench_sleep_us(5000);
	assert_int_equal(bench_edges(&b, 0), before + 1);
	stop(&b, pit);
}

static void no_storm(void **state)
{
	(void)state;
	struct bench b;
	struct pit *pit = start(&b);
	bench_run(&b);
	unsigned before = bench_edges(&b, 0);
	program(&b, 0, 2, 2); /* 600 kHz */
	bench_sleep_us(20000);
	uint64_t t = clock_ns();
	assert_true(bench_edges(&b, 0) - before < 20000);
	assert_true(clock_ns() - t < NS_PER_SEC);
	stop(&b, pit);
}

static void new_count_waits_for_the_period(void **state)
{
	(void)state;
	struct bench b;
	struct pit *pit = start(&b);
	program(&b, 0, 2, 0xffff);
	outb(&b, 0x40, 0x10); /* 16 */
	outb(&b, 0x40, 0x00);
	assert_true(read_latched(&b, 0) > 0x8000);
	assert_int_equal(read_status(&b, 0) & 0x40, 0x40);
	bench_sleep_us(56000);
	assert_true(read_latched(&b, 0) <= 16);
	assert_int_equal(read_status(&b, 0) & 0x40, 0);
	stop(&b, pit);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(counts_down_in_real_time), cmocka_unit_test(mode_3_counts_by_two),
		cmocka_unit_test(latch_holds_and_readback), cmocka_unit_test(byte_modes_and_bcd),
		cmocka_unit_test(port_61),		    cmocka_unit_test(interrupts),
		cmocka_unit_test(no_storm),		    cmocka_unit_test(new_count_waits_for_the_period),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
