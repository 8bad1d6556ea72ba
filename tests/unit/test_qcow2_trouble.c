/*
 * qcow2 when things go wrong: the host's disk is full, tables are damaged while the image looks fine at opening. Errors reach the guest, the rest goes on, the
 * image never gets worse. Judged by qemu-img; skips by name what a host cannot do.
 */
#include "qcow2_test.h"

#include <sched.h>
#include <sys/mount.h>

#define SIZE (8u << 20)

/* A write of random data, and the model of what is there: unknown after an error. */
static int write_at(struct block *b, uint8_t *model, uint64_t offset, uint64_t len, uint32_t seed)
{
	uint8_t *buf = malloc(len);
	fill(buf, len, seed);
	int r = do_io(b, BLOCK_WRITE, offset, buf, len);
	if (!r)
		memcpy(model + offset, buf, len);
	free(buf);
	return r;
}

static void full_disk(void **unused)
{
	(void)unused;
	NEEDS_QEMU();
	static const char *const formats[] = { "cluster_size=64k", "cluster_size=512", "cluster_size=4k,refcount_bits=64" };
	struct block_bench t;
	block_bench_start(&t);
	/* In a namespace of its own, so that nothing stays mounted if the test fails. */
	if (unshare(CLONE_NEWNS) || mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) || mount("none", t.dir, "tmpfs", 0, "size=3m")) {
		print_message("no right to mount a small tmpfs here: %s\n", strerror(errno));
		block_bench_stop(&t);
		skip();
	}
	uint8_t *model = malloc(SIZE);
	for (unsigned i = 0; i < 3; i++) {
		memset(model, 0, SIZE);
		must(&t, sh(&t, "rm -f image; qemu-img create -q -f qcow2 -o %s image 8M", formats[i]), formats[i]);
		struct block *b = open_disk(&t, in_dir(&t, "image"), "");
		unsigned good = 0, full = 0;
		for (uint64_t at = 0; at < SIZE; at += 128 << 10) {
			int r = write_at(b, model, at, 96 << 10, (uint32_t)at + 1);
			if (!r) {
				good++;
				assert_int_equal(do_io(b, BLOCK_FLUSH, 0, NULL, 0), 0);
				continue;
			}
			assert_int_equal(r, -ENOSPC);
			full++;
			/* Parts of it may be there; nobody promised either. Make it known. */
			assert_int_equal(do_io(b, BLOCK_READ, at, model + at, 96 << 10), 0);
		}
		assert_true(good >= 8 && full >= 8);
		assert_int_equal(do_io(b, BLOCK_FLUSH, 0, NULL, 0), 0);
		read_all(b, model, SIZE);
		/* What has a place is written; room that a discard makes is used again. */
		assert_int_equal(write_at(b, model, 0, 96 << 10, 99), 0);
		struct sync_request s;
		queue_zeroes(b, &s, 0, 512 << 10, true);
		block_drain(b);
		assert_int_equal(s.result, 0);
		memset(model, 0, 512 << 10);
		for (int k = 0; k < 3; k++)
			assert_int_equal(do_io(b, BLOCK_FLUSH, 0, NULL, 0), 0);
		assert_int_equal(write_at(b, model, SIZE - (128 << 10), 96 << 10, 100), 0);
		read_all(b, model, SIZE);
		block_close(b);
		must(&t, check(&t, "image"), formats[i]);
		b = open_disk(&t, in_dir(&t, "image"), "");
		read_all(b, model, SIZE);
		block_close(b);
	}
	free(model);
	assert_int_equal(umount(t.dir), 0);
	block_bench_stop(&t);
}

static void put64(struct block_bench *t, uint64_t at, uint64_t v)
{
	uint8_t b[8];
	for (int i = 0; i < 8; i++)
		b[i] = (uint8_t)(v >> (56 - 8 * i));
	int fd = open(in_dir(t, "image"), O_WRONLY);
	assert_int_equal(pwrite(fd, b, 8, (off_t)at), 8);
	close(fd);
}

static uint64_t get64(struct block_bench *t, uint64_t at)
{
	uint8_t b[8];
	uint64_t v = 0;
	int fd = open(in_dir(t, "image"), O_RDONLY);
	assert_int_equal(pread(fd, b, 8, (off_t)at), 8);
	close(fd);
	for (int i = 0; i < 8; i++)
		v = v << 8 | b[i];
	return v;
}

#define OFFSET 0x00fffffffffffe00ull
#define CORRUPT_BIT 2

/* Four clusters with data; then the second one's entry is damaged. */
static uint64_t fresh_image(struct block_bench *t, uint8_t *model)
{
	must(t, sh(t, "rm -f image; qemu-img create -q -f qcow2 image 8M && qemu-io -f qcow2 -c 'write -P 7 0 256k' image"), "image");
	memset(model, 0, SIZE);
	memset(model, 7, 256 << 10);
	uint64_t l1 = get64(t, 40);
	return get64(t, l1) & OFFSET;
}

static void damaged(void **unused)
{
	(void)unused;
	NEEDS_QEMU();
	struct block_bench t;
	block_bench_start(&t);
	uint8_t *model = malloc(SIZE), *buf = malloc(65536), before[64], after[64];
	const uint64_t copied = 1ull << 63;
	struct {
		const char *what;
		uint64_t entry;
		bool reads; /* data that has the wrong place can be read, but not be written */
	} cases[] = {
		{ "not aligned", copied | 0x50200, false },
		{ "behind the end", copied | 1ull << 40, false },
		{ "compressed, behind the end", 1ull << 62 | 1ull << 40, false },
		{ "the header", copied | 0, true }, /* "the offset may only be 0 with bit 63 set when an external data file is used": unallocated */
		{ "the refcount table", copied | 0x10000, true },
		{ "the L1 table", copied | 0x30000, true },
	};
	for (unsigned i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		uint64_t l2 = fresh_image(&t, model);
		put64(&t, l2 + 8, cases[i].entry);
		int fd = open(in_dir(&t, "image"), O_RDONLY);
		assert_int_equal(pread(fd, before, 64, 0), 64);
		struct block *b = open_disk(&t, in_dir(&t, "image"), i % 2 ? "aio=threads" : "");
		int r = do_io(b, BLOCK_READ, 65536, buf, 65536);
		assert_int_equal(r, cases[i].reads ? 0 : -EIO);
		/* The others are well. */
		assert_int_equal(do_io(b, BLOCK_READ, 0, buf, 65536), 0);
		assert_memory_equal(buf, model, 65536);
		assert_int_equal(do_io(b, BLOCK_WRITE, 128 << 10, buf, 65536), 0);
		r = do_io(b, BLOCK_WRITE, 65536 + 512, buf, 4096);
		if (i == 3) {
			assert_int_equal(r, 0);
		} else {
			assert_int_equal(r, -EIO);
			/* From now on nothing is written, and everybody knows. */
			assert_int_equal(do_io(b, BLOCK_WRITE, 0, buf, 4096), -EIO);
			assert_int_equal(do_io(b, BLOCK_READ, 0, buf, 65536), 0);
		}
		block_close(b);
		assert_int_equal(pread(fd, after, 64, 0), 64);
		close(fd);
		assert_memory_equal(before, after, 64);
		assert_int_equal(get64(&t, 72) & CORRUPT_BIT, i == 3 ? 0 : CORRUPT_BIT);
		if (i != 3) {
			assert_int_equal(try_open(&t, &b, in_dir(&t, "image"), ""), -EINVAL);
			assert_non_null(strstr(t.err.text, "qemu-img check -r all"));
			must(&t, sh(&t, "qemu-img info image | grep -q 'corrupt: true'"), "the corrupt bit");
		}
	}

	/* An L1 entry that leads nowhere, or to where a table is already: not for writing. */
	static const uint64_t tables[] = { 1ull << 63 | 1ull << 40, 1ull << 63 | 0x10000, 1ull << 63 | 0x30000, 0x20200 };
	for (unsigned i = 0; i < 4; i++) {
		fresh_image(&t, model);
		put64(&t, get64(&t, 40), tables[i]);
		struct block *b = NULL;
		assert_int_equal(try_open(&t, &b, in_dir(&t, "image"), ""), -EINVAL);
		assert_non_null(strstr(t.err.text, "corrupt"));
		b = open_disk(&t, in_dir(&t, "image"), "ro");
		if (i == 0 || i == 3)
			assert_int_equal(do_io(b, BLOCK_READ, 0, buf, 4096), -EIO);
		block_close(b);
	}

	/* A refcount block that says everything is free: what would be allocated is the header. */
	fresh_image(&t, model);
	uint64_t block = get64(&t, get64(&t, 48));
	for (unsigned i = 0; i < 8; i++)
		put64(&t, block + i * 8, 0);
	struct block *b = open_disk(&t, in_dir(&t, "image"), "");
	assert_int_equal(do_io(b, BLOCK_WRITE, 4 << 20, buf, 4096), -EIO);
	block_close(b);
	assert_int_equal(get64(&t, 72) & CORRUPT_BIT, CORRUPT_BIT);
	must(&t, sh(&t, "qemu-img check -q -r all image; qemu-img check image && qemu-io -r -f qcow2 -c 'read -P 7 0 256k' image"), "repair by qemu-img");
	free(model);
	free(buf);
	block_bench_stop(&t);
}

int main(void)
{
	const struct CMUnitTest tests[] = { cmocka_unit_test(full_disk), cmocka_unit_test(damaged) };
	return cmocka_run_group_tests(tests, NULL, NULL);
}
