#include <errno.h>

#include "devtest.h"
#include "pci/host.h"

struct machine {
	struct bench b;
	struct pci_host *host;
	struct pci_bus *bus;
	uint64_t msi_address;
	uint32_t msi_data;
	unsigned messages;
	uint16_t pm_base;
	bool pm_enabled;
};

static void on_msi(void *opaque, uint64_t address, uint32_t data)
{
	struct machine *m = opaque;
	m->msi_address = address;
	m->msi_data = data;
	m->messages++;
}

static void on_pm_move(void *opaque, uint16_t base, bool enabled)
{
	struct machine *m = opaque;
	m->pm_base = base;
	m->pm_enabled = enabled;
}

static void start(struct machine *m)
{
	memset(m, 0, sizeof(*m));
	bench_start(&m->b);
	struct pci_host_config config = {
		.pio = &m->b.pio, .mmio = &m->b.mmio, .msi = { on_msi, m }, .pm_base = 0x600, .pm_move = on_pm_move,
		.pm_opaque = m, .reset = bench_call, .reset_opaque = &m->b,
	};
	for (int i = 0; i < PCI_PIRQS; i++)
		config.pirq[i] = bench_irq(&m->b, PCI_PIRQ_GSI + i);
	for (int i = 0; i < 16; i++)
		config.isa[i] = bench_irq(&m->b, i);
	assert_int_equal(pci_host_create(&m->host, &config, NULL), 0);
	m->bus = pci_host_bus(m->host);
}

static void stop(struct machine *m)
{
	pci_host_destroy(m->host);
	assert_int_equal(m->b.pio.nregions, 0);
	assert_int_equal(m->b.mmio.nregions, 0);
	bench_stop(&m->b);
}

static uint32_t cf_read(struct machine *m, unsigned devfn, unsigned reg, unsigned size)
{
	bus_write(&m->b.pio, 0xcf8, 4, 0x80000000u | devfn << 8 | (reg & 0xfc));
	return (uint32_t)bus_read(&m->b.pio, 0xcfc + (reg & 3), size);
}

static void cf_write(struct machine *m, unsigned devfn, unsigned reg, unsigned size, uint32_t value)
{
	bus_write(&m->b.pio, 0xcf8, 4, 0x80000000u | devfn << 8 | (reg & 0xfc));
	bus_write(&m->b.pio, 0xcfc + (reg & 3), size, value);
}

static uint64_t ecam(unsigned devfn, unsigned reg)
{
	return PCI_ECAM_BASE + ((uint64_t)devfn << 12) + reg;
}

static void both_ways_to_configuration(void **state)
{
	(void)state;
	struct machine m;
	start(&m);
	/* Linux's check for mechanism 1 */
	bus_write(&m.b.pio, 0xcf8, 4, 0x80000000);
	assert_int_equal(bus_read(&m.b.pio, 0xcf8, 4), 0x80000000);
	assert_int_equal(cf_read(&m, 0, 0, 4), 0x29c08086);
	assert_int_equal(cf_read(&m, 0, 2, 2), 0x29c0);
	assert_int_equal(cf_read(&m, 0, 0x0a, 2), 0x0600);
	assert_int_equal(cf_read(&m, PCI_LPC_DEVFN, 0, 4), 0x29188086);
	assert_int_equal(cf_read(&m, PCI_LPC_DEVFN, 0x40, 4), 0x601);
	assert_int_equal(cf_read(&m, PCI_DEVFN(5, 0), 0, 4), 0xffffffff);
	assert_int_equal(cf_read(&m, PCI_DEVFN(5, 0), 2, 2), 0xffff);
	assert_int_equal(bus_read(&m.b.mmio, ecam(0, 0), 4), 0x29c08086);
	assert_int_equal(bus_read(&m.b.mmio, ecam(PCI_LPC_DEVFN, 3), 1), 0x29);
	assert_int_equal(bus_read(&m.b.mmio, ecam(8, 0), 4), 0xffffffff);
	assert_int_equal(bus_read(&m.b.mmio, PCI_ECAM_BASE + (1 << 20), 4), 0xffffffff); /* bus 1 */
	assert_int_equal(bus_read(&m.b.mmio, ecam(0, 0xffc), 4), 0);
	/* disabled, and bus 1 through the ports */
	bus_write(&m.b.pio, 0xcf8, 4, 0);
	assert_int_equal(bus_read(&m.b.pio, 0xcfc, 4), 0xffffffff);
	bus_write(&m.b.pio, 0xcf8, 4, 0x80010000);
	assert_int_equal(bus_read(&m.b.pio, 0xcfc, 4), 0xffffffff);
	/* read-only is read-only */
	cf_write(&m, 0, 0, 4, 0);
	assert_int_equal(cf_read(&m, 0, 0, 4), 0x29c08086);
	stop(&m);
}

static void chipset_registers(void **state)
{
	(void)state;
	struct machine m;
	start(&m);
	/* the reset port lies inside the address register */
	bus_write(&m.b.pio, 0xcf8, 4, 0x80000000);
	outb(&m.b, 0xcf9, 0x02);
	assert_int_equal(m.b.calls, 0);
	assert_int_equal(inb(&m.b, 0xcf9), 0x02);
	outb(&m.b, 0xcf9, 0x06);
	assert_int_equal(m.b.calls, 1);
	assert_int_equal(bus_read(&m.b.pio, 0xcf8, 4), 0x80000000);
	/* PMBASE */
	cf_write(&m, PCI_LPC_DEVFN, 0x40, 4, 0xb000);
	assert_int_equal(m.pm_base, 0xb000);
	assert_true(m.pm_enabled);
	assert_int_equal(cf_read(&m, PCI_LPC_DEVFN, 0x40, 4), 0xb001);
	cf_write(&m, PCI_LPC_DEVFN, 0x44, 1, 0);
	assert_false(m.pm_enabled);
	/* PCIEXBAR moves the window, and turns it off */
	cf_write(&m, 0, 0x60, 4, 0xb0000001);
	assert_int_equal(bus_read(&m.b.mmio, 0xb0000000, 4), 0x29c08086);
	assert_int_equal(bus_read(&m.b.mmio, ecam(0, 0), 4), 0xffffffff);
	cf_write(&m, 0, 0x60, 4, 0xb0000000);
	assert_int_equal(bus_read(&m.b.mmio, 0xb0000000, 4), 0xffffffff);
	stop(&m);
}

static uint64_t bar_read(void *opaque, uint64_t offset, unsigned size)
{
	(void)size;
	return (uintptr_t)opaque + offset;
}

static const struct bus_ops bar_ops = { .name = "test BAR", .max_size = 4, .read = bar_read };
static const struct pci_identity id = { .vendor = 0x1af4, .device = 0x1041, .class_code = 0x0200, .subsystem = 7 };
#define DEV PCI_DEVFN(3, 0)

static void bars(void **state)
{
	(void)state;
	struct machine m;
	struct pci_device d;
	start(&m);
	pci_init(&d, "test", &id);
	assert_int_equal(pci_add_bar(&d, 0, PCI_BAR_IO, 64, &bar_ops, (void *)0x100), 0);
	assert_int_equal(pci_add_bar(&d, 1, PCI_BAR_MEM32, 4096, &bar_ops, (void *)0x200), 0);
	assert_int_equal(pci_add_bar(&d, 4, PCI_BAR_MEM64_PREFETCH, 1ull << 33, &bar_ops, (void *)0x300), 0);
	assert_int_equal(pci_add_bar(&d, 5, PCI_BAR_MEM32, 4096, &bar_ops, NULL), -EINVAL);
	assert_int_equal(pci_add_bar(&d, 2, PCI_BAR_MEM32, 3000, &bar_ops, NULL), -EINVAL);
	assert_int_equal(pci_add_bar(&d, 2, PCI_BAR_IO, 2, &bar_ops, NULL), -EINVAL);
	assert_int_equal(pci_add_bar(&d, 6, PCI_BAR_IO, 4, &bar_ops, NULL), -EINVAL);
	int regions = m.b.mmio.nregions, ports = m.b.pio.nregions;
	struct error err;
	assert_int_equal(pci_attach(m.bus, &d, 0, &err), -EEXIST);
	assert_int_equal(pci_attach(m.bus, &d, DEV, &err), 0);

	/* sizing */
	cf_write(&m, DEV, 0x10, 4, 0xffffffff);
	assert_int_equal(cf_read(&m, DEV, 0x10, 4), 0xffffffc1);
	cf_write(&m, DEV, 0x14, 4, 0xffffffff);
	assert_int_equal(cf_read(&m, DEV, 0x14, 4), 0xfffff000);
	cf_write(&m, DEV, 0x18, 4, 0xffffffff);
	assert_int_equal(cf_read(&m, DEV, 0x18, 4), 0);
	cf_write(&m, DEV, 0x20, 4, 0xffffffff);
	cf_write(&m, DEV, 0x24, 4, 0xffffffff);
	assert_int_equal(cf_read(&m, DEV, 0x20, 4), 0x0000000c);
	assert_int_equal(cf_read(&m, DEV, 0x24, 4), 0xfffffffe);

	/* nothing is mapped before its enable is set, nor while it is being sized */
	cf_write(&m, DEV, 0x10, 4, 0xc040);
	cf_write(&m, DEV, 0x14, 4, 0xc0001000);
	assert_int_equal(m.b.mmio.nregions, regions);
	cf_write(&m, DEV, 0x04, 2, 0x0003);
	assert_int_equal(bus_read(&m.b.pio, 0xc044, 4), 0x104);
	assert_int_equal(bus_read(&m.b.mmio, 0xc0001008, 4), 0x208);
	cf_write(&m, DEV, 0x14, 4, 0xffffffff);
	assert_int_equal(m.b.mmio.nregions, regions);
	cf_write(&m, DEV, 0x24, 4, 0x10);
	cf_write(&m, DEV, 0x20, 4, 0);
	assert_int_equal(bus_read(&m.b.mmio, 0x1000000004ull, 4), 0x304);
	/* over the ECAM window: not mapped, harmless, and back again */
	cf_write(&m, DEV, 0x14, 4, (uint32_t)PCI_ECAM_BASE);
	assert_int_equal(bus_read(&m.b.mmio, ecam(0, 0), 4), 0x29c08086);
	cf_write(&m, DEV, 0x14, 4, 0xc0002000);
	assert_int_equal(bus_read(&m.b.mmio, 0xc0002000, 4), 0x200);
	cf_write(&m, DEV, 0x04, 2, 0x0001);
	assert_int_equal(bus_read(&m.b.mmio, 0xc0002000, 4), 0xffffffff);
	assert_int_equal(bus_read(&m.b.pio, 0xc040, 4), 0x100);
	pci_reset(&d);
	assert_int_equal(m.b.pio.nregions, ports);
	assert_int_equal(cf_read(&m, DEV, 0x10, 4), 1);
	cf_write(&m, DEV, 0x10, 4, 0xc040);
	cf_write(&m, DEV, 0x04, 2, 0x0001);
	pci_detach(&d);
	assert_int_equal(m.b.pio.nregions, ports);
	assert_int_equal(cf_read(&m, DEV, 0, 4), 0xffffffff);
	stop(&m);
}

static void intx_routing(void **state)
{
	(void)state;
	struct machine m;
	struct pci_device d, e;
	start(&m);
	pci_init(&d, "d", &id);
	pci_set_interrupt_pin(&d, 1);
	assert_int_equal(pci_attach(m.bus, &d, DEV, NULL), 0);
	pci_init(&e, "e", &id);
	pci_set_interrupt_pin(&e, 1);
	assert_int_equal(pci_attach(m.bus, &e, PCI_DEVFN(11, 0), NULL), 0);
	assert_int_equal(pci_host_gsi(3, 0), 19);
	assert_int_equal(pci_host_gsi(11, 0), 19);

	pci_set_intx(&d, 1);
	assert_int_equal(m.b.level[19], 1);
	assert_int_equal(cf_read(&m, DEV, 6, 2) & 8, 8);
	pci_set_intx(&e, 1);
	pci_set_intx(&d, 0);
	assert_int_equal(m.b.level[19], 1); /* shared */
	pci_set_intx(&e, 0);
	assert_int_equal(m.b.level[19], 0);

	pci_set_intx(&d, 1);
	cf_write(&m, DEV, 4, 2, PCI_COMMAND_INTX_DISABLE);
	assert_int_equal(m.b.level[19], 0);
	assert_int_equal(cf_read(&m, DEV, 6, 2) & 8, 8);
	cf_write(&m, DEV, 4, 2, 0);
	assert_int_equal(m.b.level[19], 1);

	/* PIRQD to the PIC's input 11 */
	assert_int_equal(cf_read(&m, PCI_LPC_DEVFN, 0x63, 1), 0x80);
	cf_write(&m, PCI_LPC_DEVFN, 0x63, 1, 11);
	assert_int_equal(m.b.level[11], 1);
	cf_write(&m, PCI_LPC_DEVFN, 0x63, 1, 8); /* reserved */
	assert_int_equal(m.b.level[11], 0);
	assert_int_equal(m.b.level[8], 0);
	pci_detach(&d);
	assert_int_equal(m.b.level[19], 0);
	pci_detach(&e);
	stop(&m);
}

static void msi(void **state)
{
	(void)state;
	struct machine m;
	struct pci_device d;
	start(&m);
	pci_init(&d, "d", &id);
	pci_set_interrupt_pin(&d, 1);
	assert_int_equal(pci_add_capability(&d, PCI_CAP_VENDOR, 5), 0x40);
	assert_int_equal(pci_add_msi(&d, 3), -EINVAL);
	assert_int_equal(pci_add_msi(&d, 4), 0);
	assert_int_equal(pci_attach(m.bus, &d, DEV, NULL), 0);
	assert_int_equal(cf_read(&m, DEV, 0x34, 1), 0x40);
	assert_int_equal(cf_read(&m, DEV, 0x41, 1), 0x48);
	assert_int_equal(cf_read(&m, DEV, 0x48, 4), 0x01840005);
	assert_int_equal(cf_read(&m, DEV, 6, 2) & 0x10, 0x10);

	pci_msi_notify(&d, 0); /* off */
	cf_write(&m, DEV, 0x4c, 4, 0xfee01003);
	cf_write(&m, DEV, 0x50, 4, 0);
	cf_write(&m, DEV, 0x54, 2, 0x4041);
	pci_set_intx(&d, 1);
	assert_int_equal(m.b.level[19], 1);
	cf_write(&m, DEV, 0x4a, 2, 0x0021); /* four vectors, on */
	assert_int_equal(m.b.level[19], 0); /* MSI replaces INTx */
	pci_msi_notify(&d, 2);
	assert_int_equal(m.messages, 0); /* not a bus master yet */
	cf_write(&m, DEV, 4, 2, PCI_COMMAND_MASTER);
	pci_msi_notify(&d, 2);
	assert_int_equal(m.messages, 1);
	assert_true(m.msi_address == 0xfee01000);
	assert_int_equal(m.msi_data, 0x4042);
	cf_write(&m, DEV, 0x58, 4, 0x8);
	pci_msi_notify(&d, 3);
	assert_int_equal(m.messages, 1);
	assert_int_equal(cf_read(&m, DEV, 0x5c, 4), 8);
	cf_write(&m, DEV, 0x58, 4, 0);
	assert_int_equal(m.messages, 2);
	assert_int_equal(m.msi_data, 0x4043);
	assert_int_equal(cf_read(&m, DEV, 0x5c, 4), 0);
	cf_write(&m, DEV, 0x4a, 2, 0x0001); /* only one allowed: all share it */
	pci_msi_notify(&d, 3);
	assert_int_equal(m.msi_data, 0x4041);
	pci_detach(&d);
	stop(&m);
}

static void msix(void **state)
{
	(void)state;
	struct machine m;
	struct pci_device d;
	const uint64_t at = 0xc0010000;
	start(&m);
	pci_init(&d, "d", &id);
	assert_int_equal(pci_add_msix(&d, 1, 0), -EINVAL);
	assert_int_equal(pci_add_msix(&d, 1, 2049), -EINVAL);
	assert_int_equal(pci_add_msix(&d, 1, 3), 0);
	assert_int_equal(pci_add_msix(&d, 2, 3), -EINVAL);
	assert_int_equal(pci_attach(m.bus, &d, DEV, NULL), 0);
	assert_int_equal(cf_read(&m, DEV, 0x40, 4), 0x00020011);
	assert_int_equal(cf_read(&m, DEV, 0x44, 4), 0x00000001);
	assert_int_equal(cf_read(&m, DEV, 0x48, 4), 0x00000801);
	cf_write(&m, DEV, 0x14, 4, 0xffffffff);
	assert_int_equal(cf_read(&m, DEV, 0x14, 4), 0xfffff000);
	cf_write(&m, DEV, 0x14, 4, (uint32_t)at);
	cf_write(&m, DEV, 4, 2, PCI_COMMAND_MASTER | PCI_COMMAND_MEMORY);

	assert_int_equal(bus_read(&m.b.mmio, at + 16 + 12, 4), 1); /* masked after reset */
	bus_write(&m.b.mmio, at + 16, 8, 0x1fee02000ull);
	bus_write(&m.b.mmio, at + 24, 4, 0x55);
	assert_true(bus_read(&m.b.mmio, at + 16, 8) == 0x1fee02000ull);
	pci_msix_notify(&d, 1); /* off: lost, the device uses INTx then */
	cf_write(&m, DEV, 0x42, 2, 0xc000); /* on, whole function masked */
	bus_write(&m.b.mmio, at + 28, 4, 0);
	pci_msix_notify(&d, 1);
	assert_int_equal(m.messages, 0);
	assert_true(bus_read(&m.b.mmio, at + 2048, 8) == 2);
	bus_write(&m.b.mmio, at + 2048, 4, 0); /* read-only */
	cf_write(&m, DEV, 0x42, 2, 0x8000);
	assert_int_equal(m.messages, 1);
	assert_true(m.msi_address == 0x1fee02000ull);
	assert_int_equal(m.msi_data, 0x55);
	assert_true(bus_read(&m.b.mmio, at + 2048, 8) == 0);
	bus_write(&m.b.mmio, at + 28, 4, 1);
	pci_msix_notify(&d, 1);
	pci_msix_notify(&d, 1);
	assert_int_equal(m.messages, 1);
	bus_write(&m.b.mmio, at + 28, 4, 0);
	assert_int_equal(m.messages, 2);
	pci_msix_notify(&d, 3); /* no such vector */
	assert_int_equal(m.messages, 2);
	assert_true(bus_read(&m.b.mmio, at + 48, 8) == 0); /* beyond the table */
	bus_write(&m.b.mmio, at + 48, 8, UINT64_MAX);
	pci_detach(&d);
	stop(&m);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(both_ways_to_configuration), cmocka_unit_test(chipset_registers),
		cmocka_unit_test(bars),			      cmocka_unit_test(intx_routing),
		cmocka_unit_test(msi),			      cmocka_unit_test(msix),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
