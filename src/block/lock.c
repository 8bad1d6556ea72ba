/*
 * Image locks in the way of QEMU's tools, so that we and they see each other's (its docs: "image locking").
 *
 * There are permissions (read consistently, write, write what is unchanged, resize) with a bit number each. Who uses permission n
 * holds a read lock on byte 100 + n of the file; who does not let others use it holds one on byte 200 + n. After taking
 * its own locks everybody looks whether another has the opposite byte: of two that start at once at least one sees the other.
 * Open file description locks: they belong to the open file, so a second disk of the same VM is another too, and they end with the
 * last descriptor, however the process dies.
 */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <time.h>

#include "base/error.h"
#include "base/log.h"
#include "block/driver.h"

#define USES 100
#define DENIES 200

enum { PERM_READ = 0, PERM_WRITE = 1, PERM_RESIZE = 3 };

static int take(int fd, int byte)
{
	struct flock l = { .l_type = F_RDLCK, .l_whence = SEEK_SET, .l_start = byte, .l_len = 1 };
	return fcntl(fd, F_OFD_SETLK, &l) < 0 ? -errno : 0;
}

/* Does somebody else have it? */
static int taken(int fd, int byte)
{
	struct flock l = { .l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = byte, .l_len = 1 };
	if (fcntl(fd, F_OFD_GETLK, &l) < 0)
		return -errno;
	return l.l_type == F_UNLCK ? 0 : -EAGAIN;
}

static int lock(int fd, bool writer)
{
	static const int denied[] = { PERM_WRITE, PERM_RESIZE };
	static const int used[] = { PERM_READ, PERM_WRITE, PERM_RESIZE };
	unsigned nused = writer ? 3 : 1;
	int r = 0;
	for (unsigned i = 0; i < nused && !r; i++)
		r = take(fd, USES + used[i]);
	for (unsigned i = 0; i < 2 && !r; i++)
		r = take(fd, DENIES + denied[i]);
	for (unsigned i = 0; i < nused && !r; i++)
		r = taken(fd, DENIES + used[i]);
	for (unsigned i = 0; i < 2 && !r; i++)
		r = taken(fd, USES + denied[i]);
	if (r) {
		struct flock all = { .l_type = F_UNLCK, .l_whence = SEEK_SET, .l_start = USES, .l_len = 2 * (DENIES - USES) };
		fcntl(fd, F_OFD_SETLK, &all);
	}
	return r;
}

int block_lock_image(int fd, bool writer, const char *path, const char *option, struct error *err)
{
	/* The kernel finishes what io_uring has in flight for a process that was killed, and keeps its files open so long: a VM that is started
	 * again at once finds the locks of its predecessor for a moment. */
	int r = lock(fd, writer);
	for (int i = 0; (r == -EAGAIN || r == -EACCES) && i < 10; i++) {
		struct timespec wait = { .tv_nsec = 50000000 };
		nanosleep(&wait, NULL);
		r = lock(fd, writer);
	}
	if (!r)
		return 0;
	if (r == -EAGAIN || r == -EACCES)
		return error_set(err, EAGAIN,
				 "%s %s: another process has this image open%s; end that first, or take lock=off if you know that nobody "
				 "writes to it", option, path, writer ? "" : " for writing");
	/* A file system without locks is no reason to refuse a disk. */
	log_warn("%s %s: this file system has no locks (%s): nothing keeps a second VM from writing to the image", option, path, strerror(-r));
	return 0;
}
