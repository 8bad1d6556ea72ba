#include <elf.h>
#include <errno.h>

#include "load_test.h"

#define MIB (1ull << 20)

struct start_info {
	uint32_t magic, version, flags, nr_modules;
	uint64_t modlist, cmdline, rsdp, memmap;
	uint32_t memmap_entries, reserved;
};

struct note {
	uint32_t namesz, descsz, type;
	char name[4];
	uint8_t desc[8];
};

/* Both classes share this plan: headers, a foreign note and the PVH note, then 128 KiB to load at 2 MiB. */
#define NOTES 0x200
#define DATA 0x1000
#define DATA_SIZE 0x20000u
#define SIZE (DATA + DATA_SIZE)

static void put_notes(uint8_t *f, unsigned descsz)
{
	struct note other = { 3, 6, 18, "abc", { 1, 2, 3 } };
	struct note pvh = { 4, descsz, 18, "Xen", { 0x40, 0x00, 0x20, 0x00 } };
	memcpy(f + NOTES, &other, sizeof(other));
	memcpy(f + NOTES + sizeof(other), &pvh, 16 + descsz);
	for (unsigned i = 0; i < DATA_SIZE; i++)
		f[DATA + i] = (uint8_t)(i * 3 + (i >> 9));
}

static uint8_t *make64(void)
{
	uint8_t *f = calloc(1, SIZE);
	assert_non_null(f);
	Elf64_Ehdr h = { .e_ident = { 0x7f, 'E', 'L', 'F', ELFCLASS64, ELFDATA2LSB, 1 }, .e_type = ET_EXEC,
			 .e_machine = EM_X86_64, .e_entry = 0x1000000, .e_phoff = 64, .e_phnum = 2,
			 .e_phentsize = sizeof(Elf64_Phdr) };
	Elf64_Phdr p[2] = {
		{ .p_type = PT_LOAD, .p_offset = DATA, .p_vaddr = 0xffffffff80200000, .p_paddr = 2 * MIB, .p_filesz = DATA_SIZE,
		  .p_memsz = DATA_SIZE + 0x3000, .p_align = 0x1000 },
		{ .p_type = PT_NOTE, .p_offset = NOTES, .p_filesz = sizeof(struct note) + 24, .p_align = 4 },
	};
	memcpy(f, &h, sizeof(h));
	memcpy(f + 64, p, sizeof(p));
	put_notes(f, 8);
	return f;
}

static uint8_t *make32(void)
{
	uint8_t *f = calloc(1, SIZE);
	assert_non_null(f);
	Elf32_Ehdr h = { .e_ident = { 0x7f, 'E', 'L', 'F', ELFCLASS32, ELFDATA2LSB, 1 }, .e_type = ET_EXEC, .e_machine = EM_386,
			 .e_entry = 0x200000, .e_phoff = 64, .e_phnum = 2, .e_phentsize = sizeof(Elf32_Phdr) };
	Elf32_Phdr p[2] = {
		{ .p_type = PT_NOTE, .p_offset = NOTES, .p_filesz = sizeof(struct note) + 20, .p_align = 4 },
		{ .p_type = PT_LOAD, .p_offset = DATA, .p_paddr = 2 * MIB, .p_filesz = DATA_SIZE, .p_memsz = DATA_SIZE },
	};
	memcpy(f, &h, sizeof(h));
	memcpy(f + 64, p, sizeof(p));
	put_notes(f, 4);
	return f;
}

static void check_loaded(uint8_t *f)
{
	struct load_test t;
	load_test_begin(&t, 32 * MIB, f, SIZE);
	static const uint8_t initrd[5000] = { 1, 2, 3 };
	t.in.initrd = (struct load_bytes){ initrd, sizeof(initrd) };
	assert_int_equal(load_test_run(&t), 0);
	assert_int_equal(t.out.kind, LOAD_PVH);
	assert_int_equal(t.out.mode, LOAD_FLAT32);
	assert_int_equal(t.out.rip, 0x200040);
	assert_memory_equal(load_test_hva(&t, 2 * MIB, DATA_SIZE), f + DATA, DATA_SIZE);

	const struct start_info *si = load_test_hva(&t, t.out.rbx, sizeof(*si));
	assert_int_equal(si->magic, 0x336ec578);
	assert_int_equal(si->version, 1);
	assert_int_equal(si->nr_modules, 1);
	assert_int_equal(si->rsdp, 0xe0000);
	assert_string_equal(load_test_hva(&t, si->cmdline, 100), "console=ttyS0 quiet");
	const uint64_t *module = load_test_hva(&t, si->modlist, 32);
	assert_int_equal(module[1], sizeof(initrd));
	assert_memory_equal(load_test_hva(&t, module[0], sizeof(initrd)), initrd, sizeof(initrd));
	assert_int_equal(si->memmap_entries, t.map.n);
	const uint64_t *map = load_test_hva(&t, si->memmap, 24ull * (unsigned)t.map.n);
	for (int i = 0; i < t.map.n; i++) {
		assert_int_equal(map[i * 3], t.map.entry[i].base);
		assert_int_equal(map[i * 3 + 1], t.map.entry[i].size);
		assert_int_equal(map[i * 3 + 2], t.map.entry[i].type);
	}
	const uint64_t *gdt = load_test_hva(&t, t.out.gdt_base, t.out.gdt_limit + 1ull);
	assert_int_equal(gdt[t.out.cs / 8], 0x00cf9b000000ffff);
	load_test_end(&t);
	free(f);
}

static void test_elf64(void **state)
{
	(void)state;
	check_loaded(make64());
}

static void test_elf32(void **state)
{
	(void)state;
	check_loaded(make32());
}

static void test_refuses(void **state)
{
	(void)state;
	uint8_t *f = make64();
	Elf64_Phdr *p = (Elf64_Phdr *)(f + 64);
	struct load_test t;
	load_test_begin(&t, 32 * MIB, f, SIZE);

	p[0].p_filesz = p[0].p_memsz = DATA_SIZE + 1;
	load_test_fails(&t, EINVAL, "truncated");
	p[0].p_filesz = UINT64_MAX;
	load_test_fails(&t, EINVAL, "truncated");
	p[0].p_filesz = DATA_SIZE;
	p[0].p_memsz = 31 * MIB;
	load_test_fails(&t, ENOSPC, "--memory");
	p[0].p_memsz = UINT64_MAX;
	load_test_fails(&t, ENOSPC, "--memory");
	p[0].p_memsz = DATA_SIZE;
	p[0].p_paddr = 0x7000;
	load_test_fails(&t, EINVAL, "1 MiB");
	p[0].p_paddr = UINT64_MAX - 10;
	load_test_fails(&t, ENOSPC, "--memory");
	p[0].p_paddr = 2 * MIB;
	p[1].p_type = PT_NULL;
	load_test_fails(&t, ENOEXEC, "PVH");
	p[1].p_type = PT_NOTE;
	((Elf64_Ehdr *)f)->e_machine = EM_AARCH64;
	load_test_fails(&t, ENOEXEC, "PVH");
	((Elf64_Ehdr *)f)->e_machine = EM_X86_64;
	assert_int_equal(load_test_run(&t), 0);
	load_test_end(&t);
	free(f);
}

static void test_damage(void **state)
{
	(void)state;
	uint8_t *f = make64();
	load_test_damage(f, SIZE, 0x240, 32 * MIB, 1500);
	free(f);
	f = make32();
	load_test_damage(f, SIZE, 0x240, 32 * MIB, 1500);
	free(f);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_elf64),
		cmocka_unit_test(test_elf32),
		cmocka_unit_test(test_refuses),
		cmocka_unit_test(test_damage),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
