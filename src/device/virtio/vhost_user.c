/*
 * The vhost-user protocol, front end (QEMU documentation, "Vhost-user Protocol"; section names below are that document's).
 *
 * One stream socket, on which we ask and the back end answers; a second one of our making, on which it tells of changed
 * configurations. Nothing is waited for beyond v.deadline, nothing is believed that is not of the expected type and length, and file
 * descriptors that it sends are never received (a recv without ancillary space drops them).
 */
#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/error.h"
#include "device/virtio/vhost_backend.h"
#include "device/virtio/virtio.h"
#include "vm/loop.h"

#define REGIONS_MAX 8	   /* "Memory regions description" */
#define CONFIG_NS (NS_PER_SEC / 10) /* between two reads of a configuration that "changes" all the time */

/* "Front-end message types" */
enum request {
	GET_FEATURES = 1,
	SET_FEATURES = 2,
	SET_OWNER = 3,
	SET_MEM_TABLE = 5,
	SET_VRING_NUM = 8,
	SET_VRING_ADDR = 9,
	SET_VRING_BASE = 10,
	GET_VRING_BASE = 11,
	SET_VRING_KICK = 12,
	SET_VRING_CALL = 13,
	GET_PROTOCOL_FEATURES = 15,
	SET_PROTOCOL_FEATURES = 16,
	GET_QUEUE_NUM = 17,
	SET_VRING_ENABLE = 18,
	SET_BACKEND_REQ_FD = 21,
	GET_CONFIG = 24,
	SET_CONFIG = 25,
};
enum { BACKEND_CONFIG_CHANGE = 2 }; /* "Back-end message types" */

#define F_PROTOCOL_FEATURES 30 /* of the feature bits */
/* "Protocol features" */
enum { P_MQ = 0, P_REPLY_ACK = 3, P_BACKEND_REQ = 5, P_CONFIG = 9 };
#define P_WANTED (1ull << P_MQ | 1ull << P_REPLY_ACK | 1ull << P_BACKEND_REQ | 1ull << P_CONFIG)

/* "Header": version 1 in bits 0 and 1 of the flags. */
enum { FLAG_VERSION = 1, FLAG_VERSION_MASK = 3, FLAG_REPLY = 4, FLAG_NEED_REPLY = 8 };

struct header {
	uint32_t request, flags, size;
};

struct vring_state {
	uint32_t index, num;
};
struct vring_addr {
	uint32_t index, flags;
	uint64_t desc, used, avail, log;
};
struct mem_region {
	uint64_t gpa, size, user, offset;
};
struct mem_table {
	uint32_t n, padding;
	struct mem_region region[REGIONS_MAX];
};
struct config_space {
	uint32_t offset, size, flags;
	uint8_t bytes[VHOST_CONFIG_MAX];
};

struct vhost_user {
	struct vhost v; /* first */
	struct loop *loop;
	const char *option;
	char *path;	/* to connect again; NULL: there is no way */
	int fd;		/* -1: hung up */
	int backend_fd; /* our end of the back end's own channel, or -1 */
	uint64_t raw_features, protocol;
	uint8_t heard[sizeof(struct header) + 64]; /* a message of the back end's channel that has come in part */
	unsigned nheard;
	struct vtimer config_timer;
	bool config_due;
	uint64_t config_time;
};

static struct vhost_user *user_of(struct vhost *v)
{
	return (struct vhost_user *)v;
}

__attribute__((format(printf, 3, 4))) static int fail(struct vhost_user *u, int code, const char *format, ...)
{
	va_list args;
	va_start(args, format);
	vsnprintf(u->v.why, sizeof(u->v.why), format, args);
	va_end(args);
	return -code;
}

/* --- messages --- */

static bool await(struct vhost_user *u, short events)
{
	for (;;) {
		uint64_t now = clock_ns();
		if (now >= u->v.deadline)
			return false;
		struct pollfd p = { .fd = u->fd, .events = events };
		int r = poll(&p, 1, (int)((u->v.deadline - now) / 1000000) + 1);
		if (r > 0)
			return true;
		if (r < 0 && errno != EINTR)
			return false;
	}
}

static int send_message(struct vhost_user *u, enum request request, uint32_t flags, const void *payload, uint32_t size, const int *fds, unsigned nfds)
{
	if (u->fd < 0)
		return fail(u, ENOTCONN, "it is not connected");
	struct header h = { request, FLAG_VERSION | flags, size };
	uint8_t all[sizeof(h) + sizeof(struct mem_table) + VHOST_CONFIG_MAX];
	memcpy(all, &h, sizeof(h));
	if (size)
		memcpy(all + sizeof(h), payload, size);
	union {
		char room[CMSG_SPACE(REGIONS_MAX * sizeof(int))];
		struct cmsghdr align;
	} control = { 0 };
	size_t sent = 0, total = sizeof(h) + size;
	while (sent < total) {
		struct iovec iov = { all + sent, total - sent };
		struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1 };
		if (nfds && !sent) { /* descriptors go with the first byte */
			m.msg_control = control.room;
			m.msg_controllen = CMSG_SPACE(nfds * sizeof(int));
			struct cmsghdr *c = CMSG_FIRSTHDR(&m);
			c->cmsg_level = SOL_SOCKET;
			c->cmsg_type = SCM_RIGHTS;
			c->cmsg_len = CMSG_LEN(nfds * sizeof(int));
			memcpy(CMSG_DATA(c), fds, nfds * sizeof(int));
		}
		ssize_t n = sendmsg(u->fd, &m, MSG_NOSIGNAL | MSG_DONTWAIT);
		if (n > 0) {
			sent += (size_t)n;
			continue;
		}
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && errno != EAGAIN)
			return fail(u, errno, "it closed the connection (%s)", strerror(errno));
		if (!await(u, POLLOUT))
			return fail(u, ETIMEDOUT, "it takes no messages");
	}
	return 0;
}

static int receive(struct vhost_user *u, void *buf, size_t size)
{
	size_t got = 0;
	while (got < size) {
		ssize_t n = recv(u->fd, (uint8_t *)buf + got, size - got, MSG_DONTWAIT);
		if (n > 0) {
			got += (size_t)n;
			continue;
		}
		if (n == 0)
			return fail(u, ECONNRESET, "it closed the connection");
		if (errno == EINTR)
			continue;
		if (errno != EAGAIN)
			return fail(u, errno, "it closed the connection (%s)", strerror(errno));
		if (!await(u, POLLIN))
			return fail(u, ETIMEDOUT, "it does not answer");
	}
	return 0;
}

/* The answer to `request`: at most `room` bytes, its size in *size. */
static int receive_reply(struct vhost_user *u, enum request request, void *payload, uint32_t room, uint32_t *size)
{
	struct header h;
	int r = receive(u, &h, sizeof(h));
	if (r < 0)
		return r;
	if (h.request != request || (h.flags & FLAG_VERSION_MASK) != FLAG_VERSION || !(h.flags & FLAG_REPLY) || h.size > room)
		return fail(u, EPROTO, "its answer to message %d is no answer (type %u, flags 0x%x, %u bytes)", request, h.request, h.flags, h.size);
	*size = h.size;
	return receive(u, payload, h.size);
}

/* A message without an answer of its own: with REPLY_ACK the back end says whether it liked it. */
static int command(struct vhost_user *u, enum request request, const void *payload, uint32_t size, const int *fds, unsigned nfds)
{
	bool ack = u->protocol >> P_REPLY_ACK & 1;
	int r = send_message(u, request, ack ? FLAG_NEED_REPLY : 0, payload, size, fds, nfds);
	if (r < 0 || !ack)
		return r;
	uint64_t status;
	uint32_t got;
	r = receive_reply(u, request, &status, sizeof(status), &got);
	if (r < 0)
		return r;
	if (got != sizeof(status) || status)
		return fail(u, EPROTO, "it refuses message %d", request);
	return 0;
}

static int command_u64(struct vhost_user *u, enum request request, uint64_t value)
{
	return command(u, request, &value, sizeof(value), NULL, 0);
}

static int ask_u64(struct vhost_user *u, enum request request, uint64_t *value)
{
	uint32_t size;
	int r = send_message(u, request, 0, NULL, 0, NULL, 0);
	if (r == 0)
		r = receive_reply(u, request, value, sizeof(*value), &size);
	if (r == 0 && size != sizeof(*value))
		r = fail(u, EPROTO, "its answer to message %d has %u bytes", request, size);
	return r;
}

/* --- what the loop brings --- */

static void on_socket(void *opaque, uint32_t revents)
{
	struct vhost_user *u = opaque;
	(void)revents;
	/* Answers are taken where the question was asked: what comes here is the end, or nonsense. */
	uint8_t byte;
	ssize_t n = recv(u->fd, &byte, 1, MSG_DONTWAIT | MSG_PEEK);
	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	fail(u, EPROTO, n > 0 ? "it speaks unasked" : "it closed the connection");
	loop_del_fd(u->loop, u->fd);
	if (u->v.lost)
		u->v.lost(u->v.opaque);
}

static void config_news(void *opaque)
{
	struct vhost_user *u = opaque;
	if (!u->config_due || u->fd < 0)
		return;
	u->config_due = false;
	uint64_t begin = clock_ns();
	if (u->v.config_changed)
		u->v.config_changed(u->v.opaque);
	u->config_time = clock_ns() + 9 * (clock_ns() - begin); /* a slow one does not get all our time */
}

static void close_backend_channel(struct vhost_user *u)
{
	if (u->backend_fd < 0)
		return;
	loop_del_fd(u->loop, u->backend_fd);
	close(u->backend_fd);
	u->backend_fd = -1;
}

static void on_backend_channel(void *opaque, uint32_t revents)
{
	struct vhost_user *u = opaque;
	(void)revents;
	for (int i = 0; i < 16; i++) {
		struct header h;
		if (u->nheard >= sizeof(h)) {
			memcpy(&h, u->heard, sizeof(h));
			if (h.size > sizeof(u->heard) - sizeof(h)) {
				close_backend_channel(u); /* no message that we agreed on is that long */
				return;
			}
		}
		unsigned want = (u->nheard < sizeof(h) ? (unsigned)sizeof(h) : (unsigned)sizeof(h) + h.size) - u->nheard;
		if (want) {
			ssize_t n = recv(u->backend_fd, u->heard + u->nheard, want, MSG_DONTWAIT);
			if (n < 0 && (errno == EAGAIN || errno == EINTR))
				return;
			if (n <= 0) {
				close_backend_channel(u);
				return;
			}
			u->nheard += (unsigned)n;
			continue;
		}
		u->nheard = 0;
		bool known = h.request == BACKEND_CONFIG_CHANGE;
		if (h.flags & FLAG_NEED_REPLY) {
			struct {
				struct header h;
				uint64_t status;
			} __attribute__((packed)) reply = { { h.request, FLAG_VERSION | FLAG_REPLY, 8 }, known ? 0 : 1 };
			ssize_t n = send(u->backend_fd, &reply, sizeof(reply), MSG_DONTWAIT | MSG_NOSIGNAL);
			(void)n; /* if it does not read its answers, it has none */
		}
		if (known && !u->config_due) {
			u->config_due = true;
			vtimer_arm(&u->config_timer, u->config_time + CONFIG_NS);
		}
	}
}

/* --- the connection --- */

static void user_hang_up(struct vhost *v)
{
	struct vhost_user *u = user_of(v);
	close_backend_channel(u);
	vtimer_cancel(&u->config_timer);
	u->config_due = false;
	if (u->fd < 0)
		return;
	loop_del_fd(u->loop, u->fd);
	close(u->fd);
	u->fd = -1;
}

static int connect_to(const char *path, const char *option, struct error *err)
{
	struct sockaddr_un a = { .sun_family = AF_UNIX };
	if (strlen(path) >= sizeof(a.sun_path))
		return error_set(err, ENAMETOOLONG, "%s: the socket's path %s is too long; %zu bytes are possible", option, path, sizeof(a.sun_path) - 1);
	strcpy(a.sun_path, path);
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (fd < 0)
		return error_set(err, errno, "%s: cannot make a socket: %s", option, strerror(errno));
	if (connect(fd, (struct sockaddr *)&a, sizeof(a)) < 0) {
		int code = errno;
		close(fd);
		const char *remedy = code == ENOENT || code == ECONNREFUSED ? "; start the vhost-user back end first"
				     : code == EAGAIN			    ? "; it serves somebody else"
									    : "";
		return error_set(err, code, "%s: cannot connect to %s: %s%s", option, path, strerror(code), remedy);
	}
	return fd;
}

static int offer_backend_channel(struct vhost_user *u)
{
	int pair[2];
	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) < 0)
		return fail(u, errno, "no socket pair for it (%s)", strerror(errno));
	u->backend_fd = pair[0];
	u->nheard = 0;
	int r = command(u, SET_BACKEND_REQ_FD, NULL, 0, &pair[1], 1);
	close(pair[1]);
	if (r < 0)
		return r;
	r = loop_add_fd(u->loop, u->backend_fd, EPOLLIN, on_backend_channel, u);
	return r < 0 ? fail(u, -r, "the event loop cannot watch it") : 0;
}

/* "Starting and stopping" up to the point where rings can be set up. */
static int shake_hands(struct vhost_user *u)
{
	uint64_t features, protocol = 0, queues = 0;
	u->protocol = 0;
	int r = ask_u64(u, GET_FEATURES, &features);
	if (r == 0 && !(features & VIRTIO_BIT(VIRTIO_F_VERSION_1)))
		r = fail(u, EPROTO, "it does not speak virtio 1");
	if (r == 0 && features >> F_PROTOCOL_FEATURES & 1) {
		r = ask_u64(u, GET_PROTOCOL_FEATURES, &protocol);
		protocol &= P_WANTED;
		if (!(protocol >> P_CONFIG & 1))
			protocol &= ~(1ull << P_BACKEND_REQ); /* it would have nothing to tell */
		if (r == 0)
			r = command_u64(u, SET_PROTOCOL_FEATURES, protocol);
		u->protocol = protocol;
	}
	if (r == 0)
		r = command(u, SET_OWNER, NULL, 0, NULL, 0);
	if (r == 0 && protocol >> P_MQ & 1) {
		r = ask_u64(u, GET_QUEUE_NUM, &queues);
		if (r == 0 && !queues)
			r = fail(u, EPROTO, "it has no queues");
	}
	if (r == 0 && protocol >> P_BACKEND_REQ & 1)
		r = offer_backend_channel(u);
	if (r < 0)
		return r;
	u->raw_features = features;
	u->v.features = features & ~VIRTIO_BIT(F_PROTOCOL_FEATURES);
	u->v.max_queues = !queues ? UINT_MAX : queues < UINT_MAX ? (unsigned)queues : UINT_MAX;
	r = loop_add_fd(u->loop, u->fd, EPOLLIN | EPOLLRDHUP, on_socket, u);
	return r < 0 ? fail(u, -r, "the event loop cannot watch it") : 0;
}

static int begin(struct vhost_user *u, struct error *err)
{
	int r = shake_hands(u);
	if (r == 0)
		return 0;
	user_hang_up(&u->v);
	return error_set(err, -r, "%s: the vhost-user back end at %s is of no use: %s", u->option, u->v.name, u->v.why);
}

static int user_reopen(struct vhost *v, struct error *err)
{
	struct vhost_user *u = user_of(v);
	uint64_t had = v->features;
	unsigned queues = v->max_queues;
	user_hang_up(v);
	u->fd = connect_to(u->path, u->option, err);
	if (u->fd < 0) {
		int r = u->fd;
		u->fd = -1;
		return r;
	}
	int r = begin(u, err);
	if (r == 0 && (had & ~v->features || queues > v->max_queues)) {
		user_hang_up(v);
		r = error_set(err, EPROTO, "%s: the back end at %s is another one now, with less abilities", u->option, v->name);
	}
	v->features = had; /* what the guest was told */
	v->max_queues = queues;
	return r;
}

/* --- the operations --- */

static int user_set_features(struct vhost *v, uint64_t features)
{
	struct vhost_user *u = user_of(v);
	return command_u64(u, SET_FEATURES, features | (u->raw_features & VIRTIO_BIT(F_PROTOCOL_FEATURES)));
}

static int user_set_memory(struct vhost *v, const struct vhost_region *region, unsigned n)
{
	struct vhost_user *u = user_of(v);
	struct mem_table t = { .n = n };
	int fds[REGIONS_MAX];
	if (n > REGIONS_MAX)
		return fail(u, E2BIG, "it takes no more than %d memory regions", REGIONS_MAX);
	for (unsigned i = 0; i < n; i++) {
		t.region[i] = (struct mem_region){ region[i].gpa, region[i].size, region[i].user, region[i].offset };
		fds[i] = region[i].fd;
	}
	return command(u, SET_MEM_TABLE, &t, 8 + n * (uint32_t)sizeof(t.region[0]), fds, n);
}

static int vring_fd(struct vhost_user *u, enum request request, unsigned index, int fd)
{
	uint64_t value = index; /* bit 8 would say that there is no descriptor */
	return command(u, request, &value, sizeof(value), &fd, 1);
}

static int vring_state(struct vhost_user *u, enum request request, unsigned index, uint32_t num)
{
	struct vring_state s = { index, num };
	return command(u, request, &s, sizeof(s), NULL, 0);
}

static int user_start_ring(struct vhost *v, const struct vhost_ring *ring)
{
	struct vhost_user *u = user_of(v);
	struct vring_addr a = { .index = ring->index, .desc = ring->desc, .used = ring->used, .avail = ring->avail };
	int r = vring_state(u, SET_VRING_NUM, ring->index, ring->size);
	if (r == 0)
		r = vring_state(u, SET_VRING_BASE, ring->index, 0);
	if (r == 0)
		r = command(u, SET_VRING_ADDR, &a, sizeof(a), NULL, 0);
	if (r == 0)
		r = vring_fd(u, SET_VRING_CALL, ring->index, ring->call);
	if (r == 0)
		r = vring_fd(u, SET_VRING_KICK, ring->index, ring->kick);
	if (r == 0 && u->raw_features >> F_PROTOCOL_FEATURES & 1)
		r = vring_state(u, SET_VRING_ENABLE, ring->index, 1);
	return r;
}

static int user_stop_ring(struct vhost *v, unsigned index)
{
	struct vhost_user *u = user_of(v);
	struct vring_state s = { .index = index };
	uint32_t size;
	int r = 0;
	if (u->raw_features >> F_PROTOCOL_FEATURES & 1)
		r = vring_state(u, SET_VRING_ENABLE, index, 0);
	if (r == 0)
		r = send_message(u, GET_VRING_BASE, 0, &s, sizeof(s), NULL, 0);
	if (r == 0)
		r = receive_reply(u, GET_VRING_BASE, &s, sizeof(s), &size);
	if (r == 0 && (size != sizeof(s) || s.index != index))
		r = fail(u, EPROTO, "it stopped another ring than it was asked to");
	return r;
}

static int user_get_config(struct vhost *v, void *config, unsigned size)
{
	struct vhost_user *u = user_of(v);
	struct config_space c = { .size = size };
	if (!(u->protocol >> P_CONFIG & 1) || size > VHOST_CONFIG_MAX)
		return fail(u, EOPNOTSUPP, "it has no configuration to read");
	uint32_t want = 12 + size, got;
	int r = send_message(u, GET_CONFIG, 0, &c, want, NULL, 0);
	if (r == 0)
		r = receive_reply(u, GET_CONFIG, &c, sizeof(c), &got);
	if (r == 0 && (got != want || c.size != size || c.offset))
		r = fail(u, EPROTO, "its configuration has %u bytes where %u were asked for", got < 12 ? 0 : got - 12, size);
	if (r == 0)
		memcpy(config, c.bytes, size);
	return r;
}

static int user_set_config(struct vhost *v, unsigned offset, const void *bytes, unsigned size)
{
	struct vhost_user *u = user_of(v);
	struct config_space c = { .offset = offset, .size = size };
	if (!(u->protocol >> P_CONFIG & 1) || size > VHOST_CONFIG_MAX)
		return fail(u, EOPNOTSUPP, "it has no configuration to write");
	memcpy(c.bytes, bytes, size);
	return command(u, SET_CONFIG, &c, 12 + size, NULL, 0);
}

static void user_close(struct vhost *v)
{
	struct vhost_user *u = user_of(v);
	user_hang_up(v);
	free(u->path);
	free(u);
}

static const struct vhost_ops user_ops = {
	.kind = "vhost-user",
	.set_features = user_set_features,
	.set_memory = user_set_memory,
	.start_ring = user_start_ring,
	.stop_ring = user_stop_ring,
	.get_config = user_get_config,
	.set_config = user_set_config,
	.hang_up = user_hang_up,
	.reopen = user_reopen,
	.close = user_close,
};

int vhost_user_open(struct vhost **out, const char *path, int fd, struct loop *loop, const char *option, struct error *err)
{
	struct vhost_user *u = calloc(1, sizeof(*u));
	char *copy = fd < 0 ? strdup(path) : NULL;
	if (!u || (fd < 0 && !copy)) {
		free(u);
		free(copy);
		if (fd >= 0)
			close(fd);
		return error_set(err, ENOMEM, "%s: out of memory", option);
	}
	u->v.ops = &user_ops;
	snprintf(u->v.name, sizeof(u->v.name), "%s", path);
	u->loop = loop;
	u->option = option;
	u->path = copy;
	u->v.reopens = copy;
	u->backend_fd = -1;
	u->v.deadline = clock_ns() + VHOST_OPEN_SECONDS * NS_PER_SEC;
	u->fd = fd >= 0 ? fd : connect_to(path, option, err);
	vtimer_init(&u->config_timer, loop, config_news, u);
	int r = u->fd < 0 ? u->fd : begin(u, err);
	if (r < 0) {
		if (u->fd < -1)
			u->fd = -1;
		user_close(&u->v);
		return r;
	}
	*out = &u->v;
	return 0;
}
