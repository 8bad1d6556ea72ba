/* The small devices: ACPI PM, i8042, debug exit. */
#include "device/debugexit.h"
#include "device/i8042.h"
#include "device/pm.h"
#include "devtest.h"

static struct pm *start(struct bench *b)
{
	struct pm *pm;
	bench_start(b);
	struct pm_config config = { .pio = &b->pio,
				    .loop = b->loop,
				    .base = PM_BASE,
				    .sci = bench_irq(b, 9),
				    .poweroff = bench_call,
				    .opaque = b };
	assert_int_equal(pm_create(&pm, &config, NULL), 0);
	return pm;
}

static void stop(struct bench *b, struct pm *pm)
{
	bench_halt(b);
	pm_destroy(pm);
	assert_int_equal(b->pio.nregions, 0);
	bench_stop(b);
}

static void pm_timer(void **state)
{
	(void)state;
	struct bench b;
	struct pm *pm = start(&b);
	uint64_t n0 = clock_ns();
	uint32_t t0 = (uint32_t)bus_read(&b.pio, PM_BASE + PM_TMR, 4);
	bench_sleep_us(3000);
	uint32_t t1 = (uint32_t)bus_read(&b.pio, PM_BASE + PM_TMR, 4);
	uint64_t most = clock_muldiv(clock_ns() - n0, PM_TIMER_HZ, NS_PER_SEC) + 1;
	uint32_t ticks = (t1 - t0) & 0xffffff;
	assert_true(t1 <= 0xffffff && ticks >= 10738 && ticks <= most);
	stop(&b, pm);
}

static void timer_overflow_raises_sci(void **state)
{
	(void)state;
	struct bench b;
	struct pm *pm = start(&b);
	bench_run(&b);
	bus_write(&b.pio, PM_BASE, 2, 0xffff);
	uint32_t t = (uint32_t)bus_read(&b.pio, PM_BASE + PM_TMR, 4) & 0x800000;
	bus_write(&b.pio, PM_BASE + 2, 2, 0x0001);
	assert_int_equal(bench_edges(&b, 9), 0);
	assert_true(bench_wait(&b, 9, 1)); /* at most 2.35 s */
	assert_int_equal(bus_read(&b.pio, PM_BASE, 2) & 1, 1);
	assert_int_not_equal(bus_read(&b.pio, PM_BASE + PM_TMR, 4) & 0x800000, t);
	bus_write(&b.pio, PM_BASE, 2, 0x0001);
	assert_int_equal(bus_read(&b.pio, PM_BASE, 2) & 1, 0);
	assert_int_equal(b.level[9], 0);
	stop(&b, pm);
}

static void power_button_and_gpe(void **state)
{
	(void)state;
	struct bench b;
	struct pm *pm = start(&b);
	pm_power_button(pm);
	assert_int_equal(bus_read(&b.pio, PM_BASE, 2) & 0x100, 0x100);
	assert_int_equal(b.level[9], 0);
	bus_write(&b.pio, PM_BASE, 4, 0x01200000); /* both enables in one access, as the OS may */
	assert_int_equal(b.level[9], 1);
	bus_write(&b.pio, PM_BASE, 2, 0x0100);
	assert_int_equal(b.level[9], 0);
	pm_gpe(pm, 35);
	pm_gpe(pm, 64);
	assert_int_equal(bus_read(&b.pio, PM_BASE + PM_GPE0 + 4, 1), 8);
	outb(&b, PM_BASE + PM_GPE0 + 12, 8);
	assert_int_equal(b.level[9], 1);
	outb(&b, PM_BASE + PM_GPE0 + 4, 8);
	assert_int_equal(b.level[9], 0);
	stop(&b, pm);
}

static void sleeps(void **state)
{
	(void)state;
	struct bench b;
	struct pm *pm = start(&b);
	assert_int_equal(bus_read(&b.pio, PM_BASE + PM_PM1_CNT, 2), 1); /* SCI_EN */
	bus_write(&b.pio, PM_BASE + PM_PM1_CNT, 2, 0);
	assert_int_equal(bus_read(&b.pio, PM_BASE + PM_PM1_CNT, 2), 1);
	bus_write(&b.pio, PM_BASE + PM_PM1_CNT, 2, PM_SLP_TYP_S5 << 10); /* the type alone does nothing */
	assert_int_equal(b.calls, 0);
	bus_write(&b.pio, PM_BASE + PM_PM1_CNT, 2, 5 << 10 | 1 << 13); /* S3 wakes at once */
	assert_int_equal(b.calls, 0);
	assert_int_equal(bus_read(&b.pio, PM_BASE, 2) & 0x8000, 0x8000);
	bus_write(&b.pio, PM_BASE + PM_PM1_CNT, 2, PM_SLP_TYP_S5 << 10 | 1 << 13 | 1);
	assert_int_equal(b.calls, 1);
	assert_int_equal(bus_read(&b.pio, PM_BASE + PM_PM1_CNT, 2), PM_SLP_TYP_S5 << 10 | 1);
	stop(&b, pm);
}

static void moves(void **state)
{
	(void)state;
	struct bench b;
	struct pm *pm = start(&b);
	pm_move(pm, 0xb000, true);
	assert_int_equal(bus_read(&b.pio, PM_BASE + PM_PM1_CNT, 2), 0xffff);
	assert_int_equal(bus_read(&b.pio, 0xb000 + PM_PM1_CNT, 2), 1);
	pm_move(pm, 0xb000, false);
	assert_int_equal(bus_read(&b.pio, 0xb000 + PM_PM1_CNT, 2), 0xffff);
	stop(&b, pm);
}

static uint8_t command(struct bench *b, uint8_t cmd)
{
	outb(b, 0x64, cmd);
	assert_int_equal(inb(b, 0x64) & 0x01, 0x01);
	return inb(b, 0x60);
}

static void keyboard_controller(void **state)
{
	(void)state;
	struct bench b;
	struct i8042 *k;
	bench_start(&b);
	struct i8042_config config = {
		.pio = &b.pio, .irq1 = bench_irq(&b, 1), .irq12 = bench_irq(&b, 12), .reset = bench_call, .opaque = &b
	};
	assert_int_equal(i8042_create(&k, &config, NULL), 0);
	assert_int_equal(inb(&b, 0x64) & 0x03, 0);
	assert_int_equal(command(&b, 0xaa), 0x55);
	assert_int_equal(command(&b, 0xab), 0x00);
	assert_int_equal(command(&b, 0x20) & 0x04, 0x04);
	outb(&b, 0x64, 0x60);
	outb(&b, 0x60, 0x45); /* interrupts of the keyboard on */
	assert_int_equal(b.edges[1], 0);
	/* Nobody answers on either port, at once. */
	outb(&b, 0x60, 0xf2);
	assert_int_equal(inb(&b, 0x64) & 0x61, 0x41);
	assert_int_equal(b.level[1], 1);
	assert_int_equal(inb(&b, 0x60), 0xfe);
	assert_int_equal(b.level[1], 0);
	assert_int_equal(command(&b, 0xa9), 0x01);
	outb(&b, 0x64, 0xd3);
	outb(&b, 0x60, 0x5a);
	assert_int_equal(inb(&b, 0x64) & 0x21, 0x21);
	assert_int_not_equal(inb(&b, 0x60), 0x5a);
	/* A20 both ways */
	outb(&b, 0x92, 0x00);
	assert_int_equal(command(&b, 0xd0) & 2, 0);
	outb(&b, 0x64, 0xdf);
	assert_int_equal(inb(&b, 0x92), 2);
	/* Three ways to reset */
	assert_int_equal(b.calls, 0);
	outb(&b, 0x64, 0xfe);
	assert_int_equal(b.calls, 1);
	outb(&b, 0x64, 0xff);
	assert_int_equal(b.calls, 1);
	outb(&b, 0x92, 0x03);
	outb(&b, 0x92, 0x03);
	assert_int_equal(b.calls, 2);
	outb(&b, 0x64, 0xd1);
	outb(&b, 0x60, 0x02);
	assert_int_equal(b.calls, 3);
	i8042_destroy(k);
	assert_int_equal(b.pio.nregions, 0);
	bench_stop(&b);
}

static void on_exit_port(void *opaque, uint32_t value)
{
	struct bench *b = opaque;
	b->calls++;
	b->value = value;
}

static void debug_exit(void **state)
{
	(void)state;
	struct bench b;
	struct debugexit *d;
	struct error err;
	bench_start(&b);
	struct debugexit_config config = {
		.pio = &b.pio, .port = DEBUGEXIT_PORT, .exit = on_exit_port, .opaque = &b
	};
	assert_int_equal(debugexit_create(&d, &config, NULL), 0);
	outb(&b, DEBUGEXIT_PORT, 0x21);
	assert_int_equal(b.value, 0x21);
	bus_write(&b.pio, DEBUGEXIT_PORT, 4, 0x12345678);
	assert_int_equal(b.value, 0x12345678);
	assert_int_equal(b.calls, 2);
	struct debugexit *second;
	assert_true(debugexit_create(&second, &config, &err) < 0);
	debugexit_destroy(d);
	bench_stop(&b);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(pm_timer), cmocka_unit_test(timer_overflow_raises_sci),
		cmocka_unit_test(power_button_and_gpe), cmocka_unit_test(sleeps),
		cmocka_unit_test(moves),    cmocka_unit_test(keyboard_controller),
		cmocka_unit_test(debug_exit),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
