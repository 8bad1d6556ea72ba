#include "cli/detach.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static int wait_for_child(int fd, pid_t child)
{
	char byte;
	ssize_t n;
	do
		n = read(fd, &byte, 1);
	while (n < 0 && errno == EINTR);
	if (n == 1)
		return 0;
	int status;
	while (waitpid(child, &status, 0) < 0 && errno == EINTR)
		;
	if (WIFEXITED(status))
		return WEXITSTATUS(status) ? WEXITSTATUS(status) : 3;
	fprintf(stderr, "trapline: --detach: the process in the background died of signal %d while it built the VM\n", WTERMSIG(status));
	return 3;
}

static void replace(int fd, const char *path, int flags)
{
	int to = open(path, flags | O_CLOEXEC);
	if (to < 0)
		return;
	dup2(to, fd);
	if (to != fd)
		close(to);
}

int detach_start(struct detach *d)
{
	int fds[2];
	pid_t parent = getpid();
	pid_t child = pipe2(fds, O_CLOEXEC) < 0 ? -1 : fork();
	if (child < 0) {
		fprintf(stderr, "trapline: --detach: cannot start a process: %s; end something, or leave --detach out\n", strerror(errno));
		return 2;
	}
	if (child) {
		close(fds[1]);
		return wait_for_child(fds[0], child);
	}
	close(fds[0]);
	d->ready_fd = fds[1];
	/* Until it stands, ending the command ends it. */
	prctl(PR_SET_PDEATHSIG, SIGTERM);
	if (getppid() != parent)
		raise(SIGTERM);
	setsid();
	replace(STDIN_FILENO, "/dev/null", O_RDONLY);
	return -1;
}

void detach_ready(struct detach *d, int log_fd)
{
	struct stat st;
	if (d->ready_fd < 0)
		return;
	fflush(stdout);
	replace(STDOUT_FILENO, "/dev/null", O_WRONLY);
	if (fstat(STDERR_FILENO, &st) < 0 || !S_ISREG(st.st_mode)) {
		if (log_fd >= 0)
			dup2(log_fd, STDERR_FILENO);
		else
			replace(STDERR_FILENO, "/dev/null", O_WRONLY);
	}
	prctl(PR_SET_PDEATHSIG, 0);
	ssize_t n = write(d->ready_fd, "", 1);
	(void)n; /* the parent was killed: then nobody asks */
	close(d->ready_fd);
	d->ready_fd = -1;
}
