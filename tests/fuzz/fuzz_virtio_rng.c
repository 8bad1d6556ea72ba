/* virtio-rng under a hostile driver: also the target that walks the rings themselves most directly. */
#include "device/virtio/rng.h"
#include "virtio_fuzz.h"

static void rng_open(struct vfuzz *f, const struct virtio_host *host)
{
	virtio_rng_create(&f->b.d, host, NULL);
}

const struct vfuzz_target vfuzz_target = { .name = "rng", .open = rng_open };
