/* Host clusters: their refcounts, which are free, and when one that was freed is free. All with the lock held. */
#include "block/qcow2/image.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define GROW_BYTES (8ull << 20) /* the file grows by this much at once; closing cuts what was not used */

uint64_t qcow2_rc_place(const struct qcow2 *q, uint64_t number)
{
	uint64_t per_block = qcow2_block_entries(&q->f) >> q->rc_bits;
	uint64_t block = number / per_block;
	if (block >= q->reftable.n)
		return 0;
	uint64_t at = qcow2_table_offset(&q->f, q->reftable.v[block], q->file_end);
	return !at || at == UINT64_MAX ? at : at + number % per_block * q->rc.slice_size;
}

int qcow2_write_refcounts(struct qcow2 *q)
{
	for (uint32_t i = 0; q->rc.ndirty && i < q->rc.n; i++) {
		struct qcow2_slice *s = &q->rc.slices[i];
		if (!s->dirty)
			continue;
		int r = qcow2_file_write(q->fd, s->data, q->rc.slice_size, qcow2_rc_place(q, s->number));
		if (r)
			return r;
		qcow2_cache_clean(&q->rc, s);
	}
	return 0;
}

/* NULL in *out: the block does not exist. */
static int load_slice(struct qcow2 *q, uint64_t cluster, struct qcow2_slice **out)
{
	uint64_t number = cluster >> q->rc_bits, at;
	*out = qcow2_cache_find(&q->rc, number);
	if (*out)
		return 0;
	at = qcow2_rc_place(q, number);
	if (!at)
		return 0;
	if (at == UINT64_MAX)
		return qcow2_corrupt(q, true, "a refcount table entry leads out of the file");
	struct qcow2_slice *s = qcow2_cache_take(&q->rc);
	if (!s) {
		/* Refcounts may reach the file at any time: they only rise before, and only fall after, the entries they count. */
		int r = qcow2_write_refcounts(q);
		if (r)
			return r;
		s = qcow2_cache_take(&q->rc);
	}
	if (!s)
		return -ENOMEM;
	int r = qcow2_file_read(q->fd, s->data, q->rc.slice_size, at);
	if (r)
		return r;
	qcow2_cache_put(&q->rc, s, number);
	*out = s;
	return 0;
}

static uint64_t slice_index(const struct qcow2 *q, uint64_t cluster)
{
	return cluster & ((1ull << q->rc_bits) - 1);
}

int qcow2_get_count(struct qcow2 *q, uint64_t cluster, uint64_t *count)
{
	struct qcow2_slice *s;
	int r = load_slice(q, cluster, &s);
	*count = !r && s ? qcow2_get_refcount(s->data, q->f.refcount_order, slice_index(q, cluster)) : 0;
	return r;
}

int qcow2_set_count(struct qcow2 *q, uint64_t cluster, uint64_t count)
{
	struct qcow2_slice *s;
	int r = load_slice(q, cluster, &s);
	if (r)
		return r;
	if (!s || count > qcow2_refcount_max(q->f.refcount_order))
		return qcow2_corrupt(q, true, "cluster 0x%" PRIx64 " cannot have the refcount %" PRIu64, cluster << q->f.cluster_bits, count);
	qcow2_set_refcount(s->data, q->f.refcount_order, slice_index(q, cluster), count);
	qcow2_cache_dirty(&q->rc, s);
	atomic_store(&q->dirty, true);
	if (!count && cluster < q->free_hint)
		q->free_hint = cluster;
	return 0;
}

/* --- the file and the metadata in it --- */

static int reach(struct qcow2 *q, uint64_t end)
{
	uint64_t old = q->file_end;
	if (end > q->used_end)
		q->used_end = end;
	if (end <= old)
		return 0;
	if (q->fixed_size)
		return -ENOSPC;
	uint64_t to = end + GROW_BYTES;
	if (ftruncate(q->fd, (off_t)to)) {
		to = end;
		if (ftruncate(q->fd, (off_t)to))
			return errno == EFBIG ? -ENOSPC : -errno;
	}
	q->file_end = to;
	return 0;
}

static void mark(struct qcow2 *q, uint64_t host, uint64_t n, bool on)
{
	pthread_mutex_lock(&q->map_lock);
	qcow2_bitmap_set(&q->meta, host >> q->f.cluster_bits, n, on);
	pthread_mutex_unlock(&q->map_lock);
}

/* The clusters of a run that is about to be used. */
static int take_run(struct qcow2 *q, uint64_t first, uint64_t n, bool *zeroed)
{
	if (qcow2_bitmap_any(&q->meta, first, n))
		return qcow2_corrupt(q, true, "a cluster of a table (near 0x%" PRIx64 ") has the refcount 0", first << q->f.cluster_bits);
	uint64_t start = first << q->f.cluster_bits, end = (first + n) << q->f.cluster_bits;
	int r = reach(q, end);
	if (r)
		return r;
	*zeroed = start >= q->fresh;
	if (end > q->fresh)
		q->fresh = end;
	return 0;
}

static int zero_clusters(struct qcow2 *q, uint64_t host, uint64_t n)
{
	uint8_t *zeroes = calloc(1, q->f.cluster_size);
	if (!zeroes)
		return -ENOMEM;
	int r = 0;
	for (uint64_t i = 0; !r && i < n; i++)
		r = qcow2_file_write(q->fd, zeroes, q->f.cluster_size, host + (i << q->f.cluster_bits));
	free(zeroes);
	return r;
}

/* A block for refcounts that have none: all are 0, so the first cluster it counts is free, and is where it goes. */
static int make_block(struct qcow2 *q, uint64_t index)
{
	uint64_t cluster = index * qcow2_block_entries(&q->f), host = cluster << q->f.cluster_bits;
	bool zeroed;
	int r = take_run(q, cluster, 1, &zeroed);
	if (!r)
		r = zero_clusters(q, host, 1); /* also where it is zero: a flush must not find the disk full */
	if (r)
		return r;
	mark(q, host, 1, true);
	qcow2_table_set(&q->reftable, index, host);
	atomic_store(&q->dirty, true);
	return qcow2_set_count(q, cluster, 1);
}

/* A longer refcount table somewhere else: refcounts, then the table, then the header that names it. */
static int grow_reftable(struct qcow2 *q, uint64_t index)
{
	if (q->growing)
		return -ENOSPC;
	uint64_t per_cluster = q->f.cluster_size / 8, old_n = q->reftable.n;
	uint64_t n = (old_n + old_n / 2 > index ? old_n + old_n / 2 : index) + 1;
	n = (n + per_cluster - 1) / per_cluster * per_cluster;
	if (n > QCOW2_MAX_REFTABLE_BYTES / 8)
		n = QCOW2_MAX_REFTABLE_BYTES / 8;
	if (index >= n)
		return -ENOSPC;
	int r = qcow2_table_grow(&q->reftable, n);
	if (r)
		return r;
	uint64_t clusters = n / per_cluster, host, got;
	bool zeroed;
	q->growing = true;
	r = qcow2_alloc_clusters(q, clusters, true, &host, &got, &zeroed);
	q->growing = false;
	if (!r)
		r = qcow2_write_refcounts(q);
	if (!r)
		r = qcow2_sync(q);
	if (!r)
		r = qcow2_table_write(&q->reftable, q->fd, host, true);
	if (!r)
		r = qcow2_sync(q);
	uint8_t field[12];
	qcow2_store64(field, host);
	for (int i = 0; i < 4; i++)
		field[8 + i] = (uint8_t)(clusters >> (24 - 8 * i));
	if (!r)
		r = qcow2_file_write(q->fd, field, sizeof(field), QCOW2_AT_REFTABLE);
	if (!r)
		r = qcow2_sync(q);
	if (r) {
		/* The file has the old table or the new one. Nothing after this may count on either. */
		if (!q->failed)
			q->failed = r;
		return r;
	}
	uint64_t old = q->f.reftable_offset, old_clusters = q->f.reftable_clusters;
	q->f.reftable_offset = host;
	q->f.reftable_clusters = (uint32_t)clusters;
	mark(q, host, clusters, true);
	mark(q, old, old_clusters, false);
	qcow2_unalloc(q, old, old_clusters);
	return 0;
}

/* --- allocating --- */

int qcow2_alloc_clusters(struct qcow2 *q, uint64_t want, bool exact, uint64_t *host, uint64_t *got, bool *zeroed)
{
	if (q->failed)
		return q->failed;
	uint64_t per_block = qcow2_block_entries(&q->f), limit = QCOW2_MAX_HOST >> q->f.cluster_bits;
	if (q->fixed_size)
		limit = q->file_end >> q->f.cluster_bits;
	uint64_t c = q->free_hint, start = 0, found = 0;
	while (found < want && c < limit) {
		struct qcow2_slice *s = NULL;
		uint64_t block = c / per_block;
		int r = block < q->reftable.n ? load_slice(q, c, &s) : 0;
		if (r)
			return r;
		if (!s) {
			if (found && !exact)
				break;
			/* These take clusters too, perhaps those that we counted. */
			r = block < q->reftable.n ? make_block(q, block) : grow_reftable(q, block);
			if (r)
				return r;
			c = found ? start : c;
			found = 0;
			continue;
		}
		bool end = false;
		do {
			if (qcow2_get_refcount(s->data, q->f.refcount_order, slice_index(q, c))) {
				end = found && !exact;
				if (end)
					break;
				found = 0;
			} else {
				if (!found)
					start = c;
				found++;
			}
			c++;
		} while (found < want && c < limit && slice_index(q, c));
		if (end)
			break;
	}
	if (!found || (exact && found < want))
		return -ENOSPC;
	int r = take_run(q, start, found, zeroed);
	for (uint64_t i = 0; !r && i < found; i++) {
		r = qcow2_set_count(q, start + i, 1);
		if (r)
			qcow2_unalloc(q, start << q->f.cluster_bits, i);
	}
	if (r)
		return r;
	if (!exact || start == q->free_hint)
		q->free_hint = start + found;
	*host = start << q->f.cluster_bits;
	*got = found;
	return 0;
}

/* --- freeing --- */

/* Refcounts of n clusters fall by one. An error leaks them. */
static void release(struct qcow2 *q, uint64_t cluster, uint64_t n)
{
	uint64_t hole = 0, start = 0;
	for (uint64_t i = 0; i < n; i++) {
		uint64_t count;
		if (qcow2_get_count(q, cluster + i, &count))
			return;
		if (!count) {
			qcow2_corrupt(q, true, "the cluster at 0x%" PRIx64 " was in use with a refcount of 0", (cluster + i) << q->f.cluster_bits);
			return;
		}
		/* An entry for data that leads to a table; who frees a table unmarks it before. */
		if (qcow2_bitmap_any(&q->meta, cluster + i, 1)) {
			qcow2_corrupt(q, true, "a table (at 0x%" PRIx64 ") was in use as data", (cluster + i) << q->f.cluster_bits);
			return;
		}
		if (qcow2_set_count(q, cluster + i, count - 1))
			return;
		if (count > 1)
			continue;
		if (hole && start + hole == cluster + i) {
			hole++;
			continue;
		}
		if (hole && q->p.punch)
			fallocate(q->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)(start << q->f.cluster_bits),
				  (off_t)(hole << q->f.cluster_bits));
		start = cluster + i;
		hole = 1;
	}
	if (hole && q->p.punch)
		fallocate(q->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)(start << q->f.cluster_bits), (off_t)(hole << q->f.cluster_bits));
}

void qcow2_unalloc(struct qcow2 *q, uint64_t host, uint64_t n)
{
	release(q, host >> q->f.cluster_bits, n);
}

void qcow2_free_later(struct qcow2 *q, uint64_t host, uint64_t len)
{
	uint64_t first = host >> q->f.cluster_bits, n = ((host + len - 1) >> q->f.cluster_bits) - first + 1;
	struct qcow2_frees *l = &q->frees[q->epoch & 1];
	atomic_store(&q->dirty, true);
	if (l->n && l->v[l->n - 1].cluster + l->v[l->n - 1].n == first) {
		l->v[l->n - 1].n += n;
		return;
	}
	if (l->n == l->room) {
		size_t room = l->room ? l->room * 2 : 64;
		struct qcow2_extent *v = realloc(l->v, room * sizeof(*v));
		if (!v)
			return; /* leaked */
		l->v = v;
		l->room = room;
	}
	l->v[l->n++] = (struct qcow2_extent){ first, n };
	q->nfrees++;
}

struct qcow2_frees qcow2_take_frees(struct qcow2 *q)
{
	/* The tables were written just now. What was freed in the epoch before this one is safe once the I/O of that epoch is done: it may
	 * have looked up the old places. */
	struct qcow2_frees l = { NULL, 0, 0 };
	pthread_mutex_lock(&q->map_lock);
	unsigned before = (q->epoch - 1) & 1;
	bool quiet = !atomic_load(&q->inflight[before]);
	if (quiet)
		q->epoch++;
	pthread_mutex_unlock(&q->map_lock);
	if (quiet) {
		l = q->frees[before];
		memset(&q->frees[before], 0, sizeof(l));
		q->nfrees -= l.n;
	}
	/* Those that must wait have another go at the next flush. */
	if (q->nfrees)
		atomic_store(&q->dirty, true);
	return l;
}

void qcow2_apply_frees(struct qcow2 *q, const struct qcow2_frees *l)
{
	for (size_t i = 0; i < l->n; i++)
		release(q, l->v[i].cluster, l->v[i].n);
}
