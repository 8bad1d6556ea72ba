/* Split virtqueues: virtio 1.2 2.7. */
#include <stdatomic.h>

#include "device/virtio/queue_internal.h"

enum { AVAIL_F_NO_INTERRUPT = 1, USED_F_NO_NOTIFY = 1 };

struct split_avail {
	uint16_t flags, idx;
	uint16_t ring[]; /* then used_event */
};
struct split_used_elem {
	uint32_t id, len;
};
struct split_used {
	uint16_t flags, idx;
	struct split_used_elem ring[]; /* then avail_event */
};

static uint16_t load(const uint16_t *p)
{
	return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}

static void store(uint16_t *p, uint16_t value)
{
	__atomic_store_n(p, value, __ATOMIC_RELEASE);
}

static uint16_t *used_event(const struct virtio_queue *q)
{
	return &((struct split_avail *)q->driver)->ring[q->size];
}

static uint16_t *avail_event(const struct virtio_queue *q)
{
	return (uint16_t *)&((struct split_used *)q->device)->ring[q->size];
}

/* The descriptors of a table from `head` on, linked by `next`. An indirect descriptor ends the ring's own (2.7.5.3.2). */
static bool walk(struct virtq_walk *w, const uint8_t *table, unsigned count, unsigned head, bool in_indirect)
{
	struct virtio_device *dev = w->q->dev;
	for (unsigned i = head;;) {
		const struct virtq_desc d = virtq_desc_copy(table, i);
		unsigned flags = d.third, next = d.fourth;
		if (flags & VIRTQ_DESC_F_INDIRECT) {
			if (in_indirect || flags & VIRTQ_DESC_F_NEXT) {
				virtio_broken(dev, "queue %u: descriptor %u: an indirect table %s", w->q->index, i,
					      in_indirect ? "inside an indirect table" : "with a next descriptor");
				return false;
			}
			unsigned n;
			const uint8_t *indirect = virtq_walk_table(w, &d, &n);
			return indirect && walk(w, indirect, n, 0, true);
		}
		if (!virtq_walk_add(w, d.addr, d.len, flags & VIRTQ_DESC_F_WRITE))
			return false;
		if (!(flags & VIRTQ_DESC_F_NEXT))
			return true;
		if (next >= count) {
			virtio_broken(dev, "queue %u: descriptor %u: the next one is %u of %u", w->q->index, i, next, count);
			return false;
		}
		i = next;
	}
}

bool virtq_split_pop(struct virtq_walk *w)
{
	struct virtio_queue *q = w->q;
	const struct split_avail *avail = q->driver;
	if (q->avail_seen == q->next_avail) {
		uint16_t idx = load(&avail->idx);
		uint16_t n = (uint16_t)(idx - q->next_avail);
		if (!n)
			return false;
		if (n > q->size) {
			virtio_broken(q->dev, "queue %u: the available index went from %u to %u in a ring of %u", q->index, q->next_avail,
				      idx, q->size);
			return false;
		}
		q->avail_seen = idx;
	}
	uint16_t head = load(&avail->ring[q->next_avail & (q->size - 1)]);
	if (head >= q->size) {
		virtio_broken(q->dev, "queue %u: descriptor %u made available in a ring of %u", q->index, head, q->size);
		return false;
	}
	if (!walk(w, q->desc, q->size, head, false))
		return false;
	w->chain->id = head;
	w->chain->ndesc = 1;
	q->next_avail++;
	return true;
}

void virtq_split_unpop(struct virtio_queue *q, const struct virtio_chain *c)
{
	(void)c;
	q->next_avail--;
}

void virtq_split_put(struct virtio_queue *q, const struct virtio_chain *c, uint32_t written)
{
	struct split_used *used = q->device;
	used->ring[q->next_used++ & (q->size - 1)] = (struct split_used_elem){ c->id, written };
}

void virtq_split_commit(struct virtio_queue *q)
{
	store(&((struct split_used *)q->device)->idx, q->next_used);
}

bool virtq_split_wants_interrupt(struct virtio_queue *q)
{
	const struct split_avail *avail = q->driver;
	/* The driver writes its event index, then looks at our index; we the other way round. */
	atomic_thread_fence(memory_order_seq_cst);
	if (!q->event_idx)
		return !(load(&avail->flags) & AVAIL_F_NO_INTERRUPT);
	return virtq_event_passed(load(used_event(q)), q->next_used, (uint16_t)(q->next_used - q->unsignaled));
}

void virtq_split_no_notify(struct virtio_queue *q)
{
	/* With event indices there is nothing to do: the old one has been passed. */
	if (!q->event_idx)
		store(&((struct split_used *)q->device)->flags, USED_F_NO_NOTIFY);
}

bool virtq_split_want_notify(struct virtio_queue *q)
{
	if (q->event_idx)
		store(avail_event(q), q->next_avail);
	else
		store(&((struct split_used *)q->device)->flags, 0);
	atomic_thread_fence(memory_order_seq_cst);
	return load(&((struct split_avail *)q->driver)->idx) != q->next_avail;
}
