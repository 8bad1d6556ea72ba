/*
 * What vhost-user blk, net and fs have in common: a virtio device whose queues are served by a back end outside, through shadow rings.
 *
 * The device owns its back end and the shared memory. It starts the back end's rings when the guest says DRIVER_OK (a queue that is enabled
 * later: at its first notification), stops them at a reset, and waits for that a bounded time; a back end that does not obey is hung up on.
 *
 * When a back end goes away: requests in flight are kept, and given to it again when it is back (tried every two seconds, by socket path).
 * Where there is no way back they are answered with the device's `fail`, those that come too, and the device asks for a reset if it has no `fail`.
 * One that breaks the rules of the ring is hung up on for good: the device needs a reset, at which it is connected anew.
 */
#ifndef TRAPLINE_DEVICE_VIRTIO_VHOST_DEVICE_H
#define TRAPLINE_DEVICE_VIRTIO_VHOST_DEVICE_H

#include "device/virtio/shadow.h"
#include "device/virtio/vhost_backend.h"
#include "device/virtio/virtio.h"

#define VHOST_RINGS_MAX 64

struct vhost_device;

struct vhost_queue {
	struct vhost_device *dev;
	struct shadow shadow;
	int kick, call; /* eventfds, -1: not made */
	bool used;	/* the guest has it going; so has the back end while dev->state is SERVED */
};

enum vhost_state {
	VHOST_IDLE,   /* the guest's driver is not there */
	VHOST_SERVED,
	VHOST_AWAY,   /* the back end is gone and may come back */
	VHOST_GONE,   /* for good, or until the guest resets the device */
};

struct vhost_device {
	struct virtio_device d; /* first: devices embed this at their start */
	struct vhost *v;
	enum vhost_state state;
	bool connected;
	uint64_t passed;      /* feature bits that are the back end's business */
	unsigned nrings;      /* queues [0, nrings) are the back end's */
	uint16_t ring_size;
	struct vhost_queue *ring;
	uint8_t *memory; /* of all rings */
	size_t memory_size, ring_bytes;
	int memory_fd;
	struct vtimer retry;
	uint64_t slowness; /* ns that the last connecting again took: the VM stood still */
	unsigned losses; /* for the log: a back end that comes and goes does not fill the terminal */
	uint8_t config[VHOST_CONFIG_MAX];
	unsigned backend_config; /* bytes of config that the back end fills in; 0: none */
	void (*config_fixed)(struct vhost_device *vd); /* after they were read: put back what is ours. Optional */
	uint64_t (*fail)(struct virtio_chain *c);      /* answer a request with an error: bytes written. Optional */
};

/* Takes over v, also on failure. `passed`: features of the device type that v may offer and the guest have; `ours`: those that this
 * process serves itself. nqueues: all, with those behind nrings that are ours. vd is zero-filled, with config filled in. */
int vhost_device_init(struct vhost_device *vd, const struct virtio_ops *ops, const struct virtio_host *host, struct vhost *v, uint64_t passed,
		      uint64_t ours, unsigned config_size, unsigned nqueues, unsigned nrings, uint16_t queue_size, struct error *err);
void vhost_device_fini(struct vhost_device *vd);

/* For the ops of the device. */
void vhost_device_start(struct virtio_device *d);
void vhost_device_notify(struct virtio_device *d, unsigned q);
bool vhost_device_reset(struct virtio_device *d);
bool vhost_device_queue_reset(struct virtio_device *d, unsigned q);
void vhost_device_stats(struct virtio_device *d, char *text, size_t room);

/* Before calls of vd->v's operations while the machine runs. */
void vhost_device_patience(struct vhost_device *vd);
/* The back end failed a call (v->why says how). */
void vhost_device_lost(struct vhost_device *vd);

#endif
