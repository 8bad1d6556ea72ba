/*
 * A pool of threads for jobs and work. What it keeps is under its own lock, taken inside the device lock and around nothing; the
 * workers hold no lock while they work.
 */
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

#include "block/aio_internal.h"

/* More would not help a disk, and each may hold a buffer. */
#define MAX_THREADS 16
#define STACK_SIZE (256u << 10) /* decompressors are content with 64K */

struct work_list {
	struct aio_work *first, *last;
};

struct aio_pool {
	int event_fd;
	atomic_uint nfinished; /* of both lists: to look without the lock */
	pthread_mutex_t lock;
	pthread_cond_t wake;
	/* all [lock] */
	struct aio_jobs jobs, finished;
	struct work_list work, worked;
	unsigned queued, idle, nthreads;
	bool stop, prefer_work;
	pthread_t thread[MAX_THREADS];
};

static void work_add(struct work_list *l, struct aio_work *w)
{
	w->next = NULL;
	if (l->last)
		l->last->next = w;
	else
		l->first = w;
	l->last = w;
}

static struct aio_work *work_take(struct work_list *l)
{
	struct aio_work *w = l->first;
	if (w) {
		l->first = w->next;
		if (!l->first)
			l->last = NULL;
	}
	return w;
}

static int run_job(struct aio_job *j)
{
	int r;
	do
		r = aio_advance(j, aio_step(j, false));
	while (r == AIO_AGAIN);
	return r;
}

/* [lock] There is one more in the lists. Whoever empties them takes all: only the first need be announced. */
static void finished(struct aio_pool *p)
{
	if (atomic_fetch_add(&p->nfinished, 1))
		return;
	uint64_t one = 1;
	ssize_t n = write(p->event_fd, &one, sizeof(one));
	(void)n; /* EAGAIN: it is signalled */
}

static void *worker(void *opaque)
{
	struct aio_pool *p = opaque;
	pthread_mutex_lock(&p->lock);
	for (;;) {
		while (!p->queued && !p->stop) {
			p->idle++;
			pthread_cond_wait(&p->wake, &p->lock);
			p->idle--;
		}
		if (!p->queued)
			break;
		p->queued--;
		/* In turn, so that neither starves the other. */
		struct aio_work *w = p->prefer_work || !p->jobs.first ? work_take(&p->work) : NULL;
		struct aio_job *j = w ? NULL : aio_jobs_take(&p->jobs);
		p->prefer_work = !w;
		pthread_mutex_unlock(&p->lock);

		if (w)
			w->result = w->run(w);
		else
			j->result = run_job(j);

		pthread_mutex_lock(&p->lock);
		if (w)
			work_add(&p->worked, w);
		else
			aio_jobs_add(&p->finished, j);
		finished(p);
	}
	pthread_mutex_unlock(&p->lock);
	return NULL;
}

int aio_pool_create(struct aio_pool **out, int event_fd)
{
	struct aio_pool *p = calloc(1, sizeof(*p));
	if (!p)
		return -ENOMEM;
	p->event_fd = event_fd;
	pthread_mutex_init(&p->lock, NULL);
	pthread_cond_init(&p->wake, NULL);
	*out = p;
	return 0;
}

void aio_pool_destroy(struct aio_pool *p)
{
	if (!p)
		return;
	pthread_mutex_lock(&p->lock);
	p->stop = true;
	pthread_cond_broadcast(&p->wake);
	pthread_mutex_unlock(&p->lock);
	for (unsigned i = 0; i < p->nthreads; i++)
		pthread_join(p->thread[i], NULL);
	pthread_cond_destroy(&p->wake);
	pthread_mutex_destroy(&p->lock);
	free(p);
}

/* [lock] */
static bool spawn(struct aio_pool *p)
{
	sigset_t all, old;
	pthread_attr_t attr;
	pthread_attr_init(&attr);
	pthread_attr_setstacksize(&attr, STACK_SIZE);
	/* Signals are the main thread's and the vCPUs'. */
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	int r = pthread_create(&p->thread[p->nthreads], &attr, worker, p);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	pthread_attr_destroy(&attr);
	if (r)
		return false;
	pthread_setname_np(p->thread[p->nthreads++], "aio");
	return true;
}

/* [lock] There is one more thing in the queue. False: and nobody who will ever do it. */
static bool more(struct aio_pool *p)
{
	p->queued++;
	if (p->idle >= p->queued)
		pthread_cond_signal(&p->wake);
	else if (p->nthreads < MAX_THREADS && !spawn(p) && !p->nthreads)
		return false;
	else if (p->idle)
		pthread_cond_signal(&p->wake);
	return true;
}

void aio_pool_start(struct aio_pool *p, struct aio_jobs *l)
{
	struct aio_job *j;
	pthread_mutex_lock(&p->lock);
	while ((j = aio_jobs_take(l))) {
		aio_jobs_add(&p->jobs, j);
		if (!more(p)) {
			/* Not a single thread can be had: the queue was empty, so this is its only job. Slow is better than never. */
			p->queued--;
			aio_jobs_take(&p->jobs);
			j->result = run_job(j);
			aio_jobs_add(&p->finished, j);
			finished(p);
		}
	}
	pthread_mutex_unlock(&p->lock);
}

void aio_pool_work(struct aio_pool *p, struct aio_work *w)
{
	pthread_mutex_lock(&p->lock);
	work_add(&p->work, w);
	if (!more(p)) {
		p->queued--;
		work_take(&p->work);
		w->result = w->run(w);
		work_add(&p->worked, w);
		finished(p);
	}
	pthread_mutex_unlock(&p->lock);
}

struct aio_job *aio_pool_finished(struct aio_pool *p)
{
	if (!atomic_load(&p->nfinished))
		return NULL;
	pthread_mutex_lock(&p->lock);
	struct aio_job *j = aio_jobs_take(&p->finished);
	if (j)
		atomic_fetch_sub(&p->nfinished, 1);
	pthread_mutex_unlock(&p->lock);
	return j;
}

struct aio_work *aio_pool_worked(struct aio_pool *p)
{
	if (!atomic_load(&p->nfinished))
		return NULL;
	pthread_mutex_lock(&p->lock);
	struct aio_work *w = work_take(&p->worked);
	if (w)
		atomic_fetch_sub(&p->nfinished, 1);
	pthread_mutex_unlock(&p->lock);
	return w;
}
