/*
 * Multiboot 1 (Multiboot Specification 0.6.96): header in the first 8 KiB, 32-bit flat entry, EAX = magic, EBX = information
 * structure. For bare-metal kernels; video mode requests are refused.
 */
#include "load/load_internal.h"

#include <errno.h>
#include <stdio.h>

#include "base/error.h"
#include "load/e820.h"

#define MB_SEARCH 8192u
#define MB_HEADER_MAGIC 0x1badb002u
#define MB_LOADER_MAGIC 0x2badb002u

/* Header flags (3.1.2): an OS that sets a bit below 16 we do not know must not be booted. */
enum { MB_PAGE_ALIGN = 1 << 0, MB_MEMORY_INFO = 1 << 1, MB_VIDEO_MODE = 1 << 2, MB_AOUT_KLUDGE = 1 << 16 };

/* Information flags (3.3). */
enum { MBI_MEMORY = 1 << 0, MBI_CMDLINE = 1 << 2, MBI_MODS = 1 << 3, MBI_MMAP = 1 << 6, MBI_LOADER_NAME = 1 << 9 };

struct mb_info {
	uint32_t flags, mem_lower, mem_upper, boot_device, cmdline, mods_count, mods_addr, syms[4];
	uint32_t mmap_length, mmap_addr, drives_length, drives_addr, config_table, boot_loader_name, apm_table;
};

struct mb_module {
	uint32_t start, end, string, reserved;
};

struct mb_mmap {
	uint32_t size; /* of the rest */
	uint64_t addr, len;
	uint32_t type;
} __attribute__((packed));

static const uint8_t *find_header(struct load_bytes file, uint64_t *offset)
{
	for (uint64_t o = 0; o + 12 <= MB_SEARCH && load_has(file, o, 12); o += 4) {
		const uint8_t *h = file.data + o;
		if (load_le32(h) == MB_HEADER_MAGIC && load_le32(h) + load_le32(h + 4) + load_le32(h + 8) == 0) {
			*offset = o;
			return h;
		}
	}
	return NULL;
}

bool multiboot_probe(struct load_bytes file)
{
	uint64_t offset;
	return find_header(file, &offset) != NULL;
}

/* The header's own address fields (3.1.3): for files that are not ELF. */
static int load_by_fields(const uint8_t *h, uint64_t offset, const struct load_input *in, struct guest_ram *ram, uint64_t *end,
			  uint64_t *entry, struct error *err)
{
	if (!load_has(in->kernel, offset, 32))
		return error_set(err, EINVAL, "--kernel %s: truncated inside its multiboot header; copy it again",
				 in->kernel_path);
	uint64_t header = load_le32(h + 12), load = load_le32(h + 16);
	uint64_t load_end = load_le32(h + 20), bss_end = load_le32(h + 24);
	*entry = load_le32(h + 28);
	if (load > header || header - load > offset)
		return error_set(err, EINVAL, "--kernel %s: its multiboot load address 0x%llx is above its header; link it anew",
				 in->kernel_path, (unsigned long long)load);
	uint64_t from = offset - (header - load);
	uint64_t size = load_end ? load_end - load : in->kernel.size - from;
	if ((load_end && load_end < load) || !load_has(in->kernel, from, size))
		return error_set(err, EINVAL, "--kernel %s: the file is truncated (its multiboot header promises more); copy it again",
				 in->kernel_path);
	*end = load + size;
	if (bss_end > *end)
		*end = bss_end;
	if (load < LOAD_LOW)
		return error_set(err, EINVAL,
				 "--kernel %s: wants physical address 0x%llx; link the kernel at 1 MiB or above", in->kernel_path,
				 (unsigned long long)load);
	if (!ram_hva(ram, load, *end - load))
		return error_set(err, ENOSPC, "--kernel %s: does not fit in %llu MiB of memory; give more --memory",
				 in->kernel_path, (unsigned long long)(ram->size >> 20));
	if (load_copy(in, ram, load, in->kernel.data + from, size))
		return error_set(err, EIO, "--kernel %s: cannot be read (did it change meanwhile?); try again", in->kernel_path);
	return 0;
}

int multiboot_load(struct load_result *out, const struct load_input *in, struct guest_ram *ram, struct error *err)
{
	uint64_t offset = 0, end, entry, initrd;
	const uint8_t *h = find_header(in->kernel, &offset);
	if (!h)
		return error_set(err, ENOEXEC, "--kernel %s: no multiboot header", in->kernel_path);
	uint32_t flags = load_le32(h + 4);
	if (flags & 0xffff & ~(uint32_t)(MB_PAGE_ALIGN | MB_MEMORY_INFO))
		return error_set(err, EINVAL,
				 "--kernel %s: its multiboot header requires features 0x%x (%s), which Trapline has not; build it "
				 "without them",
				 in->kernel_path, flags & 0xffff, flags & MB_VIDEO_MODE ? "a video mode" : "unknown ones");
	int r = flags & MB_AOUT_KLUDGE ? load_by_fields(h, offset, in, ram, &end, &entry, err) :
					 elf_load_segments(in, ram, &end, &entry, err);
	if (r)
		return r;
	if (entry >= load_low_end(ram) || entry < LOAD_LOW)
		return error_set(err, EINVAL, "--kernel %s: its entry point 0x%llx lies outside memory; link it anew",
				 in->kernel_path, (unsigned long long)entry);
	r = load_initrd(in, (end + 0xfff) & ~0xfffull, RAM_HOLE_START, false, ram, &initrd, err);
	if (r)
		return r;

	/* By custom the first word is the kernel's name. */
	char line[4096];
	const char *name = strrchr(in->kernel_path, '/');
	int n = snprintf(line, sizeof(line), "%s%s%s", name ? name + 1 : in->kernel_path, *in->cmdline ? " " : "", in->cmdline);
	if (n < 0 || (size_t)n >= sizeof(line))
		return error_set(err, E2BIG, "--append: the command line is longer than a multiboot kernel's %zu bytes; shorten it",
				 sizeof(line) - 1);
	r = load_cmdline(line, sizeof(line) - 1, ram, err);
	if (r)
		return r;

	struct {
		struct mb_info info;
		struct mb_module module;
		struct mb_mmap map[E820_MAX];
		char loader[16];
	} block = {
		.info = {
			.flags = MBI_MEMORY | MBI_CMDLINE | MBI_MODS | MBI_MMAP | MBI_LOADER_NAME,
			.mem_lower = E820_EBDA / 1024,
			.mem_upper = (uint32_t)((load_low_end(ram) - LOAD_LOW) / 1024),
			.cmdline = LOAD_CMDLINE,
			.mods_count = initrd ? 1 : 0,
		},
		.module = { .start = (uint32_t)initrd, .end = (uint32_t)(initrd + in->initrd.size) },
		.loader = "trapline",
	};
	block.info.mods_addr = (uint32_t)(LOAD_INFO + (uint64_t)((uint8_t *)&block.module - (uint8_t *)&block));
	block.info.mmap_addr = (uint32_t)(LOAD_INFO + (uint64_t)((uint8_t *)block.map - (uint8_t *)&block));
	block.info.mmap_length = (uint32_t)((size_t)in->map->n * sizeof(block.map[0]));
	block.info.boot_loader_name = (uint32_t)(LOAD_INFO + (uint64_t)((uint8_t *)block.loader - (uint8_t *)&block));
	/* A module's string is its command line; the empty string at the name's end will do. */
	block.module.string = block.info.boot_loader_name + 8;
	for (int i = 0; i < in->map->n; i++)
		block.map[i] = (struct mb_mmap){ sizeof(struct mb_mmap) - 4, in->map->entry[i].base, in->map->entry[i].size,
						 in->map->entry[i].type };

	out->kind = LOAD_MULTIBOOT;
	out->mode = LOAD_FLAT32;
	out->rip = entry;
	out->rax = MB_LOADER_MAGIC;
	out->rbx = LOAD_INFO;
	if (ram_write(ram, LOAD_INFO, &block, sizeof(block)) || load_flat_gdt(out, ram))
		return error_set(err, ENOSPC, "--memory: too small for the boot structures; give at least --memory 64M");
	return 0;
}
