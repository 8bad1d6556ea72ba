#include <elf.h>
#include <errno.h>

#include "load_test.h"

#define MIB (1ull << 20)
#define HEADER 0x100
#define SIZE 0x9000u

static void put32(uint8_t *p, uint32_t v)
{
	memcpy(p, &v, 4);
}

static uint32_t get32(const uint8_t *p)
{
	uint32_t v;
	memcpy(&v, p, 4);
	return v;
}

static void put_header(uint8_t *f, uint32_t flags)
{
	put32(f + HEADER, 0x1badb002);
	put32(f + HEADER + 4, flags);
	put32(f + HEADER + 8, -(0x1badb002 + flags));
}

/* A flat binary that says itself where it goes: the byte at HEADER is 2 MiB + HEADER. */
static uint8_t *make_flat(void)
{
	uint8_t *f = malloc(SIZE);
	assert_non_null(f);
	for (unsigned i = 0; i < SIZE; i++)
		f[i] = (uint8_t)(i * 5 + (i >> 7));
	put_header(f, 0x10003);
	put32(f + HEADER + 12, 0x200000 + HEADER);
	put32(f + HEADER + 16, 0x200000);
	put32(f + HEADER + 20, 0x200000 + SIZE - 0x1000);
	put32(f + HEADER + 24, 0x210000);
	put32(f + HEADER + 28, 0x200400);
	return f;
}

static void test_address_fields(void **state)
{
	(void)state;
	uint8_t *f = make_flat();
	struct load_test t;
	load_test_begin(&t, 16 * MIB, f, SIZE);
	static const uint8_t module[4097] = "module";
	t.in.initrd = (struct load_bytes){ module, sizeof(module) };
	assert_int_equal(load_test_run(&t), 0);
	assert_int_equal(t.out.kind, LOAD_MULTIBOOT);
	assert_int_equal(t.out.mode, LOAD_FLAT32);
	assert_int_equal(t.out.rax, 0x2badb002);
	assert_int_equal(t.out.rip, 0x200400);
	assert_memory_equal(load_test_hva(&t, 0x200000, SIZE - 0x1000), f, SIZE - 0x1000);
	assert_int_equal(*(uint8_t *)load_test_hva(&t, 0x200000 + SIZE - 0x1000, 1), 0);

	const uint8_t *mbi = load_test_hva(&t, t.out.rbx, 88);
	assert_int_equal(get32(mbi) & 0x4d, 0x4d);
	assert_int_equal(get32(mbi + 4), 639);
	assert_int_equal(get32(mbi + 8), 15 * 1024);
	assert_string_equal(load_test_hva(&t, get32(mbi + 16), 100), "test-kernel console=ttyS0 quiet");
	assert_int_equal(get32(mbi + 20), 1);
	const uint8_t *mod = load_test_hva(&t, get32(mbi + 24), 16);
	assert_int_equal(get32(mod) & 0xfff, 0);
	assert_int_equal(get32(mod + 4) - get32(mod), sizeof(module));
	assert_memory_equal(load_test_hva(&t, get32(mod), sizeof(module)), module, sizeof(module));

	uint32_t left = get32(mbi + 44), n = 0;
	const uint8_t *e = load_test_hva(&t, get32(mbi + 48), left);
	for (; left; n++) {
		uint64_t base, len;
		memcpy(&base, e + 4, 8);
		memcpy(&len, e + 12, 8);
		assert_int_equal(base, t.map.entry[n].base);
		assert_int_equal(len, t.map.entry[n].size);
		assert_int_equal(get32(e + 20), t.map.entry[n].type);
		left -= get32(e) + 4;
		e += get32(e) + 4;
	}
	assert_int_equal(n, t.map.n);
	load_test_end(&t);
	free(f);
}

static void test_elf(void **state)
{
	(void)state;
	uint8_t *f = calloc(1, SIZE);
	assert_non_null(f);
	Elf32_Ehdr h = { .e_ident = { 0x7f, 'E', 'L', 'F', ELFCLASS32, ELFDATA2LSB, 1 }, .e_machine = EM_386,
			 .e_entry = 0x100010, .e_phoff = 64, .e_phnum = 1, .e_phentsize = sizeof(Elf32_Phdr) };
	Elf32_Phdr p = { .p_type = PT_LOAD, .p_offset = 0x1000, .p_paddr = MIB, .p_filesz = 0x8000, .p_memsz = 0x10000 };
	memcpy(f, &h, sizeof(h));
	memcpy(f + 64, &p, sizeof(p));
	put_header(f, 3);
	memset(f + 0x1000, 0x90, 0x8000);
	struct load_test t;
	load_test_begin(&t, 16 * MIB, f, SIZE);
	assert_int_equal(load_test_run(&t), 0);
	assert_int_equal(t.out.kind, LOAD_MULTIBOOT);
	assert_int_equal(t.out.rip, 0x100010);
	assert_memory_equal(load_test_hva(&t, MIB, 0x8000), f + 0x1000, 0x8000);
	load_test_end(&t);
	load_test_damage(f, SIZE, 0x120, 16 * MIB, 1000);
	free(f);
}

static void test_refuses(void **state)
{
	(void)state;
	uint8_t *f = make_flat();
	struct load_test t;
	load_test_begin(&t, 16 * MIB, f, SIZE);
	put_header(f, 0x10007);
	load_test_fails(&t, EINVAL, "video");
	put_header(f, 0x10003);
	t.in.kernel.size = SIZE - 0x1001;
	load_test_fails(&t, EINVAL, "truncated");
	t.in.kernel.size = SIZE;
	put32(f + HEADER + 16, 0x200101);
	load_test_fails(&t, EINVAL, "load address");
	put32(f + HEADER + 16, 0x200000);
	put32(f + HEADER + 24, 0xf0000000);
	load_test_fails(&t, ENOSPC, "--memory");
	put32(f + HEADER + 24, 0);
	put32(f + HEADER + 28, 0xfffffff0);
	load_test_fails(&t, EINVAL, "entry point");
	load_test_end(&t);
	free(f);
}

static void test_damage(void **state)
{
	(void)state;
	uint8_t *f = make_flat();
	load_test_damage(f, SIZE, 0x120, 16 * MIB, 1000);
	free(f);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_address_fields),
		cmocka_unit_test(test_elf),
		cmocka_unit_test(test_refuses),
		cmocka_unit_test(test_damage),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
