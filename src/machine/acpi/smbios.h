/*
 * The SMBIOS tables (DMTF DSP0134 3.4): what dmidecode prints. Pure, as acpi.h.
 */
#ifndef TRAPLINE_MACHINE_ACPI_SMBIOS_H
#define TRAPLINE_MACHINE_ACPI_SMBIOS_H

#include <stddef.h>
#include <stdint.h>

struct smbios_config {
	unsigned ncpus;
	uint64_t memory_below_4g, memory_above_4g; /* bytes */
	unsigned mhz;				   /* processor speed; 0: unknown */
};

/* Write both entry points (2.1 and 3.0) and the structures to buf, seen by the guest at `gpa`, which must be on a 16-byte boundary
 * in 0xf0000-0xfffff for the guest to find it. Returns the bytes used, or -ENOSPC. */
long smbios_build(uint8_t *buf, size_t size, uint64_t gpa, const struct smbios_config *config);

#endif
