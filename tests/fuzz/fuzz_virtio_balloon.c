/* virtio-balloon under a hostile driver: any page any number of times, those of its own rings too. */
#include "device/virtio/balloon.h"
#include "virtio_fuzz.h"

static void balloon_open(struct vfuzz *f, const struct virtio_host *host)
{
	virtio_balloon_create(&f->b.d, host, NULL);
}

/* Numbers of pages: some RAM, some not; a few bytes of the input make a list with runs and repetitions. Read as statistics these are tags and
 * values, and as a hint's command the device's own if the input says so. */
static void balloon_request(struct vfuzz *f, unsigned q, uint8_t *bytes, unsigned len)
{
	(void)q;
	uint32_t pfn = vfuzz_u16(f), step = vfuzz_u8(f);
	if (step == 255)
		pfn = (uint32_t)virtio_config_read(f->b.d, 8, 4); /* free_page_hint_cmd_id */
	for (unsigned at = 0; at + 4 <= len; at += 4, pfn += step % 3 ? step % 3 - 1 : vfuzz_u8(f))
		memcpy(bytes + at, &pfn, 4);
}

static void on_hint(void *opaque, uint64_t gpa, uint64_t len)
{
	const struct vfuzz *f = opaque;
	if (len && !ram_hva(&f->b.ram, gpa, len))
		abort();
}

static void balloon_event(struct vfuzz *f)
{
	struct balloon_stats s;
	switch (vfuzz_u8(f) % 3) {
	case 0:
		virtio_balloon_set_target(f->b.d, vfuzz_u32(f));
		break;
	case 1:
		virtio_balloon_stats(f->b.d, &s);
		break;
	default:
		virtio_balloon_hint(f->b.d, on_hint, f);
		break;
	}
}

const struct vfuzz_target vfuzz_target = {
	.name = "balloon", .open = balloon_open, .request = balloon_request, .event = balloon_event
};
