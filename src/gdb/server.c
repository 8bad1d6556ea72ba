#include "gdb/server.h"

#include <errno.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/error.h"
#include "base/keyval.h"
#include "base/log.h"
#include "base/sock.h"
#include "gdb/packet.h"
#include "gdb/stub.h"
#include "vm/loop.h"

#define IN_MAX 4096
#define OUT_MAX (4 * GDB_ENCODED_MAX) /* that a peer has not read: then it is gone. gdb reads one answer before it asks again */

struct gdb_server {
	struct loop *loop;
	struct gdb_stub *stub;
	struct sock_listener listener;
	struct vtimer retry; /* descriptors ran out: listen again later */
	bool wait, refused;
	int fd; /* the peer; -1: none */
	bool greeted;	 /* it has begun as gdb does */
	bool stranger;	 /* one that did not was told of */
	bool closing;	 /* when what is in `out` has been sent */
	bool broken;	 /* to be dropped when nobody is in the middle of it */
	size_t in_len, out_len;
	uint8_t in[IN_MAX];
	char out[OUT_MAX];
};

/* --- the option --- */

struct gdb_options {
	bool wait;
	struct sock_addr addr;
};

static int parse(struct gdb_options *o, const char *spec, bool resolve, struct error *err)
{
	struct keyval kv;
	char what[300];
	*o = (struct gdb_options){ 0 };
	int r = keyval_parse(&kv, "--gdb", spec, "listen", err);
	const char *listen = r ? NULL : keyval_get(&kv, "listen");
	if (!r)
		r = keyval_bool(&kv, "wait", &o->wait, err);
	if (!r)
		r = keyval_finish(&kv, err);
	if (r)
		return r;
	bool tcp = listen && !strncmp(listen, "tcp:", 4), local = listen && !strncmp(listen, "unix:", 5);
	if (!tcp && !local)
		return error_set(err, EINVAL, "--gdb %.200s: neither tcp:HOST:PORT nor unix:PATH; write for example --gdb tcp:127.0.0.1:1234", spec);
	snprintf(what, sizeof(what), "--gdb %.250s", listen);
	if (local)
		return sock_unix(&o->addr, listen + 5, what, err);
	if (strchr(listen, '/') || !strchr(listen + 4, ':') || !*(strrchr(listen, ':') + 1))
		return error_set(err, EINVAL, "--gdb %.200s: not tcp:HOST:PORT; write for example --gdb tcp:127.0.0.1:1234", listen);
	return resolve ? sock_resolve(&o->addr, listen + 4, true, what, err) : 0;
}

int gdb_check(const char *spec, struct error *err)
{
	struct gdb_options o;
	return parse(&o, spec, false, err);
}

static bool is_loopback(const struct sock_addr *addr)
{
	if (addr->sa.ss_family == AF_INET)
		return ntohl(((const struct sockaddr_in *)&addr->sa)->sin_addr.s_addr) >> 24 == 127;
	if (addr->sa.ss_family == AF_INET6)
		return IN6_IS_ADDR_LOOPBACK(&((const struct sockaddr_in6 *)&addr->sa)->sin6_addr);
	return true;
}

/* --- the peer --- */

static void on_peer(void *opaque, uint32_t revents);

static void drop(struct gdb_server *s)
{
	loop_del_fd(s->loop, s->fd);
	close(s->fd);
	s->fd = -1;
	s->in_len = s->out_len = 0;
	s->greeted = s->closing = s->broken = false;
	gdb_stub_peer_gone(s->stub);
}

/* Send what waits, as far as it goes. */
static void flush(struct gdb_server *s)
{
	while (s->out_len && !s->broken) {
		ssize_t n = send(s->fd, s->out, s->out_len, MSG_NOSIGNAL | MSG_DONTWAIT);
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && errno != EAGAIN && errno != EWOULDBLOCK)
			s->broken = true;
		if (n <= 0)
			return;
		s->out_len -= (size_t)n;
		memmove(s->out, s->out + n, s->out_len);
	}
}

static void stub_send(void *opaque, const char *bytes, size_t len)
{
	struct gdb_server *s = opaque;
	if (s->fd < 0 || s->broken)
		return;
	if (len > sizeof(s->out) - s->out_len) {
		s->broken = true;
		return;
	}
	memcpy(s->out + s->out_len, bytes, len);
	s->out_len += len;
	flush(s);
}

static void stub_close(void *opaque)
{
	struct gdb_server *s = opaque;
	s->closing = true;
}

/* What came, to the stub; then drop the peer if it has to go, or listen for what it can be given. */
static void go_on(struct gdb_server *s)
{
	if (s->fd < 0)
		return;
	if (!s->broken && !s->closing && s->in_len) {
		size_t n = gdb_stub_feed(s->stub, s->in, s->in_len);
		s->in_len -= n;
		memmove(s->in, s->in + n, s->in_len);
	}
	flush(s);
	uint32_t events = (s->in_len < sizeof(s->in) ? EPOLLIN : 0) | (s->out_len ? EPOLLOUT : 0);
	if (s->broken || (s->closing && !s->out_len) || loop_add_fd(s->loop, s->fd, events, on_peer, s))
		drop(s);
}

static void stub_ready(void *opaque)
{
	go_on(opaque);
}

/* gdb begins with an acknowledgement, a packet or Ctrl-C. Who begins otherwise is a web browser that a page sends to this port: its request may have
 * packets in it. */
static void look_at_greeting(struct gdb_server *s)
{
	if (s->greeted || !s->in_len)
		return;
	s->greeted = memchr("+-$\003", s->in[0], 4) != NULL;
	if (s->greeted)
		return;
	s->broken = true;
	log_warn_once(s->stranger, "gdb: a connection was closed: what it said is not gdb's protocol");
}

static void on_peer(void *opaque, uint32_t revents)
{
	struct gdb_server *s = opaque;
	if (s->in_len < sizeof(s->in)) {
		ssize_t n = recv(s->fd, s->in + s->in_len, sizeof(s->in) - s->in_len, MSG_DONTWAIT);
		if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR))
			s->broken = true;
		s->in_len += n > 0 ? (size_t)n : 0;
		look_at_greeting(s);
	} else if (revents & (EPOLLERR | EPOLLHUP)) {
		s->broken = true;
	}
	go_on(s);
}

/* --- listening --- */

static bool is_trusted(const struct gdb_server *s, int fd)
{
	struct ucred peer;
	socklen_t len = sizeof(peer);
	if (s->listener.addr.sa.ss_family != AF_UNIX)
		return true;
	return getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &len) == 0 && (peer.uid == geteuid() || peer.uid == 0);
}

/* The peer we have may have gone in the same round. */
static bool peer_is_gone(const struct gdb_server *s)
{
	char byte;
	ssize_t n = recv(s->fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT);
	return n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR);
}

static void on_listen(void *opaque, uint32_t revents)
{
	struct gdb_server *s = opaque;
	(void)revents;
	int fd = sock_accept(&s->listener);
	if (fd < 0 && fd != -EAGAIN) {
		/* It stays readable: without a pause this would be a busy loop. */
		loop_del_fd(s->loop, s->listener.fd);
		vtimer_arm(&s->retry, clock_ns() + NS_PER_SEC);
	}
	if (fd < 0)
		return;
	if (s->fd >= 0 && peer_is_gone(s))
		drop(s);
	bool trusted = is_trusted(s, fd);
	if (s->fd >= 0 || !trusted) {
		log_warn_once(s->refused, "gdb: a connection was refused: %s", trusted ? "there is one already" : "it is another user's");
		close(fd);
		return;
	}
	s->fd = fd;
	go_on(s);
}

static void on_retry(void *opaque)
{
	struct gdb_server *s = opaque;
	if (loop_add_fd(s->loop, s->listener.fd, EPOLLIN, on_listen, s))
		vtimer_arm(&s->retry, clock_ns() + NS_PER_SEC);
}

/* --- life --- */

static int start(struct gdb_server *s, const char *spec, struct error *err)
{
	struct gdb_options o;
	const struct gdb_peer peer = { stub_send, stub_ready, stub_close, s };
	int r = parse(&o, spec, true, err);
	if (r)
		return r;
	s->wait = o.wait;
	r = gdb_stub_create(&s->stub, &peer, err);
	if (r)
		return r;
	r = sock_listen(&s->listener, &o.addr, 4);
	if (r)
		return error_set(err, -r, "--gdb %.200s: cannot listen there: %s; choose another port or path", spec, strerror(-r));
	r = loop_add_fd(s->loop, s->listener.fd, EPOLLIN, on_listen, s);
	if (r)
		return error_set(err, -r, "--gdb: cannot watch the socket: %s", strerror(-r));
	if (!is_loopback(&o.addr))
		log_warn("--gdb %.200s: anyone who can reach this address owns the guest; tcp:127.0.0.1:PORT or unix:PATH keep others out", spec);
	return 0;
}

int gdb_server_create(struct gdb_server **out, const char *spec, struct loop *loop, struct error *err)
{
	struct gdb_server *s = calloc(1, sizeof(*s));
	if (!s)
		return error_set(err, ENOMEM, "no memory for the gdb server");
	s->loop = loop;
	s->fd = s->listener.fd = -1;
	vtimer_init(&s->retry, loop, on_retry, s);
	int r = start(s, spec, err);
	if (r) {
		gdb_server_destroy(s);
		return r;
	}
	*out = s;
	return 0;
}

void gdb_server_destroy(struct gdb_server *s)
{
	if (!s)
		return;
	if (s->fd >= 0)
		drop(s);
	vtimer_cancel(&s->retry);
	if (s->listener.fd >= 0)
		loop_del_fd(s->loop, s->listener.fd);
	sock_unlisten(&s->listener);
	gdb_stub_destroy(s->stub);
	free(s);
}

void gdb_server_attach(struct gdb_server *s, struct vm *vm, bool first)
{
	gdb_stub_attach(s->stub, vm, first && s->wait);
}

void gdb_server_forget(struct gdb_server *s)
{
	gdb_stub_forget(s->stub);
}

void gdb_server_ended(struct gdb_server *s, bool by_signal, uint8_t code)
{
	gdb_stub_ended(s->stub, by_signal, code);
	if (s->fd >= 0)
		drop(s);
}
