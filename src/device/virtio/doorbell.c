/* Kicks by eventfd: the write does not leave the guest, and the event loop calls virtio_kick. */
#include <errno.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "device/virtio/virtio_transport.h"
#include "vm/bus.h"

struct queue_bell {
	struct virtio_device *d;
	unsigned q;
	struct bus_doorbell bell;
};

struct virtio_doorbells {
	struct virtio_device *d;
	struct bus *bus; /* where they are now; NULL: nowhere */
	uint64_t addr;
	unsigned n;
	struct queue_bell queue[];
};

struct virtio_doorbells *virtio_doorbells_create(struct virtio_device *d)
{
	struct virtio_doorbells *b = calloc(1, sizeof(*b) + d->nqueues * sizeof(b->queue[0]));
	if (!b)
		return NULL;
	b->d = d;
	b->n = d->nqueues;
	for (unsigned q = 0; q < b->n; q++) {
		b->queue[q].d = d;
		b->queue[q].q = q;
		b->queue[q].bell.fd = -1;
	}
	return b;
}

static void on_ring(void *opaque, uint32_t events)
{
	struct queue_bell *qb = opaque;
	uint64_t n;
	(void)events;
	if (read(qb->bell.fd, &n, sizeof(n)) == sizeof(n))
		virtio_kick(qb->d, qb->q);
}

/* One without a descriptor is none: the write comes out as it always did. */
static void hang(struct queue_bell *qb)
{
	if (qb->bell.fd >= 0)
		return;
	int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (fd < 0)
		return;
	if (loop_add_fd(qb->d->loop, fd, EPOLLIN, on_ring, qb)) {
		close(fd);
		return;
	}
	qb->bell.fd = fd;
}

static void take_off(struct virtio_doorbells *b)
{
	for (unsigned q = 0; b->bus && q < b->n; q++)
		bus_remove_doorbell(b->bus, &b->queue[q].bell);
	b->bus = NULL;
}

void virtio_doorbells_place(struct virtio_doorbells *b, struct bus *bus, const struct virtio_doorbell_layout *at)
{
	if (!b)
		return;
	bool wanted = bus && bus_doorbells_pay(bus) && virtio_is_live(b->d);
	if (!wanted || bus != b->bus || b->addr != at->addr)
		take_off(b);
	if (!wanted || b->bus)
		return;
	b->bus = bus;
	b->addr = at->addr;
	for (unsigned q = 0; q < b->n; q++) {
		struct queue_bell *qb = &b->queue[q];
		hang(qb);
		qb->bell.addr = at->addr + q * at->stride;
		qb->bell.match = !at->stride;
		qb->bell.size = at->stride ? 0 : 4;
		qb->bell.value = q;
		if (qb->bell.fd >= 0)
			bus_add_doorbell(bus, &qb->bell);
	}
}

void virtio_doorbells_destroy(struct virtio_doorbells *b)
{
	if (!b)
		return;
	take_off(b);
	for (unsigned q = 0; q < b->n; q++) {
		int fd = b->queue[q].bell.fd;
		if (fd < 0)
			continue;
		loop_del_fd(b->d->loop, fd);
		close(fd);
	}
	free(b);
}
