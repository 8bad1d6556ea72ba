/*
 * A guest's card, played by a test: takes frames while it has room, and remembers the last ones. On top of devtest.h's bench, whose lock is the
 * device lock; net_* calls hold it here too.
 */
#ifndef TRAPLINE_TESTS_NETTEST_H
#define TRAPLINE_TESTS_NETTEST_H

#include <errno.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <unistd.h>

#include "base/keyval.h"
#include "devtest.h"
#include "net/net.h"

#define CARD_FRAMES 256

static const uint8_t CARD_MAC[6] __attribute__((unused)) = { 0x52, 0x54, 0, 1, 2, 3 };

struct card {
	struct bench b;
	struct net *net;
	unsigned room; /* frames it takes */
	unsigned nframes, writable, refused;
	struct {
		struct net_header h;
		unsigned q;
		size_t len;
		uint8_t *bytes;
	} frame[CARD_FRAMES];
	bool link;
	unsigned links; /* changes */
};

static inline bool card_receive(void *opaque, unsigned q, const struct net_header *h, const struct iovec *iov, unsigned n)
{
	struct card *c = opaque;
	if (!c->room || c->nframes == CARD_FRAMES) {
		c->refused++;
		return false;
	}
	c->room--;
	size_t len = 0;
	for (unsigned i = 0; i < n; i++)
		len += iov[i].iov_len;
	uint8_t *bytes = malloc(len), *to = bytes;
	for (unsigned i = 0; i < n; i++) {
		memcpy(to, iov[i].iov_base, iov[i].iov_len);
		to += iov[i].iov_len;
	}
	c->frame[c->nframes].h = *h;
	c->frame[c->nframes].q = q;
	c->frame[c->nframes].len = len;
	c->frame[c->nframes++].bytes = bytes;
	return true;
}

static inline void card_writable(void *opaque, unsigned q)
{
	(void)q;
	((struct card *)opaque)->writable++;
}

static inline void card_link(void *opaque, bool up)
{
	struct card *c = opaque;
	c->link = up;
	c->links++;
}

static const struct net_client card_client = { .receive = card_receive, .writable = card_writable, .link = card_link };

/* 0 and a running card, or what net_open said. */
static inline int card_open(struct card *c, const char *spec, struct error *err)
{
	static struct keyval kv;
	memset(c, 0, sizeof(*c));
	bench_start(&c->b);
	c->room = CARD_FRAMES;
	int r = keyval_parse(&kv, "--net", spec, "type", err);
	if (!r)
		r = net_open(&c->net, &kv, c->b.loop, err);
	if (!r && keyval_finish(&kv, err)) {
		net_close(c->net);
		r = -EINVAL;
	}
	if (r) {
		bench_stop(&c->b);
		return r;
	}
	net_set_client(c->net, &card_client, c);
	c->link = net_info(c->net)->link;
	bench_run(&c->b);
	return 0;
}

static inline void card_must_open(struct card *c, const char *spec)
{
	struct error err = { "" };
	if (card_open(c, spec, &err))
		fail_msg("%s: %s", spec, err.text);
}

static inline void card_forget(struct card *c)
{
	for (unsigned i = 0; i < c->nframes; i++)
		free(c->frame[i].bytes);
	c->nframes = 0;
}

static inline void card_close(struct card *c)
{
	bench_halt(&c->b);
	net_close(c->net);
	bench_stop(&c->b);
	card_forget(c);
}

static inline void card_lock(struct card *c)
{
	pthread_mutex_lock(&c->b.lock);
}

static inline void card_unlock(struct card *c)
{
	pthread_mutex_unlock(&c->b.lock);
}

/* Until `*what` (read under the lock) reaches `value`, at most ten seconds. */
static inline bool card_wait(struct card *c, const unsigned *what, unsigned value)
{
	for (int i = 0; i < 10000; i++) {
		card_lock(c);
		bool there = *what >= value;
		card_unlock(c);
		if (there)
			return true;
		bench_sleep_us(1000);
	}
	return false;
}

static inline bool card_wait_link(struct card *c, bool up)
{
	for (int i = 0; i < 10000; i++) {
		card_lock(c);
		bool there = net_info(c->net)->link == up;
		card_unlock(c);
		if (there)
			return true;
		bench_sleep_us(1000);
	}
	return false;
}

/* Send one plain frame as a batch of its own. */
static inline bool card_send(struct card *c, const void *frame, size_t len)
{
	const struct net_header h = { 0 };
	const struct iovec iov = { (void *)frame, len };
	card_lock(c);
	bool sent = net_send(c->net, 0, &h, &iov, 1);
	net_flush(c->net);
	card_unlock(c);
	return sent;
}

static inline struct net_stats card_stats(struct card *c)
{
	struct net_stats s;
	card_lock(c);
	net_get_stats(c->net, &s);
	card_unlock(c);
	return s;
}

/* A DHCPDISCOVER in its Ethernet frame (RFC 2131); the IP header's checksum by hand, UDP's left out, as IPv4 permits. */
static inline size_t card_discover(uint8_t *f)
{
	memset(f, 0, 342);
	memset(f, 0xff, 6);
	memcpy(f + 6, CARD_MAC, 6);
	f[12] = 8;
	uint8_t *ip = f + 14, *udp = ip + 20, *bootp = udp + 8;
	const uint16_t len = 342 - 14;
	ip[0] = 0x45, ip[2] = (uint8_t)(len >> 8), ip[3] = (uint8_t)len, ip[8] = 64, ip[9] = IPPROTO_UDP;
	memset(ip + 16, 0xff, 4);
	uint32_t sum = 0;
	for (int i = 0; i < 20; i += 2)
		sum += (uint32_t)(ip[i] << 8 | ip[i + 1]);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = ~((sum & 0xffff) + (sum >> 16));
	ip[10] = (uint8_t)(sum >> 8), ip[11] = (uint8_t)sum;
	udp[1] = 68, udp[3] = 67, udp[4] = (uint8_t)((len - 20) >> 8), udp[5] = (uint8_t)(len - 20);
	bootp[0] = 1, bootp[1] = 1, bootp[2] = 6, bootp[4] = 0x12;
	memcpy(bootp + 28, CARD_MAC, 6);
	static const uint8_t options[] = { 99, 130, 83, 99, 53, 1, 1, 255 };
	memcpy(bootp + 236, options, sizeof(options));
	return 342;
}

/* Wait for a frame that `is` says it is; its index. */
static inline int card_wait_frame(struct card *c, bool (*is)(const uint8_t *f, size_t len))
{
	for (int i = 0; i < 10000; i++) {
		card_lock(c);
		for (unsigned n = 0; n < c->nframes; n++) {
			if (is(c->frame[n].bytes, c->frame[n].len)) {
				card_unlock(c);
				return (int)n;
			}
		}
		card_unlock(c);
		bench_sleep_us(1000);
	}
	return -1;
}

static inline bool card_is_offer(const uint8_t *f, size_t len)
{
	return len > 282 && f[12] == 8 && f[13] == 0 && f[23] == IPPROTO_UDP && f[35] == 67 && f[37] == 68 && f[42] == 2;
}

#endif
