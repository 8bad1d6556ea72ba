/* Device status, features, resets of a device and of a queue, configuration (virtio 1.2 2.1 to 2.6, 3.1). */
#include "virtio_probe.h"

static void test_status(void **state)
{
	struct fixture *f = *state;
	struct vbench *b = &f->b;
	struct virtio_device *d = b->d;

	/* A queue before the features. */
	assert_true(vbench_negotiate(b, UINT64_MAX));
	virtio_set_status(d, 0);
	virtio_set_status(d, 3);
	vbench_queue(b, 0, SIZE);
	virtq_enable(d, 0);
	expect_broken(f, "early queue", "before the features");

	/* DRIVER_OK without FEATURES_OK. */
	virtio_set_status(d, 0);
	assert_int_equal(virtio_get_status(d), 0);
	virtio_set_status(d, 3);
	virtio_set_status(d, 7);
	assert_int_equal(f->p.starts, 0);
	expect_broken(f, "early DRIVER_OK", "DRIVER_OK without");

	/* What was not offered, no VERSION_1, and what the device says no to: no FEATURES_OK, but no reset is needed. */
	static const uint64_t refused[] = { 1ull << 32 | 1ull << 50, 1ull << 32 | 1 << 5, 1, 1ull << 32 | 2 };
	for (unsigned i = 0; i < 4; i++) {
		virtio_set_status(d, 0);
		virtio_set_status(d, 3);
		virtio_accept(d, 0, (uint32_t)refused[i]);
		virtio_accept(d, 1, (uint32_t)(refused[i] >> 32));
		virtio_set_status(d, 11);
		assert_int_equal(virtio_get_status(d), 3);
		assert_int_equal(d->features, 0);
	}
	/* One more try without a reset. */
	virtio_accept(d, 0, 3);
	virtio_set_status(d, 11);
	assert_int_equal(virtio_get_status(d), 11);
	assert_int_equal(d->features, 1ull << 32 | 3);
	virtio_accept(d, 0, 0); /* too late */
	assert_int_equal(d->features, 1ull << 32 | 3);
	assert_int_equal(virtio_accepted(d, 0), 3);
	virtio_accept(d, 2, 7);
	assert_int_equal(virtio_offered(d, 2), 0);

	/* Bits stay until a reset, and NEEDS_RESET is not the driver's. */
	virtio_set_status(d, 64);
	assert_int_equal(virtio_get_status(d), 11);
	virtio_set_status(d, 15 | 128);
	assert_int_equal(virtio_get_status(d), 15 | 128);
	assert_int_equal(f->p.starts, 1);
	virtio_set_status(d, 0);
	assert_int_equal(virtio_get_status(d), 0);

	/* Buffers and kicks before DRIVER_OK wait for it. */
	assert_true(vbench_negotiate(b, UINT64_MAX));
	vbench_queue(b, 0, SIZE);
	virtq_enable(d, 0);
	add_one(b);
	unsigned notifies = f->p.notifies;
	vbench_kick(b, 0);
	assert_int_equal(f->p.notifies, notifies);
	assert_int_equal(vbench_used(b, 0, NULL), -1);
	virtio_set_status(d, 15);
	assert_true(vbench_used(b, 0, NULL) >= 0);

	/* Registers of a live queue do not move; queues that are not there do nothing. */
	virtq_set_size(d, 0, 2);
	virtq_set_addr(d, 0, VIRTQ_DESC, false, 0);
	round_trip(f, 0, 3, false);
	struct virtq_regs regs;
	virtq_get_regs(d, 7, &regs);
	assert_int_equal(regs.max_size, 0);
	virtq_set_size(d, 7, 1);
	virtq_set_addr(d, 7, VIRTQ_DESC, false, 0);
	virtq_enable(d, 7);
	virtq_reset(d, 7);
	vbench_kick(b, 7);
	vbench_kick(b, 1); /* there, but not enabled */
	assert_int_equal(virtio_get_status(d), 15);
	assert_string_equal(log_take(&f->log), "");
}

/* A guest that breaks its device for ever fills no terminal. */
static void test_log_limit(void **state)
{
	struct fixture *f = *state;
	unsigned lines = 0;
	for (unsigned i = 0; i < 1000; i++) {
		vbench_start(&f->b, VBENCH_SPLIT);
		vbench_avail(&f->b, 0)[1] = 100;
		vbench_kick(&f->b, 0);
		assert_int_equal(virtio_get_status(f->b.d), 15 | 64);
		lines += log_lines(log_take(&f->log));
	}
	assert_int_equal(lines, 10);
}

/* A driver that makes a buffer available for each that comes back keeps the device busy, but not the device lock: the rest of the work
 * is done by the event loop. */
static void test_budget(void **state)
{
	struct fixture *f = *state;
	struct vbench *b = &f->b;
	for (unsigned k = 0; k < KINDS; k++) {
		vbench_start(b, kinds[k]);
		f->p.refill = b;
		f->p.refills = 0;
		add_one(b);
		vbench_kick(b, 0);
		assert_int_equal(f->p.refills, 2 * SIZE);
		vbench_loop(b, 5, NULL, NULL);
		assert_true(f->p.refills > 3 * SIZE);
		/* When it stops, nothing is left over. */
		f->p.refill = NULL;
		vbench_loop(b, 5, NULL, NULL);
		while (vbench_used(b, 0, NULL) >= 0)
			;
		assert_int_equal(vbench_free_id(&b->ring[0]), 0);
		assert_false(b->ring[0].busy[0] || b->ring[0].busy[1]);
		round_trip(f, 0, 2, false);
	}
}

static void test_dma(void **state)
{
	struct fixture *f = *state;
	struct vbench *b = &f->b;
	vbench_start(b, UINT64_MAX);
	virtio_allow_dma(b->d, false);
	add_one(b);
	vbench_kick(b, 0);
	assert_null(virtq_pop(virtio_queue(b->d, 0)));
	assert_int_equal(vbench_used(b, 0, NULL), -1);
	virtio_allow_dma(b->d, true);
	assert_true(vbench_used(b, 0, NULL) >= 0);
	round_trip(f, 0, 2, false);
	f->p.hold = true;
	add_one(b);
	vbench_kick(b, 0);
	virtio_allow_dma(b->d, false);
	virtq_push(virtio_queue(b->d, 0), f->p.held[0], 0); /* what was in flight is not told any more */
	f->p.nheld = 0;
	assert_int_equal(vbench_used(b, 0, NULL), -1);
}

/* --- resets --- */

/* Requests that are in flight hold a reset up; their buffers are answered to nobody. */
static void test_slow_reset(void **state)
{
	struct fixture *f = *state;
	struct vbench *b = &f->b;
	struct virtio_device *d = b->d;
	for (unsigned k = 0; k < KINDS; k++) {
		vbench_start(b, kinds[k]);
		f->p.hold = f->p.slow = true;
		add_one(b);
		add_one(b);
		vbench_kick(b, 0);
		assert_int_equal(f->p.nheld, 2);
		virtio_set_status(d, 0);
		assert_int_not_equal(virtio_get_status(d), 0);
		assert_false(virtio_is_live(d));
		virtio_set_status(d, 1);
		virtio_set_status(d, 0);
		virtq_set_size(d, 0, 2);
		assert_null(virtq_pop(virtio_queue(d, 0)));
		unsigned interrupts = b->interrupts[0], config_interrupts = b->config_interrupts;
		virtq_push(virtio_queue(d, 0), f->p.held[0], 1);
		virtq_notify(virtio_queue(d, 0));
		virtio_config_changed(d);
		virtio_broken(d, "while it resets");
		virtq_drop(f->p.held[1]);
		f->p.nheld = 0;
		virtio_reset_done(d);
		assert_int_equal(virtio_get_status(d), 0);
		assert_int_equal(vbench_used(b, 0, NULL), -1);
		assert_int_equal(b->interrupts[0], interrupts);
		assert_int_equal(b->config_interrupts, config_interrupts);
		f->p.hold = f->p.slow = false;
		vbench_start(b, kinds[k]);
		round_trip(f, 0, 4, false);
	}
	assert_string_equal(log_take(&f->log), "");
}

static void test_queue_reset(void **state)
{
	struct fixture *f = *state;
	struct vbench *b = &f->b;
	struct virtio_device *d = b->d;
	struct virtq_regs regs;
	for (unsigned k = 0; k < KINDS; k++)
		for (unsigned slow = 0; slow < 2; slow++) {
			vbench_start(b, kinds[k]);
			for (unsigned i = 0; i < 5; i++)
				round_trip(f, 0, 3, false);
			f->p.hold = true;
			f->p.slow = slow;
			add_one(b);
			vbench_kick(b, 0);
			virtq_reset(d, 0);
			virtq_get_regs(d, 0, &regs);
			assert_int_equal(regs.resetting, slow);
			assert_false(regs.enabled);
			assert_int_equal(regs.size, SIZE);
			assert_int_equal(regs.desc, 0);
			if (slow) {
				virtq_enable(d, 0);
				virtq_set_size(d, 0, 2);
				virtq_push(virtio_queue(d, 0), f->p.held[0], 1);
				f->p.nheld = 0;
				virtio_queue_reset_done(d, 0);
				virtq_get_regs(d, 0, &regs);
				assert_false(regs.resetting);
				assert_int_equal(regs.size, SIZE);
			}
			assert_int_equal(vbench_used(b, 0, NULL), -1);
			f->p.hold = f->p.slow = false;
			/* The other queue goes on; this one again with another size. */
			round_trip(f, 1, 3, false);
			vbench_queue(b, 0, SIZE / 2);
			virtq_enable(d, 0);
			for (unsigned i = 0; i < 20; i++)
				round_trip(f, 0, 3, i & 1);
			assert_int_equal(virtio_get_status(d), 15);
		}
}

/* --- configuration --- */

static void test_config(void **state)
{
	struct fixture *f = *state;
	struct virtio_device *d = f->b.d;
	for (unsigned i = 0; i < 8; i++)
		f->p.config[i] = (uint8_t)(0x10 + i);
	assert_int_equal(virtio_config_read(d, 0, 4), (int64_t)0xffffffff13121110);
	assert_int_equal((uint32_t)virtio_config_read(d, 6, 4), 0xffff1716);
	assert_int_equal(virtio_config_read(d, 8, 1), UINT64_MAX);
	assert_int_equal(virtio_config_read(d, UINT32_MAX, 4), UINT64_MAX);
	virtio_config_write(d, 7, 4, 0x55667788);
	assert_int_equal(f->p.config[7], 0x88);
	virtio_config_write(d, 8, 4, 0);
	virtio_config_write(d, UINT32_MAX - 1, 4, 0);
	vbench_start(&f->b, UINT64_MAX);
	unsigned n = f->b.config_interrupts;
	uint32_t generation = d->config_generation;
	virtio_config_changed(d);
	assert_int_equal(f->b.config_interrupts, n + 1);
	assert_int_equal(d->config_generation, generation + 1);
}

static void test_init_errors(void **state)
{
	struct fixture *f = *state;
	struct virtio_device d;
	struct error err;
	const struct virtio_host host = vbench_host(&f->b, "x");
	static const uint16_t zero[] = { 0 }, odd[] = { 100 }, large[] = { 2048 };
	assert_int_equal(virtio_init(&d, &probe_ops, &host, 0, NULL, 0, 1, zero, &err), -EINVAL);
	assert_int_equal(virtio_init(&d, &probe_ops, &host, 0, NULL, 0, 1, odd, &err), -EINVAL);
	assert_int_equal(virtio_init(&d, &probe_ops, &host, 0, NULL, 0, 1, large, &err), -EINVAL);
	assert_int_equal(virtio_init(&d, &probe_ops, &host, 0, NULL, 0, VIRTIO_MAX_QUEUES + 1, large, &err), -EINVAL);
	assert_int_equal(virtio_init(&d, &probe_ops, &host, 0, NULL, 0, 0, NULL, &err), 0);
	virtio_fini(&d);
}

#define T(f) cmocka_unit_test_setup_teardown(f, open_fixture, close_fixture)

int main(void)
{
	const struct CMUnitTest tests[] = {
		T(test_status), T(test_log_limit), T(test_budget), T(test_dma), T(test_slow_reset), T(test_queue_reset), T(test_config), T(test_init_errors),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
