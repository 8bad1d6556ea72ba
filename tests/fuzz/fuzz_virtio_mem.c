/* virtio-mem under a hostile driver: it never has more than was asked for, and what it has not is no RAM. */
#include "device/virtio/mem.h"
#include "virtio_fuzz.h"

#define BLOCKS 70 /* more than a word of the bitmap */

static void mem_open(struct vfuzz *f, const struct virtio_host *host)
{
	uint64_t size = f->b.ram.size;
	ram_destroy(&f->b.ram);
	struct error err;
	if (ram_create_room(&f->b.ram, size, BLOCKS * RAM_BLOCK_SIZE, &err) || virtio_mem_create(&f->b.d, host, &err) ||
	    virtio_mem_set_requested(f->b.d, BLOCKS / 2 * RAM_BLOCK_SIZE, &err))
		abort();
}

static void mem_request(struct vfuzz *f, unsigned q, uint8_t *bytes, unsigned len)
{
	(void)q;
	uint8_t request[24] = { vfuzz_u8(f) % 5 };
	uint64_t gpa = f->b.ram.room.gpa + vfuzz_u8(f) % (BLOCKS + 2) * RAM_BLOCK_SIZE;
	if (vfuzz_u8(f) > 250)
		gpa = vfuzz_u64(f);
	memcpy(request + 8, &gpa, 8);
	request[16] = vfuzz_u8(f) % 16;
	memcpy(bytes, request, len < sizeof(request) ? len : sizeof(request));
}

static void check(struct vfuzz *f)
{
	struct virtio_mem_state s;
	virtio_mem_state(f->b.d, &s);
	const struct ram_room *room = &f->b.ram.room;
	uint64_t sum = 0;
	for (uint64_t at = 0; at < room->size; at += RAM_BLOCK_SIZE)
		sum += ram_hva(&f->b.ram, room->gpa + at, RAM_BLOCK_SIZE) ? RAM_BLOCK_SIZE : 0;
	if (sum != s.plugged || sum != room->bytes)
		abort();
}

static void mem_event(struct vfuzz *f)
{
	check(f);
	struct virtio_mem_state before, s;
	struct error err;
	virtio_mem_state(f->b.d, &before);
	if (virtio_mem_set_requested(f->b.d, vfuzz_u8(f) * RAM_BLOCK_SIZE, &err))
		return;
	virtio_mem_state(f->b.d, &s);
	if (s.requested > s.size || s.plugged != before.plugged)
		abort();
}

const struct vfuzz_target vfuzz_target = {
	.name = "mem", .open = mem_open, .request = mem_request, .event = mem_event, .close = NULL,
	.features = VIRTIO_BIT(1), /* UNPLUGGED_INACCESSIBLE: refused without */
};
