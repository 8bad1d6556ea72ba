/*
 * What firmware would have left behind: memory map, BIOS data area, ACPI and SMBIOS tables, the loaded kernel, and the boot
 * processor's state. Called by machine/pc on the main thread before any vCPU runs; keeps nothing.
 */
#ifndef TRAPLINE_MACHINE_BOOT_H
#define TRAPLINE_MACHINE_BOOT_H

#include "load/copier.h"
#include "load/load.h"

struct error;
struct guest_ram;
struct machine_config;
struct x86_state;

/* The files of a boot while they are being copied. */
struct boot_files {
	struct load_file kernel, initrd;
	struct load_copier copier;
};

/* Fill fresh (all zero) guest RAM as the configuration says, with virtio_mmio devices in the tables; *out tells how to enter the kernel. The copying of
 * large files goes on until boot_finish, which must follow, also after a failure. */
int boot_prepare(struct load_result *out, struct boot_files *files, const struct machine_config *config, unsigned virtio_mmio, struct guest_ram *ram,
		 struct error *err);
int boot_finish(struct boot_files *files, struct error *err);

/* Change the boot processor's state after RESET into that for entering the loaded kernel. */
void boot_state(struct x86_state *s, const struct load_result *boot);

/* What firmware does to every processor before it starts an OS: memory types (MTRRs): RAM write-back, the space for devices
 * below 4 GiB uncached. INIT does not change them. */
void boot_memory_types(struct x86_state *s);

#endif
