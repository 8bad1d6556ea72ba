#include "device/virtio/virtiofsd.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/error.h"
#include "device/virtio/vhost.h"

static const char *const cache_modes[] = { "none", "auto", "always" };

/* QEMU's of Debian 12 takes its options behind -o, the one in Rust (Debian 13) as long options. */
static const struct daemon {
	const char *path;
	bool rust;
} daemons[] = {
	{ "/usr/libexec/virtiofsd", true },
	{ "/usr/lib/qemu/virtiofsd", false },
};

static const struct daemon *find_daemon(void)
{
	for (unsigned i = 0; i < sizeof(daemons) / sizeof(daemons[0]); i++)
		if (access(daemons[i].path, X_OK) == 0)
			return &daemons[i];
	return NULL;
}

/* A socket that listens and our connection to it, on a path that is gone again when this returns: nobody else can connect. */
static int make_connection(int *listening, int *connected, struct error *err)
{
	char folder[] = "/tmp/trapline-share-XXXXXX";
	struct sockaddr_un a = { .sun_family = AF_UNIX };
	if (!mkdtemp(folder)) /* mode 0700 */
		return error_set(err, errno, "--share: cannot make a folder for the socket in /tmp: %s", strerror(errno));
	snprintf(a.sun_path, sizeof(a.sun_path), "%s/s", folder);
	*listening = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	*connected = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	int r = 0;
	if (*listening < 0 || *connected < 0 || bind(*listening, (struct sockaddr *)&a, sizeof(a)) < 0 || listen(*listening, 1) < 0 ||
	    connect(*connected, (struct sockaddr *)&a, sizeof(a)) < 0)
		r = error_set(err, errno, "--share: cannot make the socket for virtiofsd: %s", strerror(errno));
	unlink(a.sun_path);
	rmdir(folder);
	if (r < 0) {
		if (*listening >= 0)
			close(*listening);
		if (*connected >= 0)
			close(*connected);
	}
	return r;
}

/* In the child, with only system calls: a process forked from one with threads may hold locks of any library. */
static void run_daemon(char *const *argv, const char *folder, int listening, bool read_only, pid_t parent)
{
	sigset_t none;
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (getppid() != parent)
		_exit(1);
	/* Its terminal is ours: ^C there is input for the guest, not the end of its files. */
	setsid();
	int null = open("/dev/null", O_RDWR | O_CLOEXEC);
	dup2(null, STDIN_FILENO);
	dup2(null, STDOUT_FILENO);
	fcntl(listening, F_SETFD, 0);
	/* Neither daemon of Debian can share read-only itself: a read-only mount of its own, in its own namespace. */
	if (read_only && (unshare(CLONE_NEWNS) < 0 || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0 ||
			  mount(folder, folder, NULL, MS_BIND, NULL) < 0 || mount(NULL, folder, NULL, MS_BIND | MS_REMOUNT | MS_RDONLY, NULL) < 0)) {
		static const char text[] = "trapline: error: --share: cannot make the folder read-only for the guest\n";
		ssize_t n = write(STDERR_FILENO, text, sizeof(text) - 1);
		(void)n;
		_exit(1);
	}
	execv(argv[0], argv);
	_exit(127);
}

int virtiofsd_start(pid_t *pid, int *fd, const struct share_config *c, struct error *err)
{
	const struct daemon *d = find_daemon();
	if (!d)
		return error_set(err, ENOENT, "--share: virtiofsd is not installed; on Debian 12 it comes with the package qemu-system-common, on Debian 13 with "
					      "virtiofsd");
	if (geteuid() && (!d->rust || c->read_only))
		return error_set(err, EPERM, "--share: %s; run as root, or start virtiofsd yourself and give socket=PATH",
				 d->rust ? "ro needs the right to mount" : "this virtiofsd needs root");
	char folder[PATH_MAX], source[PATH_MAX + 16], fd_option[32], cache[32];
	struct stat st;
	if (!realpath(c->folder, folder) || stat(folder, &st) < 0)
		return error_set(err, errno, "--share: cannot use the folder %s: %s", c->folder, strerror(errno));
	if (!S_ISDIR(st.st_mode))
		return error_set(err, ENOTDIR, "--share: %s is not a folder", c->folder);
	if (!d->rust && strchr(folder, ','))
		return error_set(err, EINVAL, "--share: %s has a comma in its name, which virtiofsd takes for the end of it; share another folder", folder);
	int listening = -1, connected = -1;
	int r = make_connection(&listening, &connected, err);
	if (r < 0)
		return r;
	snprintf(source, sizeof(source), "%s%s", d->rust ? "--shared-dir=" : "source=", folder);
	snprintf(fd_option, sizeof(fd_option), "--fd=%d", listening);
	snprintf(cache, sizeof(cache), "%scache=%s", d->rust ? "--" : "", cache_modes[c->cache]);
	char *of_qemu[] = { (char *)d->path, fd_option, "-f", "-o", source, "-o", cache, "-o", "xattr", "-o", "log_level=err", NULL };
	char *of_rust[] = { (char *)d->path, fd_option, source, cache, "--xattr", "--log-level=error", NULL };
	pid_t parent = getpid(), child = fork();
	if (child == 0)
		run_daemon(d->rust ? of_rust : of_qemu, folder, listening, c->read_only, parent);
	int code = errno;
	close(listening);
	if (child < 0) {
		close(connected);
		return error_set(err, code, "--share: cannot start virtiofsd: %s", strerror(code));
	}
	*pid = child;
	*fd = connected;
	return 0;
}

void virtiofsd_stop(pid_t pid)
{
	/* QEMU's has a child in a namespace of its own; both are the session that setsid made. It has nothing to write back. */
	if (kill(-pid, SIGKILL) < 0)
		kill(pid, SIGKILL);
	waitpid(pid, NULL, 0);
}
