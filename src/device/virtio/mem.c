#include "device/virtio/mem.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "base/error.h"
#include "base/unaligned.h"
#include "device/virtio/virtio.h"
#include "mem/ram.h"

enum { F_ACPI_PXM = 0, F_UNPLUGGED_INACCESSIBLE = 1 }; /* 5.15.3 */

/* 5.15.6. A request: le16 type, 6 bytes of nothing, le64 address, le16 number of blocks, 6 bytes. */
enum { REQ_PLUG = 0, REQ_UNPLUG = 1, REQ_UNPLUG_ALL = 2, REQ_STATE = 3 };
enum { REQ_ADDR = 8, REQ_BLOCKS = 16, REQ_SIZE = 24 };
/* The answer: le16 type, 6 bytes of nothing, le16 state. */
enum { RESP_ACK = 0, RESP_NACK = 1, RESP_BUSY = 2, RESP_ERROR = 3 };
enum { STATE_PLUGGED = 0, STATE_UNPLUGGED = 1, STATE_MIXED = 2 };
enum { RESP_STATE = 8, RESP_SIZE = 10 };

#define QUEUE_SIZE 64

struct config {
	uint64_t block_size;
	uint16_t node_id;
	uint8_t unused[6];
	uint64_t addr, region_size, usable_region_size, plugged_size, requested_size;
};

struct mem {
	struct virtio_device d; /* first */
	struct config config;
};

static struct mem *of(struct virtio_device *d)
{
	return (struct mem *)d;
}

static uint16_t plug(struct mem *m, uint64_t gpa, uint64_t len)
{
	if (ram_plugged(m->d.ram, gpa, len))
		return RESP_ERROR; /* not all unplugged */
	if (len > m->config.requested_size || m->config.plugged_size > m->config.requested_size - len)
		return RESP_NACK;
	return ram_plug(m->d.ram, gpa, len) ? RESP_BUSY : RESP_ACK;
}

static uint16_t unplug(struct mem *m, uint64_t gpa, uint64_t len)
{
	if (ram_plugged(m->d.ram, gpa, len) != len)
		return RESP_ERROR;
	return ram_unplug(m->d.ram, gpa, len) ? RESP_BUSY : RESP_ACK;
}

static uint16_t handle(struct mem *m, const struct virtio_chain *c, uint16_t *state)
{
	uint8_t req[REQ_SIZE] = { 0 };
	if (virtio_chain_read(c, 0, req, sizeof(req)) < sizeof(req))
		return RESP_ERROR;
	uint16_t type = unaligned_load16(req);
	uint64_t gpa = unaligned_load64(req + REQ_ADDR), len = unaligned_load16(req + REQ_BLOCKS) * RAM_BLOCK_SIZE;
	if (type == REQ_UNPLUG_ALL)
		return ram_unplug(m->d.ram, m->config.addr, m->config.region_size) ? RESP_BUSY : RESP_ACK;
	uint64_t offset = gpa - m->config.addr;
	if (!len || offset % RAM_BLOCK_SIZE || offset >= m->config.usable_region_size || len > m->config.usable_region_size - offset)
		return RESP_ERROR;
	switch (type) {
	case REQ_PLUG:
		return plug(m, gpa, len);
	case REQ_UNPLUG:
		return unplug(m, gpa, len);
	case REQ_STATE: {
		uint64_t plugged = ram_plugged(m->d.ram, gpa, len);
		*state = plugged == len ? STATE_PLUGGED : plugged ? STATE_MIXED : STATE_UNPLUGGED;
		return RESP_ACK;
	}
	default:
		return RESP_ERROR;
	}
}

static void mem_notify(struct virtio_device *d, unsigned q)
{
	struct mem *m = of(d);
	struct virtio_queue *queue = virtio_queue(d, q);
	do {
		virtq_no_notify(queue);
		for (struct virtio_chain *c; (c = virtq_pop(queue));) {
			uint8_t resp[RESP_SIZE] = { 0 };
			uint16_t state = 0;
			resp[0] = (uint8_t)handle(m, c, &state);
			resp[RESP_STATE] = (uint8_t)state;
			m->config.plugged_size = atomic_load(&d->ram->room.bytes);
			virtq_push(queue, c, virtio_chain_write(c, 0, resp, sizeof(resp)));
		}
		virtq_notify(queue);
	} while (virtq_want_notify(queue));
}

/* Unplugged blocks cannot be read here, which drivers without the feature may do (5.15.3.1). */
static int mem_features(struct virtio_device *d)
{
	return virtio_has(d, F_UNPLUGGED_INACCESSIBLE) ? 0 : -EINVAL;
}

static void mem_stats(struct virtio_device *d, char *text, size_t room)
{
	const struct config *c = &of(d)->config;
	snprintf(text, room, "size %" PRIu64 "\nrequested %" PRIu64 "\nplugged %" PRIu64 "\n", c->region_size, c->requested_size, c->plugged_size);
}

static void mem_destroy(struct virtio_device *d)
{
	virtio_fini(d);
	free(d); /* its first member */
}

static const struct virtio_ops mem_ops = {
	.name = "virtio-mem",
	.id = VIRTIO_ID_MEM,
	.budget = 16,
	.in_order = true,
	.features = mem_features,
	.notify = mem_notify,
	.destroy = mem_destroy,
	.stats = mem_stats,
};

int virtio_mem_set_requested(struct virtio_device *d, uint64_t bytes, struct error *err)
{
	struct mem *m = of(d);
	if (bytes > m->config.region_size || bytes % RAM_BLOCK_SIZE)
		return error_set(err, EINVAL, "%llu MiB of added memory are not possible; give up to %llu MiB in steps of %llu",
				 (unsigned long long)(bytes >> 20), (unsigned long long)(m->config.region_size >> 20), RAM_BLOCK_SIZE >> 20);
	m->config.requested_size = bytes;
	virtio_config_changed(d);
	return 0;
}

void virtio_mem_state(const struct virtio_device *d, struct virtio_mem_state *out)
{
	const struct config *c = &((const struct mem *)d)->config;
	*out = (struct virtio_mem_state){ .size = c->region_size, .requested = c->requested_size, .plugged = c->plugged_size };
}

int virtio_mem_create(struct virtio_device **out, const struct virtio_host *host, struct error *err)
{
	static const uint16_t sizes[] = { QUEUE_SIZE };
	const struct ram_room *room = &host->ram->room;
	if (!room->size)
		return error_set(err, EINVAL, "%s: there is no room for more memory; give --memory SIZE,max=SIZE", host->name);
	struct mem *m = calloc(1, sizeof(*m));
	if (!m)
		return error_set(err, ENOMEM, "%s: out of memory", host->name);
	m->config = (struct config){
		.block_size = RAM_BLOCK_SIZE,
		.addr = room->gpa,
		.region_size = room->size,
		.usable_region_size = room->size,
		.plugged_size = atomic_load(&room->bytes),
	};
	int r = virtio_init(&m->d, &mem_ops, host, VIRTIO_BIT(F_UNPLUGGED_INACCESSIBLE), &m->config, sizeof(m->config), 1, sizes, err);
	if (r) {
		free(m);
		return r;
	}
	*out = &m->d;
	return 0;
}
