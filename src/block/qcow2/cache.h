/*
 * A cache of equal slices of tables (L2 tables, refcount blocks) with a limit, pure: it does no I/O and takes no lock; its user does both. Slices
 * have a number of the user's choice. A dirty slice is never taken for another one; writing back is the user's.
 */
#ifndef TRAPLINE_BLOCK_QCOW2_CACHE_H
#define TRAPLINE_BLOCK_QCOW2_CACHE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct qcow2_slice {
	uint64_t number;
	uint8_t *data; /* NULL until first used */
	uint32_t chain; /* next in the hash chain: index + 1 */
	bool valid, dirty, used;
};

struct qcow2_cache {
	size_t slice_size;
	uint32_t n, hand, ndirty, nbuckets; /* nbuckets: a power of two */
	struct qcow2_slice *slices;
	uint32_t *buckets;
};

/* About `bytes` of slices. 0 or -ENOMEM. */
int qcow2_cache_create(struct qcow2_cache *c, size_t slice_size, size_t bytes);
void qcow2_cache_destroy(struct qcow2_cache *c);

/* NULL: not there. */
struct qcow2_slice *qcow2_cache_find(struct qcow2_cache *c, uint64_t number);
/* A slice to fill: out of the cache, with memory, not found by any number. NULL: no memory, or too many are dirty: write back, then ask again. */
struct qcow2_slice *qcow2_cache_take(struct qcow2_cache *c);
/* What qcow2_cache_take gave is now slice `number`. */
void qcow2_cache_put(struct qcow2_cache *c, struct qcow2_slice *s, uint64_t number);
void qcow2_cache_dirty(struct qcow2_cache *c, struct qcow2_slice *s);
void qcow2_cache_clean(struct qcow2_cache *c, struct qcow2_slice *s);
/* Many slices are dirty: time to write back. */
bool qcow2_cache_full(const struct qcow2_cache *c);

#endif
