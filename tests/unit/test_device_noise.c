/* Every device at once, under random accesses with a fixed seed: nothing a guest writes may crash or hang the VMM. */
#include "chardev/chardev.h"
#include "device/debugexit.h"
#include "device/hpet.h"
#include "device/i8042.h"
#include "device/pit.h"
#include "device/pm.h"
#include "device/rtc.h"
#include "device/uart.h"
#include "devtest.h"
#include "pci/host.h"

static uint64_t seed = 0x9e3779b97f4a7c15ull;

static uint64_t rnd(void) /* xorshift64 */
{
	seed ^= seed << 13;
	seed ^= seed >> 7;
	seed ^= seed << 17;
	return seed;
}

static void ignore_msi(void *opaque, uint64_t address, uint32_t data)
{
	(void)opaque, (void)address, (void)data;
}

static void ignore_exit(void *opaque, uint32_t value)
{
	(void)opaque, (void)value;
}

static void random_access(struct bench *b)
{
	static const uint16_t ports[] = { 0x40, 0x41, 0x42, 0x43, 0x60, 0x61, 0x64, 0x70, 0x71, 0x92, 0xf4,
					  0x3f8, 0x600, 0x620, 0xcf8, 0xcf9, 0xcfc, 0xc000, 0xffff };
	uint64_t r = rnd(), value = rnd() >> (rnd() % 64);
	unsigned size = 1u << r % 4;
	if (r & 0x100) {
		uint64_t port = ports[(r >> 16) % (sizeof(ports) / sizeof(ports[0]))] + (r >> 32) % 12;
		if (size == 8)
			size = 4;
		if (r & 0x200)
			bus_read(&b->pio, port, size);
		else
			bus_write(&b->pio, port, size, value);
		return;
	}
	static const uint64_t bases[] = { HPET_BASE, HPET_BASE + 0x100, PCI_ECAM_BASE, PCI_ECAM_BASE + (31ull << 15),
					  PCI_ECAM_BASE + (3ull << 15), PCI_MMIO32_BASE, UINT64_MAX - 64 };
	uint64_t at = bases[(r >> 16) % (sizeof(bases) / sizeof(bases[0]))] + (r >> 32) % 160;
	if (r & 0x200)
		bus_read(&b->mmio, at, size);
	else
		bus_write(&b->mmio, at, size, value);
}

static void noise(void **state)
{
	(void)state;
	struct bench b;
	struct chardev *cd;
	struct hpet *hpet;
	struct pit *pit;
	struct rtc *rtc;
	struct i8042 *kbc;
	struct uart *uart;
	struct pm *pm;
	struct debugexit *dx;
	struct pci_host *host;
	struct pci_device dev;
	bench_start(&b);
	struct chardev_config cc = { .loop = b.loop };
	assert_int_equal(chardev_open(&cd, "file:/dev/null", &cc, NULL), 0);
	struct hpet_config hc = {
		.mmio = &b.mmio, .loop = b.loop, .base = HPET_BASE, .irq0 = bench_irq(&b, 30), .irq8 = bench_irq(&b, 31)
	};
	for (int i = 16; i < HPET_GSIS; i++)
		hc.gsi[i] = bench_irq(&b, i);
	assert_int_equal(hpet_create(&hpet, &hc, NULL), 0);
	struct pit_config pc = { .pio = &b.pio, .loop = b.loop, .irq = hpet_gate_pit(hpet) };
	assert_int_equal(pit_create(&pit, &pc, NULL), 0);
	struct rtc_config rc = { .pio = &b.pio, .loop = b.loop, .irq = hpet_gate_rtc(hpet), .memory_below_4g = 1 << 30 };
	assert_int_equal(rtc_create(&rtc, &rc, NULL), 0);
	struct i8042_config kc = {
		.pio = &b.pio, .irq1 = bench_irq(&b, 1), .irq12 = bench_irq(&b, 12), .reset = bench_call, .opaque = &b
	};
	assert_int_equal(i8042_create(&kbc, &kc, NULL), 0);
	struct uart_config uc = { .pio = &b.pio, .base = UART_COM1_BASE, .irq = bench_irq(&b, 4), .chardev = cd };
	assert_int_equal(uart_create(&uart, &uc, NULL), 0);
	struct pm_config mc = { .pio = &b.pio, .loop = b.loop, .base = PM_BASE, .sci = bench_irq(&b, 9),
				.poweroff = bench_call, .opaque = &b };
	assert_int_equal(pm_create(&pm, &mc, NULL), 0);
	struct debugexit_config dc = { .pio = &b.pio, .port = DEBUGEXIT_PORT, .exit = ignore_exit };
	assert_int_equal(debugexit_create(&dx, &dc, NULL), 0);
	struct pci_host_config phc = { .pio = &b.pio, .mmio = &b.mmio, .msi = { ignore_msi, NULL }, .pm_base = PM_BASE,
				       .pm_move = pm_move, .pm_opaque = pm, .reset = bench_call, .reset_opaque = &b };
	assert_int_equal(pci_host_create(&host, &phc, NULL), 0);
	static const struct pci_identity id = { .vendor = 1, .device = 2 };
	pci_init(&dev, "noise", &id);
	pci_set_interrupt_pin(&dev, 1);
	assert_int_equal(pci_add_msi(&dev, 8), 0);
	assert_int_equal(pci_add_msix(&dev, 0, 33), 0);
	assert_int_equal(pci_attach(pci_host_bus(host), &dev, PCI_DEVFN(3, 0), NULL), 0);

	bench_run(&b);
	for (int i = 0; i < 150000; i++) {
		random_access(&b);
		if (i % 64 == 0) {
			pthread_mutex_lock(&b.lock);
			pci_msix_notify(&dev, (unsigned)rnd() % 40);
			pci_msi_notify(&dev, (unsigned)rnd() % 40);
			pci_set_intx(&dev, rnd() & 1);
			pthread_mutex_unlock(&b.lock);
		}
	}
	bench_halt(&b);

	pci_detach(&dev);
	pci_host_destroy(host);
	debugexit_destroy(dx);
	pm_destroy(pm);
	uart_destroy(uart);
	i8042_destroy(kbc);
	rtc_destroy(rtc);
	pit_destroy(pit);
	hpet_destroy(hpet);
	chardev_close(cd);
	assert_int_equal(b.pio.nregions, 0);
	assert_int_equal(b.mmio.nregions, 0);
	bench_stop(&b);
}

int main(void)
{
	const struct CMUnitTest tests[] = { cmocka_unit_test(noise) };
	return cmocka_run_group_tests(tests, NULL, NULL);
}
