#include "chardev/chardev.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/error.h"
#include "base/log.h"
#include "chardev/chardev_internal.h"

#define OUT_SIZE (256u << 10)
#define OUT_KEPT (64u << 10) /* of output while nobody is connected */
#define IN_SIZE CHARDEV_IN_SIZE
#define WRITE_CHUNK 4096u     /* a pipe that polls writable takes this much without blocking (PIPE_BUF) */
#define TTY_CHUNK 256u	      /* likewise a terminal */
#define GATHER_NS 500000ull   /* output waits this long for more, so that a line is one write */
#define POLL_NS 20000000ull   /* retry where epoll cannot watch */
#define CLOSE_TIMEOUT_MS 2000
#define WATCHED (1u << 30) /* in `watched`, beside the events, which may be none */

static bool comes_and_goes(const struct chardev *cd)
{
	return cd->kind->hung_up;
}

static bool one_fd(const struct chardev *cd)
{
	return cd->in_fd >= 0 && cd->in_fd == cd->out_fd;
}

static void watch(struct chardev *cd);
static void flush(struct chardev *cd);
static void deliver(struct chardev *cd);

/* What it sent before it went is still the guest's, as far as there is room. */
static void take_rest(struct chardev *cd)
{
	uint8_t buf[512];
	while (!cd->in_ended && cd->in_len < IN_SIZE) {
		size_t room = IN_SIZE - cd->in_len;
		ssize_t n = read(cd->in_fd, buf, room < sizeof(buf) ? room : sizeof(buf));
		if (n <= 0)
			break;
		for (ssize_t i = 0; i < n; i++)
			cd->in[(cd->in_head + cd->in_len++) % IN_SIZE] = buf[i];
		deliver(cd);
	}
}

/* The other side went away. What it did not read is kept for the next one, as far as there is room for it. */
static void hang_up(struct chardev *cd)
{
	take_rest(cd);
	if (cd->watched)
		loop_del_fd(cd->config.loop, cd->in_fd);
	cd->watched = 0;
	cd->in_fd = cd->out_fd = -1;
	cd->in_ended = cd->out_blocked = cd->escape = false;
	cd->kind->hung_up(cd);
	if (cd->out_len > OUT_KEPT) {
		cd->out_head = (cd->out_head + cd->out_len - OUT_KEPT) % OUT_SIZE;
		cd->out_len = OUT_KEPT;
	}
	if (cd->client_waits) {
		cd->client_waits = false;
		if (cd->client && cd->client->writable)
			cd->client->writable(cd->client_opaque);
	}
}

/* --- output --- */

/* Write one piece of the ring if that cannot block. >0: bytes gone, 0: not now. A broken output swallows everything. */
static size_t write_some(struct chardev *cd)
{
	size_t n = cd->out_len, limit = cd->tty_out ? TTY_CHUNK : WRITE_CHUNK;
	if (n > OUT_SIZE - cd->out_head)
		n = OUT_SIZE - cd->out_head;
	if (n > limit)
		n = limit;
	if (!cd->out_failed) {
		struct pollfd p = { .fd = cd->out_fd, .events = POLLOUT };
		if (poll(&p, 1, 0) == 0)
			return 0;
		ssize_t w = write(cd->out_fd, cd->out + cd->out_head, n);
		if (w < 0 && (errno == EAGAIN || errno == EINTR))
			return 0;
		if (w < 0 && comes_and_goes(cd)) {
			hang_up(cd);
			return 0;
		}
		if (w < 0) {
			log_warn("serial output cannot be written: %s; the rest of it is dropped", strerror(errno));
			cd->out_failed = true;
		} else {
			n = (size_t)w;
		}
	}
	cd->out_head = (cd->out_head + n) % OUT_SIZE;
	cd->out_len -= n;
	return n;
}

static void flush(struct chardev *cd)
{
	while (cd->out_fd >= 0 && cd->out_len && write_some(cd))
		;
	if (cd->out_fd < 0)
		return; /* nobody there, or not any more */
	cd->out_blocked = cd->out_len;
	watch(cd);
	if (cd->client_waits && cd->out_len < OUT_SIZE / 2) {
		cd->client_waits = false;
		if (cd->client && cd->client->writable)
			cd->client->writable(cd->client_opaque);
	}
}

static void on_out_ready(void *opaque, uint32_t revents)
{
	(void)revents;
	flush(opaque);
}

static void on_out_timer(void *opaque)
{
	flush(opaque);
}

/* While nobody is there only the latest output is kept, so there is always room. */
static bool keeps_latest(const struct chardev *cd)
{
	return cd->out_fd < 0 && comes_and_goes(cd);
}

size_t chardev_write_room(const struct chardev *cd)
{
	return keeps_latest(cd) ? OUT_SIZE : OUT_SIZE - cd->out_len;
}

size_t chardev_write(struct chardev *cd, const uint8_t *data, size_t len)
{
	if (cd->out_fd < 0 && !comes_and_goes(cd))
		return len;
	bool kept = keeps_latest(cd);
	size_t n = kept ? len : chardev_write_room(cd);
	if (n > len)
		n = len;
	if (n && !kept && !cd->out_len && !cd->out_blocked)
		vtimer_arm(&cd->out_timer, clock_ns() + GATHER_NS);
	for (size_t i = kept && n > OUT_KEPT ? n - OUT_KEPT : 0; i < n; i++) {
		if (kept && cd->out_len == OUT_KEPT) {
			cd->out_head = (cd->out_head + 1) % OUT_SIZE;
			cd->out_len--;
		}
		cd->out[(cd->out_head + cd->out_len++) % OUT_SIZE] = data[i];
	}
	if (n < len)
		cd->client_waits = true;
	return n;
}

/* --- input --- */

/* Hand over what the client has room for. */
static void deliver(struct chardev *cd)
{
	while (cd->in_len && cd->client && cd->client->receive) {
		size_t n = cd->client->room ? cd->client->room(cd->client_opaque) : cd->in_len;
		if (n > cd->in_len)
			n = cd->in_len;
		if (n > IN_SIZE - cd->in_head)
			n = IN_SIZE - cd->in_head;
		if (!n)
			return;
		const uint8_t *from = cd->in + cd->in_head;
		/* Account first: the client may call chardev_resume from inside. */
		cd->in_head = (cd->in_head + n) % IN_SIZE;
		cd->in_len -= n;
		cd->client->receive(cd->client_opaque, from, n);
	}
}

/* The end of input is no error: the guest just hears nothing more. */
static void end_input(struct chardev *cd)
{
	cd->in_ended = true;
	vtimer_cancel(&cd->in_timer);
	watch(cd);
}

static void read_input(struct chardev *cd)
{
	uint8_t buf[512];
	size_t room = IN_SIZE - cd->in_len;
	if (cd->in_fd < 0 || cd->in_ended || (!room && !cd->tty_in))
		return;
	ssize_t n = read(cd->in_fd, buf, cd->tty_in || room > sizeof(buf) ? sizeof(buf) : room);
	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	if (n < 0 && comes_and_goes(cd)) {
		hang_up(cd);
		return;
	}
	if (n <= 0) {
		end_input(cd);
		return;
	}
	for (ssize_t i = 0; i < n; i++) {
		if (cd->tty_in && cd->kind->key && !cd->kind->key(cd, buf[i]))
			continue;
		if (cd->in_len < IN_SIZE) /* more was typed than a guest that does not read will ever want */
			cd->in[(cd->in_head + cd->in_len++) % IN_SIZE] = buf[i];
	}
	deliver(cd);
	watch(cd);
}

static void on_in_ready(void *opaque, uint32_t revents)
{
	(void)revents;
	read_input(opaque);
}

static void on_in_timer(void *opaque)
{
	read_input(opaque);
}

void chardev_resume(struct chardev *cd)
{
	bool was_full = cd->in_len == IN_SIZE;
	deliver(cd);
	if (was_full && cd->in_len < IN_SIZE)
		watch(cd);
}

/* --- descriptors --- */

static void on_ready(void *opaque, uint32_t revents)
{
	struct chardev *cd = opaque;
	int fd = cd->in_fd;
	if (revents & EPOLLOUT)
		flush(cd);
	if (cd->in_fd != fd)
		return;
	bool gone = revents & (EPOLLHUP | EPOLLERR);
	if ((revents & EPOLLIN) || (gone && !cd->in_ended && cd->in_len < IN_SIZE)) {
		read_input(cd);
		/* With the last byte it is over, not just with what was sent. */
		if (cd->in_fd == fd && gone && cd->in_ended)
			hang_up(cd);
	} else if (gone && cd->in_ended) {
		hang_up(cd);
	} else if (gone && cd->watched) {
		/* There is more to read but no room for it. epoll would tell so without end. */
		loop_del_fd(cd->config.loop, fd);
		cd->watched = 0;
	}
}

static bool want_input(const struct chardev *cd)
{
	return cd->in_fd >= 0 && !cd->in_ended && (cd->tty_in || cd->in_len < IN_SIZE);
}

/* One descriptor for both ways: stays in the loop also when nothing is wanted, to hear when the other side is gone. */
static void watch_one(struct chardev *cd)
{
	uint32_t want = (want_input(cd) ? EPOLLIN : 0) | (cd->out_blocked ? EPOLLOUT : 0);
	if (cd->watched == (want | WATCHED))
		return;
	if (loop_add_fd(cd->config.loop, cd->in_fd, want, on_ready, cd) == 0)
		cd->watched = want | WATCHED;
	else
		hang_up(cd);
}

static void watch_in(struct chardev *cd)
{
	bool want = want_input(cd) && (cd->client || cd->watching_in);
	if (cd->in_unwatchable) {
		if (want)
			vtimer_arm(&cd->in_timer, clock_ns());
	} else if (want && !cd->watching_in) {
		int r = loop_add_fd(cd->config.loop, cd->in_fd, EPOLLIN, on_in_ready, cd);
		cd->watching_in = r == 0;
		/* Regular files and /dev/null are always ready, and epoll says so by EPERM. */
		cd->in_unwatchable = r == -EPERM;
		if (cd->in_unwatchable)
			vtimer_arm(&cd->in_timer, clock_ns());
	} else if (!want && cd->watching_in) {
		loop_del_fd(cd->config.loop, cd->in_fd);
		cd->watching_in = false;
	}
}

static void watch_out(struct chardev *cd)
{
	if (cd->out_blocked && !cd->watching_out) {
		cd->watching_out = loop_add_fd(cd->config.loop, cd->out_fd, EPOLLOUT, on_out_ready, cd) == 0;
		if (!cd->watching_out)
			vtimer_arm(&cd->out_timer, clock_ns() + POLL_NS);
	} else if (!cd->out_blocked && cd->watching_out) {
		loop_del_fd(cd->config.loop, cd->out_fd);
		cd->watching_out = false;
	}
}

static void watch(struct chardev *cd)
{
	if (one_fd(cd) && comes_and_goes(cd)) {
		watch_one(cd);
	} else {
		watch_in(cd);
		watch_out(cd);
	}
}

int chardev_connect(struct chardev *cd, int fd)
{
	cd->in_fd = cd->out_fd = fd;
	int r = loop_add_fd(cd->config.loop, fd, 0, on_ready, cd);
	if (r) {
		cd->in_fd = cd->out_fd = -1;
		return r;
	}
	cd->watched = WATCHED;
	flush(cd);
	return 0;
}

void chardev_set_client(struct chardev *cd, const struct chardev_client *client, void *opaque)
{
	cd->client = client;
	cd->client_opaque = opaque;
	cd->client_waits = false;
	if (client)
		watch(cd);
}

/* --- the size of the terminal --- */

void chardev_resize(struct chardev *cd, uint16_t columns, uint16_t rows)
{
	if (cd->columns == columns && cd->rows == rows)
		return;
	cd->columns = columns;
	cd->rows = rows;
	if (cd->client && cd->client->resize)
		cd->client->resize(cd->client_opaque, columns, rows);
}

void chardev_size(const struct chardev *cd, uint16_t *columns, uint16_t *rows)
{
	*columns = cd->columns;
	*rows = cd->rows;
}

/* --- open and close --- */

static int open_file(struct chardev *cd, const char *path, struct error *err)
{
	int mode = cd->config.append ? O_APPEND : O_TRUNC;
	cd->out_fd = open(path, O_WRONLY | O_CREAT | mode | O_CLOEXEC | O_NOCTTY, 0666);
	if (cd->out_fd < 0)
		return error_set(err, errno, "%s file:%s: cannot open it for writing: %s", cd->config.option, path, strerror(errno));
	return 0;
}

static void close_file(struct chardev *cd)
{
	close(cd->out_fd);
}

static int open_none(struct chardev *cd, const char *path, struct error *err)
{
	(void)cd, (void)path, (void)err;
	return 0;
}

static const struct chardev_kind file_kind = { .name = "file", .has_path = true, .open = open_file, .close = close_file };
static const struct chardev_kind none_kind = { .name = "none", .open = open_none };
static const struct chardev_kind *const kinds[] = { &chardev_stdio, &file_kind, &chardev_socket, &chardev_pty, &none_kind };

int chardev_open(struct chardev **out, const char *spec, const struct chardev_config *config, struct error *err)
{
	const char *option = config->option ? config->option : "--serial";
	size_t len = strcspn(spec, ":");
	const struct chardev_kind *kind = NULL;
	for (size_t i = 0; i < sizeof(kinds) / sizeof(kinds[0]) && !kind; i++) {
		if (strlen(kinds[i]->name) == len && !strncmp(spec, kinds[i]->name, len) && (!spec[len] || kinds[i]->has_path))
			kind = kinds[i];
	}
	if (!kind)
		return error_set(err, EINVAL, "%s %s: not known; use stdio, socket:PATH, pty, file:PATH or none", option, spec);
	if (kind->has_path && kind != &chardev_pty && (!spec[len] || !spec[len + 1]))
		return error_set(err, EINVAL, "%s %s: no path is given; write %s:PATH", option, spec, kind->name);

	struct chardev *cd = calloc(1, sizeof(*cd));
	uint8_t *ring = malloc(OUT_SIZE);
	if (!cd || !ring) {
		free(cd);
		free(ring);
		return error_set(err, ENOMEM, "out of memory for the serial line");
	}
	cd->config = *config;
	cd->config.option = option;
	cd->kind = kind;
	cd->out = ring;
	cd->in_fd = cd->out_fd = -1;
	vtimer_init(&cd->out_timer, config->loop, on_out_timer, cd);
	vtimer_init(&cd->in_timer, config->loop, on_in_timer, cd);
	int r = kind->open(cd, spec[len] ? spec + len + 1 : "", err);
	if (r < 0) {
		free(ring);
		free(cd);
		return r;
	}
	*out = cd;
	return 0;
}

void chardev_close(struct chardev *cd)
{
	if (!cd)
		return;
	cd->client = NULL;
	while (cd->out_len && cd->out_fd >= 0) {
		if (write_some(cd) || cd->out_fd < 0)
			continue;
		struct pollfd p = { .fd = cd->out_fd, .events = POLLOUT };
		if (poll(&p, 1, CLOSE_TIMEOUT_MS) == 0)
			break; /* nobody reads */
	}
	if (cd->watching_out)
		loop_del_fd(cd->config.loop, cd->out_fd);
	if (cd->watching_in || cd->watched)
		loop_del_fd(cd->config.loop, cd->in_fd);
	vtimer_cancel(&cd->out_timer);
	vtimer_cancel(&cd->in_timer);
	if (cd->kind->close)
		cd->kind->close(cd);
	free(cd->out);
	free(cd);
}
