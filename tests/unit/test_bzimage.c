#include <errno.h>

#include "load_test.h"

#define MIB (1ull << 20)
#define SETUP_SECTS 4
#define SETUP ((SETUP_SECTS + 1) * 512u)
#define BODY 200000u /* large enough to be copied through the memfd */
#define SIZE (SETUP + (BODY + 15) / 16 * 16)

static void put(uint8_t *p, uint64_t v, unsigned size)
{
	memcpy(p, &v, size);
}

static uint64_t get(const uint8_t *p, unsigned size)
{
	uint64_t v = 0;
	memcpy(&v, p, size);
	return v;
}

/* A bzImage as far as the boot protocol goes. */
static uint8_t *make_image(void)
{
	uint8_t *f = calloc(1, SIZE);
	assert_non_null(f);
	f[0x1f1] = SETUP_SECTS;
	put(f + 0x1f4, (SIZE - SETUP) / 16, 4);
	put(f + 0x1fe, 0xaa55, 2);
	f[0x200] = 0xeb;
	f[0x201] = 0x6a; /* header ends at 0x26c */
	memcpy(f + 0x202, "HdrS", 4);
	put(f + 0x206, 0x20f, 2);
	f[0x211] = 1;
	put(f + 0x22c, 0x7fffffff, 4);
	put(f + 0x230, 0x200000, 4);
	f[0x234] = 1;
	put(f + 0x236, 0x3f, 2);
	put(f + 0x238, 2047, 4);
	put(f + 0x250, 0x1122334455667788, 8); /* setup_data: must not reach the guest */
	put(f + 0x258, 16 * MIB, 8);
	put(f + 0x260, 20 * MIB, 4);
	for (unsigned i = SETUP; i < SIZE; i++)
		f[i] = (uint8_t)(i * 7 + (i >> 8));
	return f;
}

static void test_loads(void **state)
{
	(void)state;
	uint8_t *f = make_image();
	struct load_test t;
	load_test_begin(&t, 64 * MIB, f, SIZE);
	static uint8_t initrd[100001];
	memset(initrd, 0x5a, sizeof(initrd));
	t.in.initrd = (struct load_bytes){ initrd, sizeof(initrd) };
	assert_int_equal(load_test_run(&t), 0);

	assert_int_equal(t.out.kind, LOAD_BZIMAGE);
	assert_int_equal(t.out.mode, LOAD_LONG64);
	assert_int_equal(t.out.rip, 16 * MIB + 0x200);
	assert_memory_equal(load_test_hva(&t, 16 * MIB, SIZE - SETUP), f + SETUP, SIZE - SETUP);

	const uint8_t *zp = load_test_hva(&t, t.out.rsi, 4096);
	assert_int_equal(get(zp + 0x1fe, 2), 0xaa55);
	assert_memory_equal(zp + 0x202, "HdrS", 4);
	assert_int_equal(zp[0x210], 0xff);
	assert_int_equal(get(zp + 0x250, 8), 0);
	assert_int_equal(get(zp + 0x070, 8), 0xe0000);
	assert_string_equal(load_test_hva(&t, get(zp + 0x228, 4), 100), "console=ttyS0 quiet");

	uint64_t rd = get(zp + 0x218, 4) | get(zp + 0x0c0, 4) << 32;
	assert_int_equal(get(zp + 0x21c, 4), sizeof(initrd));
	assert_int_equal(rd, (64 * MIB - sizeof(initrd)) & ~0xfffull);
	assert_memory_equal(load_test_hva(&t, rd, sizeof(initrd)), initrd, sizeof(initrd));

	assert_int_equal(zp[0x1e8], t.map.n);
	for (int i = 0; i < t.map.n; i++) {
		assert_int_equal(get(zp + 0x2d0 + i * 20, 8), t.map.entry[i].base);
		assert_int_equal(get(zp + 0x2d0 + i * 20 + 8, 8), t.map.entry[i].size);
		assert_int_equal(get(zp + 0x2d0 + i * 20 + 16, 4), t.map.entry[i].type);
	}

	/* Walk the identity map by hand at a few addresses. */
	static const uint64_t gva[] = { 0, 0x7000, 16 * MIB + 0x200, 0xfee00000, 0xffffffff };
	for (size_t i = 0; i < sizeof(gva) / sizeof(gva[0]); i++) {
		uint64_t e = t.out.cr3;
		for (int level = 3; level >= 1; level--) {
			uint64_t index = gva[i] >> (12 + 9 * level) & 511;
			e = *(uint64_t *)load_test_hva(&t, (e & ~0xfffull) + index * 8, 8);
			assert_int_equal(e & 3, 3);
		}
		assert_int_equal(e & 0x80, 0x80);
		assert_int_equal(e & ~0x1fffffull, gva[i] & ~0x1fffffull);
	}

	/* __BOOT_CS and __BOOT_DS: 64-bit code, data. */
	const uint64_t *gdt = load_test_hva(&t, t.out.gdt_base, t.out.gdt_limit + 1ull);
	assert_int_equal(t.out.cs, 0x10);
	assert_int_equal(t.out.ds, 0x18);
	assert_int_equal(gdt[2], 0x00af9b000000ffff);
	assert_int_equal(gdt[3], 0x00cf93000000ffff);
	load_test_end(&t);
	free(f);
}

static void test_initrd_above_4g(void **state)
{
	(void)state;
	uint8_t *f = make_image();
	struct load_test t;
	load_test_begin(&t, 5ull << 30, f, SIZE);
	static uint8_t initrd[2 << 20];
	t.in.initrd = (struct load_bytes){ initrd, sizeof(initrd) };
	put(f + 0x22c, 37 * MIB - 1, 4); /* only 1 MiB between the kernel's end and this */
	assert_int_equal(load_test_run(&t), 0);
	const uint8_t *zp = load_test_hva(&t, t.out.rsi, 4096);
	uint64_t rd = get(zp + 0x218, 4) | get(zp + 0x0c0, 4) << 32;
	assert_int_equal(rd, RAM_HIGH_START + (2ull << 30) - sizeof(initrd));

	put(f + 0x236, 1, 2); /* not XLF_CAN_BE_LOADED_ABOVE_4G */
	load_test_fails(&t, ENOSPC, "--initrd");
	load_test_end(&t);
	free(f);
}

static void test_refuses(void **state)
{
	(void)state;
	uint8_t *f = make_image();
	struct load_test t;
	load_test_begin(&t, 64 * MIB, f, SIZE);

	t.in.kernel.size = SIZE - 1;
	load_test_fails(&t, EINVAL, "truncated");
	t.in.kernel.size = 0x210;
	load_test_fails(&t, EINVAL, "truncated");
	t.in.kernel.size = 100;
	load_test_fails(&t, ENOEXEC, "not a kernel");
	t.in.kernel.size = SIZE;

	put(f + 0x206, 0x20b, 2);
	load_test_fails(&t, EINVAL, "too old");
	put(f + 0x206, 0x20f, 2);
	put(f + 0x236, 0, 2);
	load_test_fails(&t, EINVAL, "32-bit");
	put(f + 0x236, 0x3f, 2);
	put(f + 0x258, 0xffffffffffff0000, 8);
	load_test_fails(&t, EINVAL, "damaged");
	put(f + 0x258, 0x1000, 8);
	load_test_fails(&t, EINVAL, "damaged");
	put(f + 0x258, 16 * MIB, 8);
	put(f + 0x260, 49 * MIB, 4);
	load_test_fails(&t, ENOSPC, "--memory");
	put(f + 0x260, 20 * MIB, 4);

	static uint8_t initrd[29 << 20];
	t.in.initrd = (struct load_bytes){ initrd, sizeof(initrd) };
	load_test_fails(&t, ENOSPC, "--initrd");
	t.in.initrd.size = 28 << 20; /* exactly what is left */
	assert_int_equal(load_test_run(&t), 0);

	char line[2049];
	memset(line, 'a', sizeof(line));
	line[2048] = 0;
	t.in.cmdline = line;
	load_test_fails(&t, E2BIG, "--append");
	line[2047] = 0;
	assert_int_equal(load_test_run(&t), 0);
	load_test_end(&t);
	free(f);
}

static void test_damage(void **state)
{
	(void)state;
	uint8_t *f = make_image();
	load_test_damage(f, SIZE, 0x290, 64 * MIB, 2000);
	free(f);
}

static void test_files(void **state)
{
	(void)state;
	struct load_file file;
	struct error err;
	assert_int_equal(load_file_open(&file, "/nonexistent/kernel", "--kernel", 1 << 20, &err), -ENOENT);
	assert_non_null(strstr(err.text, "--kernel /nonexistent/kernel"));
	assert_int_equal(load_file_open(&file, "/tmp", "--kernel", 1 << 20, &err), -EINVAL);
	assert_non_null(strstr(err.text, "regular"));
	assert_int_equal(load_file_open(&file, "/dev/null", "--initrd", 1 << 20, &err), -EINVAL);
	assert_int_equal(load_file_open(&file, "/proc/self/exe", "--kernel", 16, &err), -EFBIG);
	assert_int_equal(load_file_open(&file, "/proc/self/exe", "--kernel", 1 << 30, &err), 0);
	assert_memory_equal(file.bytes.data, "\177ELF", 4);
	load_file_close(&file);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_loads),  cmocka_unit_test(test_initrd_above_4g), cmocka_unit_test(test_refuses),
		cmocka_unit_test(test_damage), cmocka_unit_test(test_files),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
