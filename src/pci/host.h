/*
 * A Q35-like PCI root: MCH host bridge (8086:29c0) at 00:00.0 with configuration ports and ECAM window, and ICH9 LPC
 * bridge (8086:2918) at 00:1f.0 with PMBASE, the PIRQ routers and the reset control port.
 *
 * INTx: pin INTA..INTD (0..3) of slot s drives PIRQ (s + pin) & 7, which is GSI 16 + that; the DSDT's _PRT says the same
 * (pci_host_gsi). The PIRQx_ROUT registers connect PIRQs to ISA interrupts as well, for guests that use the PIC.
 * Owner: the machine; destroy after all devices are detached. Threads as in device/pit.h.
 */
#ifndef TRAPLINE_PCI_HOST_H
#define TRAPLINE_PCI_HOST_H

#include <stdbool.h>
#include <stdint.h>

#include "pci/pci.h"

#define PCI_ECAM_BASE 0xe0000000ull /* 256 MiB: one segment, buses 0..255 */
#define PCI_ECAM_SIZE 0x10000000ull
#define PCI_MMIO32_BASE 0xc0000000ull
#define PCI_MMIO32_END 0xe0000000ull
#define PCI_MMIO64_SIZE (64ull << 30)
#define PCI_PIO_BASE 0xc000 /* the window the DSDT should give above the legacy ports */
#define PCI_PIO_END 0x10000
#define PCI_PIRQS 8
#define PCI_PIRQ_GSI 16
#define PCI_LPC_DEVFN PCI_DEVFN(31, 0)

/* Start of the 64-bit window: above RAM, at least 4 GiB, aligned to its size as far as firmware cares (1 GiB). */
static inline uint64_t pci_mmio64_base(uint64_t ram_end)
{
	uint64_t floor = 0x100000000ull;
	return ((ram_end > floor ? ram_end : floor) + 0x3fffffffull) & ~0x3fffffffull;
}

/* GSI of pin 0..3 of a slot on bus 0. */
static inline unsigned pci_host_gsi(unsigned slot, unsigned pin)
{
	return PCI_PIRQ_GSI + ((slot + pin) & (PCI_PIRQS - 1));
}

struct pci_host;

struct pci_host_config {
	struct bus *pio, *mmio;
	struct pci_msi_sink msi;
	struct irq_line pirq[PCI_PIRQS]; /* GSI 16..23, level; 1 is asserted, whatever polarity the ACPI tables say */
	struct irq_line isa[16];	 /* PIC inputs that PIRQs can be routed to */
	uint16_t pm_base;		 /* what PMBASE says at power-on */
	void (*pm_move)(void *opaque, uint16_t base, bool enabled); /* PMBASE or ACPI_CNTL was written; may be NULL */
	void *pm_opaque;
	void (*reset)(void *opaque); /* port 0xcf9; with the device lock held */
	void *reset_opaque;
};

int pci_host_create(struct pci_host **out, const struct pci_host_config *config, struct error *err);
void pci_host_destroy(struct pci_host *host);

/* The bus to attach devices to; valid until pci_host_destroy. */
struct pci_bus *pci_host_bus(struct pci_host *host);

#endif
