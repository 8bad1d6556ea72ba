/*
 * What the virtio queue's files share: queue.c (registers, chains, the calls of virtio.h), queue_split.c and queue_packed.c (the two ring
 * formats of virtio 1.2 2.7 and 2.8), virtio.c. Device lock held throughout.
 *
 * The ring areas lie in guest RAM; their host addresses are looked up and checked for the whole area once, when the queue is enabled, and
 * hold until it is reset: guest RAM never moves (mem/ram.h).
 */
#ifndef TRAPLINE_DEVICE_VIRTIO_QUEUE_INTERNAL_H
#define TRAPLINE_DEVICE_VIRTIO_QUEUE_INTERNAL_H

#include "base/unaligned.h"
#include "device/virtio/virtio.h"

/* A descriptor of either format is 16 bytes: address, length, then id and flags (packed) or flags and next (split). */
#define VIRTQ_DESC_SIZE 16
enum { VIRTQ_DESC_F_NEXT = 1, VIRTQ_DESC_F_WRITE = 2, VIRTQ_DESC_F_INDIRECT = 4 };

struct virtio_queue {
	struct virtio_device *dev; /* [I] */
	unsigned index;		   /* [I] */
	uint16_t max_size;	   /* [I] */
	uint16_t size;
	bool enabled, resetting;
	uint64_t desc_gpa, driver_gpa, device_gpa; /* as the driver wrote them */

	/* Set when it is enabled. */
	bool packed, event_idx, indirect;
	void *desc, *driver, *device; /* the areas, all inside guest RAM */
	uint32_t device_size;	      /* bytes of the area that we write and that is not the descriptor ring */

	uint16_t next_avail; /* split: free-running index; packed: place in the ring */
	uint16_t next_used;
	bool avail_wrap, used_wrap; /* packed: the wrap counters (2.8.1) */
	uint16_t put_first;	    /* packed: place of the first used descriptor not committed yet, and its flags; none if put is 0 */
	uint16_t put_flags;
	bool put;
	uint16_t avail_seen;	    /* split: the driver's index as last read; up to here nothing needs to be read again */

	uint32_t in_flight;  /* places in the ring that popped chains take: never more than size */
	uint32_t unsignaled; /* places pushed since the last virtq_notify */
	uint32_t generation; /* counts resets: a chain of an earlier one is stale */
	bool limited;	     /* in a kick: `budget` more chains, then `more` is set and the rest waits for the event loop */
	bool more;
	uint32_t budget;
	struct virtio_chain *free;
};

/* Walks of one chain share this: the chain being built and how many descriptors were seen. */
struct virtq_walk {
	struct virtio_queue *q;
	struct virtio_chain *chain;
	unsigned ndesc; /* with those of indirect tables and of length 0 */
};

struct virtq_desc {
	uint64_t addr;
	uint32_t len;
	uint16_t third, fourth; /* flags, next (split); id, flags (packed) */
};

/* One read of each half: what is checked is what is used, whatever the guest does meanwhile. */
static inline struct virtq_desc virtq_desc_copy(const uint8_t *table, unsigned i)
{
	const uint8_t *p = table + (size_t)i * VIRTQ_DESC_SIZE;
	uint64_t low = unaligned_load64(p), high = unaligned_load64(p + 8);
	return (struct virtq_desc){ low, (uint32_t)high, (uint16_t)(high >> 32), (uint16_t)(high >> 48) };
}

/* Append the buffer [gpa, gpa+len) to the chain. False: the ring is bad (virtio_broken was called), as in all of these. */
bool virtq_walk_add(struct virtq_walk *w, uint64_t gpa, uint32_t len, bool device_writes);
/* Host address of an indirect table with *count descriptors, or NULL. */
const uint8_t *virtq_walk_table(struct virtq_walk *w, const struct virtq_desc *d, unsigned *count);

/* 2.7.10: did `event` lie in (old, new]? All modulo 2^16. */
static inline bool virtq_event_passed(uint16_t event, uint16_t new_index, uint16_t old)
{
	return (uint16_t)(new_index - event - 1) < (uint16_t)(new_index - old);
}

/* A ring format. `pop` fills w->chain (with its id and ndesc) and moves next_avail on; false: nothing there, or the ring is bad. */
bool virtq_split_pop(struct virtq_walk *w);
void virtq_split_unpop(struct virtio_queue *q, const struct virtio_chain *c);
/* Write used entries: all that were put since the last commit become visible together. */
void virtq_split_put(struct virtio_queue *q, const struct virtio_chain *c, uint32_t written);
void virtq_split_commit(struct virtio_queue *q);
bool virtq_split_wants_interrupt(struct virtio_queue *q);
void virtq_split_no_notify(struct virtio_queue *q);
bool virtq_split_want_notify(struct virtio_queue *q);

bool virtq_packed_pop(struct virtq_walk *w);
void virtq_packed_unpop(struct virtio_queue *q, const struct virtio_chain *c);
void virtq_packed_put(struct virtio_queue *q, const struct virtio_chain *c, uint32_t written);
void virtq_packed_commit(struct virtio_queue *q);
bool virtq_packed_wants_interrupt(struct virtio_queue *q);
void virtq_packed_no_notify(struct virtio_queue *q);
bool virtq_packed_want_notify(struct virtio_queue *q);

/* Of virtio_init, virtio_fini and a device reset. */
void virtq_init(struct virtio_queue *q, struct virtio_device *d, unsigned index, uint16_t max_size);
void virtq_fini(struct virtio_queue *q);
/* Back to power-on registers; chains that are out become stale. */
void virtq_clear(struct virtio_queue *q);

#endif
