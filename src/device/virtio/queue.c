/* Virtqueues, whatever their format (virtio 1.2 2.6): registers, chains, and the calls of virtio.h. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "device/virtio/queue_internal.h"
#include "device/virtio/virtio_transport.h"
#include "mem/ram.h"

#define CHAIN_ROOM 8		     /* iovecs of a fresh chain; doubled when a longer one comes by */
#define CHAIN_BYTES_MAX (1ull << 32) /* 2.7.4.1 */

/* --- registers --- */

void virtq_init(struct virtio_queue *q, struct virtio_device *d, unsigned index, uint16_t max_size)
{
	*q = (struct virtio_queue){ .dev = d, .index = index, .max_size = max_size };
	virtq_clear(q);
}

void virtq_clear(struct virtio_queue *q)
{
	struct virtio_queue fresh = { .dev = q->dev,
				      .index = q->index,
				      .max_size = q->max_size,
				      .size = q->max_size,
				      .avail_wrap = true,
				      .used_wrap = true,
				      .generation = q->generation + 1,
				      .free = q->free };
	*q = fresh;
}

static void free_chain(struct virtio_chain *c)
{
	free((void *)c->iov);
	free((void *)c->gpa);
	free(c);
}

void virtq_fini(struct virtio_queue *q)
{
	while (q->free) {
		struct virtio_chain *c = q->free;
		q->free = c->next;
		free_chain(c);
	}
}

struct virtio_queue *virtio_queue(struct virtio_device *d, unsigned q)
{
	return &d->queue[q];
}

void virtq_get_regs(const struct virtio_device *d, unsigned q, struct virtq_regs *out)
{
	*out = (struct virtq_regs){ 0 };
	if (q >= d->nqueues)
		return; /* size 0: there is no such queue */
	const struct virtio_queue *queue = &d->queue[q];
	*out = (struct virtq_regs){ .size = queue->size,
				    .max_size = queue->max_size,
				    .enabled = queue->enabled,
				    .resetting = queue->resetting,
				    .desc = queue->desc_gpa,
				    .driver = queue->driver_gpa,
				    .device = queue->device_gpa };
}

/* The queue, if its registers may be written now. */
static struct virtio_queue *writable(struct virtio_device *d, unsigned q)
{
	struct virtio_queue *queue = q < d->nqueues ? &d->queue[q] : NULL;
	return queue && !queue->enabled && !queue->resetting && !d->resetting ? queue : NULL;
}

void virtq_set_size(struct virtio_device *d, unsigned q, uint16_t size)
{
	struct virtio_queue *queue = writable(d, q);
	if (queue)
		queue->size = size; /* checked when it is enabled */
}

void virtq_set_addr(struct virtio_device *d, unsigned q, enum virtq_area area, bool high_half, uint32_t value)
{
	struct virtio_queue *queue = writable(d, q);
	if (!queue)
		return;
	uint64_t *gpa = area == VIRTQ_DESC ? &queue->desc_gpa : area == VIRTQ_DRIVER ? &queue->driver_gpa : &queue->device_gpa;
	*gpa = high_half ? (uint32_t)*gpa | (uint64_t)value << 32 : (*gpa & ~0xffffffffull) | value;
}

/* One area of the ring: aligned and in RAM as a whole. */
static void *map_area(struct virtio_queue *q, const char *what, uint64_t gpa, uint64_t size, unsigned align)
{
	void *hva = gpa % align ? NULL : ram_hva(q->dev->ram, gpa, size);
	if (!hva)
		virtio_broken(q->dev, "queue %u: the %s area at 0x%llx (%llu bytes) is %s", q->index, what, (unsigned long long)gpa,
			      (unsigned long long)size, gpa % align ? "misaligned" : "not in RAM");
	return hva;
}

void virtq_enable(struct virtio_device *d, unsigned q)
{
	struct virtio_queue *queue = writable(d, q);
	if (!queue || d->status & VIRTIO_STATUS_NEEDS_RESET)
		return;
	if (!(d->status & VIRTIO_STATUS_FEATURES_OK)) { /* 3.1.1: step 7 comes after step 5 */
		virtio_broken(d, "queue %u enabled before the features were agreed on", q);
		return;
	}
	unsigned size = queue->size;
	queue->packed = virtio_has(d, VIRTIO_F_RING_PACKED);
	queue->event_idx = virtio_has(d, VIRTIO_F_EVENT_IDX);
	queue->indirect = virtio_has(d, VIRTIO_F_INDIRECT_DESC);
	if (!size || size > queue->max_size || (!queue->packed && size & (size - 1))) {
		virtio_broken(d, "queue %u: a size of %u is not possible; at most %u%s", q, size, queue->max_size,
			      queue->packed ? "" : ", a power of two");
		return;
	}
	uint64_t event = queue->event_idx ? 2 : 0;
	uint64_t driver_size = queue->packed ? 4 : 4 + 2ull * size + event;
	uint64_t device_size = queue->packed ? 4 : 4 + 8ull * size + event;
	queue->desc = map_area(queue, "descriptor", queue->desc_gpa, (uint64_t)VIRTQ_DESC_SIZE * size, 16);
	queue->driver = queue->desc ? map_area(queue, "driver", queue->driver_gpa, driver_size, queue->packed ? 4 : 2) : NULL;
	queue->device = queue->driver ? map_area(queue, "device", queue->device_gpa, device_size, 4) : NULL;
	queue->device_size = (uint32_t)device_size;
	queue->enabled = queue->device;
}

void virtq_reset(struct virtio_device *d, unsigned q)
{
	struct virtio_queue *queue = q < d->nqueues ? &d->queue[q] : NULL;
	if (!queue || !queue->enabled || d->resetting)
		return;
	virtq_clear(queue);
	queue->resetting = true;
	if (!d->ops->queue_reset || d->ops->queue_reset(d, q))
		virtio_queue_reset_done(d, q);
}

void virtio_queue_reset_done(struct virtio_device *d, unsigned q)
{
	d->queue[q].resetting = false;
}

/* --- chains --- */

static struct virtio_chain *take_chain(struct virtio_queue *q)
{
	struct virtio_chain *c = q->free;
	if (c) {
		q->free = c->next;
	} else {
		c = calloc(1, sizeof(*c));
		if (!c)
			return NULL;
		c->queue = q;
	}
	c->nout = c->nin = 0;
	c->out_len = c->in_len = 0;
	c->opaque = NULL;
	c->next = NULL;
	c->generation = q->generation;
	return c;
}

static void give_chain(struct virtio_chain *c)
{
	struct virtio_queue *q = c->queue;
	c->next = q->free;
	q->free = c;
}

static bool grow_chain(struct virtio_chain *c)
{
	unsigned room = c->room ? 2 * c->room : CHAIN_ROOM;
	struct iovec *iov = realloc((void *)c->iov, room * sizeof(*iov));
	if (iov)
		c->iov = iov;
	uint64_t *gpa = realloc((void *)c->gpa, room * sizeof(*gpa));
	if (gpa)
		c->gpa = gpa;
	if (iov && gpa)
		c->room = room;
	return iov && gpa;
}

bool virtq_walk_add(struct virtq_walk *w, uint64_t gpa, uint32_t len, bool device_writes)
{
	struct virtio_queue *q = w->q;
	struct virtio_chain *c = w->chain;
	/* 2.7.5.3.1: no chain is longer than the queue. Against what we offered: a driver that took a smaller ring has our limits too. This also
	 * ends loops. */
	if (w->ndesc++ == q->max_size) {
		virtio_broken(q->dev, "queue %u: a chain of more than %u descriptors, or a loop", q->index, q->max_size);
		return false;
	}
	if (!device_writes && c->nin) {
		virtio_broken(q->dev, "queue %u: a device-readable buffer after a device-writable one", q->index);
		return false;
	}
	if (!len)
		return true;
	void *hva = ram_hva(q->dev->ram, gpa, len);
	if (!hva) {
		virtio_broken(q->dev, "queue %u: a buffer at 0x%llx (%u bytes) is not in RAM", q->index, (unsigned long long)gpa, len);
		return false;
	}
	if (c->out_len + c->in_len + len > CHAIN_BYTES_MAX) {
		virtio_broken(q->dev, "queue %u: a chain of more than 2^32 bytes", q->index);
		return false;
	}
	unsigned n = c->nout + c->nin;
	if (n == c->room && !grow_chain(c)) {
		virtio_broken(q->dev, "queue %u: no memory for a chain of %u buffers", q->index, n + 1);
		return false;
	}
	((struct iovec *)c->iov)[n] = (struct iovec){ .iov_base = hva, .iov_len = len };
	((uint64_t *)c->gpa)[n] = gpa;
	if (device_writes) {
		c->nin++;
		c->in_len += len;
	} else {
		c->nout++;
		c->out_len += len;
	}
	return true;
}

const uint8_t *virtq_walk_table(struct virtq_walk *w, const struct virtq_desc *d, unsigned *count)
{
	struct virtio_queue *q = w->q;
	const char *wrong = NULL;
	const uint8_t *table = NULL;
	if (!q->indirect)
		wrong = "was not agreed on";
	else if (!d->len || d->len % VIRTQ_DESC_SIZE)
		wrong = "has no whole number of descriptors";
	else if (d->len / VIRTQ_DESC_SIZE > q->max_size)
		wrong = "is longer than the queue";
	else if (!(table = ram_hva(q->dev->ram, d->addr, d->len)))
		wrong = "is not in RAM";
	if (wrong) {
		virtio_broken(q->dev, "queue %u: an indirect table at 0x%llx (%u bytes) %s", q->index, (unsigned long long)d->addr, d->len, wrong);
		return NULL;
	}
	*count = d->len / VIRTQ_DESC_SIZE;
	return table;
}

/* --- what devices call --- */

bool virtq_ready(const struct virtio_queue *q)
{
	return q->enabled && virtio_is_live(q->dev);
}

/* A guest that refills as fast as we empty must not keep the device lock for ever. */
static bool is_over_budget(struct virtio_queue *q)
{
	if (!q->limited || q->budget)
		return false;
	q->more = true;
	return true;
}

struct virtio_chain *virtq_pop(struct virtio_queue *q)
{
	if (!virtq_ready(q) || is_over_budget(q))
		return NULL;
	struct virtq_walk w = { .q = q, .chain = take_chain(q) };
	if (!w.chain) {
		virtio_broken(q->dev, "queue %u: no memory for a chain", q->index);
		return NULL;
	}
	if (!(q->packed ? virtq_packed_pop(&w) : virtq_split_pop(&w))) {
		give_chain(w.chain);
		return NULL;
	}
	/* A place is free again when we have used it: more chains than places are a driver's lie. */
	q->in_flight += w.chain->ndesc;
	if (q->in_flight > q->size) {
		virtio_broken(q->dev, "queue %u: more buffers are made available than its %u places hold", q->index, q->size);
		q->in_flight -= w.chain->ndesc;
		give_chain(w.chain);
		return NULL;
	}
	q->budget -= q->limited;
	return w.chain;
}

/* Not of before a reset. */
static bool is_current(const struct virtio_chain *c)
{
	return c->generation == c->queue->generation;
}

/* Used, but not yet seen by the driver. */
static void put(struct virtio_queue *q, struct virtio_chain *c, uint64_t written)
{
	if (written > c->in_len)
		written = c->in_len;
	uint64_t left = written;
	for (unsigned i = c->nout; left; i++) {
		uint64_t n = c->iov[i].iov_len < left ? c->iov[i].iov_len : left;
		ram_written(q->dev->ram, c->gpa[i], n);
		left -= n;
	}
	if (is_current(c)) {
		q->in_flight -= c->ndesc;
		if (virtq_ready(q)) {
			uint32_t len = written > UINT32_MAX ? UINT32_MAX : (uint32_t)written;
			if (q->packed)
				virtq_packed_put(q, c, len);
			else
				virtq_split_put(q, c, len);
			q->unsignaled += c->ndesc;
		}
	}
	give_chain(c);
}

void virtq_push_all(struct virtio_queue *q, struct virtio_chain *const *c, const uint64_t *written, unsigned n)
{
	for (unsigned i = 0; i < n; i++)
		put(q, c[i], written[i]);
	if (!virtq_ready(q))
		return;
	if (q->packed)
		virtq_packed_commit(q);
	else
		virtq_split_commit(q);
}

void virtq_push(struct virtio_queue *q, struct virtio_chain *c, uint64_t written)
{
	virtq_push_all(q, &c, &written, 1);
}

void virtq_unpop(struct virtio_queue *q, struct virtio_chain *c)
{
	if (is_current(c)) {
		q->in_flight -= c->ndesc;
		if (q->packed)
			virtq_packed_unpop(q, c);
		else
			virtq_split_unpop(q, c);
	}
	give_chain(c);
}

void virtq_drop(struct virtio_chain *c)
{
	/* A request that was in flight may have written to all of it. */
	for (unsigned i = c->nout; i < c->nout + c->nin; i++)
		ram_written(c->queue->dev->ram, c->gpa[i], c->iov[i].iov_len);
	if (is_current(c))
		c->queue->in_flight -= c->ndesc;
	give_chain(c);
}

void virtq_notify(struct virtio_queue *q)
{
	struct virtio_device *d = q->dev;
	if (!q->unsignaled || !virtq_ready(q))
		return;
	/* Rings hold no code; the watcher is told once a batch. */
	if (q->packed)
		ram_written(d->ram, q->desc_gpa, (uint64_t)VIRTQ_DESC_SIZE * q->size);
	ram_written(d->ram, q->device_gpa, q->device_size);
	bool wanted = q->unsignaled > UINT16_MAX || (q->packed ? virtq_packed_wants_interrupt(q) : virtq_split_wants_interrupt(q));
	q->unsignaled = 0;
	if (!wanted || !d->interrupt.queue)
		return;
	d->interrupts++;
	d->interrupt.queue(d->interrupt.opaque, q->index);
}

void virtq_no_notify(struct virtio_queue *q)
{
	if (!virtq_ready(q))
		return;
	if (q->packed)
		virtq_packed_no_notify(q);
	else
		virtq_split_no_notify(q);
}

bool virtq_want_notify(struct virtio_queue *q)
{
	if (!virtq_ready(q) || is_over_budget(q))
		return false;
	return q->packed ? virtq_packed_want_notify(q) : virtq_split_want_notify(q);
}

/* --- iovecs --- */

/* Copy between `flat` and the iovecs from byte `skip` on. */
static size_t copy(const struct iovec *iov, unsigned n, size_t skip, void *flat, size_t len, bool to_iov)
{
	size_t done = 0;
	for (unsigned i = 0; i < n && done < len; i++) {
		if (skip >= iov[i].iov_len) {
			skip -= iov[i].iov_len;
			continue;
		}
		size_t part = iov[i].iov_len - skip;
		if (part > len - done)
			part = len - done;
		uint8_t *at = (uint8_t *)iov[i].iov_base + skip;
		if (to_iov)
			memcpy(at, (uint8_t *)flat + done, part);
		else
			memcpy((uint8_t *)flat + done, at, part);
		done += part;
		skip = 0;
	}
	return done;
}

size_t virtio_chain_read(const struct virtio_chain *c, size_t skip, void *dst, size_t len)
{
	return copy(c->iov, c->nout, skip, dst, len, false);
}

size_t virtio_chain_write(const struct virtio_chain *c, size_t skip, const void *src, size_t len)
{
	return c->nin ? copy(c->iov + c->nout, c->nin, skip, (void *)src, len, true) : 0; /* a fresh chain of empty parts has no iov */
}

int iov_slice(const struct iovec *iov, unsigned n, size_t skip, size_t len, struct iovec *out, unsigned room)
{
	unsigned used = 0;
	for (unsigned i = 0; i < n && len; i++) {
		if (skip >= iov[i].iov_len) {
			skip -= iov[i].iov_len;
			continue;
		}
		if (used == room)
			return -E2BIG;
		size_t part = iov[i].iov_len - skip;
		if (part > len)
			part = len;
		out[used++] = (struct iovec){ .iov_base = (uint8_t *)iov[i].iov_base + skip, .iov_len = part };
		len -= part;
		skip = 0;
	}
	return (int)used;
}
