#include "device/virtio/vsock.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/error.h"
#include "base/log.h"
#include "device/virtio/virtio.h"
#include "vm/loop.h"

#define QUEUE_SIZE 128
#define CHAINS_A_ROUND 128 /* of one queue; then others on the loop get their turn */
#define STRAYS 64
#define BUCKETS 64
#define READ_MAX (64u << 10)
#define FIRST_PORT (1u << 30) /* of ours, for connections from the host */
#define LINE_MAX 32	      /* "CONNECT 4294967295\n" and some */
#define PARTS 64	      /* of a guest's buffer that are filled at once */

enum { RX, TX, EVENT };			      /* queues (5.10.2) */
enum { OP_REQUEST = 1, OP_RESPONSE, OP_RST, OP_SHUTDOWN, OP_RW, OP_CREDIT_UPDATE, OP_CREDIT_REQUEST }; /* 5.10.6 */
enum { SHUT_RECEIVE = 1, SHUT_SEND = 2, SHUT_BOTH = 3 }; /* 5.10.6.6.1 */
#define TYPE_STREAM 1

struct header {
	uint64_t src_cid, dst_cid;
	uint32_t src_port, dst_port, len;
	uint16_t type, op;
	uint32_t flags, buf_alloc, fwd_cnt;
} __attribute__((packed));

_Static_assert(sizeof(struct header) == 44, "5.10.6");

enum state {
	HANDSHAKE,   /* the host's program has not said CONNECT yet */
	REQUESTED,   /* the guest has not answered yet */
	ESTABLISHED,
	DRAINING,    /* the guest has let go; the host's program still reads what was sent */
	ENDED,	     /* waits for room to send an RST */
};

struct conn {
	struct vsock_device *dev;
	enum state state;
	uint32_t port, peer_port; /* ours, the guest's */
	int fd;			  /* -1: the host's side is over */
	uint32_t watched;	  /* events, with WATCHED if it is in the loop */
	struct conn *bucket_next; /* known to the guest by its ports */
	struct conn *next;	  /* has something for the guest */
	bool hashed, queued;
	char line[LINE_MAX]; /* of the handshake, so far */
	unsigned line_len;
	unsigned pending;	  /* ops (bits) to be told */
	bool readable;		  /* fd has, or may have, something for the guest */
	bool starved;		  /* ... but there is no credit */
	unsigned guest_shut, host_shut;
	bool shut_write;		  /* the guest's end of sending was passed on */
	uint32_t peer_alloc, peer_fwd, sent; /* credit that the guest gives (5.10.6.3) */
	uint32_t fwd, fwd_told;		     /* bytes that went to the host's program; as the guest knows it */
	uint8_t *out;			     /* ring of VSOCK_BUFFER, from the guest */
	size_t out_head, out_len;
};

#define WATCHED (1u << 30)

struct vsock_device {
	struct virtio_device d;
	uint64_t cid; /* device configuration (5.10.4) */
	struct vsock *host;
	unsigned nconns;
	uint32_t next_port;
	struct conn *bucket[BUCKETS];
	struct conn *first, **last; /* those with something for the guest */
	struct conn *handshakes;    /* and others that are not in a bucket, by bucket_next */
	struct {
		uint32_t port, peer_port;
	} stray[STRAYS]; /* RSTs that belong to no connection; a ring */
	unsigned stray_first, nstrays;
	bool reset_pending; /* the event of 5.10.6.7 */
	bool bad_packet;    /* said so */
	bool tx_held;	    /* by a full list of strays */
	struct vtimer again;
	uint64_t opened, refused;
};

/* --- connections --- */

static struct conn **bucket_of(struct vsock_device *v, uint32_t port, uint32_t peer_port)
{
	return &v->bucket[(port * 31 + peer_port) % BUCKETS];
}

static struct conn *find(struct vsock_device *v, uint32_t port, uint32_t peer_port)
{
	struct conn *c = *bucket_of(v, port, peer_port);
	while (c && (c->port != port || c->peer_port != peer_port))
		c = c->bucket_next;
	return c;
}

static struct conn **list_of(struct conn *c)
{
	return c->hashed ? bucket_of(c->dev, c->port, c->peer_port) : &c->dev->handshakes;
}

static void unlist(struct conn *c)
{
	struct conn **at = list_of(c);
	while (*at != c)
		at = &(*at)->bucket_next;
	*at = c->bucket_next;
}

static void list(struct conn *c, bool hashed)
{
	c->hashed = hashed;
	struct conn **head = list_of(c);
	c->bucket_next = *head;
	*head = c;
}

static void enqueue(struct conn *c)
{
	if (c->queued)
		return;
	c->queued = true;
	c->next = NULL;
	*c->dev->last = c;
	c->dev->last = &c->next;
}

static void dequeue(struct conn *c)
{
	struct vsock_device *v = c->dev;
	if (!c->queued)
		return;
	struct conn **at = &v->first;
	while (*at != c)
		at = &(*at)->next;
	*at = c->next;
	if (v->last == &c->next)
		v->last = at;
	c->queued = false;
}

static void tell(struct conn *c, unsigned op)
{
	c->pending |= 1u << op;
	enqueue(c);
}

static void close_fd(struct conn *c)
{
	if (c->fd < 0)
		return;
	if (c->watched)
		loop_del_fd(c->dev->d.loop, c->fd);
	close(c->fd);
	c->fd = -1;
	c->watched = 0;
	c->readable = c->starved = false;
	c->out_len = 0;
}

static void free_conn(struct conn *c)
{
	close_fd(c);
	dequeue(c);
	unlist(c);
	c->dev->nconns--;
	free(c->out);
	free(c);
}

/* Both sides shall know that it is over. The guest's side may have to wait for a buffer. */
static void reset_conn(struct conn *c)
{
	close_fd(c);
	if (c->state == HANDSHAKE || c->state == DRAINING) {
		free_conn(c);
		return;
	}
	c->state = ENDED;
	c->pending = 0;
	tell(c, OP_RST);
}

static struct conn *new_conn(struct vsock_device *v, int fd, enum state state)
{
	struct conn *c = v->nconns < VSOCK_CONNECTIONS ? calloc(1, sizeof(*c)) : NULL;
	if (!c) {
		v->refused++;
		close(fd);
		return NULL;
	}
	*c = (struct conn){ .dev = v, .fd = fd, .state = state };
	v->nconns++;
	v->opened++;
	return c;
}

static void on_ready(void *opaque, uint32_t revents);

/* A descriptor that nothing is wanted of stays out of the loop if it may hang up for long: epoll would tell without end. */
static void watch(struct conn *c)
{
	if (c->fd < 0)
		return;
	bool reading = c->state == HANDSHAKE || (c->state == ESTABLISHED && !c->readable && !c->starved && !(c->guest_shut & SHUT_RECEIVE) &&
						 !(c->host_shut & SHUT_SEND));
	bool hangup = c->state == REQUESTED || (c->state == ESTABLISHED && (c->host_shut & SHUT_SEND));
	uint32_t want = (reading ? EPOLLIN : 0) | (c->out_len ? EPOLLOUT : 0);
	want = want || hangup ? want | WATCHED : 0;
	if (want == c->watched)
		return;
	if (!want)
		loop_del_fd(c->dev->d.loop, c->fd);
	else if (loop_add_fd(c->dev->d.loop, c->fd, want & ~WATCHED, on_ready, c))
		want = 0; /* no memory: it will stall, which the host's program can end */
	c->watched = want;
}

/* --- from the guest to the host's program --- */

/* What the guest ended is passed on once all that came before is written. The connection may be gone afterwards. */
static void pass_shutdown(struct conn *c)
{
	if (c->out_len)
		return;
	if (c->state == DRAINING) {
		free_conn(c);
	} else if (c->guest_shut == SHUT_BOTH) {
		reset_conn(c);
	} else if ((c->guest_shut & SHUT_SEND) && !c->shut_write && c->fd >= 0) {
		c->shut_write = true;
		shutdown(c->fd, SHUT_WR);
		watch(c);
	}
}

static void host_shut(struct conn *c, unsigned how)
{
	if ((c->host_shut | how) == c->host_shut || c->state != ESTABLISHED)
		return;
	c->host_shut |= how;
	tell(c, OP_SHUTDOWN);
}

/* Write what is there. The connection may be gone afterwards. */
static void flush(struct conn *c)
{
	while (c->out_len && c->fd >= 0) {
		size_t n = c->out_len < VSOCK_BUFFER - c->out_head ? c->out_len : VSOCK_BUFFER - c->out_head;
		ssize_t w = send(c->fd, c->out + c->out_head, n, MSG_DONTWAIT | MSG_NOSIGNAL);
		if (w < 0 && errno == EINTR)
			continue;
		if (w < 0 && errno == EAGAIN)
			break;
		if (w < 0) {
			/* Nobody reads any more; there may be something left to read for the guest. */
			w = (ssize_t)c->out_len;
			host_shut(c, SHUT_RECEIVE);
		}
		c->out_head = (c->out_head + (size_t)w) % VSOCK_BUFFER;
		c->out_len -= (size_t)w;
		c->fwd += (uint32_t)w;
	}
	/* Not for every byte: when a quarter of the buffer is free that the guest does not know of. */
	if (c->state == ESTABLISHED && c->fwd - c->fwd_told >= VSOCK_BUFFER / 4)
		tell(c, OP_CREDIT_UPDATE);
	watch(c);
	pass_shutdown(c);
}

/* --- packets to the guest --- */

static uint32_t credit(const struct conn *c)
{
	uint32_t used = c->sent - c->peer_fwd;
	return used < c->peer_alloc ? c->peer_alloc - used : 0; /* the guest's numbers may be nonsense */
}

static void fill_header(const struct vsock_device *v, const struct conn *c, uint16_t op, uint32_t len, struct header *h)
{
	*h = (struct header){
		.src_cid = VSOCK_HOST_CID,
		.dst_cid = v->cid,
		.src_port = c->port,
		.dst_port = c->peer_port,
		.len = len,
		.type = TYPE_STREAM,
		.op = op,
		.flags = op == OP_SHUTDOWN ? c->host_shut : 0,
		.buf_alloc = VSOCK_BUFFER,
		.fwd_cnt = c->fwd,
	};
}

static void push_header(struct virtio_chain *chain, const struct header *h)
{
	virtq_push(chain->queue, chain, virtio_chain_write(chain, 0, h, sizeof(*h)) + h->len);
}

/* A buffer that can hold a header at least. */
static struct virtio_chain *take_buffer(struct vsock_device *v, unsigned *budget)
{
	struct virtio_queue *q = virtio_queue(&v->d, RX);
	do {
		struct virtio_chain *chain;
		while (*budget && (chain = virtq_pop(q))) {
			--*budget;
			if (chain->in_len >= sizeof(struct header))
				return chain;
			virtq_push(q, chain, 0);
		}
	} while (*budget && virtq_want_notify(q));
	return NULL;
}

static void send_op(struct conn *c, struct virtio_chain *chain)
{
	static const unsigned order[] = { OP_RST, OP_REQUEST, OP_RESPONSE, OP_CREDIT_UPDATE, OP_CREDIT_REQUEST, OP_SHUTDOWN };
	unsigned op = 0;
	for (size_t i = 0; i < sizeof(order) / sizeof(order[0]) && !op; i++) {
		if (c->pending & 1u << order[i])
			op = order[i];
	}
	struct header h;
	fill_header(c->dev, c, (uint16_t)op, 0, &h);
	push_header(chain, &h);
	c->pending &= ~(1u << op);
	c->fwd_told = c->fwd;
	if (op == OP_RST) {
		free_conn(c);
		return;
	}
	if (op == OP_SHUTDOWN && c->host_shut == SHUT_BOTH && !c->out_len)
		close_fd(c);
	if (!c->pending && !c->readable)
		dequeue(c);
}

/* One piece of what the host's program sent, straight into the guest's buffer. False: the buffer was not used. */
static bool send_data(struct conn *c, struct virtio_chain *chain)
{
	struct iovec iov[PARTS];
	size_t room = chain->in_len - sizeof(struct header);
	if (room > READ_MAX)
		room = READ_MAX;
	if (room > credit(c))
		room = credit(c);
	int n;
	while ((n = iov_slice(chain->iov + chain->nout, chain->nin, sizeof(struct header), room, iov, PARTS)) < 0 && room > 1)
		room /= 2;
	if (!room || n <= 0) {
		/* A buffer for a header alone: the guest gets it back empty. */
		virtq_push(chain->queue, chain, 0);
		return true;
	}
	const struct msghdr msg = { .msg_iov = iov, .msg_iovlen = (size_t)n };
	ssize_t got = recvmsg(c->fd, (struct msghdr *)&msg, MSG_DONTWAIT);
	if (got <= 0) {
		int code = got ? errno : 0;
		c->readable = false;
		if (!c->pending)
			dequeue(c);
		if (code == EAGAIN || code == EINTR) {
			watch(c);
		} else if (code) {
			reset_conn(c);
		} else {
			host_shut(c, SHUT_SEND);
			watch(c);
		}
		return false;
	}
	struct header h;
	fill_header(c->dev, c, OP_RW, (uint32_t)got, &h);
	c->sent += (uint32_t)got;
	c->fwd_told = c->fwd;
	push_header(chain, &h);
	/* Others get their turn. */
	dequeue(c);
	enqueue(c);
	return true;
}

static bool send_stray(struct vsock_device *v, struct virtio_chain *chain)
{
	const struct conn c = { .port = v->stray[v->stray_first].port, .peer_port = v->stray[v->stray_first].peer_port };
	struct header h;
	fill_header(v, &c, OP_RST, 0, &h);
	v->stray_first = (v->stray_first + 1) % STRAYS;
	v->nstrays--;
	push_header(chain, &h);
	return true;
}

static void fill_rx(struct vsock_device *v)
{
	unsigned budget = CHAINS_A_ROUND, idle = CHAINS_A_ROUND;
	while (idle && (v->nstrays || v->first)) {
		struct conn *c = v->nstrays ? NULL : v->first;
		if (c && !c->pending && !c->readable) {
			dequeue(c);
			continue;
		}
		if (c && !c->pending && !credit(c)) {
			/* It comes back when the guest gives credit. */
			c->readable = false;
			c->starved = true;
			dequeue(c);
			watch(c);
			tell(c, OP_CREDIT_REQUEST);
			continue;
		}
		struct virtio_chain *chain = take_buffer(v, &budget);
		if (!chain)
			break;
		if (!c)
			send_stray(v, chain);
		else if (c->pending)
			send_op(c, chain);
		else if (!send_data(c, chain)) {
			virtq_unpop(virtio_queue(&v->d, RX), chain);
			idle--;
		}
	}
	virtq_notify(virtio_queue(&v->d, RX));
	bool resume_tx = v->tx_held && v->nstrays < STRAYS;
	if (resume_tx)
		v->tx_held = false;
	if (!budget || !idle || resume_tx)
		vtimer_arm(&v->again, clock_ns());
}

/* --- packets from the guest --- */

static void add_stray(struct vsock_device *v, const struct header *h)
{
	if (h->op == OP_RST || v->nstrays == STRAYS)
		return;
	unsigned at = (v->stray_first + v->nstrays++) % STRAYS;
	v->stray[at].port = h->dst_port;
	v->stray[at].peer_port = h->src_port;
}

static void guest_connects(struct vsock_device *v, const struct header *h)
{
	int fd = vsock_connect(v->host, h->dst_port);
	struct conn *c = fd >= 0 ? new_conn(v, fd, ESTABLISHED) : NULL;
	if (!c) {
		add_stray(v, h);
		return;
	}
	c->port = h->dst_port;
	c->peer_port = h->src_port;
	c->peer_alloc = h->buf_alloc;
	c->peer_fwd = h->fwd_cnt;
	list(c, true);
	tell(c, OP_RESPONSE);
	watch(c);
}

static void guest_accepts(struct conn *c)
{
	char line[LINE_MAX];
	int n = snprintf(line, sizeof(line), "OK %u\n", c->port);
	c->state = ESTABLISHED;
	/* The first bytes on the way back: there is room for them, or nobody there. */
	if (send(c->fd, line, (size_t)n, MSG_DONTWAIT | MSG_NOSIGNAL) != n)
		reset_conn(c);
	else
		watch(c);
}

static void guest_sends(struct conn *c, const struct virtio_chain *chain, uint32_t len)
{
	if (c->state != ESTABLISHED || (c->guest_shut & SHUT_SEND) || len > VSOCK_BUFFER - c->out_len) {
		reset_conn(c); /* more than its credit, or after its end */
		return;
	}
	if (c->fd < 0 || (c->host_shut & SHUT_RECEIVE)) {
		c->fwd += len; /* nobody reads it; the guest has been told or will be */
		return;
	}
	if (!c->out && !(c->out = malloc(VSOCK_BUFFER))) {
		reset_conn(c);
		return;
	}
	size_t skip = sizeof(struct header);
	while (len) {
		size_t at = (c->out_head + c->out_len) % VSOCK_BUFFER;
		size_t n = len < VSOCK_BUFFER - at ? len : VSOCK_BUFFER - at;
		virtio_chain_read(chain, skip, c->out + at, n);
		c->out_len += n;
		skip += n;
		len -= (uint32_t)n;
	}
	flush(c);
}

static void guest_resets(struct conn *c)
{
	if (!c->out_len || c->fd < 0) {
		free_conn(c);
		return;
	}
	/* The last words are still on their way to the host's program. */
	dequeue(c);
	unlist(c);
	list(c, false);
	c->state = DRAINING;
	c->pending = 0;
	c->readable = c->starved = false;
	watch(c);
}

static void guest_shuts(struct conn *c, uint32_t flags)
{
	if (c->state != ESTABLISHED) {
		reset_conn(c);
		return;
	}
	c->guest_shut |= flags & SHUT_BOTH;
	if (c->guest_shut & SHUT_RECEIVE) {
		c->readable = c->starved = false;
		if (!c->pending)
			dequeue(c);
		if (c->fd >= 0)
			shutdown(c->fd, SHUT_RD);
	}
	watch(c);
	pass_shutdown(c);
}

static void packet_for(struct conn *c, const struct header *h, const struct virtio_chain *chain)
{
	if (c->state == ENDED) {
		if (h->op == OP_RST)
			free_conn(c); /* it knows already */
		return;
	}
	c->peer_alloc = h->buf_alloc;
	c->peer_fwd = h->fwd_cnt;
	if (c->starved && credit(c)) {
		c->starved = false;
		c->readable = true;
		enqueue(c);
	}
	switch (h->op) {
	case OP_RESPONSE:
		if (c->state == REQUESTED)
			guest_accepts(c);
		else
			reset_conn(c);
		return;
	case OP_RST:
		guest_resets(c);
		return;
	case OP_SHUTDOWN:
		guest_shuts(c, h->flags);
		return;
	case OP_RW:
		guest_sends(c, chain, h->len);
		return;
	case OP_CREDIT_UPDATE:
		return;
	case OP_CREDIT_REQUEST:
		tell(c, OP_CREDIT_UPDATE);
		return;
	default: /* a second OP_REQUEST too */
		reset_conn(c);
	}
}

static void packet(struct vsock_device *v, const struct virtio_chain *chain)
{
	struct header h;
	bool whole = virtio_chain_read(chain, 0, &h, sizeof(h)) == sizeof(h);
	/* 5.10.6.1: not ours to forward, nor from somebody else. */
	if (!whole || h.src_cid != v->cid || h.dst_cid != VSOCK_HOST_CID) {
		log_warn_once(v->bad_packet, "%s: the driver sent a packet that is too short or addressed to nobody here", v->d.name);
		return;
	}
	struct conn *c = find(v, h.dst_port, h.src_port);
	if (h.type != TYPE_STREAM || h.len > chain->out_len - sizeof(h)) {
		if (c)
			reset_conn(c);
		else
			add_stray(v, &h);
		return;
	}
	if (c)
		packet_for(c, &h, chain);
	else if (h.op == OP_REQUEST)
		guest_connects(v, &h);
	else
		add_stray(v, &h);
}

/* Only a full list of RSTs to send holds the guest's packets up (5.10.6.1.1): for as long as it gives no buffers. */
static void take_tx(struct vsock_device *v)
{
	struct virtio_queue *q = virtio_queue(&v->d, TX);
	unsigned n = 0;
	do {
		virtq_no_notify(q);
		struct virtio_chain *chain;
		while (n < CHAINS_A_ROUND && v->nstrays < STRAYS && (chain = virtq_pop(q))) {
			packet(v, chain);
			virtq_push(q, chain, 0);
			n++;
		}
		virtq_notify(q);
	} while (n < CHAINS_A_ROUND && v->nstrays < STRAYS && virtq_want_notify(q));
	if (n >= CHAINS_A_ROUND)
		vtimer_arm(&v->again, clock_ns());
	v->tx_held = v->nstrays == STRAYS;
}

/* --- from the host's program --- */

/* "CONNECT port\n" -> port; false: something else. */
static bool parse_line(const char *line, uint32_t *port)
{
	uint64_t n = 0;
	const char *p = line + 8;
	if (strncmp(line, "CONNECT ", 8) || *p < '0' || *p > '9')
		return false;
	while (*p >= '0' && *p <= '9' && n <= UINT32_MAX)
		n = n * 10 + (uint64_t)(*p++ - '0');
	*port = (uint32_t)n;
	return *p == '\0' && n <= UINT32_MAX;
}

/* Byte by byte, because the rest is the guest's. */
static void read_handshake(struct conn *c)
{
	struct vsock_device *v = c->dev;
	uint32_t port;
	char byte;
	do {
		ssize_t n = recv(c->fd, &byte, 1, MSG_DONTWAIT);
		if (n < 0 && (errno == EAGAIN || errno == EINTR))
			return;
		if (n <= 0 || c->line_len == LINE_MAX - 1) {
			free_conn(c);
			return;
		}
		c->line[c->line_len++] = byte;
	} while (byte != '\n');
	c->line[c->line_len - 1] = '\0';
	if (!parse_line(c->line, &port) || !virtio_is_live(&v->d)) {
		free_conn(c);
		return;
	}
	unlist(c);
	while (find(v, v->next_port, port))
		v->next_port = v->next_port + 1 < FIRST_PORT ? FIRST_PORT : v->next_port + 1;
	c->port = v->next_port;
	v->next_port = v->next_port + 1 < FIRST_PORT ? FIRST_PORT : v->next_port + 1;
	c->peer_port = port;
	c->state = REQUESTED;
	list(c, true);
	tell(c, OP_REQUEST);
	watch(c);
	fill_rx(v);
}

static void on_ready(void *opaque, uint32_t revents)
{
	struct conn *c = opaque;
	struct vsock_device *v = c->dev;
	bool hangup = revents & (EPOLLHUP | EPOLLERR);
	if (c->state == HANDSHAKE) {
		read_handshake(c);
		return;
	}
	if (c->state == REQUESTED) {
		if (hangup)
			reset_conn(c); /* the host's program did not wait */
		fill_rx(v);
		return;
	}
	if (c->state == ESTABLISHED && (c->watched & EPOLLIN) && (revents & ~(uint32_t)EPOLLOUT)) {
		c->readable = true;
		enqueue(c);
		watch(c);
	} else if (c->state == ESTABLISHED && hangup && (c->host_shut & SHUT_SEND)) {
		host_shut(c, SHUT_RECEIVE);
		if (!c->out_len)
			close_fd(c);
	}
	if (c->out_len && (revents & (EPOLLOUT | EPOLLHUP | EPOLLERR)))
		flush(c);
	fill_rx(v);
}

static void on_accepted(void *opaque, int fd)
{
	struct vsock_device *v = opaque;
	struct conn *c = new_conn(v, fd, HANDSHAKE);
	if (!c)
		return;
	list(c, false);
	watch(c);
}

/* --- the device --- */

static void tell_reset(struct vsock_device *v)
{
	struct virtio_queue *q = virtio_queue(&v->d, EVENT);
	const uint32_t transport_reset = 0; /* VIRTIO_VSOCK_EVENT_TRANSPORT_RESET */
	if (!v->reset_pending)
		return;
	struct virtio_chain *chain = virtq_pop(q);
	if (!chain && virtq_want_notify(q))
		chain = virtq_pop(q);
	if (!chain)
		return;
	v->reset_pending = false;
	virtq_push(q, chain, virtio_chain_write(chain, 0, &transport_reset, sizeof(transport_reset)));
	virtq_notify(q);
}

static void vsock_notify(struct virtio_device *d, unsigned q)
{
	struct vsock_device *v = (struct vsock_device *)d;
	if (q == EVENT) {
		tell_reset(v);
		return;
	}
	if (q == RX)
		fill_rx(v);
	take_tx(v);
	fill_rx(v);
}

static void on_again(void *opaque)
{
	struct vsock_device *v = opaque;
	if (virtio_is_live(&v->d))
		vsock_notify(&v->d, RX);
}

static void drop_all(struct vsock_device *v)
{
	for (unsigned i = 0; i < BUCKETS; i++) {
		while (v->bucket[i])
			free_conn(v->bucket[i]);
	}
	while (v->handshakes)
		free_conn(v->handshakes);
	v->nstrays = 0;
	v->tx_held = false;
}

void virtio_vsock_transport_reset(struct virtio_device *d)
{
	struct vsock_device *v = (struct vsock_device *)d;
	drop_all(v);
	v->reset_pending = true;
	if (virtio_is_live(d))
		tell_reset(v);
}

static bool vsock_reset(struct virtio_device *d)
{
	struct vsock_device *v = (struct vsock_device *)d;
	vtimer_cancel(&v->again);
	drop_all(v);
	v->reset_pending = v->bad_packet = false;
	return true;
}

static void vsock_stats(struct virtio_device *d, char *text, size_t room)
{
	const struct vsock_device *v = (const struct vsock_device *)d;
	size_t used = strlen(text);
	if (used < room)
		snprintf(text + used, room - used, "connections %u\nopened %llu\nrefused %llu\n", v->nconns, (unsigned long long)v->opened,
			 (unsigned long long)v->refused);
}

static void vsock_destroy(struct virtio_device *d)
{
	struct vsock_device *v = (struct vsock_device *)d;
	vsock_set_device(v->host, NULL, NULL);
	vsock_reset(d);
	virtio_fini(d);
	free(v);
}

static const struct virtio_ops vsock_ops = {
	.name = "virtio-vsock",
	.id = VIRTIO_ID_VSOCK,
	.notify = vsock_notify,
	.reset = vsock_reset,
	.destroy = vsock_destroy,
	.stats = vsock_stats,
};

int virtio_vsock_create(struct virtio_device **out, const struct virtio_host *host, struct vsock *hosts_half, struct error *err)
{
	static const uint16_t sizes[] = { QUEUE_SIZE, QUEUE_SIZE, 8 };
	struct vsock_device *v = calloc(1, sizeof(*v));
	if (!v)
		return error_set(err, ENOMEM, "%s: out of memory", host->name);
	v->cid = vsock_cid(hosts_half);
	v->host = hosts_half;
	v->last = &v->first;
	v->next_port = FIRST_PORT;
	/* F_STREAM (bit 0) is not offered: without it a device is one of streams alone (5.10.3). */
	int r = virtio_init(&v->d, &vsock_ops, host, 0, &v->cid, sizeof(v->cid), 3, sizes, err);
	if (r) {
		free(v);
		return r;
	}
	vtimer_init(&v->again, host->loop, on_again, v);
	vsock_set_device(hosts_half, on_accepted, v);
	*out = &v->d;
	return 0;
}
