/*
 * Between the parts of block/aio: the front (aio.c), the io_uring engine (aio_uring.c) and the pool of threads (aio_pool.c).
 *
 * An engine starts jobs and hands back those that are complete; a job that is only half done comes back from
 * aio_advance as "go on". All with the device lock held, except what aio_pool.c says of its workers.
 */
#ifndef TRAPLINE_BLOCK_AIO_INTERNAL_H
#define TRAPLINE_BLOCK_AIO_INTERNAL_H

#include <stdbool.h>
#include <stddef.h>

#include "block/aio.h"

/* What one system call is given: the vectors from j->progress on, at most IOV_MAX of them. `one` has room for a part of a vector. */
unsigned aio_piece(const struct aio_job *j, struct iovec *one, const struct iovec **iov);

#define AIO_AGAIN 1
/* The last system call for j returned `result` (bytes or -errno): 0 or -errno if that ends it, AIO_AGAIN if it goes on. */
int aio_advance(struct aio_job *j, int64_t result);

/* Do one step of j with plain system calls; what aio_advance takes. `now`: only if it need not wait, else -EAGAIN. */
int64_t aio_step(const struct aio_job *j, bool now);

/* --- a list of jobs, first in first out --- */

struct aio_jobs {
	struct aio_job *first, *last;
};

static inline void aio_jobs_add(struct aio_jobs *l, struct aio_job *j)
{
	j->next = NULL;
	if (l->last)
		l->last->next = j;
	else
		l->first = j;
	l->last = j;
}

static inline struct aio_job *aio_jobs_take(struct aio_jobs *l)
{
	struct aio_job *j = l->first;
	if (j) {
		l->first = j->next;
		if (!l->first)
			l->last = NULL;
	}
	return j;
}

/* --- io_uring --- */

struct aio_uring;

/* -ENOSYS, -EPERM, -ENOMEM, ...: the host does not let us. */
int aio_uring_create(struct aio_uring **out, int event_fd);
void aio_uring_destroy(struct aio_uring *u);
/* Start jobs from the head of `l` until it is empty or there is no room. */
void aio_uring_start(struct aio_uring *u, struct aio_jobs *l);
bool aio_uring_room(const struct aio_uring *u);
/* One job that needs no more (its result in ->result), or NULL. What must go on is added to `l`. */
struct aio_job *aio_uring_finished(struct aio_uring *u, struct aio_jobs *l);
/* Shall a completion signal the eventfd? Off while the caller is looking anyway. */
void aio_uring_signal(struct aio_uring *u, bool on);
bool aio_uring_ready(struct aio_uring *u);

/* --- the pool --- */

struct aio_pool;

/* Its threads start when there is work, and live until aio_pool_destroy. Completions signal event_fd. */
int aio_pool_create(struct aio_pool **out, int event_fd);
void aio_pool_destroy(struct aio_pool *p);
void aio_pool_start(struct aio_pool *p, struct aio_jobs *l);
void aio_pool_work(struct aio_pool *p, struct aio_work *w);
struct aio_job *aio_pool_finished(struct aio_pool *p);
struct aio_work *aio_pool_worked(struct aio_pool *p);

#endif
