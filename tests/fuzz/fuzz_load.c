/*
 * Damaged kernels into load_kernel: it must not crash or write outside what it may, must refuse with a sentence, and what it
 * accepts must be enterable (entry in RAM, tables in RAM). fuzz-load SECONDS SEED.
 */
#include <elf.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/error.h"
#include "load/e820.h"
#include "load/load.h"
#include "mem/ram.h"

#define MIB (1ull << 20)
#define FILE_MAX 0x3000u

static uint64_t state;

static unsigned pick(unsigned n)
{
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return (unsigned)(state >> 11) % n;
}

static void put(uint8_t *p, uint64_t v, unsigned size)
{
	memcpy(p, &v, size);
}

/* Values near every edge the loaders look at. */
static uint64_t edge(void)
{
	static const uint64_t edges[] = { 0, 1, 4, 0x1ff, 0x200, 0xfff, 0x1000, 0x9fc00, 0xfffff, 0x100000, 2 * MIB, 8 * MIB - 1, 8 * MIB,
					  0x7fffffff, 0x80000000, 0xbfffffff, 0xc0000000, 0xfffff000, 0xffffffff, 0x100000000,
					  0x7fffffffffffffff, 0x8000000000000000, 0xfffffffffffff000, UINT64_MAX };
	return edges[pick(sizeof(edges) / sizeof(edges[0]))] + pick(3) - 1;
}

static size_t make_bzimage(uint8_t *f)
{
	f[0x1f1] = 1;
	put(f + 0x1f4, (FILE_MAX - 1024) / 16, 4);
	put(f + 0x1fe, 0xaa55, 2);
	f[0x201] = 0x6a;
	memcpy(f + 0x202, "HdrS", 4);
	put(f + 0x206, 0x20f, 2);
	f[0x211] = 1;
	put(f + 0x22c, 0x7fffffff, 4);
	put(f + 0x236, 3, 2);
	put(f + 0x238, 2047, 4);
	put(f + 0x258, 2 * MIB, 8);
	put(f + 0x260, MIB, 4);
	return 0x290;
}

static size_t make_elf(uint8_t *f, bool is64)
{
	static const uint32_t note[] = { 4, 8, 18, 0x006e6558, 0x200000, 0 };
	memcpy(f + 0x100, note, sizeof(note));
	if (is64) {
		Elf64_Ehdr h = { .e_ident = { 0x7f, 'E', 'L', 'F', ELFCLASS64, ELFDATA2LSB, 1 }, .e_machine = EM_X86_64, .e_phoff = 64,
				 .e_phnum = 2, .e_phentsize = sizeof(Elf64_Phdr) };
		Elf64_Phdr p[2] = { { .p_type = PT_NOTE, .p_offset = 0x100, .p_filesz = 24 },
				    { .p_type = PT_LOAD, .p_offset = 0x1000, .p_paddr = 2 * MIB, .p_filesz = 0x2000, .p_memsz = 0x4000 } };
		memcpy(f, &h, sizeof(h));
		memcpy(f + 64, p, sizeof(p));
	} else {
		Elf32_Ehdr h = { .e_ident = { 0x7f, 'E', 'L', 'F', ELFCLASS32, ELFDATA2LSB, 1 }, .e_machine = EM_386, .e_phoff = 64,
				 .e_phnum = 2, .e_phentsize = sizeof(Elf32_Phdr), .e_entry = 0x200000 };
		Elf32_Phdr p[2] = { { .p_type = PT_NOTE, .p_offset = 0x100, .p_filesz = 24 },
				    { .p_type = PT_LOAD, .p_offset = 0x1000, .p_paddr = 2 * MIB, .p_filesz = 0x2000, .p_memsz = 0x4000 } };
		memcpy(f, &h, sizeof(h));
		memcpy(f + 64, p, sizeof(p));
	}
	return 0x118;
}

static size_t make_multiboot(uint8_t *f)
{
	unsigned at = pick(64) * 4;
	const uint32_t h[8] = { 0x1badb002, 0x10003, -(0x1badb002 + 0x10003), 0x200000 + at, 0x200000, 0x201000, 0x202000, 0x200010 };
	memcpy(f + at, h, sizeof(h));
	return at + 32;
}

static int one_round(struct guest_ram *ram, const struct e820_map *map)
{
	/* An exact allocation, so that the address sanitizer sees a read past the file's end. */
	size_t size = pick(4) ? FILE_MAX : pick(FILE_MAX + 1);
	uint8_t whole[FILE_MAX] = { 0 };
	unsigned kind = pick(4);
	size_t head = kind == 0 ? make_bzimage(whole) : kind == 3 ? make_multiboot(whole) : make_elf(whole, kind == 1);
	for (unsigned n = pick(6); n; n--) {
		unsigned width = 1u << pick(4);
		put(whole + pick((unsigned)head), pick(2) ? edge() : state, width);
	}
	uint8_t *file = malloc(size ? size : 1), *initrd = calloc(1, 5000);
	if (!file || !initrd)
		return 1;
	memcpy(file, whole, size);

	const struct load_input in = {
		.kernel = { file, size },
		.initrd = { initrd, pick(2) ? 5000 : 0 },
		.kernel_path = "k",
		.initrd_path = "i",
		.cmdline = "a b c",
		.map = map,
	};
	struct load_result out;
	struct error err = { "" };
	int r = load_kernel(&out, &in, ram, &err);
	int bad = 0;
	if (r > 0 || (r < 0 && !err.text[0])) {
		fprintf(stderr, "fuzz-load: kind %u refused (%d) without a sentence\n", kind, r);
		bad = 1;
	} else if (!r && (!ram_hva(ram, out.rip, 1) || !ram_hva(ram, out.gdt_base, out.gdt_limit + 1ull) ||
			  (out.mode == LOAD_LONG64 && !ram_hva(ram, out.cr3, 4096)))) {
		fprintf(stderr, "fuzz-load: kind %u accepted, but cannot be entered at 0x%" PRIx64 "\n", kind, out.rip);
		bad = 1;
	}
	free(initrd);
	free(file);
	return bad;
}

int main(int argc, char **argv)
{
	uint64_t seconds = argc > 1 ? strtoull(argv[1], NULL, 0) : 1;
	uint64_t seed = argc > 2 ? strtoull(argv[2], NULL, 0) : 1;
	state = seed * 0x9e3779b97f4a7c15ull | 1;
	clock_init();
	struct guest_ram ram;
	struct error err = { "" };
	if (ram_create(&ram, 8 * MIB, &err)) {
		fprintf(stderr, "fuzz-load: %s\n", err.text);
		return 1;
	}
	struct e820_map map;
	e820_build(&map, ram.size);
	uint64_t end = clock_ns() + seconds * NS_PER_SEC, rounds = 0;
	while (rounds % 256 || clock_ns() < end) {
		if (one_round(&ram, &map)) {
			fprintf(stderr, "fuzz-load: seed %" PRIu64 ", round %" PRIu64 "\n", seed, rounds);
			return 1;
		}
		rounds++;
	}
	ram_destroy(&ram);
	printf("fuzz-load: %" PRIu64 " kernels, seed %" PRIu64 "\n", rounds, seed);
	return 0;
}
