/*
 * A shadow virtqueue: what a back end outside this process (vhost-user, vhost) sees instead of the guest's ring.
 *
 * The guest's ring is walked by queue.c alone. Each chain that it gives is posted, buffer addresses unchanged, to a split ring of our own that
 * lies in memory shared with the back end; what the back end uses goes back through virtq_push. So the back end writes the guest's buffers
 * itself (no copy), while the guest's ring is checked by our one walker whatever its format, and the RAM watcher learns of every write
 * before the guest can see that it is done: translated code on a page that a back end wrote must not run on.
 *
 * The back end is not trusted: of the shared memory only the used ring is read, each entry once, and its index, ids and lengths are checked
 * against what is outstanding. Which descriptors are linked is kept in private memory.
 *
 * Device lock held throughout. The shadow belongs to its device; so does the shared memory, which is zero-filled.
 */
#ifndef TRAPLINE_DEVICE_VIRTIO_SHADOW_H
#define TRAPLINE_DEVICE_VIRTIO_SHADOW_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct guest_ram;
struct virtio_chain;
struct virtio_queue;

struct shadow_used_elem {
	uint32_t id, len;
};

struct shadow {
	struct virtio_queue *queue; /* the guest's */
	struct guest_ram *ram;	    /* whose watcher is told */
	uint16_t size;		    /* descriptors, a power of two; at least as many as a chain of the queue can have */
	/* Shared with the back end; virtio 1.2 2.7.5, 2.7.6, 2.7.8. Host addresses. */
	void *desc, *avail, *used;
	/* Private. */
	uint16_t avail_idx, used_idx;
	uint16_t free_head, nfree;
	unsigned outstanding;	     /* chains */
	bool full;		     /* a chain waits in the guest's ring for descriptors */
	uint16_t *next;		     /* of each descriptor: the next of its chain, or of the free list */
	struct virtio_chain **chain; /* by first descriptor; NULL: none starts here */
};

/* Bytes of shared memory for a ring of `size`: a multiple of 4096. */
size_t shadow_bytes(uint16_t size);
/* `memory`: shadow_bytes(size) of it, page-aligned. 0 or -ENOMEM. */
int shadow_init(struct shadow *s, struct virtio_queue *queue, struct guest_ram *ram, void *memory, uint16_t size);
void shadow_fini(struct shadow *s); /* without outstanding chains, or with stale ones: it drops them */

/* Post what the guest made available. Returns true if the back end is to be kicked. */
bool shadow_forward(struct shadow *s);
/* Take back what the back end used, and interrupt the guest. NULL, or what is wrong with the back end's ring (a phrase): then nothing
 * of it can be believed any more. */
const char *shadow_return(struct shadow *s);

/* The ring from its start, with everything outstanding posted again: for a back end that knows nothing of it. True: kick it. Forward
 * next: what waited in the guest's ring because the shadow was full still does. */
bool shadow_restart(struct shadow *s);
/* Forget what is outstanding: in a reset. */
void shadow_drop(struct shadow *s);
/* Answer each outstanding chain with what `fail` wrote into it (its return value: bytes), for a back end that is gone for good. */
void shadow_fail(struct shadow *s, uint64_t (*fail)(struct virtio_chain *c));

#endif
