#include "device/virtio/net.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/error.h"
#include "base/log.h"
#include "device/virtio/net_internal.h"

#define RX_SIZE 256
#define TX_SIZE 256
#define CTRL_SIZE 64
#define ETHER_HEADER 14
#define TX_INTERRUPT_NS 500000 /* at most so late, see finish_batch */
#define TX_A_ROUND (2 * TX_SIZE) /* frames of one queue; then others get the device lock */

/* --- offloads: the same thing in the card's bits and in the backend's --- */

static const struct {
	uint8_t feature;
	unsigned cap;
} can[] = {
	{ NET_F_HOST_TSO4, NET_CAN_TSO4 },
	{ NET_F_HOST_TSO6, NET_CAN_TSO6 },
	{ NET_F_HOST_USO, NET_CAN_USO },
}, gives[] = {
	{ NET_F_GUEST_TSO4, NET_GIVES_TSO4 },
	{ NET_F_GUEST_TSO6, NET_GIVES_TSO6 },
	{ NET_F_GUEST_USO4, NET_GIVES_USO },
	{ NET_F_GUEST_USO6, NET_GIVES_USO },
};

unsigned virtio_net_gives(uint64_t features)
{
	unsigned caps = features & VIRTIO_BIT(NET_F_GUEST_CSUM) ? NET_GIVES_CSUM : 0;
	uint64_t uso = VIRTIO_BIT(NET_F_GUEST_USO4) | VIRTIO_BIT(NET_F_GUEST_USO6);
	if (features & VIRTIO_BIT(NET_F_GUEST_TSO4))
		caps |= NET_GIVES_TSO4;
	if (features & VIRTIO_BIT(NET_F_GUEST_TSO6))
		caps |= NET_GIVES_TSO6;
	if ((features & uso) == uso) /* the backend knows no difference */
		caps |= NET_GIVES_USO;
	return caps;
}

static uint64_t offer(const struct virtio_net *v, const struct net_info *info)
{
	uint64_t f = VIRTIO_BIT(NET_F_CSUM) | VIRTIO_BIT(NET_F_GUEST_CSUM) | VIRTIO_BIT(NET_F_MAC) | VIRTIO_BIT(NET_F_MRG_RXBUF) |
		     VIRTIO_BIT(NET_F_STATUS) | VIRTIO_BIT(NET_F_CTRL_VQ) | VIRTIO_BIT(NET_F_CTRL_RX) | VIRTIO_BIT(NET_F_CTRL_RX_EXTRA) |
		     VIRTIO_BIT(NET_F_CTRL_VLAN) | VIRTIO_BIT(NET_F_CTRL_MAC_ADDR) | VIRTIO_BIT(NET_F_CTRL_GUEST_OFFLOADS);
	for (unsigned i = 0; i < sizeof(can) / sizeof(can[0]); i++) {
		if (info->caps & can[i].cap)
			f |= VIRTIO_BIT(can[i].feature);
	}
	for (unsigned i = 0; i < sizeof(gives) / sizeof(gives[0]); i++) {
		if (info->caps & gives[i].cap)
			f |= VIRTIO_BIT(gives[i].feature);
	}
	if (v->max_pairs > 1)
		f |= VIRTIO_BIT(NET_F_MQ);
	if (v->regs.mtu)
		f |= VIRTIO_BIT(NET_F_MTU);
	return f;
}

/* What each feature needs besides (5.1.3.1). */
static int net_features(struct virtio_device *d)
{
	static const struct {
		uint8_t feature, needs;
	} rules[] = {
		{ NET_F_HOST_TSO4, NET_F_CSUM },
		{ NET_F_HOST_TSO6, NET_F_CSUM },
		{ NET_F_HOST_USO, NET_F_CSUM },
		{ NET_F_GUEST_TSO4, NET_F_GUEST_CSUM },
		{ NET_F_GUEST_TSO6, NET_F_GUEST_CSUM },
		{ NET_F_GUEST_USO4, NET_F_GUEST_CSUM },
		{ NET_F_GUEST_USO6, NET_F_GUEST_CSUM },
		{ NET_F_CTRL_RX, NET_F_CTRL_VQ },
		{ NET_F_CTRL_RX_EXTRA, NET_F_CTRL_VQ },
		{ NET_F_CTRL_VLAN, NET_F_CTRL_VQ },
		{ NET_F_CTRL_MAC_ADDR, NET_F_CTRL_VQ },
		{ NET_F_CTRL_GUEST_OFFLOADS, NET_F_CTRL_VQ },
		{ NET_F_MQ, NET_F_CTRL_VQ },
	};
	for (unsigned i = 0; i < sizeof(rules) / sizeof(rules[0]); i++) {
		if (virtio_has(d, rules[i].feature) && !virtio_has(d, rules[i].needs))
			return -EINVAL;
	}
	return 0;
}

/* --- transmission --- */

/* A header as the driver may write it (5.1.6.2.1), with what the device ignores taken out. All that follows trusts it. */
static bool check_header(const struct virtio_net *v, struct net_header *h, size_t len)
{
	h->flags &= NET_NEEDS_CSUM;
	h->num_buffers = 0;
	if (len < ETHER_HEADER || len > NET_FRAME_MAX)
		return false;
	if (h->flags && (!virtio_has(&v->d, NET_F_CSUM) || (size_t)h->csum_start + h->csum_offset + 2 > len))
		return false;
	if (h->gso_type == NET_GSO_NONE) {
		h->hdr_len = h->gso_size = 0;
		return true;
	}
	if (!h->flags || !h->gso_size)
		return false;
	if (h->hdr_len > len)
		h->hdr_len = (uint16_t)len; /* a hint */
	switch (h->gso_type) {
	case NET_GSO_TCP4:
		return virtio_has(&v->d, NET_F_HOST_TSO4);
	case NET_GSO_TCP6:
		return virtio_has(&v->d, NET_F_HOST_TSO6);
	case NET_GSO_UDP_L4:
		return virtio_has(&v->d, NET_F_HOST_USO);
	}
	return false;
}

/* One frame. False: the backend is full. */
static bool transmit(struct virtio_net *v, unsigned pair, const struct virtio_chain *c)
{
	struct net_header h;
	size_t len = c->out_len - sizeof(h);
	virtio_chain_read(c, 0, &h, sizeof(h));
	int n = iov_slice(c->iov, c->nout, sizeof(h), len, v->iov, sizeof(v->iov) / sizeof(v->iov[0]));
	if (n < 0 || !check_header(v, &h, len)) {
		v->tx_bad++;
		log_warn_once(v->said_header, "%s: the guest sent a frame whose header is not possible; such frames are dropped", v->d.name);
		return true;
	}
	virtio_net_note_flow(v, pair, v->iov, (unsigned)n);
	return net_send(v->net, pair, &h, v->iov, (unsigned)n);
}

/*
 * Frames were sent, and used buffers are to be told. If the backend answered at once, the guest gets an interrupt for what it received, and drivers
 * clean up their transmit queue there too: the second interrupt waits, and mostly turns out to be not wanted any more.
 */
static void finish_batch(struct virtio_net *v, struct virtio_queue *queue, bool answered)
{
	if (!answered) {
		virtq_notify(queue);
		return;
	}
	if (v->tx_interrupt_armed)
		return;
	v->tx_interrupt_armed = true;
	vtimer_arm(&v->tx_interrupt, clock_ns() + TX_INTERRUPT_NS);
}

static void on_tx_interrupt(void *opaque)
{
	struct virtio_net *v = opaque;
	v->tx_interrupt_armed = false;
	for (unsigned i = 0; i < v->max_pairs; i++)
		virtq_notify(virtio_queue(&v->d, net_tx_queue(i)));
}

static void transmit_queue(struct virtio_net *v, unsigned pair)
{
	struct virtio_queue *queue = virtio_queue(&v->d, net_tx_queue(pair));
	unsigned round = 0;
	uint64_t interrupts = v->d.interrupts;
	if (v->tx_waits[pair])
		return;
	do {
		unsigned before = round;
		virtq_no_notify(queue);
		struct virtio_chain *c;
		while (round < TX_A_ROUND && (c = virtq_pop(queue))) {
			if (c->out_len < sizeof(struct net_header)) {
				virtio_broken(&v->d, "a frame of %llu bytes has no room for the header", (unsigned long long)c->out_len);
				virtq_drop(c);
				net_flush(v->net);
				return;
			}
			if (!transmit(v, pair, c)) {
				v->tx_waits[pair] = true;
				virtq_unpop(queue, c);
				break;
			}
			virtq_push(queue, c, 0);
			round++;
		}
		if (round != before)
			net_flush(v->net);
		finish_batch(v, queue, v->d.interrupts != interrupts);
		if (v->tx_waits[pair])
			return;
		if (round >= TX_A_ROUND) {
			vtimer_arm(&v->again, clock_ns());
			return;
		}
	} while (virtq_want_notify(queue));
}

static void on_again(void *opaque)
{
	struct virtio_net *v = opaque;
	if (!virtio_is_live(&v->d))
		return;
	for (unsigned i = 0; i < v->max_pairs; i++)
		transmit_queue(v, i);
}

static void on_writable(void *opaque, unsigned pair)
{
	struct virtio_net *v = opaque;
	/* One queue of the backend may serve several of ours. */
	for (unsigned i = 0; i < v->max_pairs; i++) {
		if (!v->tx_waits[i] || i % net_info(v->net)->queues != pair)
			continue;
		v->tx_waits[i] = false;
		transmit_queue(v, i);
	}
}

/* --- life --- */

static void on_link(void *opaque, bool up)
{
	struct virtio_net *v = opaque;
	v->regs.status = up ? NET_S_LINK_UP : 0;
	virtio_config_changed(&v->d);
}

static const struct net_client client = {
	.receive = virtio_net_receive,
	.writable = on_writable,
	.link = on_link,
};

void virtio_net_retry(struct virtio_net *v)
{
	if (!v->rx_waits)
		return;
	v->rx_waits = false;
	net_resume(v->net);
}

static void net_notify(struct virtio_device *d, unsigned q)
{
	struct virtio_net *v = net_of(d);
	if (q == net_ctrl_queue(v) && virtio_has(d, NET_F_CTRL_VQ)) {
		virtio_net_control(v, virtio_queue(d, q));
		return;
	}
	if (q >= 2 * v->max_pairs)
		return;
	if (q % 2) {
		transmit_queue(v, q / 2);
		return;
	}
	virtq_no_notify(virtio_queue(d, q));
	virtio_net_retry(v);
}

static void net_start(struct virtio_device *d)
{
	struct virtio_net *v = net_of(d);
	v->mergeable = virtio_has(d, NET_F_MRG_RXBUF);
	for (unsigned i = 0; i < v->max_pairs; i++)
		virtq_no_notify(virtio_queue(d, net_rx_queue(i)));
	net_set_client(v->net, &client, v);
	net_set_guest_offloads(v->net, virtio_net_gives(d->features));
	net_set_guest_mtu(v->net, virtio_has(d, NET_F_MTU) ? v->regs.mtu : NET_DEFAULT_MTU);
}

/* No chain is kept over a call, so there is nothing to wait for. */
static bool net_reset(struct virtio_device *d)
{
	struct virtio_net *v = net_of(d);
	net_set_client(v->net, NULL, NULL);
	vtimer_cancel(&v->again);
	vtimer_cancel(&v->tx_interrupt);
	virtio_net_filter_reset(v);
	memcpy(v->regs.mac, v->mac, sizeof(v->mac));
	memset(v->tx_waits, 0, sizeof(v->tx_waits));
	memset(v->flow_pair, 0, sizeof(v->flow_pair));
	v->tx_interrupt_armed = false;
	v->rx_waits = v->said_header = v->said_small = false;
	v->pairs = 1;
	return true;
}

static bool net_queue_reset(struct virtio_device *d, unsigned q)
{
	struct virtio_net *v = net_of(d);
	if (q >= 2 * v->max_pairs)
		return true;
	if (q % 2)
		v->tx_waits[q / 2] = false;
	else
		virtio_net_retry(v);
	return true;
}

static void net_config_read(struct virtio_device *d)
{
	struct virtio_net *v = net_of(d);
	v->regs.status = net_info(v->net)->link ? NET_S_LINK_UP : 0;
}

static void net_destroy(struct virtio_device *d)
{
	struct virtio_net *v = net_of(d);
	net_set_client(v->net, NULL, NULL);
	vtimer_cancel(&v->again);
	vtimer_cancel(&v->tx_interrupt);
	virtio_fini(d);
	free(v);
}

static void net_stats(struct virtio_device *d, char *text, size_t room)
{
	struct virtio_net *v = net_of(d);
	struct net_stats s;
	net_get_stats(v->net, &s);
	size_t used = strlen(text);
	if (used >= room)
		return;
	snprintf(text + used, room - used,
		 "backend %s\ntx_frames %" PRIu64 "\ntx_bytes %" PRIu64 "\ntx_dropped %" PRIu64 "\nrx_frames %" PRIu64 "\nrx_bytes %" PRIu64
		 "\nrx_dropped %" PRIu64 "\n",
		 net_describe(v->net), s.tx_frames, s.tx_bytes, s.tx_dropped + v->tx_bad, s.rx_frames, s.rx_bytes,
		 s.rx_dropped + v->rx_filtered + v->rx_large);
}

static const struct virtio_ops net_ops = {
	.name = "virtio-net",
	.id = VIRTIO_ID_NET,
	.in_order = true,
	.config_read = net_config_read,
	.features = net_features,
	.start = net_start,
	.notify = net_notify,
	.reset = net_reset,
	.queue_reset = net_queue_reset,
	.destroy = net_destroy,
	.stats = net_stats,
};

int virtio_net_create(struct virtio_device **out, const struct virtio_net_config *c, const struct virtio_host *host, struct error *err)
{
	struct virtio_net *v = calloc(1, sizeof(*v));
	if (!v)
		return error_set(err, ENOMEM, "%s: out of memory", host->name);
	const struct net_info *info = net_info(c->net);
	v->net = c->net;
	v->max_pairs = c->queues < 1 ? 1 : c->queues > VIRTIO_NET_MAX_PAIRS ? VIRTIO_NET_MAX_PAIRS : c->queues;
	v->pairs = 1;
	memcpy(v->mac, c->mac, sizeof(v->mac));
	memcpy(v->regs.mac, c->mac, sizeof(v->mac));
	v->regs.max_pairs = (uint16_t)v->max_pairs;
	v->regs.mtu = c->mtu ? c->mtu : info->mtu;
	v->regs.status = info->link ? NET_S_LINK_UP : 0;
	virtio_net_filter_reset(v);
	vtimer_init(&v->again, host->loop, on_again, v);
	vtimer_init(&v->tx_interrupt, host->loop, on_tx_interrupt, v);

	uint16_t sizes[2 * VIRTIO_NET_MAX_PAIRS + 1];
	unsigned n = 2 * v->max_pairs;
	for (unsigned i = 0; i < n; i++)
		sizes[i] = i % 2 ? TX_SIZE : RX_SIZE;
	sizes[n] = CTRL_SIZE;
	int r = virtio_init(&v->d, &net_ops, host, offer(v, info), &v->regs, sizeof(v->regs), n + 1, sizes, err);
	if (r) {
		free(v);
		return r;
	}
	*out = &v->d;
	return 0;
}
