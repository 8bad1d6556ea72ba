#include "block/qcow2/format.h"

#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "base/error.h"
#include "block/driver.h"

#define EXT_END 0u
#define EXT_BACKING_FORMAT 0xe2792acau
#define EXT_FEATURE_NAMES 0x6803f857u
#define EXT_BITMAPS 0x23852875u

#define KNOWN_INCOMPATIBLE                                                                                                                 \
	(QCOW2_INCOMPAT_DIRTY | QCOW2_INCOMPAT_CORRUPT | QCOW2_INCOMPAT_DATA_FILE | QCOW2_INCOMPAT_COMPRESSION | QCOW2_INCOMPAT_EXTENDED_L2)

static uint32_t load32(const uint8_t *p)
{
	return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
}

static void store32(uint8_t *p, uint32_t v)
{
	for (int i = 0; i < 4; i++)
		p[i] = (uint8_t)(v >> (24 - 8 * i));
}

bool qcow2_probe(const uint8_t *head, size_t len)
{
	return len >= 8 && load32(head) == QCOW2_MAGIC && load32(head + 4) >= 2;
}

size_t qcow2_head_size(const uint8_t *head, size_t len)
{
	if (len < QCOW2_HEADER_V2 || !qcow2_probe(head, len))
		return 0;
	uint32_t bits = load32(head + 20);
	if (bits < QCOW2_MIN_CLUSTER_BITS || bits > QCOW2_MAX_CLUSTER_BITS)
		return QCOW2_HEADER_V2; /* qcow2_parse_header says what is wrong */
	return (size_t)1 << bits;
}

/* --- header --- */

/* The name that the image itself gives an incompatible feature ("Feature name table"), for the sentence. */
static void feature_name(char *out, size_t outlen, const uint8_t *table, size_t len, unsigned bit)
{
	out[0] = 0;
	for (size_t at = 0; at + 48 <= len; at += 48) {
		if (table[at] != 0 || table[at + 1] != bit)
			continue;
		size_t n = 0;
		while (n < 46 && n + 1 < outlen && table[at + 2 + n] >= ' ' && table[at + 2 + n] < 0x7f) {
			out[n] = (char)table[at + 2 + n];
			n++;
		}
		out[n] = 0;
		return;
	}
}

struct extensions {
	const uint8_t *names;
	size_t names_len;
};

static int parse_extensions(struct qcow2_format *f, struct extensions *x, const uint8_t *head, size_t len, size_t at, size_t end, const char *what,
			    struct error *err)
{
	if (end > len)
		end = len;
	while (at + 8 <= end) {
		uint32_t type = load32(head + at), n = load32(head + at + 4);
		if (type == EXT_END)
			return 0;
		at += 8;
		if (n > end - at)
			return error_set(err, EINVAL, "%s: a qcow2 header extension (0x%08x, %u bytes) does not fit in the header; the image is damaged", what,
					 type, n);
		if (type == EXT_BACKING_FORMAT) {
			if (n >= sizeof(f->backing_format))
				return error_set(err, EINVAL, "%s: the name of the backing file's format has %u bytes; the image is damaged", what, n);
			memcpy(f->backing_format, head + at, n);
			f->backing_format[n] = 0;
		} else if (type == EXT_FEATURE_NAMES) {
			x->names = head + at;
			x->names_len = n;
		} else if (type == EXT_BITMAPS) {
			f->has_bitmaps = true;
		}
		at += ((size_t)n + 7) & ~(size_t)7;
	}
	return 0;
}

static int check_features(const struct qcow2_format *f, const struct extensions *x, const char *what, struct error *err)
{
	if (f->incompatible & QCOW2_INCOMPAT_DATA_FILE)
		return error_set(err, ENOTSUP, "%s keeps its data in an external data file, which is not supported; make a plain one with: qemu-img convert -O qcow2 OLD NEW", what);
	if (f->incompatible & QCOW2_INCOMPAT_EXTENDED_L2)
		return error_set(err, ENOTSUP, "%s has extended L2 entries (subclusters), which are not supported; make a plain one with: qemu-img convert -O qcow2 OLD NEW", what);
	uint64_t unknown = f->incompatible & ~KNOWN_INCOMPATIBLE;
	if (!unknown)
		return 0;
	unsigned bit = (unsigned)__builtin_ctzll(unknown);
	char name[48];
	feature_name(name, sizeof(name), x->names, x->names ? x->names_len : 0, bit);
	return error_set(err, ENOTSUP, "%s needs the qcow2 feature %s%s(bit %u), which is not supported; make a plain one with: qemu-img convert -O qcow2 OLD NEW", what, name,
			 name[0] ? " " : "", bit);
}

static bool aligned(const struct qcow2_format *f, uint64_t offset)
{
	return !(offset & (f->cluster_size - 1));
}

/* Does [offset, offset + len) lie behind the header cluster and in the file? */
static bool in_file(const struct qcow2_format *f, uint64_t offset, uint64_t len, uint64_t file_size)
{
	return aligned(f, offset) && offset && offset <= file_size && len <= file_size - offset;
}

static int check_tables(const struct qcow2_format *f, uint64_t file_size, const char *what, struct error *err)
{
	if (f->l1_size > QCOW2_MAX_L1_BYTES / 8)
		return error_set(err, EINVAL, "%s: its L1 table has %u entries, more than %u; the image is damaged", what, f->l1_size, QCOW2_MAX_L1_BYTES / 8);
	uint64_t per_l1 = f->cluster_size << qcow2_l2_bits(f);
	if (f->size > per_l1 * f->l1_size)
		return error_set(err, EINVAL, "%s: its L1 table of %u entries is too small for a disk of %" PRIu64 " bytes; the image is damaged", what,
				 f->l1_size, f->size);
	if (f->l1_size && !in_file(f, f->l1_offset, f->l1_size * 8ull, file_size))
		return error_set(err, EINVAL, "%s: its L1 table (at 0x%" PRIx64 ") is not in the file; the image is cut off or damaged", what, f->l1_offset);
	if (!f->reftable_clusters || f->reftable_clusters > QCOW2_MAX_REFTABLE_BYTES >> f->cluster_bits)
		return error_set(err, EINVAL, "%s: its refcount table has %u clusters (1 to %u are possible); the image is damaged", what,
				 f->reftable_clusters, QCOW2_MAX_REFTABLE_BYTES >> f->cluster_bits);
	if (!in_file(f, f->reftable_offset, 8, file_size))
		return error_set(err, EINVAL, "%s: its refcount table (at 0x%" PRIx64 ") is not in the file; the image is cut off or damaged", what,
				 f->reftable_offset);
	if (f->nsnapshots > QCOW2_MAX_SNAPSHOTS)
		return error_set(err, EINVAL, "%s: %u snapshots are more than %u; the image is damaged", what, f->nsnapshots, QCOW2_MAX_SNAPSHOTS);
	if (f->nsnapshots && !in_file(f, f->snapshots_offset, 40, file_size))
		return error_set(err, EINVAL, "%s: its snapshot table (at 0x%" PRIx64 ") is not in the file; the image is cut off or damaged", what,
				 f->snapshots_offset);
	return 0;
}

static int parse_backing(struct qcow2_format *f, const uint8_t *head, size_t len, const char *what, struct error *err)
{
	uint64_t offset = qcow2_load64(head + 8);
	uint32_t n = load32(head + 16);
	if (!offset)
		return 0;
	if (n >= sizeof(f->backing) || offset > len || n > len - offset)
		return error_set(err, EINVAL, "%s: the name of its backing file (%u bytes at 0x%" PRIx64 ") is not in the header; the image is damaged", what, n, offset);
	memcpy(f->backing, head + offset, n);
	f->backing[n] = 0;
	if (strlen(f->backing) != n)
		return error_set(err, EINVAL, "%s: the name of its backing file contains a zero byte; the image is damaged", what);
	return 0;
}

int qcow2_parse_header(struct qcow2_format *f, const uint8_t *head, size_t len, uint64_t file_size, const char *what, struct error *err)
{
	memset(f, 0, sizeof(*f));
	if (len < QCOW2_HEADER_V2 || load32(head) != QCOW2_MAGIC)
		return error_set(err, EINVAL, "%s is not a qcow2 image; say format=raw if it is a raw one", what);
	f->version = load32(head + 4);
	if (f->version != 2 && f->version != 3)
		return error_set(err, ENOTSUP, "%s: qcow2 version %u is not supported, only 2 and 3; make a new one with: qemu-img convert -O qcow2 OLD NEW", what,
				 f->version);
	f->cluster_bits = load32(head + 20);
	if (f->cluster_bits < QCOW2_MIN_CLUSTER_BITS || f->cluster_bits > QCOW2_MAX_CLUSTER_BITS)
		return error_set(err, EINVAL, "%s: clusters of 2^%u bytes are not supported, only 2^%u to 2^%u; the image is damaged", what, f->cluster_bits,
				 QCOW2_MIN_CLUSTER_BITS, QCOW2_MAX_CLUSTER_BITS);
	f->cluster_size = 1ull << f->cluster_bits;
	f->size = qcow2_load64(head + 24) & ~511ull;
	uint32_t crypt = load32(head + 32);
	f->l1_size = load32(head + 36);
	f->l1_offset = qcow2_load64(head + 40);
	f->reftable_offset = qcow2_load64(head + 48);
	f->reftable_clusters = load32(head + 56);
	f->nsnapshots = load32(head + 60);
	f->snapshots_offset = qcow2_load64(head + 64);

	uint32_t header_length = QCOW2_HEADER_V2;
	f->refcount_order = 4;
	if (f->version == 3) {
		if (len < QCOW2_HEADER_V3)
			return error_set(err, EINVAL, "%s ends inside its header; the image is cut off", what);
		f->incompatible = qcow2_load64(head + 72);
		f->compatible = qcow2_load64(head + 80);
		f->autoclear = qcow2_load64(head + 88);
		f->refcount_order = load32(head + 96);
		header_length = load32(head + 100);
		if (header_length < QCOW2_HEADER_V3 || header_length > f->cluster_size || header_length > len)
			return error_set(err, EINVAL, "%s: a header of %u bytes is not possible; the image is damaged", what, header_length);
		if (header_length > 104)
			f->compression = head[104];
	}

	/* Extensions end where the name of the backing file begins. */
	uint64_t backing_at = qcow2_load64(head + 8);
	struct extensions x = { NULL, 0 };
	int r = parse_extensions(f, &x, head, len, header_length, backing_at && backing_at < f->cluster_size ? backing_at : f->cluster_size, what, err);
	if (!r)
		r = check_features(f, &x, what, err);
	if (r)
		return r;
	if (crypt)
		return error_set(err, ENOTSUP, "%s is encrypted, which is not supported; make a plain one with: qemu-img convert (see its --object secret) -O qcow2 OLD NEW", what);
	if (f->refcount_order > 6)
		return error_set(err, EINVAL, "%s: refcounts of 2^%u bits are not possible; the image is damaged", what, f->refcount_order);
	bool other = f->incompatible & QCOW2_INCOMPAT_COMPRESSION;
	if (other != (f->compression != QCOW2_COMPRESSION_DEFLATE))
		return error_set(err, EINVAL, "%s: its compression type (%u) and its feature bits contradict each other; the image is damaged", what, f->compression);
	if (f->compression > QCOW2_COMPRESSION_ZSTD)
		return error_set(err, ENOTSUP, "%s: compression type %u is not supported, only zlib and zstd; make a plain one with: qemu-img convert -O qcow2 OLD NEW", what, f->compression);
	r = check_tables(f, file_size, what, err);
	return r ? r : parse_backing(f, head, len, what, err);
}

void qcow2_make_header(uint8_t *head, const struct qcow2_format *f)
{
	memset(head, 0, 512);
	store32(head, QCOW2_MAGIC);
	store32(head + 4, 3);
	store32(head + 20, f->cluster_bits);
	qcow2_store64(head + 24, f->size);
	store32(head + 36, f->l1_size);
	qcow2_store64(head + 40, f->l1_offset);
	qcow2_store64(head + QCOW2_AT_REFTABLE, f->reftable_offset);
	store32(head + QCOW2_AT_REFTABLE + 8, f->reftable_clusters);
	store32(head + 96, f->refcount_order);
	store32(head + 100, QCOW2_HEADER_V3);
}

/* --- tables --- */

struct qcow2_entry qcow2_decode(const struct qcow2_format *f, uint64_t entry, uint64_t file_end)
{
	struct qcow2_entry e = { .kind = QCOW2_KIND_BAD };
	if (entry & QCOW2_COMPRESSED) {
		/* "Compressed Clusters Descriptor" */
		unsigned x = 62 - (f->cluster_bits - 8);
		e.host = entry & ((1ull << x) - 1);
		uint64_t sectors = (entry >> x & ((1ull << (62 - x)) - 1)) + 1;
		if (!e.host || e.host >= file_end || e.host >= QCOW2_MAX_HOST)
			return e;
		e.csize = (uint32_t)(sectors * 512 - (e.host & 511));
		e.kind = QCOW2_KIND_COMPRESSED;
		return e;
	}
	e.host = entry & QCOW2_OFFSET_MASK;
	/* Version 2 has no zero flag; an entry that claims it is a damaged one. */
	if (!aligned(f, e.host) || e.host >= file_end || (entry & QCOW2_ZERO && f->version < 3))
		return e;
	e.copied = e.host && entry & QCOW2_COPIED;
	e.kind = entry & QCOW2_ZERO ? QCOW2_KIND_ZERO : e.host ? QCOW2_KIND_NORMAL : QCOW2_KIND_UNALLOCATED;
	return e;
}

uint64_t qcow2_table_offset(const struct qcow2_format *f, uint64_t entry, uint64_t file_end)
{
	uint64_t offset = entry & QCOW2_OFFSET_MASK;
	if (!offset)
		return 0;
	/* Whole clusters only: a table that is cut off says nothing about its missing part. */
	return aligned(f, offset) && offset < file_end && f->cluster_size <= file_end - offset ? offset : UINT64_MAX;
}

uint64_t qcow2_get_refcount(const uint8_t *block, unsigned order, uint64_t i)
{
	if (order < 3) {
		unsigned bits = 1u << order, per_byte = 8 >> order;
		return block[i / per_byte] >> (i % per_byte * bits) & ((1u << bits) - 1);
	}
	unsigned bytes = 1u << (order - 3);
	uint64_t v = 0;
	for (unsigned b = 0; b < bytes; b++)
		v = v << 8 | block[i * bytes + b];
	return v;
}

void qcow2_set_refcount(uint8_t *block, unsigned order, uint64_t i, uint64_t value)
{
	if (order < 3) {
		unsigned bits = 1u << order, per_byte = 8 >> order;
		unsigned shift = (unsigned)(i % per_byte) * bits, mask = (1u << bits) - 1;
		uint8_t *p = &block[i / per_byte];
		*p = (uint8_t)((*p & ~(mask << shift)) | ((unsigned)value & mask) << shift);
		return;
	}
	unsigned bytes = 1u << (order - 3);
	for (unsigned b = 0; b < bytes; b++)
		block[i * bytes + b] = (uint8_t)(value >> 8 * (bytes - 1 - b));
}

/* --- snapshots --- */

static void copy_text(char *out, size_t size, const uint8_t *p, size_t len)
{
	size_t n = len < size - 1 ? len : size - 1;
	for (size_t i = 0; i < n; i++)
		out[i] = (char)(p[i] < ' ' || p[i] == 0x7f ? '?' : p[i]); /* it goes to terminals */
	out[n] = 0;
}

int qcow2_parse_snapshot(struct qcow2_snapshot *s, const uint8_t *table, size_t len, size_t *at, const struct qcow2_format *f, uint64_t file_size)
{
	memset(s, 0, sizeof(*s));
	if (*at > len || len - *at < 40)
		return -EINVAL;
	const uint8_t *p = table + *at;
	s->l1_offset = qcow2_load64(p);
	s->l1_size = load32(p + 8);
	size_t id_len = (size_t)p[12] << 8 | p[13], name_len = (size_t)p[14] << 8 | p[15];
	s->date_sec = load32(p + 16);
	s->vm_clock_ns = qcow2_load64(p + 24);
	s->vm_state_size = load32(p + 32);
	size_t extra = load32(p + 36), left = len - *at - 40;
	if (extra > left || id_len + name_len > left - extra)
		return -EINVAL;
	if (extra >= 8)
		s->vm_state_size = qcow2_load64(p + 40);
	if (extra >= 16)
		s->disk_size = qcow2_load64(p + 48) & ~511ull;
	copy_text(s->id, sizeof(s->id), p + 40 + extra, id_len);
	copy_text(s->name, sizeof(s->name), p + 40 + extra + id_len, name_len);
	*at += (40 + extra + id_len + name_len + 7) & ~(size_t)7;
	if (s->l1_size > QCOW2_MAX_L1_BYTES / 8 || (s->l1_size && !in_file(f, s->l1_offset, s->l1_size * 8ull, file_size)))
		return -EINVAL;
	return 0;
}
