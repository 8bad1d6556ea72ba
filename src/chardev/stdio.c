/* stdio: the terminal that trapline was started at, raw and with an escape key, or whatever standard input and output are. */
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include "base/error.h"
#include "chardev/chardev_internal.h"
#include "chardev/terminal.h"

#define ESCAPE 0x01 /* Ctrl-A */

static void print_help(struct chardev *cd)
{
	static const char text[] = "\r\n"
				   "Ctrl-A h       this help\r\n"
				   "Ctrl-A x       end the virtual machine\r\n"
				   "Ctrl-A Ctrl-A  send Ctrl-A to the guest\r\n";
	chardev_write(cd, (const uint8_t *)text, sizeof(text) - 1);
}

/* Commands after Ctrl-A are ours, all else is the guest's. */
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

static void ask_size(struct chardev *cd)
{
	struct winsize w;
	if (ioctl(STDIN_FILENO, TIOCGWINSZ, &w) == 0)
		chardev_resize(cd, w.ws_col, w.ws_row);
}

static void on_winch(void *opaque, uint32_t revents)
{
	struct chardev *cd = opaque;
	struct signalfd_siginfo info;
	(void)revents;
	ssize_t n = read((int)(intptr_t)cd->state - 1, &info, sizeof(info));
	(void)n;
	ask_size(cd);
}

/* SIGWINCH arrives by descriptor if every thread blocks it: this one does, before the others are made. Its state is the descriptor + 1. */
static void watch_size(struct chardev *cd)
{
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGWINCH);
	pthread_sigmask(SIG_BLOCK, &set, NULL);
	int fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
	if (fd < 0)
		return;
	if (loop_add_fd(cd->config.loop, fd, EPOLLIN, on_winch, cd)) {
		close(fd);
		return;
	}
	cd->state = (void *)(intptr_t)(fd + 1);
	ask_size(cd);
}

static int open_stdio(struct chardev *cd, const char *path, struct error *err)
{
	(void)path;
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
		return error_set(err, EBUSY, "%s stdio: the terminal is in use by another serial line", cd->config.option);
	if (r < 0)
		return error_set(err, -r, "%s stdio: cannot set the terminal to raw mode: %s", cd->config.option, strerror(-r));
	watch_size(cd);
	return 0;
}

static void close_stdio(struct chardev *cd)
{
	if (cd->state) {
		int fd = (int)(intptr_t)cd->state - 1;
		loop_del_fd(cd->config.loop, fd);
		close(fd);
	}
	if (cd->tty_in)
		terminal_restore();
}

const struct chardev_kind chardev_stdio = { .name = "stdio", .open = open_stdio, .close = close_stdio, .key = filter_key };
