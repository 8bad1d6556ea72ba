/* socket:PATH: a listening Unix socket, one client at a time. */
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
#include "base/sock.h"
#include "chardev/chardev_internal.h"

#define RETRY_NS NS_PER_SEC

struct line {
	struct chardev *cd;
	struct sock_listener listener;
	int client; /* -1: none */
	struct vtimer retry;
	bool failed; /* said so */
};

static void on_accept(void *opaque, uint32_t revents)
{
	struct line *l = opaque;
	(void)revents;
	int fd = sock_accept(&l->listener);
	if (fd == -EAGAIN)
		return;
	if (fd < 0) {
		/* Out of descriptors or memory: the connection stays and would be reported without end. */
		log_warn_once(l->failed, "%s socket: cannot take a connection: %s", l->cd->config.option, strerror(-fd));
		loop_del_fd(l->cd->config.loop, l->listener.fd);
		vtimer_arm(&l->retry, clock_ns() + RETRY_NS);
		return;
	}
	if (l->client >= 0) {
		static const char busy[] = "trapline: somebody else is connected to this line\r\n";
		send(fd, busy, sizeof(busy) - 1, MSG_NOSIGNAL | MSG_DONTWAIT);
		close(fd);
		return;
	}
	l->client = fd;
	if (chardev_connect(l->cd, fd) < 0) {
		close(fd);
		l->client = -1;
	}
}

static void on_retry(void *opaque)
{
	struct line *l = opaque;
	loop_add_fd(l->cd->config.loop, l->listener.fd, EPOLLIN, on_accept, l);
}

static void hung_up(struct chardev *cd)
{
	struct line *l = cd->state;
	close(l->client);
	l->client = -1;
}

static int open_socket(struct chardev *cd, const char *path, struct error *err)
{
	char what[200];
	struct sock_addr addr;
	snprintf(what, sizeof(what), "%s socket:%.150s", cd->config.option, path);
	int r = sock_unix(&addr, path, what, err);
	if (r)
		return r;
	struct line *l = calloc(1, sizeof(*l));
	if (!l)
		return error_set(err, ENOMEM, "%s: out of memory", what);
	l->cd = cd;
	l->client = -1;
	vtimer_init(&l->retry, cd->config.loop, on_retry, l);
	r = sock_listen(&l->listener, &addr, 4);
	if (r == -EADDRINUSE)
		error_set(err, -r, "%s: another program listens there; choose another path", what);
	else if (r == -EEXIST)
		error_set(err, -r, "%s: there is a file that is no socket; remove it or choose another path", what);
	else if (r)
		error_set(err, -r, "%s: cannot listen: %s", what, strerror(-r));
	else if ((r = loop_add_fd(cd->config.loop, l->listener.fd, EPOLLIN, on_accept, l)))
		error_set(err, -r, "%s: cannot watch it: %s", what, strerror(-r));
	if (r) {
		sock_unlisten(&l->listener);
		free(l);
		return r;
	}
	cd->state = l;
	return 0;
}

static void close_socket(struct chardev *cd)
{
	struct line *l = cd->state;
	vtimer_cancel(&l->retry);
	loop_del_fd(cd->config.loop, l->listener.fd);
	sock_unlisten(&l->listener);
	if (l->client >= 0)
		close(l->client);
	free(l);
}

const struct chardev_kind chardev_socket = {
	.name = "socket", .has_path = true, .open = open_socket, .close = close_socket, .hung_up = hung_up
};
