/* The host's half of vsock: the listening socket and the names of those that the guest connects to. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/un.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/error.h"
#include "base/keyval.h"
#include "base/log.h"
#include "base/sock.h"
#include "device/virtio/vsock.h"
#include "vm/loop.h"

#define PORT_DIGITS 11 /* "_4294967295" */
#define RETRY_NS NS_PER_SEC

struct vsock {
	struct loop *loop;
	struct sock_listener listener;
	char path[sizeof(((struct sockaddr_un *)0)->sun_path)];
	uint64_t cid;
	struct vtimer retry;
	bool failed; /* said so */
	void (*accepted)(void *opaque, int fd);
	void *opaque;
};

static void on_accept(void *opaque, uint32_t revents)
{
	struct vsock *v = opaque;
	(void)revents;
	int fd = sock_accept(&v->listener);
	if (fd == -EAGAIN)
		return;
	if (fd < 0) {
		/* Out of descriptors or memory: the connection stays and would be reported without end. */
		log_warn_once(v->failed, "--vsock %s: cannot take a connection: %s", v->path, strerror(-fd));
		loop_del_fd(v->loop, v->listener.fd);
		vtimer_arm(&v->retry, clock_ns() + RETRY_NS);
	} else if (v->accepted) {
		v->accepted(v->opaque, fd);
	} else {
		close(fd);
	}
}

static void on_retry(void *opaque)
{
	struct vsock *v = opaque;
	loop_add_fd(v->loop, v->listener.fd, EPOLLIN, on_accept, v);
}

int vsock_open(struct vsock **out, struct keyval *kv, struct loop *loop, struct error *err)
{
	const char *path = keyval_get(kv, "path");
	char what[160];
	struct sock_addr addr;
	uint64_t cid = 3;
	/* 0 to 2 and the largest have meanings of their own (5.10.4). */
	int r = keyval_u64(kv, "cid", 3, UINT32_MAX - 1, &cid, err);
	if (r)
		return r;
	if (!path || !*path)
		return error_set(err, EINVAL, "--vsock: needs the path of a Unix socket to listen on: --vsock PATH[,cid=N]");
	snprintf(what, sizeof(what), "--vsock %.120s", path);
	r = sock_unix(&addr, path, what, err);
	if (r)
		return r;
	struct vsock *v = calloc(1, sizeof(*v));
	if (!v)
		return error_set(err, ENOMEM, "%s: out of memory", what);
	*v = (struct vsock){ .loop = loop, .cid = cid };
	snprintf(v->path, sizeof(v->path), "%s", path);
	vtimer_init(&v->retry, loop, on_retry, v);
	if (strlen(path) + PORT_DIGITS >= sizeof(v->path))
		r = error_set(err, ENAMETOOLONG, "%s: there is no room for _PORT behind it in a socket's path; use one of at most %zu characters", what,
			      sizeof(v->path) - 1 - PORT_DIGITS);
	if (!r) {
		r = sock_listen(&v->listener, &addr, 16);
		if (r == -EADDRINUSE)
			error_set(err, -r, "%s: another program listens there; choose another path", what);
		else if (r == -EEXIST)
			error_set(err, -r, "%s: there is a file that is no socket; remove it or choose another path", what);
		else if (r)
			error_set(err, -r, "%s: cannot listen: %s", what, strerror(-r));
		else if ((r = loop_add_fd(loop, v->listener.fd, EPOLLIN, on_accept, v)))
			error_set(err, -r, "%s: cannot watch it: %s", what, strerror(-r));
		if (r)
			sock_unlisten(&v->listener);
	}
	if (r) {
		free(v);
		return r;
	}
	*out = v;
	return 0;
}

void vsock_close(struct vsock *v)
{
	if (!v)
		return;
	vtimer_cancel(&v->retry);
	loop_del_fd(v->loop, v->listener.fd);
	sock_unlisten(&v->listener);
	free(v);
}

void vsock_set_device(struct vsock *v, void (*accepted)(void *opaque, int fd), void *opaque)
{
	v->accepted = accepted;
	v->opaque = opaque;
}

uint64_t vsock_cid(const struct vsock *v)
{
	return v->cid;
}

int vsock_connect(const struct vsock *v, uint32_t port)
{
	char path[sizeof(v->path) + PORT_DIGITS];
	struct sock_addr addr;
	snprintf(path, sizeof(path), "%s_%u", v->path, port);
	int r = sock_unix(&addr, path, "", NULL);
	return r ? r : sock_connect(&addr);
}
