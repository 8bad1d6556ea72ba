/*
 * The qcow2 format, pure: header, table entries, refcounts, snapshot table. Bytes in, checked values out; no file descriptors, no
 * allocation, no state. Any thread. What is checked here is all that can be checked without reading more of the file.
 *
 * Sections named in comments are those of QEMU's docs/interop/qcow2.rst, the public specification.
 */
#ifndef TRAPLINE_BLOCK_QCOW2_FORMAT_H
#define TRAPLINE_BLOCK_QCOW2_FORMAT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct error;

#define QCOW2_MAGIC 0x514649fbu
#define QCOW2_HEADER_V2 72
#define QCOW2_HEADER_V3 104
#define QCOW2_MIN_CLUSTER_BITS 9
#define QCOW2_MAX_CLUSTER_BITS 21

/* The limits of QEMU, so that what it makes opens here; they bound our memory too. */
#define QCOW2_MAX_L1_BYTES (32u << 20)
#define QCOW2_MAX_REFTABLE_BYTES (8u << 20)
#define QCOW2_MAX_SNAPSHOTS 65536u
#define QCOW2_MAX_SNAPSHOT_TABLE_BYTES (64u << 20)
#define QCOW2_MAX_HOST (1ull << 56) /* bits 9-55 of table entries */

#define QCOW2_INCOMPAT_DIRTY (1ull << 0)
#define QCOW2_INCOMPAT_CORRUPT (1ull << 1)
#define QCOW2_INCOMPAT_DATA_FILE (1ull << 2)
#define QCOW2_INCOMPAT_COMPRESSION (1ull << 3)
#define QCOW2_INCOMPAT_EXTENDED_L2 (1ull << 4)
#define QCOW2_COMPAT_LAZY_REFCOUNTS (1ull << 0)

enum { QCOW2_COMPRESSION_DEFLATE, QCOW2_COMPRESSION_ZSTD };

/* Offsets of header fields that are rewritten in place. */
enum {
	QCOW2_AT_REFTABLE = 48, /* u64 offset, u32 clusters */
	QCOW2_AT_INCOMPATIBLE = 72,
	QCOW2_AT_AUTOCLEAR = 88,
};

struct qcow2_format {
	unsigned version;      /* 2 or 3 */
	unsigned cluster_bits; /* 9..21 */
	uint64_t cluster_size;
	uint64_t size; /* of the virtual disk; a multiple of 512 */
	uint64_t l1_offset, reftable_offset, snapshots_offset;
	uint32_t l1_size; /* entries */
	uint32_t reftable_clusters, nsnapshots;
	uint64_t incompatible, compatible, autoclear;
	unsigned refcount_order; /* 0..6 */
	unsigned compression;
	bool has_bitmaps;
	char backing[1024]; /* "" if none */
	char backing_format[32]; /* "" if it does not say */
};

/*
 * Parse and check the first `len` bytes of a file of `file_size` bytes: the first cluster, or all there is of it. `what` begins the
 * sentence ("--disk: /path"). Refuses what cannot be read correctly: encryption, data files, extended L2 entries, unknown incompatible features. 0,
 * -EINVAL or -ENOTSUP.
 */
int qcow2_parse_header(struct qcow2_format *f, const uint8_t *head, size_t len, uint64_t file_size, const char *what, struct error *err);

/* How many bytes of the head qcow2_parse_header wants, from the first 72: one cluster, or 0 if this is no qcow2. */
size_t qcow2_head_size(const uint8_t *head, size_t len);

/* The header and extensions of a new version 3 image without backing file name, in `head` of 512 bytes (zeroed here). */
void qcow2_make_header(uint8_t *head, const struct qcow2_format *f);

/* --- tables --- */

#define QCOW2_COPIED (1ull << 63)
#define QCOW2_COMPRESSED (1ull << 62)
#define QCOW2_ZERO (1ull << 0)
#define QCOW2_OFFSET_MASK 0x00fffffffffffe00ull

enum qcow2_kind {
	QCOW2_KIND_UNALLOCATED,	   /* the backing file, or zeroes */
	QCOW2_KIND_ZERO,	   /* zeroes; host != 0: and has a cluster that may be used again */
	QCOW2_KIND_NORMAL,
	QCOW2_KIND_COMPRESSED,
	QCOW2_KIND_BAD, /* no valid entry; nothing may be read or written by it */
};

struct qcow2_entry {
	enum qcow2_kind kind;
	bool copied;   /* refcount is one: may be written in place */
	uint64_t host; /* bytes in the file */
	uint32_t csize; /* COMPRESSED: bytes from host to the end of its last sector */
};

/* Guest clusters that one L2 table describes. */
static inline uint64_t qcow2_l2_entries(const struct qcow2_format *f)
{
	return f->cluster_size / 8;
}

static inline unsigned qcow2_l2_bits(const struct qcow2_format *f)
{
	return f->cluster_bits - 3;
}

/* Refcounts in one block. */
static inline uint64_t qcow2_block_entries(const struct qcow2_format *f)
{
	return f->cluster_size * 8 >> f->refcount_order;
}

/* What an L2 entry says. Host clusters at or past `file_end` are BAD. */
struct qcow2_entry qcow2_decode(const struct qcow2_format *f, uint64_t entry, uint64_t file_end);

/* The table that an L1 or refcount table entry points to: 0 none, UINT64_MAX a bad entry. */
uint64_t qcow2_table_offset(const struct qcow2_format *f, uint64_t entry, uint64_t file_end);

/* Refcount number `i` of a block. Values are at most qcow2_refcount_max. */
uint64_t qcow2_get_refcount(const uint8_t *block, unsigned order, uint64_t i);
void qcow2_set_refcount(uint8_t *block, unsigned order, uint64_t i, uint64_t value);

static inline uint64_t qcow2_refcount_max(unsigned order)
{
	return order >= 6 ? UINT64_MAX : (1ull << (1u << order)) - 1;
}

/* --- snapshots --- */

struct qcow2_snapshot {
	uint64_t l1_offset;
	uint32_t l1_size;
	uint32_t date_sec;
	uint64_t vm_clock_ns, vm_state_size;
	uint64_t disk_size; /* 0: not recorded, that of the image */
	char id[64], name[256]; /* cut to fit */
};

/* The entry at *at of a snapshot table of which `len` bytes are there; *at moves to the next. 0, or -EINVAL: it ends too early or is wrong. */
int qcow2_parse_snapshot(struct qcow2_snapshot *s, const uint8_t *table, size_t len, size_t *at, const struct qcow2_format *f,
			 uint64_t file_size);

static inline uint64_t qcow2_load64(const uint8_t *p)
{
	uint64_t v;
	__builtin_memcpy(&v, p, 8);
	return __builtin_bswap64(v);
}

static inline void qcow2_store64(uint8_t *p, uint64_t v)
{
	v = __builtin_bswap64(v);
	__builtin_memcpy(p, &v, 8);
}

#endif
