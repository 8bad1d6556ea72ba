/*
 * The pure part of qcow2: the header and what is refused of it, table entries, refcounts of every width, the snapshot table, the slice
 * cache, sets of clusters, decompression. Bytes are written down here after the specification, not by the code under test.
 */
#include "devtest.h"

#include <errno.h>
#include <stdlib.h>
#include <zlib.h>

#include "block/driver.h"
#include "block/qcow2/image.h"

static void put(uint8_t *p, uint64_t v, unsigned size)
{
	for (unsigned i = 0; i < size; i++)
		p[i] = (uint8_t)(v >> 8 * (size - 1 - i));
}

#define HEAD 65536u
#define FILE_SIZE (1u << 20)

/* A version 3 image of 1 GiB with clusters of 64 KiB. */
static void good(uint8_t *h)
{
	memset(h, 0, HEAD);
	memcpy(h, "QFI\xfb", 4);
	put(h + 4, 3, 4);
	put(h + 20, 16, 4);
	put(h + 24, 1u << 30, 8);
	put(h + 36, 2, 4);
	put(h + 40, 0x30000, 8);
	put(h + 48, 0x10000, 8);
	put(h + 56, 1, 4);
	put(h + 96, 4, 4);
	put(h + 100, 112, 4);
}

static int parse(const uint8_t *h, size_t len, struct qcow2_format *f, struct error *err)
{
	/* Of its exact size, for the sanitizer. */
	uint8_t *copy = malloc(len + !len);
	memcpy(copy, h, len);
	err->text[0] = 0;
	int r = qcow2_parse_header(f, copy, len, FILE_SIZE, "--disk: x", err);
	free(copy);
	assert_true(r <= 0);
	assert_int_equal(!r, !err->text[0]);
	return r;
}

static void header(void **state)
{
	(void)state;
	static uint8_t h[HEAD];
	struct qcow2_format f;
	struct error err;
	good(h);
	put(h + 8, 256, 8);
	put(h + 16, 7, 4);
	memcpy(h + 256, "base.im", 7);
	put(h + 112, 0xe2792aca, 4);
	put(h + 116, 3, 4);
	memcpy(h + 120, "raw", 3);
	put(h + 128, 0x23852875, 4);
	put(h + 132, 24, 4);
	assert_int_equal(parse(h, HEAD, &f, &err), 0);
	assert_int_equal(f.cluster_size, 65536);
	assert_int_equal(f.size, 1u << 30);
	assert_int_equal(f.l1_size, 2);
	assert_int_equal(f.refcount_order, 4);
	assert_string_equal(f.backing, "base.im");
	assert_string_equal(f.backing_format, "raw");
	assert_true(f.has_bitmaps);
	assert_int_equal(qcow2_head_size(h, 72), 65536);
	assert_true(qcow2_probe(h, 8));
	assert_false(qcow2_probe(h, 7));

	/* Version 2 knows none of the later fields. */
	put(h + 4, 2, 4);
	put(h + 8, 0, 8);
	memset(h + 72, 0xff, 40);
	put(h + 72, 0, 8); /* the end of the extensions */
	assert_int_equal(parse(h, HEAD, &f, &err), 0);
	assert_int_equal(f.refcount_order, 4);
	assert_int_equal(f.incompatible, 0);
}

static void refused_headers(void **state)
{
	(void)state;
	static const struct {
		unsigned at, size;
		uint64_t value;
		const char *words;
	} cases[] = {
		{ 0, 4, 0x514649fa, "not a qcow2 image" },
		{ 4, 4, 1, "version 1" },
		{ 4, 4, 4, "version 4" },
		{ 20, 4, 8, "2^8" },
		{ 20, 4, 22, "2^22" },
		{ 20, 4, UINT32_MAX, "clusters" },
		{ 24, 8, UINT64_MAX, "too small" },
		{ 24, 8, (1ull << 30) + 512, "too small" },
		{ 32, 4, 1, "encrypted" },
		{ 36, 4, UINT32_MAX, "L1 table" },
		{ 40, 8, 0, "L1 table" },
		{ 40, 8, 0x30200, "L1 table" },
		{ 40, 8, FILE_SIZE, "L1 table" },
		{ 40, 8, 0xffffffffffff0000, "L1 table" },
		{ 48, 8, 0, "refcount table" },
		{ 48, 8, 0xffffffffffff0000, "refcount table" },
		{ 56, 4, 0, "refcount table" },
		{ 56, 4, 129, "refcount table" },
		{ 60, 4, 65537, "snapshots" },
		{ 60, 4, 1, "snapshot table" },
		{ 72, 8, 4, "external data file" },
		{ 72, 8, 8, "contradict" },
		{ 72, 8, 16, "extended L2" },
		{ 72, 8, 32, "bit 5" },
		{ 72, 8, 1ull << 63, "bit 63" },
		{ 96, 4, 7, "2^7" },
		{ 100, 4, 96, "header of 96" },
		{ 100, 4, UINT32_MAX, "header of" },
		{ 104, 1, 1, "contradict" },
		{ 116, 4, UINT32_MAX, "extension" },
		{ 8, 8, HEAD - 3, "backing file" },
		{ 8, 8, UINT64_MAX, "backing file" },
	};
	static uint8_t h[HEAD];
	struct qcow2_format f;
	struct error err;
	for (unsigned i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		good(h);
		put(h + 16, 4, 4); /* counts only if there is a backing file */
		put(h + 112, 1, 4); /* an extension that nobody knows */
		put(h + cases[i].at, cases[i].value, cases[i].size);
		assert_true(parse(h, HEAD, &f, &err) < 0);
		if (!strstr(err.text, cases[i].words))
			fail_msg("case %u: \"%s\" should say: %s", i, err.text, cases[i].words);
	}
	/* Cut off anywhere. */
	good(h);
	for (size_t len = 0; len < 200; len++) {
		int r = parse(h, len, &f, &err);
		assert_true(len >= 112 ? !r : r < 0);
	}
	/* The image names the feature that we do not know. */
	good(h);
	put(h + 72, 1ull << 9, 8);
	put(h + 112, 0x6803f857, 4);
	put(h + 116, 48, 4);
	h[121] = 9;
	memcpy(h + 122, "time travel", 11);
	assert_int_equal(parse(h, HEAD, &f, &err), -ENOTSUP);
	assert_non_null(strstr(err.text, "time travel"));
}

static void entries(void **state)
{
	(void)state;
	struct qcow2_format f = { .version = 3, .cluster_bits = 16, .cluster_size = 65536 };
	static const struct {
		uint64_t entry;
		enum qcow2_kind kind;
		uint64_t host;
		bool copied;
	} cases[] = {
		{ 0, QCOW2_KIND_UNALLOCATED, 0, false },
		{ 1ull << 63, QCOW2_KIND_UNALLOCATED, 0, false },
		{ 1, QCOW2_KIND_ZERO, 0, false },
		{ 0x50000, QCOW2_KIND_NORMAL, 0x50000, false },
		{ 0x50000 | 1ull << 63, QCOW2_KIND_NORMAL, 0x50000, true },
		{ 0x50001 | 1ull << 63, QCOW2_KIND_ZERO, 0x50000, true },
		{ 0x50200, QCOW2_KIND_BAD, 0x50200, false },
		{ 0x100000, QCOW2_KIND_BAD, 0x100000, false },
		{ 0x00ffffffffff0000, QCOW2_KIND_BAD, 0x00ffffffffff0000, false },
		{ 1ull << 62, QCOW2_KIND_BAD, 0, false },
		{ 1ull << 62 | 0x4fff1, QCOW2_KIND_COMPRESSED, 0x4fff1, false },
		{ 1ull << 62 | 0x100000, QCOW2_KIND_BAD, 0x100000, false },
	};
	for (unsigned i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		struct qcow2_entry e = qcow2_decode(&f, cases[i].entry, FILE_SIZE);
		assert_int_equal(e.kind, cases[i].kind);
		assert_int_equal(e.host, cases[i].host);
		assert_int_equal(e.copied && e.kind != QCOW2_KIND_BAD, cases[i].copied);
	}
	/* x = 62 - (16 - 8) = 54: three more sectors after the first. */
	struct qcow2_entry e = qcow2_decode(&f, 1ull << 62 | 3ull << 54 | 0x4fff1, FILE_SIZE);
	assert_int_equal(e.csize, 4 * 512 - 0x1f1);
	/* Version 2 has no zero flag. */
	f.version = 2;
	assert_int_equal(qcow2_decode(&f, 1, FILE_SIZE).kind, QCOW2_KIND_BAD);
	assert_int_equal(qcow2_table_offset(&f, 0, FILE_SIZE), 0);
	assert_int_equal(qcow2_table_offset(&f, 1ull << 63 | 0x20000, FILE_SIZE), 0x20000);
	assert_int_equal(qcow2_table_offset(&f, 0x20200, FILE_SIZE), UINT64_MAX);
	assert_int_equal(qcow2_table_offset(&f, FILE_SIZE, FILE_SIZE), UINT64_MAX);
	assert_int_equal(qcow2_table_offset(&f, FILE_SIZE - 65536, FILE_SIZE - 1), UINT64_MAX);
}

static void refcounts(void **state)
{
	(void)state;
	/* As the specification has them: bit 0 is the least significant bit of a byte; whole bytes are big endian. */
	uint8_t bits[2] = { 0x81, 0x02 };
	assert_int_equal(qcow2_get_refcount(bits, 0, 0), 1);
	assert_int_equal(qcow2_get_refcount(bits, 0, 7), 1);
	assert_int_equal(qcow2_get_refcount(bits, 0, 9), 1);
	assert_int_equal(qcow2_get_refcount(bits, 0, 8), 0);
	assert_int_equal(qcow2_get_refcount(bits, 1, 3), 2);
	assert_int_equal(qcow2_get_refcount(bits, 2, 1), 8);
	assert_int_equal(qcow2_get_refcount(bits, 4, 0), 0x8102);
	for (unsigned order = 0; order <= 6; order++) {
		uint8_t block[512], before[512];
		uint64_t n = 512 * 8 >> order, max = qcow2_refcount_max(order);
		for (unsigned i = 0; i < 512; i++)
			block[i] = (uint8_t)(i * 37 + order);
		for (uint64_t i = 0; i < n; i++) {
			memcpy(before, block, 512);
			uint64_t v = (0x123456789abcdefull * (i + 1)) & max;
			qcow2_set_refcount(block, order, i, v);
			assert_int_equal(qcow2_get_refcount(block, order, i), v);
			for (uint64_t k = i ? i - 1 : 0; k < n && k <= i + 1; k++)
				assert_true(k == i || qcow2_get_refcount(block, order, k) == qcow2_get_refcount(before, order, k));
		}
	}
}

static void snapshot_table(void **state)
{
	(void)state;
	struct qcow2_format f = { .version = 3, .cluster_bits = 16, .cluster_size = 65536 };
	uint8_t t[128] = { 0 };
	put(t, 0x40000, 8);
	put(t + 8, 2, 4);
	put(t + 12, 1, 2);
	put(t + 14, 4, 2);
	put(t + 32, 77, 4);
	put(t + 36, 16, 4);
	put(t + 40, 1ull << 33, 8);
	put(t + 48, 1ull << 30, 8);
	memcpy(t + 56, "1na\033e", 5);
	struct qcow2_snapshot s;
	size_t at = 0;
	assert_int_equal(qcow2_parse_snapshot(&s, t, sizeof(t), &at, &f, FILE_SIZE), 0);
	assert_int_equal(at, 64);
	assert_string_equal(s.id, "1");
	assert_string_equal(s.name, "na?e"); /* nothing that a terminal would obey */
	assert_int_equal(s.vm_state_size, 1ull << 33);
	assert_int_equal(s.disk_size, 1ull << 30);
	for (size_t len = 0; len < 61; len++) {
		at = 0;
		assert_int_equal(qcow2_parse_snapshot(&s, t, len, &at, &f, FILE_SIZE), -EINVAL);
	}
	at = SIZE_MAX;
	assert_int_equal(qcow2_parse_snapshot(&s, t, sizeof(t), &at, &f, FILE_SIZE), -EINVAL);
	put(t + 36, UINT32_MAX, 4);
	at = 0;
	assert_int_equal(qcow2_parse_snapshot(&s, t, sizeof(t), &at, &f, FILE_SIZE), -EINVAL);
	put(t + 36, 16, 4);
	put(t, FILE_SIZE, 8);
	assert_int_equal(qcow2_parse_snapshot(&s, t, sizeof(t), &at, &f, FILE_SIZE), -EINVAL);
}

static void cache(void **state)
{
	(void)state;
	struct qcow2_cache c;
	assert_int_equal(qcow2_cache_create(&c, 512, 16 * 512), 0);
	for (uint64_t n = 0; n < 100; n++) {
		struct qcow2_slice *s = qcow2_cache_take(&c);
		assert_non_null(s);
		memset(s->data, (int)n, 512);
		qcow2_cache_put(&c, s, n * 1000);
		if (n < 4)
			qcow2_cache_dirty(&c, s);
	}
	/* Dirty ones stay, whatever comes. */
	for (uint64_t n = 0; n < 4; n++) {
		struct qcow2_slice *s = qcow2_cache_find(&c, n * 1000);
		assert_non_null(s);
		assert_int_equal(s->data[511], n);
	}
	assert_non_null(qcow2_cache_find(&c, 99000));
	assert_null(qcow2_cache_find(&c, 10000));
	/* Nothing but dirty ones: there is none to take, until one is clean. */
	while (!qcow2_cache_full(&c)) {
		struct qcow2_slice *s = qcow2_cache_take(&c);
		assert_non_null(s);
		qcow2_cache_put(&c, s, 500000 + c.ndirty);
		qcow2_cache_dirty(&c, s);
	}
	assert_int_equal(c.ndirty, 12);
	for (uint32_t i = 0; i < c.n; i++) {
		if (!c.slices[i].dirty)
			qcow2_cache_dirty(&c, &c.slices[i]);
	}
	assert_null(qcow2_cache_take(&c));
	struct qcow2_slice *s = qcow2_cache_find(&c, 3000);
	qcow2_cache_clean(&c, s);
	assert_ptr_equal(qcow2_cache_take(&c), s);
	assert_null(qcow2_cache_find(&c, 3000));
	qcow2_cache_destroy(&c);
}

static void small_things(void **state)
{
	(void)state;
	struct qcow2_bitmap b = { NULL, 0 };
	assert_false(qcow2_bitmap_any(&b, 0, 1000));
	qcow2_bitmap_set(&b, 63, 2, true);
	assert_true(qcow2_bitmap_any(&b, 0, 64));
	assert_true(qcow2_bitmap_any(&b, 64, 1));
	assert_false(qcow2_bitmap_any(&b, 65, 1000));
	qcow2_bitmap_set(&b, 63, 2, false);
	assert_false(qcow2_bitmap_any(&b, 0, 1000));
	qcow2_bitmap_set(&b, 1ull << 40, 1, true); /* not recorded, and no memory for it */
	assert_false(qcow2_bitmap_any(&b, 1ull << 40, 1));
	free(b.words);

	uint8_t m[30];
	struct iovec v[3] = { { m, 10 }, { m + 10, 10 }, { m + 20, 10 } }, out[3];
	assert_int_equal(qcow2_iov_slice(out, v, 3, 5, 20), 3);
	assert_ptr_equal(out[0].iov_base, m + 5);
	assert_int_equal(out[0].iov_len, 5);
	assert_int_equal(out[2].iov_len, 5);
	assert_int_equal(qcow2_iov_slice(out, v, 3, 10, 10), 1);
	assert_int_equal(qcow2_iov_slice(out, v, 3, 30, 0), 0);
	memset(m, 1, sizeof(m));
	qcow2_iov_fill(v, 3, 9, NULL, 12);
	assert_int_equal(m[8], 1);
	assert_int_equal(m[9], 0);
	assert_int_equal(m[20], 0);
	assert_int_equal(m[21], 1);
}

static void inflating(void **state)
{
	(void)state;
	static uint8_t in[65536], out[65536], back[65536];
	for (unsigned i = 0; i < sizeof(in); i++)
		in[i] = (uint8_t)(i / 100 + i % 7);
	z_stream z = { .next_in = in, .avail_in = sizeof(in), .next_out = out, .avail_out = sizeof(out) };
	assert_int_equal(deflateInit2(&z, 9, Z_DEFLATED, -12, 9, Z_DEFAULT_STRATEGY), Z_OK);
	assert_int_equal(deflate(&z, Z_FINISH), Z_STREAM_END);
	size_t n = z.total_out;
	deflateEnd(&z);
	assert_int_equal(qcow2_inflate(QCOW2_COMPRESSION_DEFLATE, back, sizeof(back), out, n), 0);
	assert_memory_equal(in, back, sizeof(in));
	/* What follows in the sector is no part of it; what is missing is. */
	assert_int_equal(qcow2_inflate(QCOW2_COMPRESSION_DEFLATE, back, sizeof(back), out, n + 100), 0);
	assert_int_equal(qcow2_inflate(QCOW2_COMPRESSION_DEFLATE, back, sizeof(back), out, n - 8), -EIO);
	assert_int_equal(qcow2_inflate(QCOW2_COMPRESSION_DEFLATE, back, sizeof(back), out, 0), -EIO);
	assert_int_equal(qcow2_inflate(QCOW2_COMPRESSION_ZSTD, back, sizeof(back), out, n), -EIO);
	assert_int_equal(qcow2_inflate(QCOW2_COMPRESSION_ZSTD, back, sizeof(back), out, 0), -EIO);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(header),	  cmocka_unit_test(refused_headers), cmocka_unit_test(entries), cmocka_unit_test(refcounts),
		cmocka_unit_test(snapshot_table), cmocka_unit_test(cache),	     cmocka_unit_test(small_things), cmocka_unit_test(inflating),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
