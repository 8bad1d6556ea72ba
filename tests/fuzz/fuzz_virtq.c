/*
 * The virtqueues themselves, behind a device that does what a device may: keep chains, answer them in any order, put them back, forget
 * them in a reset that comes late, and look at every byte of them.
 */
#include "virtio_fuzz.h"

#define HELD_MAX 64

struct keeper {
	struct virtio_device d;
	struct virtio_chain *held[HELD_MAX];
	unsigned nheld;
	bool late; /* resets finish with the next event */
	unsigned late_queue;
	uint8_t config[6];
};

/* A chain's sums agree with its parts, and all of them are RAM that can be read and written. */
static void inspect(struct keeper *k, const struct virtio_chain *c)
{
	uint64_t sums[2] = { 0 };
	for (unsigned i = 0; i < c->nout + c->nin; i++) {
		const struct iovec *v = &c->iov[i];
		sums[i >= c->nout] += v->iov_len;
		if (!v->iov_len || ram_hva(k->d.ram, c->gpa[i], v->iov_len) != v->iov_base)
			vbench_fail("a part of a chain is not what the ring said");
	}
	if (sums[0] != c->out_len || sums[1] != c->in_len)
		vbench_fail("a chain's length is not that of its parts");
	uint8_t bytes[300];
	struct iovec part[3];
	virtio_chain_read(c, c->out_len / 3, bytes, sizeof(bytes));
	memset(bytes, 0x5a, sizeof(bytes));
	virtio_chain_write(c, c->in_len / 3, bytes, sizeof(bytes));
	iov_slice(c->iov, c->nout, c->out_len / 2, 70000, part, 3);
}

static void keeper_notify(struct virtio_device *d, unsigned q)
{
	struct keeper *k = (struct keeper *)d;
	struct virtio_queue *queue = virtio_queue(d, q);
	struct virtio_chain *c;
	do {
		virtq_no_notify(queue);
		while (k->nheld < HELD_MAX && (c = virtq_pop(queue))) {
			inspect(k, c);
			if (q) { /* the second queue's are answered at once */
				virtq_push(queue, c, c->in_len / 2);
				continue;
			}
			k->held[k->nheld++] = c;
		}
		virtq_notify(queue);
	} while (k->nheld < HELD_MAX && virtq_want_notify(queue));
}

static void forget(struct keeper *k)
{
	while (k->nheld)
		virtq_drop(k->held[--k->nheld]);
}

static bool keeper_reset(struct virtio_device *d)
{
	struct keeper *k = (struct keeper *)d;
	if (!k->late)
		forget(k);
	return !k->late;
}

static bool keeper_queue_reset(struct virtio_device *d, unsigned q)
{
	struct keeper *k = (struct keeper *)d;
	if (q || !k->late) {
		if (!q)
			forget(k);
		return true;
	}
	k->late_queue = 1;
	return false;
}

static void keeper_config_write(struct virtio_device *d, unsigned offset, unsigned size, uint64_t value)
{
	memcpy(((struct keeper *)d)->config + offset, &value, size);
	virtio_config_changed(d);
}

static void keeper_destroy(struct virtio_device *d)
{
	forget((struct keeper *)d);
	virtio_fini(d);
	free(d);
}

static const struct virtio_ops keeper_ops = {
	.name = "virtio-keeper",
	.id = 42,
	.config_write = keeper_config_write,
	.notify = keeper_notify,
	.reset = keeper_reset,
	.queue_reset = keeper_queue_reset,
	.destroy = keeper_destroy,
};

static void keeper_open(struct vfuzz *f, const struct virtio_host *host)
{
	static const uint16_t sizes[] = { 16, 64 };
	struct keeper *k = calloc(1, sizeof(*k));
	if (!k || virtio_init(&k->d, &keeper_ops, host, 0, k->config, sizeof(k->config), 2, sizes, NULL))
		abort();
	f->b.d = &k->d;
}

/* What was put off is finished. */
static void finish_resets(struct keeper *k)
{
	k->late = false;
	if (k->d.resetting || k->late_queue)
		forget(k);
	if (k->late_queue)
		virtio_queue_reset_done(&k->d, 0);
	k->late_queue = 0;
	virtio_reset_done(&k->d);
}

static void keeper_event(struct vfuzz *f)
{
	struct keeper *k = (struct keeper *)f->b.d;
	uint8_t how = vfuzz_u8(f);
	if (k->d.resetting || k->late_queue || how % 8 == 0) {
		finish_resets(k);
		k->late = how & 0x10;
		return;
	}
	if (!k->nheld)
		return;
	unsigned i = (how >> 4) % k->nheld;
	struct virtio_chain *c = k->held[i];
	struct virtio_queue *q = virtio_queue(&k->d, 0);
	switch (how & 7) {
	case 1: /* in some order */
	case 2:
	case 3:
		k->held[i] = k->held[--k->nheld];
		virtq_push(q, c, how & 8 ? c->in_len : how);
		virtq_notify(q);
		break;
	case 4: /* the last one back */
		virtq_unpop(q, k->held[--k->nheld]);
		break;
	case 5: /* the queue again, without a kick */
		while (k->nheld < HELD_MAX && (c = virtq_pop(q)))
			k->held[k->nheld++] = c;
		break;
	default:
		virtio_config_changed(&k->d);
		break;
	}
}

/* A reset that must be seen to end: the harness runs the loop for it. */
static void keeper_loop(struct vfuzz *f)
{
	finish_resets((struct keeper *)f->b.d);
}

const struct vfuzz_target vfuzz_target = { .name = "keeper", .open = keeper_open, .event = keeper_event, .recover = keeper_loop };
