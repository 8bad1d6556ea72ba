/* Section numbers are of the PCI Local Bus Specification 3.0. */
#include "pci/pci.h"

#include <errno.h>
#include <string.h>

#include "base/error.h"
#include "pci/msi.h"

#define FIRST_CAP 0x40
#define HEADER_END 0x100 /* capabilities of the first 256 bytes; extended ones would follow */
#define BAR_IO 0x1
#define BAR_MEM64 0x4
#define BAR_PREFETCH 0x8

uint16_t pci_get16(const struct pci_device *dev, unsigned offset)
{
	return (uint16_t)(dev->config[offset] | dev->config[offset + 1] << 8);
}

uint32_t pci_get32(const struct pci_device *dev, unsigned offset)
{
	return pci_get16(dev, offset) | (uint32_t)pci_get16(dev, offset + 2) << 16;
}

void pci_put16(struct pci_device *dev, unsigned offset, uint16_t value)
{
	dev->config[offset] = (uint8_t)value;
	dev->config[offset + 1] = (uint8_t)(value >> 8);
}

void pci_put32(struct pci_device *dev, unsigned offset, uint32_t value)
{
	pci_put16(dev, offset, (uint16_t)value);
	pci_put16(dev, offset + 2, (uint16_t)(value >> 16));
}

static void put_mask32(uint8_t *mask, uint32_t value)
{
	for (int i = 0; i < 4; i++)
		mask[i] = (uint8_t)(value >> 8 * i);
}

/* --- building a device --- */

void pci_init(struct pci_device *dev, const char *name, const struct pci_identity *id)
{
	memset(dev, 0, sizeof(*dev));
	dev->name = name;
	dev->next_cap = FIRST_CAP;
	pci_put16(dev, PCI_VENDOR_ID, id->vendor);
	pci_put16(dev, PCI_DEVICE_ID, id->device);
	dev->config[PCI_REVISION] = id->revision;
	dev->config[PCI_CLASS_PROG] = id->prog_if;
	pci_put16(dev, PCI_CLASS, id->class_code);
	pci_put16(dev, PCI_SUBSYSTEM_VENDOR_ID, id->subsystem_vendor);
	pci_put16(dev, PCI_SUBSYSTEM_ID, id->subsystem);
	unsigned command = PCI_COMMAND_IO | PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER | PCI_COMMAND_INTX_DISABLE |
			   0x0140; /* parity error response, SERR#: storage */
	dev->wmask[PCI_COMMAND] = (uint8_t)command;
	dev->wmask[PCI_COMMAND + 1] = (uint8_t)(command >> 8);
	dev->w1c[PCI_STATUS + 1] = 0xf9; /* error bits: never set, but cleared as the standard says */
	dev->wmask[0x0c] = 0xff;	 /* cache line size */
	dev->wmask[0x0d] = 0xff;	 /* latency timer */
	dev->wmask[PCI_INTERRUPT_LINE] = 0xff;
}

int pci_add_bar(struct pci_device *dev, unsigned n, enum pci_bar_kind kind, uint64_t size, const struct bus_ops *ops,
		void *opaque)
{
	bool wide = kind == PCI_BAR_MEM64 || kind == PCI_BAR_MEM64_PREFETCH;
	if (n >= PCI_BARS || kind == PCI_BAR_NONE || dev->bar[n].kind || (wide && n + 1 >= PCI_BARS) ||
	    (n && (dev->config[PCI_BAR0 + 4 * (n - 1)] & 7) == BAR_MEM64))
		return -EINVAL;
	uint64_t min = kind == PCI_BAR_IO ? 4 : 16, max = kind == PCI_BAR_IO ? 256 : wide ? 1ull << 46 : 1ull << 31;
	if (size < min || size > max || (size & (size - 1)))
		return -EINVAL;
	dev->bar[n] = (struct pci_bar){ .kind = kind, .size = size, .ops = ops, .opaque = opaque };
	unsigned reg = PCI_BAR0 + 4 * n;
	uint64_t mask = ~(size - 1);
	put_mask32(dev->wmask + reg, (uint32_t)mask);
	if (kind == PCI_BAR_IO)
		dev->config[reg] = BAR_IO;
	if (wide) {
		dev->config[reg] = BAR_MEM64 | (kind == PCI_BAR_MEM64_PREFETCH ? BAR_PREFETCH : 0);
		put_mask32(dev->wmask + reg + 4, (uint32_t)(mask >> 32));
	}
	return 0;
}

int pci_add_capability(struct pci_device *dev, uint8_t id, unsigned size)
{
	unsigned at = dev->next_cap;
	if (!at || size < 2 || at + size > HEADER_END)
		return -ENOSPC;
	dev->config[at] = id;
	dev->config[dev->last_cap ? dev->last_cap + 1u : PCI_CAPABILITIES] = (uint8_t)at;
	dev->config[PCI_STATUS] |= PCI_STATUS_CAP_LIST;
	dev->last_cap = (uint8_t)at;
	dev->next_cap = (uint8_t)((at + size + 3) & ~3u); /* wraps to 0 when full */
	return (int)at;
}

void pci_set_interrupt_pin(struct pci_device *dev, unsigned pin)
{
	dev->config[PCI_INTERRUPT_PIN] = (uint8_t)pin;
}

/* --- BARs on the buses --- */

static bool is_memory(const struct pci_bar *bar)
{
	return bar->kind != PCI_BAR_IO;
}

/* Where BAR n should be mapped now; false if it should not be. */
static bool bar_target(const struct pci_device *dev, unsigned n, uint64_t *addr)
{
	const struct pci_bar *bar = &dev->bar[n];
	unsigned command = pci_get16(dev, PCI_COMMAND), reg = PCI_BAR0 + 4 * n;
	if (!(command & (is_memory(bar) ? PCI_COMMAND_MEMORY : PCI_COMMAND_IO)))
		return false;
	uint64_t base = pci_get32(dev, reg) & ~(bar->size - 1) & UINT32_MAX, limit = UINT32_MAX;
	if (bar->kind == PCI_BAR_MEM64 || bar->kind == PCI_BAR_MEM64_PREFETCH) {
		base = ((uint64_t)pci_get32(dev, reg + 4) << 32 | pci_get32(dev, reg)) & ~(bar->size - 1);
		limit = UINT64_MAX;
	} else if (bar->kind == PCI_BAR_IO) {
		limit = 0x10000;
	}
	/* Unassigned, or all ones because the guest is asking for the size. */
	if (!base || base + (bar->size - 1) >= limit)
		return false;
	*addr = base;
	return true;
}

static struct bus *bar_bus(const struct pci_device *dev, const struct pci_bar *bar)
{
	return is_memory(bar) ? dev->bus->mmio : dev->bus->pio;
}

static void unmap_bar(struct pci_device *dev, struct pci_bar *bar)
{
	if (bar->mapped)
		bus_unmap(bar_bus(dev, bar), bar->addr);
	bar->mapped = false;
}

/* Map and unmap as the command and BAR registers say. A BAR that the guest put over something else stays unmapped until
 * it is moved. */
static void update_bars(struct pci_device *dev)
{
	if (!dev->bus)
		return;
	for (int pass = 0; pass < 2; pass++) /* unmap all that moves first: BARs may trade places */
		for (unsigned n = 0; n < PCI_BARS; n++) {
			struct pci_bar *bar = &dev->bar[n];
			uint64_t addr = 0;
			if (bar->kind == PCI_BAR_NONE || !bar->ops)
				continue;
			bool want = bar_target(dev, n, &addr);
			if (bar->mapped && (!want || addr != bar->addr))
				unmap_bar(dev, bar);
			if (pass == 1 && want && !bar->mapped) {
				bar->mapped = !bus_map(bar_bus(dev, bar), addr, bar->size, bar->ops, bar->opaque, NULL);
				bar->addr = addr;
			}
		}
}

/* --- INTx --- */

static void update_intx(struct pci_device *dev)
{
	unsigned pin = dev->config[PCI_INTERRUPT_PIN];
	if (dev->intx_level)
		dev->config[PCI_STATUS] |= PCI_STATUS_INTERRUPT; /* shows the request even when it is disabled */
	else
		dev->config[PCI_STATUS] &= (uint8_t)~PCI_STATUS_INTERRUPT;
	bool drive = dev->intx_level && pin >= 1 && pin <= 4 &&
		     !(pci_get16(dev, PCI_COMMAND) & PCI_COMMAND_INTX_DISABLE) && !pci_msi_enabled(dev) &&
		     !pci_msix_enabled(dev);
	if (drive == dev->intx_driven || !dev->bus)
		return;
	dev->intx_driven = drive;
	if (dev->bus->set_intx)
		dev->bus->set_intx(dev->bus->opaque, dev->devfn, pin - 1, drive);
}

void pci_set_intx(struct pci_device *dev, int level)
{
	dev->intx_level = level;
	update_intx(dev);
}

bool pci_dma_allowed(const struct pci_device *dev)
{
	return pci_get16(dev, PCI_COMMAND) & PCI_COMMAND_MASTER;
}

/* --- on and off the bus --- */

int pci_attach(struct pci_bus *bus, struct pci_device *dev, uint8_t devfn, struct error *err)
{
	if (bus->device[devfn])
		return error_set(err, EEXIST, "PCI slot %02x.%x: %s is already there, %s does not fit", devfn >> 3,
				 devfn & 7, bus->device[devfn]->name, dev->name);
	memcpy(dev->reset_config, dev->config, sizeof(dev->config));
	dev->bus = bus;
	dev->devfn = devfn;
	bus->device[devfn] = dev;
	update_bars(dev);
	update_intx(dev);
	return 0;
}

void pci_reset(struct pci_device *dev)
{
	dev->intx_level = false;
	update_intx(dev);
	memcpy(dev->config, dev->reset_config, sizeof(dev->config));
	pci_msix_reset(dev);
	update_bars(dev);
}

void pci_detach(struct pci_device *dev)
{
	if (dev->bus) {
		pci_set_intx(dev, 0);
		for (unsigned n = 0; n < PCI_BARS; n++)
			unmap_bar(dev, &dev->bar[n]);
		dev->bus->device[dev->devfn] = NULL;
		dev->bus = NULL;
	}
	pci_msix_free(dev);
}

/* --- configuration space --- */

uint32_t pci_config_read(struct pci_bus *bus, uint8_t devfn, unsigned offset, unsigned size)
{
	struct pci_device *dev = bus->device[devfn];
	uint32_t value = 0;
	if (!dev || size > 4 || offset > PCI_CONFIG_SIZE - size)
		return UINT32_MAX;
	if (dev->config_read)
		dev->config_read(dev, offset, size);
	for (unsigned i = 0; i < size; i++)
		value |= (uint32_t)dev->config[offset + i] << 8 * i;
	return value;
}

static bool touches(unsigned offset, unsigned size, unsigned reg, unsigned len)
{
	return offset < reg + len && reg < offset + size;
}

void pci_config_write(struct pci_bus *bus, uint8_t devfn, unsigned offset, unsigned size, uint32_t value)
{
	struct pci_device *dev = bus->device[devfn];
	if (!dev || size > 4 || offset > PCI_CONFIG_SIZE - size)
		return;
	for (unsigned i = 0; i < size; i++) {
		unsigned r = offset + i;
		uint8_t v = (uint8_t)(value >> 8 * i);
		dev->config[r] = (uint8_t)(((dev->config[r] & ~dev->wmask[r]) | (v & dev->wmask[r])) & ~(v & dev->w1c[r]));
	}
	if (touches(offset, size, PCI_COMMAND, 2) || touches(offset, size, PCI_BAR0, 4 * PCI_BARS))
		update_bars(dev);
	bool msi = dev->msi_cap && touches(offset, size, dev->msi_cap, 0x18);
	bool msix = dev->msix_cap && touches(offset, size, dev->msix_cap, 0x0c);
	if (msi || msix || touches(offset, size, PCI_COMMAND, 2))
		update_intx(dev);
	if (msi)
		pci_msi_written(dev);
	if (msix)
		pci_msix_written(dev);
	if (dev->config_written)
		dev->config_written(dev, offset, size);
}
