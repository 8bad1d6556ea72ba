#include "control/runtime.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "base/error.h"

#define LOCK "lock"
#define PID "pid"
#define LOGS ".logs" /* no VM has such a name */
#define CONNECT_SECONDS 2
#define CLAIM_TRIES 20 /* of 10 ms: somebody who looks whether a VM is dead holds its lock for a moment */

struct runtime {
	char name[RUNTIME_NAME_MAX + 1];
	char path[4096];
	int base_fd, dir_fd, lock_fd;
	bool has_log;
};

bool runtime_name_ok(const char *name)
{
	size_t len = strnlen(name, RUNTIME_NAME_MAX + 1);
	if (len < 1 || len > RUNTIME_NAME_MAX || name[0] == '.' || name[0] == '_' || name[0] == '-')
		return false;
	for (size_t i = 0; i < len; i++) {
		unsigned char c = (unsigned char)name[i];
		if (c >= 0x80 || (!isalnum(c) && c != '.' && c != '_' && c != '-'))
			return false;
	}
	return true;
}

/* --- the base folder --- */

/* Open `path`, made if need be, if it is ours alone. */
static int open_private(const char *path, struct error *err)
{
	if (mkdir(path, 0700) < 0 && errno != EEXIST)
		return error_set(err, errno, "%s: cannot make this folder for running VMs: %s", path, strerror(errno));
	int fd = open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	if (fd < 0)
		return error_set(err, errno, "%s: cannot open this folder for running VMs: %s; remove what is there, or set XDG_RUNTIME_DIR",
				 path, errno == ELOOP || errno == ENOTDIR ? "it is a file or a symbolic link" : strerror(errno));
	struct stat st;
	if (fstat(fd, &st) < 0 || st.st_uid != geteuid()) {
		close(fd);
		return error_set(err, EPERM, "%s: this folder for running VMs belongs to another user; set XDG_RUNTIME_DIR to a folder of yours", path);
	}
	if ((st.st_mode & 077) && fchmod(fd, 0700) < 0) {
		close(fd);
		return error_set(err, errno, "%s: others may enter this folder for running VMs, and that cannot be changed", path);
	}
	return fd;
}

/* $XDG_RUNTIME_DIR counts if it is the user's own: after su it is still that of the user before. */
static const char *xdg_folder(void)
{
	const char *xdg = getenv("XDG_RUNTIME_DIR");
	struct stat st;
	if (!xdg || xdg[0] != '/' || stat(xdg, &st) < 0 || !S_ISDIR(st.st_mode) || st.st_uid != geteuid())
		return NULL;
	return xdg;
}

/* A descriptor of the base folder; its path in `path`. */
static int open_base(char *path, size_t room, struct error *err)
{
	const char *xdg = xdg_folder();
	if (xdg) {
		if ((size_t)snprintf(path, room, "%s/trapline", xdg) >= room)
			return error_set(err, ENAMETOOLONG, "XDG_RUNTIME_DIR is too long a path; set it to a shorter one");
		return open_private(path, err);
	}
	if (geteuid() == 0) {
		snprintf(path, room, "/run/trapline");
		int fd = open_private(path, err);
		if (fd >= 0)
			return fd;
		/* A container may have no /run, or a read-only one. */
	}
	snprintf(path, room, "/tmp/trapline-%u", (unsigned)geteuid());
	return open_private(path, err);
}

/* --- locks --- */

/* A lock of the open file description: it ends with the last descriptor, that is, with the process. */
static int try_lock(int fd)
{
	struct flock l = { .l_type = F_WRLCK, .l_whence = SEEK_SET };
	return fcntl(fd, F_OFD_SETLK, &l) < 0 ? -errno : 0;
}

static bool is_locked(int fd)
{
	struct flock l = { .l_type = F_WRLCK, .l_whence = SEEK_SET };
	return fcntl(fd, F_OFD_GETLK, &l) == 0 && l.l_type != F_UNLCK;
}

static bool same_file(const struct stat *a, const struct stat *b)
{
	return a->st_dev == b->st_dev && a->st_ino == b->st_ino;
}

/* Is what we have open still what the names say? If not, somebody cleaned up between our open and our lock. */
static bool still_there(int base_fd, const char *name, int dir_fd, int lock_fd)
{
	struct stat dir, lock, named;
	return fstat(dir_fd, &dir) == 0 && fstatat(base_fd, name, &named, AT_SYMLINK_NOFOLLOW) == 0 && same_file(&dir, &named) &&
	       fstat(lock_fd, &lock) == 0 && fstatat(dir_fd, LOCK, &named, AT_SYMLINK_NOFOLLOW) == 0 && same_file(&lock, &named);
}

static int open_dir(int base_fd, const char *name)
{
	int fd = openat(base_fd, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	return fd < 0 ? -errno : fd;
}

static int open_lock(int dir_fd, int flags)
{
	int fd = openat(dir_fd, LOCK, O_RDWR | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK | flags, 0600);
	return fd < 0 ? -errno : fd;
}

/* --- cleaning up; the lock is ours --- */

static void remove_files(int dir_fd, bool with_lock)
{
	int fd = openat(dir_fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	DIR *dir = fd < 0 ? NULL : fdopendir(fd);
	if (!dir) {
		if (fd >= 0)
			close(fd);
		return;
	}
	for (struct dirent *e; (e = readdir(dir));) {
		if (strcmp(e->d_name, ".") && strcmp(e->d_name, "..") && strcmp(e->d_name, LOCK))
			unlinkat(dir_fd, e->d_name, 0);
	}
	closedir(dir);
	if (with_lock)
		unlinkat(dir_fd, LOCK, 0);
}

static void remove_folder(int base_fd, const char *name, int dir_fd)
{
	remove_files(dir_fd, true);
	unlinkat(base_fd, name, AT_REMOVEDIR);
}

/* --- claiming a name --- */

static void free_runtime(struct runtime *r)
{
	if (r->lock_fd >= 0)
		close(r->lock_fd);
	if (r->dir_fd >= 0)
		close(r->dir_fd);
	if (r->base_fd >= 0)
		close(r->base_fd);
	free(r);
}

static int write_pid(const struct runtime *r)
{
	char text[32];
	int len = snprintf(text, sizeof(text), "%ld\n", (long)getpid());
	int fd = openat(r->dir_fd, PID, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0600);
	if (fd < 0)
		return -errno;
	ssize_t n = write(fd, text, (size_t)len);
	int e = n < 0 ? errno : EIO;
	close(fd);
	return n == len ? 0 : -e;
}

/* One try: 0, -EAGAIN (locked, or cleaned up under our hands), or another error. */
static int claim_once(struct runtime *r)
{
	if (mkdirat(r->base_fd, r->name, 0700) < 0 && errno != EEXIST)
		return -errno;
	int dir_fd = open_dir(r->base_fd, r->name);
	if (dir_fd < 0)
		return dir_fd == -ENOENT ? -EAGAIN : dir_fd;
	int lock_fd = open_lock(dir_fd, O_CREAT);
	int e = lock_fd < 0 ? lock_fd : try_lock(lock_fd);
	if (!e && !still_there(r->base_fd, r->name, dir_fd, lock_fd))
		e = -EAGAIN;
	if (e) {
		if (lock_fd >= 0)
			close(lock_fd);
		close(dir_fd);
		return e == -EACCES || e == -ENOENT ? -EAGAIN : e;
	}
	r->dir_fd = dir_fd;
	r->lock_fd = lock_fd;
	return 0;
}

static int claim(struct runtime **out, const char *name, int tries, struct error *err)
{
	struct runtime *r = calloc(1, sizeof(*r));
	if (!r)
		return error_set(err, ENOMEM, "not enough memory");
	r->base_fd = r->dir_fd = r->lock_fd = -1;
	snprintf(r->name, sizeof(r->name), "%s", name);
	char base[sizeof(r->path) - sizeof(r->name) - 1];
	r->base_fd = open_base(base, sizeof(base), err);
	if (r->base_fd < 0) {
		int e = r->base_fd;
		free_runtime(r);
		return e;
	}
	snprintf(r->path, sizeof(r->path), "%s/%s", base, r->name);

	int e;
	for (int i = 0; (e = claim_once(r)) == -EAGAIN && i < tries; i++)
		nanosleep(&(struct timespec){ .tv_nsec = 10000000 }, NULL);
	if (!e) {
		remove_files(r->dir_fd, false); /* of a dead VM of this name */
		e = write_pid(r);
	}
	if (e) {
		free_runtime(r);
		if (e == -EAGAIN)
			return error_set(err, EEXIST, "--name %s: a VM of this name is running; choose another name, or stop it with trapline stop %s",
					 name, name);
		return error_set(err, -e, "%s/%s: cannot make this folder for the VM: %s", base, name, strerror(-e));
	}
	*out = r;
	return 0;
}

int runtime_claim(struct runtime **out, const char *name, struct error *err)
{
	if (!runtime_name_ok(name))
		return error_set(err, EINVAL, "\"%s\" is not a name for a VM", name);
	return claim(out, name, CLAIM_TRIES, err);
}

/* "debian" of "/images/debian.qcow2": the last part up to its first dot, with what a name may not have left out. */
static void name_of_file(char *name, size_t room, const char *path)
{
	const char *slash = strrchr(path, '/');
	size_t n = 0;
	for (const char *p = slash ? slash + 1 : path; *p && *p != '.' && *p != ',' && n + 1 < room; p++) {
		unsigned char c = (unsigned char)*p;
		if (c < 0x80 && (isalnum(c) || (n && (c == '-' || c == '_'))))
			name[n++] = *p;
	}
	name[n] = '\0';
}

int runtime_claim_for_file(struct runtime **out, const char *path, struct error *err)
{
	char stem[RUNTIME_NAME_MAX + 1 - 16], name[RUNTIME_NAME_MAX + 1];
	name_of_file(stem, sizeof(stem), path);
	if (stem[0]) {
		for (int i = 1; i <= 99; i++) {
			snprintf(name, sizeof(name), i == 1 ? "%s" : "%s-%d", stem, i);
			int e = claim(out, name, 2, err);
			if (e != -EEXIST)
				return e;
		}
	}
	snprintf(name, sizeof(name), "vm-%ld", (long)getpid());
	return claim(out, name, CLAIM_TRIES, err);
}

static int open_logs(const struct runtime *r)
{
	if (mkdirat(r->base_fd, LOGS, 0700) < 0 && errno != EEXIST)
		return -errno;
	return open_dir(r->base_fd, LOGS);
}

int runtime_open_log(struct runtime *r, char *path, size_t room)
{
	int logs = open_logs(r);
	if (logs < 0)
		return logs;
	int fd = openat(logs, r->name, O_WRONLY | O_CREAT | O_TRUNC | O_APPEND | O_NOFOLLOW | O_CLOEXEC, 0600);
	int e = errno;
	close(logs);
	if (fd < 0)
		return -e;
	size_t base = strlen(r->path) - strlen(r->name);
	snprintf(path, room, "%.*s" LOGS "/%s", (int)base, r->path, r->name);
	r->has_log = true;
	return fd;
}

static void remove_empty_log(const struct runtime *r)
{
	struct stat st;
	int logs = open_logs(r);
	if (logs < 0)
		return;
	if (fstatat(logs, r->name, &st, AT_SYMLINK_NOFOLLOW) == 0 && S_ISREG(st.st_mode) && st.st_size == 0)
		unlinkat(logs, r->name, 0);
	close(logs);
	unlinkat(r->base_fd, LOGS, AT_REMOVEDIR); /* if it was the last */
}

void runtime_release(struct runtime *r)
{
	if (!r)
		return;
	if (r->has_log)
		remove_empty_log(r);
	remove_folder(r->base_fd, r->name, r->dir_fd);
	free_runtime(r);
}

const char *runtime_name(const struct runtime *r)
{
	return r->name;
}

const char *runtime_path(const struct runtime *r)
{
	return r->path;
}

/* A socket address holds 107 characters; a longer path is reached through the folder's descriptor. */
static void socket_path(const char *folder, int dir_fd, const char *file, char *path, size_t room)
{
	const size_t most = sizeof(((struct sockaddr_un *)0)->sun_path) - 1;
	if (folder && strlen(folder) + 1 + strlen(file) <= most)
		snprintf(path, room, "%s/%s", folder, file);
	else
		snprintf(path, room, "/proc/self/fd/%d/%s", dir_fd, file);
}

void runtime_socket_path(const struct runtime *r, const char *file, char *path, size_t room)
{
	socket_path(r->path, r->dir_fd, file, path, room);
}

/* --- looking at the others --- */

static pid_t read_pid(int dir_fd)
{
	char text[32];
	int fd = openat(dir_fd, PID, O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK);
	if (fd < 0)
		return 0;
	ssize_t n = read(fd, text, sizeof(text) - 1);
	close(fd);
	if (n <= 0)
		return 0;
	text[n] = '\0';
	long pid = strtol(text, NULL, 10);
	return pid > 0 && pid <= 0x7fffffff ? (pid_t)pid : 0;
}

/* Alive: true, with its folder open in *dir_out. Dead: cleaned up. */
static bool look_at(int base_fd, const char *name, int *dir_out)
{
	int dir_fd = open_dir(base_fd, name);
	if (dir_fd < 0)
		return false;
	/* A folder without a lock is one that is just being made, or a remainder; the lock tells them apart. */
	int lock_fd = open_lock(dir_fd, O_CREAT);
	bool alive = false;
	if (lock_fd >= 0) {
		alive = is_locked(lock_fd) || try_lock(lock_fd) < 0;
		if (!alive && still_there(base_fd, name, dir_fd, lock_fd))
			remove_folder(base_fd, name, dir_fd);
		close(lock_fd);
	}
	if (alive)
		*dir_out = dir_fd;
	else
		close(dir_fd);
	return alive;
}

static int by_name(const void *a, const void *b)
{
	return strcmp(((const struct runtime_vm *)a)->name, ((const struct runtime_vm *)b)->name);
}

int runtime_list(struct runtime_vm **out, unsigned *n, struct error *err)
{
	char path[4096];
	*out = NULL;
	*n = 0;
	int base_fd = open_base(path, sizeof(path), err);
	if (base_fd < 0)
		return base_fd;
	DIR *dir = fdopendir(base_fd);
	if (!dir) {
		close(base_fd);
		return error_set(err, ENOMEM, "not enough memory");
	}
	int r = 0;
	unsigned room = 0;
	for (struct dirent *e; (e = readdir(dir));) {
		int dir_fd;
		if (!runtime_name_ok(e->d_name) || !look_at(base_fd, e->d_name, &dir_fd))
			continue;
		if (*n == room) {
			room = room ? 2 * room : 16;
			struct runtime_vm *grown = realloc(*out, room * sizeof(*grown));
			if (!grown) {
				close(dir_fd);
				r = error_set(err, ENOMEM, "not enough memory");
				break;
			}
			*out = grown;
		}
		struct runtime_vm *vm = &(*out)[(*n)++];
		snprintf(vm->name, sizeof(vm->name), "%.*s", RUNTIME_NAME_MAX, e->d_name);
		vm->pid = read_pid(dir_fd);
		close(dir_fd);
	}
	closedir(dir);
	if (r) {
		free(*out);
		*out = NULL;
		*n = 0;
	} else if (*n) {
		qsort(*out, *n, sizeof(**out), by_name);
	}
	return r;
}

/* The folder of a running VM, or -ENOENT. */
static int open_running(const char *name, struct error *err)
{
	char path[4096];
	int base_fd = open_base(path, sizeof(path), err);
	if (base_fd < 0)
		return base_fd;
	int dir_fd = -1;
	bool alive = runtime_name_ok(name) && look_at(base_fd, name, &dir_fd);
	close(base_fd);
	return alive ? dir_fd : -ENOENT;
}

bool runtime_running(const char *name)
{
	int dir_fd = open_running(name, NULL);
	if (dir_fd < 0)
		return false;
	close(dir_fd);
	return true;
}

pid_t runtime_pid(const char *name)
{
	int dir_fd = open_running(name, NULL);
	if (dir_fd < 0)
		return 0;
	pid_t pid = read_pid(dir_fd);
	close(dir_fd);
	return pid;
}

static int unknown_name(const char *name, struct error *err)
{
	struct runtime_vm *vms;
	unsigned n;
	int r = runtime_list(&vms, &n, err);
	if (r)
		return r;
	char names[300] = "";
	size_t len = 0;
	for (unsigned i = 0; i < n && len + RUNTIME_NAME_MAX + 8 < sizeof(names); i++)
		len += (size_t)snprintf(names + len, sizeof(names) - len, "%s%s", i ? ", " : "", vms[i].name);
	free(vms);
	if (n)
		return error_set(err, ENOENT, "no VM named \"%.100s\" is running; running: %s%s", name, names, len + RUNTIME_NAME_MAX + 8 < sizeof(names) ? "" : ", ...");
	return error_set(err, ENOENT, "no VM named \"%.100s\" is running; none is", name);
}

int runtime_connect(const char *name, const char *file, struct error *err)
{
	int dir_fd = open_running(name, err);
	if (dir_fd == -ENOENT)
		return unknown_name(name, err);
	if (dir_fd < 0)
		return dir_fd;
	struct sockaddr_un addr = { .sun_family = AF_UNIX };
	socket_path(NULL, dir_fd, file, addr.sun_path, sizeof(addr.sun_path));
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	/* A process that hangs takes connections for as long as its queue has room; then connect would wait for ever. */
	const struct timeval patience = { .tv_sec = CONNECT_SECONDS };
	if (fd >= 0)
		setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof(patience));
	int r = fd < 0 || connect(fd, (struct sockaddr *)&addr, sizeof(addr)) < 0 ? -errno : fd;
	if (r < 0 && fd >= 0)
		close(fd);
	close(dir_fd);
	return r == -EAGAIN ? -ETIMEDOUT : r;
}
