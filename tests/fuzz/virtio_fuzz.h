/*
 * What the fuzz targets of virtio devices share: a driver that does what the bytes of the input say. It sets queues up, makes well-formed
 * chains and broken ones, kicks, scribbles over rings and buffers, reads and writes the configuration, resets the device and its queues at
 * any moment. In the end every device must come back from a reset and start again.
 *
 * A target is a struct vfuzz_target, in a file of its own together with this one's .c (tests/fuzz/meson.build):
 *
 *   static void rng_open(struct vfuzz *f, const struct virtio_host *host) { virtio_rng_create(&f->b.d, host, NULL); }
 *   const struct vfuzz_target vfuzz_target = { .name = "rng", .open = rng_open };
 *
 * The device lock is held by the harness in all hooks.
 */
#ifndef TRAPLINE_TESTS_VIRTIO_FUZZ_H
#define TRAPLINE_TESTS_VIRTIO_FUZZ_H

#include "../unit/virtio_bench.h"

struct vfuzz {
	struct vbench b;
	const uint8_t *data; /* what is left of the input */
	size_t size;
	uint64_t buffers; /* counts them: where the next one lies */
	void *opaque;	  /* the target's */
};

struct vfuzz_target {
	const char *name;
	/* Create the device as f->b.d, and what is behind it. */
	void (*open)(struct vfuzz *f, const struct virtio_host *host);
	/* The device is destroyed: so may what is behind it be. Optional. */
	void (*close)(struct vfuzz *f);
	/* Make the first readable buffer of a chain of queue q look like a request, from the input's bytes; it holds some of them already.
	 * Optional, and well worth its lines: without it most inputs end at the first check. */
	void (*request)(struct vfuzz *f, unsigned q, uint8_t *bytes, unsigned len);
	/* Something happens behind the device: a packet comes, a peer goes. Optional. */
	void (*event)(struct vfuzz *f);
	/* Before the last reset: let what is in flight end. Optional, as the event loop runs then. */
	void (*recover)(struct vfuzz *f);
	/* Features that are refused if the others are not there do not get fuzzed far: those to insist on. */
	uint64_t features;
};

extern const struct vfuzz_target vfuzz_target;

/* The next bytes of the input as a number; zeros after its end. */
uint8_t vfuzz_u8(struct vfuzz *f);
uint16_t vfuzz_u16(struct vfuzz *f);
uint32_t vfuzz_u32(struct vfuzz *f);
uint64_t vfuzz_u64(struct vfuzz *f);
/* Up to `len` bytes; how many there were. */
unsigned vfuzz_bytes(struct vfuzz *f, void *out, unsigned len);

#endif
