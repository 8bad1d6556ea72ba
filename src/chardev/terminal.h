/*
 * Raw mode of the controlling terminal, and the promise to undo it however the process ends.
 *
 * A terminal belongs to the process, not to a VM, so this keeps process-wide state (one saved struct termios).
 * terminal_restore is async-signal-safe and idempotent: call it from handlers of SIGINT, SIGTERM, SIGSEGV and the like
 * before dying, and on every ordinary way out.
 */
#ifndef TRAPLINE_CHARDEV_TERMINAL_H
#define TRAPLINE_CHARDEV_TERMINAL_H

/* Put terminal `fd` into raw mode (output processing stays on) and remember how it was. 0, -EBUSY if it already is
 * raw by us, -ENOTTY and other -errno. Also registers terminal_restore with atexit. */
int terminal_raw(int fd);

/* Back to what terminal_raw found; nothing if it was not called. */
void terminal_restore(void);

#endif
