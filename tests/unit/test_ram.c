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

static uint64_t gone_gpa, gone_len;

static void note_gone(void *opaque, uint64_t gpa, uint64_t len)
{
	const struct guest_ram *ram = opaque;
	gone_gpa = gpa;
	gone_len = len;
	assert_null(ram_hva(ram, gpa, 1)); /* nobody can find it any more */
}

static int refuse(void *opaque, uint64_t gpa, uint64_t len)
{
	(void)opaque;
	told_gpa = gpa;
	told_len = len;
	return -ENOMEM;
}

static void discard(const struct ram_config *config)
{
	struct guest_ram ram;
	assert_int_equal(ram_create_as(&ram, config, NULL), 0);
	ram_set_watcher(&ram, &(struct ram_watcher){ .written = note });
	uint64_t empty = ram_resident(&ram);
	memset(ram.base, 0xaa, 8 << 20);
	assert_true(ram_resident(&ram) >= empty + (8 << 20));
	told_len = 0;
	assert_int_equal(ram_discard(&ram, 0x1000, 7 << 20), 0);
	assert_true(told_gpa == 0x1000 && told_len == 7 << 20);
	assert_true(ram_resident(&ram) <= empty + (1 << 20));
	assert_int_equal(ram.base[0xfff], 0xaa);
	for (unsigned i = 0; i < 7 << 20; i += 512)
		assert_int_equal(ram.base[0x1000 + i], 0);
	assert_int_equal(ram.base[0x1000 + (7 << 20)], 0xaa);
	/* not whole pages, not RAM */
	assert_int_equal(ram_discard(&ram, 0x800, 0x1000), -EINVAL);
	assert_int_equal(ram_discard(&ram, 0x1000, 0x800), -EINVAL);
	assert_int_equal(ram_discard(&ram, 7 << 20, 2 << 20), -EFAULT);
	assert_int_equal(ram_discard(&ram, UINT64_MAX & ~0xfffull, 0x2000), -EFAULT);
	assert_int_equal(ram_discard(&ram, 0x1000, 0), 0);
	ram_destroy(&ram);
}

static void discarded_pages_are_zero_and_cost_nothing(void **state)
{
	(void)state;
	discard(&(struct ram_config){ .size = 8 << 20 });
	discard(&(struct ram_config){ .size = 8 << 20, .backing = RAM_PRIVATE });
	struct guest_ram ram;
	struct error err = { "" };
	const struct ram_config mergeable = { .size = 8 << 20, .backing = RAM_PRIVATE, .mergeable = true };
	if (ram_create_as(&ram, &mergeable, &err) == 0) {
		ram_destroy(&ram);
		discard(&mergeable);
	} else {
		assert_non_null(strstr(err.text, "--mergeable: this host's kernel has no KSM"));
	}
}

/* Whether the host has some to spare or not. */
static void reserved_huge_pages(void **state)
{
	(void)state;
	struct guest_ram ram;
	struct error err = { "" };
	const struct ram_config config = { .size = 6 << 20, .backing = RAM_HUGE_2M };
	if (ram_create_as(&ram, &config, &err)) {
		assert_non_null(strstr(err.text, "--hugepages"));
		assert_true(!ram.base && ram.fd == -1);
		return;
	}
	assert_int_equal((uintptr_t)ram.base % (2 << 20), 0);
	memset(ram.base, 0xaa, 6 << 20);
	/* Part of a page reads as zeros, but stays; a whole one goes. */
	assert_int_equal(ram_discard(&ram, 0x1000, 0x1000), 0);
	assert_true(ram.base[0xfff] == 0xaa && ram.base[0x1000] == 0 && ram.base[0x1fff] == 0 && ram.base[0x2000] == 0xaa);
	uint64_t before = ram_resident(&ram);
	assert_int_equal(ram_discard(&ram, 2 << 20, 2 << 20), 0);
	assert_int_equal(before - ram_resident(&ram), 2 << 20);
	assert_int_equal(ram.base[2 << 20], 0);
	ram_destroy(&ram);
}

static void what_cannot_be(void **state)
{
	(void)state;
	struct guest_ram ram;
	struct error err = { "" };
	assert_int_equal(ram_create_as(&ram, &(struct ram_config){ .size = 8 << 20, .mergeable = true }, &err), -EINVAL);
	assert_int_equal(ram_create_as(&ram, &(struct ram_config){ .size = 1 << 30, .room = 2 << 20, .backing = RAM_HUGE_1G }, &err), -EINVAL);
	assert_non_null(strstr(err.text, "--hugepages 2M"));
}

static void room_is_ram_where_it_is_plugged(void **state)
{
	(void)state;
	struct guest_ram ram;
	const uint64_t block = RAM_BLOCK_SIZE;
	assert_int_equal(ram_create_room(&ram, (8 << 20) + 4096, 300 * block, NULL), 0);
	ram_set_watcher(&ram, &(struct ram_watcher){ .unplugged = note_gone, .opaque = &ram });
	const uint64_t at = ram.room.gpa;
	assert_true(at == RAM_HIGH_START && ram_end(&ram) == at + 300 * block);
	assert_int_equal((uintptr_t)ram.room.hva % block, 0);
	assert_null(ram_hva(&ram, at, 1));
	assert_null(ram_hva(&ram, at, 0));

	assert_int_equal(ram_plug(&ram, at + 62 * block, 4 * block), 0);
	assert_int_equal(ram_plug(&ram, at + 64 * block, block), 0); /* again */
	assert_true(ram.room.bytes == 4 * block && ram_plugged(&ram, at, 300 * block) == 4 * block);
	assert_true(ram_plugged(&ram, at + 60 * block, 3 * block) == block);
	uint8_t *hva = ram_hva(&ram, at + 62 * block, 4 * block);
	assert_non_null(hva);
	assert_null(ram_hva(&ram, at + 62 * block - 1, 2));
	assert_null(ram_hva(&ram, at + 62 * block, 4 * block + 1));
	assert_non_null(ram_hva(&ram, at + 66 * block - 1, 1));
	assert_null(ram_hva(&ram, at + 66 * block - 1, 2));
	assert_null(ram_hva(&ram, at + 62 * block, UINT64_MAX));
	memset(hva, 0x55, 4 * block);

	assert_int_equal(ram_unplug(&ram, at + 63 * block, block), 0);
	assert_true(gone_gpa == at + 63 * block && gone_len == block);
	assert_null(ram_hva(&ram, at + 62 * block, 4 * block));
	assert_non_null(ram_hva(&ram, at + 62 * block, block));
	assert_int_equal(ram_write(&ram, at + 64 * block - 4, "12345678", 8), -EFAULT);
	assert_true(ram_resident(&ram) <= 3 * block);
	gone_len = 0;
	assert_int_equal(ram_unplug(&ram, at + 63 * block, block), 0);
	assert_true(gone_len == 0); /* was gone */
	hva[block + 17] = 1; /* late: a device had the address */
	assert_int_equal(ram_plug(&ram, at + 63 * block, block), 0);
	assert_int_equal(hva[block + 17], 0);
	assert_int_equal(hva[2 * block], 0x55);

	assert_int_equal(ram_plug(&ram, at + 4096, block), -EINVAL);
	assert_int_equal(ram_plug(&ram, at, 4096), -EINVAL);
	assert_int_equal(ram_plug(&ram, at, 0), -EINVAL);
	assert_int_equal(ram_plug(&ram, at, 301 * block), -EINVAL);
	assert_int_equal(ram_plug(&ram, 0, block), -EINVAL);
	assert_int_equal(ram_unplug(&ram, 0, block), -EINVAL);
	assert_int_equal(ram_unplug(&ram, at + 299 * block, 2 * block), -EINVAL);
	ram_set_watcher(&ram, &(struct ram_watcher){ .plugged = refuse });
	assert_int_equal(ram_plug(&ram, at, block), -ENOMEM);
	assert_true(told_gpa == at && told_len == block);
	assert_null(ram_hva(&ram, at, 1));
	assert_int_equal(ram_unplug(&ram, at, 300 * block), 0);
	assert_true(ram.room.bytes == 0 && ram_resident(&ram) == 0);
	ram_destroy(&ram);
}

static void room_is_never_next_to_ram(void **state)
{
	(void)state;
	struct guest_ram ram;
	assert_int_equal(ram_create_room(&ram, 4ull << 30, 4ull << 30, NULL), 0);
	uint64_t end = ram.region[1].gpa + ram.region[1].size;
	assert_true(ram.room.gpa > end && ram.room.gpa % RAM_ROOM_ALIGN == 0);
	assert_int_equal(ram_plug(&ram, ram.room.gpa, 4ull << 30), 0);
	assert_null(ram_hva(&ram, end - 8, 16));
	assert_null(ram_hva(&ram, end, 8));
	uint64_t v = 42;
	assert_int_equal(ram_write(&ram, ram_end(&ram) - 8, &v, 8), 0);
	assert_int_equal(ram_write(&ram, ram_end(&ram) - 7, &v, 8), -EFAULT);
	ram_destroy(&ram);
	struct error err;
	assert_int_equal(ram_create_room(&ram, 4ull << 30, 4096, &err), -EINVAL);
	assert_int_equal(ram_create_room(&ram, 4ull << 30, 1ull << 40, &err), -EINVAL);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(refuses_absurd_sizes), cmocka_unit_test(small_ram_is_one_region),
		cmocka_unit_test(hole_below_4g),	cmocka_unit_test(exactly_up_to_the_hole),
		cmocka_unit_test(writes_are_told),	cmocka_unit_test(discarded_pages_are_zero_and_cost_nothing), cmocka_unit_test(reserved_huge_pages), cmocka_unit_test(what_cannot_be),
		cmocka_unit_test(room_is_ram_where_it_is_plugged), cmocka_unit_test(room_is_never_next_to_ram),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
