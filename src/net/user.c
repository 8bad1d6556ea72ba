/*
 * The user-mode network: libslirp plays gateway, DHCP and DNS, and turns the guest's connections into sockets of this process.
 *
 * libslirp wants a poll loop of its own. Here all of its sockets sit in one epoll descriptor, which is in the machine's loop: one callback serves
 * all that are ready, and only changes of what is wanted touch the kernel. Three entries lead in: the guest's frames (send,
 * flush), ready sockets, the timer; after each, sync() asks libslirp what it waits for now.
 *
 * A guest without room for a frame stops that: frames wait in a bounded queue, and no socket is read until the queue is empty.
 */
#include <errno.h>
#include <slirp/libslirp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/queue.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/error.h"
#include "base/keyval.h"
#include "base/log.h"
#include "net/backend.h"
#include "net/ether.h"
#include "net/reassembly.h"
#include "net/user_lib.h"
#include "net/user_options.h"
#include "vm/loop.h"

/*
 * There is no wire: libslirp may exchange packets with us that are larger than the guest's MTU, as large frames both ways. It sends segments
 * of this MTU whatever the guest asks for (4.7 forgets the option on its way through connect). Its windows are below 64 KiB and it waits
 * for room for a whole segment, so of those at least four must fit, or both sides wait for each other; and a whole number of the usual 1460 bytes.
 */
#define SLIRP_MTU (11 * 1460 + 40)
#define EVENTS_A_ROUND 64
#define HELD_MAX (8u << 20) /* bytes; libslirp sends at most 64 KiB a connection without an answer */
#define MAX_SOCKETS 4096    /* of one guest, and no more than half of the process's descriptors */
#define NS_PER_MS 1000000ull
#define IDLE_MS 1000 /* what libslirp says when it waits for no time */
#define NEVER UINT64_MAX

struct held_frame {
	STAILQ_ENTRY(held_frame) link;
	size_t len;
	uint8_t data[];
};

struct user_timer {
	struct user_net *u;
	struct vtimer timer;
	SlirpTimerCb fn;
	void *opaque;
};

/* A socket of libslirp's, by descriptor. */
struct user_fd {
	uint32_t round;	     /* of sync() that last wanted it */
	uint32_t wanted;     /* EPOLL bits, in that round */
	uint32_t registered; /* with the kernel: at least what is wanted; 0: not at all */
	uint32_t ready;
	enum { UNKNOWN, LISTENS, TALKS } kind;
};

struct user_net {
	struct net net;
	Slirp *slirp;
	int epoll_fd;
	struct user_fd *fds; /* by descriptor */
	int nfds;
	int *polls; /* descriptors by libslirp's index, as of the last sync */
	int npolls, polls_room;
	uint32_t round;
	struct vtimer timer;
	uint64_t timer_at;  /* NEVER: not armed */
	uint64_t polled_at; /* when libslirp last looked at the clock */
	unsigned sockets, max_sockets;
	bool said_sockets, said_held;
	STAILQ_HEAD(, held_frame) held;
	size_t held_bytes;
	struct net_reassembly *reassembly;
	uint8_t *frame;		/* NET_FRAME_MAX each: the guest's, */
	uint8_t *segment_in;	/* parts of it, */
	uint8_t *segment_out;	/* and of libslirp's, which may come while that is taken apart */
};

static struct user_net *user_of(struct net *n)
{
	return (struct user_net *)n; /* the first member */
}

/* --- what libslirp waits for --- */

static uint32_t to_epoll(int events)
{
	return (events & SLIRP_POLL_IN ? EPOLLIN : 0u) | (events & SLIRP_POLL_OUT ? EPOLLOUT : 0u) | (events & SLIRP_POLL_PRI ? EPOLLPRI : 0u);
}

static int from_epoll(uint32_t events)
{
	return (events & EPOLLIN ? SLIRP_POLL_IN : 0) | (events & EPOLLOUT ? SLIRP_POLL_OUT : 0) | (events & EPOLLPRI ? SLIRP_POLL_PRI : 0) |
	       (events & EPOLLERR ? SLIRP_POLL_ERR : 0) | (events & EPOLLHUP ? SLIRP_POLL_HUP : 0);
}

static void set_registered(struct user_net *u, int fd, uint32_t events)
{
	struct user_fd *f = &u->fds[fd];
	struct epoll_event ev = { .events = events, .data.fd = fd };
	if (!events) {
		epoll_ctl(u->epoll_fd, EPOLL_CTL_DEL, fd, NULL);
	} else if (epoll_ctl(u->epoll_fd, f->registered ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, fd, &ev) < 0) {
		/* libslirp closed it without a word, and the number is in use again; or the other way round. */
		if (errno != ENOENT && errno != EEXIST)
			return;
		if (epoll_ctl(u->epoll_fd, errno == ENOENT ? EPOLL_CTL_ADD : EPOLL_CTL_MOD, fd, &ev) < 0)
			return;
	}
	f->registered = events;
}

static bool grow(void **array, int *room, int need, size_t size)
{
	if (need <= *room)
		return true;
	int n = *room * 2 > need ? *room * 2 : need + 15;
	void *p = realloc(*array, (size_t)n * size);
	if (!p)
		return false;
	memset((char *)p + (size_t)*room * size, 0, (size_t)(n - *room) * size);
	*array = p;
	*room = n;
	return true;
}

static bool is_full(struct user_net *u)
{
	if (u->sockets < u->max_sockets)
		return false;
	log_warn_once(u->said_sockets, "user network: the guest has %u connections open; new ones are dropped, or wait, until some are closed", u->sockets);
	return true;
}

/* A forwarded port: whoever connects there must not take the descriptors of the whole process, nor keep it busy when there are none left. */
static bool listens(struct user_fd *f, int fd)
{
	int on = 0;
	socklen_t len = sizeof(on);
	if (f->kind == UNKNOWN)
		f->kind = getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &on, &len) == 0 && on ? LISTENS : TALKS;
	return f->kind == LISTENS;
}

static int on_add_poll(int fd, int events, void *opaque)
{
	struct user_net *u = opaque;
	if (fd < 0 || !grow((void **)&u->fds, &u->nfds, fd + 1, sizeof(*u->fds)) ||
	    !grow((void **)&u->polls, &u->polls_room, u->npolls + 1, sizeof(*u->polls)))
		return -1;
	struct user_fd *f = &u->fds[fd];
	if (f->round != u->round)
		f->wanted = 0;
	f->round = u->round;
	if (!listens(f, fd) || !is_full(u))
		f->wanted |= to_epoll(events);
	u->polls[u->npolls] = fd;
	return u->npolls++;
}

static void arm(struct user_net *u, uint64_t at)
{
	/* An earlier wake-up than needed only asks again. */
	if (at >= u->timer_at)
		return;
	u->timer_at = at;
	vtimer_arm(&u->timer, at);
}

static bool is_wanted(const struct user_net *u, const struct user_fd *f)
{
	return f->round == u->round && f->wanted;
}

/* Ask libslirp what it waits for. Events that it no longer wants stay registered until they fire: a busy connection goes to and fro. */
static void sync_polls(struct user_net *u)
{
	uint32_t timeout = UINT32_MAX;
	u->round++;
	u->npolls = 0;
	slirp_pollfds_fill(u->slirp, &timeout, on_add_poll, u);
	for (int i = 0; i < u->npolls; i++) {
		int fd = u->polls[i];
		struct user_fd *f = &u->fds[fd];
		if (f->wanted & ~f->registered)
			set_registered(u, fd, f->wanted);
	}
	if (timeout < IDLE_MS)
		arm(u, clock_ns() + timeout * NS_PER_MS);
}

static int on_get_revents(int index, void *opaque)
{
	struct user_net *u = opaque;
	return index >= 0 && index < u->npolls ? from_epoll(u->fds[u->polls[index]].ready) : 0;
}

/* Let libslirp see the time, run what is due, and send what waited for an address. */
static void tick(struct user_net *u)
{
	u->polled_at = clock_ns();
	slirp_pollfds_poll(u->slirp, 1, on_get_revents, u);
}

static void on_ready(void *opaque, uint32_t revents)
{
	(void)revents;
	struct user_net *u = opaque;
	struct epoll_event ev[EVENTS_A_ROUND];
	int n = epoll_wait(u->epoll_fd, ev, EVENTS_A_ROUND, 0);
	bool any = false;
	for (int i = 0; i < n; i++) {
		int fd = ev[i].data.fd;
		struct user_fd *f = &u->fds[fd];
		uint32_t events = is_wanted(u, f) ? f->wanted : 0;
		f->ready = events ? ev[i].events & (events | EPOLLERR | EPOLLHUP) : 0;
		if (f->ready)
			any = true;
		else
			set_registered(u, fd, events);
	}
	if (!any)
		return;
	u->polled_at = clock_ns();
	slirp_pollfds_poll(u->slirp, 0, on_get_revents, u);
	for (int i = 0; i < n; i++)
		u->fds[ev[i].data.fd].ready = 0;
	sync_polls(u);
}

static void on_timer(void *opaque)
{
	struct user_net *u = opaque;
	u->timer_at = NEVER;
	tick(u);
	sync_polls(u);
}

/* --- libslirp's callbacks --- */

static void on_register(int fd, void *opaque)
{
	struct user_net *u = opaque;
	u->sockets++;
	if (fd >= 0 && fd < u->nfds)
		u->fds[fd].kind = UNKNOWN;
}

/* It is about to be closed. */
static void on_unregister(int fd, void *opaque)
{
	struct user_net *u = opaque;
	if (u->sockets)
		u->sockets--;
	if (fd < 0 || fd >= u->nfds)
		return;
	if (u->fds[fd].registered)
		set_registered(u, fd, 0);
	u->fds[fd] = (struct user_fd){ 0 };
}

static int64_t on_clock(void *opaque)
{
	(void)opaque;
	return (int64_t)clock_ns();
}

static void on_user_timer(void *opaque)
{
	struct user_timer *t = opaque;
	t->fn(t->opaque);
	sync_polls(t->u);
}

static void *on_timer_new(SlirpTimerCb fn, void *cb_opaque, void *opaque)
{
	struct user_net *u = opaque;
	struct user_timer *t = malloc(sizeof(*t));
	if (!t)
		return NULL;
	*t = (struct user_timer){ .u = u, .fn = fn, .opaque = cb_opaque };
	vtimer_init(&t->timer, u->net.loop, on_user_timer, t);
	return t;
}

static void on_timer_free(void *timer, void *opaque)
{
	struct user_timer *t = timer;
	(void)opaque;
	if (!t)
		return;
	vtimer_cancel(&t->timer);
	free(t);
}

static void on_timer_mod(void *timer, int64_t expire_ms, void *opaque)
{
	struct user_timer *t = timer;
	(void)opaque;
	if (t)
		vtimer_arm(&t->timer, expire_ms > 0 ? (uint64_t)expire_ms * NS_PER_MS : 0);
}

static void on_guest_error(const char *text, void *opaque)
{
	(void)opaque;
	log_debug("user network: %s", text); /* a guest's doing, as often as it likes: nothing for the terminal */
}

static void on_notify(void *opaque)
{
	(void)opaque; /* every way in ends with sync_polls */
}

/* --- to the guest --- */

/* One frame as libslirp sent it, or a part of it. */
static bool deliver(struct user_net *u, const uint8_t *frame, size_t len)
{
	/* Nothing came over a wire: what libslirp computed a moment ago needs no checking. */
	struct net_header h = { .flags = NET_DATA_VALID };
	struct iovec iov[3] = { { (void *)frame, len } };
	uint16_t sum;
	if (len - ETHER_HEADER <= u->net.guest_mtu || net_large_frame(&h, &sum, frame, len, u->net.guest_mtu))
		return net_deliver(&u->net, 0, &h, iov, 1);
	size_t at = (size_t)h.csum_start + h.csum_offset;
	iov[0].iov_len = at;
	iov[1] = (struct iovec){ &sum, sizeof(sum) };
	iov[2] = (struct iovec){ (void *)(frame + at + sizeof(sum)), len - at - sizeof(sum) };
	return net_deliver(&u->net, 0, &h, iov, 3);
}

static void listen_to_sockets(struct user_net *u, bool on)
{
	loop_add_fd(u->net.loop, u->epoll_fd, on ? EPOLLIN : 0, on_ready, u);
}

static void hold(struct user_net *u, const uint8_t *frame, size_t len)
{
	struct held_frame *f = u->held_bytes + len > HELD_MAX ? NULL : malloc(sizeof(*f) + len);
	if (!f) {
		u->net.stats.rx_dropped++;
		return;
	}
	f->len = len;
	memcpy(f->data, frame, len);
	if (STAILQ_EMPTY(&u->held))
		listen_to_sockets(u, false);
	STAILQ_INSERT_TAIL(&u->held, f, link);
	u->held_bytes += len;
}

static void output(void *opaque, const uint8_t *frame, size_t len)
{
	struct user_net *u = opaque;
	if (!STAILQ_EMPTY(&u->held) || !deliver(u, frame, len))
		hold(u, frame, len);
}

static ssize_t on_send_packet(const void *frame, size_t len, void *opaque)
{
	struct user_net *u = opaque;
	struct net_header h;
	uint16_t sum;
	const unsigned large = NET_GIVES_TSO4 | NET_GIVES_TSO6;
	if (len <= ETHER_HEADER + (size_t)u->net.guest_mtu || (u->net.guest_offloads & large) == large)
		output(u, frame, len);
	else if (net_large_frame(&h, &sum, frame, len, u->net.guest_mtu) == 0)
		net_segment(&h, frame, len, u->segment_out, output, u);
	else if (net_fragment(frame, len, u->net.guest_mtu, u->segment_out, output, u))
		output(u, frame, len); /* IPv6 has no way but to try */
	return (ssize_t)len;
}

static void user_resume(struct net *n)
{
	struct user_net *u = user_of(n);
	struct held_frame *f;
	if (STAILQ_EMPTY(&u->held))
		return;
	while ((f = STAILQ_FIRST(&u->held))) {
		if (!deliver(u, f->data, f->len))
			return;
		STAILQ_REMOVE_HEAD(&u->held, link);
		u->held_bytes -= f->len;
		free(f);
	}
	listen_to_sockets(u, true);
}

/* --- from the guest --- */

static void input(void *opaque, const uint8_t *frame, size_t len)
{
	struct user_net *u = opaque;
	/* libslirp 4.7 writes where the guest says when a fragment comes that is not the first: it never sees any. */
	if (net_is_fragment(frame, len))
		frame = net_reassembly_add(u->reassembly, frame, len, &len);
	if (frame)
		slirp_input(u->slirp, frame, (int)len);
}

/* With too many sockets open, what would open another is dropped: TCP's first segments and UDP, of which libslirp forgets old ones. */
static bool may_pass(struct user_net *u, const uint8_t *f, size_t len)
{
	if (!is_full(u))
		return true;
	bool v6 = load_be16(f + 12) == ETHERTYPE_IP6;
	if (!v6 && load_be16(f + 12) != ETHERTYPE_IP4)
		return true; /* ARP: without it a guest cannot even close what is open */
	size_t ip = ETHER_HEADER, l4 = ip + (v6 ? IP6_HEADER : len > ip ? (f[ip] & 15u) * 4 : 0);
	if (l4 + 20 > len)
		return false;
	uint8_t proto = f[ip + (v6 ? 6 : 9)];
	if (v6 && proto == PROTO_ICMP6)
		return true; /* neighbour discovery: likewise */
	return proto == PROTO_TCP && (f[l4 + 13] & (TCP_SYN | TCP_ACK)) != TCP_SYN;
}

/* The frame in u->frame, of `len` bytes. */
static int input_any(struct user_net *u, const struct net_header *h, size_t len)
{
	struct net_header cut = *h;
	int r;
	switch (h->gso_type) {
	case NET_GSO_UDP_L4:
		return net_segment(h, u->frame, len, u->segment_in, input, u);
	case NET_GSO_TCP6: /* IPv6 is held to the MTU: 100 bytes are for the headers */
		cut.gso_size = SLIRP_MTU - 100;
		return net_segment(&cut, u->frame, len, u->segment_in, input, u);
	case NET_GSO_NONE:
		r = net_finish_checksum(h, u->frame, len);
		break;
	default:
		r = net_whole_packet(h, u->frame, len);
	}
	if (!r)
		input(u, u->frame, len);
	return r;
}

static bool user_send(struct net *n, unsigned q, const struct net_header *h, const struct iovec *iov, unsigned niov)
{
	(void)q;
	struct user_net *u = user_of(n);
	size_t len = net_gather(u->frame, NET_FRAME_MAX, iov, niov);
	/* libslirp stamps new sockets with the time of its last poll, which may be long ago. */
	if (clock_ns() - u->polled_at > 100 * NS_PER_MS)
		tick(u);

	int r = may_pass(u, u->frame, len) ? input_any(u, h, len) : -EMFILE;
	if (r)
		n->stats.tx_dropped++;
	return true;
}

static void user_flush(struct net *n)
{
	struct user_net *u = user_of(n);
	tick(u);
	sync_polls(u);
}

/* --- opening --- */

static const SlirpCb callbacks = {
	.send_packet = on_send_packet,
	.guest_error = on_guest_error,
	.clock_get_ns = on_clock,
	.timer_new = on_timer_new,
	.timer_free = on_timer_free,
	.timer_mod = on_timer_mod,
	.register_poll_fd = on_register,
	.unregister_poll_fd = on_unregister,
	.notify = on_notify,
};

static int forward_ports(struct user_net *u, const struct user_options *o, const char *option, struct error *err)
{
	for (unsigned i = 0; i < o->nforwards; i++) {
		const struct user_forward *f = &o->forward[i];
		if (slirp_add_hostxfwd(u->slirp, &f->host.sa, sizeof(f->host), &f->guest.sa, sizeof(f->guest), f->udp ? SLIRP_HOSTFWD_UDP : 0) == 0)
			continue;
		int code = errno;
		unsigned port = ntohs(f->host.sa.sa_family == AF_INET6 ? f->host.in6.sin6_port : f->host.in.sin_port);
		if (code == EADDRINUSE)
			return error_set(err, code, "%s: hostfwd=%s: port %u of this host is taken by another program; choose another one", option, f->text,
					 port);
		return error_set(err, code, "%s: hostfwd=%s: cannot listen on port %u of this host: %s", option, f->text, port, strerror(code));
	}
	return 0;
}

static void user_close(struct net *n)
{
	struct user_net *u = user_of(n);
	struct held_frame *f;
	if (u->slirp)
		slirp_cleanup(u->slirp);
	vtimer_cancel(&u->timer);
	if (u->epoll_fd >= 0) {
		loop_del_fd(n->loop, u->epoll_fd);
		close(u->epoll_fd);
	}
	while ((f = STAILQ_FIRST(&u->held))) {
		STAILQ_REMOVE_HEAD(&u->held, link);
		free(f);
	}
	free(u->fds);
	free(u->polls);
	net_reassembly_destroy(u->reassembly);
	free(u->frame);
	free(u->segment_in);
	free(u->segment_out);
	free(u);
}

static unsigned socket_limit(void)
{
	struct rlimit limit;
	if (getrlimit(RLIMIT_NOFILE, &limit) < 0 || limit.rlim_cur / 2 > MAX_SOCKETS)
		return MAX_SOCKETS;
	return (unsigned)limit.rlim_cur / 2;
}

static int user_open(struct net **out, struct keyval *kv, struct loop *loop, struct error *err)
{
	struct user_options o;
	int r = user_options_parse(&o, kv, err);
	if (r)
		return r;
	struct error why;
	if (user_lib_load(&why))
		return error_set(err, ENOENT, "%s: %.450s", kv->option, why.text);
	struct user_net *u = calloc(1, sizeof(*u));
	if (!u)
		return error_set(err, ENOMEM, "%s: out of memory", kv->option);
	net_init(&u->net, &net_backend_user, loop);
	u->net.info.caps = NET_CAN_CSUM | NET_CAN_TSO4 | NET_CAN_TSO6 | NET_CAN_USO | NET_GIVES_CSUM | NET_GIVES_TSO4 | NET_GIVES_TSO6;
	char text[INET_ADDRSTRLEN];
	snprintf(u->net.describe, sizeof(u->net.describe), "user, %s/%u%s", inet_ntop(AF_INET, &o.net, text, sizeof(text)), o.prefix,
		 o.restricted ? ", restricted" : "");
	STAILQ_INIT(&u->held);
	vtimer_init(&u->timer, loop, on_timer, u);
	u->timer_at = NEVER;
	u->max_sockets = socket_limit();
	u->reassembly = net_reassembly_create();
	u->frame = malloc(NET_FRAME_MAX);
	u->segment_in = malloc(NET_FRAME_MAX);
	u->segment_out = malloc(NET_FRAME_MAX);
	u->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	if (u->epoll_fd < 0 || !u->reassembly || !u->frame || !u->segment_in || !u->segment_out) {
		r = error_set(err, u->epoll_fd < 0 ? errno : ENOMEM, "%s: cannot start the user network: out of memory or descriptors", kv->option);
		goto fail;
	}

	SlirpConfig config = {
		.version = 4,
		.restricted = o.restricted,
		.in_enabled = true,
		.vnetwork = o.net,
		.vnetmask = o.mask,
		.vhost = o.host,
		.vdhcp_start = o.dhcp,
		.vnameserver = o.dns,
		.in6_enabled = o.ipv6,
		.vprefix_len = 64,
		.vhostname = o.hostname,
		.if_mtu = SLIRP_MTU,
		.if_mru = SLIRP_MTU,
	};
	/* fec0::/64 with the host at ::2 and the name server at ::3, as elsewhere */
	inet_pton(AF_INET6, "fec0::", &config.vprefix_addr6);
	inet_pton(AF_INET6, "fec0::2", &config.vhost6);
	inet_pton(AF_INET6, "fec0::3", &config.vnameserver6);
	clock_init(); /* libslirp asks for the time at once, and this may be the first who does */
	u->polled_at = clock_ns();
	u->slirp = slirp_new(&config, &callbacks, u);
	if (!u->slirp) {
		r = error_set(err, EINVAL, "%s: libslirp %s refuses this configuration", kv->option, slirp_version_string());
		goto fail;
	}
	if ((r = forward_ports(u, &o, kv->option, err)))
		goto fail;
	r = loop_add_fd(loop, u->epoll_fd, EPOLLIN, on_ready, u);
	if (r) {
		error_set(err, -r, "%s: cannot watch the user network's sockets: %s", kv->option, strerror(-r));
		goto fail;
	}
	tick(u);
	sync_polls(u);
	*out = &u->net;
	return 0;

fail:
	user_close(&u->net);
	return r;
}

const struct net_backend net_backend_user = {
	.type = "user",
	.open = user_open,
	.close = user_close,
	.send = user_send,
	.flush = user_flush,
	.resume = user_resume,
};
