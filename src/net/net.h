/*
 * Network backends: where a guest's network card is plugged in. user (libslirp), passt, tap, socket.
 *
 * A struct net belongs to the machine and outlives reboots and the device in front (its client). Every call and callback has the device
 * lock held. A frame is an Ethernet frame without FCS behind a struct net_header, as virtio 1.2 5.1.6 has it
 * (little-endian); the backend says which offloads of the header it understands. Frames come from a hostile guest: the header's fields are checked
 * by the card before a backend sees them (offsets inside the frame), the rest is for whoever parses it.
 */
#ifndef TRAPLINE_NET_NET_H
#define TRAPLINE_NET_NET_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

struct error;
struct keyval;
struct loop;
struct net;

struct net_header {
	uint8_t flags;	  /* 1: the checksum is partial (csum_start, csum_offset); 2: the checksum was verified */
	uint8_t gso_type; /* 0 none, 1 TCPv4, 3 UDP (UFO), 4 TCPv6, 5 UDP_L4; 0x80 ECN */
	uint16_t hdr_len, gso_size, csum_start, csum_offset;
	uint16_t num_buffers; /* the card's business */
};
#define NET_NEEDS_CSUM 1
#define NET_DATA_VALID 2
#define NET_GSO_NONE 0
#define NET_GSO_TCP4 1
#define NET_GSO_UDP 3 /* fragmentation offload: nobody here does it */
#define NET_GSO_TCP6 4
#define NET_GSO_UDP_L4 5
#define NET_GSO_ECN 0x80 /* with TCP */

#define NET_DEFAULT_MTU 1500
#define NET_FRAME_MAX 65550 /* 64 KiB of IP and an Ethernet header with a VLAN tag */

/* What a backend can do, for the card to offer to its guest. */
enum net_cap {
	NET_CAN_CSUM = 1 << 0, /* takes NEEDS_CSUM frames from the guest */
	NET_CAN_TSO4 = 1 << 1, /* takes large TCP frames from the guest */
	NET_CAN_TSO6 = 1 << 2,
	NET_CAN_USO = 1 << 3,
	NET_GIVES_CSUM = 1 << 4, /* may deliver NEEDS_CSUM / DATA_VALID frames, once net_set_guest_offloads allows it */
	NET_GIVES_TSO4 = 1 << 5,
	NET_GIVES_TSO6 = 1 << 6,
	NET_GIVES_USO = 1 << 7,
};

struct net_info {
	unsigned caps;	 /* enum net_cap */
	unsigned queues; /* pairs it can serve, at least 1 */
	uint16_t mtu;	 /* what the guest should use; 0: no opinion */
	bool link;	 /* is it up now? */
};

/* The card in front. */
struct net_client {
	/* A frame for the guest on queue pair q. False: no room; the backend keeps it (or leaves it in its socket) and tries again after
	 * net_resume. */
	bool (*receive)(void *opaque, unsigned q, const struct net_header *h, const struct iovec *iov, unsigned n);
	void (*writable)(void *opaque, unsigned q); /* net_send would take frames again */
	void (*link)(void *opaque, bool up);
};

struct net_stats {
	uint64_t tx_frames, tx_bytes, tx_dropped; /* from the guest */
	uint64_t rx_frames, rx_bytes, rx_dropped; /* to the guest */
};

/*
 * Open what a --net value names. Keys: type (first: user, passt, tap, socket, none), and its own:
 *   user:   hostfwd=tcp:127.0.0.1:2222-:22 (may be given up to 16 times), net=10.0.2.0/24, ipv6=on|off, restrict, dns=, hostname=
 *   passt:  path= (the program; default passt) or socket= (of a running one), args=
 *   tap:    ifname=, queues=, vhost=on|off|auto, fd=
 *   socket: listen=PATH or HOST:PORT, connect=..., mcast is not there
 * The card's keys (mac=, model=, queues=) are left to it.
 */
int net_open(struct net **out, struct keyval *kv, struct loop *loop, struct error *err);
void net_close(struct net *n); /* the loop does not run */

const struct net_info *net_info(const struct net *n);
void net_set_client(struct net *n, const struct net_client *client, void *opaque); /* NULL: none; frames are dropped */
/* What the guest accepts in received frames (NET_GIVES_ bits), and how many pairs are in use. */
void net_set_guest_offloads(struct net *n, unsigned caps);
void net_set_queues(struct net *n, unsigned pairs);
/* Its largest IP packet; 1500 until somebody says otherwise. Larger frames come only as what NET_GIVES_TSO bits allow. */
void net_set_guest_mtu(struct net *n, uint16_t mtu);

/* A frame from the guest; the iovecs are read before it returns. False: not now, `writable` follows. */
bool net_send(struct net *n, unsigned q, const struct net_header *h, const struct iovec *iov, unsigned niov);
/* The card has sent what it had for now: a batch of net_send ends. */
void net_flush(struct net *n);
/* The client has room again. */
void net_resume(struct net *n);

void net_get_stats(const struct net *n, struct net_stats *out);
const char *net_describe(const struct net *n);

/* For backends that take no offloads, and the card: complete a partial checksum in a linear frame. -EINVAL if the header lies. */
int net_finish_checksum(const struct net_header *h, uint8_t *frame, size_t len);

#endif
