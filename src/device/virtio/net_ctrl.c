#include <string.h>

#include "device/virtio/net_internal.h"

/* Classes and commands (5.1.6.5). */
enum { CLASS_RX = 0, CLASS_MAC = 1, CLASS_VLAN = 2, CLASS_MQ = 4, CLASS_GUEST_OFFLOADS = 5 };
enum { RX_PROMISC = 0, RX_ALLMULTI = 1, RX_ALLUNI = 2, RX_NOMULTI = 3, RX_NOUNI = 4, RX_NOBCAST = 5 };
enum { MAC_TABLE_SET = 0, MAC_ADDR_SET = 1 };
enum { VLAN_ADD = 0, VLAN_DEL = 1 };
enum { MQ_VQ_PAIRS_SET = 0 };
enum { GUEST_OFFLOADS_SET = 0 };
enum { ACK_OK = 0, ACK_ERROR = 1 };

#define COMMANDS_A_KICK 64
#define GUEST_OFFLOADS                                                                                                                               \
	(VIRTIO_BIT(NET_F_GUEST_CSUM) | VIRTIO_BIT(NET_F_GUEST_TSO4) | VIRTIO_BIT(NET_F_GUEST_TSO6) | VIRTIO_BIT(NET_F_GUEST_USO4) |                 \
	 VIRTIO_BIT(NET_F_GUEST_USO6))

/* What follows class and command. */
struct command {
	const struct virtio_chain *chain;
	size_t at;
};

static bool take(struct command *c, void *dst, size_t len)
{
	if (virtio_chain_read(c->chain, c->at, dst, len) != len)
		return false;
	c->at += len;
	return true;
}

static bool set_rx(struct virtio_net *v, unsigned command, struct command *c)
{
	bool *const flags[] = { &v->promiscuous, &v->all_multicast, &v->all_unicast, &v->no_multicast, &v->no_unicast, &v->no_broadcast };
	uint8_t on;
	if (!virtio_has(&v->d, command <= RX_ALLMULTI ? NET_F_CTRL_RX : NET_F_CTRL_RX_EXTRA) || command >= sizeof(flags) / sizeof(flags[0]) ||
	    !take(c, &on, 1))
		return false;
	*flags[command] = on;
	return true;
}

/* A count and that many addresses. */
static bool take_macs(struct command *c, struct net_macs *macs)
{
	uint32_t n;
	if (!take(c, &n, sizeof(n)) || n > (c->chain->out_len - c->at) / 6)
		return false;
	*macs = (struct net_macs){ .overflow = n > NET_MACS };
	if (macs->overflow)
		c->at += 6 * (size_t)n;
	else
		macs->n = n;
	return take(c, macs->mac, 6 * macs->n);
}

static bool set_mac(struct virtio_net *v, unsigned command, struct command *c)
{
	if (command == MAC_ADDR_SET) {
		uint8_t mac[6];
		if (!virtio_has(&v->d, NET_F_CTRL_MAC_ADDR) || !take(c, mac, sizeof(mac)))
			return false;
		memcpy(v->regs.mac, mac, sizeof(mac));
		return true;
	}
	struct net_macs unicast, multicast;
	if (command != MAC_TABLE_SET || !virtio_has(&v->d, NET_F_CTRL_RX) || !take_macs(c, &unicast) || !take_macs(c, &multicast))
		return false;
	v->unicast = unicast;
	v->multicast = multicast;
	return true;
}

static bool set_vlan(struct virtio_net *v, unsigned command, struct command *c)
{
	uint16_t id;
	if (!virtio_has(&v->d, NET_F_CTRL_VLAN) || command > VLAN_DEL || !take(c, &id, sizeof(id)) || id >= 4096)
		return false;
	uint32_t bit = 1u << id % 32;
	if (command == VLAN_ADD)
		v->vlans[id / 32] |= bit;
	else
		v->vlans[id / 32] &= ~bit;
	return true;
}

static bool set_pairs(struct virtio_net *v, unsigned command, struct command *c)
{
	uint16_t pairs;
	if (!virtio_has(&v->d, NET_F_MQ) || command != MQ_VQ_PAIRS_SET || !take(c, &pairs, sizeof(pairs)) || !pairs || pairs > v->max_pairs)
		return false;
	v->pairs = pairs;
	memset(v->flow_pair, 0, sizeof(v->flow_pair));
	net_set_queues(v->net, pairs);
	virtio_net_retry(v);
	return true;
}

static bool set_offloads(struct virtio_net *v, unsigned command, struct command *c)
{
	uint64_t offloads;
	if (!virtio_has(&v->d, NET_F_CTRL_GUEST_OFFLOADS) || command != GUEST_OFFLOADS_SET || !take(c, &offloads, sizeof(offloads)) ||
	    offloads & ~(v->d.features & GUEST_OFFLOADS))
		return false;
	net_set_guest_offloads(v->net, virtio_net_gives(offloads));
	return true;
}

static bool serve(struct virtio_net *v, const struct virtio_chain *chain)
{
	uint8_t head[2]; /* class, command */
	struct command c = { chain, 0 };
	if (!take(&c, head, sizeof(head)))
		return false;
	switch (head[0]) {
	case CLASS_RX:
		return set_rx(v, head[1], &c);
	case CLASS_MAC:
		return set_mac(v, head[1], &c);
	case CLASS_VLAN:
		return set_vlan(v, head[1], &c);
	case CLASS_MQ:
		return set_pairs(v, head[1], &c);
	case CLASS_GUEST_OFFLOADS:
		return set_offloads(v, head[1], &c);
	}
	return false;
}

void virtio_net_control(struct virtio_net *v, struct virtio_queue *queue)
{
	struct virtio_chain *c;
	/* Drivers wait for one answer at a time, so a kick brings one; more than this in one go, the next kick serves. */
	for (unsigned n = 0; n < COMMANDS_A_KICK && (c = virtq_pop(queue)); n++) {
		if (!c->in_len) {
			virtio_broken(&v->d, "a control command without room for its answer");
			virtq_drop(c);
			return;
		}
		uint8_t ack = serve(v, c) ? ACK_OK : ACK_ERROR;
		virtio_chain_write(c, 0, &ack, 1);
		virtq_push(queue, c, 1);
		virtq_notify(queue);
		virtq_want_notify(queue);
	}
}

void virtio_net_filter_reset(struct virtio_net *v)
{
	/* A driver that sets no filter sees everything. */
	v->promiscuous = true;
	v->all_multicast = v->all_unicast = v->no_multicast = v->no_unicast = v->no_broadcast = false;
	v->unicast.n = v->multicast.n = 0;
	v->unicast.overflow = v->multicast.overflow = false;
	memset(v->vlans, 0, sizeof(v->vlans));
}

static bool has_mac(const struct net_macs *macs, const uint8_t *mac)
{
	for (unsigned i = 0; i < macs->n; i++) {
		if (!memcmp(macs->mac[i], mac, 6))
			return true;
	}
	return macs->overflow;
}

bool virtio_net_filter(const struct virtio_net *v, const uint8_t *head, size_t len)
{
	static const uint8_t broadcast[6] = { 0xff, 0xff, 0xff, 0xff, 0xff, 0xff };
	if (len >= 16 && head[12] == 0x81 && head[13] == 0 && virtio_has(&v->d, NET_F_CTRL_VLAN)) {
		unsigned id = (head[14] & 15u) << 8 | head[15];
		if (!(v->vlans[id / 32] >> id % 32 & 1))
			return false;
	}
	if (v->promiscuous)
		return true;
	if (!memcmp(head, broadcast, 6))
		return !v->no_broadcast;
	if (head[0] & 1)
		return !v->no_multicast && (v->all_multicast || has_mac(&v->multicast, head));
	return !v->no_unicast && (v->all_unicast || !memcmp(head, v->regs.mac, 6) || has_mac(&v->unicast, head));
}
