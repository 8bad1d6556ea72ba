/*
 * virtio-balloon (virtio 1.2 5.5): the guest gives memory back to the host, and takes it again.
 *
 * Two ways. The balloon: the guest is asked for memory (virtio_balloon_set_target), its driver allocates it and names the pages,
 * and they are discarded (ram_discard). Free-page reporting: the driver names free memory by itself, in large pieces, some seconds after it became free; it
 * may use it again at any time without asking. A guest that means harm names any page any number of times: it loses what it
 * had there, nothing else.
 *
 * Owner: who creates it, destroyed through its ops. Device lock held for all calls. A reset of the device deflates the balloon as
 * far as we are concerned; the target stays.
 */
#ifndef TRAPLINE_DEVICE_VIRTIO_BALLOON_H
#define TRAPLINE_DEVICE_VIRTIO_BALLOON_H

#include <stdbool.h>
#include <stdint.h>

struct error;
struct virtio_device;
struct virtio_host;

/* What the guest says about its memory (5.5.6.3), by tag; bytes, but for the counts of faults and allocations. */
enum balloon_tag {
	BALLOON_SWAP_IN,
	BALLOON_SWAP_OUT,
	BALLOON_MAJOR_FAULTS,
	BALLOON_MINOR_FAULTS,
	BALLOON_FREE,
	BALLOON_TOTAL,
	BALLOON_AVAILABLE,
	BALLOON_CACHES,
	BALLOON_HUGETLB_ALLOC,
	BALLOON_HUGETLB_FAIL,
	BALLOON_TAGS
};

struct balloon_stats {
	uint64_t actual;	/* bytes in the balloon, as the driver says */
	uint64_t target;	/* bytes it was asked to have there */
	uint64_t inflated, reported; /* bytes discarded since the device was made, each way */
	uint64_t age_ns;	/* of the values; UINT64_MAX if there are none */
	unsigned known;		/* bits by tag */
	uint64_t value[BALLOON_TAGS];
};

int virtio_balloon_create(struct virtio_device **out, const struct virtio_host *host, struct error *err);

/* Leave the guest `bytes` of the memory that it has now: the balloon is to hold the rest. More than there is deflates it. The guest
 * may take its time, or take memory back when it has none left. */
void virtio_balloon_set_target(struct virtio_device *d, uint64_t bytes);

/* What is known now. Asking makes the device ask the guest, now and once a second for a while; so ask again for fresh values. */
void virtio_balloon_stats(struct virtio_device *d, struct balloon_stats *out);

/* Have the guest name its free memory (5.5.6.6 free page hinting), without discarding it: fn(opaque, gpa, len) for each piece, then
 * once with len 0 when it has named all or was stopped by a reset. What the guest writes to after it was named is in
 * use again. -ENOTSUP if the driver cannot, -EBUSY if it is at it. */
int virtio_balloon_hint(struct virtio_device *d, void (*fn)(void *opaque, uint64_t gpa, uint64_t len), void *opaque);

#endif
