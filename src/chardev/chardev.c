#include "chardev/chardev.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/error.h"
#include "base/log.h"
#include "chardev/terminal.h"
#include "vm/loop.h"

#define OUT_SIZE (256u << 10)
#define IN_SIZE 4096u
#define WRITE_CHUNK 4096u	 /* a pipe that polls writable takes this much without blocking (PIPE_BUF) */
#define TTY_CHUNK 256u		 /* likewise a terminal */
#define GATHER_NS 500000ull	 /* output waits this long for more, so that a line is one write */
#define POLL_NS 20000000ull	 /* retry where epoll cannot watch */
#define CLOSE_TIMEOUT_MS 2000
#define ESCAPE 0x01 /* Ctrl-A */

struct chardev {
	struct chardev_config config;
	const struct chardev_client *client;
	void *client_opaque;
	int in_fd, out_fd; /* -1: none */
	bool owns_out, tty_in, tty_out, out_failed;
	bool watching_in, in_unwatchable, watching_out;
	bool client_waits; /* chardev_write took less than it was given */
	bool escape;	   /* the last key was Ctrl-A */
	struct vtimer out_timer, in_timer;
	uint8_t *out; /* ring of OUT_SIZE */
	size_t out_head, out_len;
	uint8_t in[IN_SIZE]; /* ring: read, not yet taken by the client */
	size_t in_head, in_len;
};

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

static void on_out_ready(void *opaque, uint32_t revents);

static void flush(struct chardev *cd)
{
	while (cd->out_len && write_some(cd))
		;
	if (cd->out_len && !cd->watching_out) {
		cd->watching_out = loop_add_fd(cd->config.loop, cd->out_fd, EPOLLOUT, on_out_ready, cd) == 0;
		if (!cd->watching_out)
			vtimer_arm(&cd->out_timer, clock_ns() + POLL_NS);
	} else if (!cd->out_len && cd->watching_out) {
		loop_del_fd(cd->config.loop, cd->out_fd);
		cd->watching_out = false;
	}
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

size_t chardev_write_room(const struct chardev *cd)
{
	return OUT_SIZE - cd->out_len;
}

size_t chardev_write(struct chardev *cd, const uint8_t *data, size_t len)
{
	if (cd->out_fd < 0)
		return len;
	size_t n = chardev_write_room(cd);
	if (n > len)
		n = len;
	if (n && !cd->out_len && !cd->watching_out)
		vtimer_arm(&cd->out_timer, clock_ns() + GATHER_NS);
	for (size_t i = 0; i < n; i++)
		cd->out[(cd->out_head + cd->out_len++) % OUT_SIZE] = data[i];
	if (n < len)
		cd->client_waits = true;
	return n;
}

/* --- input --- */

static void print_help(struct chardev *cd)
{
	static const char text[] = "\r\n"
				   "Ctrl-A h       this help\r\n"
				   "Ctrl-A x       end the virtual machine\r\n"
				   "Ctrl-A Ctrl-A  send Ctrl-A to the guest\r\n";
	chardev_write(cd, (const uint8_t *)text, sizeof(text) - 1);
}

/* A key typed at the terminal: commands after Ctrl-A are ours, all else is the guest's. False: swallowed. */
static bool filter_key(struct chardev *cd, uint8_t key)
{
	if (!cd->escape) {
		cd->escape = key == ESCAPE;
		return !cd->escape;
	}
	cd->escape = false;
	switch (key) {
	case 'x':
	case 'X':
		if (cd->config.quit)
			cd->config.quit(cd->config.opaque);
		return false;
	case 'h':
	case 'H':
	case '?':
		print_help(cd);
		return false;
	default:
		return key == ESCAPE;
	}
}

static void on_in_ready(void *opaque, uint32_t revents);

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

/* Read on a terminal always (the escape key must work), else only while there is room. */
static void watch_input(struct chardev *cd)
{
	if (cd->in_fd < 0)
		return;
	bool want = cd->tty_in || cd->in_len < IN_SIZE;
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

static void stop_input(struct chardev *cd)
{
	if (cd->watching_in)
		loop_del_fd(cd->config.loop, cd->in_fd);
	vtimer_cancel(&cd->in_timer);
	cd->watching_in = false;
	cd->in_fd = -1;
}

static void read_input(struct chardev *cd)
{
	uint8_t buf[512];
	size_t room = IN_SIZE - cd->in_len;
	if (cd->in_fd < 0 || (!room && !cd->tty_in))
		return;
	ssize_t n = read(cd->in_fd, buf, cd->tty_in || room > sizeof(buf) ? sizeof(buf) : room);
	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	if (n <= 0) {
		stop_input(cd); /* the end of input is no error: the guest just hears nothing more */
		return;
	}
	for (ssize_t i = 0; i < n; i++) {
		if (cd->tty_in && !filter_key(cd, buf[i]))
			continue;
		if (cd->in_len < IN_SIZE) /* more was typed than a guest that does not read will ever want */
			cd->in[(cd->in_head + cd->in_len++) % IN_SIZE] = buf[i];
	}
	deliver(cd);
	watch_input(cd);
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
		watch_input(cd);
}

void chardev_set_client(struct chardev *cd, const struct chardev_client *client, void *opaque)
{
	cd->client = client;
	cd->client_opaque = opaque;
	if (client)
		watch_input(cd);
}

/* --- open and close --- */

static int open_stdio(struct chardev *cd, struct error *err)
{
	cd->in_fd = STDIN_FILENO;
	cd->out_fd = STDOUT_FILENO;
	cd->tty_out = isatty(STDOUT_FILENO);
	cd->tty_in = isatty(STDIN_FILENO);
	/* A job in the background may not change the terminal; it runs without input. */
	if (cd->tty_in && tcgetpgrp(STDIN_FILENO) != getpgrp()) {
		cd->tty_in = false;
		cd->in_fd = -1;
	}
	if (!cd->tty_in)
		return 0;
	int r = terminal_raw(STDIN_FILENO);
	if (r == -EBUSY)
		return error_set(err, EBUSY, "--serial stdio: the terminal is in use by another serial line");
	if (r < 0)
		return error_set(err, -r, "--serial stdio: cannot set the terminal to raw mode: %s", strerror(-r));
	return 0;
}

static int open_file(struct chardev *cd, const char *path, struct error *err)
{
	if (!*path)
		return error_set(err, EINVAL, "--serial file: no path is given; write file:PATH");
	int mode = cd->config.append ? O_APPEND : O_TRUNC;
	cd->out_fd = open(path, O_WRONLY | O_CREAT | mode | O_CLOEXEC | O_NOCTTY, 0666);
	if (cd->out_fd < 0)
		return error_set(err, errno, "--serial file:%s: cannot open it for writing: %s", path, strerror(errno));
	cd->owns_out = true;
	return 0;
}

int chardev_open(struct chardev **out, const char *spec, const struct chardev_config *config, struct error *err)
{
	struct chardev *cd = calloc(1, sizeof(*cd));
	uint8_t *ring = malloc(OUT_SIZE);
	int r = 0;
	if (!cd || !ring) {
		free(cd);
		free(ring);
		return error_set(err, ENOMEM, "out of memory for the serial line");
	}
	cd->config = *config;
	cd->out = ring;
	cd->in_fd = cd->out_fd = -1;
	vtimer_init(&cd->out_timer, config->loop, on_out_timer, cd);
	vtimer_init(&cd->in_timer, config->loop, on_in_timer, cd);
	if (strcmp(spec, "stdio") == 0)
		r = open_stdio(cd, err);
	else if (strncmp(spec, "file:", 5) == 0)
		r = open_file(cd, spec + 5, err);
	else if (strcmp(spec, "none") != 0)
		r = error_set(err, EINVAL, "--serial %s: not known; use stdio, file:PATH or none", spec);
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
	while (cd->out_len) {
		if (write_some(cd))
			continue;
		struct pollfd p = { .fd = cd->out_fd, .events = POLLOUT };
		if (poll(&p, 1, CLOSE_TIMEOUT_MS) == 0)
			break; /* nobody reads */
	}
	if (cd->watching_out)
		loop_del_fd(cd->config.loop, cd->out_fd);
	vtimer_cancel(&cd->out_timer);
	stop_input(cd);
	if (cd->tty_in)
		terminal_restore();
	if (cd->owns_out)
		close(cd->out_fd);
	free(cd->out);
	free(cd);
}
