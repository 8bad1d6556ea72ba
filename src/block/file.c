/*
 * The raw driver: a file or block device of the host as it is.
 *
 * Most requests become one aio job. A worker thread with a bounce buffer does what the kernel would not take: under O_DIRECT what is not aligned,
 * zeroes where the file system has no call for them, and the first sector of a disk whose format was guessed: the guest must not turn
 * it into a qcow2 header, which would let it name any file of the host as its backing file at the next start.
 *
 * A write of a part of an aligned block (sectors of 512 on a disk of 4096 with O_DIRECT) reads the rest of it first. It runs alone:
 * what comes meanwhile waits. That is slow, and rare.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/fs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "base/error.h"
#include "base/log.h"
#include "block/aio.h"
#include "block/bounce.h"
#include "block/driver.h"

struct file;

/* A request on its way. */
struct transfer {
	struct aio_job job;
	struct aio_work work;
	struct file *file;
	struct block_request *r;
	struct transfer *next; /* of the free ones */
};

struct file {
	int fd;
	struct aio *aio;
	const char *name;
	struct bounce bounce;	/* fd, alignment and size for all purposes */
	uint64_t memory_align;	/* of buffers; 1 for the page cache */
	bool direct, device, unsafe;
	bool no_punch, no_zero; /* found out: the file system cannot */
	bool guessed;		/* nobody said that it is raw */
	bool warned_guard, warned_tail;
	struct transfer *free;
	/* Those that wait for a read-modify-write to end, or are one that waits for the rest to end. */
	struct block_request *waiting, *last_waiting;
	struct block_request *failed; /* before they began; the result is in node_private */
	unsigned in_flight;
	bool alone;
};

static void start(struct file *f, struct block_request *r);

/* --- ends of requests --- */

static bool partial(const struct file *f, const struct block_request *r)
{
	return f->direct && (r->op == BLOCK_WRITE || r->op == BLOCK_WRITE_ZEROES) && (r->offset | r->len) & (f->bounce.align - 1);
}

static void start_waiting(struct file *f)
{
	while (f->waiting && !f->alone) {
		struct block_request *r = f->waiting;
		if (partial(f, r)) {
			if (f->in_flight)
				return;
			f->alone = true;
		}
		f->waiting = r->next;
		if (!f->waiting)
			f->last_waiting = NULL;
		start(f, r);
	}
}

static void fail(struct file *f, struct block_request *r, int result)
{
	r->node_private = (void *)(intptr_t)result;
	r->next = f->failed;
	f->failed = r;
}

/* Never from submit. */
static void deliver_failed(struct file *f)
{
	while (f->failed) {
		struct block_request *r = f->failed;
		f->failed = r->next;
		r->done(r, (int)(intptr_t)r->node_private);
	}
}

static void end(struct transfer *t, int result)
{
	struct file *f = t->file;
	struct block_request *r = t->r;
	t->next = f->free;
	f->free = t;
	f->in_flight--;
	f->alone = false;
	if (result == -EPERM && f->bounce.guard)
		log_warn_once(f->warned_guard,
			      "%s: the guest writes the head of an image of another format to a disk that was taken for raw; refused: say format=raw",
			      f->name);
	r->done(r, result);
	if (f->waiting || f->failed) {
		start_waiting(f);
		deliver_failed(f);
	}
}

/* --- work on threads --- */

static int run_bounce(struct aio_work *w)
{
	struct transfer *t = w->opaque;
	struct block_request *r = t->r;
	if (r->op == BLOCK_READ)
		return bounce_read(&t->file->bounce, r->iov, r->niov, r->offset, r->len);
	return bounce_write(&t->file->bounce, r->op == BLOCK_WRITE ? r->iov : NULL, r->niov, r->offset, r->len);
}

static int run_discard(struct aio_work *w)
{
	struct transfer *t = w->opaque;
	uint64_t range[2] = { t->r->offset, t->r->len };
	return ioctl(t->file->fd, BLKDISCARD, range) < 0 ? -errno : 0;
}

static void work_done(struct aio_work *w, int result)
{
	struct transfer *t = w->opaque;
	/* A discard is a hint. */
	if (t->r->op == BLOCK_DISCARD && (result == -EOPNOTSUPP || result == -EINVAL))
		result = 0;
	end(t, result);
}

static void to_thread(struct transfer *t, int (*run)(struct aio_work *w))
{
	t->work = (struct aio_work){ .run = run, .done = work_done, .opaque = t };
	aio_work_submit(t->file->aio, &t->work);
}

/* --- jobs --- */

static void job_done(struct aio_job *j, int result)
{
	struct transfer *t = j->opaque;
	struct file *f = t->file;
	bool cannot = result == -EOPNOTSUPP || result == -ENOSYS || result == -ENODEV;
	switch (j->op) {
	case AIO_DISCARD:
		f->no_punch |= cannot;
		if (t->r->op == BLOCK_DISCARD) {
			if (cannot || result == -EINVAL)
				result = 0;
			break;
		}
		if (cannot || result == -EINVAL) {
			j->op = AIO_ZERO;
			aio_submit(f->aio, j);
			return;
		}
		break;
	case AIO_ZERO:
		f->no_zero |= cannot;
		if (cannot || result == -EINVAL) {
			to_thread(t, run_bounce);
			return;
		}
		break;
	default:
		end(t, result);
		return;
	}
	if (!result && f->bounce.datasync) {
		j->op = AIO_FSYNC;
		aio_submit(f->aio, j);
		return;
	}
	end(t, result);
}

static bool aligned(const struct file *f, const struct block_request *r)
{
	if (!f->direct)
		return true;
	uint64_t bits = (r->offset | r->len) & (f->bounce.align - 1);
	for (unsigned i = 0; i < r->niov; i++) {
		bits |= (uintptr_t)r->iov[i].iov_base & (f->memory_align - 1);
		bits |= r->iov[i].iov_len & (f->bounce.align - 1);
	}
	return !bits;
}

static void job(struct transfer *t, enum aio_op op, unsigned flags)
{
	struct block_request *r = t->r;
	t->job = (struct aio_job){
		.op = op,
		.fd = t->file->fd,
		.offset = r->offset,
		.len = r->len,
		.iov = r->iov,
		.niov = r->niov,
		.flags = flags,
		.done = job_done,
		.opaque = t,
	};
	aio_submit(t->file->aio, &t->job);
}

static void start(struct file *f, struct block_request *r)
{
	if ((r->op == BLOCK_WRITE || r->op == BLOCK_WRITE_ZEROES) && r->offset + r->len > f->bounce.size) {
		log_warn_once(f->warned_tail, "%s: the guest writes to its last sector, which the file has only a part of; refused: make its size a multiple of 512",
			      f->name);
		f->alone = false;
		fail(f, r, -EIO);
		return;
	}
	struct transfer *t = f->free;
	if (t)
		f->free = t->next;
	else
		t = malloc(sizeof(*t));
	if (!t) {
		f->alone = false;
		fail(f, r, -ENOMEM);
		return;
	}
	t->file = f;
	t->r = r;
	f->in_flight++;

	switch (r->op) {
	case BLOCK_READ:
		if (aligned(f, r))
			job(t, AIO_READ, f->direct ? 0 : AIO_CACHED);
		else
			to_thread(t, run_bounce);
		break;
	case BLOCK_WRITE:
		if (aligned(f, r) && !(f->guessed && !r->offset))
			job(t, AIO_WRITE, (f->direct ? 0 : AIO_CACHED) | (f->bounce.datasync ? AIO_DATASYNC : 0));
		else
			to_thread(t, run_bounce);
		break;
	case BLOCK_FLUSH:
		job(t, AIO_FSYNC, 0);
		break;
	case BLOCK_DISCARD:
		if (f->device)
			to_thread(t, run_discard);
		else
			job(t, AIO_DISCARD, 0);
		break;
	case BLOCK_WRITE_ZEROES:
		if (r->flags & BLOCK_MAY_UNMAP && !f->no_punch)
			job(t, AIO_DISCARD, 0);
		else if (!f->no_zero)
			job(t, AIO_ZERO, 0);
		else
			to_thread(t, run_bounce);
		break;
	}
}

static void file_submit(struct block_node *n, struct block_request *r)
{
	struct file *f = n->priv;
	if ((r->op == BLOCK_FLUSH && f->unsafe) || (r->op == BLOCK_DISCARD && f->no_punch)) {
		fail(f, r, 0); /* nothing to do */
		return;
	}
	if (f->alone || f->waiting || partial(f, r)) {
		r->next = NULL;
		if (f->last_waiting)
			f->last_waiting->next = r;
		else
			f->waiting = r;
		f->last_waiting = r;
		start_waiting(f);
		return;
	}
	start(f, r);
}

static void file_kick(struct block_node *n)
{
	struct file *f = n->priv;
	aio_kick(f->aio);
	deliver_failed(f);
}

static int file_pread(struct block_node *n, void *buf, uint64_t len, uint64_t offset)
{
	const struct file *f = n->priv;
	struct iovec v = { buf, len };
	if (f->direct)
		return bounce_read(&f->bounce, &v, 1, offset, len);
	struct aio_job j = { .op = AIO_READ, .fd = f->fd, .offset = offset, .len = len, .iov = &v, .niov = 1, .flags = AIO_CACHED };
	return aio_run(&j);
}

/* --- opening --- */

static int open_fd(struct file *f, const struct block_open *o, struct error *err)
{
	struct stat st;
	const char *why = NULL;
	if (stat(o->name, &st) < 0) {
		if (errno == ENOENT || errno == ENOTDIR)
			return error_set(err, ENOENT, "%s %s: there is no such file; check the path, or make an empty disk: truncate -s 8G %s", o->option,
					 o->name, o->name);
		return error_set(err, errno, "%s %s: cannot look at it (%s); check the path and its permissions", o->option, o->name, strerror(errno));
	}
	if (S_ISDIR(st.st_mode))
		return error_set(err, EISDIR, "%s %s: this is a directory; give a disk image, or share a folder with --share", o->option, o->name);
	f->device = S_ISBLK(st.st_mode);
	if (!f->device && !S_ISREG(st.st_mode))
		return error_set(err, EINVAL, "%s %s: neither a file nor a block device; give a disk image", o->option, o->name);

	int flags = O_CLOEXEC | (o->read_only ? O_RDONLY : O_RDWR) | (f->direct ? O_DIRECT : 0);
	/* A mounted file system's device must not change under it: the kernel knows, and O_EXCL asks. */
	if (f->device && !o->read_only && o->lock)
		flags |= O_EXCL;
	f->fd = open(o->name, flags);
	if (f->fd >= 0)
		return 0;
	int code = errno;
	switch (code) {
	case EACCES:
	case EPERM:
		why = o->read_only ? "check its permissions" : "check its permissions, or take ro to read only";
		break;
	case EROFS:
		why = "take ro to read only, or overlay to write to a throw-away layer";
		break;
	case EBUSY:
		why = "the host uses it (a mounted file system?); unmount it, or take ro";
		break;
	case EINVAL:
		why = f->direct ? "its file system has no O_DIRECT; take cache=writeback or cache=writethrough" : "give a disk image";
		break;
	default:
		why = "give another image";
	}
	return error_set(err, code, "%s %s: cannot open it for %s (%s); %s", o->option, o->name, o->read_only ? "reading" : "writing", strerror(code), why);
}

static bool power_of_two(uint64_t v)
{
	return v && !(v & (v - 1));
}

/* What O_DIRECT wants: statx tells since Linux 6.1; before, the device's sector or an attempt. */
static int direct_alignment(struct file *f, const struct block_open *o, struct error *err)
{
	f->bounce.align = 512;
	f->memory_align = 512;
#ifdef STATX_DIOALIGN
	struct statx sx;
	if (!statx(f->fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &sx) && sx.stx_mask & STATX_DIOALIGN) {
		if (!power_of_two(sx.stx_dio_offset_align) || sx.stx_dio_offset_align > 65536 || sx.stx_dio_mem_align > 4096)
			return error_set(err, EINVAL, "%s %s: its file system has no O_DIRECT for it; take cache=writeback or cache=writethrough", o->option,
					 o->name);
		if (sx.stx_dio_offset_align > 512)
			f->bounce.align = sx.stx_dio_offset_align;
		f->memory_align = sx.stx_dio_mem_align ? sx.stx_dio_mem_align : 1;
		return 0;
	}
#endif
	int sector = 0;
	if (f->device && !ioctl(f->fd, BLKSSZGET, &sector) && sector > 512 && power_of_two((uint64_t)sector)) {
		f->bounce.align = f->memory_align = (uint64_t)sector;
		return 0;
	}
	void *buf = aligned_alloc(4096, 8192);
	if (!buf)
		return error_set(err, ENOMEM, "out of memory for %s %s", o->option, o->name);
	if (pread(f->fd, (char *)buf + 512, 512, 0) < 0)
		f->bounce.align = f->memory_align = 4096;
	int r = pread(f->fd, buf, f->bounce.align, 0) < 0 ? -errno : 0;
	free(buf);
	if (r)
		return error_set(err, -r, "%s %s: cannot read it with O_DIRECT (%s); take cache=writeback or cache=writethrough", o->option, o->name,
				 strerror(-r));
	return 0;
}

static uint32_t device_discard(const struct stat *st)
{
	char path[96];
	unsigned granularity = 0;
	/* A partition's queue is its disk's. */
	for (int i = 0; i < 2; i++) {
		snprintf(path, sizeof(path), "/sys/dev/block/%u:%u/%squeue/discard_granularity", major(st->st_rdev), minor(st->st_rdev), i ? "../" : "");
		FILE *file = fopen(path, "re");
		if (!file)
			continue;
		if (fscanf(file, "%u", &granularity) != 1)
			granularity = 0;
		fclose(file);
		break;
	}
	return granularity;
}

static int measure(struct file *f, struct block_node *n, const struct block_open *o, struct error *err)
{
	struct stat st;
	uint64_t size;
	if (fstat(f->fd, &st) < 0)
		return error_set(err, errno, "%s %s: cannot look at it: %s", o->option, o->name, strerror(errno));
	unsigned physical = st.st_blksize >= 512 && st.st_blksize <= 4096 && power_of_two((uint64_t)st.st_blksize) ? (unsigned)st.st_blksize : 4096;
	uint32_t granularity = physical;
	if (f->device) {
		if (ioctl(f->fd, BLKGETSIZE64, &size) < 0)
			return error_set(err, errno, "%s %s: the device does not tell its size: %s", o->option, o->name, strerror(errno));
		if (ioctl(f->fd, BLKPBSZGET, &physical) < 0 || !power_of_two(physical) || physical < 512)
			physical = 512;
		granularity = device_discard(&st);
	} else {
		size = (uint64_t)st.st_size;
	}
	if (!size)
		return error_set(err, EINVAL, "%s %s: the file is empty; give it a size, for example: truncate -s 8G %s", o->option, o->name, o->name);
	if (size % 512 && !o->read_only)
		log_warn("%s %s: its size is not a multiple of 512; the guest reads zeroes behind its end, and cannot write its last %" PRIu64 " bytes", o->option,
			 o->name, size % 512);
	f->bounce.size = size;
	f->bounce.fd = f->fd;
	n->info = (struct block_info){
		.size = (size + 511) / 512 * 512,
		.logical_block = f->bounce.align >= 4096 ? 4096 : 512,
		.physical_block = physical,
		.discard_granularity = o->read_only || !o->discard ? 0 : granularity,
		.read_only = o->read_only,
		.write_cache = !f->bounce.datasync && !o->read_only,
		.format = "raw",
	};
	return 0;
}

static void file_close(struct block_node *n)
{
	struct file *f = n->priv;
	if (!f)
		return;
	if (f->fd >= 0)
		close(f->fd);
	while (f->free) {
		struct transfer *t = f->free;
		f->free = t->next;
		free(t);
	}
	free(f);
	n->priv = NULL;
}

static int file_open(struct block_node *n, const struct block_open *o, struct error *err)
{
	struct file *f = calloc(1, sizeof(*f));
	if (!f)
		return error_set(err, ENOMEM, "out of memory for %s %s", o->option, o->name);
	n->priv = f;
	f->fd = -1;
	f->aio = o->aio;
	f->name = n->name;
	f->direct = o->cache == CACHE_NONE || o->cache == CACHE_DIRECTSYNC;
	f->unsafe = o->cache == CACHE_UNSAFE;
	f->guessed = !o->format && !o->read_only;
	f->memory_align = 1;
	f->bounce = (struct bounce){
		.fd = -1,
		.align = 1,
		.datasync = o->cache == CACHE_WRITETHROUGH || o->cache == CACHE_DIRECTSYNC,
		.guard = f->guessed,
	};
	int r = open_fd(f, o, err);
	if (!r && f->direct)
		r = direct_alignment(f, o, err);
	if (!r)
		r = measure(f, n, o, err);
	if (!r && o->lock)
		r = block_lock_image(f->fd, !o->read_only, o->name, o->option, err);
	if (r)
		file_close(n);
	return r;
}

const struct block_driver block_file = {
	.name = "raw",
	.open = file_open,
	.close = file_close,
	.submit = file_submit,
	.kick = file_kick,
	.pread = file_pread,
};
