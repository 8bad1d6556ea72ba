/*
 * Loaders: put a kernel, its initrd, command line and memory map into guest RAM, and say how to enter it.
 *
 * Every loader is a function of the file bytes and the guest RAM: no file descriptors, no globals, no accelerator. Called by
 * machine/ on the main thread before any vCPU runs. Files are not trusted: every offset and size in them is checked
 * against the file and against RAM. Errors carry one sentence that names the option and the remedy.
 */
#ifndef TRAPLINE_LOAD_LOAD_H
#define TRAPLINE_LOAD_LOAD_H

#include <stddef.h>
#include <stdint.h>

struct e820_map;
struct error;
struct guest_ram;
struct load_copier;

enum load_kind { LOAD_BZIMAGE, LOAD_PVH, LOAD_MULTIBOOT };

enum load_mode {
	LOAD_LONG64, /* 64-bit mode, paging on at cr3 (identity), flat segments, interrupts off */
	LOAD_FLAT32, /* 32-bit protected mode, paging off, flat 4 GiB segments, interrupts off */
};

/* What the boot CPU starts with. Values not named are as after RESET. */
struct load_result {
	enum load_kind kind;
	enum load_mode mode;
	uint64_t rip, rsp;
	uint64_t rax, rbx, rsi;
	uint64_t cr3;	     /* LOAD_LONG64 */
	uint64_t gdt_base;   /* in guest RAM; selectors below index it */
	uint16_t gdt_limit;
	uint16_t cs, ds;     /* code; ds = es = ss = fs = gs. */
	uint16_t tr;	     /* busy 32/64-bit TSS selector; base 0, limit 0x67 */
};

struct load_bytes {
	const uint8_t *data;
	size_t size; /* 0: none */
};

struct load_input {
	struct load_bytes kernel, initrd;
	const char *kernel_path, *initrd_path; /* for error sentences only */
	const char *cmdline;		       /* never NULL */
	uint64_t rsdp;			       /* gpa of the ACPI RSDP, or 0 */
	const struct e820_map *map;
	struct load_copier *copier; /* for large copies, or NULL: all is copied on return */
};

/* Load whatever `in->kernel` is. 0, or -ENOEXEC (not a kernel we know), -ENOSPC (does not fit), -E2BIG (command line),
 * -EINVAL (damaged or unsupported), with err. */
int load_kernel(struct load_result *out, const struct load_input *in, struct guest_ram *ram, struct error *err);

/* A regular file mapped read-only. The map stays private to us but follows the file: if somebody truncates it while we
 * copy, that is a SIGBUS, so loads copy at once and let go. */
struct load_file {
	struct load_bytes bytes;
};

/* Map `path`, given by `option` (for the sentence). Refuses what is not a regular file, is empty or above `max` bytes. */
int load_file_open(struct load_file *f, const char *path, const char *option, uint64_t max, struct error *err);
void load_file_close(struct load_file *f);

#endif
