/*
 * What a vhost back end is to the devices in front (vhost_device.c): something that serves split rings in memory that it shares with us.
 * vhost_user.c speaks to one behind a socket; a kernel's /dev/vhost-* would be another table of these.
 *
 * Device lock held, or before the loop runs. Calls wait for the back end until v->deadline at most, which the caller sets (one for all calls of
 * a turn: a back end that answers each just in time must not hold the VM up). A call that fails means that the
 * back end is of no use any more, with one phrase of why in `why`; nothing but close and reopen is called then.
 */
#ifndef TRAPLINE_DEVICE_VIRTIO_VHOST_BACKEND_H
#define TRAPLINE_DEVICE_VIRTIO_VHOST_BACKEND_H

#include <stdbool.h>
#include <stdint.h>

struct error;
struct loop;
struct vhost;

#define VHOST_CONFIG_MAX 256

/* Memory that the back end may reach: [offset, offset+size) of `fd`, which it sees at guest-physical `gpa` and we at `user`. */
struct vhost_region {
	uint64_t gpa, size, user, offset;
	int fd;
};

/* A ring: host addresses, inside a region. */
struct vhost_ring {
	unsigned index;
	uint16_t size;
	uint64_t desc, avail, used;
	int kick, call; /* eventfds */
};

struct vhost_ops {
	const char *kind; /* "vhost-user" */
	int (*set_features)(struct vhost *v, uint64_t features);
	int (*set_memory)(struct vhost *v, const struct vhost_region *region, unsigned n); /* may take long: some touch all of it */
	int (*start_ring)(struct vhost *v, const struct vhost_ring *ring);
	/* After it the back end touches neither the ring nor its buffers. */
	int (*stop_ring)(struct vhost *v, unsigned index);
	/* Device configuration; -EOPNOTSUPP without being lost if it has none. */
	int (*get_config)(struct vhost *v, void *config, unsigned size);
	int (*set_config)(struct vhost *v, unsigned offset, const void *bytes, unsigned size);
	/* Give up the connection (again: nothing). The rings are dead. */
	void (*hang_up)(struct vhost *v);
	/* Connect anew, to one that can do what the last one could. Only if v->reopens. */
	int (*reopen)(struct vhost *v, struct error *err);
	void (*close)(struct vhost *v);
};

struct vhost {
	const struct vhost_ops *ops;
	char name[128];	     /* for messages: the socket's path */
	uint64_t features;   /* virtio's, that it offers */
	bool reopens;	     /* a lost connection can be made again */
	unsigned max_queues; /* at least 1; UINT_MAX: it does not say */
	uint64_t deadline;   /* clock_ns() */
	char why[128];
	/* The device in front: from the loop. */
	void (*lost)(void *opaque);	      /* it closed the connection, or talks nonsense; hang up */
	void (*config_changed)(void *opaque); /* get_config has news */
	void *opaque;
};

#define VHOST_OPEN_SECONDS 15 /* a back end may be busy with another VM's memory */

/* Connect to the vhost-user back end that listens at `path`; or take the connection `fd` (>= 0, taken over also on failure) for which `path`
 * is only a name. Waits up to VHOST_OPEN_SECONDS. -errno with a sentence that begins with `option`. */
int vhost_user_open(struct vhost **out, const char *path, int fd, struct loop *loop, const char *option, struct error *err);

#endif
