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
/* Of them write to the page cache at a time: most file systems let one writer into a file, and the others would spin for its lock. */
#define MAX_WRITERS 2
#define BATCH 16
#define BATCH_BYTES (128u << 10)
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
	struct aio_jobs jobs, writes, finished;
	struct work_list work, worked;
	unsigned writers, new_writers; /* who empty `writes`; of them, those that no thread is yet */
	unsigned queued, idle, nthreads; /* queued: jobs, work and new writers */
	bool stop;
	unsigned turn;
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

/* [lock] There is one more in the lists. Whoever empties them takes all: only the first need be announced. */
static void finished(struct aio_pool *p)
{
	if (atomic_fetch_add(&p->nfinished, 1))
		return;
	uint64_t one = 1;
	ssize_t n = write(p->event_fd, &one, sizeof(one));
	(void)n; /* EAGAIN: it is signalled */
}

/* [lock], not while it runs */
static void do_job(struct aio_pool *p, struct aio_job *j)
{
	pthread_mutex_unlock(&p->lock);
	j->result = aio_run(j);
	pthread_mutex_lock(&p->lock);
	aio_jobs_add(&p->finished, j);
	finished(p);
}

static void do_work(struct aio_pool *p, struct aio_work *w)
{
	pthread_mutex_unlock(&p->lock);
	w->result = w->run(w);
	pthread_mutex_lock(&p->lock);
	work_add(&p->worked, w);
	finished(p);
}

/* [lock], not while they run. Several small writes at once, announced as one: a wake-up costs more than a write does. */
static bool do_writes(struct aio_pool *p)
{
	struct aio_jobs batch = { 0 };
	struct aio_job *j;
	uint64_t bytes = 0;
	for (unsigned n = 0; n < BATCH && bytes < BATCH_BYTES && (j = aio_jobs_take(&p->writes)); n++) {
		bytes += j->len;
		aio_jobs_add(&batch, j);
	}
	if (!batch.first)
		return false;
	pthread_mutex_unlock(&p->lock);
	for (j = batch.first; j; j = j->next)
		j->result = aio_run(j);
	pthread_mutex_lock(&p->lock);
	while ((j = aio_jobs_take(&batch))) {
		aio_jobs_add(&p->finished, j);
		finished(p);
	}
	return true;
}

/* [lock] One thing of the queue. In turn, so that no sort starves another. */
static void serve(struct aio_pool *p)
{
	p->queued--;
	for (;; p->turn++) {
		struct aio_job *j;
		struct aio_work *w;
		switch (p->turn % 3) {
		case 0:
			if (!(j = aio_jobs_take(&p->jobs)))
				continue;
			do_job(p, j);
			break;
		case 1:
			if (!(w = work_take(&p->work)))
				continue;
			do_work(p, w);
			break;
		case 2:
			if (!p->new_writers)
				continue;
			p->new_writers--;
			while (do_writes(p))
				;
			p->writers--;
			break;
		}
		p->turn++;
		return;
	}
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
		serve(p);
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

/* [lock] There is one more thing in the queue. */
static void more(struct aio_pool *p)
{
	p->queued++;
	if (p->idle < p->queued && p->nthreads < MAX_THREADS && !spawn(p) && !p->nthreads) {
		/* Not a single thread can be had: slow is better than never. */
		while (p->queued)
			serve(p);
		return;
	}
	if (p->idle)
		pthread_cond_signal(&p->wake);
}

void aio_pool_start(struct aio_pool *p, struct aio_jobs *l)
{
	struct aio_job *j;
	pthread_mutex_lock(&p->lock);
	while ((j = aio_jobs_take(l))) {
		if (j->op != AIO_WRITE || !(j->flags & AIO_CACHED)) {
			aio_jobs_add(&p->jobs, j);
			more(p);
			continue;
		}
		aio_jobs_add(&p->writes, j);
		/* One more writer for every few that wait. */
		if (p->writers < MAX_WRITERS && !p->new_writers) {
			p->writers++;
			p->new_writers++;
			more(p);
		}
	}
	pthread_mutex_unlock(&p->lock);
}

void aio_pool_work(struct aio_pool *p, struct aio_work *w)
{
	pthread_mutex_lock(&p->lock);
	work_add(&p->work, w);
	more(p);
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
