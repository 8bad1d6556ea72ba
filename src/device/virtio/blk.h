/*
 * virtio-blk (virtio 1.2 5.2): a disk in front of a struct block.
 *
 * Data goes straight between guest memory and the block layer; the header is copied once and the copy checked. All that one
 * notification brings is submitted together, and what is complete by then is answered with one interrupt at most. A reset
 * waits for the requests in flight: their buffers are the guest's memory. The backend outlives the device. Device lock held
 * throughout, as in virtio.h.
 */
#ifndef TRAPLINE_DEVICE_VIRTIO_BLK_H
#define TRAPLINE_DEVICE_VIRTIO_BLK_H

#include <stdbool.h>
#include <stdint.h>

struct block;
struct error;
struct keyval;
struct virtio_device;
struct virtio_host;

#define VIRTIO_BLK_MAX_QUEUES 8
#define VIRTIO_BLK_SERIAL 20 /* bytes of a serial number */

struct virtio_blk_config {
	struct block *block; /* the caller's; not in --disk's value */
	char serial[VIRTIO_BLK_SERIAL + 1]; /* empty: the device's name */
	unsigned queues;     /* 1..VIRTIO_BLK_MAX_QUEUES; 0: the caller puts the number of vCPUs, cut to that */
	unsigned queue_size; /* a power of two */
	uint32_t logical_block, physical_block; /* bytes; 0: what the backend says */
};

/* The device's keys of a --disk value: serial=, queues=, queue-size=, block-size=, physical-block-size=. 0 or -EINVAL/-ERANGE. */
int virtio_blk_parse(struct virtio_blk_config *c, struct keyval *kv, struct error *err);

int virtio_blk_create(struct virtio_device **out, const struct virtio_blk_config *c, const struct virtio_host *host, struct error *err);

#endif
