#include "device/virtio/vhost_device.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/error.h"
#include "base/log.h"
#include "mem/ram.h"

#define RETRY_SOON_NS (NS_PER_SEC / 2) /* a back end that was only started anew */
#define RETRY_NS (2 * NS_PER_SEC)
#define RETRY_SHARE 10		       /* of the time at most goes into waiting for a back end that is slow */
#define PATIENCE_OPEN (60 * NS_PER_SEC) /* for mapping guest memory before the machine runs */
#define PATIENCE (3 * NS_PER_SEC)	/* while it does, and stands still: all that is said in one turn */
#define LOSSES_LOGGED 10
#define RINGS_GPA (1ull << 46) /* where the back end is told that the rings' memory is: above any RAM; no descriptor points there */

static struct vhost_device *device_of(struct virtio_device *d)
{
	return (struct vhost_device *)d;
}

void vhost_device_patience(struct vhost_device *vd)
{
	vd->v->deadline = clock_ns() + PATIENCE;
}

/* --- the back end goes, and comes back --- */

static void arm_retry(struct vhost_device *vd, uint64_t wait)
{
	if (wait < RETRY_SHARE * vd->slowness)
		wait = RETRY_SHARE * vd->slowness;
	vtimer_arm(&vd->retry, clock_ns() + wait);
}

static void let_go(struct vhost_device *vd, enum vhost_state state, const char *then)
{
	if (++vd->losses <= LOSSES_LOGGED)
		log_warn("%s %s: the %s back end at %s is lost: %s; %s%s", vd->d.ops->name, vd->d.name, vd->v->ops->kind, vd->v->name, vd->v->why, then,
			 vd->losses == LOSSES_LOGGED ? " (the last time that this is reported)" : "");
	vd->v->ops->hang_up(vd->v);
	vd->connected = false;
	vd->state = state;
}

static void fail_requests(struct vhost_device *vd, unsigned q)
{
	struct virtio_queue *queue = virtio_queue(&vd->d, q);
	do {
		virtq_no_notify(queue);
		struct virtio_chain *c;
		while ((c = virtq_pop(queue)))
			virtq_push(queue, c, vd->fail(c));
		virtq_notify(queue);
	} while (virtq_want_notify(queue));
}

/* Without a way back. */
static void give_up(struct vhost_device *vd)
{
	if (!vd->fail) {
		virtio_needs_reset(&vd->d);
		return;
	}
	for (unsigned i = 0; i < vd->nrings; i++) {
		if (!vd->ring[i].used)
			continue;
		shadow_fail(&vd->ring[i].shadow, vd->fail);
		fail_requests(vd, i);
	}
}

void vhost_device_lost(struct vhost_device *vd)
{
	if (vd->state == VHOST_AWAY || vd->state == VHOST_GONE)
		return;
	bool idle = vd->state == VHOST_IDLE;
	if (!vd->v->reopens) {
		let_go(vd, idle ? VHOST_IDLE : VHOST_GONE, vd->fail ? "requests fail from now on; restart the machine to have it back" : "the device needs a reset");
		if (!idle)
			give_up(vd);
	} else if (idle) {
		let_go(vd, VHOST_IDLE, "it is connected again when the guest needs it");
	} else {
		let_go(vd, VHOST_AWAY, "requests wait until it is back");
		arm_retry(vd, RETRY_SOON_NS);
	}
}

/* The rules of the ring are broken: no word of it counts any more. */
static void vhost_device_liar(struct vhost_device *vd, const char *how)
{
	snprintf(vd->v->why, sizeof(vd->v->why), "%s", how);
	let_go(vd, VHOST_GONE, "the device needs a reset");
	virtio_needs_reset(&vd->d);
}

static void on_lost(void *opaque)
{
	vhost_device_lost(opaque);
}

/* --- rings --- */

static void kick(struct vhost_queue *q)
{
	/* EAGAIN: it was kicked 2^64 times and did not look. (O_NONBLOCK belongs to both of us: a back end that takes it away and fills the
	 * counter makes this wait. Nothing but an eventfd would do as a kick, and there is no way to write to one that never waits.) */
	uint64_t one = 1;
	ssize_t n = write(q->kick, &one, sizeof(one));
	(void)n;
}

static void forward(struct vhost_queue *q)
{
	if (shadow_forward(&q->shadow))
		kick(q);
}

static void on_call(void *opaque, uint32_t revents)
{
	struct vhost_queue *q = opaque;
	struct vhost_device *vd = q->dev;
	(void)revents; /* edge-triggered: the counter is never read, so that a back end cannot make that wait */
	if (vd->state != VHOST_SERVED || !q->used || !virtio_is_live(&vd->d))
		return;
	const char *wrong = shadow_return(&q->shadow);
	if (wrong)
		vhost_device_liar(vd, wrong);
	else if (q->shadow.full)
		forward(q);
}

/* Give ring i to the back end, with what is outstanding. */
static int serve_ring(struct vhost_device *vd, unsigned i)
{
	struct vhost_queue *q = &vd->ring[i];
	const struct shadow *s = &q->shadow;
	bool waiting = shadow_restart(&q->shadow);
	struct vhost_ring ring = {
		.index = i,
		.size = s->size,
		.desc = (uintptr_t)s->desc,
		.avail = (uintptr_t)s->avail,
		.used = (uintptr_t)s->used,
		.kick = q->kick,
		.call = q->call,
	};
	int r = vd->v->ops->start_ring(vd->v, &ring);
	if (r < 0)
		return r;
	/* More may wait in the guest's ring, without a notification to come, if the shadow was full. */
	if (shadow_forward(&q->shadow) || waiting)
		kick(q);
	return 0;
}

static bool begin_ring(struct vhost_device *vd, unsigned i)
{
	struct vhost_queue *q = &vd->ring[i];
	if (q->used)
		return true;
	if (!virtq_ready(virtio_queue(&vd->d, i)))
		return false;
	q->used = true;
	vhost_device_patience(vd);
	if (vd->state == VHOST_SERVED && serve_ring(vd, i) < 0)
		vhost_device_lost(vd);
	return true;
}

/* Once a connection. */
static int show_memory(struct vhost_device *vd)
{
	const struct guest_ram *ram = vd->d.ram;
	struct vhost_region region[4];
	unsigned n = 0;
	for (int i = 0; i < ram->nregions && n < 2; i++) {
		const struct ram_region *r = &ram->region[i];
		region[n++] = (struct vhost_region){ r->gpa, r->size, (uintptr_t)r->hva, (uint64_t)(r->hva - ram->base), ram->fd };
	}
	if (ram->room.size) /* as a whole: blocks come and go in it */
		region[n++] = (struct vhost_region){ ram->room.gpa, ram->room.size, (uintptr_t)ram->room.hva, (uint64_t)(ram->room.hva - ram->base), ram->fd };
	region[n++] = (struct vhost_region){ RINGS_GPA, vd->memory_size, (uintptr_t)vd->memory, 0, vd->memory_fd };
	return vd->v->ops->set_memory(vd->v, region, n);
}

static int reconnect(struct vhost_device *vd, struct error *err)
{
	int r = vd->v->ops->reopen(vd->v, err);
	if (r == 0 && (r = show_memory(vd)) < 0) {
		error_set(err, -r, "%s: the back end at %s is of no use: %s", vd->d.name, vd->v->name, vd->v->why);
		vd->v->ops->hang_up(vd->v);
	}
	vd->connected = r == 0;
	return r;
}

/* Features, and the rings that are in use. */
static int serve(struct vhost_device *vd)
{
	struct vhost *v = vd->v;
	int r = v->ops->set_features(v, (vd->d.features & vd->passed) | VIRTIO_BIT(VIRTIO_F_VERSION_1));
	for (unsigned i = 0; r == 0 && i < vd->nrings; i++)
		if (vd->ring[i].used)
			r = serve_ring(vd, i);
	return r;
}

static void retry(void *opaque)
{
	struct vhost_device *vd = opaque;
	struct error err;
	if (vd->state != VHOST_AWAY)
		return;
	uint64_t begin = clock_ns();
	vhost_device_patience(vd);
	int r = reconnect(vd, &err);
	if (r == 0) {
		vd->state = VHOST_SERVED;
		r = serve(vd);
	}
	vd->slowness = clock_ns() - begin;
	if (r == 0) {
		if (vd->losses <= LOSSES_LOGGED)
			log_warn("%s %s: the back end at %s is back", vd->d.ops->name, vd->d.name, vd->v->name);
		return;
	}
	if (vd->connected)
		vd->v->ops->hang_up(vd->v);
	vd->connected = false;
	vd->state = VHOST_AWAY;
	arm_retry(vd, RETRY_NS);
}

/* --- what the core calls --- */

void vhost_device_start(struct virtio_device *d)
{
	struct vhost_device *vd = device_of(d);
	struct error err;
	vhost_device_patience(vd);
	if (!vd->connected && vd->v->reopens) {
		if (reconnect(vd, &err) < 0 && ++vd->losses <= LOSSES_LOGGED)
			log_warn("%s", err.text);
	}
	for (unsigned i = 0; i < vd->nrings; i++)
		vd->ring[i].used = virtq_ready(virtio_queue(d, i));
	if (!vd->connected) {
		vd->state = vd->v->reopens ? VHOST_AWAY : VHOST_GONE;
		if (vd->v->reopens)
			arm_retry(vd, RETRY_NS);
		else if (!vd->fail)
			virtio_needs_reset(d);
		return;
	}
	vd->state = VHOST_SERVED;
	if (serve(vd) < 0)
		vhost_device_lost(vd);
}

void vhost_device_notify(struct virtio_device *d, unsigned q)
{
	struct vhost_device *vd = device_of(d);
	if (q >= vd->nrings || !begin_ring(vd, q))
		return;
	if (vd->state == VHOST_SERVED)
		forward(&vd->ring[q]);
	else if (vd->state == VHOST_AWAY)
		shadow_forward(&vd->ring[q].shadow); /* for when it is back */
	else if (vd->state == VHOST_GONE && vd->fail)
		fail_requests(vd, q);
}

static void end_ring(struct vhost_device *vd, unsigned i)
{
	struct vhost_queue *q = &vd->ring[i];
	if (q->used && vd->state == VHOST_SERVED && vd->v->ops->stop_ring(vd->v, i) < 0)
		vhost_device_lost(vd);
	shadow_drop(&q->shadow);
	q->used = false;
}

bool vhost_device_reset(struct virtio_device *d)
{
	struct vhost_device *vd = device_of(d);
	vhost_device_patience(vd);
	for (unsigned i = 0; i < vd->nrings; i++)
		end_ring(vd, i);
	vtimer_cancel(&vd->retry);
	vd->state = VHOST_IDLE;
	return true;
}

bool vhost_device_queue_reset(struct virtio_device *d, unsigned q)
{
	struct vhost_device *vd = device_of(d);
	vhost_device_patience(vd);
	if (q < vd->nrings)
		end_ring(vd, q);
	return true;
}

static void on_config_changed(void *opaque)
{
	struct vhost_device *vd = opaque;
	uint8_t before[VHOST_CONFIG_MAX];
	if (!vd->backend_config)
		return;
	memcpy(before, vd->config, sizeof(before));
	vhost_device_patience(vd);
	if (vd->v->ops->get_config(vd->v, vd->config, vd->backend_config) < 0) {
		memcpy(vd->config, before, sizeof(before));
		vhost_device_lost(vd);
		return;
	}
	if (vd->config_fixed)
		vd->config_fixed(vd);
	if (memcmp(before, vd->config, sizeof(before)))
		virtio_config_changed(&vd->d);
}

void vhost_device_stats(struct virtio_device *d, char *text, size_t room)
{
	const struct vhost_device *vd = device_of(d);
	unsigned outstanding = 0;
	for (unsigned i = 0; i < vd->nrings; i++)
		outstanding += vd->ring[i].shadow.outstanding;
	size_t len = strlen(text);
	if (len < room)
		snprintf(text + len, room - len, "backend %s\nserved %u\nlosses %u\nin_flight %u\n", vd->v->name, vd->state == VHOST_SERVED, vd->losses,
			 outstanding);
}

/* --- life --- */

static int make_rings(struct vhost_device *vd, struct error *err)
{
	const char *name = vd->d.name;
	vd->ring_bytes = shadow_bytes(vd->ring_size);
	vd->memory_size = vd->ring_bytes * vd->nrings;
	vd->memory_fd = memfd_create("vhost-rings", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	/* Sealed: a back end that made it smaller would kill us at the next access. */
	if (vd->memory_fd < 0 || ftruncate(vd->memory_fd, (off_t)vd->memory_size) < 0 ||
	    fcntl(vd->memory_fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) < 0)
		return error_set(err, errno, "%s: cannot make shared memory for the rings: %s", name, strerror(errno));
	void *p = mmap(NULL, vd->memory_size, PROT_READ | PROT_WRITE, MAP_SHARED, vd->memory_fd, 0);
	if (p == MAP_FAILED)
		return error_set(err, errno, "%s: cannot map the rings: %s", name, strerror(errno));
	vd->memory = p;
	for (unsigned i = 0; i < vd->nrings; i++) {
		struct vhost_queue *q = &vd->ring[i];
		q->kick = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
		q->call = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
		if (q->kick < 0 || q->call < 0)
			return error_set(err, errno, "%s: cannot make an eventfd: %s", name, strerror(errno));
		int r = shadow_init(&q->shadow, virtio_queue(&vd->d, i), vd->d.ram, vd->memory + i * vd->ring_bytes, vd->ring_size);
		if (r == 0)
			r = loop_add_fd(vd->d.loop, q->call, EPOLLIN | (uint32_t)EPOLLET, on_call, q);
		if (r < 0)
			return error_set(err, -r, "%s: cannot set up a ring: %s", name, strerror(-r));
	}
	return 0;
}

int vhost_device_init(struct vhost_device *vd, const struct virtio_ops *ops, const struct virtio_host *host, struct vhost *v, uint64_t passed,
		      uint64_t ours, unsigned config_size, unsigned nqueues, unsigned nrings, uint16_t queue_size, struct error *err)
{
	uint16_t sizes[VIRTIO_MAX_QUEUES];
	for (unsigned i = 0; i < VIRTIO_MAX_QUEUES; i++)
		sizes[i] = queue_size;
	vd->v = v;
	vd->connected = true;
	vd->memory_fd = -1;
	vd->passed = passed & v->features;
	vd->nrings = nrings;
	vd->ring_size = VIRTIO_QUEUE_MAX; /* whatever chain the guest makes fits, and many of the usual ones */
	vd->ring = calloc(nrings, sizeof(*vd->ring));
	vtimer_init(&vd->retry, host->loop, retry, vd);
	for (unsigned i = 0; vd->ring && i < nrings; i++)
		vd->ring[i] = (struct vhost_queue){ .dev = vd, .kick = -1, .call = -1 };
	int r = vd->ring ? virtio_init(&vd->d, ops, host, vd->passed | ours, vd->config, config_size, nqueues, sizes, err)
			 : error_set(err, ENOMEM, "%s: out of memory", host->name);
	if (r == 0)
		r = make_rings(vd, err);
	v->deadline = clock_ns() + PATIENCE_OPEN;
	if (r == 0 && (r = show_memory(vd)) < 0)
		error_set(err, -r, "%s: the back end at %s is of no use: %s", host->name, v->name, v->why);
	if (r < 0) {
		vhost_device_fini(vd);
		return r;
	}
	v->opaque = vd;
	v->lost = on_lost;
	v->config_changed = on_config_changed;
	return 0;
}

void vhost_device_fini(struct vhost_device *vd)
{
	if (vd->d.queue)
		vhost_device_reset(&vd->d);
	vtimer_cancel(&vd->retry);
	for (unsigned i = 0; vd->ring && i < vd->nrings; i++) {
		struct vhost_queue *q = &vd->ring[i];
		if (q->call >= 0) {
			loop_del_fd(vd->d.loop, q->call);
			close(q->call);
		}
		if (q->kick >= 0)
			close(q->kick);
		shadow_fini(&q->shadow);
	}
	free(vd->ring);
	if (vd->memory)
		munmap(vd->memory, vd->memory_size);
	if (vd->memory_fd >= 0)
		close(vd->memory_fd);
	vd->v->ops->close(vd->v);
	virtio_fini(&vd->d);
}
