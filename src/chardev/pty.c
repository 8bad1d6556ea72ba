/*
 * pty, pty:LINK: a terminal of its own for other programs (screen, minicom) to open, raw from the start.
 *
 * The kernel says that nobody has it open by a hang-up on our side, but not when somebody opens it: that is looked for now and then.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <termios.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/error.h"
#include "base/log.h"
#include "chardev/chardev_internal.h"

#define LOOK_NS (200 * NS_PER_SEC / 1000)

struct pty {
	struct chardev *cd;
	int fd;
	struct vtimer look;
	char link[256]; /* empty: none */
	char name[64];
};

static void on_look(void *opaque)
{
	struct pty *p = opaque;
	struct pollfd pfd = { .fd = p->fd };
	if (p->cd->in_fd >= 0)
		return;
	if ((poll(&pfd, 1, 0) > 0 && (pfd.revents & POLLHUP)) || chardev_connect(p->cd, p->fd) < 0)
		vtimer_arm(&p->look, clock_ns() + LOOK_NS);
}

static void hung_up(struct chardev *cd)
{
	struct pty *p = cd->state;
	vtimer_arm(&p->look, clock_ns() + LOOK_NS);
}

/* Raw, and hung up: a slave that was never open does not look like one that nobody has open. */
static int prepare(struct pty *p)
{
	struct termios t;
	p->fd = posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC);
	if (p->fd < 0 || grantpt(p->fd) < 0 || unlockpt(p->fd) < 0 || ptsname_r(p->fd, p->name, sizeof(p->name)))
		return -errno;
	fcntl(p->fd, F_SETFL, O_NONBLOCK);
	int slave = open(p->name, O_RDWR | O_NOCTTY | O_CLOEXEC);
	if (slave < 0)
		return -errno;
	int r = tcgetattr(slave, &t);
	if (!r) {
		cfmakeraw(&t);
		r = tcsetattr(slave, TCSANOW, &t);
	}
	if (r)
		r = -errno;
	close(slave);
	return r;
}

static int make_link(struct pty *p, const char *path)
{
	/* One that an earlier run left may be replaced; anything else not. */
	char old[64];
	ssize_t n = readlink(path, old, sizeof(old) - 1);
	if (n > 0 && !strncmp(old, "/dev/pts/", 9))
		unlink(path);
	if (symlink(p->name, path) < 0)
		return -errno;
	snprintf(p->link, sizeof(p->link), "%s", path);
	return 0;
}

static int open_pty(struct chardev *cd, const char *path, struct error *err)
{
	struct pty *p = calloc(1, sizeof(*p));
	if (!p)
		return error_set(err, ENOMEM, "%s pty: out of memory", cd->config.option);
	p->cd = cd;
	int r = prepare(p);
	if (r)
		error_set(err, -r, "%s pty: cannot make a terminal: %s", cd->config.option, strerror(-r));
	else if (strlen(path) >= sizeof(p->link))
		r = error_set(err, ENAMETOOLONG, "%s pty:%.40s...: the path is too long", cd->config.option, path);
	else if (*path && (r = make_link(p, path)))
		error_set(err, -r, "%s pty:%s: cannot make a link there: %s", cd->config.option, path, strerror(-r));
	if (r) {
		if (p->fd >= 0)
			close(p->fd);
		free(p);
		return r;
	}
	vtimer_init(&p->look, cd->config.loop, on_look, p);
	vtimer_arm(&p->look, clock_ns() + LOOK_NS);
	cd->state = p;
	fprintf(stderr, "trapline: %s pty: the line is at %s\n", cd->config.option, p->name);
	return 0;
}

static void close_pty(struct chardev *cd)
{
	struct pty *p = cd->state;
	vtimer_cancel(&p->look);
	char to[sizeof(p->name)];
	ssize_t n = p->link[0] ? readlink(p->link, to, sizeof(to) - 1) : -1;
	if (n > 0 && (size_t)n == strlen(p->name) && !memcmp(to, p->name, (size_t)n))
		unlink(p->link);
	close(p->fd);
	free(p);
}

const struct chardev_kind chardev_pty = { .name = "pty", .has_path = true, .open = open_pty, .close = close_pty, .hung_up = hung_up };
