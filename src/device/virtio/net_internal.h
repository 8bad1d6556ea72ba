/*
 * What the network card's files share: net.c (configuration, features, transmission, life), net_rx.c (reception), net_ctrl.c (the control queue and
 * the filters it sets), net_config.c (--net). Device lock held.
 */
#ifndef TRAPLINE_DEVICE_VIRTIO_NET_INTERNAL_H
#define TRAPLINE_DEVICE_VIRTIO_NET_INTERNAL_H

#include "device/virtio/net.h"
#include "device/virtio/virtio.h"
#include "net/net.h"

/* Feature bits (5.1.3; USO: virtio 1.3). */
enum {
	NET_F_CSUM = 0,
	NET_F_GUEST_CSUM = 1,
	NET_F_CTRL_GUEST_OFFLOADS = 2,
	NET_F_MTU = 3,
	NET_F_MAC = 5,
	NET_F_GUEST_TSO4 = 7,
	NET_F_GUEST_TSO6 = 8,
	NET_F_HOST_TSO4 = 11,
	NET_F_HOST_TSO6 = 12,
	NET_F_MRG_RXBUF = 15,
	NET_F_STATUS = 16,
	NET_F_CTRL_VQ = 17,
	NET_F_CTRL_RX = 18,
	NET_F_CTRL_VLAN = 19,
	NET_F_CTRL_RX_EXTRA = 20,
	NET_F_MQ = 22,
	NET_F_CTRL_MAC_ADDR = 23,
	NET_F_GUEST_USO4 = 54,
	NET_F_GUEST_USO6 = 55,
	NET_F_HOST_USO = 56,
};

#define NET_S_LINK_UP 1

struct virtio_net_regs { /* 5.1.4 */
	uint8_t mac[6];
	uint16_t status;
	uint16_t max_pairs;
	uint16_t mtu;
} __attribute__((packed));

#define NET_MACS 32	/* of a filter; more turn it off */
#define NET_FLOWS 256	/* remembered; a power of two */
#define NET_BUFFERS 128 /* mergeable buffers of one frame, at most */

struct net_macs {
	unsigned n;
	bool overflow; /* there were more: let all of this sort pass */
	uint8_t mac[NET_MACS][6];
};

struct virtio_net {
	struct virtio_device d;
	struct net *net;
	struct virtio_net_regs regs;
	uint8_t mac[6]; /* as configured: what a reset goes back to */
	unsigned max_pairs, pairs;
	bool tx_waits[VIRTIO_NET_MAX_PAIRS]; /* for the backend to take frames again */
	bool rx_waits;			     /* the backend holds frames for us */
	bool mergeable;
	bool said_header, said_small;
	struct vtimer again;	    /* rest of a transmit queue that never ends */
	struct vtimer tx_interrupt; /* one that was put off */
	bool tx_interrupt_armed;
	uint64_t tx_bad, rx_filtered, rx_large;

	/* Receive filters (5.1.6.5.1, .2, .3). */
	bool promiscuous, all_multicast, all_unicast, no_multicast, no_unicast, no_broadcast;
	struct net_macs unicast, multicast;
	uint32_t vlans[4096 / 32];

	/* Of a flow's last transmission: where its answers go, when the backend does not tell pairs apart. */
	uint8_t flow_pair[NET_FLOWS];

	struct iovec iov[VIRTIO_QUEUE_MAX + 1];
};

static inline struct virtio_net *net_of(struct virtio_device *d)
{
	return (struct virtio_net *)d; /* the first member */
}

static inline unsigned net_rx_queue(unsigned pair)
{
	return 2 * pair;
}

static inline unsigned net_tx_queue(unsigned pair)
{
	return 2 * pair + 1;
}

/* Which queue is the control queue depends on what was agreed on (5.1.2). */
static inline unsigned net_ctrl_queue(const struct virtio_net *v)
{
	return 2 * (virtio_has(&v->d, NET_F_MQ) ? v->max_pairs : 1);
}

/* net_rx.c: struct net_client.receive; note where a flow was sent from. */
bool virtio_net_receive(void *opaque, unsigned pair, const struct net_header *h, const struct iovec *iov, unsigned niov);
void virtio_net_note_flow(struct virtio_net *v, unsigned pair, const struct iovec *iov, unsigned niov);

/* net_ctrl.c: serve the control queue; back to how a card powers up; may this frame pass? `head`: its first 18 bytes, as far as there are. */
void virtio_net_control(struct virtio_net *v, struct virtio_queue *queue);
void virtio_net_filter_reset(struct virtio_net *v);
bool virtio_net_filter(const struct virtio_net *v, const uint8_t *head, size_t len);

/* net.c: a frame that waits for room may go elsewhere now, or nowhere: the kick that it waits for may never come. */
void virtio_net_retry(struct virtio_net *v);

/* net.c: NET_GIVES_ bits for a set of guest offload feature bits. */
unsigned virtio_net_gives(uint64_t features);

#endif
