/* From the guest's clusters to the host's: L1, L2 slices, and the runs that the fast path and the workers go by. */
#include "block/qcow2/image.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

static uint64_t slice_entries(const struct qcow2 *q)
{
	return 1ull << q->slice_bits;
}

static bool in_metadata(const struct qcow2 *q, uint64_t host)
{
	return qcow2_bitmap_any(&q->meta, host >> q->f.cluster_bits, 1);
}

static struct qcow2_entry entry_at(const struct qcow2 *q, const struct qcow2_slice *s, uint64_t i, uint64_t end, bool write)
{
	struct qcow2_entry e = qcow2_decode(&q->f, qcow2_load64(s->data + i * 8), end);
	/* What a guest may write in place is data: an entry that leads to a table would let it forge the whole image. */
	if (write && e.copied && in_metadata(q, e.host))
		e.kind = QCOW2_KIND_BAD;
	return e;
}

static bool continues(const struct qcow2 *q, const struct qcow2_entry *first, const struct qcow2_entry *e, uint64_t n, bool write)
{
	if (e->kind != first->kind)
		return false;
	switch (e->kind) {
	case QCOW2_KIND_UNALLOCATED:
		return true;
	case QCOW2_KIND_ZERO:
		if (!write || (!first->host && !e->host))
			return true;
		break;
	case QCOW2_KIND_NORMAL:
		break;
	case QCOW2_KIND_COMPRESSED:
	case QCOW2_KIND_BAD:
		return false;
	}
	return e->host == first->host + (n << q->f.cluster_bits) && (!write || e->copied == first->copied);
}

bool qcow2_lookup(struct qcow2 *q, uint64_t offset, uint64_t len, bool write, struct qcow2_run *run)
{
	uint64_t cluster = offset >> q->f.cluster_bits, in_cluster = offset & (q->f.cluster_size - 1);
	uint64_t l1_index = cluster >> qcow2_l2_bits(&q->f), end = atomic_load_explicit(&q->file_end, memory_order_relaxed);
	*run = (struct qcow2_run){ .e.kind = QCOW2_KIND_BAD };
	if (l1_index >= q->l1.n) {
		run->len = len;
		return true;
	}
	uint64_t table = qcow2_table_offset(&q->f, q->l1.v[l1_index], end);
	if (!table || table == UINT64_MAX) {
		uint64_t n = 1;
		uint64_t per_l1 = q->f.cluster_size << qcow2_l2_bits(&q->f), in_l1 = offset & (per_l1 - 1);
		while (!table && n * per_l1 - in_l1 < len && l1_index + n < q->l1.n && !(q->l1.v[l1_index + n] & QCOW2_OFFSET_MASK))
			n++;
		run->e.kind = table ? QCOW2_KIND_BAD : QCOW2_KIND_UNALLOCATED;
		run->len = n * per_l1 - in_l1 < len ? n * per_l1 - in_l1 : len;
		return true;
	}
	struct qcow2_slice *s = qcow2_cache_find(&q->l2, cluster >> q->slice_bits);
	if (!s)
		return false;
	uint64_t i = cluster & (slice_entries(q) - 1), n = 1;
	run->e = entry_at(q, s, i, end, write);
	run->host = run->e.host + (run->e.kind == QCOW2_KIND_NORMAL ? in_cluster : 0);
	while (i + n < slice_entries(q) && (n << q->f.cluster_bits) - in_cluster < len) {
		struct qcow2_entry e = entry_at(q, s, i + n, end, write);
		if (!continues(q, &run->e, &e, n, write))
			break;
		n++;
	}
	uint64_t bytes = (n << q->f.cluster_bits) - in_cluster;
	run->len = bytes < len ? bytes : len;
	return true;
}

int qcow2_l2_slice(struct qcow2 *q, uint64_t cluster, struct qcow2_slice **out)
{
	uint64_t number = cluster >> q->slice_bits;
	for (unsigned tries = 0; tries < 2; tries++) {
		pthread_mutex_lock(&q->map_lock);
		struct qcow2_slice *s = qcow2_cache_find(&q->l2, number);
		bool there = s;
		if (!s && !qcow2_cache_full(&q->l2))
			s = qcow2_cache_take(&q->l2);
		pthread_mutex_unlock(&q->map_lock);
		*out = s;
		if (there)
			return 0;
		if (!s) {
			/* Too many changes: put them where they belong. */
			int r = q->l2.ndirty ? qcow2_write_back(q) : -ENOMEM;
			if (r)
				return r;
			continue;
		}
		uint64_t table = qcow2_table_offset(&q->f, q->l1.v[cluster >> qcow2_l2_bits(&q->f)], q->file_end);
		if (!table || table == UINT64_MAX)
			return qcow2_corrupt(q, false, "an L1 entry leads out of the file");
		uint64_t at = (cluster & (qcow2_l2_entries(&q->f) - 1)) >> q->slice_bits;
		int r = qcow2_file_read(q->fd, s->data, q->l2.slice_size, table + at * q->l2.slice_size);
		if (r)
			return r;
		pthread_mutex_lock(&q->map_lock);
		qcow2_cache_put(&q->l2, s, number);
		pthread_mutex_unlock(&q->map_lock);
		return 0;
	}
	return -ENOMEM;
}

int qcow2_map(struct qcow2 *q, uint64_t offset, uint64_t len, bool write, struct qcow2_run *run)
{
	/* Only `used` marks of slices are changed by lookups; they are map_lock's too. */
	for (;;) {
		pthread_mutex_lock(&q->map_lock);
		bool known = qcow2_lookup(q, offset, len, write, run);
		pthread_mutex_unlock(&q->map_lock);
		if (known)
			break;
		struct qcow2_slice *s;
		int r = qcow2_l2_slice(q, offset >> q->f.cluster_bits, &s);
		if (r)
			return r;
	}
	if (run->e.kind == QCOW2_KIND_BAD)
		return qcow2_corrupt(q, write, "the entry for the guest's offset 0x%" PRIx64 " is wrong", offset);
	return 0;
}

/* Zeroes are written as well: a flush must not find the disk full. */
static int new_table_contents(struct qcow2 *q, uint64_t old, uint64_t host)
{
	uint8_t *buf = calloc(1, q->f.cluster_size);
	if (!buf)
		return -ENOMEM;
	int r = old ? qcow2_file_read(q->fd, buf, q->f.cluster_size, old) : 0;
	if (!r)
		r = qcow2_file_write(q->fd, buf, q->f.cluster_size, host);
	free(buf);
	return r;
}

int qcow2_own_l2(struct qcow2 *q, uint64_t cluster)
{
	uint64_t i = cluster >> qcow2_l2_bits(&q->f), entry = q->l1.v[i];
	uint64_t old = qcow2_table_offset(&q->f, entry, q->file_end);
	if (old == UINT64_MAX)
		return qcow2_corrupt(q, true, "an L1 entry leads out of the file");
	if (old && entry & QCOW2_COPIED)
		return 0;
	uint64_t host, got;
	bool zeroed;
	int r = qcow2_alloc_clusters(q, 1, true, &host, &got, &zeroed);
	if (r)
		return r;
	r = new_table_contents(q, old, host);
	if (r) {
		qcow2_unalloc(q, host, 1);
		return r;
	}
	/* Slices of a shared table are clean, and what they hold is what the copy holds. */
	pthread_mutex_lock(&q->map_lock);
	qcow2_bitmap_set(&q->meta, host >> q->f.cluster_bits, 1, true);
	if (old)
		qcow2_bitmap_set(&q->meta, old >> q->f.cluster_bits, 1, false);
	qcow2_table_set(&q->l1, i, host | QCOW2_COPIED);
	pthread_mutex_unlock(&q->map_lock);
	atomic_store(&q->dirty, true);
	if (old)
		qcow2_free_later(q, old, q->f.cluster_size);
	return 0;
}

void qcow2_set_entry(struct qcow2 *q, struct qcow2_slice *s, uint64_t cluster, uint64_t entry)
{
	pthread_mutex_lock(&q->map_lock);
	qcow2_store64(s->data + (cluster & (slice_entries(q) - 1)) * 8, entry);
	qcow2_cache_dirty(&q->l2, s);
	pthread_mutex_unlock(&q->map_lock);
	atomic_store(&q->dirty, true);
}
