/*
 * Shared by the loaders' tests: guest RAM, a load_input over a buffer, and damage with a fixed seed. Test-only; asserts freely.
 */
#ifndef TRAPLINE_TESTS_LOAD_TEST_H
#define TRAPLINE_TESTS_LOAD_TEST_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/error.h"
#include "load/e820.h"
#include "load/load.h"
#include "mem/ram.h"

struct load_test {
	struct guest_ram ram;
	struct e820_map map;
	struct load_input in;
	struct load_result out;
	struct error err;
};

static inline void load_test_begin(struct load_test *t, uint64_t memory, const void *kernel, size_t size)
{
	memset(t, 0, sizeof(*t));
	assert_int_equal(ram_create(&t->ram, memory, &t->err), 0);
	e820_build(&t->map, memory);
	t->in = (struct load_input){
		.kernel = { kernel, size },
		.kernel_path = "/boot/test-kernel",
		.initrd_path = "test-initrd",
		.cmdline = "console=ttyS0 quiet",
		.rsdp = 0xe0000,
		.map = &t->map,
	};
}

static inline int load_test_run(struct load_test *t)
{
	t->err.text[0] = 0;
	return load_kernel(&t->out, &t->in, &t->ram, &t->err);
}

static inline void load_test_end(struct load_test *t)
{
	ram_destroy(&t->ram);
}

/* The load must fail with `code`, and its sentence must contain `word`. */
static inline void load_test_fails(struct load_test *t, int code, const char *word)
{
	assert_int_equal(load_test_run(t), -code);
	if (!strstr(t->err.text, word))
		fail_msg("\"%s\" does not mention \"%s\"", t->err.text, word);
}

static inline void *load_test_hva(struct load_test *t, uint64_t gpa, uint64_t len)
{
	void *p = ram_hva(&t->ram, gpa, len);
	assert_non_null(p);
	return p;
}

/* Every truncation, then `rounds` of random damage to the first `head` bytes: nothing may crash or hang (the sanitizer build
 * looks closer), and each failure has a sentence. */
static inline void load_test_damage(const uint8_t *file, size_t size, size_t head, uint64_t memory, unsigned rounds)
{
	uint64_t seed = 0x9e3779b97f4a7c15ull;
	for (unsigned i = 0; i < rounds + 300; i++) {
		size_t n = i < 300 ? size * i / 300 : size;
		/* An exact allocation: reading past it is seen. */
		uint8_t *copy = malloc(n ? n : 1);
		assert_non_null(copy);
		memcpy(copy, file, n);
		for (unsigned k = 0; i >= 300 && k < 1 + i % 4; k++) {
			seed = seed * 6364136223846793005ull + 1442695040888963407ull;
			size_t at = (seed >> 33) % (head < n ? head : n);
			copy[at] = (seed >> 20) & 1 ? (uint8_t)(seed >> 24) : (seed >> 21) & 1 ? 0xff : 0;
		}
		struct load_test t;
		load_test_begin(&t, memory, copy, n);
		if (load_test_run(&t))
			assert_true(t.err.text[0]);
		load_test_end(&t);
		free(copy);
	}
}

#endif
