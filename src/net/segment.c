#include <errno.h>
#include <string.h>

#include "net/backend.h"
#include "net/ether.h"

/* Where a frame's headers are; all of them are inside it. */
struct layout {
	size_t ip, l4, payload;
	bool v6;
	uint8_t proto;
};

/* Find TCP or UDP. IPv6 extension headers are walked as far as they lie in the frame (RFC 8200 4). */
static int parse(const uint8_t *f, size_t len, struct layout *l)
{
	size_t type = 12;
	if (len < ETHER_HEADER)
		return -EINVAL;
	if (load_be16(f + type) == ETHERTYPE_VLAN)
		type += ETHER_VLAN_TAG;
	*l = (struct layout){ .ip = type + 2 };
	if (l->ip + IP4_HEADER > len)
		return -EINVAL;
	const uint8_t *ip = f + l->ip;
	switch (load_be16(f + type)) {
	case ETHERTYPE_IP4:
		if (ip[0] >> 4 != 4 || (ip[0] & 15) < 5)
			return -EINVAL;
		l->l4 = l->ip + (size_t)(ip[0] & 15) * 4;
		l->proto = ip[9];
		break;
	case ETHERTYPE_IP6:
		if (l->ip + IP6_HEADER > len)
			return -EINVAL;
		l->v6 = true;
		l->l4 = l->ip + IP6_HEADER;
		l->proto = ip[6];
		while (l->proto == 0 || l->proto == 43 || l->proto == 60) { /* hop-by-hop, routing, destination */
			if (l->l4 + 8 > len)
				return -EINVAL;
			l->proto = f[l->l4];
			l->l4 += 8 + (size_t)f[l->l4 + 1] * 8;
		}
		break;
	default:
		return -EINVAL;
	}
	size_t header = l->proto == PROTO_TCP ? 20 : 8;
	if ((l->proto != PROTO_TCP && l->proto != PROTO_UDP) || l->l4 + header > len)
		return -EINVAL;
	if (l->proto == PROTO_TCP)
		header = (size_t)(f[l->l4 + 12] >> 4) * 4;
	l->payload = l->l4 + header;
	return header >= 8 && (l->proto != PROTO_TCP || header >= 20) && l->payload <= len ? 0 : -EINVAL;
}

/* The pseudo-header's sum (RFC 793 3.1, RFC 8200 8.1). */
static uint32_t pseudo_sum(const uint8_t *f, size_t len, const struct layout *l)
{
	uint32_t sum = (uint32_t)(l->proto << 8) + __builtin_bswap16((uint16_t)(len - l->l4));
	return l->v6 ? net_checksum(f + l->ip + 8, 32, sum) : net_checksum(f + l->ip + 12, 8, sum);
}

static void complete_ip4(uint8_t *ip, size_t header_len, size_t len)
{
	store_be16(ip + 2, (uint16_t)len);
	memset(ip + 10, 0, 2);
	uint16_t sum = (uint16_t)~net_checksum(ip, header_len, 0);
	memcpy(ip + 10, &sum, 2);
}

static size_t checksum_offset(const struct layout *l)
{
	return l->proto == PROTO_TCP ? 16 : 6;
}

/* Write the lengths and all checksums of a packet of `len` bytes. */
static void complete(uint8_t *f, size_t len, const struct layout *l)
{
	uint8_t *ip = f + l->ip, *l4 = f + l->l4;
	size_t l4_len = len - l->l4;
	if (l->v6)
		store_be16(ip + 4, (uint16_t)(len - l->ip - IP6_HEADER));
	else
		complete_ip4(ip, l->l4 - l->ip, len - l->ip);
	uint32_t pseudo = pseudo_sum(f, len, l);
	uint8_t *field = l4 + checksum_offset(l);
	if (l->proto == PROTO_UDP)
		store_be16(l4 + 4, (uint16_t)l4_len);
	memset(field, 0, 2);
	uint16_t sum = (uint16_t)~net_checksum(l4, l4_len, pseudo);
	if (!sum)
		sum = 0xffff;
	memcpy(field, &sum, 2);
}

/* What a frame's header says against what is in it. */
static int parse_gso(const struct net_header *h, const uint8_t *frame, size_t len, struct layout *l)
{
	int r = parse(frame, len, l);
	if (r)
		return r;
	switch (h->gso_type & ~NET_GSO_ECN) {
	case NET_GSO_TCP4:
		return l->proto == PROTO_TCP && !l->v6 ? 0 : -EINVAL;
	case NET_GSO_TCP6:
		return l->proto == PROTO_TCP && l->v6 ? 0 : -EINVAL;
	case NET_GSO_UDP_L4:
		return l->proto == PROTO_UDP ? 0 : -EINVAL;
	}
	return -EINVAL;
}

int net_whole_packet(const struct net_header *h, uint8_t *frame, size_t len)
{
	struct layout l;
	if (parse_gso(h, frame, len, &l) || l.proto != PROTO_TCP)
		return -EINVAL;
	if (len - l.ip - (l.v6 ? IP6_HEADER : 0) > UINT16_MAX)
		return -EINVAL;
	complete(frame, len, &l);
	return 0;
}

/* Linux makes at most some 750 (64 KiB by its smallest segment, TCP_MIN_MSS): a single frame shall not keep us busy for long. */
#define SEGMENTS_MAX 1024

int net_segment(const struct net_header *h, const uint8_t *frame, size_t len, uint8_t *out, void (*fn)(void *opaque, const uint8_t *frame, size_t len),
		void *opaque)
{
	struct layout l;
	if (len > NET_FRAME_MAX || !h->gso_size || parse_gso(h, frame, len, &l) || l.payload == len)
		return -EINVAL;
	if (l.payload - l.ip + h->gso_size > UINT16_MAX || (len - l.payload) / h->gso_size >= SEGMENTS_MAX)
		return -EINVAL;

	uint32_t seq = l.proto == PROTO_TCP ? load_be32(frame + l.l4 + 4) : 0;
	uint16_t id = l.v6 ? 0 : load_be16(frame + l.ip + 4);
	uint8_t flags = l.proto == PROTO_TCP ? frame[l.l4 + 13] : 0;
	memcpy(out, frame, l.payload);
	for (size_t at = l.payload; at < len; at += h->gso_size) {
		size_t n = len - at < h->gso_size ? len - at : h->gso_size;
		memcpy(out + l.payload, frame + at, n);
		if (!l.v6)
			store_be16(out + l.ip + 4, id++);
		if (l.proto == PROTO_TCP) {
			/* FIN and PSH belong to the last segment, CWR to the first (RFC 3168 6.1.2). */
			uint8_t f = flags;
			if (at + n < len)
				f &= (uint8_t)~(TCP_FIN | TCP_PSH);
			if (at > l.payload)
				f &= (uint8_t)~TCP_CWR;
			out[l.l4 + 13] = f;
			store_be32(out + l.l4 + 4, seq);
			seq += (uint32_t)n;
		}
		complete(out, l.payload + n, &l);
		fn(opaque, out, l.payload + n);
	}
	return 0;
}

int net_large_frame(struct net_header *h, uint16_t *sum, const uint8_t *frame, size_t len, uint16_t mtu)
{
	struct layout l;
	if (parse(frame, len, &l) || l.proto != PROTO_TCP || l.payload - l.ip >= mtu)
		return -EINVAL;
	*h = (struct net_header){
		.flags = NET_NEEDS_CSUM,
		.gso_type = l.v6 ? NET_GSO_TCP6 : NET_GSO_TCP4,
		.hdr_len = (uint16_t)l.payload,
		.gso_size = (uint16_t)(mtu - (l.payload - l.ip)),
		.csum_start = (uint16_t)l.l4,
		.csum_offset = (uint16_t)checksum_offset(&l),
	};
	*sum = (uint16_t)pseudo_sum(frame, len, &l);
	return 0;
}

#define IP4_DF 0x4000
#define IP4_MF 0x2000
#define IP4_OFFSET 0x1fff /* in units of 8 bytes */

int net_fragment(const uint8_t *frame, size_t len, uint16_t mtu, uint8_t *out, void (*fn)(void *opaque, const uint8_t *frame, size_t len), void *opaque)
{
	const uint8_t *ip = frame + ETHER_HEADER;
	if (len > NET_FRAME_MAX || len < ETHER_HEADER + IP4_HEADER || load_be16(frame + 12) != ETHERTYPE_IP4)
		return -EINVAL;
	size_t header = (ip[0] & 15u) * 4, total = load_be16(ip + 2);
	/* Options would have to be sorted into those to copy and those not; nobody here sends them. */
	if (header != IP4_HEADER || total < header || ETHER_HEADER + total > len || mtu < header + 8)
		return -EINVAL;
	unsigned where = load_be16(ip + 6);
	size_t room = (mtu - header) / 8 * 8;
	if (where & IP4_DF || (where & IP4_OFFSET) * 8 + total > UINT16_MAX)
		return -EINVAL;
	memcpy(out, frame, ETHER_HEADER + header);
	for (size_t at = header; at < total; at += room) {
		size_t n = total - at < room ? total - at : room;
		bool more = where & IP4_MF || at + n < total;
		memcpy(out + ETHER_HEADER + header, ip + at, n);
		store_be16(out + ETHER_HEADER + 6, (uint16_t)((where & IP4_OFFSET) + (at - header) / 8 + (more ? IP4_MF : 0)));
		complete_ip4(out + ETHER_HEADER, header, header + n);
		fn(opaque, out, ETHER_HEADER + header + n);
	}
	return 0;
}
