#include "net/stream.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "vm/loop.h"

#define HEADER 4
#define IN_SIZE (256u << 10)
#define OUT_SIZE STREAM_RESERVE_MAX
#define GATHER 4096u	     /* shorter frames wait for others of their batch: copying is cheaper than a system call */
#define GATHER_MAX (32u << 10)
#define READS_A_ROUND 4 /* then others on the loop get their turn */
#define PARTS 64	/* of a frame; one in more is copied together first */

int stream_init(struct stream *s, struct loop *loop, const struct stream_ops *ops, void *opaque)
{
	*s = (struct stream){ .loop = loop, .ops = ops, .opaque = opaque, .fd = -1 };
	s->in = malloc(IN_SIZE);
	s->out = malloc(OUT_SIZE);
	return s->in && s->out ? 0 : -ENOMEM;
}

void stream_stop(struct stream *s)
{
	if (s->fd >= 0) {
		if (s->watched)
			loop_del_fd(s->loop, s->fd);
		close(s->fd);
	}
	s->fd = -1;
	s->ends++;
	s->watched = 0;
	s->in_start = s->in_end = s->out_start = s->out_end = 0;
	s->paused = s->refused = s->blocked = false;
}

void stream_fini(struct stream *s)
{
	stream_stop(s);
	free(s->in);
	free(s->out);
}

static void end(struct stream *s, const char *why)
{
	bool owed = s->refused;
	stream_stop(s);
	s->ops->closed(s->opaque, why);
	if (owed) /* its frames are lost from now on, but they need not wait */
		s->ops->writable(s->opaque);
}

static void on_ready(void *opaque, uint32_t revents);

/* Watch for what can be done now. Nothing at all while both sides wait: epoll tells of a peer that is gone whether one asks or not, again
 * and again. */
static void watch(struct stream *s)
{
	uint32_t want = (s->paused ? 0 : EPOLLIN) | (s->blocked ? EPOLLOUT : 0);
	if (s->fd < 0 || want == s->watched)
		return;
	if (!want) {
		loop_del_fd(s->loop, s->fd);
		s->watched = 0;
	} else if (loop_add_fd(s->loop, s->fd, want, on_ready, s) == 0) {
		s->watched = want;
	} else {
		end(s, "out of memory");
	}
}

/* --- receiving --- */

static size_t get_length(const uint8_t *p)
{
	return (size_t)p[0] << 24 | (size_t)p[1] << 16 | (size_t)p[2] << 8 | p[3];
}

/* Hand over the whole frames that are there. False: the connection is gone. */
static bool take_frames(struct stream *s)
{
	while (!s->paused && s->in_end - s->in_start >= HEADER) {
		size_t len = get_length(s->in + s->in_start);
		if (!len || len > STREAM_FRAME_MAX) {
			end(s, "the peer sent something that is no frame");
			return false;
		}
		if (s->in_end - s->in_start < HEADER + len)
			break;
		unsigned ends = s->ends;
		if (len >= STREAM_FRAME_MIN && !s->ops->frame(s->opaque, s->in + s->in_start + HEADER, len)) {
			s->paused = s->ends == ends;
			break;
		}
		if (s->ends != ends)
			return false; /* from inside the callback */
		s->in_start += HEADER + len;
	}
	if (s->in_start) {
		memmove(s->in, s->in + s->in_start, s->in_end - s->in_start);
		s->in_end -= s->in_start;
		s->in_start = 0;
	}
	return true;
}

static void receive(struct stream *s)
{
	for (int i = 0; i < READS_A_ROUND && !s->paused; i++) {
		/* There is room: a frame is much shorter than the buffer, and only a part of one is left in it. */
		size_t room = IN_SIZE - s->in_end;
		ssize_t n = recv(s->fd, s->in + s->in_end, room, MSG_DONTWAIT);
		if (n < 0 && (errno == EAGAIN || errno == EINTR))
			break;
		if (n <= 0) {
			end(s, n ? strerror(errno) : "the peer closed it");
			return;
		}
		s->in_end += (size_t)n;
		if (!take_frames(s))
			return;
		if ((size_t)n < room)
			break;
	}
	watch(s);
}

void stream_resume(struct stream *s)
{
	if (!s->paused)
		return;
	s->paused = false;
	if (take_frames(s))
		watch(s);
}

/* --- sending --- */

static size_t pending(const struct stream *s)
{
	return s->out_end - s->out_start;
}

/* Write what is kept. False: the connection is gone. */
static bool flush(struct stream *s)
{
	while (pending(s)) {
		ssize_t n = send(s->fd, s->out + s->out_start, pending(s), MSG_DONTWAIT | MSG_NOSIGNAL);
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && errno == EAGAIN) {
			s->blocked = true;
			return true;
		}
		if (n < 0) {
			end(s, strerror(errno));
			return false;
		}
		s->out_start += (size_t)n;
	}
	s->blocked = false;
	s->out_start = s->out_end = 0;
	return true;
}

void stream_flush(struct stream *s)
{
	if (pending(s) && !s->blocked && flush(s))
		watch(s);
}

/* Keep what follows byte `skip` of the iovecs. The caller has looked that there is room. */
static void keep(struct stream *s, const struct iovec *iov, unsigned n, size_t skip)
{
	for (unsigned i = 0; i < n; i++) {
		size_t cut = skip < iov[i].iov_len ? skip : iov[i].iov_len;
		memcpy(s->out + s->out_end, (const uint8_t *)iov[i].iov_base + cut, iov[i].iov_len - cut);
		s->out_end += iov[i].iov_len - cut;
		skip -= cut;
	}
}

bool stream_reserve(struct stream *s, size_t bytes)
{
	if (s->fd < 0)
		return true; /* what comes is lost at once */
	if (pending(s) + bytes > OUT_SIZE)
		stream_flush(s);
	if (s->fd < 0)
		return true;
	if (pending(s) + bytes > OUT_SIZE) {
		s->refused = true;
		watch(s);
		return false;
	}
	if (s->out_end + bytes > OUT_SIZE) {
		memmove(s->out, s->out + s->out_start, pending(s));
		s->out_end = pending(s);
		s->out_start = 0;
	}
	return true;
}

enum stream_sent stream_send(struct stream *s, const struct iovec *iov, unsigned n)
{
	size_t len = 0;
	for (unsigned i = 0; i < n; i++)
		len += iov[i].iov_len;
	if (s->fd < 0 || len < STREAM_FRAME_MIN || len > STREAM_FRAME_MAX)
		return STREAM_LOST;
	if (!stream_reserve(s, HEADER + len))
		return STREAM_FULL;
	if (s->fd < 0)
		return STREAM_LOST;

	uint8_t header[HEADER] = { (uint8_t)(len >> 24), (uint8_t)(len >> 16), (uint8_t)(len >> 8), (uint8_t)len };
	struct iovec parts[1 + PARTS];
	parts[0] = (struct iovec){ header, HEADER };
	if (len < GATHER || pending(s) || n > PARTS) {
		keep(s, parts, 1, 0);
		keep(s, iov, n, 0);
		if (pending(s) >= GATHER_MAX)
			stream_flush(s);
		return s->fd < 0 ? STREAM_LOST : STREAM_SENT;
	}
	memcpy(parts + 1, iov, n * sizeof(*iov));
	const struct msghdr msg = { .msg_iov = parts, .msg_iovlen = n + 1 };
	ssize_t w;
	do
		w = sendmsg(s->fd, &msg, MSG_DONTWAIT | MSG_NOSIGNAL);
	while (w < 0 && errno == EINTR);
	if (w < 0 && errno != EAGAIN) {
		end(s, strerror(errno));
		return STREAM_LOST;
	}
	if (w < (ssize_t)(HEADER + len)) {
		keep(s, parts, n + 1, w > 0 ? (size_t)w : 0);
		s->blocked = true;
		watch(s);
	}
	return STREAM_SENT;
}

static void on_ready(void *opaque, uint32_t revents)
{
	struct stream *s = opaque;
	unsigned ends = s->ends;
	if (s->blocked && (revents & (EPOLLOUT | EPOLLHUP | EPOLLERR))) {
		if (!flush(s))
			return;
		bool owed = s->refused && pending(s) < OUT_SIZE / 2;
		watch(s);
		if (owed && s->ends == ends) {
			s->refused = false;
			s->ops->writable(s->opaque);
		}
	}
	if (s->ends == ends && !s->paused && (revents & ~(uint32_t)EPOLLOUT))
		receive(s);
}

int stream_start(struct stream *s, int fd)
{
	stream_stop(s);
	s->fd = fd;
	int r = loop_add_fd(s->loop, fd, EPOLLIN, on_ready, s);
	if (r) {
		stream_stop(s);
		return r;
	}
	s->watched = EPOLLIN;
	return 0;
}
