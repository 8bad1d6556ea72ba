/*
 * The qcow2 driver: requests with the device lock held.
 *
 * What the tables in memory answer is done here: allocated clusters become aio jobs on the file, unallocated ones go to the backing node
 * or are zeroes. All else (an L2 slice that is not in memory, allocation, copy on write, compressed clusters, zeroing, flushes)
 * is work for a thread, which runs the synchronous operations of image.h. A request is split into pieces, which run side by side.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "block/aio.h"
#include "block/driver.h"
#include "block/qcow2/image.h"
#include "block/qcow2/node.h"

#define FEW 4u
#define PIECES 64u /* of a request at a time: one of 4 GiB on a disk in small parts must not take memory for all of them */

struct request;

struct piece {
	struct request *q;
	union {
		struct aio_job job;
		struct aio_work work;
		struct block_request sub; /* of the backing node */
	};
	struct qcow2_run run;
	uint64_t pos, len; /* in the request */
	unsigned epoch;
	bool entered;	 /* the epoch */
	const struct iovec *iov;
	unsigned niov;
	struct iovec *slice; /* to free; NULL: few, or the request's own */
	struct iovec few[FEW];
};

struct request {
	struct qcow2_node *s;
	struct block_request *r;
	uint64_t pos;	     /* what of it is in pieces */
	unsigned at;	     /* the iovec of pos */
	uint64_t at_offset;
	unsigned running;    /* pieces, and whoever is making them */
	int result;
	bool flushing;	     /* the last step of a write in cache=writethrough */
	bool first_used;
	struct piece first;  /* most requests need one only */
	struct request *next;
};

static void advance(struct request *q);
static void complete(struct request *q);

/* --- pieces --- */

static struct piece *new_piece(struct request *q, uint64_t len)
{
	struct piece *p = q->first_used ? malloc(sizeof(*p)) : &q->first;
	if (!p)
		return NULL;
	q->first_used = true;
	p->q = q;
	p->pos = q->pos;
	p->len = len;
	p->entered = false;
	p->slice = NULL;
	p->iov = NULL;
	p->niov = 0;
	q->running++;
	return p;
}

static bool has_more(const struct request *q)
{
	return !q->result && !q->flushing && (q->r->op == BLOCK_READ || q->r->op == BLOCK_WRITE) && q->pos < q->r->len;
}

static void drop(struct request *q)
{
	struct qcow2_node *s = q->s;
	bool went_on = false;
	while (!--q->running) {
		if (!has_more(q)) {
			complete(q);
			break;
		}
		q->running = 1;
		advance(q);
		went_on = true;
	}
	/* Whoever ended the last piece (aio, the backing node) does not start those of the other. */
	if (went_on)
		qcow2_node_kick(s->node);
}

static void end_piece(struct piece *p, int result)
{
	struct request *q = p->q;
	if (p->entered)
		qcow2_leave(q->s->image, p->epoch);
	free(p->slice);
	if (p != &q->first)
		free(p);
	else
		q->first_used = false;
	if (result && !q->result)
		q->result = result;
	drop(q);
}

/* The next p->len bytes of the request's memory. */
static int take_memory(struct piece *p)
{
	struct request *q = p->q;
	const struct block_request *r = q->r;
	if (!p->pos && p->len == r->len) {
		p->iov = r->iov;
		p->niov = r->niov;
		q->pos = r->len;
		return 0;
	}
	/* How many vectors: the first and the last may be parts. */
	uint64_t left = p->len + q->at_offset;
	unsigned n = 0;
	while (q->at + n < r->niov && left) {
		uint64_t m = r->iov[q->at + n].iov_len;
		left -= m < left ? m : left;
		n++;
	}
	struct iovec *v = p->few;
	if (n > FEW) {
		v = p->slice = malloc(n * sizeof(*v));
		if (!v)
			return -ENOMEM;
	}
	p->iov = v;
	p->niov = qcow2_iov_slice(v, r->iov + q->at, n, q->at_offset, p->len);
	q->pos += p->len;
	q->at_offset += p->len;
	while (q->at < r->niov && q->at_offset >= r->iov[q->at].iov_len)
		q->at_offset -= r->iov[q->at++].iov_len;
	return 0;
}

static void job_done(struct aio_job *j, int result)
{
	end_piece(j->opaque, result);
}

static void start_job(struct piece *p, enum aio_op op)
{
	struct qcow2 *image = p->q->s->image;
	int fd = qcow2_data_fd(image, p->iov, p->niov, p->run.host, p->len);
	p->job = (struct aio_job){
		.op = op,
		.fd = fd,
		.offset = p->run.host,
		.len = p->len,
		.iov = p->iov,
		.niov = p->niov,
		.flags = fd == image->fd ? AIO_CACHED : 0,
		.done = job_done,
		.opaque = p,
	};
	aio_submit(p->q->s->aio, &p->job);
}

static void work_done(struct aio_work *w, int result)
{
	end_piece(w->opaque, result);
}

static void start_work(struct piece *p, int (*run)(struct aio_work *w), void (*done)(struct aio_work *w, int result))
{
	p->work = (struct aio_work){ .run = run, .done = done, .opaque = p };
	aio_work_submit(p->q->s->aio, &p->work);
}

static void fail(struct request *q, int result)
{
	if (!q->result)
		q->result = result;
}

/* --- reading --- */

static int run_compressed(struct aio_work *w)
{
	struct piece *p = w->opaque;
	struct qcow2 *image = p->q->s->image;
	uint64_t offset = p->q->r->offset + p->pos;
	return qcow2_read_compressed(image, &p->run.e, p->iov, p->niov, offset & (image->f.cluster_size - 1), p->len);
}

static void backing_done(struct block_request *sub, int result)
{
	end_piece(sub->opaque, result);
}

static void start_backing(struct piece *p)
{
	struct qcow2_node *s = p->q->s;
	p->sub = (struct block_request){
		.op = BLOCK_READ,
		.offset = p->q->r->offset + p->pos,
		.len = p->len,
		.iov = p->iov,
		.niov = p->niov,
		.done = backing_done,
		.opaque = p,
	};
	s->kick_backing = true;
	s->node->backing->driver->submit(s->node->backing, &p->sub);
}

/* The next run->len bytes, which lie as `run` says. The epoch was entered. */
static void read_run(struct request *q, const struct qcow2_run *run, unsigned epoch)
{
	struct qcow2_node *s = q->s;
	uint64_t offset = q->r->offset + q->pos, len = run->len;
	const struct block_node *backing = s->node->backing;
	bool zeroes = run->e.kind == QCOW2_KIND_ZERO;
	if (run->e.kind == QCOW2_KIND_UNALLOCATED) {
		zeroes = !backing || offset >= backing->info.size;
		if (!zeroes && len > backing->info.size - offset)
			len = backing->info.size - offset;
	}
	struct piece *p = run->e.kind == QCOW2_KIND_BAD ? NULL : new_piece(q, len);
	if (!p) {
		qcow2_leave(s->image, epoch);
		fail(q, run->e.kind == QCOW2_KIND_BAD
				? qcow2_corrupt(s->image, false, "the entry for the guest's offset 0x%llx is wrong", (unsigned long long)offset)
				: -ENOMEM);
		return;
	}
	p->run = *run;
	p->epoch = epoch;
	p->entered = true;
	int r = take_memory(p);
	if (r) {
		end_piece(p, r);
	} else if (zeroes) {
		qcow2_iov_fill(p->iov, p->niov, 0, NULL, len);
		end_piece(p, 0);
	} else if (run->e.kind == QCOW2_KIND_UNALLOCATED) {
		start_backing(p);
	} else if (run->e.kind == QCOW2_KIND_COMPRESSED) {
		start_work(p, run_compressed, work_done);
	} else {
		start_job(p, AIO_READ);
	}
}

static int run_map(struct aio_work *w)
{
	struct piece *p = w->opaque;
	struct qcow2 *image = p->q->s->image;
	pthread_mutex_lock(&image->lock);
	int r = qcow2_map(image, p->q->r->offset + p->pos, p->len, false, &p->run);
	if (!r) {
		p->epoch = qcow2_enter(image);
		p->entered = true;
	}
	pthread_mutex_unlock(&image->lock);
	return r;
}

static void map_done(struct aio_work *w, int result)
{
	struct piece *p = w->opaque;
	struct request *q = p->q;
	struct qcow2_run run = p->run;
	unsigned epoch = p->epoch;
	q->running++;
	p->entered = false; /* goes on to the piece that reads */
	end_piece(p, result);
	if (!result) {
		read_run(q, &run, epoch);
		advance(q);
	}
	struct qcow2_node *s = q->s;
	drop(q);
	/* What this started below is not started by aio. */
	if (s->kick_backing)
		qcow2_node_kick(s->node);
}

static void read_more(struct request *q)
{
	struct qcow2 *image = q->s->image;
	while (has_more(q) && q->running <= PIECES) {
		struct qcow2_run run;
		unsigned epoch = 0;
		pthread_mutex_lock(&image->map_lock);
		bool known = qcow2_lookup(image, q->r->offset + q->pos, q->r->len - q->pos, false, &run);
		if (known)
			epoch = qcow2_enter(image);
		pthread_mutex_unlock(&image->map_lock);
		if (known) {
			read_run(q, &run, epoch);
			continue;
		}
		struct piece *p = new_piece(q, q->r->len - q->pos);
		if (p)
			start_work(p, run_map, map_done);
		else
			fail(q, -ENOMEM);
		return;
	}
}

/* --- writing --- */

static int run_write(struct aio_work *w)
{
	struct piece *p = w->opaque;
	return qcow2_write(p->q->s->image, p->iov, p->niov, p->q->r->offset + p->pos, p->len);
}

static void write_more(struct request *q)
{
	struct qcow2 *image = q->s->image;
	while (has_more(q) && q->running <= PIECES) {
		struct qcow2_run run;
		unsigned epoch = 0;
		uint64_t len = q->r->len - q->pos;
		pthread_mutex_lock(&image->map_lock);
		bool now = !atomic_load_explicit(&image->corrupt, memory_order_relaxed) && qcow2_lookup(image, q->r->offset + q->pos, len, true, &run) &&
			   run.e.kind == QCOW2_KIND_NORMAL && run.e.copied;
		if (now)
			epoch = qcow2_enter(image);
		pthread_mutex_unlock(&image->map_lock);
		struct piece *p = new_piece(q, now ? run.len : len);
		if (p && now) {
			p->run = run;
			p->epoch = epoch;
			p->entered = true;
		} else if (now) {
			qcow2_leave(image, epoch);
		}
		int r = p ? take_memory(p) : -ENOMEM;
		if (r && p)
			end_piece(p, r);
		else if (r)
			fail(q, r);
		else if (now)
			start_job(p, AIO_WRITE);
		else
			start_work(p, run_write, work_done);
	}
}

/* --- the rest --- */

static int run_other(struct aio_work *w)
{
	struct piece *p = w->opaque;
	struct qcow2 *image = p->q->s->image;
	const struct block_request *r = p->q->r;
	if (p->q->flushing || r->op == BLOCK_FLUSH)
		return qcow2_flush(image);
	if (r->op == BLOCK_DISCARD)
		return qcow2_discard(image, r->offset, r->len);
	return qcow2_write_zeroes(image, r->offset, r->len, r->flags & BLOCK_MAY_UNMAP);
}

static void start_other(struct request *q)
{
	struct piece *p = new_piece(q, q->r->len);
	if (p)
		start_work(p, run_other, work_done);
	else
		fail(q, -ENOMEM);
}

static void advance(struct request *q)
{
	switch (q->r->op) {
	case BLOCK_READ:
		read_more(q);
		break;
	case BLOCK_WRITE:
		write_more(q);
		break;
	case BLOCK_FLUSH:
	case BLOCK_DISCARD:
	case BLOCK_WRITE_ZEROES:
		start_other(q);
		break;
	}
}

static void deliver(struct request *q)
{
	struct qcow2_node *s = q->s;
	struct block_request *r = q->r;
	int result = q->result;
	q->next = s->free;
	s->free = q;
	r->done(r, result);
}

static void complete(struct request *q)
{
	struct qcow2_node *s = q->s;
	bool changes = q->r->op == BLOCK_WRITE || q->r->op == BLOCK_WRITE_ZEROES || q->r->op == BLOCK_DISCARD;
	if (s->through && changes && !q->result && !q->flushing) {
		q->flushing = true;
		q->running = 1;
		start_other(q);
		drop(q);
		return;
	}
	if (!s->submitting) {
		deliver(q);
		return;
	}
	/* Not from inside submit. */
	q->next = NULL;
	if (s->last_done)
		s->last_done->next = q;
	else
		s->first_done = q;
	s->last_done = q;
}

static void submit(struct block_node *n, struct block_request *r)
{
	struct qcow2_node *s = n->priv;
	struct request *q = s->free;
	s->submitting++;
	if (q)
		s->free = q->next;
	else
		q = malloc(sizeof(*q));
	if (!q) {
		/* One that is always there; the requests that it fails are in a list. */
		r->next = s->no_memory;
		s->no_memory = r;
	} else {
		q->s = s;
		q->r = r;
		q->pos = q->at_offset = 0;
		q->at = 0;
		q->running = 1;
		q->result = 0;
		q->flushing = q->first_used = false;
		advance(q);
		drop(q);
	}
	s->submitting--;
}

void qcow2_node_kick(struct block_node *n)
{
	struct qcow2_node *s = n->priv;
	if (s->kicking) {
		s->again = true;
		return;
	}
	s->kicking = true;
	do {
		s->again = false;
		if (n->backing && n->backing->driver->kick) {
			s->kick_backing = false;
			n->backing->driver->kick(n->backing);
		}
		aio_kick(s->aio);
		struct request *q;
		while ((q = s->first_done)) {
			s->first_done = q->next;
			if (!s->first_done)
				s->last_done = NULL;
			deliver(q);
		}
		struct block_request *r;
		while ((r = s->no_memory)) {
			s->no_memory = r->next;
			r->done(r, -ENOMEM);
		}
	} while (s->again || s->first_done || s->kick_backing);
	s->kicking = false;
}

void qcow2_node_free_requests(struct qcow2_node *s)
{
	while (s->free) {
		struct request *q = s->free;
		s->free = q->next;
		free(q);
	}
}

static int node_pread(struct block_node *n, void *buf, uint64_t len, uint64_t offset)
{
	struct qcow2_node *s = n->priv;
	struct iovec iov = { buf, len };
	return qcow2_read(s->image, &iov, 1, offset, len);
}

const struct block_driver block_qcow2 = {
	.name = "qcow2",
	.open = qcow2_node_open,
	.close = qcow2_node_close,
	.submit = submit,
	.kick = qcow2_node_kick,
	.pread = node_pread,
};
