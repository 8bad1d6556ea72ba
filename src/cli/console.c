/* trapline console: the serial line of a VM at this terminal. */
#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/error.h"
#include "chardev/terminal.h"
#include "cli/commands.h"
#include "control/client.h"
#include "control/runtime.h"

#define ESCAPE 0x01 /* Ctrl-A */
#define ASK_MS 2000

const char console_usage[] = "usage: trapline console NAME\n\n"
			     "Connect this terminal to the VM's first serial port, which was started with --serial socket or --detach. Every key goes to\n"
			     "the guest, also Ctrl-C, except after Ctrl-A:\n\n"
			     "  Ctrl-A x        leave; the VM goes on\n"
			     "  Ctrl-A h        list these keys\n"
			     "  Ctrl-A Ctrl-A   send Ctrl-A to the guest\n\n"
			     "Without a terminal, standard input is sent as it is, and what the guest prints is copied until the VM ends.\n";

struct console {
	const char *name;
	int fd;			/* the serial line */
	int signals;		/* signalfd of those that end us, and of SIGWINCH */
	struct control_client *control; /* for the terminal's size; NULL: the VM wants none of it */
	bool tty, escape, left;
	bool input_ended;
	char pending[4096]; /* typed, not yet taken by the VM */
	size_t npending;
};

static void print_help(void)
{
	static const char text[] = "\r\n"
				   "Ctrl-A x       leave the console; the VM goes on\r\n"
				   "Ctrl-A h       this help\r\n"
				   "Ctrl-A Ctrl-A  send Ctrl-A to the guest\r\n";
	fwrite(text, 1, sizeof(text) - 1, stderr);
}

/* A key of the terminal; true: it is for the guest. */
static bool filter_key(struct console *c, char key)
{
	if (!c->escape) {
		c->escape = key == ESCAPE;
		return !c->escape;
	}
	c->escape = false;
	switch (key) {
	case 'x':
	case 'X':
		c->left = true;
		return false;
	case 'h':
	case 'H':
	case '?':
		print_help();
		return false;
	default:
		return key == ESCAPE;
	}
}

static void read_keys(struct console *c)
{
	char keys[1024];
	size_t room = sizeof(c->pending) - c->npending;
	ssize_t n = read(STDIN_FILENO, keys, c->tty || room > sizeof(keys) ? sizeof(keys) : room);
	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	if (n <= 0) {
		c->input_ended = true;
		c->left = c->tty; /* the terminal is gone */
		return;
	}
	for (ssize_t i = 0; i < n && !c->left; i++)
		if ((!c->tty || filter_key(c, keys[i])) && c->npending < sizeof(c->pending))
			c->pending[c->npending++] = keys[i];
}

/* False: the other end is gone. */
static bool send_keys(struct console *c)
{
	ssize_t n = send(c->fd, c->pending, c->npending, MSG_NOSIGNAL | MSG_DONTWAIT);
	if (n < 0)
		return errno == EAGAIN || errno == EINTR;
	c->npending -= (size_t)n;
	memmove(c->pending, c->pending + n, c->npending);
	return true;
}

static bool write_all(const char *data, size_t len)
{
	while (len) {
		ssize_t n = write(STDOUT_FILENO, data, len);
		if (n < 0 && errno == EAGAIN) {
			poll(&(struct pollfd){ .fd = STDOUT_FILENO, .events = POLLOUT }, 1, 1000);
			continue;
		}
		if (n < 0 && errno != EINTR)
			return false;
		data += n < 0 ? 0 : n;
		len -= n < 0 ? 0 : (size_t)n;
	}
	return true;
}

/* False: the other end is gone, or nobody reads what we print. */
static bool copy_output(struct console *c)
{
	char data[8192];
	ssize_t n = recv(c->fd, data, sizeof(data), MSG_DONTWAIT);
	if (n < 0)
		return errno == EAGAIN || errno == EINTR;
	return n > 0 && write_all(data, (size_t)n);
}

static void send_size(struct console *c)
{
	struct winsize w;
	struct error err;
	if (!c->control || !c->tty || ioctl(STDIN_FILENO, TIOCGWINSZ, &w) < 0 || !w.ws_col || !w.ws_row)
		return;
	json_t *request = json_pack("{s:s, s:i, s:i}", "request", "resize", "columns", w.ws_col, "rows", w.ws_row);
	if (control_call(c->control, request, ASK_MS, NULL, &err)) {
		control_close(c->control);
		free(c->control);
		c->control = NULL;
	}
}

/* 0, or the signal that asks us to end. */
static int take_signal(struct console *c)
{
	struct signalfd_siginfo info;
	if (read(c->signals, &info, sizeof(info)) != sizeof(info))
		return 0;
	if (info.ssi_signo != SIGWINCH)
		return (int)info.ssi_signo;
	send_size(c);
	return 0;
}

/* Returns the status to exit with. */
static int attend(struct console *c)
{
	while (!c->left) {
		struct pollfd p[] = {
			{ .fd = c->fd, .events = (short)(POLLIN | (c->npending ? POLLOUT : 0)) },
			{ .fd = c->input_ended || (!c->tty && c->npending == sizeof(c->pending)) ? -1 : STDIN_FILENO, .events = POLLIN },
			{ .fd = c->signals, .events = POLLIN },
		};
		if (poll(p, 3, -1) < 0 && errno != EINTR)
			return 1;
		if (p[2].revents) {
			int sig = take_signal(c);
			if (sig)
				return 128 + sig;
		}
		if (p[1].revents)
			read_keys(c);
		if (c->npending && !send_keys(c))
			break;
		if ((p[0].revents & (POLLIN | POLLHUP | POLLERR)) && !copy_output(c))
			break;
	}
	terminal_restore();
	if (c->tty)
		fprintf(stderr, "\r\ntrapline: %s %s\n", c->left ? "left the console;" : "the VM has closed its console:",
			c->left ? "the VM goes on" : c->name);
	return 0;
}

static int watch_signals(void)
{
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGINT);
	sigaddset(&set, SIGTERM);
	sigaddset(&set, SIGHUP);
	sigaddset(&set, SIGWINCH);
	sigprocmask(SIG_BLOCK, &set, NULL);
	signal(SIGPIPE, SIG_IGN);
	return signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
}

/* Connect to the VM's control and serial sockets. The status to exit with if that fails. */
static int connect_console(struct console *c)
{
	struct error err = { "" };
	json_t *status;
	c->control = malloc(sizeof(*c->control));
	if (!c->control) {
		fprintf(stderr, "trapline: not enough memory\n");
		return 1;
	}
	int r = control_connect(c->control, c->name, &err);
	if (!r && (r = control_call(c->control, json_pack("{s:s}", "request", "status"), ASK_MS, &status, &err)) == 0) {
		bool has_console = json_is_true(json_object_get(status, "console"));
		json_decref(status);
		if (!has_console) {
			fprintf(stderr,
				"trapline: %s has its serial port elsewhere; start it with --serial socket or --detach to reach it with trapline "
				"console\n",
				c->name);
			return 1;
		}
	}
	if (r) {
		fprintf(stderr, "trapline: %s\n", err.text);
		return r == -ENOENT ? 2 : 1;
	}
	c->fd = runtime_connect(c->name, RUNTIME_CONSOLE, &err);
	if (c->fd < 0) {
		fprintf(stderr, "trapline: cannot reach the console of %s: %s\n", c->name, strerror(-c->fd));
		return 1;
	}
	return 0;
}

int command_console(int argc, char **argv)
{
	struct console c = { .fd = -1 };
	const struct argument table[] = { { .what = "NAME", .value = &c.name, .required = 1 } };
	int status = arguments_parse("console", table, 1, argc, argv);
	if (status)
		return status;
	c.signals = watch_signals();
	status = connect_console(&c);
	if (!status) {
		c.tty = isatty(STDIN_FILENO) && tcgetpgrp(STDIN_FILENO) == getpgrp();
		if (c.tty) {
			fprintf(stderr, "trapline: the console of %s; Ctrl-A x leaves, Ctrl-A h lists the keys\n", c.name);
			terminal_raw(STDIN_FILENO);
		}
		send_size(&c);
		status = attend(&c);
		terminal_restore();
		close(c.fd);
	}
	if (c.control && c.control->fd >= 0)
		control_close(c.control);
	free(c.control);
	close(c.signals);
	return status;
}
