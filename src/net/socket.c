/*
 * socket: an Ethernet cable between two VMs, over a Unix socket or TCP. One listens, one connects; QEMU's -netdev stream may be either.
 *
 * The connecting side tries again every second for as long as there is nobody; the listening side takes one peer at a time
 * and hangs up on others. Without a peer the link is down and frames are lost, as on a cable that is not plugged in.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/error.h"
#include "base/keyval.h"
#include "base/log.h"
#include "base/sock.h"
#include "net/backend.h"
#include "net/stream.h"
#include "vm/loop.h"

#define SEGMENT_HEADERS 140 /* Ethernet with a tag, the longest IP and TCP headers that net_segment keeps */
#define RETRY_NS NS_PER_SEC

struct cable {
	struct net net;
	struct stream stream;
	struct sock_listener listener; /* listen= */
	struct sock_addr peer;	       /* connect= */
	int connecting;		       /* the descriptor of a connection that TCP still makes, or -1 */
	struct vtimer retry;	       /* connect again; listen again after accept failed */
	char where[128];
	uint8_t frame[NET_FRAME_MAX], segment[NET_FRAME_MAX]; /* a large one, and a piece of it */
	bool crowded, failed; /* said so */
};

static struct cable *of(struct net *n)
{
	return (struct cable *)n;
}

/* --- frames --- */

static void send_segment(void *opaque, const uint8_t *frame, size_t len)
{
	struct cable *c = opaque;
	const struct iovec iov = { (void *)frame, len };
	if (stream_send(&c->stream, &iov, 1) != STREAM_SENT)
		c->net.stats.tx_dropped++;
}

/* A large frame, cut here in native code rather than by the guest. The peer takes ordinary ones only. */
static bool send_large(struct cable *c, const struct net_header *h, const struct iovec *iov, unsigned niov)
{
	size_t len = net_gather(c->frame, NET_FRAME_MAX, iov, niov);
	size_t room = len + (len / h->gso_size + 1) * (4 + SEGMENT_HEADERS);
	if (room <= STREAM_RESERVE_MAX && !stream_reserve(&c->stream, room))
		return false;
	if (room > STREAM_RESERVE_MAX || net_segment(h, c->frame, len, c->segment, send_segment, c))
		c->net.stats.tx_dropped++;
	return true;
}

static bool send_frame(struct net *n, unsigned q, const struct net_header *h, const struct iovec *iov, unsigned niov)
{
	(void)q;
	struct cable *c = of(n);
	struct iovec whole;
	if (h->gso_type != NET_GSO_NONE)
		return send_large(c, h, iov, niov);
	if (h->flags & NET_NEEDS_CSUM) {
		if (!stream_reserve(&c->stream, STREAM_FRAME_ROOM))
			return false; /* before the work, not after */
		whole = (struct iovec){ c->frame, net_gather(c->frame, NET_FRAME_MAX, iov, niov) };
		if (net_finish_checksum(h, c->frame, whole.iov_len)) {
			n->stats.tx_dropped++;
			return true;
		}
		iov = &whole;
		niov = 1;
	}
	enum stream_sent r = stream_send(&of(n)->stream, iov, niov);
	if (r == STREAM_LOST)
		n->stats.tx_dropped++;
	return r != STREAM_FULL;
}

static bool on_frame(void *opaque, const uint8_t *frame, size_t len)
{
	struct cable *c = opaque;
	const struct net_header h = { 0 }; /* who knows what the peer sends: the guest checks its checksums */
	const struct iovec iov = { (void *)frame, len };
	return net_deliver(&c->net, 0, &h, &iov, 1);
}

static void on_writable(void *opaque)
{
	struct cable *c = opaque;
	net_writable(&c->net, 0);
}

static void flush(struct net *n)
{
	stream_flush(&of(n)->stream);
}

static void resume(struct net *n)
{
	stream_resume(&of(n)->stream);
}

/* --- the connection --- */

static void plug(struct cable *c, int fd)
{
	int r = stream_start(&c->stream, fd);
	if (r) {
		log_warn("--net socket: cannot watch the connection: %s", strerror(-r));
		if (c->peer.len)
			vtimer_arm(&c->retry, clock_ns() + RETRY_NS);
		return;
	}
	c->failed = false;
	log_info("--net socket: connected, %s", c->where);
	net_set_link(&c->net, true);
}

static void on_closed(void *opaque, const char *why)
{
	struct cable *c = opaque;
	log_info("--net socket: %s: the connection ended (%s)", c->where, why);
	net_set_link(&c->net, false);
	if (c->peer.len)
		vtimer_arm(&c->retry, clock_ns() + RETRY_NS);
}

static void connection_failed(struct cable *c, int code)
{
	log_warn_once(c->failed, "--net socket: %s: nobody there yet (%s); trying again every second", c->where, strerror(-code));
	vtimer_arm(&c->retry, clock_ns() + RETRY_NS);
}

static void on_connected(void *opaque, uint32_t revents)
{
	struct cable *c = opaque;
	(void)revents;
	int fd = c->connecting, r = sock_connected(fd);
	loop_del_fd(c->net.loop, fd);
	c->connecting = -1;
	if (!r) {
		plug(c, fd);
		return;
	}
	close(fd);
	connection_failed(c, r);
}

static void try_connect(struct cable *c)
{
	int fd = sock_connect(&c->peer);
	if (fd < 0) {
		connection_failed(c, fd);
	} else if (c->peer.sa.ss_family == AF_UNIX) {
		plug(c, fd);
	} else if (loop_add_fd(c->net.loop, fd, EPOLLOUT, on_connected, c)) {
		close(fd);
		connection_failed(c, -ENOMEM);
	} else {
		c->connecting = fd;
	}
}

static void on_accept(void *opaque, uint32_t revents)
{
	struct cable *c = opaque;
	(void)revents;
	int fd = sock_accept(&c->listener);
	if (fd == -EAGAIN)
		return;
	if (fd < 0) {
		/* Out of descriptors or memory: the connection stays and would be reported without end. */
		log_warn_once(c->failed, "--net socket: %s: cannot take a connection: %s", c->where, strerror(-fd));
		loop_del_fd(c->net.loop, c->listener.fd);
		vtimer_arm(&c->retry, clock_ns() + RETRY_NS);
		return;
	}
	if (c->stream.fd >= 0) {
		log_warn_once(c->crowded, "--net socket: %s: has its one peer already; another one was turned away", c->where);
		close(fd);
		return;
	}
	plug(c, fd);
}

static void on_retry(void *opaque)
{
	struct cable *c = opaque;
	if (c->listener.fd >= 0)
		loop_add_fd(c->net.loop, c->listener.fd, EPOLLIN, on_accept, c);
	else if (c->stream.fd < 0 && c->connecting < 0)
		try_connect(c);
}

/* --- open and close --- */

static int open_listener(struct cable *c, const char *where, struct error *err)
{
	struct sock_addr addr;
	snprintf(c->where, sizeof(c->where), "listen=%.110s", where);
	char what[160];
	snprintf(what, sizeof(what), "--net socket: %s", c->where);
	int r = sock_resolve(&addr, where, true, what, err);
	if (r)
		return r;
	r = sock_listen(&c->listener, &addr, 4);
	if (r == -EADDRINUSE)
		return error_set(err, EADDRINUSE, "%s: another program listens there; use connect= to be its peer, or another address", what);
	if (r == -EEXIST)
		return error_set(err, EEXIST, "%s: there is a file that is no socket; remove it or choose another path", what);
	if (r)
		return error_set(err, -r, "%s: cannot listen: %s", what, strerror(-r));
	r = loop_add_fd(c->net.loop, c->listener.fd, EPOLLIN, on_accept, c);
	return r ? error_set(err, -r, "%s: cannot watch it: %s", what, strerror(-r)) : 0;
}

static int open_connection(struct cable *c, const char *where, struct error *err)
{
	snprintf(c->where, sizeof(c->where), "connect=%.110s", where);
	char what[160];
	snprintf(what, sizeof(what), "--net socket: %s", c->where);
	int r = sock_resolve(&c->peer, where, false, what, err);
	if (!r)
		try_connect(c);
	return r;
}

static void close_cable(struct net *n)
{
	struct cable *c = of(n);
	vtimer_cancel(&c->retry);
	if (c->listener.fd >= 0)
		loop_del_fd(n->loop, c->listener.fd);
	sock_unlisten(&c->listener);
	if (c->connecting >= 0) {
		loop_del_fd(n->loop, c->connecting);
		close(c->connecting);
	}
	stream_fini(&c->stream);
	free(c);
}

static const struct stream_ops stream_ops = { .frame = on_frame, .writable = on_writable, .closed = on_closed };

static int open_cable(struct net **out, struct keyval *kv, struct loop *loop, struct error *err)
{
	const char *listen = keyval_get(kv, "listen"), *connect = keyval_get(kv, "connect");
	if (!listen == !connect)
		return error_set(err, EINVAL, "--net socket: needs either listen= or connect=, with a path or HOST:PORT; the other VM takes the other one");
	uint64_t mtu = 0;
	int r = keyval_u64(kv, "mtu", 1280, 65520, &mtu, err);
	if (r)
		return r;
	struct cable *c = calloc(1, sizeof(*c));
	if (!c)
		return error_set(err, ENOMEM, "--net socket: out of memory");
	net_init(&c->net, &net_backend_socket, loop);
	vtimer_init(&c->retry, loop, on_retry, c);
	c->listener.fd = c->connecting = -1;
	c->net.info.caps = NET_CAN_CSUM | NET_CAN_TSO4 | NET_CAN_TSO6 | NET_CAN_USO;
	c->net.info.link = false;
	c->net.info.mtu = (uint16_t)mtu;
	r = stream_init(&c->stream, loop, &stream_ops, c);
	if (r)
		error_set(err, -r, "--net socket: out of memory");
	else
		r = listen ? open_listener(c, listen, err) : open_connection(c, connect, err);
	if (r) {
		close_cable(&c->net);
		return r;
	}
	snprintf(c->net.describe, sizeof(c->net.describe), "socket, %s", c->where);
	*out = &c->net;
	return 0;
}

const struct net_backend net_backend_socket = {
	.type = "socket",
	.open = open_cable,
	.close = close_cable,
	.send = send_frame,
	.flush = flush,
	.resume = resume,
};
