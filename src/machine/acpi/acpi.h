/*
 * The ACPI tables of the PC (ACPI 6.4): RSDP, XSDT, FADT, FACS, DSDT, SSDT, MADT, MCFG, HPET.
 *
 * Pure: writes into the caller's buffer what the guest will see at a given address; any thread.
 */
#ifndef TRAPLINE_MACHINE_ACPI_ACPI_H
#define TRAPLINE_MACHINE_ACPI_ACPI_H

#include <stddef.h>
#include <stdint.h>

struct acpi_config {
	unsigned ncpus;			   /* APIC ids 0..ncpus-1 */
	uint64_t pci64_base, pci64_size; /* the PCI window above RAM; bytes */
	unsigned virtio_mmio;		 /* devices in the first slots of VIRTIO_MMIO_BASE */
};

#define ACPI_TABLES_MAX 0x10000 /* bytes of all tables together: what is below the SMBIOS area */

/* Write all tables to buf[0..size), to be seen by the guest at `gpa` (64-byte aligned); the RSDP comes first, so its address is
 * `gpa`. Returns the bytes used, or -ENOSPC. */
long acpi_build(uint8_t *buf, size_t size, uint64_t gpa, const struct acpi_config *config);

#endif
