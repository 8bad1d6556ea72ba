/*
 * Going into the background: the VM is built by a child process, and the command waits until it stands.
 *
 * So every mistake is still told in the foreground, with the foreground's status. No globals; main thread, before any other thread exists.
 */
#ifndef TRAPLINE_CLI_DETACH_H
#define TRAPLINE_CLI_DETACH_H

struct detach {
	int ready_fd; /* -1: not detached */
};

/* Fork. In the child returns -1, with standard input at /dev/null and a session of its own. In the parent waits for detach_ready or the
 * child's end, and returns the status to exit with. */
int detach_start(struct detach *d);

/* In the child: the VM is built. Standard output goes to /dev/null, standard error to `log_fd` (>= 0), unless it is a regular file
 * already; the parent ends with status 0. Nothing if not detached. */
void detach_ready(struct detach *d, int log_fd);

#endif
