/*
 * --net user against real sockets of this host: a guest of a few functions (ARP, DHCP, TCP, UDP by hand) on one side, the kernel's on the other.
 */
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdio.h>
#include <sys/resource.h>
#include <sys/socket.h>

#include "net/ether.h"
#include "nettest.h"

#define GUEST 0x0a00020fu /* 10.0.2.15 */
#define HOST 0x0a000202u
#define MSS 1460

static const uint8_t guest_mac[6] = { 0x52, 0x54, 0, 1, 2, 3 };
static const uint8_t host_mac[6] = { 0x52, 0x55, 10, 0, 2, 2 };

static uint16_t sum16(const uint8_t *p, size_t len, uint32_t sum)
{
	for (size_t i = 0; i < len; i++)
		sum += i % 2 ? p[i] : (uint32_t)p[i] << 8;
	while (sum >> 16)
		sum = (sum >> 16) + (sum & 0xffff);
	return (uint16_t)sum;
}

/* --- the guest's side of packets --- */

struct packet {
	uint8_t proto;
	uint32_t src, dst;
	uint16_t sport, dport;
	uint32_t seq, ack;
	uint8_t flags;
	uint16_t window;
	const uint8_t *data;
	size_t len;
};

static size_t build(uint8_t *f, const struct packet *p)
{
	size_t l4 = p->proto == PROTO_TCP ? 20 : 8, total = 20 + l4 + p->len;
	memset(f, 0, 14 + 20 + l4);
	memcpy(f, host_mac, 6);
	memcpy(f + 6, guest_mac, 6);
	store_be16(f + 12, ETHERTYPE_IP4);
	uint8_t *ip = f + 14, *h = ip + 20;
	ip[0] = 0x45;
	store_be16(ip + 2, (uint16_t)total);
	ip[8] = 64;
	ip[9] = p->proto;
	store_be32(ip + 12, p->src);
	store_be32(ip + 16, p->dst);
	store_be16(ip + 10, (uint16_t)~sum16(ip, 20, 0));
	store_be16(h, p->sport);
	store_be16(h + 2, p->dport);
	if (p->proto == PROTO_TCP) {
		store_be32(h + 4, p->seq);
		store_be32(h + 8, p->ack);
		h[12] = 5 << 4;
		h[13] = p->flags;
		store_be16(h + 14, p->window);
	} else {
		store_be16(h + 4, (uint16_t)(8 + p->len));
	}
	if (p->len)
		memcpy(h + l4, p->data, p->len);
	uint32_t pseudo = sum16(ip + 12, 8, p->proto + (uint32_t)(l4 + p->len));
	uint16_t sum = (uint16_t)~sum16(h, l4 + p->len, pseudo);
	store_be16(h + (p->proto == PROTO_TCP ? 16 : 6), sum);
	return 14 + total;
}

/* A frame for us, of which nothing may be wrong; its checksum is there unless it is ours to complete. */
static bool parse(const uint8_t *f, size_t len, bool complete, struct packet *p)
{
	if (len < 14 + 28 || load_be16(f + 12) != ETHERTYPE_IP4)
		return false;
	const uint8_t *ip = f + 14, *h = ip + 20;
	size_t total = load_be16(ip + 2);
	assert_int_equal(ip[0], 0x45);
	assert_int_equal(sum16(ip, 20, 0), 0xffff);
	assert_true(14 + total <= len);
	*p = (struct packet){ .proto = ip[9], .src = load_be32(ip + 12), .dst = load_be32(ip + 16) };
	if (p->proto != PROTO_TCP && p->proto != PROTO_UDP)
		return false;
	p->sport = load_be16(h);
	p->dport = load_be16(h + 2);
	size_t header = 8;
	if (p->proto == PROTO_TCP) {
		header = (h[12] >> 4) * 4u;
		p->seq = load_be32(h + 4);
		p->ack = load_be32(h + 8);
		p->flags = h[13];
		p->window = load_be16(h + 14);
	}
	if (complete && (p->proto == PROTO_TCP || load_be16(h + 6)))
		assert_int_equal(sum16(h, total - 20, sum16(ip + 12, 8, p->proto + (uint32_t)total - 20)), 0xffff);
	p->data = h + header;
	p->len = total - 20 - header;
	return true;
}

/* --- a guest: a card, and how far it has read what it received --- */

struct guest {
	struct card c;
	unsigned next;
};

static void guest_send(struct guest *g, const struct packet *p)
{
	static uint8_t f[NET_FRAME_MAX];
	assert_true(card_send(&g->c, f, build(f, p)));
}

/* The next packet to our port, at most ten seconds. The data stays until guest_forget. */
static bool guest_wait(struct guest *g, uint8_t proto, uint16_t port, struct packet *p)
{
	while (card_wait(&g->c, &g->c.nframes, g->next + 1)) {
		unsigned i = g->next++;
		if (parse(g->c.frame[i].bytes, g->c.frame[i].len, !(g->c.frame[i].h.flags & NET_NEEDS_CSUM), p) && p->proto == proto && p->dport == port)
			return true;
	}
	return false;
}

static void guest_forget(struct guest *g)
{
	card_lock(&g->c);
	if (g->next == g->c.nframes) {
		card_forget(&g->c);
		g->next = 0;
		g->c.room = CARD_FRAMES;
		net_resume(g->c.net);
	}
	card_unlock(&g->c);
}

/* Ask for the host's address: libslirp learns ours from that. */
static void guest_arp(struct guest *g)
{
	uint8_t f[42];
	memset(f, 0xff, 6);
	memcpy(f + 6, guest_mac, 6);
	static const uint8_t head[] = { 8, 6, 0, 1, 8, 0, 6, 4, 0, 1 };
	memcpy(f + 12, head, sizeof(head));
	memcpy(f + 22, guest_mac, 6);
	store_be32(f + 28, GUEST);
	memset(f + 32, 0, 6);
	store_be32(f + 38, HOST);
	assert_true(card_send(&g->c, f, sizeof(f)));
	for (;; g->next++) {
		assert_true(card_wait(&g->c, &g->c.nframes, g->next + 1));
		const uint8_t *r = g->c.frame[g->next].bytes;
		if (load_be16(r + 12) == 0x0806 && load_be16(r + 20) == 2) {
			assert_memory_equal(r + 22, host_mac, 6);
			assert_int_equal(load_be32(r + 28), HOST);
			return;
		}
	}
}

static void guest_open(struct guest *g, const char *spec)
{
	memset(g, 0, sizeof(*g));
	card_must_open(&g->c, spec);
	guest_arp(g);
}

/* --- TCP: one connection --- */

struct tcp {
	struct guest *g;
	uint32_t peer;
	uint16_t port, peer_port, window;
	uint32_t seq, ack; /* next to send, next expected */
};

static void tcp_send(struct tcp *t, uint8_t flags, const void *data, size_t len)
{
	const struct packet p = { PROTO_TCP, GUEST, t->peer, t->port, t->peer_port, t->seq, t->ack, flags, t->window, data, len };
	guest_send(t->g, &p);
	t->seq += (uint32_t)len + !!(flags & (TCP_SYN | TCP_FIN));
}

static struct tcp tcp_connect(struct guest *g, uint16_t peer_port)
{
	struct tcp t = { .g = g, .peer = HOST, .port = 40000, .peer_port = peer_port, .window = 65535, .seq = 1000 };
	struct packet p;
	tcp_send(&t, TCP_SYN, NULL, 0);
	assert_true(guest_wait(g, PROTO_TCP, t.port, &p));
	assert_int_equal(p.flags, TCP_SYN | TCP_ACK);
	assert_int_equal(p.ack, t.seq);
	t.ack = p.seq + 1;
	tcp_send(&t, TCP_ACK, NULL, 0);
	return t;
}

/* Receive what there is in order and acknowledge it; how much that was, or -1 at the end of the stream. */
static ssize_t tcp_receive(struct tcp *t, uint8_t *to, size_t room)
{
	struct packet p;
	do {
		if (!guest_wait(t->g, PROTO_TCP, t->port, &p))
			return -1;
		assert_false(p.flags & 4 /* RST */);
	} while (p.seq != t->ack || (!p.len && !(p.flags & TCP_FIN)));
	assert_true(p.len <= room);
	memcpy(to, p.data, p.len);
	t->ack += (uint32_t)p.len + !!(p.flags & TCP_FIN);
	tcp_send(t, TCP_ACK, NULL, 0);
	guest_forget(t->g);
	return p.flags & TCP_FIN ? -1 : (ssize_t)p.len;
}

/* --- the host's side --- */

static int host_socket(int type, bool listening, uint16_t *port)
{
	struct sockaddr_in in = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	socklen_t len = sizeof(in);
	int fd = socket(AF_INET, type | SOCK_CLOEXEC, 0);
	assert_int_equal(bind(fd, (struct sockaddr *)&in, sizeof(in)), 0);
	if (listening)
		assert_int_equal(listen(fd, 4), 0);
	getsockname(fd, (struct sockaddr *)&in, &len);
	*port = ntohs(in.sin_port);
	return fd;
}

/* A port that was free a moment ago. */
static uint16_t free_port(int type)
{
	uint16_t port;
	close(host_socket(type, false, &port));
	return port;
}

static void host_wait(int fd, short events)
{
	struct pollfd p = { .fd = fd, .events = events };
	assert_int_equal(poll(&p, 1, 10000), 1);
}

static void host_read(int fd, void *to, size_t len)
{
	for (uint8_t *p = to; len;) {
		host_wait(fd, POLLIN);
		ssize_t n = read(fd, p, len);
		assert_true(n > 0);
		p += n;
		len -= (size_t)n;
	}
}

static void pattern(uint8_t *p, size_t len, unsigned seed)
{
	for (size_t i = 0; i < len; i++)
		p[i] = (uint8_t)(i * 31 + i / 251 + seed);
}

/* --- tests --- */

static void dhcp(void **state)
{
	(void)state;
	static struct guest g;
	memset(&g, 0, sizeof(g));
	card_must_open(&g.c, "user,net=192.168.7.0/24,dns=192.168.7.53,hostname=box");
	assert_string_equal(net_describe(g.c.net), "user, 192.168.7.0/24");
	uint8_t m[300] = { 1, 1, 6, 0, 9, 9, 9, 9 };
	memcpy(m + 28, guest_mac, 6);
	static const uint8_t options[] = { 0x63, 0x82, 0x53, 0x63, 53, 1, 1, 255 };
	memcpy(m + 236, options, sizeof(options));
	const struct packet discover = { PROTO_UDP, 0, 0xffffffff, 68, 67, 0, 0, 0, 0, m, sizeof(m) };
	guest_send(&g, &discover);
	struct packet p;
	assert_true(guest_wait(&g, PROTO_UDP, 68, &p));
	assert_int_equal(load_be32(p.data + 16), 0xc0a8070f); /* yiaddr: .15 */
	uint32_t router = 0, dns = 0;
	char name[40] = "";
	for (size_t i = 240; i + 2 < p.len && p.data[i] != 255; i += 2u + p.data[i + 1]) {
		if (p.data[i] == 3)
			router = load_be32(p.data + i + 2);
		if (p.data[i] == 6)
			dns = load_be32(p.data + i + 2);
		if (p.data[i] == 12)
			memcpy(name, p.data + i + 2, p.data[i + 1]);
	}
	assert_int_equal(router, 0xc0a80702);
	assert_int_equal(dns, 0xc0a80735);
	assert_string_equal(name, "box");
	card_close(&g.c);
}

/* Out to a server on the host's loopback, both directions, and the end of the stream. */
static void outward(void **state)
{
	(void)state;
	static struct guest g;
	uint16_t port;
	int listener = host_socket(SOCK_STREAM, true, &port);
	guest_open(&g, "user");
	struct tcp t = tcp_connect(&g, port);
	int fd = accept(listener, NULL, NULL);
	tcp_send(&t, TCP_ACK | TCP_PSH, "hello", 5);
	char buf[64] = "";
	host_read(fd, buf, 5);
	assert_string_equal(buf, "hello");
	assert_int_equal(write(fd, "and back", 8), 8);
	assert_int_equal(tcp_receive(&t, (uint8_t *)buf, sizeof(buf)), 8);
	assert_memory_equal(buf, "and back", 8);
	assert_int_equal(g.c.frame[0].h.flags, 0); /* the guest did not ask for more */
	tcp_send(&t, TCP_ACK | TCP_FIN, NULL, 0);
	host_wait(fd, POLLIN);
	assert_int_equal(read(fd, buf, 1), 0);
	close(fd);
	assert_int_equal(tcp_receive(&t, (uint8_t *)buf, sizeof(buf)), -1);
	/* A port where nobody listens says so. */
	close(listener);
	struct packet p;
	t = (struct tcp){ .g = &g, .peer = HOST, .port = 40001, .peer_port = port, .window = 65535 };
	tcp_send(&t, TCP_SYN, NULL, 0);
	assert_true(guest_wait(&g, PROTO_TCP, 40001, &p));
	assert_true(p.flags & 4);
	card_close(&g.c);
}

/* Large frames, with what the drivers of various systems leave in them, arrive as a stream; large datagrams cut as the guest said. */
static void large_frames(void **state)
{
	(void)state;
	static struct guest g;
	static uint8_t data[60000], f[NET_FRAME_MAX], got[sizeof(data)];
	uint16_t port;
	int listener = host_socket(SOCK_STREAM, true, &port);
	guest_open(&g, "user");
	assert_int_equal(net_info(g.c.net)->caps & (NET_CAN_TSO4 | NET_CAN_USO), NET_CAN_TSO4 | NET_CAN_USO);
	struct tcp t = tcp_connect(&g, port);
	int fd = accept(listener, NULL, NULL);
	for (unsigned round = 0; round < 4; round++) {
		size_t len = round == 3 ? 10 : sizeof(data);
		pattern(data, len, round);
		const struct packet p = { PROTO_TCP, GUEST, HOST, t.port, t.peer_port, t.seq, t.ack, TCP_ACK, 65535, data, len };
		size_t total = build(f, &p);
		if (round == 1) { /* no lengths, no sums */
			store_be16(f + 16, 0);
			store_be16(f + 24, 0);
			store_be16(f + 50, 0);
		}
		const struct net_header h = { .flags = NET_NEEDS_CSUM, .gso_type = NET_GSO_TCP4, .gso_size = MSS, .hdr_len = 54, .csum_start = 34, .csum_offset = 16 };
		const struct iovec iov[] = { { f, 60 }, { f + 60, total - 60 } };
		card_lock(&g.c);
		assert_true(net_send(g.c.net, 0, &h, iov, 2));
		net_flush(g.c.net);
		card_unlock(&g.c);
		t.seq += (uint32_t)len;
		host_read(fd, got, len);
		assert_memory_equal(got, data, len);
	}
	close(fd);
	close(listener);

	int udp = host_socket(SOCK_DGRAM, false, &port);
	const struct packet p = { PROTO_UDP, GUEST, HOST, 5000, port, 0, 0, 0, 0, data, 2500 };
	size_t total = build(f, &p);
	const struct net_header h = { .flags = NET_NEEDS_CSUM, .gso_type = NET_GSO_UDP_L4, .gso_size = 1000, .csum_start = 34, .csum_offset = 6 };
	const struct iovec iov = { f, total };
	card_lock(&g.c);
	assert_true(net_send(g.c.net, 0, &h, &iov, 1));
	/* Those that lie are dropped and counted. */
	struct net_stats before, after;
	net_get_stats(g.c.net, &before);
	struct net_header lie = h;
	lie.gso_type = NET_GSO_TCP4;
	assert_true(net_send(g.c.net, 0, &lie, &iov, 1));
	lie.gso_type = NET_GSO_UDP;
	assert_true(net_send(g.c.net, 0, &lie, &iov, 1));
	lie = (struct net_header){ .flags = NET_NEEDS_CSUM, .csum_start = 65000, .csum_offset = 16 };
	assert_true(net_send(g.c.net, 0, &lie, &iov, 1));
	net_flush(g.c.net);
	net_get_stats(g.c.net, &after);
	card_unlock(&g.c);
	assert_int_equal(after.tx_dropped - before.tx_dropped, 3);
	struct sockaddr_in from;
	socklen_t fromlen = sizeof(from);
	static const size_t sizes[] = { 1000, 1000, 500 };
	for (unsigned i = 0, at = 0; i < 3; at += (unsigned)sizes[i++]) {
		host_wait(udp, POLLIN);
		assert_int_equal(recvfrom(udp, got, sizeof(got), 0, (struct sockaddr *)&from, &fromlen), sizes[i]);
		assert_memory_equal(got, data + at, sizes[i]);
	}
	/* Fragments, the last one first: libslirp does not survive that on its own. */
	for (int i = 1; i >= 0; i--) {
		static const uint16_t where[] = { 0x2000, 1000 / 8 };
		size_t n = i ? 8 + 2500 - 1000 : 1000;
		static uint8_t part[3000];
		memcpy(part, f, 34);
		memcpy(part + 34, f + 34 + (i ? 1000 : 0), n);
		store_be16(part + 16, (uint16_t)(20 + n));
		store_be16(part + 20, where[i]);
		store_be16(part + 24, 0);
		store_be16(part + 24, (uint16_t)~sum16(part + 14, 20, 0));
		assert_true(card_send(&g.c, part, 34 + n));
	}
	host_wait(udp, POLLIN);
	assert_int_equal(recvfrom(udp, got, sizeof(got), 0, (struct sockaddr *)&from, &fromlen), 2500);
	assert_memory_equal(got, data, 2500);
	/* And an answer. */
	assert_int_equal(sendto(udp, "pong", 4, 0, (struct sockaddr *)&from, fromlen), 4);
	struct packet back;
	assert_true(guest_wait(&g, PROTO_UDP, 5000, &back));
	assert_int_equal(back.len, 4);
	assert_memory_equal(back.data, "pong", 4);
	close(udp);
	card_close(&g.c);
}

/* Into the guest, through two ports, TCP and UDP. */
static void inward(void **state)
{
	(void)state;
	static struct guest g;
	char spec[128];
	uint16_t tcp_port = free_port(SOCK_STREAM), udp_port = free_port(SOCK_DGRAM);
	snprintf(spec, sizeof(spec), "user,restrict,hostfwd=tcp:127.0.0.1:%u-:22,hostfwd=udp:127.0.0.1:%u-10.0.2.15:53", tcp_port, udp_port);
	guest_open(&g, spec);
	struct sockaddr_in in = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK), .sin_port = htons(tcp_port) };
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	assert_int_equal(connect(fd, (struct sockaddr *)&in, sizeof(in)), 0);
	struct packet p;
	assert_true(guest_wait(&g, PROTO_TCP, 22, &p));
	assert_int_equal(p.flags, TCP_SYN);
	struct tcp t = { .g = &g, .peer = p.src, .port = 22, .peer_port = p.sport, .window = 65535, .seq = 5000, .ack = p.seq + 1 };
	tcp_send(&t, TCP_SYN | TCP_ACK, NULL, 0);
	assert_int_equal(write(fd, "knock", 5), 5);
	uint8_t buf[64];
	assert_int_equal(tcp_receive(&t, buf, sizeof(buf)), 5);
	assert_memory_equal(buf, "knock", 5);
	tcp_send(&t, TCP_ACK | TCP_PSH, "come in", 7);
	host_read(fd, buf, 7);
	assert_memory_equal(buf, "come in", 7);
	close(fd);

	in.sin_port = htons(udp_port);
	fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	assert_int_equal(sendto(fd, "who", 3, 0, (struct sockaddr *)&in, sizeof(in)), 3);
	assert_true(guest_wait(&g, PROTO_UDP, 53, &p));
	assert_memory_equal(p.data, "who", 3);
	close(fd);
	card_close(&g.c);
}

/* restrict: neither TCP nor UDP nor a name server, but DHCP. */
static void restricted(void **state)
{
	(void)state;
	static struct guest g;
	uint16_t port, udp_port;
	int listener = host_socket(SOCK_STREAM, true, &port), udp = host_socket(SOCK_DGRAM, false, &udp_port);
	guest_open(&g, "user,restrict=on");
	struct tcp t = { .g = &g, .peer = HOST, .port = 40000, .peer_port = port, .window = 65535, .seq = 1 };
	tcp_send(&t, TCP_SYN, NULL, 0);
	struct packet p;
	assert_true(guest_wait(&g, PROTO_TCP, 40000, &p));
	assert_true(p.flags & 4);
	const struct packet u = { PROTO_UDP, GUEST, HOST, 5000, udp_port, 0, 0, 0, 0, (const uint8_t *)"x", 1 };
	guest_send(&g, &u);
	struct pollfd fds[] = { { .fd = listener, .events = POLLIN }, { .fd = udp, .events = POLLIN } };
	assert_int_equal(poll(fds, 2, 200), 0);
	close(listener);
	close(udp);
	card_close(&g.c);
}

/* A guest without room loses nothing: frames wait, sockets are left alone, and all goes on when it has room. */
static void back_pressure(void **state)
{
	(void)state;
	static struct guest g;
	enum { TOTAL = 600000 };
	static uint8_t sent[TOTAL], got[TOTAL + NET_FRAME_MAX];
	uint16_t port;
	int listener = host_socket(SOCK_STREAM, true, &port);
	guest_open(&g, "user");
	card_lock(&g.c);
	net_set_guest_offloads(g.c.net, NET_GIVES_CSUM);
	card_unlock(&g.c);
	struct tcp t = tcp_connect(&g, port);
	int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
	pattern(sent, TOTAL, 1);
	size_t in = 0, out = 0;
	card_lock(&g.c);
	g.c.room = 0;
	card_unlock(&g.c);
	for (unsigned stall = 0; in < TOTAL;) {
		if (out < TOTAL) {
			ssize_t n = write(fd, sent + out, TOTAL - out);
			if (n > 0)
				out += (size_t)n;
		}
		if (stall++ % 4 == 0) { /* refuse for a while, then take two frames */
			card_lock(&g.c);
			g.c.room = 0;
			card_unlock(&g.c);
			bench_sleep_us(2000);
			card_lock(&g.c);
			g.c.room = 2;
			net_resume(g.c.net);
			card_unlock(&g.c);
		}
		ssize_t n = tcp_receive(&t, got + in, sizeof(got) - in);
		assert_true(n >= 0);
		in += (size_t)n;
	}
	assert_true(g.c.refused > 0);
	assert_memory_equal(got, sent, TOTAL);
	assert_int_equal(card_stats(&g.c).rx_dropped, 0);
	close(fd);
	close(listener);
	card_close(&g.c);
}

/* Downward, libslirp's packets are larger than the guest's MTU: large frames for a guest that takes them, small ones for others. */
static void larger_than_mtu(void **state)
{
	(void)state;
	static struct guest g;
	static uint8_t sent[200000], got[sizeof(sent) + NET_FRAME_MAX];
	pattern(sent, sizeof(sent), 3);
	for (unsigned tso = 0; tso < 2; tso++) {
		uint16_t port, udp_port;
		int listener = host_socket(SOCK_STREAM, true, &port);
		guest_open(&g, "user");
		card_lock(&g.c);
		net_set_guest_offloads(g.c.net, tso ? NET_GIVES_CSUM | NET_GIVES_TSO4 | NET_GIVES_TSO6 : NET_GIVES_CSUM);
		card_unlock(&g.c);
		struct tcp t = tcp_connect(&g, port);
		int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
		size_t out = 0, in = 0, largest = 0;
		while (in < sizeof(sent)) {
			ssize_t n = write(fd, sent + out, sizeof(sent) - out);
			out += n > 0 ? (size_t)n : 0;
			struct packet p;
			do {
				assert_true(guest_wait(&g, PROTO_TCP, t.port, &p));
				if (!p.len)
					continue;
				const struct net_header *h = &g.c.frame[g.next - 1].h;
				size_t len = g.c.frame[g.next - 1].len;
				largest = len > largest ? len : largest;
				if (len > 1514) {
					assert_true(tso);
					assert_int_equal(h->gso_type, NET_GSO_TCP4);
					assert_int_equal(h->gso_size, MSS);
					assert_int_equal(h->flags, NET_NEEDS_CSUM);
				} else {
					assert_int_equal(h->gso_type, NET_GSO_NONE);
				}
				assert_int_equal(p.seq, t.ack);
				memcpy(got + in, p.data, p.len);
				in += p.len;
				t.ack += (uint32_t)p.len;
			} while (!p.len);
			tcp_send(&t, TCP_ACK, NULL, 0);
			guest_forget(&g);
		}
		assert_memory_equal(got, sent, sizeof(sent));
		assert_true(tso ? largest > 10000 : largest == 1514);
		close(fd);
		close(listener);

		/* A datagram: one frame for whom large frames are nothing new, fragments for others. */
		int udp = host_socket(SOCK_DGRAM, false, &udp_port);
		const struct packet ping = { PROTO_UDP, GUEST, HOST, 5000, udp_port, 0, 0, 0, 0, (const uint8_t *)"x", 1 };
		guest_send(&g, &ping);
		struct sockaddr_in from;
		socklen_t fromlen = sizeof(from);
		host_wait(udp, POLLIN);
		assert_int_equal(recvfrom(udp, got, sizeof(got), 0, (struct sockaddr *)&from, &fromlen), 1);
		guest_forget(&g);
		assert_int_equal(sendto(udp, sent, 5000, 0, (struct sockaddr *)&from, fromlen), 5000);
		for (size_t at = 0, more = 1; more;) {
			assert_true(card_wait(&g.c, &g.c.nframes, g.next + 1));
			const uint8_t *f = g.c.frame[g.next].bytes;
			size_t len = g.c.frame[g.next++].len;
			if (load_be16(f + 12) != ETHERTYPE_IP4 || f[23] != PROTO_UDP)
				continue;
			assert_true(tso || len <= 1514);
			size_t skip = at ? 34 : 42;
			assert_int_equal((load_be16(f + 20) & 0x1fff) * 8, at);
			assert_memory_equal(f + skip, sent + (at ? at - 8 : 0), len - skip);
			at += len - 34;
			more = load_be16(f + 20) & 0x2000;
			assert_true(more || at == 5008);
		}
		close(udp);
		card_close(&g.c);
	}
}

static void options(void **state)
{
	(void)state;
	static struct guest g;
	uint16_t port;
	int taken = host_socket(SOCK_STREAM, true, &port);
	char busy[80];
	snprintf(busy, sizeof(busy), "user,hostfwd=tcp:127.0.0.1:%u-:22", port);
	const struct {
		const char *spec, *says;
	} bad[] = {
		{ busy, "is taken" },
		{ "user,hostfwd=tcp:127.0.0.1:99999-:22", "hostfwd=tcp:127.0.0.1:99999-:22 is not" },
		{ "user,hostfwd=tcp:127.0.0.1:0-:22", "is not" },
		{ "user,hostfwd=tcp::-:22", "is not" },
		{ "user,hostfwd=tcp:2222-:22", "is not" },
		{ "user,hostfwd=sctp::2222-:22", "is not" },
		{ "user,hostfwd=tcp::2222", "is not" },
		{ "user,hostfwd=tcp::2222-:22x", "is not" },
		{ "user,hostfwd", "is not" },
		{ "user,hostfwd=tcp:10.1.2.3:2222-:22", "cannot listen" },
		{ "user,net=10.0.2.0", "not a network" },
		{ "user,net=10.0.2.0/33", "not possible" },
		{ "user,net=10.0.2.0/28", "not possible" },
		{ "user,net=banana/24", "not possible" },
		{ "user,dns=8.8.8.8", "free address" },
		{ "user,dns=10.0.2.2", "free address" },
		{ "user,hostname=", "1 to 32" },
		{ "user,hostname=aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "1 to 32" },
		{ "user,ipv6=maybe", "ipv6" },
		{ "user,banana=1", "banana" },
		{ "banana", "user, passt" },
		{ "user,hostfwd=tcp::1-:1,hostfwd=tcp::1-:1,hostfwd=tcp::1-:1,hostfwd=tcp::1-:1,hostfwd=tcp::1-:1,hostfwd=tcp::1-:1,hostfwd=tcp::1-:1,"
		  "hostfwd=tcp::1-:1,hostfwd=tcp::1-:1,hostfwd=tcp::1-:1,hostfwd=tcp::1-:1,hostfwd=tcp::1-:1,hostfwd=tcp::1-:1,hostfwd=tcp::1-:1,"
		  "hostfwd=tcp::1-:1,hostfwd=tcp::1-:1,hostfwd=tcp::1-:1",
		  "more than 16" },
	};
	for (unsigned i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		struct error err = { "" };
		if (card_open(&g.c, bad[i].spec, &err) == 0 || !strstr(err.text, bad[i].says) || !strstr(err.text, "--net"))
			fail_msg("%s: \"%s\", expected something with \"%s\"", bad[i].spec, err.text, bad[i].says);
	}
	close(taken);
	/* No type means user; an IPv6 address in brackets is one. */
	static const char *const good[] = { "ipv6=off", "user,hostname=a,net=172.16.0.0/16,dns=172.16.9.9", "none" };
	for (unsigned i = 0; i < sizeof(good) / sizeof(good[0]); i++) {
		card_must_open(&g.c, good[i]);
		card_close(&g.c);
	}
}

static unsigned open_descriptors(void)
{
	unsigned n = 0;
	for (int fd = 0; fd < 1024; fd++)
		n += fcntl(fd, F_GETFD) >= 0;
	return n;
}

/* Who knocks at a forwarded port again and again gets so many connections, and leaves the process the rest of its descriptors. */
static void crowd(void **state)
{
	(void)state;
	struct card c;
	char spec[64];
	struct rlimit before, few = { .rlim_cur = 64 };
	uint16_t port = free_port(SOCK_STREAM);
	snprintf(spec, sizeof(spec), "user,hostfwd=tcp:127.0.0.1:%u-:22", port);
	assert_int_equal(getrlimit(RLIMIT_NOFILE, &before), 0);
	few.rlim_max = before.rlim_max;
	assert_int_equal(setrlimit(RLIMIT_NOFILE, &few), 0);
	card_must_open(&c, spec);
	assert_int_equal(setrlimit(RLIMIT_NOFILE, &before), 0);
	unsigned ours = open_descriptors();
	struct sockaddr_in in = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK), .sin_port = htons(port) };
	int fd[80];
	for (unsigned i = 0; i < 80; i++) {
		fd[i] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
		connect(fd[i], (struct sockaddr *)&in, sizeof(in));
		bench_sleep_us(5000);
	}
	unsigned theirs = open_descriptors() - ours - 80;
	assert_in_range(theirs, 16, 40);
	for (unsigned i = 0; i < 80; i++)
		close(fd[i]);
	card_close(&c);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(dhcp),	     cmocka_unit_test(outward),	      cmocka_unit_test(large_frames), cmocka_unit_test(inward),
		cmocka_unit_test(restricted), cmocka_unit_test(back_pressure), cmocka_unit_test(larger_than_mtu),
		cmocka_unit_test(options),    cmocka_unit_test(crowd),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
