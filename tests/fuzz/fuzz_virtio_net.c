/*
 * virtio-net under a hostile driver, in front of a wire that looks at all it gets and takes large frames apart, or of the user-mode network
 * (restricted: nothing leaves this process).
 */
#include "base/keyval.h"
#include "device/virtio/net.h"
#include "net/backend.h"
#include "net/ether.h"
#include "virtio_fuzz.h"

struct wire {
	struct net n;
	bool full;
	uint8_t frame[NET_FRAME_MAX], out[NET_FRAME_MAX];
	size_t len;
	unsigned parts;
};

struct peer {
	struct wire wire;
	struct net *user; /* NULL: the wire */
};

/* The card checked the header: what it says lies inside the frame. */
static void look(const struct net_header *h, size_t len)
{
	if ((h->flags & NET_NEEDS_CSUM && (size_t)h->csum_start + h->csum_offset + 2 > len) || h->flags & ~NET_NEEDS_CSUM || h->hdr_len > len ||
	    (h->gso_type && (!h->gso_size || !h->flags)))
		abort();
}

static void count(void *opaque, const uint8_t *frame, size_t len)
{
	struct wire *w = opaque;
	(void)frame;
	if (len > NET_FRAME_MAX || ++w->parts > NET_FRAME_MAX)
		abort();
}

static bool wire_send(struct net *n, unsigned q, const struct net_header *h, const struct iovec *iov, unsigned niov)
{
	struct wire *w = (struct wire *)n;
	if (q || w->full)
		return false;
	w->len = net_gather(w->frame, sizeof(w->frame), iov, niov);
	look(h, w->len);
	if (net_finish_checksum(h, w->frame, w->len))
		abort();
	w->parts = 0;
	net_segment(h, w->frame, w->len, w->out, count, w);
	net_fragment(w->frame, w->len, 576, w->out, count, w);
	net_whole_packet(h, w->frame, w->len);
	return true;
}

static void wire_resume(struct net *n)
{
	(void)n;
}

static const struct net_backend wire_ops = { .type = "wire", .send = wire_send, .resume = wire_resume };

static void open_net(struct vfuzz *f, const struct virtio_host *host)
{
	struct peer *p = calloc(1, sizeof(*p));
	uint8_t how = vfuzz_u8(f);
	f->opaque = p;
	net_init(&p->wire.n, &wire_ops, host->loop);
	p->wire.n.info.caps = how & 1 ? 0xff : vfuzz_u8(f);
	static struct keyval kv;
	if (how & 2 && (keyval_parse(&kv, "--net", "user,restrict", "type", NULL) || net_open(&p->user, &kv, host->loop, NULL)))
		abort();
	const struct virtio_net_config c = {
		.net = p->user ? p->user : &p->wire.n, .mac = { 2, 0, 0, 0, 0, 1 }, .queues = 1 + (how >> 2 & 3), .mtu = how & 16 ? 9000 : 0
	};
	virtio_net_create(&f->b.d, &c, host, NULL);
}

static void close_net(struct vfuzz *f)
{
	struct peer *p = f->opaque;
	net_close(p->user);
	free(p->wire.n.scratch);
	free(p);
}

/* Control queue: class and command that exist. Transmit queue: a header and the beginnings of a packet. */
static void request(struct vfuzz *f, unsigned q, uint8_t *b, unsigned len)
{
	if (q && q % 2 == 0) {
		if (len >= 2) {
			b[0] %= 7;
			b[1] %= 7;
		}
		return;
	}
	uint8_t how = vfuzz_u8(f);
	if (len < 64)
		return;
	static const uint8_t types[] = { 0, 1, 4, 5 };
	memset(b, 0, 10);
	if (how & 3) {
		b[0] = NET_NEEDS_CSUM;
		b[1] = types[how & 3];
		b[4] = vfuzz_u8(f);
		b[5] = how & 4 ? 5 : 0;
		b[6] = how & 8 ? vfuzz_u8(f) : b[1] == 4 ? 54 : 34;
		b[8] = b[1] == 5 ? 6 : 16;
	}
	uint8_t *e = b + 12;
	store_be16(e + 12, how & 16 ? ETHERTYPE_IP6 : ETHERTYPE_IP4);
	if (how & 32)
		store_be16(e + 12, 0x0806);
	if (how & 16) {
		e[14] = 0x60;
		e[20] = b[1] == 5 ? PROTO_UDP : PROTO_TCP;
	} else {
		e[14] = 0x45;
		e[23] = how & 64 ? 1 : b[1] == 5 ? PROTO_UDP : PROTO_TCP;
		store_be32(e + 30, 0x0a000202 + (how >> 7));
		if (!(how & 3)) { /* without TSO the checksum is the driver's to get right, or no stack looks further */
			uint16_t sum;
			memset(e + 24, 0, 2);
			store_be16(e + 16, (uint16_t)(len - 26));
			sum = (uint16_t)~net_checksum(e + 14, 20, 0);
			memcpy(e + 24, &sum, 2);
		}
	}
	if (len > 12 + 54 + 13)
		e[(how & 16 ? 54 : 34) + 12] = 5 << 4;
}

/* A frame comes, the wire fills or empties, the link goes. */
static void event(struct vfuzz *f)
{
	struct peer *p = f->opaque;
	struct net *n = p->user ? p->user : &p->wire.n;
	uint8_t what = vfuzz_u8(f);
	static uint8_t frame[NET_FRAME_MAX];
	size_t len = what & 0x80 ? 14 + vfuzz_u16(f) % (NET_FRAME_MAX - 14) : 14 + vfuzz_u8(f);
	struct net_header h = { .flags = what >> 4 & 3 };
	vfuzz_bytes(f, frame, 24);
	h.csum_start = vfuzz_u8(f);
	h.gso_type = what & 0x40 ? vfuzz_u8(f) : 0;
	h.gso_size = 100;
	const struct iovec iov[2] = { { frame, len / 3 }, { frame + len / 3, len - len / 3 } };
	switch (what & 7) {
	case 0:
		p->wire.full = !p->wire.full;
		if (!p->wire.full && !p->user)
			net_writable(n, 0);
		break;
	case 1:
		net_set_link(n, !net_info(n)->link);
		break;
	case 2:
		vbench_loop(&f->b, 0, NULL, NULL);
		break;
	default:
		net_deliver(n, vfuzz_u8(f), &h, iov, 2);
	}
}

const struct vfuzz_target vfuzz_target = {
	.name = "net", .open = open_net, .close = close_net, .request = request, .event = event, .features = VIRTIO_BIT(0) | VIRTIO_BIT(1) | VIRTIO_BIT(17)
};
