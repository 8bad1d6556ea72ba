/*
 * The dirty bit ("incompatible_features", bit 0): somebody who writes refcounts late did not come to that. They are counted anew from what the tables
 * point to, as the specification asks for, then COPIED flags are made to agree with them. Only while opening. What is
 * beyond this (bad entries, too large) is for qemu-img, and said so.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/error.h"
#include "base/log.h"
#include "block/qcow2/image.h"

#define MAX_CLUSTERS (1ull << 26)      /* 256 MiB of counts */
#define MAX_VISITS (1ull << 30)	       /* entries looked at: seconds */

struct census {
	struct qcow2 *q;
	uint32_t *count;
	uint64_t n, visits;
	uint8_t *table; /* one cluster */
};

static int count_range(struct census *c, uint64_t host, uint64_t len)
{
	uint64_t first = host >> c->q->f.cluster_bits, last = (host + len - 1) >> c->q->f.cluster_bits;
	if (last >= c->n)
		return -EINVAL;
	for (; first <= last; first++) {
		if (c->count[first] == UINT32_MAX)
			return -EINVAL;
		c->count[first]++;
	}
	return 0;
}

static int count_l2(struct census *c, uint64_t host)
{
	struct qcow2 *q = c->q;
	uint64_t n = qcow2_l2_entries(&q->f);
	c->visits += n;
	if (c->visits > MAX_VISITS)
		return -E2BIG;
	int r = qcow2_file_read(q->fd, c->table, q->f.cluster_size, host);
	for (uint64_t i = 0; !r && i < n; i++) {
		struct qcow2_entry e = qcow2_decode(&q->f, qcow2_load64(c->table + i * 8), q->file_end);
		if (e.kind == QCOW2_KIND_BAD)
			return -EINVAL;
		if (e.kind == QCOW2_KIND_COMPRESSED)
			r = count_range(c, e.host, e.host + e.csize > c->n << q->f.cluster_bits ? 1 : e.csize);
		else if (e.host)
			r = count_range(c, e.host, q->f.cluster_size);
	}
	return r;
}

static int count_l1(struct census *c, const struct qcow2_table *l1, uint64_t offset)
{
	int r = l1->n ? count_range(c, offset, l1->n * 8) : 0;
	for (uint64_t i = 0; !r && i < l1->n; i++) {
		uint64_t at = qcow2_table_offset(&c->q->f, l1->v[i], c->q->file_end);
		if (!at)
			continue;
		if (at == UINT64_MAX)
			return -EINVAL;
		r = count_range(c, at, c->q->f.cluster_size);
		if (!r)
			r = count_l2(c, at);
	}
	return r;
}

static int count_snapshots(struct census *c)
{
	struct qcow2 *q = c->q;
	if (!q->f.nsnapshots)
		return 0;
	uint64_t len = q->file_end - q->f.snapshots_offset;
	if (len > QCOW2_MAX_SNAPSHOT_TABLE_BYTES)
		len = QCOW2_MAX_SNAPSHOT_TABLE_BYTES;
	uint8_t *table = malloc(len);
	if (!table)
		return -ENOMEM;
	size_t at = 0;
	int r = qcow2_file_read(q->fd, table, len, q->f.snapshots_offset);
	for (uint32_t i = 0; !r && i < q->f.nsnapshots; i++) {
		struct qcow2_snapshot s;
		struct qcow2_table l1;
		r = qcow2_parse_snapshot(&s, table, len, &at, &q->f, q->file_end);
		if (r)
			break;
		c->visits += s.l1_size;
		if (c->visits > MAX_VISITS) {
			r = -E2BIG;
			break;
		}
		r = qcow2_table_create(&l1, q->fd, s.l1_offset, s.l1_size);
		if (!r) {
			r = count_l1(c, &l1, s.l1_offset);
			qcow2_table_destroy(&l1);
		}
	}
	if (!r)
		r = count_range(c, q->f.snapshots_offset, at);
	free(table);
	return r;
}

static int take_census(struct census *c)
{
	struct qcow2 *q = c->q;
	int r = count_range(c, 0, q->f.cluster_size);
	if (!r)
		r = count_range(c, q->f.reftable_offset, (uint64_t)q->f.reftable_clusters << q->f.cluster_bits);
	for (uint64_t i = 0; !r && i < q->reftable.n; i++) {
		uint64_t at = q->reftable.v[i] & QCOW2_OFFSET_MASK;
		if (!at)
			continue;
		r = count_range(c, at, q->f.cluster_size);
		/* Each of its counts will be compared: a few GiB of holes can be blocks for 2^40. */
		c->visits += qcow2_block_entries(&q->f);
		if (!r && c->visits > MAX_VISITS)
			r = -E2BIG;
	}
	if (!r)
		r = count_l1(c, &q->l1, q->f.l1_offset);
	return r ? r : count_snapshots(c);
}

/* A block that is missing goes where nothing is, among the clusters that it counts. */
static int missing_block(struct census *c, uint64_t block)
{
	struct qcow2 *q = c->q;
	uint64_t first = block * qcow2_block_entries(&q->f), end = first + qcow2_block_entries(&q->f);
	for (uint64_t i = first; i < end && i < c->n && block < q->reftable.n; i++) {
		if (c->count[i])
			continue;
		memset(c->table, 0, q->f.cluster_size);
		int r = qcow2_file_write(q->fd, c->table, q->f.cluster_size, i << q->f.cluster_bits);
		if (r)
			return r;
		c->count[i] = 1;
		qcow2_bitmap_set(&q->meta, i, 1, true);
		qcow2_table_set(&q->reftable, block, i << q->f.cluster_bits);
		return 0;
	}
	return -ENOSPC;
}

static int set_counts(struct census *c, uint64_t *changed)
{
	struct qcow2 *q = c->q;
	uint64_t per_block = qcow2_block_entries(&q->f), end = q->reftable.n * per_block;
	for (uint64_t i = 0; i < c->n || i < end; i++) {
		uint64_t block = i / per_block, want = i < c->n ? c->count[i] : 0, have;
		if (!(i % per_block)) {
			bool needed = false;
			for (uint64_t k = i; k < i + per_block && k < c->n; k++)
				needed |= c->count[k];
			bool there = block < q->reftable.n && q->reftable.v[block] & QCOW2_OFFSET_MASK;
			if (!there && needed) {
				int r = missing_block(c, block);
				if (r)
					return r;
				want = i < c->n ? c->count[i] : 0;
			} else if (!there) {
				i += per_block - 1;
				continue;
			}
		}
		int r = qcow2_get_count(q, i, &have);
		if (!r && have != want) {
			++*changed;
			r = qcow2_set_count(q, i, want);
		}
		if (r)
			return r;
	}
	return 0;
}

/* COPIED says that the refcount is one. Entries of shared tables say nothing. */
static int set_copied(struct census *c)
{
	struct qcow2 *q = c->q;
	for (uint64_t i = 0; i < q->l1.n; i++) {
		uint64_t at = q->l1.v[i] & QCOW2_OFFSET_MASK;
		if (!at)
			continue;
		bool own = c->count[at >> q->f.cluster_bits] == 1;
		if (own != !!(q->l1.v[i] & QCOW2_COPIED))
			qcow2_table_set(&q->l1, i, at | (own ? QCOW2_COPIED : 0));
		if (!own)
			continue;
		int r = qcow2_file_read(q->fd, c->table, q->f.cluster_size, at);
		bool changed = false;
		for (uint64_t k = 0; !r && k < qcow2_l2_entries(&q->f); k++) {
			uint64_t entry = qcow2_load64(c->table + k * 8), host = entry & QCOW2_OFFSET_MASK;
			if (entry & QCOW2_COMPRESSED || !host)
				continue;
			bool once = c->count[host >> q->f.cluster_bits] == 1;
			if (once == !!(entry & QCOW2_COPIED))
				continue;
			qcow2_store64(c->table + k * 8, once ? entry | QCOW2_COPIED : entry & ~QCOW2_COPIED);
			changed = true;
		}
		if (!r && changed)
			r = qcow2_file_write(q->fd, c->table, q->f.cluster_size, at);
		if (r)
			return r;
	}
	return 0;
}

int qcow2_repair(struct qcow2 *q, struct error *err)
{
	struct census c = { .q = q, .n = qcow2_clusters(q, q->file_end) };
	uint64_t changed = 0;
	int r = q->f.has_bitmaps ? -ENOTSUP : c.n > MAX_CLUSTERS ? -E2BIG : 0;
	uint64_t whole = c.n << q->f.cluster_bits; /* a new refcount block may be the last cluster */
	if (!r && whole > q->file_end && !q->fixed_size) {
		r = ftruncate(q->fd, (off_t)whole) ? -errno : 0;
		if (!r)
			q->file_end = q->used_end = whole;
	}
	if (!r) {
		c.count = calloc(c.n + 1, sizeof(*c.count));
		c.table = malloc(q->f.cluster_size);
		r = c.count && c.table ? take_census(&c) : -ENOMEM;
	}
	if (!r)
		r = set_counts(&c, &changed);
	/* Refcounts that rise go before flags that let their clusters be written. */
	if (!r)
		r = qcow2_write_back(q);
	if (!r)
		r = set_copied(&c);
	if (!r) {
		atomic_store(&q->dirty, true);
		r = qcow2_write_back(q);
	}
	if (!r)
		r = qcow2_set_header_u64(q, QCOW2_AT_INCOMPATIBLE, q->f.incompatible & ~QCOW2_INCOMPAT_DIRTY);
	free(c.count);
	free(c.table);
	q->free_hint = 0;
	if (r)
		return error_set(err, -r, "%s was not closed properly, and its refcounts cannot be repaired here (%s); repair it with: qemu-img check -r all FILE, or open it with ro", q->what,
				 r == -EINVAL ? "it is corrupt" : strerror(-r));
	log_info("%s was not closed properly: %" PRIu64 " refcounts are repaired", q->what, changed);
	return 0;
}
