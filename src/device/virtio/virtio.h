/*
 * The virtio 1.2 core: what a device is, its features and status, its queues. Transports (pci.c, mmio.c) stand in front and turn
 * register accesses into the calls of virtio_transport.h; devices (blk.c, net.c, ...) stand behind and fill a struct virtio_ops.
 *
 * Who walks a ring: only queue*.c. They copy every descriptor once, check what the specification asks of a driver (ranges, loops,
 * lengths, indirect tables, direction order), and turn a bad ring into DEVICE_NEEDS_RESET with one log line; the device
 * then finds its queues empty until it is reset. A device sees chains: iovecs into guest RAM that are in bounds. What lies in
 * them the guest may change at any time: copy a header once, then check the copy.
 *
 * Threads: everything here runs with the device lock held (vm/bus.h), on whatever thread holds it. A device embeds
 * its struct virtio_device and owns it; the transport refers to it and is destroyed first. Nothing of a device survives a reboot of
 * the machine but its backend (struct block, struct net, ...), which it does not own.
 */
#ifndef TRAPLINE_DEVICE_VIRTIO_VIRTIO_H
#define TRAPLINE_DEVICE_VIRTIO_VIRTIO_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#include "vm/loop.h"

struct error;
struct guest_ram;
struct virtio_device;
struct virtio_queue;

/* Device types (5). */
enum virtio_id {
	VIRTIO_ID_NET = 1,
	VIRTIO_ID_BLOCK = 2,
	VIRTIO_ID_CONSOLE = 3,
	VIRTIO_ID_RNG = 4,
	VIRTIO_ID_BALLOON = 5,
	VIRTIO_ID_VSOCK = 19,
	VIRTIO_ID_MEM = 24,
	VIRTIO_ID_FS = 26,
};

/* Device status (2.1). */
#define VIRTIO_STATUS_ACKNOWLEDGE 1
#define VIRTIO_STATUS_DRIVER 2
#define VIRTIO_STATUS_DRIVER_OK 4
#define VIRTIO_STATUS_FEATURES_OK 8
#define VIRTIO_STATUS_NEEDS_RESET 64
#define VIRTIO_STATUS_FAILED 128

/* Feature bits of no device type (6). The core offers INDIRECT_DESC, EVENT_IDX, VERSION_1, RING_PACKED, RING_RESET for every device, and
 * IN_ORDER for those whose ops say so. */
#define VIRTIO_F_INDIRECT_DESC 28
#define VIRTIO_F_EVENT_IDX 29
#define VIRTIO_F_VERSION_1 32
#define VIRTIO_F_ACCESS_PLATFORM 33
#define VIRTIO_F_RING_PACKED 34
#define VIRTIO_F_IN_ORDER 35
#define VIRTIO_F_NOTIFICATION_DATA 38
#define VIRTIO_F_RING_RESET 40
#define VIRTIO_BIT(n) (1ull << (n))

#define VIRTIO_QUEUE_MAX 1024 /* entries of a queue, and descriptors of a chain, at most */
#define VIRTIO_MAX_QUEUES 68  /* of a device */

/*
 * One buffer chain that the guest made available. `iov` holds nout parts that the device reads, then nin parts that it writes; a part of
 * length 0 is left out. It belongs to the device from virtq_pop until virtq_push, virtq_unpop or virtq_drop.
 */
struct virtio_chain {
	struct virtio_queue *queue;
	const struct iovec *iov; /* nout + nin */
	unsigned nout, nin;
	uint64_t out_len, in_len; /* bytes of each sort */
	const uint64_t *gpa;	  /* of each iovec */
	void *opaque;		  /* the device's */
	/* queue.c's own: */
	uint16_t id;		  /* what the used entry names */
	uint16_t ndesc;		  /* places it takes in the ring: 1 (split), descriptors but those of an indirect table (packed) */
	unsigned room;		  /* iovecs there is memory for */
	uint32_t generation;
	struct virtio_chain *next;
};

/* What a device type is. const data. */
struct virtio_ops {
	const char *name; /* "virtio-blk" */
	uint16_t id;	  /* enum virtio_id */
	uint16_t budget;  /* chains that a kick is served for at once, the rest from the event loop; 0: twice the queue's size. For slow requests */
	bool in_order;	  /* uses buffers in the order they were made available: offer IN_ORDER */

	/* The guest wrote the device configuration: [offset, offset+size) is inside config_size; d->config still has the old bytes, and the
	 * device changes it if the field is writable. NULL: nothing is writable. */
	void (*config_write)(struct virtio_device *d, unsigned offset, unsigned size, uint64_t value);
	/* The guest is about to read the configuration: bring d->config up to date. Optional. */
	void (*config_read)(struct virtio_device *d);
	/* FEATURES_OK is asked for with d->features set: 0, or -EINVAL to refuse the combination. Optional. */
	int (*features)(struct virtio_device *d);
	/* DRIVER_OK: queues are live from now on. Optional. */
	void (*start)(struct virtio_device *d);
	/* Queue `q` has (or may have) new buffers. Only between start and reset. */
	void (*notify)(struct virtio_device *d, unsigned q);
	/* Stop: forget chains, cancel timers, touch guest memory no more. Returns true if that holds on return; else the device
	 * (requests are still in flight) calls virtio_reset_done later, and the guest reads a status that is not 0 until then. The
	 * same for one queue (RING_RESET). Optional: a device that keeps no chain over a call needs neither. */
	bool (*reset)(struct virtio_device *d);
	bool (*queue_reset)(struct virtio_device *d, unsigned q);
	/* Free the device; its transport is gone already. No request may be in flight: the device waits for them. */
	void (*destroy)(struct virtio_device *d);
	/* Append a line or more "key value\n" for `trapline stats`. Optional. */
	void (*stats)(struct virtio_device *d, char *text, size_t room);
};

/* How interrupts reach the guest: the transport fills this in when the device is put behind it. */
struct virtio_interrupt {
	void (*queue)(void *opaque, unsigned q); /* used buffers */
	void (*config)(void *opaque);		 /* configuration change, or DEVICE_NEEDS_RESET */
	void *opaque;
};

struct virtio_device {
	const struct virtio_ops *ops;
	struct guest_ram *ram;
	struct loop *loop;
	char name[32];	     /* for messages: "disk0" */
	uint64_t offered;    /* features */
	uint64_t features;   /* what the driver took; 0 before FEATURES_OK */
	uint64_t accepted;   /* virtio.c's own: what the driver wrote so far, before FEATURES_OK */
	void *config;	     /* device configuration, little-endian; the device's memory */
	unsigned config_size;
	uint8_t status;
	bool resetting;	     /* waits for virtio_reset_done */
	bool no_dma;	     /* PCI: bus mastering is off */
	struct vtimer more;  /* virtio.c's own: goes on with a queue whose driver refills as fast as it is emptied */
	uint32_t config_generation;
	unsigned nqueues;
	struct virtio_queue *queue; /* nqueues of them */
	struct virtio_interrupt interrupt;
	uint64_t notifies, interrupts; /* statistics */
	unsigned faults;	       /* times the driver broke the rules */
};

/* What every device constructor gets from the machine. */
struct virtio_host {
	struct guest_ram *ram;
	struct loop *loop;
	const char *name; /* of this device, copied */
};

/* Prepare d: `offered` are the device's own feature bits; config stays the caller's; queue_sizes[i] a power of two up to VIRTIO_QUEUE_MAX.
 * 0 or -ENOMEM/-EINVAL. virtio_fini frees what it took; ops->destroy calls it. */
int virtio_init(struct virtio_device *d, const struct virtio_ops *ops, const struct virtio_host *host, uint64_t offered, void *config,
		unsigned config_size, unsigned nqueues, const uint16_t *queue_sizes, struct error *err);
void virtio_fini(struct virtio_device *d);

static inline bool virtio_has(const struct virtio_device *d, unsigned bit)
{
	return d->features >> bit & 1;
}

/* True between DRIVER_OK and a reset or an error, while the device may use guest memory. */
bool virtio_is_live(const struct virtio_device *d);
/* The device changed its configuration: new generation, interrupt. */
void virtio_config_changed(struct virtio_device *d);
/* The driver broke the rules beyond a single request: DEVICE_NEEDS_RESET, one log line (the first until the next reset). */
__attribute__((format(printf, 2, 3))) void virtio_broken(struct virtio_device *d, const char *format, ...);
/* The device cannot go on, through no fault of the driver: DEVICE_NEEDS_RESET; the caller says why. */
void virtio_needs_reset(struct virtio_device *d);
/* What ops->reset and ops->queue_reset promised is done. */
void virtio_reset_done(struct virtio_device *d);
void virtio_queue_reset_done(struct virtio_device *d, unsigned q);

/* --- queues --- */

struct virtio_queue *virtio_queue(struct virtio_device *d, unsigned q);
/* Is it set up and usable? Popping from one that is not gives nothing. */
bool virtq_ready(const struct virtio_queue *q);

/* The next available chain, or NULL if there is none (or the ring is bad: virtio_broken was called). */
struct virtio_chain *virtq_pop(struct virtio_queue *q);
/* Done with it: `written` bytes of its device-writable parts, from the first on, hold data. Tells the RAM watcher. Frees the chain. The guest sees
 * the used entry at once; its interrupt comes with virtq_notify. A chain from before a reset is just freed. */
void virtq_push(struct virtio_queue *q, struct virtio_chain *c, uint64_t written);
/* The same for n chains as one: the guest sees all of them or none (a frame in mergeable buffers, 5.1.6.4). */
void virtq_push_all(struct virtio_queue *q, struct virtio_chain *const *c, const uint64_t *written, unsigned n);
/* Put back what was popped last and is not wanted yet (several: in reverse order of popping). */
void virtq_unpop(struct virtio_queue *q, struct virtio_chain *c);
/* Free a chain without answering it: only in reset. Tells the RAM watcher of all its device-writable parts. */
void virtq_drop(struct virtio_chain *c);
/* Interrupt the guest if it wants one for what was pushed since the last call (flags, event index). After each batch. */
void virtq_notify(struct virtio_queue *q);
/* Ask the guest for (no) notifications. virtq_want_notify returns true if buffers came meanwhile: pop again. The usual loop:
 *   do { virtq_no_notify(q); while ((c = virtq_pop(q))) ...; } while (virtq_want_notify(q)); */
void virtq_no_notify(struct virtio_queue *q);
bool virtq_want_notify(struct virtio_queue *q);

/* --- iovecs --- */

/* Copy up to `len` bytes from byte `skip` of the chain's device-readable parts / into its device-writable parts. Returns how many. */
size_t virtio_chain_read(const struct virtio_chain *c, size_t skip, void *dst, size_t len);
size_t virtio_chain_write(const struct virtio_chain *c, size_t skip, const void *src, size_t len);
/* The part [skip, skip+len) of n iovecs as iovecs in out[room]. Returns their number, or -E2BIG. Shorter if there is less. */
int iov_slice(const struct iovec *iov, unsigned n, size_t skip, size_t len, struct iovec *out, unsigned room);

#endif
