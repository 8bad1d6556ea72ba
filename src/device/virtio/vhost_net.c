/*
 * vhost-user-net: a network card whose frames another process moves, such as a DPDK switch (virtio 1.2 5.1). The control queue is ours:
 * it sets the number of queue pairs and nothing else.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "base/keyval.h"
#include "device/virtio/net.h"
#include "device/virtio/vhost.h"
#include "device/virtio/vhost_device.h"

#define QUEUE_SIZE 1024

/* 5.1.3 */
enum {
	NET_F_CSUM = 0, NET_F_GUEST_CSUM = 1, NET_F_MTU = 3, NET_F_MAC = 5, NET_F_GUEST_TSO4 = 7, NET_F_GUEST_TSO6 = 8, NET_F_GUEST_ECN = 9,
	NET_F_GUEST_UFO = 10, NET_F_HOST_TSO4 = 11, NET_F_HOST_TSO6 = 12, NET_F_HOST_ECN = 13, NET_F_HOST_UFO = 14, NET_F_MRG_RXBUF = 15,
	NET_F_STATUS = 16, NET_F_CTRL_VQ = 17, NET_F_MQ = 22, NET_F_GUEST_USO4 = 54, NET_F_GUEST_USO6 = 55, NET_F_HOST_USO = 56,
};
#define PASSED                                                                                                                             \
	(VIRTIO_BIT(NET_F_CSUM) | VIRTIO_BIT(NET_F_GUEST_CSUM) | VIRTIO_BIT(NET_F_GUEST_TSO4) | VIRTIO_BIT(NET_F_GUEST_TSO6) |   \
	 VIRTIO_BIT(NET_F_GUEST_ECN) | VIRTIO_BIT(NET_F_GUEST_UFO) | VIRTIO_BIT(NET_F_HOST_TSO4) | VIRTIO_BIT(NET_F_HOST_TSO6) | \
	 VIRTIO_BIT(NET_F_HOST_ECN) | VIRTIO_BIT(NET_F_HOST_UFO) | VIRTIO_BIT(NET_F_MRG_RXBUF) | VIRTIO_BIT(NET_F_GUEST_USO4) |   \
	 VIRTIO_BIT(NET_F_GUEST_USO6) | VIRTIO_BIT(NET_F_HOST_USO))

/* 5.1.4 */
struct net_config {
	uint8_t mac[6];
	uint16_t status, max_pairs, mtu;
} __attribute__((packed));
#define STATUS_LINK_UP 1

enum { CTRL_MQ = 4, CTRL_MQ_PAIRS_SET = 0, CTRL_OK = 0, CTRL_ERR = 1 }; /* 5.1.6.5 */

struct vhost_net {
	struct vhost_device vd; /* first */
	unsigned pairs;
};

static uint8_t control(struct vhost_net *n, const struct virtio_chain *c)
{
	struct {
		uint8_t class, command;
		uint16_t pairs;
	} __attribute__((packed)) request;
	/* All rings of all pairs run from the start; a driver that uses fewer leaves the others empty. */
	if (virtio_chain_read(c, 0, &request, sizeof(request)) != sizeof(request) || request.class != CTRL_MQ || request.command != CTRL_MQ_PAIRS_SET)
		return CTRL_ERR;
	return request.pairs >= 1 && request.pairs <= n->pairs ? CTRL_OK : CTRL_ERR;
}

static void net_notify(struct virtio_device *d, unsigned q)
{
	struct vhost_net *n = (struct vhost_net *)d;
	/* Without MQ the control queue is the third (5.1.2). */
	unsigned control_queue = virtio_has(d, NET_F_MQ) ? 2 * n->pairs : 2;
	if (!virtio_has(d, NET_F_CTRL_VQ) || q != control_queue) {
		vhost_device_notify(d, q);
		return;
	}
	struct virtio_queue *queue = virtio_queue(d, q);
	do {
		virtq_no_notify(queue);
		struct virtio_chain *c;
		while ((c = virtq_pop(queue))) {
			uint8_t answer = control(n, c);
			virtq_push(queue, c, virtio_chain_write(c, 0, &answer, 1));
		}
		virtq_notify(queue);
	} while (virtq_want_notify(queue));
}

static int net_features(struct virtio_device *d)
{
	/* The driver's control queue would lie where our second pair is. */
	return virtio_has(d, NET_F_CTRL_VQ) && !virtio_has(d, NET_F_MQ) ? -EINVAL : 0;
}

static void net_destroy(struct virtio_device *d)
{
	vhost_device_fini((struct vhost_device *)d);
	free(d);
}

static const struct virtio_ops net_ops = {
	.name = "vhost-user-net",
	.id = VIRTIO_ID_NET,
	.features = net_features,
	.start = vhost_device_start,
	.notify = net_notify,
	.reset = vhost_device_reset,
	.queue_reset = vhost_device_queue_reset,
	.destroy = net_destroy,
	.stats = vhost_device_stats,
};

int vhost_net_parse(struct vhost_net_config *c, struct keyval *kv, const struct virtio_net_config *card, struct error *err)
{
	const char *socket = keyval_get(kv, "socket");
	memset(c, 0, sizeof(*c));
	if (!socket || !*socket || strlen(socket) >= sizeof(c->socket))
		return error_set(err, EINVAL, "%s: type=vhost-user needs socket=PATH, of at most %zu bytes", kv->option, sizeof(c->socket) - 1);
	strcpy(c->socket, socket);
	memcpy(c->mac, card->mac, sizeof(c->mac));
	c->pairs = card->queues;
	c->mtu = card->mtu;
	return 0;
}

int virtio_vhost_net_create(struct virtio_device **out, const struct vhost_net_config *c, const struct virtio_host *host, struct error *err)
{
	struct vhost *v;
	int r = vhost_user_open(&v, c->socket, -1, host->loop, "--net", err);
	if (r < 0)
		return r;
	struct vhost_net *n = calloc(1, sizeof(*n));
	if (!n) {
		v->ops->close(v);
		return error_set(err, ENOMEM, "%s: out of memory", host->name);
	}
	if (c->pairs > 1 && c->pairs > v->max_queues) { /* it counts pairs */
		r = error_set(err, EINVAL, "--net: the back end at %s has %u queue pairs; give queues=%u or fewer", c->socket, v->max_queues, v->max_queues);
		v->ops->close(v);
		free(n);
		return r;
	}
	n->pairs = c->pairs;
	struct net_config config = { .status = STATUS_LINK_UP, .max_pairs = (uint16_t)c->pairs, .mtu = c->mtu };
	memcpy(config.mac, c->mac, sizeof(config.mac));
	memcpy(n->vd.config, &config, sizeof(config));
	/* 5.1.3.1: not every back end keeps to it. */
	uint64_t passed = PASSED;
	if (!(v->features & (VIRTIO_BIT(NET_F_HOST_TSO4) | VIRTIO_BIT(NET_F_HOST_TSO6))))
		passed &= ~VIRTIO_BIT(NET_F_HOST_ECN);
	if (!(v->features & (VIRTIO_BIT(NET_F_GUEST_TSO4) | VIRTIO_BIT(NET_F_GUEST_TSO6))))
		passed &= ~VIRTIO_BIT(NET_F_GUEST_ECN);
	bool many = c->pairs > 1;
	uint64_t ours = VIRTIO_BIT(NET_F_MAC) | VIRTIO_BIT(NET_F_STATUS) | (c->mtu ? VIRTIO_BIT(NET_F_MTU) : 0) | (many ? VIRTIO_BIT(NET_F_CTRL_VQ) | VIRTIO_BIT(NET_F_MQ) : 0);
	r = vhost_device_init(&n->vd, &net_ops, host, v, passed, ours, sizeof(config), 2 * c->pairs + many, 2 * c->pairs, QUEUE_SIZE, err);
	if (r < 0) {
		free(n);
		return r;
	}
	*out = &n->vd.d;
	return 0;
}
