/*
 * Asynchronous file I/O and work on other threads: io_uring where it is permitted, else a pool of threads.
 *
 * One a struct block, shared by its chain. All calls with the device lock held; `done` too (from the loop when the engine's eventfd fires, or from inside
 * aio_kick). Jobs are their submitter's until `done`. `run` of a work item is called on a pool thread with no lock
 * held, and may use the fd calls of its own module only.
 */
#ifndef TRAPLINE_BLOCK_AIO_H
#define TRAPLINE_BLOCK_AIO_H

#include <stdint.h>
#include <sys/uio.h>

struct aio;
struct error;
struct loop;

enum aio_engine { AIO_AUTO, AIO_URING, AIO_THREADS };

enum aio_op { AIO_READ, AIO_WRITE, AIO_FSYNC, AIO_DISCARD, AIO_ZERO }; /* ZERO and DISCARD: fallocate; where it is not supported -EOPNOTSUPP */

struct aio_job {
	enum aio_op op;
	int fd;
	uint64_t offset, len; /* bytes */
	const struct iovec *iov;
	unsigned niov; /* any number: cut into IOV_MAX pieces inside */
	unsigned flags;
	/* 0 or -errno. Short reads at the end of the file are filled with zeroes, other short transfers continued: all or an error. */
	void (*done)(struct aio_job *j, int result);
	void *opaque;
	/* The engine's own: */
	struct aio_job *next;
	uint64_t progress;
	int result;
	unsigned char tries;
};
#define AIO_DATASYNC 1u /* of WRITE: RWF_DSYNC */
#define AIO_CACHED 2u	/* fd goes through the page cache: what is there already may be copied at once, in aio_kick */

struct aio_work {
	int (*run)(struct aio_work *w);		       /* pool thread */
	void (*done)(struct aio_work *w, int result); /* device lock held */
	void *opaque;
	struct aio_work *next;
	int result;
};

/* -ENOSYS/-EPERM with a sentence if AIO_URING is asked for and the host refuses it; AIO_AUTO falls back to threads. */
int aio_create(struct aio **out, enum aio_engine engine, struct loop *loop, struct error *err);
/* Nothing may be in flight. */
void aio_destroy(struct aio *a);
const char *aio_name(const struct aio *a); /* "io_uring" or "threads" */

/* Do all of a job here and now (a new one: the engine's fields are zero); `done` is not called. For worker threads and for opening: needs no engine
 * and no lock. 0 or -errno. */
int aio_run(struct aio_job *j);

void aio_submit(struct aio *a, struct aio_job *j);
void aio_work_submit(struct aio *a, struct aio_work *w);
/* Start what was submitted; call `done` of everything that is complete. Callbacks may submit more; aio_kick from a callback is noted, and
 * done by the outer one. */
void aio_kick(struct aio *a);
/* Wait until at least one thing that is in flight completes, and deliver it: for closing. Returns how many are left. */
unsigned aio_wait(struct aio *a);
/* How many jobs and pieces of work are in flight. */
unsigned aio_busy(const struct aio *a);

#endif
