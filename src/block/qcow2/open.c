/* Taking an image in: header, tables, what is whose; putting it back; making one. */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/error.h"
#include "base/log.h"
#include "block/qcow2/image.h"

#define SLICE_BYTES 4096u /* of a table, cached and written at once; a page, so that a SIGKILL does not cut it in two */
#define L2_CACHE (8u << 20)
#define REFCOUNT_CACHE (1u << 20)
#define UNZIPPED_BYTES (4u << 20)

static unsigned log2_of(uint64_t v)
{
	return 63 - (unsigned)__builtin_clzll(v);
}

static int read_header(struct qcow2 *q, struct error *err)
{
	struct stat st;
	if (fstat(q->fd, &st))
		return error_set(err, errno, "%s: %s", q->what, strerror(errno));
	off_t end = lseek(q->fd, 0, SEEK_END);
	if (end < 0)
		return error_set(err, errno, "%s: %s", q->what, strerror(errno));
	q->fixed_size = !S_ISREG(st.st_mode);
	q->file_end = q->used_end = (uint64_t)end;

	uint8_t first[QCOW2_HEADER_V2];
	int r = qcow2_file_read(q->fd, first, sizeof(first), 0);
	if (r)
		return error_set(err, -r, "%s: its header cannot be read: %s", q->what, strerror(-r));
	size_t len = qcow2_head_size(first, sizeof(first));
	if (len < sizeof(first))
		len = sizeof(first);
	if (len > (uint64_t)end)
		len = (size_t)end;
	uint8_t *head = malloc(len + 1);
	if (!head)
		return error_set(err, ENOMEM, "%s: out of memory for its header", q->what);
	r = qcow2_file_read(q->fd, head, len, 0);
	if (r)
		error_set(err, -r, "%s: its header cannot be read: %s", q->what, strerror(-r));
	else
		r = qcow2_parse_header(&q->f, head, len, (uint64_t)end, q->what, err);
	free(head);
	q->fresh = q->fixed_size ? UINT64_MAX : (uint64_t)end;
	return r;
}

static int load_l1(struct qcow2 *q, struct error *err)
{
	uint64_t offset = q->f.l1_offset;
	uint32_t n = q->f.l1_size;
	q->size = q->f.size;
	if (q->p.snapshot) {
		struct qcow2_snapshot s;
		int r = qcow2_find_snapshot(q->fd, &q->f, q->p.snapshot, q->what, &s, err);
		if (r)
			return r;
		offset = s.l1_offset;
		n = s.l1_size;
		if (s.disk_size)
			q->size = s.disk_size;
	}
	uint64_t per_l1 = q->f.cluster_size << qcow2_l2_bits(&q->f);
	if (q->size > per_l1 * n)
		return error_set(err, EINVAL, "%s: the L1 table of the snapshot is too small for its disk of %" PRIu64 " bytes; the image is damaged", q->what, q->size);
	int r = qcow2_table_create(&q->l1, q->fd, offset, n);
	return r ? error_set(err, -r, "%s: its L1 table cannot be read: %s", q->what, strerror(-r)) : 0;
}

/* --- whose is what --- */

static int claim(struct qcow2 *q, uint64_t offset, uint64_t bytes, const char *for_what, struct error *err)
{
	uint64_t first = offset >> q->f.cluster_bits, n = qcow2_clusters(q, bytes);
	if (qcow2_bitmap_any(&q->meta, first, n))
		return error_set(err, EINVAL, "%s is corrupt: two tables are in one place (%s, 0x%" PRIx64 "); repair it with: qemu-img check -r all FILE, or open it with ro",
				 q->what, for_what, offset);
	qcow2_bitmap_set(&q->meta, first, n, true);
	return 0;
}

static int claim_tables(struct qcow2 *q, const struct qcow2_table *t, const char *name, struct error *err)
{
	for (uint64_t i = 0; i < t->n; i++) {
		uint64_t at = qcow2_table_offset(&q->f, t->v[i], q->file_end);
		if (at == UINT64_MAX)
			return error_set(err, EINVAL, "%s is corrupt: %s %" PRIu64 " is not in the file; repair it with: qemu-img check -r all FILE, or open it with ro",
					 q->what, name, i);
		int r = at ? claim(q, at, q->f.cluster_size, name, err) : 0;
		if (r)
			return r;
	}
	return 0;
}

/* No write may ever go to these clusters but by whom they belong to. (Snapshots' L2 tables are behind refcounts of their own.) */
static int claim_all(struct qcow2 *q, struct error *err)
{
	int r = claim(q, 0, q->f.cluster_size, "the header", err);
	if (!r && q->f.l1_size)
		r = claim(q, q->f.l1_offset, q->f.l1_size * 8ull, "the L1 table", err);
	if (!r)
		r = claim(q, q->f.reftable_offset, (uint64_t)q->f.reftable_clusters << q->f.cluster_bits, "the refcount table", err);
	if (!r && q->f.nsnapshots)
		r = claim(q, q->f.snapshots_offset, 1, "the table of snapshots", err);
	if (!r)
		r = claim_tables(q, &q->reftable, "refcount block", err);
	return r ? r : claim_tables(q, &q->l1, "L2 table", err);
}

static int load_for_writing(struct qcow2 *q, struct error *err)
{
	if (q->f.incompatible & QCOW2_INCOMPAT_CORRUPT)
		return error_set(err, EINVAL, "%s is marked corrupt; repair it with: qemu-img check -r all FILE, or open it with ro", q->what);
	uint64_t n = (uint64_t)q->f.reftable_clusters << (q->f.cluster_bits - 3);
	int r = qcow2_table_create(&q->reftable, q->fd, q->f.reftable_offset, n);
	if (r)
		return error_set(err, -r, "%s: its refcount table cannot be read: %s", q->what, strerror(-r));
	r = claim_all(q, err);
	if (!r && q->f.incompatible & QCOW2_INCOMPAT_DIRTY)
		r = qcow2_repair(q, err);
	if (!r && q->f.autoclear) {
		/* "An implementation may only write to an image with unknown auto-clear features if it clears the respective bits": bitmaps end here. */
		if (q->f.has_bitmaps)
			log_warn("%s: its dirty bitmaps are not kept up to date; they are invalid from now on", q->what);
		r = qcow2_set_header_u64(q, QCOW2_AT_AUTOCLEAR, 0);
		if (r)
			error_set(err, -r, "%s: its header cannot be written: %s", q->what, strerror(-r));
	}
	return r;
}

static int create_caches(struct qcow2 *q)
{
	size_t slice = q->f.cluster_size < SLICE_BYTES ? q->f.cluster_size : SLICE_BYTES;
	q->slice_bits = log2_of(slice / 8);
	q->rc_bits = log2_of(slice * 8) - q->f.refcount_order;
	int r = qcow2_cache_create(&q->l2, slice, q->p.l2_cache ? q->p.l2_cache : L2_CACHE);
	if (!r)
		r = qcow2_cache_create(&q->rc, slice, q->p.refcount_cache ? q->p.refcount_cache : REFCOUNT_CACHE);
	uint64_t kept = UNZIPPED_BYTES / q->f.cluster_size;
	q->nunzipped = (unsigned)(kept < 2 ? 2 : kept > QCOW2_UNZIPPED ? QCOW2_UNZIPPED : kept);
	return r;
}

static void destroy(struct qcow2 *q)
{
	qcow2_table_destroy(&q->l1);
	qcow2_table_destroy(&q->reftable);
	qcow2_cache_destroy(&q->l2);
	qcow2_cache_destroy(&q->rc);
	free(q->meta.words);
	free(q->frees[0].v);
	free(q->frees[1].v);
	for (unsigned i = 0; i < QCOW2_UNZIPPED; i++)
		free(q->unzipped[i].data);
	if (q->direct_fd >= 0)
		close(q->direct_fd);
	if (q->fd >= 0)
		close(q->fd);
	pthread_mutex_destroy(&q->lock);
	pthread_mutex_destroy(&q->map_lock);
	pthread_mutex_destroy(&q->zip_lock);
	pthread_mutex_destroy(&q->sync_lock);
	pthread_cond_destroy(&q->synced);
	pthread_cond_destroy(&q->wake);
	free(q);
}

int qcow2_open(struct qcow2 **out, int fd, int direct_fd, const struct qcow2_params *p, struct error *err)
{
	*out = NULL;
	struct qcow2 *q = calloc(1, sizeof(*q));
	if (!q) {
		close(fd);
		if (direct_fd >= 0)
			close(direct_fd);
		return error_set(err, ENOMEM, "%s: out of memory", p->what);
	}
	q->fd = fd;
	q->direct_fd = direct_fd;
	q->p = *p;
	q->epoch = 2;
	snprintf(q->what, sizeof(q->what), "%s", p->what);
	q->p.what = q->what;
	pthread_mutex_init(&q->lock, NULL);
	pthread_mutex_init(&q->map_lock, NULL);
	pthread_mutex_init(&q->zip_lock, NULL);
	pthread_mutex_init(&q->sync_lock, NULL);
	pthread_cond_init(&q->synced, NULL);
	pthread_cond_init(&q->wake, NULL);
	if (q->p.snapshot)
		q->p.read_only = true;

	int r = read_header(q, err);
	if (!r && q->direct_fd >= 0 && q->f.cluster_size < 4096) {
		/* A page would hold several clusters, and be written both ways. */
		close(q->direct_fd);
		q->direct_fd = -1;
	}
	if (!r && create_caches(q))
		r = error_set(err, ENOMEM, "%s: out of memory for its caches", q->what);
	if (!r)
		r = load_l1(q, err);
	if (!r && !q->p.read_only)
		r = load_for_writing(q, err);
	q->p.snapshot = NULL; /* the caller's */
	if (r) {
		destroy(q);
		return r;
	}
	*out = q;
	return 0;
}

void qcow2_close(struct qcow2 *q)
{
	if (!q)
		return;
	if (!q->p.read_only) {
		pthread_mutex_lock(&q->lock);
		/* Nothing is in flight: two rounds free what there is to free; a third writes that down. */
		int r = qcow2_write_back(q);
		for (int i = 0; !r && i < 3 && (q->nfrees || q->rc.ndirty); i++)
			r = qcow2_write_back(q);
		if (!r && !q->fixed_size && q->used_end < q->file_end && ftruncate(q->fd, (off_t)q->used_end))
			r = -errno;
		pthread_mutex_unlock(&q->lock);
		if (r && !atomic_load(&q->corrupt))
			log_error("%s: closing could not write everything back: %s; what the guest flushed is there", q->what, strerror(-r));
	}
	destroy(q);
}

int qcow2_make(int fd, uint64_t size, unsigned cluster_bits)
{
	struct qcow2_format f = { .version = 3, .cluster_bits = cluster_bits, .cluster_size = 1ull << cluster_bits, .size = size, .refcount_order = 4 };
	uint64_t per_l1 = f.cluster_size << qcow2_l2_bits(&f), l1_size = (size + per_l1 - 1) / per_l1;
	if (l1_size > QCOW2_MAX_L1_BYTES / 8)
		return -EFBIG;
	/* Header, refcount table, blocks for what is in use now, L1. */
	uint64_t l1_clusters = (l1_size * 8 + f.cluster_size - 1) >> cluster_bits, per_block = qcow2_block_entries(&f);
	uint64_t blocks = 1;
	while (2 + blocks + l1_clusters > blocks * per_block)
		blocks++;
	f.reftable_offset = f.cluster_size;
	f.reftable_clusters = 1;
	f.l1_size = (uint32_t)l1_size;
	f.l1_offset = (2 + blocks) << cluster_bits;
	uint64_t used = 2 + blocks + l1_clusters;
	if (blocks * 8 > f.cluster_size)
		return -EFBIG;

	uint8_t head[512];
	qcow2_make_header(head, &f);
	uint8_t *table = calloc(1, f.cluster_size), *counts = calloc(blocks, f.cluster_size);
	int r = table && counts ? 0 : -ENOMEM;
	for (uint64_t i = 0; !r && i < blocks; i++)
		qcow2_store64(table + i * 8, (2 + i) << cluster_bits);
	for (uint64_t i = 0; !r && i < used; i++)
		qcow2_set_refcount(counts, f.refcount_order, i, 1);
	if (!r && ftruncate(fd, (off_t)(used << cluster_bits)))
		r = -errno;
	if (!r)
		r = qcow2_file_write(fd, table, f.cluster_size, f.reftable_offset);
	if (!r)
		r = qcow2_file_write(fd, counts, blocks << cluster_bits, 2ull << cluster_bits);
	if (!r)
		r = qcow2_file_write(fd, head, sizeof(head), 0);
	free(table);
	free(counts);
	return r;
}
