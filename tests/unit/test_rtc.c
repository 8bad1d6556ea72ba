#include "device/rtc.h"
#include "devtest.h"

static uint64_t wall; /* the host's wall clock, for these tests */

static uint64_t test_wall(void)
{
	return wall;
}

#define T0 1709211599ull /* 2024-02-29 12:59:59 UTC, a Thursday */

static uint8_t get(struct bench *b, uint8_t reg)
{
	outb(b, 0x70, reg);
	return inb(b, 0x71);
}

static void put(struct bench *b, uint8_t reg, uint8_t value)
{
	outb(b, 0x70, reg | 0x80); /* the NMI bit does not select anything */
	outb(b, 0x71, value);
}

static struct rtc *start(struct bench *b, uint64_t (*clock)(void))
{
	struct rtc *rtc;
	bench_start(b);
	wall = T0 * NS_PER_SEC;
	struct rtc_config config = {
		.pio = &b->pio, .loop = b->loop, .irq = bench_irq(b, 8), .wall_ns = clock,
		.memory_below_4g = 3ull << 30, .memory_above_4g = 13ull << 30,
	};
	assert_int_equal(rtc_create(&rtc, &config, NULL), 0);
	return rtc;
}

static void stop(struct bench *b, struct rtc *rtc)
{
	bench_halt(b);
	rtc_destroy(rtc);
	assert_int_equal(b->pio.nregions, 0);
	bench_stop(b);
}

static void tells_utc_in_bcd(void **state)
{
	(void)state;
	struct bench b;
	struct rtc *rtc = start(&b, test_wall);
	assert_int_equal(get(&b, 0x0b), 0x02);
	assert_int_equal(get(&b, 0x0d), 0x80);
	static const struct { uint8_t reg, value; } want[] = {
		{ 0, 0x59 }, { 2, 0x59 }, { 4, 0x12 }, { 6, 5 }, { 7, 0x29 }, { 8, 2 }, { 9, 0x24 }, { 0x32, 0x20 },
	};
	for (unsigned i = 0; i < sizeof(want) / sizeof(want[0]); i++)
		assert_int_equal(get(&b, want[i].reg), want[i].value);
	wall += NS_PER_SEC;
	assert_int_equal(get(&b, 4), 0x13);
	assert_int_equal(get(&b, 0), 0x00);
	stop(&b, rtc);
}

static void binary_and_12_hours(void **state)
{
	(void)state;
	struct bench b;
	struct rtc *rtc = start(&b, test_wall);
	put(&b, 0x0b, 0x06);
	assert_int_equal(get(&b, 0), 59);
	assert_int_equal(get(&b, 0x32), 20);
	put(&b, 0x0b, 0x00);
	assert_int_equal(get(&b, 4), 0x92); /* 12 PM is noon */
	wall += NS_PER_SEC;
	assert_int_equal(get(&b, 4), 0x81);
	wall += 11 * 3600 * NS_PER_SEC;
	assert_int_equal(get(&b, 4), 0x12); /* 12 AM is midnight */
	assert_int_equal(get(&b, 7), 0x01);
	assert_int_equal(get(&b, 8), 0x03);
	stop(&b, rtc);
}

static void update_in_progress(void **state)
{
	(void)state;
	struct bench b;
	struct rtc *rtc = start(&b, test_wall);
	assert_int_equal(get(&b, 0x0a), 0x26);
	wall += NS_PER_SEC - 3000000;
	assert_int_equal(get(&b, 0x0a) & 0x80, 0);
	wall += 2000000;
	assert_int_equal(get(&b, 0x0a) & 0x80, 0x80);
	assert_int_equal(get(&b, 0), 0x59);
	wall += 1000000;
	assert_int_equal(get(&b, 0x0a) & 0x80, 0);
	assert_int_equal(get(&b, 0), 0x00);
	stop(&b, rtc);
}

static void setting_the_time(void **state)
{
	(void)state;
	struct bench b;
	struct rtc *rtc = start(&b, test_wall);
	wall += 700000000;
	put(&b, 0x0b, 0x82); /* SET: the registers stand still */
	wall += 5 * NS_PER_SEC;
	assert_int_equal(get(&b, 0), 0x59);
	put(&b, 0, 0x58);
	put(&b, 2, 0x59);
	put(&b, 4, 0x23);
	put(&b, 7, 0x31);
	put(&b, 8, 0x12);
	put(&b, 9, 0x99);
	put(&b, 0x32, 0x19);
	assert_int_equal(get(&b, 9), 0x99);
	put(&b, 0x0b, 0x02);
	assert_int_equal(get(&b, 0), 0x58);
	wall += 300000000; /* the divider went on meanwhile */
	assert_int_equal(get(&b, 0), 0x59);
	wall += NS_PER_SEC;
	assert_int_equal(get(&b, 9), 0x00);
	assert_int_equal(get(&b, 0x32), 0x20);
	assert_int_equal(get(&b, 7), 0x01);

	/* Letting go of the divider reset: the first update half a second later. */
	put(&b, 0x0a, 0x76);
	put(&b, 0, 0x10);
	put(&b, 0x0a, 0x26);
	wall += 490000000;
	assert_int_equal(get(&b, 0), 0x10);
	wall += 20000000;
	assert_int_equal(get(&b, 0), 0x11);
	stop(&b, rtc);
}

static void flags_without_interrupts(void **state)
{
	(void)state;
	struct bench b;
	struct rtc *rtc = start(&b, test_wall);
	get(&b, 0x0c);
	put(&b, 1, 0x01); /* alarm at xx:xx:01 */
	put(&b, 3, 0xff);
	put(&b, 5, 0xc0);
	wall += NS_PER_SEC;
	assert_int_equal(get(&b, 0x0c) & 0xb0, 0x10);
	wall += NS_PER_SEC;
	assert_int_equal(get(&b, 0x0c) & 0xb0, 0x30);
	assert_int_equal(get(&b, 0x0c) & 0xb0, 0x00);
	bench_sleep_us(2000); /* 1024 Hz runs on */
	assert_int_equal(get(&b, 0x0c) & 0x40, 0x40);
	assert_int_equal(b.edges[8], 0);
	stop(&b, rtc);
}

static void interrupts(void **state)
{
	(void)state;
	struct bench b;
	struct rtc *rtc = start(&b, NULL);
	bench_run(&b);
	get(&b, 0x0c);
	put(&b, 0x0b, 0x42); /* periodic */
	for (unsigned i = 1; i <= 5; i++) {
		assert_true(bench_wait(&b, 8, i));
		bench_sleep_us(3000);
		assert_int_equal(bench_edges(&b, 8), i); /* no more until C is read */
		assert_int_equal(get(&b, 0x0c) & 0xc0, 0xc0);
	}
	put(&b, 0x0b, 0x12); /* update-ended */
	unsigned n = bench_edges(&b, 8);
	assert_int_equal(get(&b, 0x0c) & 0x80, 0);
	assert_true(bench_wait(&b, 8, n + 1));
	assert_int_equal(get(&b, 0x0c) & 0x90, 0x90);
	put(&b, 0x0b, 0x02);
	put(&b, 1, 0xff);
	put(&b, 3, 0xff);
	put(&b, 5, 0xff);
	n = bench_edges(&b, 8);
	put(&b, 0x0b, 0x22); /* alarm, every second */
	assert_true(bench_wait(&b, 8, n + 1));
	assert_int_equal(get(&b, 0x0c) & 0xa0, 0xa0);
	stop(&b, rtc);
}

static void memory_size(void **state)
{
	(void)state;
	struct bench b;
	struct rtc *rtc = start(&b, test_wall);
	assert_int_equal(get(&b, 0x15) | get(&b, 0x16) << 8, 640);
	uint64_t above_16m = (uint64_t)(get(&b, 0x34) | get(&b, 0x35) << 8) << 16;
	assert_true(above_16m + (16 << 20) == 3ull << 30);
	uint64_t high = (uint64_t)(get(&b, 0x5b) | get(&b, 0x5c) << 8 | get(&b, 0x5d) << 16) << 16;
	assert_true(high == 13ull << 30);
	put(&b, 0x40, 0xa5); /* plain CMOS keeps what is written */
	assert_int_equal(get(&b, 0x40), 0xa5);
	put(&b, 0x0d, 0);
	assert_int_equal(get(&b, 0x0d), 0x80);
	stop(&b, rtc);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(tells_utc_in_bcd),	cmocka_unit_test(binary_and_12_hours),
		cmocka_unit_test(update_in_progress),	cmocka_unit_test(setting_the_time),
		cmocka_unit_test(flags_without_interrupts), cmocka_unit_test(interrupts),
		cmocka_unit_test(memory_size),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
