#include "block/aio.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "base/error.h"
#include "block/aio_internal.h"
#include "vm/loop.h"

/* Reads no longer than this are tried at once: the copy costs less than handing it to a thread, and holds the device lock no longer
 * than a few exits do. */
#define NOW_MAX (64u << 10)

struct aio {
	struct loop *loop;
	int event_fd;		 /* signalled by whatever completes while nobody looks */
	struct aio_uring *uring; /* NULL: threads */
	bool mixed;		 /* the choice is ours: see is_threads */
	struct aio_pool *pool;
	struct aio_jobs submitted;
	struct aio_jobs now;	 /* complete without an engine */
	unsigned in_flight;	 /* jobs and work whose `done` was not called yet */
	uint64_t delivered;
	bool running, again;
};

/* --- one job --- */

unsigned aio_piece(const struct aio_job *j, struct iovec *one, const struct iovec **iov)
{
	uint64_t skip = j->progress;
	unsigned i = 0;
	while (i < j->niov && skip >= j->iov[i].iov_len)
		skip -= j->iov[i++].iov_len;
	if (i == j->niov)
		return 0;
	if (skip) {
		*one = (struct iovec){ .iov_base = (char *)j->iov[i].iov_base + skip, .iov_len = j->iov[i].iov_len - skip };
		*iov = one;
		return 1;
	}
	*iov = j->iov + i;
	return j->niov - i < IOV_MAX ? j->niov - i : IOV_MAX;
}

static void zero_rest(const struct aio_job *j)
{
	uint64_t skip = j->progress;
	for (unsigned i = 0; i < j->niov; i++) {
		if (skip >= j->iov[i].iov_len) {
			skip -= j->iov[i].iov_len;
			continue;
		}
		memset((char *)j->iov[i].iov_base + skip, 0, j->iov[i].iov_len - skip);
		skip = 0;
	}
}

int aio_advance(struct aio_job *j, int64_t result)
{
	if (result == -EINTR || result == -EAGAIN || result == -ECANCELED) {
		/* io_uring cancels what a thread submitted that ends: a vCPU's, at a reboot. */
		if (++j->tries < 100)
			return AIO_AGAIN;
		return result == -ECANCELED ? -EIO : (int)result;
	}
	if (result < 0)
		return (int)result;
	if (j->op != AIO_READ && j->op != AIO_WRITE)
		return 0;
	if (!result) {
		if (j->op == AIO_WRITE)
			return -EIO; /* POSIX lets write say so of nothing else */
		zero_rest(j);
		return 0;
	}
	j->progress += (uint64_t)result;
	if (j->progress >= j->len)
		return 0;
	/* Without the page cache, only the end of the file cuts a sector; and going on from there would be refused (O_DIRECT). */
	if (j->op == AIO_READ && !(j->flags & AIO_CACHED) && (j->offset + j->progress) % 512) {
		zero_rest(j);
		return 0;
	}
	return AIO_AGAIN;
}

int64_t aio_step(const struct aio_job *j, bool now)
{
	struct iovec one;
	const struct iovec *iov = NULL;
	int64_t r = 0;
	off_t at = (off_t)(j->offset + j->progress);
	switch (j->op) {
	case AIO_READ:
	case AIO_WRITE: {
		int n = (int)aio_piece(j, &one, &iov);
		int flags = (now ? RWF_NOWAIT : 0) | (j->op == AIO_WRITE && j->flags & AIO_DATASYNC ? RWF_DSYNC : 0);
		r = j->op == AIO_READ ? preadv2(j->fd, iov, n, at, flags) : pwritev2(j->fd, iov, n, at, flags);
		break;
	}
	case AIO_FSYNC:
		r = fdatasync(j->fd);
		break;
	case AIO_DISCARD:
		r = fallocate(j->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at, (off_t)j->len);
		break;
	case AIO_ZERO:
		r = fallocate(j->fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, at, (off_t)j->len);
		break;
	}
	return r < 0 ? -errno : r;
}

int aio_run(struct aio_job *j)
{
	int r;
	do
		r = aio_advance(j, aio_step(j, false));
	while (r == AIO_AGAIN);
	return r;
}

/* --- the engines together --- */

static void on_event(void *opaque, uint32_t revents)
{
	(void)revents;
	struct aio *a = opaque;
	uint64_t count;
	ssize_t n = read(a->event_fd, &count, sizeof(count));
	(void)n;
	aio_kick(a);
}

int aio_create(struct aio **out, enum aio_engine engine, struct loop *loop, struct error *err)
{
	struct aio *a = calloc(1, sizeof(*a));
	if (!a)
		return error_set(err, ENOMEM, "out of memory for asynchronous I/O");
	a->loop = loop;
	a->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	int r = a->event_fd < 0 ? -errno : aio_pool_create(&a->pool, a->event_fd);
	if (!r)
		r = loop_add_fd(loop, a->event_fd, EPOLLIN, on_event, a);
	if (r) {
		error_set(err, -r, "cannot set up asynchronous I/O: %s", strerror(-r));
		goto fail;
	}
	if (engine != AIO_THREADS) {
		r = aio_uring_create(&a->uring, a->event_fd);
		if (r && engine == AIO_URING) {
			error_set(err, -r, "aio=io_uring: this host does not permit it (%s); use aio=threads or aio=auto", strerror(-r));
			goto fail;
		}
		a->mixed = a->uring && engine == AIO_AUTO;
	}
	*out = a;
	return 0;
fail:
	aio_destroy(a);
	return r;
}

void aio_destroy(struct aio *a)
{
	if (!a)
		return;
	loop_del_fd(a->loop, a->event_fd);
	aio_uring_destroy(a->uring);
	aio_pool_destroy(a->pool);
	if (a->event_fd >= 0)
		close(a->event_fd);
	free(a);
}

const char *aio_name(const struct aio *a)
{
	return a->uring ? "io_uring" : "threads";
}

void aio_submit(struct aio *a, struct aio_job *j)
{
	j->progress = 0;
	j->tries = 0;
	a->in_flight++;
	aio_jobs_add(&a->submitted, j);
}

void aio_work_submit(struct aio *a, struct aio_work *w)
{
	a->in_flight++;
	aio_pool_work(a->pool, w);
}

static void finish(struct aio *a, struct aio_job *j)
{
	a->in_flight--;
	a->delivered++;
	j->done(j, j->result);
}

/* Without io_uring: what the page cache has is here sooner than a thread would wake up. */
static void start_threads(struct aio *a)
{
	struct aio_jobs rest = { 0 };
	struct aio_job *j;
	while ((j = aio_jobs_take(&a->submitted))) {
		if (j->op == AIO_READ && j->flags & AIO_CACHED && j->len <= NOW_MAX && !j->progress) {
			j->result = aio_advance(j, aio_step(j, true));
			if (j->result != AIO_AGAIN && j->result != -EOPNOTSUPP) {
				aio_jobs_add(&a->now, j);
				continue;
			}
		}
		aio_jobs_add(&rest, j);
	}
	if (rest.first)
		aio_pool_start(a->pool, &rest);
}

/* What the page cache takes or gives is mostly copying, and io_uring copies here, under the device lock; or, where a file system cannot
 * tell at once whether a write would wait (ext4), in one kernel thread, one after the other. Only small reads are better off there. */
static bool is_threads(const struct aio_job *j)
{
	return j->flags & AIO_CACHED && (j->op == AIO_WRITE || (j->op == AIO_READ && j->len > NOW_MAX));
}

static void start_mixed(struct aio *a)
{
	struct aio_jobs threads = { 0 }, rest = { 0 };
	struct aio_job *j;
	while ((j = aio_jobs_take(&a->submitted)))
		aio_jobs_add(is_threads(j) ? &threads : &rest, j);
	a->submitted = rest;
	if (threads.first)
		aio_pool_start(a->pool, &threads);
}

static void start(struct aio *a)
{
	if (!a->uring && a->submitted.first)
		start_threads(a);
	if (a->mixed && a->submitted.first)
		start_mixed(a);
	if (a->uring)
		aio_uring_start(a->uring, &a->submitted);
}

static void deliver(struct aio *a)
{
	struct aio_job *j;
	struct aio_work *w;
	while ((j = aio_jobs_take(&a->now)))
		finish(a, j);
	if (a->uring) {
		while ((j = aio_uring_finished(a->uring, &a->submitted)))
			finish(a, j);
	}
	while ((j = aio_pool_finished(a->pool)))
		finish(a, j);
	while ((w = aio_pool_worked(a->pool))) {
		a->in_flight--;
		a->delivered++;
		w->done(w, w->result);
	}
}

void aio_kick(struct aio *a)
{
	if (a->running) {
		a->again = true;
		return;
	}
	a->running = true;
	uint64_t before;
	if (a->uring)
		aio_uring_signal(a->uring, false);
	do {
		/* As long as something comes of it: what callbacks submit and what goes on is started, and what is complete by then is not left to
		 * the loop. */
		do {
			before = a->delivered;
			a->again = false;
			start(a);
			deliver(a);
		} while (a->delivered != before || a->again || (a->submitted.first && a->uring && aio_uring_room(a->uring)));
		if (a->uring)
			aio_uring_signal(a->uring, true);
	} while (a->uring && aio_uring_ready(a->uring));
	a->running = false;
}

unsigned aio_wait(struct aio *a)
{
	uint64_t before = a->delivered;
	aio_kick(a);
	while (a->in_flight && a->delivered == before) {
		struct pollfd p = { .fd = a->event_fd, .events = POLLIN };
		if (poll(&p, 1, -1) > 0)
			on_event(a, 0);
	}
	return a->in_flight;
}

unsigned aio_busy(const struct aio *a)
{
	return a->in_flight;
}
