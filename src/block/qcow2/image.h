/*
 * One open qcow2 image: its tables in memory, and the synchronous operations on it. Inside qcow2/ only.
 *
 * Any thread may call the operations, several at once. Two locks, taken in this order:
 *   lock      tables and their caches; held across metadata I/O, so never by the device lock's holder
 *   map_lock  what the fast path looks at (L1, L2 slices, the map of metadata); held for moments, never across I/O
 * Whoever changes what map_lock covers holds both. Data is read and written with neither.
 *
 * Order on disk. Refcounts that rise are durable before a table that uses the cluster (refcounts, refcount table, then L2, then L1), data
 * is in the file before the L2 entry that shows it, and refcounts fall only after the entries that went away are durable. So at any moment the
 * file is free of corruption; at worst clusters are leaked. All tables are written at a flush, at closing, or when a cache is full of changes.
 *
 * A cluster that was freed is used again only after all I/O that may have looked up its old place is done: epochs, see qcow2_enter.
 */
#ifndef TRAPLINE_BLOCK_QCOW2_IMAGE_H
#define TRAPLINE_BLOCK_QCOW2_IMAGE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <sys/uio.h>

#include "block/qcow2/cache.h"
#include "block/qcow2/format.h"

/* A set of host clusters. */
struct qcow2_bitmap {
	uint64_t *words;
	uint64_t nwords;
};

/* Host clusters whose refcount falls by one, when that is safe. */
struct qcow2_frees {
	struct qcow2_extent {
		uint64_t cluster, n;
	} *v;
	size_t n, room;
};

/* Guest clusters that a thread is allocating: it holds no lock while it writes their data. */
struct qcow2_alloc {
	uint64_t first, n;
	struct qcow2_alloc *next;
};

/* Where the cluster is, that a table made of clusters lies in; `dirty` has a bit for each 512 entries, 4 KiB. */
struct qcow2_table {
	uint64_t *v; /* host byte order */
	uint64_t n;
	uint64_t *dirty;
	bool any_dirty;
};

#define QCOW2_UNZIPPED 8 /* decompressed clusters that are kept, at most */

struct qcow2_unzipped {
	uint64_t host; /* 0: none */
	uint8_t *data;
	uint64_t age;
};

struct qcow2;

struct qcow2_params {
	bool read_only;
	bool unsafe;	/* no fdatasync */
	bool direct;	/* whole pages of data by O_DIRECT */
	bool punch;	/* give freed clusters back to the file system */
	const char *what; /* "--disk: /path", begins sentences */
	const char *snapshot; /* NULL: the active state */
	size_t l2_cache, refcount_cache; /* bytes; 0: default */
};

struct qcow2 {
	struct qcow2_format f; /* [I] but reftable_offset, reftable_clusters, incompatible [lock] */
	struct qcow2_params p; /* [I] */
	char what[600];	       /* [I] */
	int fd, direct_fd;     /* [I] direct_fd -1: none */
	uint64_t size;	       /* [I] of the guest's disk; a snapshot's may differ from f.size */
	unsigned slice_bits, rc_bits; /* [I] log2 of entries in an L2 slice, of refcounts in a refcount slice */
	bool fixed_size;       /* [I] a block device */

	/* What unallocated clusters show; NULL: zeroes. [I] after opening. */
	int (*backing_read)(void *opaque, void *buf, uint64_t len, uint64_t offset);
	void *backing_opaque;
	uint64_t backing_size;

	pthread_mutex_t lock;
	pthread_cond_t wake; /* an allocation ended */

	struct qcow2_table l1;	     /* [lock and map_lock to write, either to read] */
	struct qcow2_cache l2;	     /* [same]; number: guest cluster >> slice_bits */
	struct qcow2_bitmap meta;    /* [same] clusters of header, tables, refcount blocks, snapshots: never data's */
	_Atomic uint64_t file_end;   /* [lock to write] */
	pthread_mutex_t map_lock;

	struct qcow2_table reftable; /* [lock] */
	struct qcow2_cache rc;	     /* [lock]; number: host cluster >> rc_bits */
	uint64_t free_hint;	     /* [lock] no free cluster below this one */
	uint64_t used_end;	     /* [lock] bytes; nothing in use at or above it, but what the file had at opening */
	uint64_t fresh;		     /* [lock] bytes; from here to the end of the file nothing was ever written: it reads as zeroes */
	struct qcow2_alloc *allocs;  /* [lock] */
	bool growing;		     /* [lock] the refcount table */
	int failed;		     /* [lock] an fdatasync failed: what was flushed is unknown from then on */

	pthread_mutex_t sync_lock; /* innermost */
	pthread_cond_t synced;
	uint64_t syncs_begun, syncs_done; /* [sync_lock] they differ while one is under way */
	int sync_error;			  /* [sync_lock] of the first that failed */

	unsigned epoch;			/* [map_lock] */
	atomic_uint inflight[2];	/* I/O begun in an even, odd epoch */
	struct qcow2_frees frees[2];	/* [lock] by epoch */
	size_t nfrees;			/* [lock] extents in both */

	atomic_bool dirty;   /* a flush has tables to write or clusters to free */
	atomic_bool corrupt; /* no more writes */
	atomic_bool told;    /* the log line about it */

	pthread_mutex_t zip_lock;
	struct qcow2_unzipped unzipped[QCOW2_UNZIPPED]; /* [zip_lock] */
	unsigned nunzipped;				/* [I] */
	uint64_t zip_age;				/* [zip_lock] */
};

/* Take an image in open files (both are closed by qcow2_close, or on failure). Repairs refcounts of one with the dirty bit. */
int qcow2_open(struct qcow2 **out, int fd, int direct_fd, const struct qcow2_params *p, struct error *err);
/* Writes back everything. Nothing is in flight. */
void qcow2_close(struct qcow2 *q);
/* A new empty version 3 image in an empty file. */
int qcow2_make(int fd, uint64_t size, unsigned cluster_bits);

/* Whole ranges of the guest's disk; 0 or -errno. Writes by parts: after an error some may be done. */
int qcow2_read(struct qcow2 *q, const struct iovec *iov, unsigned niov, uint64_t offset, uint64_t len);
int qcow2_write(struct qcow2 *q, const struct iovec *iov, unsigned niov, uint64_t offset, uint64_t len);
int qcow2_write_zeroes(struct qcow2 *q, uint64_t offset, uint64_t len, bool unmap);
int qcow2_discard(struct qcow2 *q, uint64_t offset, uint64_t len);
int qcow2_flush(struct qcow2 *q);

/* --- mapping (map.c) --- */

/* A piece of the guest's disk of one kind: `host` is the place of its first byte (NORMAL), of the whole cluster (else). Contiguous. */
struct qcow2_run {
	struct qcow2_entry e; /* of its first cluster */
	uint64_t host, len;
};

/* map_lock or lock held. False: the L2 slice is not in memory; qcow2_map loads it. For writes metadata in the way makes it BAD. */
bool qcow2_lookup(struct qcow2 *q, uint64_t offset, uint64_t len, bool write, struct qcow2_run *run);
/* lock held. */
int qcow2_map(struct qcow2 *q, uint64_t offset, uint64_t len, bool write, struct qcow2_run *run);
/* The L2 slice of a guest cluster that has an L2 table; lock held. */
int qcow2_l2_slice(struct qcow2 *q, uint64_t cluster, struct qcow2_slice **out);
/* Make sure that the L2 table of a guest cluster is there and ours alone; lock held. */
int qcow2_own_l2(struct qcow2 *q, uint64_t cluster);
/* Change the entry of a guest cluster, whose L2 table is ours alone. lock held. */
void qcow2_set_entry(struct qcow2 *q, struct qcow2_slice *s, uint64_t cluster, uint64_t entry);

/* Around I/O to host clusters found by a mapping: enter with map_lock or lock held, before it is let go. */
static inline unsigned qcow2_enter(struct qcow2 *q)
{
	unsigned e = q->epoch & 1;
	atomic_fetch_add(&q->inflight[e], 1);
	return e;
}

static inline void qcow2_leave(struct qcow2 *q, unsigned e)
{
	atomic_fetch_sub(&q->inflight[e], 1);
}

/* --- host clusters (refcount.c); lock held --- */

/* One run of at most `want` free clusters, its refcounts now one; `exact`: all of them. The file reaches to its end. *zeroed: it reads as zeroes. */
int qcow2_alloc_clusters(struct qcow2 *q, uint64_t want, bool exact, uint64_t *host, uint64_t *got, bool *zeroed);
/* Take back what nothing ever pointed to. */
void qcow2_unalloc(struct qcow2 *q, uint64_t host, uint64_t n);
/* Refcounts of the clusters of [host, host + len) fall by one after the next flush. */
void qcow2_free_later(struct qcow2 *q, uint64_t host, uint64_t len);
/* What may be freed once the tables, which were written just now, are synced; then free it. */
struct qcow2_frees qcow2_take_frees(struct qcow2 *q);
void qcow2_apply_frees(struct qcow2 *q, const struct qcow2_frees *l);
int qcow2_write_refcounts(struct qcow2 *q); /* the dirty slices; not synced */
int qcow2_get_count(struct qcow2 *q, uint64_t cluster, uint64_t *count);
int qcow2_set_count(struct qcow2 *q, uint64_t cluster, uint64_t count);
/* Where a refcount slice lies; 0: its block does not exist; UINT64_MAX: a bad entry. */
uint64_t qcow2_rc_place(const struct qcow2 *q, uint64_t number);

/* --- writing back (flush.c) --- */

int qcow2_write_back(struct qcow2 *q); /* lock held */
int qcow2_sync(struct qcow2 *q);
int qcow2_set_header_u64(struct qcow2 *q, unsigned at, uint64_t value); /* lock held, or opening; written and synced */

/* Read a table of `n` entries at `offset`, or one of zeroes (fd -1). */
int qcow2_table_create(struct qcow2_table *t, int fd, uint64_t offset, uint64_t n);
int qcow2_table_grow(struct qcow2_table *t, uint64_t n);
int qcow2_table_write(struct qcow2_table *t, int fd, uint64_t offset, bool all);
void qcow2_table_destroy(struct qcow2_table *t);
void qcow2_table_set(struct qcow2_table *t, uint64_t i, uint64_t v);

/* --- repair (repair.c) --- */

int qcow2_repair(struct qcow2 *q, struct error *err); /* opening: refcounts from the tables, then the dirty bit goes */

/* --- compressed clusters (compress.c) --- */

/* Part of the compressed cluster that `e` describes. */
int qcow2_read_compressed(struct qcow2 *q, const struct qcow2_entry *e, const struct iovec *iov, unsigned niov, uint64_t in_cluster, uint64_t len);
/* Pure: all of `out`, or -EIO. */
int qcow2_inflate(unsigned compression, uint8_t *out, size_t outlen, const uint8_t *in, size_t inlen);

/* --- snapshots (snapshot.c) --- */

/* -ENOENT with a sentence that lists what there is. */
int qcow2_find_snapshot(int fd, const struct qcow2_format *f, const char *name, const char *what, struct qcow2_snapshot *out, struct error *err);

/* --- small things (util.c) --- */

/* All of it, or -errno; a read past the end of the file gives zeroes. */
int qcow2_file_read(int fd, void *buf, size_t len, uint64_t offset);
int qcow2_file_write(int fd, const void *buf, size_t len, uint64_t offset);
int qcow2_file_readv(int fd, const struct iovec *iov, unsigned niov, uint64_t offset);
int qcow2_file_writev(int fd, const struct iovec *iov, unsigned niov, uint64_t offset);
/* The file for data I/O of these bytes: by O_DIRECT only whole pages, so that pages never mix both ways. */
int qcow2_data_fd(const struct qcow2 *q, const struct iovec *iov, unsigned niov, uint64_t offset, uint64_t len);

/* The part [offset, offset + len) of an iovec; `out` has room for niov. Returns how many. */
unsigned qcow2_iov_slice(struct iovec *out, const struct iovec *iov, unsigned niov, uint64_t offset, uint64_t len);
void qcow2_iov_fill(const struct iovec *iov, unsigned niov, uint64_t offset, const void *from, uint64_t len); /* from NULL: zeroes */

void qcow2_bitmap_set(struct qcow2_bitmap *b, uint64_t first, uint64_t n, bool on);
bool qcow2_bitmap_any(const struct qcow2_bitmap *b, uint64_t first, uint64_t n);

/* A log line, and one more at most when it ends writing (`writes`, lock held), which the corrupt bit tells others. Returns -EIO. */
int qcow2_corrupt(struct qcow2 *q, bool writes, const char *fmt, ...) __attribute__((format(printf, 3, 4)));

static inline uint64_t qcow2_clusters(const struct qcow2 *q, uint64_t bytes)
{
	return (bytes + q->f.cluster_size - 1) >> q->f.cluster_bits;
}

#endif
