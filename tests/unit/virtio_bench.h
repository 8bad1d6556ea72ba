/*
 * A virtio driver for tests of devices and of the queues: guest RAM, a transport without registers, and rings of both formats that the
 * test fills by hand. No cmocka here: the fuzz targets use it too (tests/fuzz/virtio_fuzz.h).
 *
 *   struct vbench b;
 *   vbench_open(&b, 16 << 20);
 *   const struct virtio_host host = vbench_host(&b, "rng0");
 *   virtio_rng_create(&b.d, &host, NULL);
 *   vbench_start(&b, VBENCH_FEATURES);                         reset, features, all queues, DRIVER_OK
 *   uint64_t gpa = vbench_alloc(&b, 64, 1);
 *   int id = vbench_add(&b, 0, (struct vbuf[]){ { gpa, 64, true } }, 1);
 *   vbench_kick(&b, 0);
 *   vbench_used(&b, 0, &len) == id
 *   vbench_close(&b);
 *
 * The device lock is held by the test throughout if it runs vbench_lock; vbench_open takes it and vbench_loop gives it to the loop for a while.
 */
#ifndef TRAPLINE_TESTS_VIRTIO_BENCH_H
#define TRAPLINE_TESTS_VIRTIO_BENCH_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/error.h"
#include "device/virtio/virtio.h"
#include "device/virtio/virtio_transport.h"
#include "mem/ram.h"
#include "vm/loop.h"

#define VBENCH_FEATURES UINT64_MAX /* all that the device offers */
#define VBENCH_SPLIT (~VIRTIO_BIT(VIRTIO_F_RING_PACKED)) /* all but packed rings */

enum { VDESC_NEXT = 1, VDESC_WRITE = 2, VDESC_INDIRECT = 4, VDESC_AVAIL = 1 << 7, VDESC_USED = 1 << 15 };

/* A descriptor of either format. */
struct vdesc {
	uint64_t addr;
	uint32_t len;
	uint16_t third, fourth; /* split: flags, next; packed: id, flags */
};

struct vbuf {
	uint64_t gpa;
	uint32_t len;
	bool in; /* the device writes it */
};

struct vring {
	unsigned size;
	bool packed, event_idx;
	uint64_t desc, driver, device;
	uint16_t avail, used; /* split: indices; packed: places */
	bool avail_wrap, used_wrap;
	uint16_t ndesc[VIRTIO_QUEUE_MAX]; /* of a chain by id; 0: the id (split: also its first descriptor) is free */
	bool busy[VIRTIO_QUEUE_MAX];	  /* split: descriptor in use */
};

struct vbench {
	struct guest_ram ram;
	pthread_mutex_t lock;
	struct loop *loop;
	struct virtio_device *d;
	uint64_t ram_used;
	unsigned interrupts[VIRTIO_MAX_QUEUES], config_interrupts;
	struct vring ring[VIRTIO_MAX_QUEUES];
};

static inline void vbench_on_queue(void *opaque, unsigned q)
{
	((struct vbench *)opaque)->interrupts[q]++;
}

static inline void vbench_on_config(void *opaque)
{
	((struct vbench *)opaque)->config_interrupts++;
}

static inline void vbench_fail(const char *what)
{
	fprintf(stderr, "virtio bench: %s\n", what);
	abort();
}

static inline void vbench_open(struct vbench *b, uint64_t ram_size)
{
	clock_init();
	memset(b, 0, sizeof(*b));
	pthread_mutex_init(&b->lock, NULL);
	if (ram_create(&b->ram, ram_size, NULL) || loop_create(&b->loop, &b->lock, NULL))
		vbench_fail("no memory or no event loop");
	pthread_mutex_lock(&b->lock);
}

static inline struct virtio_host vbench_host(struct vbench *b, const char *name)
{
	return (struct virtio_host){ .ram = &b->ram, .loop = b->loop, .name = name };
}

/* The device alone: what is behind it may be closed before the loop goes. */
static inline void vbench_destroy(struct vbench *b)
{
	if (b->d) {
		virtio_connect(b->d, &(struct virtio_interrupt){ 0 });
		b->d->ops->destroy(b->d);
	}
	b->d = NULL;
}

static inline void vbench_close(struct vbench *b)
{
	vbench_destroy(b);
	pthread_mutex_unlock(&b->lock);
	loop_destroy(b->loop);
	ram_destroy(&b->ram);
	pthread_mutex_destroy(&b->lock);
}

/* Guest memory that nothing else uses, zeroed; until vbench_start. */
static inline uint64_t vbench_alloc(struct vbench *b, uint64_t size, uint64_t align)
{
	uint64_t gpa = (b->ram_used + align - 1) / align * align;
	if (gpa + size > b->ram.region[0].size)
		vbench_fail("out of guest memory");
	b->ram_used = gpa + size;
	memset(ram_hva(&b->ram, gpa, size), 0, size);
	return gpa;
}

static inline void *vbench_hva(struct vbench *b, uint64_t gpa)
{
	return ram_hva(&b->ram, gpa, 1);
}

static inline struct vdesc *vbench_desc(struct vbench *b, unsigned q, unsigned i)
{
	return (struct vdesc *)vbench_hva(b, b->ring[q].desc) + i;
}

/* Words of the split rings: 0 flags, 1 index, 2.. ring. */
static inline uint16_t *vbench_avail(struct vbench *b, unsigned q)
{
	return vbench_hva(b, b->ring[q].driver);
}

static inline uint16_t *vbench_used_ring(struct vbench *b, unsigned q)
{
	return vbench_hva(b, b->ring[q].device);
}

/* Lay a queue of `size` out in fresh memory and write its registers, but do not enable it. */
static inline void vbench_queue(struct vbench *b, unsigned q, unsigned size)
{
	struct vring *r = &b->ring[q];
	memset(r, 0, sizeof(*r));
	r->size = size;
	r->packed = virtio_has(b->d, VIRTIO_F_RING_PACKED);
	r->event_idx = virtio_has(b->d, VIRTIO_F_EVENT_IDX);
	r->desc = vbench_alloc(b, 16ull * size, 16);
	r->driver = vbench_alloc(b, 6 + 2ull * size, 4);
	r->device = vbench_alloc(b, 6 + 8ull * size, 4);
	r->avail_wrap = r->used_wrap = true;
	virtq_set_size(b->d, q, (uint16_t)size);
	const uint64_t addr[] = { r->desc, r->driver, r->device };
	for (unsigned i = 0; i < 3; i++) {
		virtq_set_addr(b->d, q, (enum virtq_area)i, false, (uint32_t)addr[i]);
		virtq_set_addr(b->d, q, (enum virtq_area)i, true, (uint32_t)(addr[i] >> 32));
	}
}

/* Reset, and agree on features (those of `wanted` that are offered). True if the device took them. */
static inline bool vbench_negotiate(struct vbench *b, uint64_t wanted)
{
	const struct virtio_interrupt interrupt = { .queue = vbench_on_queue, .config = vbench_on_config, .opaque = b };
	virtio_connect(b->d, &interrupt);
	virtio_set_status(b->d, 0);
	if (virtio_get_status(b->d))
		return false; /* still resetting */
	b->ram_used = 0;
	virtio_set_status(b->d, VIRTIO_STATUS_ACKNOWLEDGE | VIRTIO_STATUS_DRIVER);
	for (unsigned word = 0; word < 2; word++)
		virtio_accept(b->d, word, virtio_offered(b->d, word) & (uint32_t)(wanted >> 32 * word));
	virtio_set_status(b->d, virtio_get_status(b->d) | VIRTIO_STATUS_FEATURES_OK);
	return virtio_get_status(b->d) & VIRTIO_STATUS_FEATURES_OK;
}

/* All of the start, with queues of at most `max` places. */
static inline void vbench_start_sized(struct vbench *b, uint64_t wanted, unsigned max)
{
	if (!vbench_negotiate(b, wanted))
		vbench_fail("the device refused its own features");
	for (unsigned q = 0; q < b->d->nqueues; q++) {
		struct virtq_regs regs;
		virtq_get_regs(b->d, q, &regs);
		vbench_queue(b, q, regs.max_size < max ? regs.max_size : max);
		virtq_enable(b->d, q);
	}
	virtio_set_status(b->d, virtio_get_status(b->d) | VIRTIO_STATUS_DRIVER_OK);
}

static inline void vbench_start(struct vbench *b, uint64_t wanted)
{
	vbench_start_sized(b, wanted, VIRTIO_QUEUE_MAX);
}

static inline int vbench_free_id(struct vring *r)
{
	for (unsigned id = 0; id < r->size; id++)
		if (!r->ndesc[id] && !r->busy[id])
			return (int)id;
	return -1;
}

static inline int vbench_add_split(struct vbench *b, unsigned q, const struct vbuf *bufs, unsigned n)
{
	struct vring *r = &b->ring[q];
	int head = -1, last = -1;
	for (unsigned i = 0; i < n; i++) {
		unsigned at = 0;
		while (at < r->size && r->busy[at])
			at++;
		if (at == r->size)
			vbench_fail("no free descriptor");
		r->busy[at] = true;
		*vbench_desc(b, q, at) = (struct vdesc){ bufs[i].gpa, bufs[i].len, bufs[i].in ? VDESC_WRITE : 0, 0 };
		if (last >= 0) {
			vbench_desc(b, q, (unsigned)last)->third |= VDESC_NEXT;
			vbench_desc(b, q, (unsigned)last)->fourth = (uint16_t)at;
		} else {
			head = (int)at;
		}
		last = (int)at;
	}
	r->ndesc[head] = (uint16_t)n;
	vbench_avail(b, q)[2 + r->avail % r->size] = (uint16_t)head;
	__atomic_store_n(&vbench_avail(b, q)[1], ++r->avail, __ATOMIC_RELEASE);
	return head;
}

static inline int vbench_add_packed(struct vbench *b, unsigned q, const struct vbuf *bufs, unsigned n)
{
	struct vring *r = &b->ring[q];
	int id = vbench_free_id(r);
	if (id < 0)
		vbench_fail("no free buffer id");
	uint16_t first = r->avail, first_flags = 0;
	for (unsigned i = 0; i < n; i++) {
		unsigned flags = (bufs[i].in ? VDESC_WRITE : 0) | (i + 1 < n ? VDESC_NEXT : 0) | (r->avail_wrap ? VDESC_AVAIL : VDESC_USED);
		struct vdesc *d = vbench_desc(b, q, r->avail);
		d->addr = bufs[i].gpa;
		d->len = bufs[i].len;
		d->third = (uint16_t)id;
		if (i)
			d->fourth = (uint16_t)flags;
		else
			first_flags = (uint16_t)flags;
		if (++r->avail == r->size) {
			r->avail = 0;
			r->avail_wrap = !r->avail_wrap;
		}
	}
	r->ndesc[id] = (uint16_t)n;
	__atomic_store_n(&vbench_desc(b, q, first)->fourth, first_flags, __ATOMIC_RELEASE);
	return id;
}

/* Make a chain available; the id that vbench_used will give back. */
static inline int vbench_add(struct vbench *b, unsigned q, const struct vbuf *bufs, unsigned n)
{
	return b->ring[q].packed ? vbench_add_packed(b, q, bufs, n) : vbench_add_split(b, q, bufs, n);
}

/* The same as an indirect table. */
static inline int vbench_add_indirect(struct vbench *b, unsigned q, const struct vbuf *bufs, unsigned n)
{
	uint64_t table = vbench_alloc(b, 16ull * n, 16);
	struct vring *r = &b->ring[q];
	for (unsigned i = 0; i < n; i++) {
		struct vdesc *d = (struct vdesc *)vbench_hva(b, table) + i;
		unsigned flags = bufs[i].in ? VDESC_WRITE : 0;
		*d = r->packed ? (struct vdesc){ bufs[i].gpa, bufs[i].len, 0, (uint16_t)flags } :
				 (struct vdesc){ bufs[i].gpa, bufs[i].len, (uint16_t)(flags | (i + 1 < n ? VDESC_NEXT : 0)), (uint16_t)(i + 1) };
	}
	/* The flag goes in before the chain is seen: nobody else runs. */
	unsigned at = r->avail;
	int id = vbench_add(b, q, &(struct vbuf){ table, 16 * n, false }, 1);
	if (r->packed)
		vbench_desc(b, q, at)->fourth |= VDESC_INDIRECT;
	else
		vbench_desc(b, q, (unsigned)id)->third |= VDESC_INDIRECT;
	return id;
}

static inline void vbench_kick(struct vbench *b, unsigned q)
{
	virtio_kick(b->d, q);
}

/* The next used chain's id, or -1. */
static inline int vbench_used(struct vbench *b, unsigned q, uint32_t *len)
{
	struct vring *r = &b->ring[q];
	int id;
	uint32_t n;
	if (r->packed) {
		struct vdesc *d = vbench_desc(b, q, r->used);
		uint16_t flags = __atomic_load_n(&d->fourth, __ATOMIC_ACQUIRE);
		if (!!(flags & VDESC_AVAIL) != r->used_wrap || !!(flags & VDESC_USED) != r->used_wrap)
			return -1;
		id = d->third;
		n = d->len;
		if (id >= (int)r->size || !r->ndesc[id])
			vbench_fail("an id was used that was not available");
		r->used = (uint16_t)(r->used + r->ndesc[id]);
		if (r->used >= r->size) {
			r->used = (uint16_t)(r->used - r->size);
			r->used_wrap = !r->used_wrap;
		}
	} else {
		uint16_t *used = vbench_used_ring(b, q);
		if (__atomic_load_n(&used[1], __ATOMIC_ACQUIRE) == r->used)
			return -1;
		uint32_t entry[2];
		memcpy(entry, used + 2 + 4 * (r->used % r->size), sizeof(entry));
		if (entry[0] >= r->size || !r->ndesc[entry[0]])
			vbench_fail("a descriptor was used that was not available");
		id = (int)entry[0];
		n = entry[1];
		r->used++;
		for (unsigned i = (unsigned)id, k = r->ndesc[id]; k; k--, i = vbench_desc(b, q, i)->fourth)
			r->busy[i] = false;
	}
	r->ndesc[id] = 0;
	if (len)
		*len = n;
	return id;
}

/* Give the loop the lock for `ms` milliseconds: timers and descriptors of backends. Stops early when `until` holds. */
struct vbench_stop {
	struct vbench *b;
	struct vtimer poll;
	bool (*until)(void *opaque);
	void *opaque;
	uint64_t deadline;
	bool hit;
};

static inline void vbench_poll(void *opaque)
{
	struct vbench_stop *s = opaque;
	s->hit = s->until && s->until(s->opaque);
	if (s->hit || clock_ns() >= s->deadline)
		loop_stop(s->b->loop);
	else
		vtimer_arm(&s->poll, clock_ns() + 1000000);
}

static inline bool vbench_loop(struct vbench *b, unsigned ms, bool (*until)(void *opaque), void *opaque)
{
	struct vbench_stop s = { .b = b, .until = until, .opaque = opaque, .deadline = clock_ns() + ms * 1000000ull };
	vtimer_init(&s.poll, b->loop, vbench_poll, &s);
	vtimer_arm(&s.poll, clock_ns());
	loop_again(b->loop);
	pthread_mutex_unlock(&b->lock);
	loop_run(b->loop);
	pthread_mutex_lock(&b->lock);
	vtimer_cancel(&s.poll);
	return s.hit;
}

#endif
