#include "load/e820.h"

#include "mem/ram.h"

static void add(struct e820_map *map, uint64_t base, uint64_t end, uint32_t type)
{
	if (base < end && map->n < E820_MAX)
		map->entry[map->n++] = (struct e820_entry){ .base = base, .size = end - base, .type = type };
}

void e820_build(struct e820_map *map, uint64_t memory)
{
	uint64_t low_end = memory < RAM_HOLE_START ? memory : RAM_HOLE_START;
	uint64_t high = memory - low_end;

	map->n = 0;
	add(map, 0, E820_EBDA, E820_RAM);
	add(map, E820_EBDA, 0xa0000, E820_RESERVED);
	add(map, E820_BIOS, E820_BIOS_END, E820_RESERVED);
	add(map, E820_BIOS_END, low_end, E820_RAM);
	/* PCI Firmware Specification 3.3 4.1.2: the ECAM range is reserved in the memory map as well as in the DSDT;
	 * Linux uses it only then. */
	add(map, E820_ECAM, E820_ECAM + E820_ECAM_SIZE, E820_RESERVED);
	/* IOAPIC, HPET, LAPIC and the reset vector's ROM space. */
	add(map, 0xfec00000, 0xfec01000, E820_RESERVED);
	add(map, 0xfed00000, 0xfed01000, E820_RESERVED);
	add(map, 0xfee00000, 0xfee01000, E820_RESERVED);
	add(map, RAM_HIGH_START, RAM_HIGH_START + high, E820_RAM);
}
