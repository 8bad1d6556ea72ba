/*
 * virtio-rng (virtio 1.2 5.4): entropy for the guest from the host's getrandom(2). The simplest device: the example to read.
 *
 * Owner: who creates it, destroyed through its ops. It keeps no buffer over a call. A request is answered with at most RNG_BYTES_MAX
 * bytes, so that a guest cannot keep the device lock for long; the driver asks again if it wants more.
 */
#ifndef TRAPLINE_DEVICE_VIRTIO_RNG_H
#define TRAPLINE_DEVICE_VIRTIO_RNG_H

struct error;
struct virtio_device;
struct virtio_host;

#define RNG_BYTES_MAX 4096

int virtio_rng_create(struct virtio_device **out, const struct virtio_host *host, struct error *err);

#endif
