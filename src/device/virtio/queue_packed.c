/* Packed virtqueues: virtio 1.2 2.8. */
#include <stdatomic.h>

#include "device/virtio/queue_internal.h"

#define PACKED_F_AVAIL (1u << 7)
#define PACKED_F_USED (1u << 15)

struct packed_desc {
	uint64_t addr;
	uint32_t len;
	uint16_t id, flags;
};

/* Driver and device event suppression structures (2.8.14), read and written as one word. */
#define EVENT_ENABLE 0u
#define EVENT_DISABLE 1u
#define EVENT_DESC 2u
#define EVENT_FLAGS(word) ((word) >> 16 & 3)
#define EVENT_OFF(word) ((word)&0x7fff)
#define EVENT_WRAP(word) ((word) >> 15 & 1)

static struct packed_desc *ring_at(const struct virtio_queue *q, unsigned i)
{
	return (struct packed_desc *)q->desc + i;
}

/* 2.8.1: the driver flips AVAIL against its wrap counter and leaves USED different. Acquire: what the flags vouch for is read after. */
static bool is_available(const struct virtio_queue *q)
{
	uint16_t flags = __atomic_load_n(&ring_at(q, q->next_avail)->flags, __ATOMIC_ACQUIRE);
	return !!(flags & PACKED_F_AVAIL) == q->avail_wrap && !!(flags & PACKED_F_USED) != q->avail_wrap;
}

/* All entries of an indirect table, in order; WRITE is the only flag there (2.8.7). */
static bool walk_indirect(struct virtq_walk *w, const struct virtq_desc *d)
{
	unsigned count;
	const uint8_t *table = virtq_walk_table(w, d, &count);
	if (!table)
		return false;
	for (unsigned i = 0; i < count; i++) {
		const struct virtq_desc e = virtq_desc_copy(table, i);
		if (e.fourth & (VIRTQ_DESC_F_INDIRECT | VIRTQ_DESC_F_NEXT)) {
			virtio_broken(w->q->dev, "queue %u: entry %u of an indirect table has flags 0x%x", w->q->index, i, e.fourth);
			return false;
		}
		if (!virtq_walk_add(w, e.addr, e.len, e.fourth & VIRTQ_DESC_F_WRITE))
			return false;
	}
	return true;
}

bool virtq_packed_pop(struct virtq_walk *w)
{
	struct virtio_queue *q = w->q;
	if (!is_available(q))
		return false;
	unsigned i = q->next_avail;
	uint16_t n = 0;
	bool wrap = q->avail_wrap;
	for (bool more = true; more;) {
		if (n == q->size) {
			virtio_broken(q->dev, "queue %u: a chain of more than the ring's %u descriptors", q->index, q->size);
			return false;
		}
		const struct virtq_desc d = virtq_desc_copy(q->desc, i);
		unsigned flags = d.fourth;
		more = flags & VIRTQ_DESC_F_NEXT;
		if (flags & VIRTQ_DESC_F_INDIRECT) {
			if (more || n) { /* 2.8.19: not in a list */
				virtio_broken(q->dev, "queue %u: descriptor %u: an indirect table in a chain", q->index, i);
				return false;
			}
			if (!walk_indirect(w, &d))
				return false;
		} else if (!virtq_walk_add(w, d.addr, d.len, flags & VIRTQ_DESC_F_WRITE)) {
			return false;
		}
		w->chain->id = d.third; /* the last one's counts (2.8.6) */
		n++;
		if (++i == q->size) {
			i = 0;
			wrap = !wrap;
		}
	}
	w->chain->ndesc = n;
	q->next_avail = (uint16_t)i;
	q->avail_wrap = wrap;
	return true;
}

void virtq_packed_unpop(struct virtio_queue *q, const struct virtio_chain *c)
{
	if (q->next_avail < c->ndesc) {
		q->next_avail = (uint16_t)(q->next_avail + q->size);
		q->avail_wrap = !q->avail_wrap;
	}
	q->next_avail = (uint16_t)(q->next_avail - c->ndesc);
}

void virtq_packed_put(struct virtio_queue *q, const struct virtio_chain *c, uint32_t written)
{
	struct packed_desc *d = ring_at(q, q->next_used);
	unsigned flags = (q->used_wrap ? PACKED_F_AVAIL | PACKED_F_USED : 0) | (written ? VIRTQ_DESC_F_WRITE : 0);
	d->id = c->id;
	d->len = written;
	if (q->put) {
		__atomic_store_n(&d->flags, (uint16_t)flags, __ATOMIC_RELEASE);
	} else {
		q->put = true;
		q->put_first = q->next_used;
		q->put_flags = (uint16_t)flags;
	}
	q->next_used = (uint16_t)(q->next_used + c->ndesc);
	if (q->next_used >= q->size) {
		q->next_used = (uint16_t)(q->next_used - q->size);
		q->used_wrap = !q->used_wrap;
	}
}

/* The driver looks at the descriptors in order: behind the first one, none counts before it. */
void virtq_packed_commit(struct virtio_queue *q)
{
	if (!q->put)
		return;
	q->put = false;
	__atomic_store_n(&ring_at(q, q->put_first)->flags, q->put_flags, __ATOMIC_RELEASE);
}

bool virtq_packed_wants_interrupt(struct virtio_queue *q)
{
	atomic_thread_fence(memory_order_seq_cst); /* as in the split format */
	uint32_t event = __atomic_load_n((uint32_t *)q->driver, __ATOMIC_ACQUIRE);
	if (EVENT_FLAGS(event) == EVENT_DISABLE)
		return false;
	if (EVENT_FLAGS(event) != EVENT_DESC || !q->event_idx || q->unsignaled >= q->size)
		return true;
	uint16_t at = EVENT_OFF(event);
	if (EVENT_WRAP(event) != q->used_wrap)
		at = (uint16_t)(at - q->size); /* of the lap before */
	return virtq_event_passed(at, q->next_used, (uint16_t)(q->next_used - q->unsignaled));
}

static void set_event(struct virtio_queue *q, uint32_t word)
{
	__atomic_store_n((uint32_t *)q->device, word, __ATOMIC_RELEASE);
}

void virtq_packed_no_notify(struct virtio_queue *q)
{
	set_event(q, EVENT_DISABLE << 16);
}

bool virtq_packed_want_notify(struct virtio_queue *q)
{
	uint32_t next = q->next_avail | (uint32_t)q->avail_wrap << 15;
	set_event(q, q->event_idx ? next | EVENT_DESC << 16 : EVENT_ENABLE << 16);
	atomic_thread_fence(memory_order_seq_cst);
	return is_available(q);
}
