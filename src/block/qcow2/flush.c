/* Tables back to the file, in the order that keeps it whole (image.h). With the lock held, but for qcow2_flush. */
#include "block/qcow2/image.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/log.h"

#define PART 512u /* table entries that are written together */

int qcow2_table_grow(struct qcow2_table *t, uint64_t n)
{
	uint64_t *v = realloc(t->v, n * 8 + !n);
	if (v)
		t->v = v;
	uint64_t words = n / PART / 64 + 1, old_words = t->dirty ? t->n / PART / 64 + 1 : 0;
	uint64_t *d = realloc(t->dirty, words * 8);
	if (d)
		t->dirty = d;
	if (!v || !d)
		return -ENOMEM;
	memset(v + t->n, 0, (n - t->n) * 8);
	memset(d + old_words, 0, (words - old_words) * 8);
	t->n = n;
	return 0;
}

int qcow2_table_create(struct qcow2_table *t, int fd, uint64_t offset, uint64_t n)
{
	memset(t, 0, sizeof(*t));
	int r = qcow2_table_grow(t, n);
	if (!r && fd >= 0 && n)
		r = qcow2_file_read(fd, t->v, n * 8, offset);
	if (r) {
		qcow2_table_destroy(t);
		return r;
	}
	for (uint64_t i = 0; i < n; i++)
		t->v[i] = __builtin_bswap64(t->v[i]);
	return 0;
}

void qcow2_table_destroy(struct qcow2_table *t)
{
	free(t->v);
	free(t->dirty);
	memset(t, 0, sizeof(*t));
}

void qcow2_table_set(struct qcow2_table *t, uint64_t i, uint64_t v)
{
	t->v[i] = v;
	t->dirty[i / PART / 64] |= 1ull << (i / PART & 63);
	t->any_dirty = true;
}

int qcow2_table_write(struct qcow2_table *t, int fd, uint64_t offset, bool all)
{
	for (uint64_t part = 0; part * PART < t->n; part++) {
		uint64_t bit = 1ull << (part & 63);
		if (!all && !(t->dirty[part / 64] & bit))
			continue;
		uint64_t first = part * PART, n = t->n - first < PART ? t->n - first : PART;
		uint8_t buf[PART * 8];
		for (uint64_t i = 0; i < n; i++)
			qcow2_store64(buf + i * 8, t->v[first + i]);
		int r = qcow2_file_write(fd, buf, n * 8, offset + first * 8);
		if (r)
			return r;
		t->dirty[part / 64] &= ~bit;
	}
	t->any_dirty = false;
	return 0;
}

/* The kernel reports a lost write once, and then forgets what it lost. */
static int sync_failed(struct qcow2 *q, int code)
{
	if (!q->failed)
		log_error("%s: the host could not write to its disk (%s); the guest's flushes fail from now on", q->what, strerror(code));
	q->failed = -EIO;
	return -EIO;
}

/* One fdatasync for all who ask while another is under way. One at a time: of two, the kernel would tell only one of a lost write. */
static int sync_file(struct qcow2 *q)
{
	if (q->p.unsafe)
		return 0;
	pthread_mutex_lock(&q->sync_lock);
	uint64_t mine = q->syncs_begun + 1; /* it begins after what it is to cover */
	while (q->syncs_done < mine) {
		if (q->syncs_begun != q->syncs_done) {
			pthread_cond_wait(&q->synced, &q->sync_lock);
			continue;
		}
		q->syncs_begun++;
		pthread_mutex_unlock(&q->sync_lock);
		int r = fdatasync(q->fd) ? -errno : 0;
		pthread_mutex_lock(&q->sync_lock);
		if (r && !q->sync_error)
			q->sync_error = r;
		q->syncs_done++;
		pthread_cond_broadcast(&q->synced);
	}
	int r = q->sync_error;
	pthread_mutex_unlock(&q->sync_lock);
	return r;
}

int qcow2_sync(struct qcow2 *q)
{
	int r = sync_file(q);
	return r ? sync_failed(q, -r) : 0;
}

int qcow2_set_header_u64(struct qcow2 *q, unsigned at, uint64_t value)
{
	uint8_t field[8];
	qcow2_store64(field, value);
	int r = qcow2_file_write(q->fd, field, sizeof(field), at);
	if (!r)
		r = qcow2_sync(q);
	if (!r && at == QCOW2_AT_INCOMPATIBLE)
		q->f.incompatible = value;
	return r;
}

static int write_l2(struct qcow2 *q)
{
	uint64_t per_table = qcow2_l2_entries(&q->f) >> q->slice_bits;
	for (uint32_t i = 0; q->l2.ndirty && i < q->l2.n; i++) {
		struct qcow2_slice *s = &q->l2.slices[i];
		if (!s->dirty)
			continue;
		uint64_t table = q->l1.v[s->number / per_table] & QCOW2_OFFSET_MASK;
		int r = qcow2_file_write(q->fd, s->data, q->l2.slice_size, table + s->number % per_table * q->l2.slice_size);
		if (r)
			return r;
		pthread_mutex_lock(&q->map_lock);
		qcow2_cache_clean(&q->l2, s);
		pthread_mutex_unlock(&q->map_lock);
	}
	return 0;
}

static int write_tables(struct qcow2 *q)
{
	if (q->failed)
		return q->failed;
	if (atomic_load(&q->corrupt))
		return -EIO;
	int r = qcow2_write_refcounts(q);
	if (!r && q->reftable.any_dirty) {
		r = qcow2_sync(q);
		if (!r)
			r = qcow2_table_write(&q->reftable, q->fd, q->f.reftable_offset, false);
	}
	if (!r && (q->l2.ndirty || q->l1.any_dirty)) {
		r = qcow2_sync(q); /* refcounts, and the data of what the entries show */
		if (!r)
			r = write_l2(q);
	}
	if (!r && q->l1.any_dirty) {
		r = qcow2_sync(q);
		if (!r)
			r = qcow2_table_write(&q->l1, q->fd, q->f.l1_offset, false);
	}
	if (!r)
		atomic_store(&q->dirty, false);
	return r;
}

int qcow2_write_back(struct qcow2 *q)
{
	int r = write_tables(q);
	if (r)
		return r;
	struct qcow2_frees l = qcow2_take_frees(q);
	r = qcow2_sync(q);
	if (!r)
		qcow2_apply_frees(q, &l);
	free(l.v); /* after an error they are leaked */
	return r;
}

int qcow2_flush(struct qcow2 *q)
{
	if (q->p.read_only)
		return 0;
	struct qcow2_frees l = { NULL, 0, 0 };
	pthread_mutex_lock(&q->lock);
	int r = q->failed;
	if (!r && atomic_load(&q->dirty)) {
		r = write_tables(q);
		if (!r)
			l = qcow2_take_frees(q);
	}
	pthread_mutex_unlock(&q->lock);
	if (r)
		return r;
	/* The slow part, which nobody has to wait for but those that flush. */
	r = sync_file(q);
	if (!r && !l.n)
		return 0;
	pthread_mutex_lock(&q->lock);
	if (r)
		r = sync_failed(q, -r);
	else
		qcow2_apply_frees(q, &l);
	pthread_mutex_unlock(&q->lock);
	free(l.v);
	return r;
}
