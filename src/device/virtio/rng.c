#include "device/virtio/rng.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/random.h>

#include "base/error.h"
#include "device/virtio/virtio.h"

struct rng {
	struct virtio_device d;
};

static void rng_notify(struct virtio_device *d, unsigned q)
{
	struct virtio_queue *queue = virtio_queue(d, q);
	do {
		virtq_no_notify(queue);
		struct virtio_chain *c;
		while ((c = virtq_pop(queue))) {
			uint8_t bytes[RNG_BYTES_MAX];
			size_t want = c->in_len < sizeof(bytes) ? c->in_len : sizeof(bytes);
			ssize_t got = getrandom(bytes, want, 0);
			virtq_push(queue, c, got > 0 ? virtio_chain_write(c, 0, bytes, (size_t)got) : 0);
		}
		virtq_notify(queue);
	} while (virtq_want_notify(queue));
}

static void rng_destroy(struct virtio_device *d)
{
	virtio_fini(d);
	free(d); /* its first member */
}

static const struct virtio_ops rng_ops = {
	.name = "virtio-rng", .id = VIRTIO_ID_RNG, .in_order = true, .notify = rng_notify, .destroy = rng_destroy
};

int virtio_rng_create(struct virtio_device **out, const struct virtio_host *host, struct error *err)
{
	static const uint16_t sizes[] = { 64 };
	struct rng *rng = calloc(1, sizeof(*rng));
	if (!rng)
		return error_set(err, ENOMEM, "%s: out of memory", host->name);
	int r = virtio_init(&rng->d, &rng_ops, host, 0, NULL, 0, 1, sizes, err);
	if (r) {
		free(rng);
		return r;
	}
	*out = &rng->d;
	return 0;
}
