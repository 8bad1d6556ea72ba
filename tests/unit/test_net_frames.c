/* Checksums and segmentation against a sum computed the slow way (RFC 1071), and headers that lie. */
#include <errno.h>
#include <stdlib.h>

#include "devtest.h"
#include "net/backend.h"
#include "net/ether.h"
#include "net/reassembly.h"

static uint16_t slow_sum(const uint8_t *p, size_t len, uint32_t sum)
{
	for (size_t i = 0; i < len; i++)
		sum += i % 2 ? p[i] : (uint32_t)p[i] << 8;
	while (sum >> 16)
		sum = (sum >> 16) + (sum & 0xffff);
	return (uint16_t)sum;
}

/* The same number from net_checksum, which sums in memory order. */
static uint16_t fast_sum(const uint8_t *p, size_t len)
{
	return __builtin_bswap16((uint16_t)net_checksum(p, len, 0));
}

static uint16_t ones(uint16_t v)
{
	return v == 0xffff ? 0 : v; /* two zeros */
}

static void checksum(void **state)
{
	(void)state;
	static uint8_t buf[NET_FRAME_MAX + 8];
	for (size_t i = 0; i < sizeof(buf); i++)
		buf[i] = (uint8_t)rand();
	for (size_t len = 0; len < 300; len++)
		for (size_t at = 0; at < 5; at++)
			assert_int_equal(ones(fast_sum(buf + at, len)), ones(slow_sum(buf + at, len, 0)));
	memset(buf, 0xff, sizeof(buf));
	assert_int_equal(ones(fast_sum(buf, NET_FRAME_MAX)), 0); /* the largest sum there is */
	memset(buf, 0, sizeof(buf));
	assert_int_equal(fast_sum(buf, NET_FRAME_MAX), 0);
	for (int i = 0; i < 200; i++) {
		size_t len = (size_t)rand() % NET_FRAME_MAX;
		for (int k = 0; k < 100; k++)
			buf[rand() % NET_FRAME_MAX] = (uint8_t)rand();
		assert_int_equal(ones(fast_sum(buf, len)), ones(slow_sum(buf, len, 0)));
	}
}

static void finish(void **state)
{
	(void)state;
	uint8_t frame[64] = { 0 };
	for (unsigned i = 0; i < sizeof(frame); i++)
		frame[i] = (uint8_t)(i * 37);
	struct net_header h = { .flags = NET_NEEDS_CSUM, .csum_start = 34, .csum_offset = 16 };
	assert_int_equal(net_finish_checksum(&h, frame, sizeof(frame)), 0);
	/* With the field filled in, the rest adds up to what the pseudo-header put there: all ones minus its old content. */
	uint8_t old[2] = { 50 * 37 & 0xff, 51 * 37 & 0xff };
	uint16_t sum = slow_sum(frame + 34, 30, 0);
	assert_int_equal(ones(slow_sum(old, 2, sum)), 0);

	/* Zero is written as all ones. */
	memset(frame, 0, sizeof(frame));
	frame[34] = frame[35] = 0xff;
	h.csum_offset = 6;
	assert_int_equal(net_finish_checksum(&h, frame, sizeof(frame)), 0);
	assert_int_equal(load_be16(frame + 40), 0xffff);

	static const struct net_header lies[] = {
		{ .flags = NET_NEEDS_CSUM, .csum_start = 64, .csum_offset = 0 },
		{ .flags = NET_NEEDS_CSUM, .csum_start = 62, .csum_offset = 1 },
		{ .flags = NET_NEEDS_CSUM, .csum_start = 0xffff, .csum_offset = 0xffff },
		{ .flags = NET_NEEDS_CSUM, .csum_start = 0, .csum_offset = 63 },
	};
	for (unsigned i = 0; i < sizeof(lies) / sizeof(lies[0]); i++)
		assert_int_equal(net_finish_checksum(&lies[i], frame, sizeof(frame)), -EINVAL);
	assert_int_equal(net_finish_checksum(&(struct net_header){ 0 }, frame, sizeof(frame)), 0);
}

/* --- large frames --- */

#define SEQ 0xfffffff0u /* wraps on the way */

/* Ethernet, IP and TCP or UDP around `payload` bytes that count up; lengths and checksums are what a lazy driver leaves. */
static size_t large(uint8_t *f, bool v6, bool udp, bool vlan, size_t payload)
{
	size_t at = 12;
	memset(f, 0, 200);
	memset(f, 0x52, 12);
	if (vlan) {
		store_be16(f + 12, ETHERTYPE_VLAN);
		at += 4;
	}
	store_be16(f + at, v6 ? ETHERTYPE_IP6 : ETHERTYPE_IP4);
	uint8_t *ip = f + at + 2;
	uint8_t proto = udp ? PROTO_UDP : PROTO_TCP;
	uint8_t *l4 = ip + (v6 ? 40 : 20);
	if (v6) {
		ip[0] = 0x60;
		ip[6] = proto;
		ip[7] = 64;
		memset(ip + 8, 0x20, 32);
	} else {
		ip[0] = 0x45;
		store_be16(ip + 4, 0xfffe); /* identification: wraps too */
		ip[8] = 64;
		ip[9] = proto;
		memset(ip + 12, 0x0a, 8);
	}
	store_be16(l4, 1000);
	store_be16(l4 + 2, 2000);
	uint8_t *data = l4 + 8;
	if (!udp) {
		store_be32(l4 + 4, SEQ);
		l4[12] = 8 << 4; /* with 12 bytes of options */
		l4[13] = TCP_ACK | TCP_PSH | TCP_FIN | TCP_CWR;
		memset(l4 + 20, 1, 12);
		data = l4 + 32;
	}
	for (size_t i = 0; i < payload; i++)
		data[i] = (uint8_t)(i * 7 + i / 256);
	return (size_t)(data - f) + payload;
}

/* Lengths and checksums of a packet are right: where its payload starts. */
static size_t check_packet(const uint8_t *f, size_t len, bool v6, bool udp, bool vlan)
{
	size_t ip = vlan ? 18 : 14, l4 = ip + (v6 ? 40 : 20);
	size_t l4_len = len - l4;
	uint32_t pseudo = (udp ? PROTO_UDP : PROTO_TCP) + (uint32_t)l4_len;
	if (v6) {
		assert_int_equal(load_be16(f + ip + 4), len - ip - 40);
		pseudo += slow_sum(f + ip + 8, 32, 0);
	} else {
		assert_int_equal(load_be16(f + ip + 2), len - ip);
		assert_int_equal(slow_sum(f + ip, 20, 0), 0xffff);
		pseudo += slow_sum(f + ip + 12, 8, 0);
	}
	assert_int_equal(slow_sum(f + l4, l4_len, pseudo), 0xffff);
	if (udp)
		assert_int_equal(load_be16(f + l4 + 4), l4_len);
	return l4 + (udp ? 8 : 32);
}

struct sink {
	bool v6, udp, vlan;
	size_t payload, seen, mss;
	unsigned packets;
};

static void on_segment(void *opaque, const uint8_t *f, size_t len)
{
	struct sink *s = opaque;
	size_t at = check_packet(f, len, s->v6, s->udp, s->vlan), ip = s->vlan ? 18 : 14, l4 = ip + (s->v6 ? 40 : 20);
	size_t n = len - at;
	bool last = s->seen + n == s->payload;
	assert_true(last ? n <= s->mss && n > 0 : n == s->mss);
	for (size_t i = 0; i < n; i++)
		assert_int_equal(f[at + i], (uint8_t)((s->seen + i) * 7 + (s->seen + i) / 256));
	if (!s->v6)
		assert_int_equal(load_be16(f + ip + 4), (uint16_t)(0xfffe + s->packets));
	if (!s->udp) {
		assert_int_equal(load_be32(f + l4 + 4), (uint32_t)(SEQ + s->seen));
		uint8_t flags = TCP_ACK | (last ? TCP_PSH | TCP_FIN : 0) | (s->packets ? 0 : TCP_CWR);
		assert_int_equal(f[l4 + 13], flags);
	}
	s->seen += n;
	s->packets++;
}

static struct net_header gso(bool v6, bool udp, uint16_t size)
{
	return (struct net_header){ .flags = NET_NEEDS_CSUM,
				    .gso_type = udp ? NET_GSO_UDP_L4 : v6 ? NET_GSO_TCP6 : NET_GSO_TCP4,
				    .gso_size = size,
				    .csum_start = 34,
				    .csum_offset = 16 };
}

static void segments(void **state)
{
	(void)state;
	static uint8_t f[NET_FRAME_MAX], out[NET_FRAME_MAX];
	static const size_t payloads[] = { 1, 1447, 1448, 1449, 14480, 65000 };
	for (unsigned kind = 0; kind < 8; kind++) {
		for (unsigned i = 0; i < sizeof(payloads) / sizeof(payloads[0]); i++) {
			struct sink s = { .v6 = kind & 1, .udp = kind & 2, .vlan = kind & 4, .payload = payloads[i], .mss = 1448 };
			size_t len = large(f, s.v6, s.udp, s.vlan, s.payload);
			const struct net_header h = gso(s.v6, s.udp, 1448);
			assert_int_equal(net_segment(&h, f, len, out, on_segment, &s), 0);
			assert_int_equal(s.seen, s.payload);
			assert_int_equal(s.packets, (s.payload + 1447) / 1448);
			if (s.udp) {
				assert_int_equal(net_whole_packet(&h, f, len), -EINVAL);
				continue;
			}
			assert_int_equal(net_whole_packet(&h, f, len), 0);
			check_packet(f, len, s.v6, s.udp, s.vlan);
		}
	}
	/* A frame that would keep us busy for long: not at all. */
	struct sink s = { .udp = true, .payload = 1024, .mss = 1 };
	struct net_header h = gso(false, true, 1);
	assert_int_equal(net_segment(&h, f, large(f, false, true, false, 1023), out, on_segment, &(struct sink){ .udp = true, .payload = 1023, .mss = 1 }), 0);
	assert_int_equal(net_segment(&h, f, large(f, false, true, false, 1024), out, on_segment, &s), -EINVAL);
	assert_int_equal(s.packets, 0);
}

static void never(void *opaque, const uint8_t *frame, size_t len)
{
	(void)opaque, (void)frame, (void)len;
	fail_msg("a segment of a frame that is no such frame");
}

/* A complete packet becomes a large frame, and that cut again is the same stream; the partial sum is the pseudo-header's. */
static void large_frame(void **state)
{
	(void)state;
	static uint8_t f[NET_FRAME_MAX], out[NET_FRAME_MAX];
	for (unsigned kind = 0; kind < 4; kind++) {
		struct sink s = { .v6 = kind & 1, .vlan = kind & 2, .payload = 16060 };
		size_t len = large(f, s.v6, false, s.vlan, s.payload);
		struct net_header h = gso(s.v6, false, 1448);
		assert_int_equal(net_whole_packet(&h, f, len), 0);
		uint16_t sum;
		assert_int_equal(net_large_frame(&h, &sum, f, len, 1500), 0);
		assert_int_equal(h.flags, NET_NEEDS_CSUM);
		assert_int_equal(h.gso_type, s.v6 ? NET_GSO_TCP6 : NET_GSO_TCP4);
		assert_int_equal(h.gso_size, 1500 - (s.v6 ? 40 : 20) - 32);
		assert_int_equal(h.hdr_len, len - s.payload);
		s.mss = h.gso_size;
		assert_int_equal(net_segment(&h, f, len, out, on_segment, &s), 0);
		assert_int_equal(s.seen, s.payload);
		/* Completed from the partial sum, it is the packet that it was. */
		memcpy(out, f, len);
		memcpy(out + h.csum_start + h.csum_offset, &sum, 2);
		assert_int_equal(net_finish_checksum(&h, out, len), 0);
		check_packet(out, len, s.v6, false, s.vlan);
		assert_int_equal(net_large_frame(&h, &sum, f, len, 52), -EINVAL); /* no room for a byte */
		len = large(f, s.v6, true, s.vlan, s.payload);
		assert_int_equal(net_large_frame(&h, &sum, f, len, 1500), -EINVAL);
	}
}

struct pile {
	uint8_t bytes[NET_FRAME_MAX];
	size_t len;
	unsigned n;
	bool end;
	uint16_t base;
};

static void on_fragment(void *opaque, const uint8_t *f, size_t len)
{
	struct pile *p = opaque;
	assert_true(len <= 14 + 1006);
	assert_int_equal(load_be16(f + 16), len - 14);
	assert_int_equal(slow_sum(f + 14, 20, 0), 0xffff);
	unsigned where = load_be16(f + 20);
	assert_int_equal(((where & 0x1fff) - p->base) * 8, p->len);
	assert_false(p->end);
	p->end = !(where & 0x2000);
	memcpy(p->bytes + p->len, f + 34, len - 34);
	p->len += len - 34;
	p->n++;
}

static void fragments(void **state)
{
	(void)state;
	static uint8_t f[NET_FRAME_MAX], out[NET_FRAME_MAX];
	static struct pile p;
	for (size_t payload = 900; payload < 4000; payload += 7) {
		size_t len = large(f, false, true, false, payload);
		store_be16(f + 16, (uint16_t)(len - 14));
		p = (struct pile){ .len = 0 };
		assert_int_equal(net_fragment(f, len, 1006, out, on_fragment, &p), 0);
		assert_true(p.end);
		assert_int_equal(p.len, len - 34);
		assert_memory_equal(p.bytes, f + 34, p.len);
	}
	/* A fragment in the middle stays one. */
	size_t len = large(f, false, true, false, 3000);
	store_be16(f + 16, (uint16_t)(len - 14));
	store_be16(f + 20, 0x2000 | 100);
	p = (struct pile){ .base = 100 };
	assert_int_equal(net_fragment(f, len, 1006, out, on_fragment, &p), 0);
	assert_false(p.end);
	/* Not to be fragmented, too far, of another kind, or a lie. */
	static const struct {
		size_t at;
		uint16_t value;
	} bad[] = { { 20, 0x4000 }, { 20, 0x1fff }, { 12, ETHERTYPE_IP6 }, { 16, 19 }, { 16, 4000 }, { 14, 0x4600 } };
	for (unsigned i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		len = large(f, false, true, false, 3000);
		store_be16(f + 16, (uint16_t)(len - 14));
		store_be16(f + bad[i].at, bad[i].value);
		if (net_fragment(f, len, 1006, out, never, NULL) != -EINVAL)
			fail_msg("bad[%u] was cut", i);
	}
	assert_int_equal(net_fragment(f, 33, 1006, out, never, NULL), -EINVAL);
	assert_int_equal(net_fragment(f, len, 27, out, never, NULL), -EINVAL);
}

static void count(void *opaque, const uint8_t *frame, size_t len)
{
	(void)frame;
	assert_true(len <= 300);
	++*(unsigned *)opaque;
}

/* Whatever a guest puts into a large frame, nothing is read or written outside of it (the sanitizers look), and it ends. */
static void hostile(void **state)
{
	(void)state;
	static uint8_t out[NET_FRAME_MAX];
	static const struct {
		bool v6, udp;
		size_t at;
		uint8_t value;
		size_t cut; /* bytes left of the frame; 0: all */
	} bad[] = {
		{ false, false, 12, 0x99, 0 },	    /* not IP */
		{ false, false, 14, 0x65, 0 },	    /* version */
		{ false, false, 14, 0x44, 0 },	    /* header of 16 bytes */
		{ false, false, 14, 0x4f, 60 },	    /* options past the end */
		{ false, false, 23, 17, 0 },	    /* UDP says IP, TCP says the header */
		{ false, false, 23, 1, 0 },
		{ false, false, 34 + 12, 0x40, 0 }, /* TCP header of 16 bytes */
		{ false, false, 34 + 12, 0xf0, 80 },
		{ false, true, 23, 6, 0 },
		{ false, false, 12, 0x08, 14 + 39 },
		{ false, false, 12, 0x08, 13 },
		{ false, false, 12, 0x08, 66 }, /* no payload */
		{ true, false, 20, 0, 54 + 8 }, /* an extension header at the end */
		{ true, false, 20, 60, 0 },	/* whose length leads past the end */
		{ true, false, 14, 0x60, 54 + 19 },
	};
	for (unsigned i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		uint8_t tmp[300];
		size_t len = large(tmp, bad[i].v6, bad[i].udp, false, 40);
		tmp[bad[i].at] = bad[i].value;
		if (bad[i].v6 && bad[i].value == 60)
			tmp[54 + 1] = 0xff;
		if (bad[i].cut)
			len = bad[i].cut;
		uint8_t *f = malloc(len);
		memcpy(f, tmp, len);
		const struct net_header h = gso(bad[i].v6, bad[i].udp, 10);
		if (net_segment(&h, f, len, out, never, NULL) != -EINVAL)
			fail_msg("bad[%u] was cut", i);
		if (bad[i].cut != 66 && net_whole_packet(&h, f, len) != -EINVAL)
			fail_msg("bad[%u] was completed", i);
		free(f);
	}
	uint8_t f[300];
	size_t len = large(f, false, false, false, 40);
	struct net_header h = gso(false, false, 0);
	assert_int_equal(net_segment(&h, f, len, out, never, NULL), -EINVAL);
	h = gso(false, false, 65530); /* headers and a segment of that: more than IP has numbers for */
	assert_int_equal(net_segment(&h, f, len, out, never, NULL), -EINVAL);
	h.gso_type = NET_GSO_UDP;
	assert_int_equal(net_whole_packet(&h, f, len), -EINVAL);

	/* And noise, with lengths that change. */
	for (unsigned n = 0; n < 20000; n++) {
		uint8_t tmp[300];
		size_t l = large(tmp, n & 1, n & 2, n & 4, (size_t)rand() % 60);
		for (int k = rand() % 4; k >= 0; k--)
			tmp[12 + rand() % 80] = (uint8_t)rand();
		l = 1 + (size_t)rand() % l;
		uint8_t *p = malloc(l);
		memcpy(p, tmp, l);
		h = gso(n & 1, n & 2, (uint16_t)(1 + rand() % 40));
		unsigned total = 0;
		net_segment(&h, p, l, out, count, &total);
		assert_true(total <= l);
		net_whole_packet(&h, p, l);
		free(p);
	}
}

struct order {
	uint8_t frame[8][1100];
	size_t len[8];
	unsigned n;
};

static void on_part(void *opaque, const uint8_t *f, size_t len)
{
	struct order *o = opaque;
	memcpy(o->frame[o->n], f, len);
	o->len[o->n++] = len;
}

/* Fragments in any order become the packet again; and those of several datagrams are told apart. */
static void reassembly(void **state)
{
	(void)state;
	static uint8_t f[NET_FRAME_MAX], out[NET_FRAME_MAX];
	struct net_reassembly *r = net_reassembly_create();
	size_t whole;
	for (unsigned round = 0; round < 300; round++) {
		size_t payload = 1200 + (size_t)rand() % 4000, len = large(f, false, true, false, payload);
		store_be16(f + 16, (uint16_t)(len - 14));
		store_be16(f + 18, (uint16_t)round);
		struct order o = { .n = 0 };
		assert_int_equal(net_fragment(f, len, 1006, out, on_part, &o), 0);
		bool used[8] = { false };
		for (unsigned k = 0; k < o.n; k++) {
			unsigned i = (unsigned)rand() % o.n;
			while (used[i])
				i = (i + 1) % o.n;
			used[i] = true;
			assert_true(net_is_fragment(o.frame[i], o.len[i]));
			/* Another datagram in between, never complete. */
			uint8_t other[1100];
			memcpy(other, o.frame[i], o.len[i]);
			store_be16(other + 18, (uint16_t)(round + 1000));
			if (k == 0)
				assert_null(net_reassembly_add(r, other, o.len[i], &whole));
			const uint8_t *w = net_reassembly_add(r, o.frame[i], o.len[i], &whole);
			if (k + 1 < o.n) {
				assert_null(w);
				continue;
			}
			assert_non_null(w);
			assert_int_equal(whole, len);
			assert_int_equal(load_be16(w + 16), len - 14);
			assert_false(net_is_fragment(w, whole));
			assert_int_equal(slow_sum(w + 14, 20, 0), 0xffff);
			assert_memory_equal(w + 34, f + 34, len - 34);
		}
	}
	net_reassembly_destroy(r);
}

/* One fragment: offset and length in bytes; `end`: it says that it is the last. */
static const uint8_t *fragment(struct net_reassembly *r, size_t at, size_t n, bool end, size_t *whole)
{
	static uint8_t f[NET_FRAME_MAX];
	large(f, false, true, false, 100);
	store_be16(f + 16, (uint16_t)(20 + n));
	store_be16(f + 20, (uint16_t)(at / 8 + (end ? 0 : 0x2000)));
	return net_reassembly_add(r, f, 34 + n, whole);
}

static void deceitful_fragments(void **state)
{
	(void)state;
	struct net_reassembly *r = net_reassembly_create();
	size_t whole;
	/* Overlap spoils all: what was there is forgotten, and the rest makes no packet. */
	assert_null(fragment(r, 0, 800, false, &whole));
	assert_null(fragment(r, 792, 800, false, &whole));
	assert_null(fragment(r, 800, 80, true, &whole));
	assert_non_null(fragment(r, 0, 800, false, &whole)); /* together with the last one of before */
	/* Two ends; an end before what is there; data behind the end that makes the sum right. */
	assert_null(fragment(r, 800, 8, true, &whole));
	assert_null(fragment(r, 1600, 8, true, &whole));
	assert_null(fragment(r, 0, 1600, false, &whole));
	assert_null(fragment(r, 0, 8, true, &whole));
	assert_null(fragment(r, 0, 8, false, &whole));
	assert_null(fragment(r, 80, 8, false, &whole));
	assert_null(fragment(r, 16, 0, true, &whole));
	assert_null(fragment(r, 16, 8, true, &whole));
	/* Too far, of an odd size, empty; and none that lies about its length. */
	assert_null(fragment(r, 65528, 7, true, &whole));
	assert_null(fragment(r, 0x1fff * 8, 4000, true, &whole));
	assert_null(fragment(r, 8, 7, false, &whole));
	assert_null(fragment(r, 0, 0, false, &whole));
	uint8_t f[200];
	large(f, false, true, false, 100);
	store_be16(f + 20, 0x2000);
	store_be16(f + 16, 1000);
	assert_null(net_reassembly_add(r, f, 142, &whole));
	store_be16(f + 16, 19);
	assert_null(net_reassembly_add(r, f, 142, &whole));
	f[14] = 0x4f;
	store_be16(f + 16, 28);
	assert_null(net_reassembly_add(r, f, 42, &whole));
	/* Noise ends, and stays inside. */
	for (unsigned i = 0; i < 50000; i++) {
		size_t len = large(f, false, true, false, (size_t)rand() % 100);
		store_be16(f + 16, (uint16_t)(len - 14));
		store_be16(f + 18, (uint16_t)(rand() % 6));
		store_be16(f + 20, (uint16_t)(rand() % 4 ? rand() % 16 | (rand() & 0x2000) : rand()));
		const uint8_t *w = net_reassembly_add(r, f, len, &whole);
		if (w)
			assert_true(whole <= NET_FRAME_MAX && load_be16(w + 16) == whole - 14);
	}
	net_reassembly_destroy(r);
}

int main(void)
{
	srand(1);
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(checksum),
		cmocka_unit_test(finish),
		cmocka_unit_test(segments),
		cmocka_unit_test(large_frame),
		cmocka_unit_test(fragments),
		cmocka_unit_test(reassembly),
		cmocka_unit_test(deceitful_fragments),
		cmocka_unit_test(hostile),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
