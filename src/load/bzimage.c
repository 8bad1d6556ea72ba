/*
 * Linux bzImage by the 64-bit boot protocol (Linux Documentation/x86/boot.rst "64-bit Boot Protocol", zero-page.rst).
 *
 *   file:  | boot sector + setup (setup_sects+1)*512 | protected-mode kernel, syssize*16 |
 *   RAM:   zero page, page tables, command line below 640 KiB; kernel at pref_address with init_size bytes to itself;
 *          initrd as high as the kernel allows.
 */
#include "load/load_internal.h"

#include <errno.h>

#include "base/error.h"
#include "load/e820.h"

/* Offsets of the setup header's fields; the same in the file and in the zero page. */
enum {
	HDR_SETUP_SECTS = 0x1f1,
	HDR_SYSSIZE = 0x1f4,
	HDR_BOOT_FLAG = 0x1fe,
	HDR_JUMP = 0x201, /* rel8 of the jump: the header ends at 0x202 + this */
	HDR_MAGIC = 0x202,
	HDR_VERSION = 0x206,
	HDR_TYPE_OF_LOADER = 0x210,
	HDR_LOADFLAGS = 0x211,
	HDR_RAMDISK_IMAGE = 0x218,
	HDR_RAMDISK_SIZE = 0x21c,
	HDR_CMD_LINE_PTR = 0x228,
	HDR_INITRD_ADDR_MAX = 0x22c,
	HDR_XLOADFLAGS = 0x236,
	HDR_CMDLINE_SIZE = 0x238,
	HDR_SETUP_DATA = 0x250,
	HDR_PREF_ADDRESS = 0x258,
	HDR_INIT_SIZE = 0x260,
	HDR_END_2_12 = 0x264, /* what a protocol 2.10+ header has at least */
	HDR_END_MAX = 0x290,  /* where the zero page's next field begins */
};

enum {
	ZP_ACPI_RSDP = 0x070,
	ZP_EXT_RAMDISK_IMAGE = 0x0c0,
	ZP_E820_ENTRIES = 0x1e8,
	ZP_E820_TABLE = 0x2d0,
	ZP_SIZE = 0x1000,
};

enum { LOADED_HIGH = 1 << 0, CAN_USE_HEAP = 1 << 7 };
enum { XLF_KERNEL_64 = 1 << 0, XLF_CAN_BE_LOADED_ABOVE_4G = 1 << 1 };

#define LOADER_UNDEFINED 0xff
#define ENTRY_64 0x200 /* startup_64 from the load address */

bool bzimage_probe(struct load_bytes file)
{
	return load_has(file, 0, HDR_MAGIC + 4) && load_le16(file.data + HDR_BOOT_FLAG) == 0xaa55 &&
	       !memcmp(file.data + HDR_MAGIC, "HdrS", 4);
}

/* Identity map of the first 4 GiB with 2 MiB pages (SDM 3A 4.5.4). */
static int build_page_tables(struct guest_ram *ram)
{
	enum { P = 1, RW = 2, PS = 0x80, PAGES = 6 };
	uint64_t *table = ram_hva(ram, LOAD_PAGE_TABLES, PAGES * 4096ull);
	if (!table)
		return -EFAULT;
	table[0] = (LOAD_PAGE_TABLES + 0x1000) | P | RW;
	for (unsigned i = 0; i < 4; i++)
		table[512 + i] = (LOAD_PAGE_TABLES + 0x2000 + i * 0x1000ull) | P | RW;
	for (unsigned i = 0; i < 4 * 512; i++)
		table[1024 + i] = ((uint64_t)i << 21) | P | RW | PS;
	ram_written(ram, LOAD_PAGE_TABLES, PAGES * 4096ull);
	return 0;
}

static void put_e820(uint8_t *zp, const struct e820_map *map)
{
	zp[ZP_E820_ENTRIES] = (uint8_t)map->n;
	for (int i = 0; i < map->n; i++) {
		uint8_t *e = zp + ZP_E820_TABLE + i * 20;
		load_put64(e, map->entry[i].base);
		load_put64(e + 8, map->entry[i].size);
		load_put32(e + 16, map->entry[i].type);
	}
}

int bzimage_load(struct load_result *out, const struct load_input *in, struct guest_ram *ram, struct error *err)
{
	const uint8_t *h = in->kernel.data;
	const char *path = in->kernel_path;

	/* The header's own length is a byte of the file. */
	uint64_t header_end = HDR_MAGIC + (uint64_t)h[HDR_JUMP];
	if (!load_has(in->kernel, 0, HDR_END_MAX))
		return error_set(err, EINVAL, "--kernel %s: the bzImage is truncated inside its setup header; copy it again",
				 path);
	unsigned version = load_le16(h + HDR_VERSION);
	if (version < 0x20c || header_end < HDR_END_2_12)
		return error_set(err, EINVAL,
				 "--kernel %s: boot protocol %u.%02u is too old, 2.12 is needed; use a kernel of Linux 3.8 or later",
				 path, version >> 8, version & 0xff);
	if (!(load_le16(h + HDR_XLOADFLAGS) & XLF_KERNEL_64))
		return error_set(err, EINVAL,
				 "--kernel %s: a 32-bit kernel without a 64-bit entry point; use an x86-64 (amd64) kernel", path);
	if (!(h[HDR_LOADFLAGS] & LOADED_HIGH))
		return error_set(err, EINVAL, "--kernel %s: a zImage that loads below 1 MiB; use a bzImage", path);

	unsigned sects = h[HDR_SETUP_SECTS] ? h[HDR_SETUP_SECTS] : 4; /* boot.rst: 0 means 4 */
	uint64_t setup = (sects + 1) * 512ull;
	uint64_t size = load_le32(h + HDR_SYSSIZE) * 16ull;
	if (!load_has(in->kernel, setup, size) || size <= ENTRY_64)
		return error_set(err, EINVAL,
				 "--kernel %s: the bzImage is truncated (%llu bytes, its header promises %llu); copy it again", path,
				 (unsigned long long)in->kernel.size, (unsigned long long)(setup + size));

	uint64_t load = load_le64(h + HDR_PREF_ADDRESS);
	uint64_t init_size = load_le32(h + HDR_INIT_SIZE);
	if (init_size < size)
		init_size = size;
	if (load < LOAD_LOW || load >= RAM_HOLE_START || (load & 0xfff))
		return error_set(err, EINVAL, "--kernel %s: damaged header (wants to be loaded at 0x%llx); copy it again", path,
				 (unsigned long long)load);
	uint64_t end = load + init_size;
	if (end > load_low_end(ram))
		return error_set(err, ENOSPC, "--kernel %s: does not fit in %llu MiB of memory; give at least --memory %lluM",
				 path, (unsigned long long)(ram->size >> 20),
				 (unsigned long long)((end + 0xfffff + in->initrd.size) >> 20) + 8);

	uint64_t initrd_end = (uint64_t)load_le32(h + HDR_INITRD_ADDR_MAX) + 1;
	bool initrd_high = load_le16(h + HDR_XLOADFLAGS) & XLF_CAN_BE_LOADED_ABOVE_4G;
	uint64_t initrd;
	int r = load_initrd(in, end, initrd_end, initrd_high, ram, &initrd, err);
	if (r)
		return r;
	r = load_cmdline(in->cmdline, load_le32(h + HDR_CMDLINE_SIZE), ram, err);
	if (r)
		return r;
	if (load_copy(in, ram, load, h + setup, size))
		return error_set(err, EIO, "--kernel %s: cannot be read (did it change meanwhile?); try again", path);

	uint8_t zp[ZP_SIZE] = { 0 };
	if (header_end > HDR_END_MAX)
		header_end = HDR_END_MAX;
	memcpy(zp + HDR_SETUP_SECTS, h + HDR_SETUP_SECTS, header_end - HDR_SETUP_SECTS);
	zp[HDR_TYPE_OF_LOADER] = LOADER_UNDEFINED;
	zp[HDR_LOADFLAGS] &= (uint8_t)~CAN_USE_HEAP; /* no real-mode part, so no heap for it */
	load_put32(zp + HDR_CMD_LINE_PTR, LOAD_CMDLINE);
	load_put32(zp + HDR_RAMDISK_IMAGE, (uint32_t)initrd);
	load_put32(zp + HDR_RAMDISK_SIZE, (uint32_t)in->initrd.size);
	load_put32(zp + ZP_EXT_RAMDISK_IMAGE, (uint32_t)(initrd >> 32));
	load_put32(zp + ZP_EXT_RAMDISK_IMAGE + 4, (uint32_t)((uint64_t)in->initrd.size >> 32));
	load_put64(zp + HDR_SETUP_DATA, 0);
	load_put64(zp + ZP_ACPI_RSDP, in->rsdp);
	put_e820(zp, in->map);

	out->kind = LOAD_BZIMAGE;
	out->mode = LOAD_LONG64;
	out->rip = load + ENTRY_64;
	out->rsi = LOAD_ZERO_PAGE;
	out->cr3 = LOAD_PAGE_TABLES;
	if (ram_write(ram, LOAD_ZERO_PAGE, zp, sizeof(zp)) || build_page_tables(ram) || load_flat_gdt(out, ram))
		return error_set(err, ENOSPC, "--memory: too small for the boot structures; give at least --memory 64M");
	return 0;
}
