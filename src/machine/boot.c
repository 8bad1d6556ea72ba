#include "machine/boot.h"

#include <errno.h>
#include <stdlib.h>

#include "base/clock.h"
#include "base/error.h"
#include "cpu/x86/mmu.h"
#include "cpu/x86/state.h"
#include "load/e820.h"
#include "load/load.h"
#include "machine/acpi/acpi.h"
#include "machine/acpi/smbios.h"
#include "machine/pc.h"
#include "mem/ram.h"
#include "pci/host.h"

#define SMBIOS_GPA 0xf0000ull
#define SMBIOS_MAX 0x8000

/* Files larger than these are mistakes. The initrd must fit in guest RAM anyway. */
#define KERNEL_MAX (1ull << 30)

static uint64_t high_memory(const struct guest_ram *ram)
{
	return ram->nregions > 1 ? ram->region[1].size : 0;
}

/* The words of the BIOS data area that kernels look at: COM1's port, the EBDA's segment, KiB of low RAM. */
static int write_bios_data(struct guest_ram *ram)
{
	const uint16_t com1 = 0x3f8, ebda = E820_EBDA >> 4, low_kib = E820_EBDA >> 10;
	const uint8_t ebda_kib = 1;
	if (ram_write(ram, 0x400, &com1, 2) || ram_write(ram, 0x40e, &ebda, 2) || ram_write(ram, 0x413, &low_kib, 2) ||
	    ram_write(ram, E820_EBDA, &ebda_kib, 1))
		return -EFAULT;
	return 0;
}

static int write_tables(const struct machine_config *config, unsigned virtio_mmio, struct guest_ram *ram, struct error *err)
{
	const struct acpi_config acpi = {
		.ncpus = config->ncpus,
		.pci64_base = pci_mmio64_base(ram_end(ram)),
		.pci64_size = PCI_MMIO64_SIZE,
		.virtio_mmio = virtio_mmio,
	};
	const struct smbios_config smbios = {
		.ncpus = config->ncpus,
		.memory_below_4g = ram->region[0].size,
		.memory_above_4g = high_memory(ram),
		.mhz = (unsigned)(clock_tsc_hz() / 1000000),
	};
	uint8_t *acpi_area = ram_hva(ram, E820_BIOS, ACPI_TABLES_MAX);
	uint8_t *smbios_area = ram_hva(ram, SMBIOS_GPA, SMBIOS_MAX);
	if (!acpi_area || !smbios_area || write_bios_data(ram))
		return error_set(err, ENOSPC, "--memory: too small for a PC; give at least --memory 64M");
	long n = acpi_build(acpi_area, ACPI_TABLES_MAX, E820_BIOS, &acpi);
	long m = smbios_build(smbios_area, SMBIOS_MAX, SMBIOS_GPA, &smbios);
	if (n < 0 || m < 0)
		return error_set(err, ENOSPC, "--cpus %u: the firmware tables do not fit; give fewer CPUs", config->ncpus);
	ram_written(ram, E820_BIOS, (uint64_t)n);
	ram_written(ram, SMBIOS_GPA, (uint64_t)m);
	return 0;
}

int boot_prepare(struct load_result *out, struct boot_files *files, const struct machine_config *config, unsigned virtio_mmio, struct guest_ram *ram,
		 struct error *err)
{
	*files = (struct boot_files){ 0 };
	int r = load_file_open(&files->kernel, config->kernel, "--kernel", KERNEL_MAX, err);
	if (!r && config->initrd)
		r = load_file_open(&files->initrd, config->initrd, "--initrd", UINT32_MAX, err);
	if (!r) {
		struct e820_map map;
		e820_build(&map, ram->size);
		const struct load_input in = {
			.kernel = files->kernel.bytes,
			.initrd = files->initrd.bytes,
			.kernel_path = config->kernel,
			.initrd_path = config->initrd ? config->initrd : "",
			.cmdline = config->append ? config->append : "",
			.rsdp = E820_BIOS,
			.map = &map,
			.copier = &files->copier,
		};
		r = load_kernel(out, &in, ram, err);
	}
	/* Some of the time that measuring the clock takes has passed. */
	clock_init();
	return r ? r : write_tables(config, virtio_mmio, ram, err);
}

int boot_finish(struct boot_files *files, struct error *err)
{
	int r = load_copier_finish(&files->copier);
	load_file_close(&files->initrd);
	load_file_close(&files->kernel);
	return r ? error_set(err, -r, "--kernel, --initrd: they changed while they were read; try again") : 0;
}

void boot_state(struct x86_state *s, const struct load_result *boot)
{
	bool long64 = boot->mode == LOAD_LONG64;
	s->rip = boot->rip;
	s->rflags = FL_FIXED;
	s->gpr[RAX] = boot->rax;
	s->gpr[RBX] = boot->rbx;
	s->gpr[RSI] = boot->rsi;
	s->gpr[RSP] = boot->rsp;
	s->gpr[RDX] = 0; /* RESET leaves the processor's signature there */
	s->cpl = 0;

	s->cr0 = CR0_PE | CR0_ET;
	if (long64) {
		s->cr0 |= CR0_PG;
		s->cr3 = boot->cr3;
		s->cr4 = CR4_PAE;
		s->efer = EFER_LME | EFER_LMA;
	}

	const struct x86_seg code = {
		.limit = UINT32_MAX,
		.sel = boot->cs,
		.attr = SEG_CODE | SEG_RW | SEG_A | SEG_S | SEG_P | SEG_G | (long64 ? SEG_L : SEG_DB),
	};
	const struct x86_seg data = {
		.limit = UINT32_MAX,
		.sel = boot->ds,
		.attr = SEG_RW | SEG_A | SEG_S | SEG_P | SEG_G | SEG_DB,
	};
	s->seg[SREG_CS] = code;
	s->seg[SREG_SS] = s->seg[SREG_DS] = s->seg[SREG_ES] = s->seg[SREG_FS] = s->seg[SREG_GS] = data;
	s->seg[SREG_LDTR] = (struct x86_seg){ 0 };
	s->seg[SREG_TR] = (struct x86_seg){ .limit = 0x67, .sel = boot->tr, .attr = 0xb | SEG_P }; /* busy 32/64-bit TSS */
	s->gdt = (struct x86_dtr){ .base = boot->gdt_base, .limit = boot->gdt_limit };
	/* No IDT: an exception before the kernel loads its own is a triple fault, not a jump to zero. */
	s->idt = (struct x86_dtr){ 0 };
}

/* Intel SDM 3A 11.11. Linux distrusts a machine whose processors disagree or have MTRRs off, and would leave PAT alone. */
void boot_memory_types(struct x86_state *s)
{
	enum { UC = 0, WP = 5, WB = 6 };
	enum { MTRR_E = 1 << 11, MTRR_FE = 1 << 10, MTRR_VALID = 1 << 11 };
	const uint64_t eight = 0x0101010101010101ull; /* a fixed-range register has eight types */
	const uint64_t hole = RAM_HIGH_START - RAM_HOLE_START;

	s->mtrr_def_type = MTRR_E | MTRR_FE | WB;
	s->mtrr_fixed[0] = eight * WB; /* 0-7ffff */
	s->mtrr_fixed[1] = eight * WB; /* 80000-9ffff */
	s->mtrr_fixed[2] = eight * UC; /* a0000-bffff */
	for (int i = 3; i < X86_MTRR_FIXED; i++)
		s->mtrr_fixed[i] = eight * WP; /* c0000-fffff, 32 KiB each */
	s->mtrr_base[0] = RAM_HOLE_START | UC;
	s->mtrr_mask[0] = (X86_PHYS_MASK & ~(hole - 1)) | MTRR_VALID;
}
