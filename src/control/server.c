#include "control/server.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/error.h"
#include "base/log.h"
#include "control/protocol.h"
#include "vm/loop.h"

#define UNREAD_MAX (256u << 10) /* bytes of answers that a client has not read: then it is gone */
#define LINES_A_TURN 8		/* of one client; then the others get theirs */

struct client {
	struct control_server *server;
	int fd; /* -1: free */
	char in[CONTROL_LINE_MAX];
	size_t in_len;
	char *out; /* out_len bytes from out_head on wait to be sent */
	size_t out_head, out_len;
};

struct control_server {
	struct loop *loop;
	struct control_handler handler;
	int fd;
	bool refused; /* a client was refused: logged */
	struct vtimer retry; /* descriptors ran out: listen again later */
	struct client client[CONTROL_CLIENTS];
};

static void on_client(void *opaque, uint32_t revents);

static void drop(struct client *c)
{
	loop_del_fd(c->server->loop, c->fd);
	close(c->fd);
	free(c->out);
	*c = (struct client){ .server = c->server, .fd = -1 };
}

/* Send what waits, as far as it goes. False: the client is gone. */
static bool flush(struct client *c)
{
	while (c->out_len) {
		ssize_t n = send(c->fd, c->out + c->out_head, c->out_len, MSG_NOSIGNAL | MSG_DONTWAIT);
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
			break;
		if (n < 0)
			return false;
		c->out_head += (size_t)n;
		c->out_len -= (size_t)n;
	}
	if (!c->out_len) {
		free(c->out);
		c->out = NULL;
		c->out_head = 0;
	}
	return true;
}

static bool queue(struct client *c, const char *line)
{
	size_t len = strlen(line);
	if (c->out_len + len > UNREAD_MAX)
		return false;
	char *all = malloc(c->out_len + len);
	if (!all)
		return false;
	if (c->out_len)
		memcpy(all, c->out + c->out_head, c->out_len);
	memcpy(all + c->out_len, line, len);
	free(c->out);
	c->out = all;
	c->out_head = 0;
	c->out_len += len;
	return true;
}

static bool answer(struct client *c, const struct control_request *r, json_t *result, const char *error)
{
	char *line = control_answer(r, result, error);
	bool ok = line && queue(c, line);
	free(line);
	return ok;
}

static bool serve_line(struct client *c, const char *line, size_t len)
{
	struct control_request request;
	struct error err = { "" };
	json_t *result = NULL;
	if (control_parse(&request, line, len, &err) == 0)
		result = c->server->handler.handle(c->server->handler.opaque, &request, &err);
	bool ok = answer(c, &request, result, err.text);
	control_request_fini(&request);
	/* At once: after "quit" there is no next turn. */
	return ok && flush(c);
}

/* Serve whole lines of the input. False: the client is gone, or breaks the rules. */
static bool serve_lines(struct client *c)
{
	for (int i = 0; i < LINES_A_TURN && !c->out_len; i++) {
		char *end = memchr(c->in, '\n', c->in_len);
		if (!end)
			break;
		size_t len = (size_t)(end - c->in);
		if (!serve_line(c, c->in, len))
			return false;
		c->in_len -= len + 1;
		memmove(c->in, end + 1, c->in_len);
	}
	if (c->in_len < sizeof(c->in) || memchr(c->in, '\n', c->in_len))
		return true;
	answer(c, &(struct control_request){ 0 }, NULL, "this line is too long");
	flush(c);
	return false;
}

/* Listen for what can be dealt with: no new requests while answers wait. A client with lines left over comes again because its socket is
 * ready to be written. */
static bool watch(struct client *c)
{
	bool more = c->out_len || memchr(c->in, '\n', c->in_len);
	return loop_add_fd(c->server->loop, c->fd, more ? EPOLLOUT : EPOLLIN, on_client, c) == 0;
}

static bool serve(struct client *c, uint32_t revents)
{
	if (revents & EPOLLERR)
		return false;
	if (!flush(c))
		return false;
	if (!c->out_len && !memchr(c->in, '\n', c->in_len)) {
		ssize_t n = recv(c->fd, c->in + c->in_len, sizeof(c->in) - c->in_len, MSG_DONTWAIT);
		if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR))
			return false;
		c->in_len += n < 0 ? 0 : (size_t)n;
	}
	return serve_lines(c) && watch(c);
}

static void on_client(void *opaque, uint32_t revents)
{
	struct client *c = opaque;
	if (!serve(c, revents))
		drop(c);
}

static bool is_trusted(int fd)
{
	struct ucred peer;
	socklen_t len = sizeof(peer);
	return getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &len) == 0 && (peer.uid == geteuid() || peer.uid == 0);
}

static void on_listen(void *opaque, uint32_t revents)
{
	struct control_server *s = opaque;
	(void)revents;
	int fd = accept4(s->fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
	if (fd < 0 && errno != EAGAIN && errno != EINTR && errno != ECONNABORTED) {
		/* It stays readable: without a pause this would be a busy loop. */
		loop_del_fd(s->loop, s->fd);
		vtimer_arm(&s->retry, clock_ns() + NS_PER_SEC);
	}
	if (fd < 0)
		return;
	struct client *c = s->client;
	while (c < s->client + CONTROL_CLIENTS && c->fd >= 0)
		c++;
	if (c == s->client + CONTROL_CLIENTS || !is_trusted(fd)) {
		log_warn_once(s->refused, "control socket: a client was refused (%s)",
			      c == s->client + CONTROL_CLIENTS ? "too many at the same time" : "of another user");
		close(fd);
		return;
	}
	c->fd = fd;
	if (!watch(c))
		drop(c);
}

static void on_retry(void *opaque)
{
	struct control_server *s = opaque;
	if (loop_add_fd(s->loop, s->fd, EPOLLIN, on_listen, s))
		vtimer_arm(&s->retry, clock_ns() + NS_PER_SEC);
}

static int listen_at(const char *path, struct error *err)
{
	struct sockaddr_un addr = { .sun_family = AF_UNIX };
	if (strlen(path) >= sizeof(addr.sun_path))
		return error_set(err, ENAMETOOLONG, "%s: too long for a socket", path);
	memcpy(addr.sun_path, path, strlen(path));
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (fd >= 0 && bind(fd, (struct sockaddr *)&addr, sizeof(addr)) == 0 && listen(fd, CONTROL_CLIENTS) == 0)
		return fd;
	int e = errno;
	if (fd >= 0)
		close(fd);
	return error_set(err, e, "%s: cannot listen for trapline's commands: %s", path, strerror(e));
}

int control_server_create(struct control_server **out, const char *path, struct loop *loop, const struct control_handler *handler,
			  struct error *err)
{
	struct control_server *s = calloc(1, sizeof(*s));
	if (!s)
		return error_set(err, ENOMEM, "out of memory for the control socket");
	s->loop = loop;
	s->handler = *handler;
	vtimer_init(&s->retry, loop, on_retry, s);
	for (int i = 0; i < CONTROL_CLIENTS; i++)
		s->client[i] = (struct client){ .server = s, .fd = -1 };
	s->fd = listen_at(path, err);
	int r = s->fd < 0 ? s->fd : loop_add_fd(loop, s->fd, EPOLLIN, on_listen, s);
	if (r < 0) {
		if (s->fd >= 0) {
			error_set(err, -r, "cannot watch the control socket: %s", strerror(-r));
			close(s->fd);
		}
		free(s);
		return r;
	}
	*out = s;
	return 0;
}

void control_server_destroy(struct control_server *s)
{
	if (!s)
		return;
	for (int i = 0; i < CONTROL_CLIENTS; i++)
		if (s->client[i].fd >= 0)
			drop(&s->client[i]);
	vtimer_cancel(&s->retry);
	loop_del_fd(s->loop, s->fd);
	close(s->fd);
	free(s);
}
