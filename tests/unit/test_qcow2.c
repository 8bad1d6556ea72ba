/*
 * qcow2 images made by qemu-img: read, written at random against a model, and then judged by qemu-img check and convert. Skips by name
 * where qemu-utils is not installed.
 */
#include "qcow2_test.h"

#include <malloc.h>

#include "block/driver.h"

#define SIZE ((3u << 20) + 7 * 512) /* with refcounts of 64 bits and clusters of 512 bytes the refcount table has to grow */

static const char *const formats[] = {
	"compat=0.10,cluster_size=512",
	"compat=0.10,cluster_size=64k",
	"compat=1.1,cluster_size=512,refcount_bits=1",
	"compat=1.1,cluster_size=512,refcount_bits=64",
	"compat=1.1,cluster_size=4k,refcount_bits=2",
	"compat=1.1,cluster_size=4k,refcount_bits=8",
	"compat=1.1,cluster_size=64k,refcount_bits=4",
	"compat=1.1,cluster_size=64k",
	"compat=1.1,cluster_size=64k,lazy_refcounts=on",
	"compat=1.1,cluster_size=128k,refcount_bits=32",
	"compat=1.1,cluster_size=2M",
	"compat=1.1,cluster_size=64k,preallocation=metadata",
	"compat=1.1,cluster_size=64k,preallocation=falloc",
	"compat=1.1,cluster_size=4k,preallocation=full",
};

#define NFORMATS (sizeof(formats) / sizeof(formats[0]))

static void reads(void **unused)
{
	(void)unused;
	NEEDS_QEMU();
	struct block_bench t;
	block_bench_start(&t);
	uint8_t *model = make_model(&t, SIZE);
	static const char *const flags[] = { "", "-c -o compression_type=zlib", "-c -o compression_type=zstd" };
	for (unsigned i = 0; i < NFORMATS; i++) {
		for (unsigned c = 0; c < 3; c++) {
			if (c && (i % 3 != 1 || strstr(formats[i], "preallocation")))
				continue;
			if (c == 2 && strstr(formats[i], "0.10"))
				continue;
			must(&t, sh(&t, "qemu-img convert -f raw -O qcow2 %s -o %s raw image", flags[c], formats[i]), formats[i]);
			struct block *b = open_disk(&t, in_dir(&t, "image"), i % 2 ? "ro" : "ro,aio=threads,format=qcow2");
			assert_int_equal(block_info(b)->size, SIZE);
			assert_string_equal(block_info(b)->format, "qcow2");
			assert_true(block_info(b)->read_only);
			read_all(b, model, SIZE);
			random_ops(b, model, SIZE, OPS_READ, 200, 5 + i);
			block_close(b);
		}
	}
	free(model);
	block_bench_stop(&t);
}

/* The image holds the model, and qemu-img finds nothing wrong with it. */
static void judge(struct block_bench *t, const char *name, const uint8_t *model, uint64_t size, const char *what)
{
	must(t, check(t, name), what);
	must(t, sh(t, "rm -f back && qemu-img convert -f qcow2 -O raw %s back", name), what);
	uint8_t *bytes = malloc(size);
	int fd = open(in_dir(t, "back"), O_RDONLY);
	assert_int_equal(pread(fd, bytes, size, 0), size);
	close(fd);
	for (uint64_t i = 0; i < size; i++) {
		if (bytes[i] != model[i])
			fail_msg("%s: qemu-img reads 0x%02x at 0x%llx, should be 0x%02x", what, bytes[i], (unsigned long long)i, model[i]);
	}
	free(bytes);
}

static void writes(void **unused)
{
	(void)unused;
	NEEDS_QEMU();
	static const char *const keys[] = { "", "cache=none", "aio=threads", "discard=ignore", "cache=unsafe", "cache=writethrough" };
	struct block_bench t;
	block_bench_start(&t);
	uint8_t *model = calloc(1, SIZE);
	for (unsigned i = 0; i < NFORMATS; i++) {
		memset(model, 0, SIZE);
		must(&t, sh(&t, "rm -f image && qemu-img create -f qcow2 -o %s image %u", formats[i], SIZE), formats[i]);
		for (unsigned round = 0; round < 2; round++) {
			const char *k = keys[(i + 3 * round) % 6];
			struct block *b = NULL;
			int r = try_open(&t, &b, in_dir(&t, "image"), k);
			if (r == -EINVAL && strstr(t.err.text, "O_DIRECT"))
				continue;
			if (r)
				fail_msg("%s", t.err.text);
			random_ops(b, model, SIZE, OPS_ALL, strcmp(k, "cache=writethrough") ? 250 : 60, 100 * i + round + 1);
			block_close(b);
			char what[128];
			snprintf(what, sizeof(what), "%s, %s", formats[i], k);
			judge(&t, "image", model, SIZE, what);
		}
	}
	free(model);
	block_bench_stop(&t);
}

/* A request over very many places takes memory for some of them at a time. */
static void many_pieces(void **unused)
{
	(void)unused;
	NEEDS_QEMU();
	enum { CLUSTER = 512, N = 4096, BYTES = CLUSTER * N };
	struct block_bench t;
	block_bench_start(&t);
	must(&t, sh(&t, "qemu-img create -q -f qcow2 -o cluster_size=512 image 4M"), "create");
	uint8_t *model = malloc(BYTES), *buf = malloc(BYTES);
	fill(model, BYTES, 5);
	struct block *b = open_disk(&t, in_dir(&t, "image"), "cache=unsafe");
	for (unsigned i = N; i-- > 0;)
		assert_int_equal(do_io(b, BLOCK_WRITE, i * CLUSTER, model + i * CLUSTER, CLUSTER), 0);
	for (int round = 0; round < 3; round++) {
		if (round == 2) { /* the loop alone finishes it, for an overlay too */
			block_close(b);
			b = open_disk(&t, in_dir(&t, "image"), "overlay");
		}
		struct sync_request s;
		memset(buf, 0, BYTES);
		size_t before = mallinfo2().uordblks;
		queue_io(b, &s, round == 1 ? BLOCK_WRITE : BLOCK_READ, 0, round == 1 ? model : buf, BYTES);
		assert_true(mallinfo2().uordblks < before + 256 * 1024);
		block_kick(b);
		loop_again(t.b.loop);
		bench_run(&t.b);
		for (int i = 0; i < 20000 && !__atomic_load_n(&s.finished, __ATOMIC_ACQUIRE); i++)
			usleep(1000);
		bench_halt(&t.b);
		assert_true(s.finished);
		assert_int_equal(s.result, 0);
		if (round != 1)
			assert_memory_equal(buf, model, BYTES);
		if (!round)
			fill(model, BYTES, 6); /* is written next */
	}
	block_close(b);
	free(model);
	free(buf);
	block_bench_stop(&t);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(reads),
		cmocka_unit_test(writes),
		cmocka_unit_test(many_pieces),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
