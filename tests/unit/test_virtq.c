/* Virtqueues that are used as the specification says, of both formats (virtio 1.2 2.7, 2.8): chains, notifications, a driver on another thread. */
#include "virtio_probe.h"

static void test_round_trips(void **state)
{
	struct fixture *f = *state;
	for (unsigned k = 0; k < KINDS; k++) {
		vbench_start(&f->b, kinds[k]);
		/* Past the wrap of the 16-bit index. */
		for (unsigned i = 0; i < 70000; i++) {
			if (i % 1000 == 0)
				f->b.ram_used = 1 << 20;
			round_trip(f, i & 1, 1 + i % SIZE, i % 3 == 0);
		}
		assert_int_equal(virtio_get_status(f->b.d), 15);
	}
	assert_string_equal(log_take(&f->log), "");
}

/* Packed rings may have any size (2.8.10.1). */
static void test_packed_odd_size(void **state)
{
	struct fixture *f = *state;
	for (unsigned size = 1; size <= SIZE; size++) {
		vbench_start_sized(&f->b, UINT64_MAX, size);
		for (unsigned i = 0; i < 1000; i++)
			round_trip(f, i & 1, 1 + i % size, false);
		assert_int_equal(virtio_get_status(f->b.d), 15);
	}
}

/* The device may answer in any order. */
static void test_out_of_order(void **state)
{
	struct fixture *f = *state;
	struct vbench *b = &f->b;
	for (unsigned k = 0; k < KINDS; k++) {
		vbench_start(b, kinds[k]);
		f->p.hold = true;
		for (unsigned round = 0; round < 50; round++) {
			int id[4];
			for (unsigned i = 0; i < 4; i++) {
				struct vbuf bufs[] = { { vbench_alloc(b, 4, 1), 4, false }, { vbench_alloc(b, 4, 1), 4, true } };
				id[i] = vbench_add(b, 0, bufs, 1 + i % 2);
			}
			vbench_kick(b, 0);
			assert_int_equal(f->p.nheld, 4);
			static const unsigned order[] = { 2, 0, 3, 1 };
			for (unsigned i = 0; i < 4; i++)
				virtq_push(virtio_queue(b->d, 0), f->p.held[order[i]], 0);
			f->p.nheld = 0;
			virtq_notify(virtio_queue(b->d, 0));
			for (unsigned i = 0; i < 4; i++)
				assert_int_equal(vbench_used(b, 0, NULL), id[order[i]]);
		}
		f->p.hold = false;
	}
}

static void test_unpop(void **state)
{
	struct fixture *f = *state;
	struct vbench *b = &f->b;
	struct virtio_queue *q = virtio_queue(b->d, 0);
	for (unsigned k = 0; k < KINDS; k++) {
		vbench_start(b, kinds[k]);
		for (unsigned round = 0; round < 40; round++) {
			uint64_t gpa = vbench_alloc(b, 16, 1);
			int first = vbench_add(b, 0, (struct vbuf[]){ { gpa, 1, false }, { gpa, 2, false }, { gpa, 3, true } }, 3);
			int second = vbench_add(b, 0, (struct vbuf[]){ { gpa, 7, false }, { gpa, 5, true } }, 2);
			struct virtio_chain *one = virtq_pop(q), *two = virtq_pop(q);
			assert_null(virtq_pop(q));
			assert_int_equal(two->out_len, 7);
			virtq_unpop(q, two);
			virtq_unpop(q, one);
			one = virtq_pop(q);
			assert_int_equal(one->nout, 2);
			assert_int_equal(one->nin, 1);
			virtq_push(q, one, 3);
			two = virtq_pop(q);
			assert_int_equal(two->in_len, 5);
			virtq_push(q, two, 0);
			assert_int_equal(vbench_used(b, 0, NULL), first);
			assert_int_equal(vbench_used(b, 0, NULL), second);
			assert_int_equal(vbench_used(b, 0, NULL), -1);
		}
	}
}

/* What a chain tells: parts of length 0 are left out, host addresses are those of the guest's. */
static void test_chain(void **state)
{
	struct fixture *f = *state;
	struct vbench *b = &f->b;
	for (unsigned k = 0; k < KINDS; k++) {
		vbench_start(b, kinds[k]);
		uint64_t gpa = vbench_alloc(b, 64, 1);
		memcpy(vbench_hva(b, gpa), "0123456789abcdef", 16);
		vbench_add(b, 0, (struct vbuf[]){ { gpa, 4, false }, { 0, 0, false }, { gpa + 8, 3, false }, { 1, 0, true }, { gpa + 32, 2, true }, { gpa + 40, 9, true } }, 6);
		struct virtio_chain *c = virtq_pop(virtio_queue(b->d, 0));
		assert_int_equal(c->nout, 2);
		assert_int_equal(c->nin, 2);
		assert_int_equal(c->out_len, 7);
		assert_int_equal(c->in_len, 11);
		assert_ptr_equal(c->iov[1].iov_base, vbench_hva(b, gpa + 8));
		char text[16] = "";
		assert_int_equal(virtio_chain_read(c, 2, text, sizeof(text)), 5);
		assert_string_equal(text, "2389a");
		assert_int_equal(virtio_chain_read(c, 7, text, sizeof(text)), 0);
		assert_int_equal(virtio_chain_write(c, 1, "ABCDEFGHIJKLMNOP", 16), 10);
		assert_memory_equal(vbench_hva(b, gpa + 33), "A", 1);
		assert_memory_equal(vbench_hva(b, gpa + 40), "BCDEFGHIJ", 9);
		struct iovec part[2];
		assert_int_equal(iov_slice(c->iov, 2, 3, 3, part, 2), 2);
		assert_int_equal(part[0].iov_len, 1);
		assert_int_equal(part[1].iov_len, 2);
		assert_ptr_equal(part[1].iov_base, vbench_hva(b, gpa + 8));
		assert_int_equal(iov_slice(c->iov, 2, 3, 3, part, 1), -E2BIG);
		assert_int_equal(iov_slice(c->iov, 2, 7, 3, part, 1), 0);
		virtq_push(virtio_queue(b->d, 0), c, 1000); /* a device's own mistake is cut, too */
		uint32_t len;
		vbench_used(b, 0, &len);
		assert_int_equal(len, 11);
	}
}

/* A normal descriptor may lead to an indirect one in split rings (2.7.5.3.2); the indirect one's WRITE flag says nothing. */
static void test_chained_indirect(void **state)
{
	struct fixture *f = *state;
	struct vbench *b = &f->b;
	vbench_start(b, VBENCH_SPLIT);
	uint64_t gpa = vbench_alloc(b, 64, 1), table = vbench_alloc(b, 32, 16);
	struct vdesc *t = vbench_hva(b, table);
	t[0] = (struct vdesc){ gpa, 5, VDESC_NEXT, 1 };
	t[1] = (struct vdesc){ gpa, 6, VDESC_WRITE, 0 };
	int id = vbench_add(b, 0, (struct vbuf[]){ { gpa, 4, false }, { table, 32, true } }, 2);
	vbench_desc(b, 0, 1)->third |= VDESC_INDIRECT;
	struct virtio_chain *c = virtq_pop(virtio_queue(b->d, 0));
	assert_non_null(c);
	assert_int_equal(c->out_len, 9);
	assert_int_equal(c->in_len, 6);
	virtq_push(virtio_queue(b->d, 0), c, 0);
	assert_int_equal(vbench_used(b, 0, NULL), id);
}

/* --- notifications --- */

/* Interrupts for `n` chains answered one by one. */
static unsigned interrupts_of(struct fixture *f, unsigned n)
{
	unsigned before = f->b.interrupts[0];
	for (unsigned i = 0; i < n; i++) {
		add_one(&f->b);
		vbench_kick(&f->b, 0);
		assert_true(vbench_used(&f->b, 0, NULL) >= 0);
	}
	return f->b.interrupts[0] - before;
}

static void test_interrupt_suppression(void **state)
{
	struct fixture *f = *state;
	struct vbench *b = &f->b;
	b->ram_used = 0;

	vbench_start(b, kinds[0]);
	assert_int_equal(interrupts_of(f, 3), 3);
	vbench_avail(b, 0)[0] = 1;
	assert_int_equal(interrupts_of(f, 3), 0);
	vbench_avail(b, 0)[0] = 0;
	assert_int_equal(interrupts_of(f, 1), 1);

	vbench_start(b, kinds[1]);
	uint16_t *used_event = &vbench_avail(b, 0)[2 + SIZE];
	*used_event = 0; /* when the index passes 0 */
	assert_int_equal(interrupts_of(f, 3), 1);
	*used_event = 5;
	assert_int_equal(interrupts_of(f, 2), 0); /* 3, 4 */
	assert_int_equal(interrupts_of(f, 1), 1); /* 5 */
	assert_int_equal(interrupts_of(f, 3), 0);
	*used_event = 0;
	vbench_avail(b, 0)[0] = 1; /* the flag says nothing with event indices */
	assert_int_equal(interrupts_of(f, 65537), 1);

	vbench_start(b, kinds[2]);
	uint16_t *event = vbench_avail(b, 0); /* offset and wrap, flags */
	assert_int_equal(interrupts_of(f, 3), 3);
	event[1] = 1;
	assert_int_equal(interrupts_of(f, 3), 0);
	event[1] = 0;
	assert_int_equal(interrupts_of(f, 1), 1);

	vbench_start(b, kinds[3]);
	event = vbench_avail(b, 0);
	event[1] = 2;
	event[0] = 4 | 1 << 15; /* the third chain of two descriptors in the first lap */
	assert_int_equal(interrupts_of(f, 2), 0);
	assert_int_equal(interrupts_of(f, 1), 1);
	event[0] = 2; /* the second chain of the second lap */
	assert_int_equal(interrupts_of(f, 2), 0);
	assert_int_equal(interrupts_of(f, 1), 1);
	event[0] = 0 | 1 << 15; /* the third lap's first; two are left in this one */
	assert_int_equal(interrupts_of(f, 2), 0);
	assert_int_equal(interrupts_of(f, 1), 1);
	event[1] = 1;
	assert_int_equal(interrupts_of(f, 10), 0);
	event[1] = 3; /* reserved: as if enabled */
	assert_int_equal(interrupts_of(f, 2), 2);
}

/* What the device asks of the driver. */
static void test_kick_suppression(void **state)
{
	struct fixture *f = *state;
	struct vbench *b = &f->b;
	for (unsigned k = 0; k < KINDS; k++) {
		vbench_start(b, kinds[k]);
		struct virtio_queue *q = virtio_queue(b->d, 0);
		uint16_t *device = vbench_used_ring(b, 0), *avail_event = device + 2 + 4 * SIZE;
		virtq_no_notify(q);
		if (k == 0)
			assert_int_equal(device[0], 1);
		if (k >= 2)
			assert_int_equal(device[1], 1);
		assert_false(virtq_want_notify(q));
		add_one(b);
		assert_true(virtq_want_notify(q)); /* it came meanwhile */
		virtq_push(q, virtq_pop(q), 0);
		assert_false(virtq_want_notify(q));
		if (k == 0)
			assert_int_equal(device[0], 0);
		if (k == 1)
			assert_int_equal(*avail_event, 1);
		if (k == 2)
			assert_int_equal(device[1], 0);
		if (k == 3) {
			assert_int_equal(device[1], 2);
			assert_int_equal(device[0], 2 | 1 << 15);
		}
	}
}

/* --- a driver on another thread: no notification may get lost in either direction --- */

#define RACES 5000

struct race {
	struct vbench *b;
	_Atomic unsigned interrupts;
	_Atomic bool done;
	bool failed;
};

static void race_interrupt(void *opaque, unsigned q)
{
	(void)q;
	((struct race *)opaque)->interrupts++;
}

/* Must the driver kick after making chains [old, new) available? */
static bool driver_must_kick(struct vbench *b, const struct vring *r, uint16_t old, uint16_t old_place)
{
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	const uint16_t *device = vbench_used_ring(b, 0);
	if (!r->packed) {
		if (!r->event_idx)
			return !(__atomic_load_n(&device[0], __ATOMIC_ACQUIRE) & 1);
		uint16_t event = __atomic_load_n(&device[2 + 4 * r->size], __ATOMIC_ACQUIRE);
		return (uint16_t)(r->avail - event - 1) < (uint16_t)(r->avail - old);
	}
	uint32_t word = __atomic_load_n((const uint32_t *)device, __ATOMIC_ACQUIRE);
	unsigned flags = word >> 16 & 3;
	if (flags != 2)
		return flags == 0;
	(void)old_place;
	uint16_t event = word & 0x7fff, added = (uint16_t)((r->avail + r->size - old_place) % r->size);
	if ((word >> 15 & 1) != r->avail_wrap)
		event = (uint16_t)(event - r->size);
	return (uint16_t)(r->avail - event - 1) < added;
}

/* Ask for an interrupt with the next used chain; true if one is there already. */
static bool driver_want_interrupt(struct vbench *b, struct vring *r)
{
	uint16_t *driver = vbench_avail(b, 0);
	if (r->packed)
		__atomic_store_n((uint32_t *)driver, r->event_idx ? r->used | (uint32_t)r->used_wrap << 15 | 2u << 16 : 0, __ATOMIC_RELEASE);
	else if (r->event_idx)
		__atomic_store_n(&driver[2 + r->size], r->used, __ATOMIC_RELEASE);
	else
		__atomic_store_n(&driver[0], 0, __ATOMIC_RELEASE);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (r->packed) {
		uint16_t flags = __atomic_load_n(&vbench_desc(b, 0, r->used)->fourth, __ATOMIC_ACQUIRE);
		return !!(flags & VDESC_AVAIL) == r->used_wrap && !!(flags & VDESC_USED) == r->used_wrap;
	}
	return __atomic_load_n(&vbench_used_ring(b, 0)[1], __ATOMIC_ACQUIRE) != r->used;
}

static void *race_driver(void *opaque)
{
	struct race *race = opaque;
	struct vbench *b = race->b;
	struct vring *r = &b->ring[0];
	unsigned sent = 0, got = 0;
	while (got < RACES && !race->failed) {
		uint16_t old = r->avail;
		unsigned burst = 1 + sent % 3;
		while (burst-- && sent - got < SIZE / 2 - 1 && sent < RACES) {
			vbench_add(b, 0, (struct vbuf[]){ { 0x100000, 1, false }, { 0x100100, 1, true } }, 2);
			sent++;
		}
		if (r->avail != old && driver_must_kick(b, r, old, old)) {
			pthread_mutex_lock(&b->lock);
			vbench_kick(b, 0);
			pthread_mutex_unlock(&b->lock);
		}
		unsigned seen = race->interrupts;
		while (vbench_used(b, 0, NULL) >= 0)
			got++;
		if (got == sent || (got == RACES))
			continue;
		if (driver_want_interrupt(b, r))
			continue;
		/* Sleep until the interrupt comes; ten seconds mean that it was lost. */
		for (unsigned i = 0; race->interrupts == seen; i++) {
			if (i > 100000) {
				race->failed = true;
				break;
			}
			usleep(i < 1000 ? 0 : 100);
		}
	}
	race->done = true;
	return NULL;
}

/* The device answers on this thread and now and then late, as a disk does. */
static void test_races(void **state)
{
	struct fixture *f = *state;
	struct vbench *b = &f->b;
	for (unsigned k = 0; k < KINDS; k++) {
		vbench_start(b, kinds[k]);
		struct race race = { .b = b };
		virtio_connect(b->d, &(struct virtio_interrupt){ .queue = race_interrupt, .opaque = &race });
		f->p.hold = true;
		pthread_t thread;
		pthread_mutex_unlock(&b->lock);
		assert_int_equal(pthread_create(&thread, NULL, race_driver, &race), 0);
		while (!race.done) {
			pthread_mutex_lock(&b->lock);
			struct virtio_queue *q = virtio_queue(b->d, 0);
			unsigned n = f->p.nheld;
			for (unsigned i = 0; i < n; i++)
				virtq_push(q, f->p.held[i], 1);
			f->p.nheld = 0;
			virtq_notify(q);
			pthread_mutex_unlock(&b->lock);
			sched_yield();
		}
		pthread_join(thread, NULL);
		pthread_mutex_lock(&b->lock);
		f->p.hold = false;
		if (race.failed)
			fail_msg("kind %u: a notification was lost", k);
		assert_int_equal(virtio_get_status(b->d), 15);
	}
}

#define T(f) cmocka_unit_test_setup_teardown(f, open_fixture, close_fixture)

int main(void)
{
	const struct CMUnitTest tests[] = {
		T(test_round_trips), T(test_packed_odd_size), T(test_out_of_order), T(test_unpop), T(test_chain),
		T(test_chained_indirect), T(test_interrupt_suppression), T(test_kick_suppression), T(test_races),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
