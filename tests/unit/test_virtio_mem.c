/* virtio-mem against a scripted driver (virtio 1.2 5.15). */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "device/virtio/mem.h"
#include "virtio_bench.h"

#define BLOCK RAM_BLOCK_SIZE
#define BLOCKS 64
#define F_UNPLUGGED_INACCESSIBLE 2

enum { PLUG, UNPLUG, UNPLUG_ALL, STATE };
enum { ACK, NACK, BUSY, ERROR };
enum { PLUGGED, UNPLUGGED, MIXED };
enum { ADDR = 16, REGION = 24, USABLE = 32, PLUGGED_SIZE = 40, REQUESTED = 48 }; /* configuration */

struct fixture {
	struct vbench b;
	uint64_t base, request;
};

static int setup(void **state)
{
	struct fixture *f = calloc(1, sizeof(*f));
	if (!f)
		return -1;
	vbench_open(&f->b, 16 << 20);
	ram_destroy(&f->b.ram);
	if (ram_create_room(&f->b.ram, 16 << 20, BLOCKS * BLOCK, NULL))
		return -1;
	const struct virtio_host host = vbench_host(&f->b, "mem");
	*state = f;
	f->base = f->b.ram.room.gpa;
	return virtio_mem_create(&f->b.d, &host, NULL);
}

static int teardown(void **state)
{
	struct fixture *f = *state;
	vbench_close(&f->b);
	free(f);
	return 0;
}

static void start(struct fixture *f)
{
	vbench_start_sized(&f->b, VBENCH_FEATURES, 16);
	f->request = vbench_alloc(&f->b, 64, 8);
}

static uint64_t config(struct fixture *f, unsigned offset)
{
	return virtio_config_read(f->b.d, offset, 8);
}

/* The type of the answer; the state in *state. */
static unsigned ask_raw(struct fixture *f, unsigned type, uint64_t gpa, unsigned blocks, uint16_t *state)
{
	uint8_t *p = vbench_hva(&f->b, f->request);
	uint16_t t = (uint16_t)type, n = (uint16_t)blocks;
	memset(p, 0xee, 64); /* what is unused may be anything */
	memcpy(p, &t, 2);
	memcpy(p + 8, &gpa, 8);
	memcpy(p + 16, &n, 2);
	uint32_t len;
	int id = vbench_add(&f->b, 0, (struct vbuf[]){ { f->request, 24, false }, { f->request + 32, 10, true } }, 2);
	vbench_kick(&f->b, 0);
	assert_int_equal(vbench_used(&f->b, 0, &len), id);
	assert_int_equal(len, 10);
	uint16_t answer;
	memcpy(&answer, p + 32, 2);
	if (state)
		memcpy(state, p + 40, 2);
	assert_true(config(f, PLUGGED_SIZE) == f->b.ram.room.bytes);
	return answer;
}

static unsigned ask(struct fixture *f, unsigned type, unsigned first, unsigned blocks)
{
	return ask_raw(f, type, f->base + first * BLOCK, blocks, NULL);
}

static unsigned state_of(struct fixture *f, unsigned first, unsigned blocks)
{
	uint16_t state = 0xffff;
	assert_int_equal(ask_raw(f, STATE, f->base + first * BLOCK, blocks, &state), ACK);
	return state;
}

static void plugs_what_was_requested(void **state)
{
	struct fixture *f = *state;
	struct error err;
	start(f);
	assert_true(config(f, 0) == BLOCK && config(f, ADDR) == f->base && config(f, REGION) == BLOCKS * BLOCK &&
		    config(f, USABLE) == BLOCKS * BLOCK && config(f, PLUGGED_SIZE) == 0 && config(f, REQUESTED) == 0);
	assert_int_equal(ask(f, PLUG, 0, 1), NACK); /* nobody asked for it */
	assert_int_equal(virtio_mem_set_requested(f->b.d, 4 * BLOCK, &err), 0);
	assert_int_equal(f->b.config_interrupts, 1);
	assert_true(config(f, REQUESTED) == 4 * BLOCK);
	assert_int_equal(ask(f, PLUG, 10, 3), ACK);
	assert_int_equal(ask(f, PLUG, 20, 2), NACK);
	assert_int_equal(ask(f, PLUG, 12, 1), ERROR);
	assert_int_equal(ask(f, PLUG, 9, 2), ERROR); /* one of them is there */
	assert_int_equal(ask(f, PLUG, 20, 1), ACK);
	assert_int_equal(ask(f, PLUG, 21, 1), NACK);
	assert_int_equal(state_of(f, 10, 3), PLUGGED);
	assert_int_equal(state_of(f, 9, 2), MIXED);
	assert_int_equal(state_of(f, 13, 7), UNPLUGGED);
	uint8_t *hva = ram_hva(&f->b.ram, f->base + 10 * BLOCK, 3 * BLOCK);
	assert_non_null(hva);
	assert_null(ram_hva(&f->b.ram, f->base, 1));
	memset(hva, 1, 3 * BLOCK);

	/* Fewer: the guest gives back as it can, and gets no more meanwhile. */
	assert_int_equal(virtio_mem_set_requested(f->b.d, BLOCK, &err), 0);
	assert_int_equal(ask(f, PLUG, 30, 1), NACK);
	assert_int_equal(ask(f, UNPLUG, 10, 2), ACK);
	assert_int_equal(ask(f, UNPLUG, 10, 1), ERROR);
	assert_int_equal(ask(f, UNPLUG, 12, 2), ERROR);
	assert_null(ram_hva(&f->b.ram, f->base + 10 * BLOCK, 1));
	assert_int_equal(hva[2 * BLOCK], 1);
	assert_true(ram_resident(&f->b.ram) < BLOCK + (1 << 20));
	assert_int_equal(ask(f, UNPLUG_ALL, 0, 0), ACK);
	assert_true(config(f, PLUGGED_SIZE) == 0);
	assert_int_equal(ask(f, PLUG, 63, 1), ACK);
	assert_int_equal(*(uint8_t *)ram_hva(&f->b.ram, f->base + 63 * BLOCK, BLOCK), 0);

	struct virtio_mem_state s;
	virtio_mem_state(f->b.d, &s);
	assert_true(s.size == BLOCKS * BLOCK && s.requested == BLOCK && s.plugged == BLOCK);
	/* A reset of the device takes nothing away. */
	start(f);
	assert_true(config(f, PLUGGED_SIZE) == BLOCK && config(f, REQUESTED) == BLOCK);
	assert_int_equal(state_of(f, 63, 1), PLUGGED);
}

static void refuses_what_is_wrong(void **state)
{
	struct fixture *f = *state;
	struct error err;
	start(f);
	assert_int_equal(virtio_mem_set_requested(f->b.d, BLOCKS * BLOCK + BLOCK, &err), -EINVAL);
	assert_int_equal(virtio_mem_set_requested(f->b.d, BLOCK + 4096, &err), -EINVAL);
	assert_int_equal(virtio_mem_set_requested(f->b.d, BLOCKS * BLOCK, &err), 0);
	for (unsigned type = 0; type < 5; type++) {
		if (type == UNPLUG_ALL)
			continue;
		assert_int_equal(ask_raw(f, type, f->base + 4096, 1, NULL), ERROR);
		assert_int_equal(ask_raw(f, type, f->base - BLOCK, 1, NULL), ERROR);
		assert_int_equal(ask_raw(f, type, f->base - BLOCK, 2, NULL), ERROR);
		assert_int_equal(ask_raw(f, type, 0, 1, NULL), ERROR); /* RAM, but not ours */
		assert_int_equal(ask_raw(f, type, -BLOCK, 65535, NULL), ERROR);
		assert_int_equal(ask_raw(f, type, f->base, 0, NULL), ERROR);
		assert_int_equal(ask_raw(f, type, f->base, BLOCKS + 1, NULL), ERROR);
		assert_int_equal(ask_raw(f, type, f->base + (BLOCKS - 1) * BLOCK, 2, NULL), ERROR);
	}
	assert_int_equal(ask(f, 4, 0, 1), ERROR);
	assert_int_equal(ask(f, 0xffff, 0, 1), ERROR);
	assert_true(f->b.ram.room.bytes == 0);
	assert_non_null(ram_hva(&f->b.ram, 0, 16 << 20));

	/* Too short a request; no room for the answer. */
	uint32_t len;
	vbench_add(&f->b, 0, (struct vbuf[]){ { f->request, 23, false }, { f->request + 32, 10, true } }, 2);
	vbench_add(&f->b, 0, (struct vbuf[]){ { f->request, 24, false }, { f->request + 32, 1, true } }, 2);
	vbench_add(&f->b, 0, (struct vbuf[]){ { f->request, 24, false } }, 1);
	vbench_add(&f->b, 0, (struct vbuf[]){ { f->request, 24, true } }, 1);
	vbench_kick(&f->b, 0);
	static const unsigned lens[] = { 10, 1, 0, 10 };
	for (unsigned i = 0; i < 4; i++) {
		assert_true(vbench_used(&f->b, 0, &len) >= 0);
		assert_int_equal(len, lens[i]);
	}
	assert_int_equal(virtio_get_status(f->b.d), 15);
}

static void a_driver_must_keep_its_hands_off(void **state)
{
	struct fixture *f = *state;
	assert_false(vbench_negotiate(&f->b, ~(uint64_t)F_UNPLUGGED_INACCESSIBLE));
	assert_true(vbench_negotiate(&f->b, VBENCH_FEATURES));
}

static bool all_used(void *opaque)
{
	struct fixture *f = opaque;
	while (vbench_used(&f->b, 0, NULL) >= 0)
		f->request--;
	return !f->request;
}

/* More requests than are handled at once: the rest follows by itself. */
static void many_at_once(void **state)
{
	struct fixture *f = *state;
	vbench_start_sized(&f->b, VBENCH_SPLIT, 64);
	uint64_t gpa = vbench_alloc(&f->b, 64, 8);
	memset(vbench_hva(&f->b, gpa), 0xff, 64);
	for (unsigned i = 0; i < 30; i++)
		vbench_add(&f->b, 0, (struct vbuf[]){ { gpa, 24, false }, { gpa + 32, 10, true } }, 2);
	vbench_kick(&f->b, 0);
	f->request = 30;
	assert_false(all_used(f));
	assert_true(vbench_loop(&f->b, 5000, all_used, f));
}

static void no_room_no_device(void **state)
{
	(void)state;
	struct vbench b;
	struct error err;
	vbench_open(&b, 16 << 20);
	const struct virtio_host host = vbench_host(&b, "mem");
	struct virtio_device *d;
	assert_int_equal(virtio_mem_create(&d, &host, &err), -EINVAL);
	vbench_close(&b);
}

int main(void)
{
#define TEST(fn) cmocka_unit_test_setup_teardown(fn, setup, teardown)
	const struct CMUnitTest tests[] = {
		TEST(plugs_what_was_requested), TEST(refuses_what_is_wrong), TEST(a_driver_must_keep_its_hands_off), TEST(many_at_once),
		cmocka_unit_test(no_room_no_device),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
