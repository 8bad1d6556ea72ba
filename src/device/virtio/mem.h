/*
 * virtio-mem (virtio 1.2 5.15): memory that is added to a running guest, and taken away again, in blocks of RAM_BLOCK_SIZE.
 *
 * The blocks are those of the room above RAM (struct ram_room), so there is one such device in a machine at most. We say how much the guest should have
 * there (virtio_mem_set_requested); its driver plugs and unplugs blocks until it has. An unplugged block is no RAM: a driver that
 * does not promise to keep its hands off (UNPLUGGED_INACCESSIBLE) is refused. A guest never has more than was requested, but for
 * what it has not yet given back after the request became smaller.
 *
 * Linux needs no SRAT to use it. One that named the room would make it set 64 MiB aside for bounce buffers, for devices that do not
 * reach above 4 GiB: here are none.
 *
 * Owner: who creates it, destroyed through its ops. Device lock held for all calls. Blocks stay plugged when the device is reset, as the
 * specification has it; a reboot makes RAM anew.
 */
#ifndef TRAPLINE_DEVICE_VIRTIO_MEM_H
#define TRAPLINE_DEVICE_VIRTIO_MEM_H

#include <stdint.h>

struct error;
struct virtio_device;
struct virtio_host;

/* -EINVAL if there is no room. Nothing is requested yet. */
int virtio_mem_create(struct virtio_device **out, const struct virtio_host *host, struct error *err);

/* Ask the guest to have `bytes` there: whole blocks, at most the room. 0 or -EINVAL with a sentence. */
int virtio_mem_set_requested(struct virtio_device *d, uint64_t bytes, struct error *err);

struct virtio_mem_state {
	uint64_t size, requested, plugged; /* bytes: of the room, asked for, there */
};
void virtio_mem_state(const struct virtio_device *d, struct virtio_mem_state *out);

#endif
