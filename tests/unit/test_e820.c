#include "load_test.h"

#define GIB (1ull << 30)

static uint64_t ram_bytes(const struct e820_map *map)
{
	uint64_t sum = 0;
	for (int i = 0; i < map->n; i++) {
		if (map->entry[i].type == E820_RAM)
			sum += map->entry[i].size;
	}
	return sum;
}

static const struct e820_entry *at(const struct e820_map *map, uint64_t gpa)
{
	for (int i = 0; i < map->n; i++) {
		const struct e820_entry *e = &map->entry[i];
		if (gpa >= e->base && gpa - e->base < e->size)
			return e;
	}
	return NULL;
}

static void test_shape(void **state)
{
	(void)state;
	static const uint64_t sizes[] = { 2 << 20, 128 << 20, GIB, 3 * GIB, 3 * GIB + 4096, 4 * GIB, 16 * GIB, 512 * GIB };
	for (size_t s = 0; s < sizeof(sizes) / sizeof(sizes[0]); s++) {
		struct e820_map map;
		e820_build(&map, sizes[s]);
		assert_in_range(map.n, 1, E820_MAX);
		uint64_t end = 0;
		for (int i = 0; i < map.n; i++) {
			assert_true(map.entry[i].base >= end);
			assert_true(map.entry[i].size > 0);
			end = map.entry[i].base + map.entry[i].size;
		}
		/* All of RAM but what lies in the 640 KiB - 1 MiB area and the EBDA. */
		assert_int_equal(ram_bytes(&map), sizes[s] - (0x100000 - E820_EBDA));
		assert_int_equal(at(&map, 0x1000)->type, E820_RAM);
		assert_int_equal(at(&map, E820_EBDA)->type, E820_RESERVED);
		assert_null(at(&map, 0xa0000));
		assert_int_equal(at(&map, 0xe0000)->type, E820_RESERVED);
		assert_int_equal(at(&map, 0xfffff)->type, E820_RESERVED);
		assert_int_equal(at(&map, E820_ECAM)->type, E820_RESERVED);
		assert_int_equal(at(&map, E820_ECAM + E820_ECAM_SIZE - 1)->type, E820_RESERVED);
		assert_null(at(&map, RAM_HOLE_START));
		if (sizes[s] > 3 * GIB)
			assert_int_equal(at(&map, RAM_HIGH_START)->size, sizes[s] - 3 * GIB);
		else
			assert_null(at(&map, RAM_HIGH_START));
	}
}

/* Every RAM entry is RAM of guest_ram, to its last byte. */
static void test_matches_ram(void **state)
{
	(void)state;
	static const uint64_t sizes[] = { 2 << 20, 3 * GIB, 5 * GIB };
	for (size_t s = 0; s < sizeof(sizes) / sizeof(sizes[0]); s++) {
		struct guest_ram ram;
		struct e820_map map;
		assert_int_equal(ram_create(&ram, sizes[s], NULL), 0);
		e820_build(&map, sizes[s]);
		for (int i = 0; i < map.n; i++) {
			if (map.entry[i].type == E820_RAM)
				assert_non_null(ram_hva(&ram, map.entry[i].base, map.entry[i].size));
		}
		ram_destroy(&ram);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_shape),
		cmocka_unit_test(test_matches_ram),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
