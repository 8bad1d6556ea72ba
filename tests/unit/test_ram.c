#include <errno.h>

#include "devtest.h"
#include "mem/ram.h"

static void refuses_absurd_sizes(void **state)
{
	(void)state;
	struct guest_ram ram;
	struct error err;
	assert_int_equal(ram_create(&ram, 0, &err), -EINVAL);
	assert_int_equal(ram_create(&ram, 4096, &err), -EINVAL);
	assert_int_equal(ram_create(&ram, (1 << 20) + 1, &err), -EINVAL);
	assert_int_equal(ram_create(&ram, 1ull << 60, &err), -EINVAL);
	ram_destroy(&ram); /* harmless after a failure */
}

static void small_ram_is_one_region(void **state)
{
	(void)state;
	struct guest_ram ram;
	assert_int_equal(ram_create(&ram, 1 << 20, NULL), 0);
	assert_int_equal(ram.nregions, 1);
	uint8_t *base = ram_hva(&ram, 0, 1 << 20);
	assert_ptr_equal(base, ram.base);
	assert_null(ram_hva(&ram, 1, 1 << 20));
	assert_non_null(ram_hva(&ram, (1 << 20) - 1, 1));
	assert_null(ram_hva(&ram, (1 << 20) - 1, 2));
	assert_null(ram_hva(&ram, 1 << 20, 0));
	/* arithmetic that wraps */
	assert_null(ram_hva(&ram, UINT64_MAX, 2));
	assert_null(ram_hva(&ram, 16, UINT64_MAX));
	assert_null(ram_hva(&ram, 16, UINT64_MAX - 15));
	ram_destroy(&ram);
}

static void hole_below_4g(void **state)
{
	(void)state;
	struct guest_ram ram;
	uint64_t size = 16ull << 30, high_end = RAM_HIGH_START + size - RAM_HOLE_START;
	assert_int_equal(ram_create(&ram, size, NULL), 0);
	assert_int_equal(ram.nregions, 2);
	assert_ptr_equal(ram_hva(&ram, RAM_HOLE_START - 1, 1), ram.base + RAM_HOLE_START - 1);
	assert_null(ram_hva(&ram, RAM_HOLE_START - 1, 2));
	assert_null(ram_hva(&ram, RAM_HOLE_START, 1));
	assert_null(ram_hva(&ram, RAM_HIGH_START - 1, 2));
	assert_ptr_equal(ram_hva(&ram, RAM_HIGH_START, 1), ram.base + RAM_HOLE_START);
	assert_non_null(ram_hva(&ram, high_end - 8, 8));
	assert_null(ram_hva(&ram, high_end - 8, 9));
	uint64_t v = 0x1122334455667788ull, w = 0;
	assert_int_equal(ram_write(&ram, high_end - 8, &v, 8), 0);
	assert_int_equal(ram_read(&ram, high_end - 8, &w, 8), 0);
	assert_true(v == w);
	assert_int_equal(ram_read(&ram, high_end - 7, &w, 8), -EFAULT);
	ram_destroy(&ram);
}

static void exactly_up_to_the_hole(void **state)
{
	(void)state;
	struct guest_ram ram;
	assert_int_equal(ram_create(&ram, RAM_HOLE_START, NULL), 0);
	assert_int_equal(ram.nregions, 1);
	assert_null(ram_hva(&ram, RAM_HIGH_START, 1));
	ram_destroy(&ram);
	assert_int_equal(ram_create(&ram, RAM_HOLE_START + 4096, NULL), 0);
	assert_int_equal(ram.nregions, 2);
	assert_non_null(ram_hva(&ram, RAM_HIGH_START, 4096));
	assert_null(ram_hva(&ram, RAM_HIGH_START, 4097));
	ram_destroy(&ram);
}

static uint64_t told_gpa, told_len;

static void note(void *opaque, uint64_t gpa, uint64_t len)
{
	(void)opaque;
	told_gpa = gpa;
	told_len = len;
}

static void writes_are_told(void **state)
{
	(void)state;
	struct guest_ram ram;
	assert_int_equal(ram_create(&ram, 1 << 20, NULL), 0);
	ram_set_watcher(&ram, &(struct ram_watcher){ .written = note });
	assert_int_equal(ram_write(&ram, 0x1234, "abc", 3), 0);
	assert_true(told_gpa == 0x1234 && told_len == 3);
	assert_int_equal(ram_write(&ram, 1 << 20, "abc", 3), -EFAULT);
	assert_true(told_gpa == 0x1234);
	ram_written(&ram, 0x8000, 4096);
	assert_true(told_gpa == 0x8000 && told_len == 4096);
	ram_destroy(&ram);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(refuses_absurd_sizes), cmocka_unit_test(small_ram_is_one_region),
		cmocka_unit_test(hole_below_4g),	cmocka_unit_test(exactly_up_to_the_hole),
		cmocka_unit_test(writes_are_told),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
