/*
 * What is behind net.h: a kind of backend, and what net.c does for all of them.
 *
 * A backend embeds its struct net as the first thing it fills (net_init), and sees from net_send only frames that its caps say it takes:
 * net.c completes checksums for the others and refuses large frames that nobody offered. Likewise net_deliver completes a checksum that the guest did not
 * agree to complete. The device lock is held for everything here (open and close: or the loop does not run). Only src/net/ includes this.
 */
#ifndef TRAPLINE_NET_BACKEND_H
#define TRAPLINE_NET_BACKEND_H

#include "net/net.h"

/* A kind of backend: const data, one line in net.c's table. */
struct net_backend {
	const char *type; /* "user": the first part of --net */

	/* Create it: allocate a struct that embeds a struct net, net_init, ask kv for its own keys, open what there is to open. The guest does
	 * not run yet; descriptors go into the loop. 0 or -errno with a sentence that names --net, the key and the remedy. */
	int (*open)(struct net **out, struct keyval *kv, struct loop *loop, struct error *err);
	/* Take its descriptors and timers out of the loop and free it. */
	void (*close)(struct net *n);

	/* A frame from the guest, q < info.queues; h NULL-free, with csum_start and csum_offset inside the frame if NEEDS_CSUM. Of the gso fields only
	 * that gso_size is not 0 is checked. Send or drop it (count it in stats.tx_dropped) and return true; or return false if it must wait,
	 * and call net_writable later. */
	bool (*send)(struct net *n, unsigned q, const struct net_header *h, const struct iovec *iov, unsigned niov);
	/* A batch of frames from the guest ends. Optional. */
	void (*flush)(struct net *n);
	/* The client has room again after net_deliver returned false. */
	void (*resume)(struct net *n);
	/* n->guest_offloads, n->guest_mtu or n->pairs changed. Optional. */
	void (*changed)(struct net *n);
};

struct net {
	const struct net_backend *backend;
	struct loop *loop;
	struct net_info info; /* the backend's to fill before open returns; info.link through net_set_link afterwards */
	char describe[160];   /* for `trapline stats`: "user, 10.0.2.0/24"; the backend's */
	struct net_stats stats;
	/* net.c's, for the backend to read: */
	const struct net_client *client; /* NULL: none */
	void *client_opaque;
	unsigned guest_offloads; /* NET_GIVES_ bits that the guest takes */
	unsigned pairs;		 /* queue pairs in use, at least 1 */
	uint16_t guest_mtu;
	uint8_t *scratch;	 /* NET_FRAME_MAX bytes once a checksum was completed */
};

/* Prepare n: one queue pair, link up, no caps. */
void net_init(struct net *n, const struct net_backend *backend, struct loop *loop);

/* A frame for the guest on pair q (any number: taken modulo the pairs in use). False: no room; keep it until `resume`. A frame that nobody
 * wants (no client, or larger than any frame may be) is dropped and counted. */
bool net_deliver(struct net *n, unsigned q, const struct net_header *h, const struct iovec *iov, unsigned niov);
/* send() returned false for q, and now there is room. */
void net_writable(struct net *n, unsigned q);
void net_set_link(struct net *n, bool up);

/* --- frames; the headers' offsets are checked again --- */

/* The Internet checksum's sum of len bytes on top of `sum`, folded to 16 bits, in memory order and not yet complemented. */
uint32_t net_checksum(const void *data, size_t len, uint32_t sum);
/* Copy n iovecs into dst; returns how many bytes, at most room. */
size_t net_gather(void *dst, size_t room, const struct iovec *iov, unsigned n);

/* For backends that take a large TCP frame as one large IP packet (a user-mode stack, which does not care what the wire's MTU is): write the lengths
 * and checksums of a frame whose gso_type is TCP into it, whatever the driver left there. -EINVAL if it is no TCP in IP, or more than 64 KiB. */
int net_whole_packet(const struct net_header *h, uint8_t *frame, size_t len);

/* Cut a large frame (gso_type TCP or UDP_L4) into packets of at most gso_size bytes of payload with lengths and checksums complete, and
 * give each to fn. `out` has room for a frame. -EINVAL: it is not what its header says, or would be more than 1024; nothing was given. */
int net_segment(const struct net_header *h, const uint8_t *frame, size_t len, uint8_t *out, void (*fn)(void *opaque, const uint8_t *frame, size_t len),
		void *opaque);

/* The other way: a complete TCP packet that is larger than `mtu` as a large frame. Fills h, and *sum with the partial checksum that belongs at
 * h->csum_start + h->csum_offset. -EINVAL if it is something else. */
int net_large_frame(struct net_header *h, uint16_t *sum, const uint8_t *frame, size_t len, uint16_t mtu);

/* Cut an IPv4 packet into fragments of at most `mtu` bytes (RFC 791 3.2) and give each to fn, as net_segment does. */
int net_fragment(const uint8_t *frame, size_t len, uint16_t mtu, uint8_t *out, void (*fn)(void *opaque, const uint8_t *frame, size_t len), void *opaque);

/* The backends; net.c lists them. */
extern const struct net_backend net_backend_user, net_backend_passt, net_backend_tap, net_backend_socket, net_backend_none;

#endif
