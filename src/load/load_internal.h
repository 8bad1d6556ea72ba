/*
 * What the loaders share: bounds-checked reading of little-endian files, copying into guest RAM, the low-memory plan.
 * Private to load/; same rules as load/load.h.
 */
#ifndef TRAPLINE_LOAD_LOAD_INTERNAL_H
#define TRAPLINE_LOAD_LOAD_INTERNAL_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "load/load.h"
#include "mem/ram.h"

/* Where the boot structures live in the RAM below 640 KiB. All are read by the guest before it reuses that memory. */
#define LOAD_GDT 0x5000ull	/* 6 entries */
#define LOAD_INFO 0x6000ull	/* hvm_start_info or multiboot info, with its lists: one page */
#define LOAD_ZERO_PAGE 0x7000ull /* Linux boot_params */
#define LOAD_PAGE_TABLES 0x9000ull /* PML4, PDPT, 4 page directories: 6 pages */
#define LOAD_CMDLINE 0x20000ull
#define LOAD_CMDLINE_MAX 0x10000ull /* bytes with the terminator */
#define LOAD_LOW 0x100000ull	/* kernels go above this */

#define LOAD_CS 0x10 /* Linux's __BOOT_CS and __BOOT_DS */
#define LOAD_DS 0x18
#define LOAD_TR 0x20

static inline uint16_t load_le16(const uint8_t *p)
{
	uint16_t v;
	memcpy(&v, p, sizeof(v));
	return v;
}

static inline uint32_t load_le32(const uint8_t *p)
{
	uint32_t v;
	memcpy(&v, p, sizeof(v));
	return v;
}

static inline uint64_t load_le64(const uint8_t *p)
{
	uint64_t v;
	memcpy(&v, p, sizeof(v));
	return v;
}

static inline void load_put32(uint8_t *p, uint32_t v)
{
	memcpy(p, &v, sizeof(v));
}

static inline void load_put64(uint8_t *p, uint64_t v)
{
	memcpy(p, &v, sizeof(v));
}

/* Whether [off, off+len) lies in the file. */
static inline bool load_has(struct load_bytes b, uint64_t off, uint64_t len)
{
	return off <= b.size && len <= b.size - off;
}

/* End of the RAM that starts at 0. */
static inline uint64_t load_low_end(const struct guest_ram *ram)
{
	return ram->region[0].size;
}

/* Copy file bytes into RAM; for large ones through the memfd, which costs no page fault a page and turns a file truncated
 * under us into -EFAULT. 0 or -EFAULT. */
int load_copy(const struct load_input *in, struct guest_ram *ram, uint64_t gpa, const uint8_t *src, uint64_t len);

/* The flat GDT for `out->mode`, and the selectors, into RAM and `out`. */
int load_flat_gdt(struct load_result *out, struct guest_ram *ram);

/* The command line with its NUL to LOAD_CMDLINE; `max` is the longest the kernel takes, without the NUL. */
int load_cmdline(const char *cmdline, uint64_t max, struct guest_ram *ram, struct error *err);

/* Place and copy the initrd page-aligned, as high as possible below `max` (exclusive) and not below `min`; above 4 GiB only if
 * `high` and it does not fit below. *gpa is 0 if there is no initrd. */
int load_initrd(const struct load_input *in, uint64_t min, uint64_t max, bool high, struct guest_ram *ram, uint64_t *gpa,
		struct error *err);

/* The formats. `probe` says whether the file is one; `load` as load_kernel. */
bool bzimage_probe(struct load_bytes file);
int bzimage_load(struct load_result *out, const struct load_input *in, struct guest_ram *ram, struct error *err);

bool elf_probe(struct load_bytes file);
bool elf_has_pvh(struct load_bytes file);
int elf_load(struct load_result *out, const struct load_input *in, struct guest_ram *ram, struct error *err);
/* Copy the PT_LOAD segments; *end is the end of the highest below 4 GiB. 32-bit or 64-bit files. */
int elf_load_segments(const struct load_input *in, struct guest_ram *ram, uint64_t *end, uint64_t *entry, struct error *err);

bool multiboot_probe(struct load_bytes file);
int multiboot_load(struct load_result *out, const struct load_input *in, struct guest_ram *ram, struct error *err);

#endif
