/* The synchronous operations: what a worker thread does. Lock rules and order on disk: image.h. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "block/qcow2/image.h"

#define GROUP_BYTES (8ull << 20) /* allocated and written at once, at most */
#define FEW 16u

/* --- reading --- */

static int read_backing(struct qcow2 *q, const struct iovec *iov, unsigned niov, uint64_t skip, uint64_t offset, uint64_t len)
{
	uint64_t there = !q->backing_read || offset >= q->backing_size ? 0 : q->backing_size - offset;
	if (there > len)
		there = len;
	if (there < len)
		qcow2_iov_fill(iov, niov, skip + there, NULL, len - there);
	for (unsigned i = 0; i < niov && there; i++) {
		if (skip >= iov[i].iov_len) {
			skip -= iov[i].iov_len;
			continue;
		}
		uint64_t n = iov[i].iov_len - skip < there ? iov[i].iov_len - skip : there;
		int r = q->backing_read(q->backing_opaque, (uint8_t *)iov[i].iov_base + skip, n, offset);
		if (r)
			return r;
		offset += n;
		there -= n;
		skip = 0;
	}
	return 0;
}

/* iov from byte `skip` on gets run->len bytes of the guest's disk at `offset`. */
static int read_run(struct qcow2 *q, const struct qcow2_run *run, const struct iovec *iov, unsigned niov, uint64_t skip, uint64_t offset)
{
	if (run->e.kind == QCOW2_KIND_UNALLOCATED)
		return read_backing(q, iov, niov, skip, offset, run->len);
	if (run->e.kind == QCOW2_KIND_ZERO) {
		qcow2_iov_fill(iov, niov, skip, NULL, run->len);
		return 0;
	}
	struct iovec few[FEW], *part = niov <= FEW ? few : malloc(niov * sizeof(*part));
	if (!part)
		return -ENOMEM;
	unsigned n = qcow2_iov_slice(part, iov, niov, skip, run->len);
	int r = run->e.kind == QCOW2_KIND_COMPRESSED
			? qcow2_read_compressed(q, &run->e, part, n, offset & (q->f.cluster_size - 1), run->len)
			: qcow2_file_readv(qcow2_data_fd(q, part, n, run->host, run->len), part, n, run->host);
	if (part != few)
		free(part);
	return r;
}

int qcow2_read(struct qcow2 *q, const struct iovec *iov, unsigned niov, uint64_t offset, uint64_t len)
{
	for (uint64_t done = 0; done < len;) {
		struct qcow2_run run;
		pthread_mutex_lock(&q->lock);
		int r = qcow2_map(q, offset + done, len - done, false, &run);
		unsigned epoch = qcow2_enter(q);
		pthread_mutex_unlock(&q->lock);
		if (!r)
			r = read_run(q, &run, iov, niov, done, offset + done);
		qcow2_leave(q, epoch);
		if (r)
			return r;
		done += run.len;
	}
	return 0;
}

/* --- allocating --- */

static bool allocating(const struct qcow2 *q, uint64_t first, uint64_t n)
{
	for (const struct qcow2_alloc *a = q->allocs; a; a = a->next) {
		if (first < a->first + a->n && a->first < first + n)
			return true;
	}
	return false;
}

/* lock held: until nobody else allocates any of these guest clusters. */
static void wait_for_others(struct qcow2 *q, uint64_t first, uint64_t n)
{
	while (allocating(q, first, n))
		pthread_cond_wait(&q->wake, &q->lock);
}

static void end_alloc(struct qcow2 *q, struct qcow2_alloc *a)
{
	struct qcow2_alloc **p = &q->allocs;
	while (*p != a)
		p = &(*p)->next;
	*p = a->next;
	pthread_cond_broadcast(&q->wake);
}

/* One contiguous group of guest clusters that gets host clusters, and what it shall hold. */
struct group {
	struct qcow2_alloc a;
	struct qcow2_entry first_old, last_old;
	uint64_t host;
	bool again;  /* these had the host clusters already, reading as zeroes */
	bool zeroed; /* the host clusters read as zeroes */
	uint64_t offset, len, skip; /* the guest's bytes; skip: in the caller's iovec */
};

static bool shows_zeroes(const struct qcow2 *q, const struct qcow2_entry *e, uint64_t offset)
{
	return e->kind == QCOW2_KIND_ZERO || (e->kind == QCOW2_KIND_UNALLOCATED && (!q->backing_read || offset >= q->backing_size));
}

/* What cluster showed in [offset, offset + len), for the parts of it that the guest does not write. */
static int old_content(struct qcow2 *q, const struct qcow2_entry *old, uint64_t offset, uint64_t len, uint8_t **out)
{
	*out = aligned_alloc(4096, (len + 4095) & ~4095ull);
	if (!*out)
		return -ENOMEM;
	struct qcow2_run run = { .e = *old, .host = old->host + (offset & (q->f.cluster_size - 1)), .len = len };
	struct iovec iov = { *out, len };
	return read_run(q, &run, &iov, 1, 0, offset);
}

static int write_group(struct qcow2 *q, const struct group *g, const struct iovec *iov, unsigned niov)
{
	uint64_t start = g->a.first << q->f.cluster_bits, end = (g->a.first + g->a.n) << q->f.cluster_bits;
	uint64_t head = g->offset - start, tail_at = g->offset + g->len, tail = end - tail_at;
	uint8_t *head_buf = NULL, *tail_buf = NULL;
	struct iovec few[FEW + 2], *v = niov <= FEW ? few : malloc((niov + 2) * sizeof(*v));
	int r = v ? 0 : -ENOMEM;
	bool fill_head = head && !(g->zeroed && shows_zeroes(q, &g->first_old, start));
	bool fill_tail = tail && !(g->zeroed && shows_zeroes(q, &g->last_old, tail_at));
	if (!r && fill_head)
		r = old_content(q, &g->first_old, start, head, &head_buf);
	if (!r && fill_tail)
		r = old_content(q, &g->last_old, tail_at, tail, &tail_buf);
	if (!r) {
		unsigned n = 0;
		uint64_t at = g->host + (fill_head ? 0 : head);
		if (fill_head)
			v[n++] = (struct iovec){ head_buf, head };
		n += qcow2_iov_slice(v + n, iov, niov, g->skip, g->len);
		if (fill_tail)
			v[n++] = (struct iovec){ tail_buf, tail };
		uint64_t len = (fill_head ? head : 0) + g->len + (fill_tail ? tail : 0);
		r = qcow2_file_writev(qcow2_data_fd(q, v, n, at, len), v, n, at);
		if (r == -EFBIG || r == -EDQUOT)
			r = -ENOSPC; /* what guests know */
	}
	free(head_buf);
	free(tail_buf);
	if (v != few)
		free(v);
	return r;
}

/* What an entry held is nobody's any more, once its change is durable. */
static void free_old(struct qcow2 *q, const struct qcow2_entry *e)
{
	if (e->kind == QCOW2_KIND_COMPRESSED)
		qcow2_free_later(q, e->host, e->csize);
	else if (e->host && (e->kind == QCOW2_KIND_NORMAL || e->kind == QCOW2_KIND_ZERO))
		qcow2_free_later(q, e->host, q->f.cluster_size);
}

static struct qcow2_entry slice_entry(const struct qcow2 *q, const struct qcow2_slice *s, uint64_t cluster)
{
	uint64_t i = cluster & ((1ull << q->slice_bits) - 1);
	return qcow2_decode(&q->f, qcow2_load64(s->data + i * 8), q->file_end);
}

static int link_group(struct qcow2 *q, const struct group *g)
{
	struct qcow2_slice *s;
	int r = qcow2_l2_slice(q, g->a.first, &s);
	for (uint64_t i = 0; !r && i < g->a.n; i++) {
		struct qcow2_entry old = slice_entry(q, s, g->a.first + i);
		qcow2_set_entry(q, s, g->a.first + i, (g->host + (i << q->f.cluster_bits)) | QCOW2_COPIED);
		if (!g->again)
			free_old(q, &old);
	}
	return r;
}

/* May be written where it is. */
static bool in_place(const struct qcow2_entry *e)
{
	return e->kind == QCOW2_KIND_NORMAL && e->copied;
}

static bool has_place(const struct qcow2_entry *e)
{
	return e->kind == QCOW2_KIND_ZERO && e->host && e->copied;
}

/* lock held. How many clusters from `first` on, at most `max`, need new host clusters; the L2 slice is loaded. */
static int count_new(struct qcow2 *q, uint64_t first, uint64_t max, struct group *g)
{
	struct qcow2_slice *s;
	int r = qcow2_l2_slice(q, first, &s);
	if (r)
		return r;
	uint64_t in_slice = (1ull << q->slice_bits) - (first & ((1ull << q->slice_bits) - 1));
	for (g->a.n = 0; g->a.n < max && g->a.n < in_slice; g->a.n++) {
		struct qcow2_entry e = slice_entry(q, s, first + g->a.n);
		if (in_place(&e) || has_place(&e) || e.kind == QCOW2_KIND_BAD)
			break;
		if (!g->a.n)
			g->first_old = e;
	}
	return 0;
}

/* lock held: host clusters for the clusters from that of g->offset on. */
static int plan_group(struct qcow2 *q, const struct qcow2_run *run, struct group *g)
{
	uint64_t first = g->offset >> q->f.cluster_bits, end = g->offset + g->len, got;
	uint64_t max = ((end + q->f.cluster_size - 1) >> q->f.cluster_bits) - first;
	if (max > GROUP_BYTES >> q->f.cluster_bits)
		max = GROUP_BYTES >> q->f.cluster_bits;
	int r = qcow2_own_l2(q, first);
	if (r)
		return r;
	g->a.first = first;
	if (has_place(&run->e)) {
		/* The run may end inside its last cluster, which is all zeroes as well. */
		uint64_t clusters = (((g->offset & (q->f.cluster_size - 1)) + run->len + q->f.cluster_size - 1) >> q->f.cluster_bits);
		g->a.n = clusters < max ? clusters : max;
		g->host = run->e.host;
		g->again = true;
		g->first_old = g->last_old = (struct qcow2_entry){ .kind = QCOW2_KIND_ZERO };
	} else {
		r = count_new(q, first, max, g);
		if (!r && !g->a.n)
			r = -EIO; /* cannot be: the run said otherwise */
		if (!r)
			r = qcow2_alloc_clusters(q, g->a.n, false, &g->host, &got, &g->zeroed);
		if (r)
			return r;
		g->a.n = got;
		struct qcow2_slice *s;
		r = qcow2_l2_slice(q, first, &s);
		if (r) {
			qcow2_unalloc(q, g->host, got);
			return r;
		}
		g->last_old = slice_entry(q, s, first + got - 1);
	}
	uint64_t group_end = (first + g->a.n) << q->f.cluster_bits;
	if (end > group_end)
		g->len = group_end - g->offset;
	return 0;
}

/* Write some bytes at the start of [offset, offset + len); how many is added to *done. */
static int write_some(struct qcow2 *q, const struct iovec *iov, unsigned niov, uint64_t skip, uint64_t offset, uint64_t len, uint64_t *done)
{
	struct qcow2_run run;
	struct group g = { .offset = offset, .len = len, .skip = skip };
	uint64_t cs = q->f.cluster_size, first = offset >> q->f.cluster_bits;
	uint64_t reach = (((offset & (cs - 1)) + (len < GROUP_BYTES ? len : GROUP_BYTES) + cs - 1) >> q->f.cluster_bits) + 1;

	pthread_mutex_lock(&q->lock);
	wait_for_others(q, first, reach);
	int r = atomic_load(&q->corrupt) ? -EIO : qcow2_map(q, offset, len, true, &run);
	if (r) {
		pthread_mutex_unlock(&q->lock);
		return r;
	}
	if (in_place(&run.e)) {
		unsigned epoch = qcow2_enter(q);
		pthread_mutex_unlock(&q->lock);
		struct iovec few[FEW], *v = niov <= FEW ? few : malloc(niov * sizeof(*v));
		r = -ENOMEM;
		if (v) {
			unsigned n = qcow2_iov_slice(v, iov, niov, skip, run.len);
			r = qcow2_file_writev(qcow2_data_fd(q, v, n, run.host, run.len), v, n, run.host);
			if (v != few)
				free(v);
		}
		qcow2_leave(q, epoch);
		*done += run.len;
		return r;
	}
	r = plan_group(q, &run, &g);
	if (r) {
		pthread_mutex_unlock(&q->lock);
		return r;
	}
	g.a.next = q->allocs;
	q->allocs = &g.a;
	unsigned epoch = qcow2_enter(q);
	pthread_mutex_unlock(&q->lock);

	r = write_group(q, &g, iov, niov);
	qcow2_leave(q, epoch);

	pthread_mutex_lock(&q->lock);
	if (!r)
		r = link_group(q, &g);
	if (r && !g.again)
		qcow2_unalloc(q, g.host, g.a.n);
	end_alloc(q, &g.a);
	pthread_mutex_unlock(&q->lock);
	*done += g.len;
	return r;
}

int qcow2_write(struct qcow2 *q, const struct iovec *iov, unsigned niov, uint64_t offset, uint64_t len)
{
	int r = 0;
	for (uint64_t done = 0; !r && done < len;)
		r = write_some(q, iov, niov, done, offset + done, len - done, &done);
	return r;
}

/* --- discarding and zeroing --- */

static int write_zero_bytes(struct qcow2 *q, uint64_t offset, uint64_t len)
{
	void *zeroes = len ? calloc(1, len) : NULL;
	if (!zeroes)
		return len ? -ENOMEM : 0;
	struct iovec iov = { zeroes, len };
	int r = qcow2_write(q, &iov, 1, offset, len);
	free(zeroes);
	return r;
}

enum clearing { CLEAR_DISCARD, CLEAR_ZERO, CLEAR_ZERO_UNMAP };

#define LEAVE UINT64_MAX	/* the entry is right as it is */
#define BY_WRITING (UINT64_MAX - 1) /* only zeroes written there can do it */

/* The entry that a cluster gets; *frees: and what it held goes. */
static uint64_t cleared(const struct qcow2 *q, const struct qcow2_entry *e, uint64_t offset, enum clearing how, bool *frees)
{
	bool backed = q->backing_read && offset < q->backing_size, v3 = q->f.version >= 3;
	*frees = false;
	if (shows_zeroes(q, e, offset))
		return LEAVE;
	if (e->kind == QCOW2_KIND_BAD)
		return how == CLEAR_DISCARD ? LEAVE : BY_WRITING;
	if (e->kind == QCOW2_KIND_UNALLOCATED)
		return how == CLEAR_DISCARD ? LEAVE : v3 ? QCOW2_ZERO : BY_WRITING;
	/* Space that the guest wants to keep is kept; version 2 can say "zeroes" only by "nothing here". */
	if (how == CLEAR_ZERO && e->kind == QCOW2_KIND_NORMAL && e->copied)
		return v3 ? e->host | QCOW2_COPIED | QCOW2_ZERO : BY_WRITING;
	if (!v3 && backed)
		return how == CLEAR_DISCARD ? LEAVE : BY_WRITING;
	*frees = true;
	return backed ? QCOW2_ZERO : 0;
}

/* Whole clusters [first, first + n) of one L2 slice. lock held. *by_writing: the first cluster that has to be written, else first + n. */
static int clear_slice(struct qcow2 *q, uint64_t first, uint64_t n, enum clearing how, uint64_t *by_writing)
{
	bool owned = false, frees;
	struct qcow2_slice *s = NULL;
	bool table = q->l1.v[first >> qcow2_l2_bits(&q->f)] & QCOW2_OFFSET_MASK;
	*by_writing = first + n;
	for (uint64_t c = first; c < first + n; c++) {
		struct qcow2_entry e = { .kind = QCOW2_KIND_UNALLOCATED };
		int r = table && !s ? qcow2_l2_slice(q, c, &s) : 0;
		if (r)
			return r;
		if (s)
			e = slice_entry(q, s, c);
		uint64_t entry = cleared(q, &e, c << q->f.cluster_bits, how, &frees);
		if (entry == BY_WRITING) {
			*by_writing = c;
			return 0;
		}
		if (entry == LEAVE)
			continue;
		if (!owned) {
			r = qcow2_own_l2(q, c);
			if (!r)
				r = qcow2_l2_slice(q, c, &s);
			if (r)
				return r;
			owned = true;
			table = true;
		}
		qcow2_set_entry(q, s, c, entry);
		if (frees)
			free_old(q, &e);
	}
	return 0;
}

/* Without backing, or where there is none, what has no L2 table is zero already: how many clusters can be passed over. lock held. */
static uint64_t nothing_there(const struct qcow2 *q, uint64_t cluster, enum clearing how)
{
	uint64_t i = cluster >> qcow2_l2_bits(&q->f), per_table = qcow2_l2_entries(&q->f), n = 0;
	if (how != CLEAR_DISCARD && q->backing_read && cluster << q->f.cluster_bits < q->backing_size)
		return 0;
	for (; i < q->l1.n && !(q->l1.v[i] & QCOW2_OFFSET_MASK); i++)
		n += per_table - (n ? 0 : cluster & (per_table - 1));
	return n;
}

static int clear_clusters(struct qcow2 *q, uint64_t first, uint64_t end, enum clearing how)
{
	uint64_t per_slice = 1ull << q->slice_bits;
	for (uint64_t c = first; c < end;) {
		pthread_mutex_lock(&q->lock);
		uint64_t n = nothing_there(q, c, how);
		if (n) {
			pthread_mutex_unlock(&q->lock);
			c += n;
			continue;
		}
		n = per_slice - (c & (per_slice - 1));
		if (n > end - c)
			n = end - c;
		wait_for_others(q, c, n);
		uint64_t stop = c;
		int r = atomic_load(&q->corrupt) ? -EIO : clear_slice(q, c, n, how, &stop);
		/* A guest that discards and never flushes must not fill our memory. */
		if (!r && q->nfrees > 65536)
			r = qcow2_write_back(q);
		pthread_mutex_unlock(&q->lock);
		if (!r && stop < c + n) {
			uint64_t at = stop << q->f.cluster_bits, len = q->f.cluster_size;
			if (at + len > q->size)
				len = q->size - at;
			r = write_zero_bytes(q, at, len);
			stop++;
		}
		if (r)
			return r;
		c = stop;
	}
	return 0;
}

/* The whole clusters in a range; the last cluster of the disk may be a part of one. */
static void whole_clusters(const struct qcow2 *q, uint64_t offset, uint64_t len, uint64_t *first, uint64_t *end)
{
	*first = qcow2_clusters(q, offset);
	*end = offset + len == q->size ? qcow2_clusters(q, offset + len) : (offset + len) >> q->f.cluster_bits;
}

int qcow2_discard(struct qcow2 *q, uint64_t offset, uint64_t len)
{
	uint64_t first, end;
	whole_clusters(q, offset, len, &first, &end);
	return clear_clusters(q, first, end, CLEAR_DISCARD);
}

/* Zeroes in part of a cluster: nothing to do where it shows them already. */
static int zero_part(struct qcow2 *q, uint64_t offset, uint64_t len)
{
	if (!len)
		return 0;
	struct qcow2_run run;
	pthread_mutex_lock(&q->lock);
	wait_for_others(q, offset >> q->f.cluster_bits, 1);
	int r = qcow2_map(q, offset, len, false, &run);
	pthread_mutex_unlock(&q->lock);
	if (r || shows_zeroes(q, &run.e, offset))
		return r;
	return write_zero_bytes(q, offset, len);
}

int qcow2_write_zeroes(struct qcow2 *q, uint64_t offset, uint64_t len, bool unmap)
{
	uint64_t first, end;
	whole_clusters(q, offset, len, &first, &end);
	if (first >= end) {
		uint64_t cut = (offset | (q->f.cluster_size - 1)) + 1; /* at most two parts */
		if (cut > offset + len)
			cut = offset + len;
		int r = zero_part(q, offset, cut - offset);
		return r ? r : zero_part(q, cut, offset + len - cut);
	}
	uint64_t start = first << q->f.cluster_bits, stop = end << q->f.cluster_bits;
	int r = zero_part(q, offset, start - offset);
	if (!r)
		r = clear_clusters(q, first, end, unmap ? CLEAR_ZERO_UNMAP : CLEAR_ZERO);
	if (!r && stop < offset + len)
		r = zero_part(q, stop, offset + len - stop);
	return r;
}
