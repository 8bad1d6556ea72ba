#include <string.h>

#include "base/log.h"
#include "device/virtio/net_internal.h"

#define HEAD 64 /* what filters and flows look at */

/* --- flows: a backend with one queue leaves it to us which pair a frame goes to. Answers go where the flow was last sent from, so that the
 * processor that works for it stays the same. --- */

static size_t head_of(uint8_t *head, const struct iovec *iov, unsigned niov)
{
	size_t len = 0;
	for (unsigned i = 0; i < niov && len < HEAD; i++) {
		size_t n = iov[i].iov_len < HEAD - len ? iov[i].iov_len : HEAD - len;
		memcpy(head + len, iov[i].iov_base, n);
		len += n;
	}
	return len;
}

/* A number that both directions of a flow share, or -1: addresses and ports, added up. */
static int flow_of(const uint8_t *head, size_t len)
{
	size_t at, n;
	if (len < HEAD)
		return -1;
	if (head[12] == 0x08 && head[13] == 0x00 && (head[23] == 6 || head[23] == 17) && head[14] == 0x45) {
		at = 26;
		n = 8 + 4;
	} else if (head[12] == 0x86 && head[13] == 0xdd && (head[20] == 6 || head[20] == 17)) {
		at = 22;
		n = 32 + 4;
	} else {
		return -1;
	}
	uint32_t sum = 0;
	for (size_t i = 0; i < n; i += 2)
		sum += (uint32_t)(head[at + i] << 8 | head[at + i + 1]);
	return (int)((sum * 0x9e3779b1u) >> 24) % NET_FLOWS;
}

static bool steers(const struct virtio_net *v)
{
	return v->pairs > 1 && net_info(v->net)->queues == 1;
}

void virtio_net_note_flow(struct virtio_net *v, unsigned pair, const struct iovec *iov, unsigned niov)
{
	if (!steers(v))
		return;
	uint8_t head[HEAD];
	int flow = flow_of(head, head_of(head, iov, niov));
	if (flow >= 0)
		v->flow_pair[flow] = (uint8_t)pair;
}

/* --- buffers --- */

/* Copy the next `len` bytes of a frame, from *part and *at on, into a chain from byte `skip` on. */
static void fill(const struct virtio_chain *c, size_t skip, const struct iovec *iov, unsigned *part, size_t *at, size_t len)
{
	while (len) {
		size_t n = iov[*part].iov_len - *at < len ? iov[*part].iov_len - *at : len;
		virtio_chain_write(c, skip, (const uint8_t *)iov[*part].iov_base + *at, n);
		skip += n;
		len -= n;
		*at += n;
		if (*at == iov[*part].iov_len) {
			++*part;
			*at = 0;
		}
	}
}

/*
 * Take chains with room for `need` bytes: how many; 0: too few for now, a kick will follow; -1: the frame will never fit.
 * Asking for the kick comes before putting chains back: it is to come for buffers behind those that were too few.
 */
static int take_buffers(struct virtio_net *v, struct virtio_queue *queue, size_t need, struct virtio_chain **chain, uint64_t *room)
{
	unsigned n = 0;
	size_t total = 0;
	int result = 0;
	while (total < need) {
		struct virtio_chain *c = virtq_pop(queue);
		if (!c && virtq_want_notify(queue))
			c = virtq_pop(queue);
		if (!c) {
			v->rx_waits = true;
			break;
		}
		chain[n] = c;
		room[n++] = c->in_len;
		total += c->in_len;
		if (total < need && n == (v->mergeable ? NET_BUFFERS : 1)) {
			result = -1;
			break;
		}
	}
	if (total >= need)
		return (int)n;
	while (n)
		virtq_unpop(queue, chain[--n]);
	return result;
}

bool virtio_net_receive(void *opaque, unsigned pair, const struct net_header *h, const struct iovec *iov, unsigned niov)
{
	struct virtio_net *v = opaque;
	uint8_t head[HEAD];
	size_t head_len = head_of(head, iov, niov), need = sizeof(struct net_header);
	for (unsigned i = 0; i < niov; i++)
		need += iov[i].iov_len;
	if (!virtio_net_filter(v, head, head_len)) {
		v->rx_filtered++;
		return true;
	}
	if (steers(v)) {
		int flow = flow_of(head, head_len);
		pair = flow < 0 ? 0 : v->flow_pair[flow];
	}
	struct virtio_queue *queue = virtio_queue(&v->d, net_rx_queue(pair));
	if (pair >= v->pairs || !virtq_ready(queue))
		return true; /* a driver that resets its queue wants no frames */

	struct virtio_chain *chain[NET_BUFFERS];
	uint64_t written[NET_BUFFERS];
	int n = take_buffers(v, queue, need, chain, written);
	if (n < 0) {
		v->rx_large++;
		log_warn_once(v->said_small, "%s: the guest's receive buffers are too small for a frame of %zu bytes; such frames are dropped", v->d.name,
			      need - sizeof(struct net_header));
		return true;
	}
	if (!n)
		return false;
	if (written[0] < sizeof(struct net_header)) { /* 5.1.6.3.1 */
		virtio_broken(&v->d, "a receive buffer of %llu bytes has no room for the header", (unsigned long long)written[0]);
		for (int i = 0; i < n; i++)
			virtq_drop(chain[i]);
		return true;
	}

	struct net_header header = *h;
	header.num_buffers = (uint16_t)n;
	virtio_chain_write(chain[0], 0, &header, sizeof(header));
	unsigned part = 0;
	size_t at = 0, skip = sizeof(header), left = need - sizeof(header);
	for (int i = 0; i < n; i++) {
		size_t len = written[i] - skip < left ? written[i] - skip : left;
		fill(chain[i], skip, iov, &part, &at, len);
		written[i] = skip + len;
		left -= len;
		skip = 0;
	}
	virtq_push_all(queue, chain, written, (unsigned)n);
	virtq_notify(queue);
	return true;
}
