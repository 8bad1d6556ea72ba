/*
 * The guest-physical memory map as firmware reports it (ACPI 6.4 15.4 "E820").
 *
 * Pure functions on a caller-owned struct; any thread. The same map feeds the zero page, hvm_start_info and the
 * multiboot memory map.
 */
#ifndef TRAPLINE_LOAD_E820_H
#define TRAPLINE_LOAD_E820_H

#include <stdint.h>

enum e820_type { E820_RAM = 1, E820_RESERVED = 2, E820_ACPI = 3, E820_NVS = 4 };

struct e820_entry {
	uint64_t base, size; /* bytes */
	uint32_t type;	     /* enum e820_type */
};

#define E820_MAX 16

struct e820_map {
	int n;
	struct e820_entry entry[E820_MAX]; /* ascending, disjoint */
};

/* Fixed places of the low megabyte and of the space below 4 GiB that is not RAM. */
#define E820_EBDA 0x9fc00ull	     /* RAM below 1 MiB ends here */
#define E820_BIOS 0xe0000ull	     /* tables for the OS: ACPI from here, SMBIOS from 0xf0000 */
#define E820_BIOS_END 0x100000ull
#define E820_ECAM 0xe0000000ull	     /* PCI configuration space, 256 buses */
#define E820_ECAM_SIZE 0x10000000ull

/* The map of a machine with `memory` bytes of RAM (at least 2 MiB): RAM around the BIOS area, to RAM_HOLE_START, ECAM,
 * and RAM from 4 GiB on. */
void e820_build(struct e820_map *map, uint64_t memory);

#endif
