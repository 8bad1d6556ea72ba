#include "chardev/terminal.h"

#include <errno.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <termios.h>

/* The process's terminal: written only between VMs, read by signal handlers. */
static struct termios saved;
static int saved_fd = -1;
static volatile sig_atomic_t raw;
static bool registered;

int terminal_raw(int fd)
{
	if (raw)
		return -EBUSY;
	if (tcgetattr(fd, &saved) < 0)
		return -errno;
	struct termios t = saved;
	cfmakeraw(&t);
	t.c_oflag |= OPOST; /* our own messages still end in plain newlines */
	t.c_cc[VMIN] = 1;
	t.c_cc[VTIME] = 0;
	if (!registered && atexit(terminal_restore) == 0)
		registered = true;
	saved_fd = fd;
	raw = 1; /* before the change: a signal in between restores what is still there */
	if (tcsetattr(fd, TCSANOW, &t) < 0) {
		raw = 0;
		return -errno;
	}
	return 0;
}

void terminal_restore(void)
{
	if (!raw)
		return;
	int saved_errno = errno;
	raw = 0;
	tcsetattr(saved_fd, TCSANOW, &saved); /* async-signal-safe (POSIX 2.4.3) */
	errno = saved_errno;
}
