/* MCH: Intel 3 Series Express Chipset (P35/Q35) datasheet, section 5. LPC bridge: ICH9 datasheet, section 13. */
#include "pci/host.h"

#include <errno.h>
#include <stdlib.h>

#include "base/error.h"

#define CONFIG_ADDRESS 0xcf8
#define CONFIG_DATA 0xcfc
#define CONFIG_ENABLE 0x80000000u

#define MCH_PCIEXBAR 0x60 /* 5.1.15; 64 bits */
#define PCIEXBAR_ENABLE 1u
#define MCH_PAM 0x90	/* 7 bytes */
#define MCH_SMRAM 0x9d	/* and ESMRAMC */

#define LPC_PMBASE 0x40
#define LPC_ACPI_CNTL 0x44
#define ACPI_CNTL_ENABLE 0x80
#define LPC_PIRQ_ROUT 0x60 /* A-D; E-H at 0x68 */
#define PIRQ_NOT_ROUTED 0x80

#define RST_CPU 0x04 /* reset control register, port 0xcf9 (13.7.5): a rising bit 2 resets */
#define RST_WRITABLE 0x0e

struct pci_host {
	struct pci_host_config config;
	struct pci_bus bus;
	struct pci_device mch, lpc;
	uint32_t address; /* CONFIG_ADDRESS */
	uint8_t rst_cnt;
	bool ecam_mapped;
	uint64_t ecam_base;
	uint8_t asserted[PCI_PIRQS][256 / 8]; /* by PIRQ: the functions that assert it */
	bool pirq_level[PCI_PIRQS];
	uint16_t isa_level; /* ISA lines that PIRQs hold up */
};

/* --- interrupts --- */

static void update_isa(struct pci_host *h)
{
	uint16_t level = 0;
	for (unsigned p = 0; p < PCI_PIRQS; p++) {
		uint8_t rout = h->lpc.config[LPC_PIRQ_ROUT + p + (p >= 4 ? 4 : 0)];
		if (h->pirq_level[p] && !(rout & PIRQ_NOT_ROUTED))
			level |= (uint16_t)(1u << (rout & 15));
	}
	level &= 0xdef8; /* 13.1.17: IRQ 0, 1, 2, 8 and 13 are reserved */
	uint16_t changed = level ^ h->isa_level;
	h->isa_level = level;
	for (unsigned i = 0; i < 16; i++)
		if (changed & 1u << i)
			irq_set(&h->config.isa[i], level >> i & 1);
}

static void set_intx(void *opaque, uint8_t devfn, unsigned pin, int level)
{
	struct pci_host *h = opaque;
	unsigned p = pci_host_gsi(devfn >> 3, pin) - PCI_PIRQ_GSI;
	uint8_t *asserted = h->asserted[p];
	if (level)
		asserted[devfn / 8] |= (uint8_t)(1u << devfn % 8);
	else
		asserted[devfn / 8] &= (uint8_t)~(1u << devfn % 8);
	bool any = false; /* lines are wired OR */
	for (unsigned i = 0; i < sizeof(h->asserted[p]); i++)
		any |= asserted[i] != 0;
	if (any == h->pirq_level[p])
		return;
	h->pirq_level[p] = any;
	irq_set(&h->config.pirq[p], any);
	update_isa(h);
}

/* --- configuration mechanism 1 (PCI 3.0 3.2.2.3.2) and the reset port in its midst --- */

static uint64_t address_read(void *opaque, uint64_t offset, unsigned size)
{
	struct pci_host *h = opaque;
	if (offset == 0 && size == 4)
		return h->address;
	return offset == 1 && size == 1 ? h->rst_cnt : UINT64_MAX;
}

static void address_write(void *opaque, uint64_t offset, unsigned size, uint64_t value)
{
	struct pci_host *h = opaque;
	if (offset == 0 && size == 4) {
		h->address = (uint32_t)value & ~0x7f000003u;
	} else if (offset == 1 && size == 1) {
		bool rising = (value & ~h->rst_cnt & RST_CPU) != 0;
		h->rst_cnt = value & RST_WRITABLE;
		if (rising && h->config.reset)
			h->config.reset(h->config.reset_opaque);
	}
}

static uint64_t data_read(void *opaque, uint64_t offset, unsigned size)
{
	struct pci_host *h = opaque;
	if (!(h->address & CONFIG_ENABLE) || (h->address >> 16 & 0xff))
		return UINT64_MAX;
	return pci_config_read(&h->bus, (uint8_t)(h->address >> 8), (h->address & 0xfc) + (unsigned)offset, size);
}

static void data_write(void *opaque, uint64_t offset, unsigned size, uint64_t value)
{
	struct pci_host *h = opaque;
	if (!(h->address & CONFIG_ENABLE) || (h->address >> 16 & 0xff))
		return;
	pci_config_write(&h->bus, (uint8_t)(h->address >> 8), (h->address & 0xfc) + (unsigned)offset, size,
			 (uint32_t)value);
}

/* --- ECAM (PCI Express Base 2.0 7.2.2): bus 27:20, device 19:15, function 14:12, register 11:0 --- */

static uint64_t ecam_read(void *opaque, uint64_t offset, unsigned size)
{
	struct pci_host *h = opaque;
	if (offset >> 20)
		return UINT64_MAX;
	return pci_config_read(&h->bus, (uint8_t)(offset >> 12), offset & 0xfff, size);
}

static void ecam_write(void *opaque, uint64_t offset, unsigned size, uint64_t value)
{
	struct pci_host *h = opaque;
	if (offset >> 20)
		return;
	pci_config_write(&h->bus, (uint8_t)(offset >> 12), offset & 0xfff, size, (uint32_t)value);
}

static const struct bus_ops address_ops = {
	.name = "PCI configuration address", .max_size = 4, .read = address_read, .write = address_write
};
static const struct bus_ops data_ops = {
	.name = "PCI configuration data", .max_size = 4, .read = data_read, .write = data_write
};
static const struct bus_ops ecam_ops = { .name = "PCI ECAM", .max_size = 4, .read = ecam_read, .write = ecam_write };

/* Move the window where PCIEXBAR says: base 35:28 and up, length in bits 2:1 (256, 128 or 64 MiB), enable in bit 0. */
static int update_ecam(struct pci_host *h, struct error *err)
{
	uint64_t reg = pci_get32(&h->mch, MCH_PCIEXBAR) | (uint64_t)pci_get32(&h->mch, MCH_PCIEXBAR + 4) << 32;
	unsigned length = reg >> 1 & 3;
	if (h->ecam_mapped)
		bus_unmap(h->config.mmio, h->ecam_base);
	h->ecam_mapped = false;
	if (!(reg & PCIEXBAR_ENABLE) || length == 3)
		return 0;
	uint64_t size = PCI_ECAM_SIZE >> length;
	h->ecam_base = reg & 0xfffffffffull & ~(size - 1);
	int r = bus_map(h->config.mmio, h->ecam_base, size, &ecam_ops, h, err);
	h->ecam_mapped = r == 0;
	return r;
}

/* --- the two bridges --- */

static void mch_written(struct pci_device *dev, unsigned offset, unsigned size)
{
	struct pci_host *h = dev->bus->opaque;
	if (offset < MCH_PCIEXBAR + 8 && offset + size > MCH_PCIEXBAR)
		update_ecam(h, NULL);
}

static void lpc_written(struct pci_device *dev, unsigned offset, unsigned size)
{
	struct pci_host *h = dev->bus->opaque;
	if (offset < LPC_ACPI_CNTL + 1 && offset + size > LPC_PMBASE && h->config.pm_move)
		h->config.pm_move(h->config.pm_opaque, pci_get16(dev, LPC_PMBASE) & 0xff80,
				  dev->config[LPC_ACPI_CNTL] & ACPI_CNTL_ENABLE);
	if (offset < LPC_PIRQ_ROUT + 12 && offset + size > LPC_PIRQ_ROUT)
		update_isa(h);
}

static void init_mch(struct pci_host *h)
{
	struct pci_device *d = &h->mch;
	static const struct pci_identity id = { .vendor = 0x8086, .device = 0x29c0, .revision = 2, .class_code = 0x0600 };
	pci_init(d, "MCH host bridge", &id);
	/* 5.1.3: memory and bus master enables are hardwired to 1, I/O to 0. */
	pci_put16(d, PCI_COMMAND, PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER);
	d->wmask[PCI_COMMAND] = 0x40;
	d->wmask[PCI_COMMAND + 1] = 0x01;
	pci_put32(d, MCH_PCIEXBAR, (uint32_t)PCI_ECAM_BASE | PCIEXBAR_ENABLE);
	static const uint8_t pciexbar_mask[8] = { 0x07, 0, 0, 0xfc, 0x0f, 0, 0, 0 };
	for (int i = 0; i < 8; i++)
		d->wmask[MCH_PCIEXBAR + i] = pciexbar_mask[i];
	for (int i = 0; i < 7; i++)
		d->wmask[MCH_PAM + i] = 0x33; /* storage: RAM is always behind the BIOS area */
	d->config[MCH_SMRAM] = 0x02;
	d->wmask[MCH_SMRAM] = 0x78;
	d->config_written = mch_written;
}

static void init_lpc(struct pci_host *h)
{
	struct pci_device *d = &h->lpc;
	static const struct pci_identity id = { .vendor = 0x8086, .device = 0x2918, .revision = 2, .class_code = 0x0601 };
	pci_init(d, "ICH9 LPC bridge", &id);
	/* 13.1.3: all three enables are hardwired to 1. */
	pci_put16(d, PCI_COMMAND, PCI_COMMAND_IO | PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER);
	d->wmask[PCI_COMMAND] = 0x40;
	d->wmask[PCI_COMMAND + 1] = 0x01;
	pci_put32(d, LPC_PMBASE, h->config.pm_base | 1u);
	d->wmask[LPC_PMBASE] = 0x80;
	d->wmask[LPC_PMBASE + 1] = 0xff;
	d->config[LPC_ACPI_CNTL] = ACPI_CNTL_ENABLE; /* SCI on IRQ 9 */
	d->wmask[LPC_ACPI_CNTL] = ACPI_CNTL_ENABLE | 0x07;
	for (unsigned p = 0; p < PCI_PIRQS; p++) {
		unsigned reg = LPC_PIRQ_ROUT + p + (p >= 4 ? 4 : 0);
		d->config[reg] = PIRQ_NOT_ROUTED;
		d->wmask[reg] = 0x8f;
	}
	d->config_written = lpc_written;
}

int pci_host_create(struct pci_host **out, const struct pci_host_config *config, struct error *err)
{
	struct pci_host *h = calloc(1, sizeof(*h));
	if (!h)
		return error_set(err, ENOMEM, "out of memory for the PCI host bridge");
	h->config = *config;
	h->bus = (struct pci_bus){
		.pio = config->pio, .mmio = config->mmio, .msi = config->msi, .set_intx = set_intx, .opaque = h
	};
	init_mch(h);
	init_lpc(h);
	pci_attach(&h->bus, &h->mch, PCI_DEVFN(0, 0), NULL); /* an empty bus takes both */
	pci_attach(&h->bus, &h->lpc, PCI_LPC_DEVFN, NULL);
	int r = bus_map(config->pio, CONFIG_ADDRESS, 4, &address_ops, h, err);
	if (r < 0)
		goto fail;
	r = bus_map(config->pio, CONFIG_DATA, 4, &data_ops, h, err);
	if (r < 0)
		goto fail_address;
	r = update_ecam(h, err);
	if (r < 0)
		goto fail_data;
	*out = h;
	return 0;

fail_data:
	bus_unmap(config->pio, CONFIG_DATA);
fail_address:
	bus_unmap(config->pio, CONFIG_ADDRESS);
fail:
	free(h);
	return r;
}

void pci_host_destroy(struct pci_host *host)
{
	if (!host)
		return;
	if (host->ecam_mapped)
		bus_unmap(host->config.mmio, host->ecam_base);
	bus_unmap(host->config.pio, CONFIG_DATA);
	bus_unmap(host->config.pio, CONFIG_ADDRESS);
	pci_detach(&host->lpc);
	pci_detach(&host->mch);
	free(host);
}

struct pci_bus *pci_host_bus(struct pci_host *host)
{
	return &host->bus;
}
