/*
 * PCI devices: configuration space, BARs, INTx, MSI and MSI-X (PCI 3.0, PCI Express Base 2.0).
 *
 * A device embeds a struct pci_device, fills it through the pci_* helpers while it is created, and hands it to
 * pci_attach. From then on the core decodes configuration accesses, keeps the BARs mapped on the machine's buses as the
 * guest programs them, and owns the MSI and MSI-X state. The device owns the memory, and calls pci_detach before it frees
 * it. Everything runs with the device lock held (or before the vCPUs start).
 */
#ifndef TRAPLINE_PCI_PCI_H
#define TRAPLINE_PCI_PCI_H

#include <stdbool.h>
#include <stdint.h>

#include "vm/bus.h"
#include "vm/irq.h"

struct error;
struct pci_bus;
struct pci_msix;

#define PCI_CONFIG_SIZE 4096
#define PCI_BARS 6
#define PCI_DEVFN(slot, fn) (((slot) << 3) | (fn))

/* Registers of the type 0 header (PCI 3.0 6.1) that devices and tests name. */
#define PCI_VENDOR_ID 0x00
#define PCI_DEVICE_ID 0x02
#define PCI_COMMAND 0x04
#define PCI_STATUS 0x06
#define PCI_REVISION 0x08
#define PCI_CLASS_PROG 0x09
#define PCI_CLASS 0x0a /* sub-class, base class */
#define PCI_HEADER_TYPE 0x0e
#define PCI_BAR0 0x10
#define PCI_SUBSYSTEM_VENDOR_ID 0x2c
#define PCI_SUBSYSTEM_ID 0x2e
#define PCI_CAPABILITIES 0x34
#define PCI_INTERRUPT_LINE 0x3c
#define PCI_INTERRUPT_PIN 0x3d

#define PCI_COMMAND_IO 0x0001
#define PCI_COMMAND_MEMORY 0x0002
#define PCI_COMMAND_MASTER 0x0004
#define PCI_COMMAND_INTX_DISABLE 0x0400
#define PCI_STATUS_INTERRUPT 0x0008
#define PCI_STATUS_CAP_LIST 0x0010

#define PCI_CAP_MSI 0x05
#define PCI_CAP_VENDOR 0x09
#define PCI_CAP_EXPRESS 0x10
#define PCI_CAP_MSIX 0x11

enum pci_bar_kind { PCI_BAR_NONE, PCI_BAR_IO, PCI_BAR_MEM32, PCI_BAR_MEM64, PCI_BAR_MEM64_PREFETCH };

struct pci_bar {
	enum pci_bar_kind kind;
	uint64_t size; /* power of two: at least 4 (I/O) or 16 (memory) */
	const struct bus_ops *ops;
	void *opaque;
	uint64_t addr; /* where it is mapped now */
	bool mapped;
};

/* How messages leave: a write of `data` to `address`. Filled by the machine; the interrupt controllers decode it. */
struct pci_msi_sink {
	void (*fn)(void *opaque, uint64_t address, uint32_t data);
	void *opaque;
};

struct pci_device {
	const char *name;
	struct pci_bus *bus; /* NULL until attached */
	uint8_t devfn;
	uint8_t config[PCI_CONFIG_SIZE];
	uint8_t wmask[PCI_CONFIG_SIZE]; /* bits the guest may write */
	uint8_t w1c[PCI_CONFIG_SIZE];	/* bits that a write of 1 clears */
	struct pci_bar bar[PCI_BARS];
	uint8_t next_cap, last_cap; /* where the next capability goes; the one to link it from */
	uint8_t msi_cap, msix_cap;  /* offsets in config, 0: none */
	struct pci_msix *msix;
	bool intx_level, intx_driven; /* what the device wants, what the line shows */
	uint8_t reset_config[PCI_CONFIG_SIZE];
	/* Optional hooks, set by the device. config_read runs before bytes are taken from config[]. */
	void (*config_read)(struct pci_device *dev, unsigned offset, unsigned size);
	void (*config_written)(struct pci_device *dev, unsigned offset, unsigned size);
};

/* One segment, bus 0. Its host bridge (pci/host.h) owns it. */
struct pci_bus {
	struct bus *pio, *mmio;
	struct pci_msi_sink msi;
	void (*set_intx)(void *opaque, uint8_t devfn, unsigned pin, int level); /* pin 0..3 = INTA..INTD */
	void *opaque;
	struct pci_device *device[256];
};

/* Identity of a device, all little-endian as in the header. */
struct pci_identity {
	uint16_t vendor, device;
	uint8_t revision;
	uint8_t prog_if;
	uint16_t class_code; /* base class << 8 | sub-class */
	uint16_t subsystem_vendor, subsystem;
};

/* Clear *dev and write its header. */
void pci_init(struct pci_device *dev, const char *name, const struct pci_identity *id);

/* Describe BAR `n` (a MEM64 one takes n+1 too). -EINVAL for an impossible one. */
int pci_add_bar(struct pci_device *dev, unsigned n, enum pci_bar_kind kind, uint64_t size, const struct bus_ops *ops,
		void *opaque);

/* Append a capability of `size` bytes (header included); returns its offset, or -ENOSPC. Its body is zero and read-only. */
int pci_add_capability(struct pci_device *dev, uint8_t id, unsigned size);

/* MSI with up to `vectors` (1, 2, 4, .. 32) messages, 64-bit address, per-vector masks. 0 or -ENOSPC. */
int pci_add_msi(struct pci_device *dev, unsigned vectors);

/* MSI-X with `vectors` (1..2048) in a 32-bit memory BAR of its own: the table first, the pending bits in the second
 * half. 0, -EINVAL, -ENOSPC, -ENOMEM. */
int pci_add_msix(struct pci_device *dev, unsigned bar, unsigned vectors);

/* Use INTx pin 1..4 (INTA..INTD). */
void pci_set_interrupt_pin(struct pci_device *dev, unsigned pin);

/* Put it on the bus; its header as it is now is what pci_reset goes back to. -EEXIST if the slot is taken. `dev` must stay where it is until pci_detach. */
int pci_attach(struct pci_bus *bus, struct pci_device *dev, uint8_t devfn, struct error *err);

/* Unmap its BARs, lower its line, take it off the bus, free the core's state of it. Also for one never attached. */
void pci_detach(struct pci_device *dev);

/* Back to the state after power-on: BARs unmapped, command clear, MSI and MSI-X off. Read-only bytes stay. */
void pci_reset(struct pci_device *dev);

/* The INTx level the device wants; honours INTX_DISABLE and MSI. */
void pci_set_intx(struct pci_device *dev, int level);

bool pci_msi_enabled(const struct pci_device *dev);
bool pci_msix_enabled(const struct pci_device *dev);
/* Send message `vector`, or leave it pending if it is masked. Nothing if MSI / MSI-X is off. */
void pci_msi_notify(struct pci_device *dev, unsigned vector);
void pci_msix_notify(struct pci_device *dev, unsigned vector);

/* May the device do DMA (bus master enabled)? */
bool pci_dma_allowed(const struct pci_device *dev);

/* Little-endian access to config[], for devices. */
uint16_t pci_get16(const struct pci_device *dev, unsigned offset);
uint32_t pci_get32(const struct pci_device *dev, unsigned offset);
void pci_put16(struct pci_device *dev, unsigned offset, uint16_t value);
void pci_put32(struct pci_device *dev, unsigned offset, uint32_t value);

/* A guest access to configuration space, for the host bridge: all ones where there is no device. */
uint32_t pci_config_read(struct pci_bus *bus, uint8_t devfn, unsigned offset, unsigned size);
void pci_config_write(struct pci_bus *bus, uint8_t devfn, unsigned offset, unsigned size, uint32_t value);

#endif
