#include "control/client.h"

#include <errno.h>
#include <poll.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "base/error.h"
#include "control/runtime.h"

int control_connect(struct control_client *c, const char *name, struct error *err)
{
	c->have = 0;
	c->pid = 0;
	snprintf(c->name, sizeof(c->name), "%s", name);
	c->fd = runtime_connect(name, RUNTIME_CONTROL, err);
	if (c->fd == -ECONNREFUSED || (c->fd == -ENOENT && runtime_running(name)))
		return error_set(err, EAGAIN, "%s is just starting or ending; try again", name);
	if (c->fd == -ENOENT || c->fd == -EPERM)
		return c->fd; /* with its sentence */
	if (c->fd == -ETIMEDOUT)
		return error_set(err, ETIMEDOUT, "%s does not answer", name);
	if (c->fd < 0)
		return error_set(err, -c->fd, "cannot reach %s: %s", name, strerror(-c->fd));
	struct ucred peer;
	socklen_t len = sizeof(peer);
	if (getsockopt(c->fd, SOL_SOCKET, SO_PEERCRED, &peer, &len) == 0)
		c->pid = peer.pid;
	return 0;
}

void control_close(struct control_client *c)
{
	if (c->fd >= 0)
		close(c->fd);
	c->fd = -1;
}

static int64_t now_ms(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

static int gone(const struct control_client *c, struct error *err)
{
	return error_set(err, EPIPE, "%s has ended", c->name);
}

static int send_line(struct control_client *c, const json_t *request, struct error *err)
{
	char *text = json_dumps(request, JSON_COMPACT);
	if (!text)
		return error_set(err, ENOMEM, "not enough memory");
	/* Requests are far smaller than a socket's buffer. */
	struct iovec iov[] = { { text, strlen(text) }, { "\n", 1 } };
	ssize_t n = sendmsg(c->fd, &(struct msghdr){ .msg_iov = iov, .msg_iovlen = 2 }, MSG_NOSIGNAL | MSG_DONTWAIT);
	int e = n < 0 ? errno : 0;
	free(text);
	if (e == EAGAIN)
		return error_set(err, ETIMEDOUT, "%s does not answer", c->name);
	return e ? gone(c, err) : 0;
}

/* Wait for a line; its length without the newline. */
static ssize_t receive_line(struct control_client *c, int timeout_ms, struct error *err)
{
	int64_t end = now_ms() + timeout_ms;
	for (;;) {
		char *newline = memchr(c->line, '\n', c->have);
		if (newline)
			return newline - c->line;
		if (c->have == sizeof(c->line))
			return error_set(err, EPROTO, "%s gives an answer that is too long", c->name);
		int64_t left = end - now_ms();
		struct pollfd p = { .fd = c->fd, .events = POLLIN };
		int ready = left > 0 ? poll(&p, 1, (int)left) : 0;
		if (ready == 0)
			return error_set(err, ETIMEDOUT, "%s does not answer", c->name);
		if (ready < 0) {
			if (errno == EINTR)
				continue;
			return error_set(err, errno, "cannot wait for %s: %s", c->name, strerror(errno));
		}
		ssize_t n = recv(c->fd, c->line + c->have, sizeof(c->line) - c->have, MSG_DONTWAIT);
		if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR))
			return gone(c, err);
		c->have += n < 0 ? 0 : (size_t)n;
	}
}

int control_call(struct control_client *c, json_t *request, int timeout_ms, json_t **result, struct error *err)
{
	int r = send_line(c, request, err);
	json_decref(request);
	if (r)
		return r;
	ssize_t len = receive_line(c, timeout_ms, err);
	if (len < 0)
		return (int)len;
	json_t *answer = json_loadb(c->line, (size_t)len, 0, NULL);
	c->have -= (size_t)len + 1;
	memmove(c->line, c->line + len + 1, c->have);
	const char *sentence = json_string_value(json_object_get(answer, "error"));
	json_t *value = json_object_get(answer, "result");
	if (sentence)
		r = error_set(err, EREMOTE, "%s: %s", c->name, sentence);
	else if (!value)
		r = error_set(err, EPROTO, "%s gives an answer that makes no sense", c->name);
	else if (result)
		*result = json_incref(value);
	json_decref(answer);
	return r;
}
