/*
 * qcow2 images behind one another, throw-away overlays, internal snapshots, and what must be refused. Images are made and judged by
 * qemu-img; skips by name without it.
 */
#include "qcow2_test.h"

#include "block/driver.h"

#define SIZE (4u << 20)

static void compare(struct block_bench *t, const char *name, const uint8_t *model, uint64_t size)
{
	must(t, check(t, name), name);
	must(t, sh(t, "rm -f back && qemu-img convert -f qcow2 -O raw %s back", name), name);
	uint8_t *bytes = malloc(size);
	int fd = open(in_dir(t, "back"), O_RDONLY);
	assert_int_equal(pread(fd, bytes, size, 0), size);
	close(fd);
	assert_memory_equal(bytes, model, size);
	free(bytes);
}

/* A chain of three: raw, shorter than the qcow2 on it, and a longer one on that; clusters of different sizes, the middle one compressed. */
static void chains(void **unused)
{
	(void)unused;
	NEEDS_QEMU();
	static const char *const tops[] = { "cluster_size=64k", "cluster_size=512", "cluster_size=2M", "cluster_size=4k", "compat=0.10,cluster_size=4k" };
	struct block_bench t;
	block_bench_start(&t);
	uint8_t *model = make_model(&t, SIZE);
	model = realloc(model, SIZE + (1 << 20));
	must(&t, sh(&t, "mkdir -p sub && mv raw sub/base.raw && qemu-img create -q -f qcow2 -b base.raw -F raw sub/mid %u && qemu-io -f qcow2 -c 'write -P 9 1M 100k' "
			"-c 'write -c -P 8 2M 64k' -c 'write -z 3M 64k' sub/mid", SIZE), "mid");
	memset(model + (1 << 20), 9, 100 << 10);
	memset(model + (2 << 20), 8, 64 << 10);
	memset(model + (3 << 20), 0, 64 << 10);
	memset(model + SIZE, 0, 1 << 20);
	for (unsigned i = 0; i < 5; i++) {
		uint64_t size = SIZE + (1 << 20);
		must(&t, sh(&t, "rm -f top && qemu-img create -q -f qcow2 -b sub/mid -F qcow2 -o %s top %llu", tops[i], (unsigned long long)size), tops[i]);
		uint8_t *now = malloc(size);
		memcpy(now, model, size);
		for (unsigned round = 0; round < 2; round++) {
			struct block *b = open_disk(&t, in_dir(&t, "top"), round ? "aio=threads" : "");
			if (!round)
				read_all(b, now, size);
			random_ops(b, now, size, OPS_ALL, 250, 50 + i + round);
			block_close(b);
			if (round)
				compare(&t, "top", now, size);
		}
		free(now);
	}
	free(model);
	block_bench_stop(&t);
}

static void overlays(void **unused)
{
	(void)unused;
	NEEDS_QEMU();
	static const char *const images[] = { "raw", "image" };
	struct block_bench t;
	block_bench_start(&t);
	uint8_t *model = make_model(&t, SIZE), *now = malloc(SIZE);
	must(&t, sh(&t, "qemu-img convert -f raw -O qcow2 -c raw image && sha256sum raw image > sums"), "convert");
	for (unsigned i = 0; i < 2; i++) {
		memcpy(now, model, SIZE);
		struct block *b = open_disk(&t, in_dir(&t, images[i]), i ? "overlay,cache=none" : "overlay,format=raw");
		assert_false(block_info(b)->read_only);
		assert_string_equal(block_info(b)->format, "qcow2");
		read_all(b, now, SIZE);
		random_ops(b, now, SIZE, OPS_ALL, 500, 77);
		read_all(b, now, SIZE);
		/* Somebody else may read the base meanwhile. */
		must(&t, sh(&t, "qemu-img convert -O raw %s back", images[i]), "base is not writable to us");
		block_close(b);
		must(&t, sh(&t, "sha256sum -c sums"), "the base is untouched");
	}
	/* A folder where nothing can be made. */
	struct block *b;
	setenv("TMPDIR", "/nonexistent", 1);
	assert_int_not_equal(try_open(&t, &b, in_dir(&t, "raw"), "overlay"), 0);
	assert_non_null(strstr(t.err.text, "TMPDIR"));
	unsetenv("TMPDIR");
	free(model);
	free(now);
	block_bench_stop(&t);
}

static void snapshots(void **unused)
{
	(void)unused;
	NEEDS_QEMU();
	struct block_bench t;
	block_bench_start(&t);
	uint8_t *model = make_model(&t, SIZE), *first = malloc(SIZE), *second = malloc(SIZE);
	for (unsigned v = 0; v < 3; v++) {
		static const char *const how[] = { "-o compat=1.1", "-c -o cluster_size=4k", "-o compat=0.10,cluster_size=4k" };
		must(&t, sh(&t, "rm -f image && qemu-img convert -f raw -O qcow2 %s raw image && qemu-img snapshot -c one image", how[v]), how[v]);
		memcpy(first, model, SIZE);
		memcpy(second, model, SIZE);
		struct block *b = open_disk(&t, in_dir(&t, "image"), "");
		random_ops(b, second, SIZE, OPS_ALL, 300, 3 + v);
		block_close(b);
		compare(&t, "image", second, SIZE);
		/* qemu-img does not resize version 2 images with snapshots. */
		uint64_t size = v == 2 ? SIZE : SIZE + (1 << 20);
		must(&t, sh(&t, "qemu-img snapshot -c two image && { test %u = 2 || qemu-img resize -q image %llu; }", v, (unsigned long long)size), "two");

		uint8_t *now = calloc(1, size);
		memcpy(now, second, SIZE);
		b = open_disk(&t, in_dir(&t, "image"), "");
		random_ops(b, now, size, OPS_ALL, 300, 4 + v);
		block_close(b);
		compare(&t, "image", now, size);
		free(now);

		b = open_disk(&t, in_dir(&t, "image"), "snapshot=one");
		assert_true(block_info(b)->read_only);
		assert_int_equal(block_info(b)->size, SIZE);
		read_all(b, first, SIZE);
		assert_int_equal(do_io(b, BLOCK_WRITE, 0, first, 512), -EROFS);
		block_close(b);
		b = open_disk(&t, in_dir(&t, "image"), "snapshot=2,overlay");
		memcpy(now = malloc(SIZE), second, SIZE);
		read_all(b, now, SIZE);
		random_ops(b, now, SIZE, OPS_ALL, 200, 5);
		block_close(b);
		free(now);
		must(&t, check(&t, "image"), "after reading snapshots");
	}
	struct block *b;
	assert_int_equal(try_open(&t, &b, in_dir(&t, "image"), "snapshot=three"), -ENOENT);
	assert_non_null(strstr(t.err.text, "one, two"));
	FILE *list = fopen(in_dir(&t, "list"), "w");
	assert_int_equal(block_list_snapshots(in_dir(&t, "image"), list, &t.err), 0);
	fclose(list);
	must(&t, sh(&t, "cat list && grep -q '^1  *one ' list && grep -q '^2  *two ' list"), "the list");
	assert_int_not_equal(block_list_snapshots(in_dir(&t, "raw"), stderr, &t.err), 0);
	/* Deleting them afterwards frees what we left of them. */
	must(&t, sh(&t, "qemu-img snapshot -d one image && qemu-img snapshot -d two image"), "delete");
	must(&t, check(&t, "image"), "after deleting snapshots");
	free(model);
	free(first);
	free(second);
	block_bench_stop(&t);
}

/* qemu-io is killed with refcounts unwritten: its image has the dirty bit. */
static void dirty_images(void **unused)
{
	(void)unused;
	NEEDS_QEMU();
	struct block_bench t;
	block_bench_start(&t);
	for (unsigned v = 0; v < 3; v++) {
		static const char *const how[] = { "cluster_size=64k", "cluster_size=512", "cluster_size=4k,refcount_bits=64" };
		must(&t, sh(&t, "rm -f image && qemu-img create -q -f qcow2 -o lazy_refcounts=on,%s image 4M && qemu-io -f qcow2 -c 'write -P 1 0 1M' image && "
				"qemu-img snapshot -c s image && qemu-io -f qcow2 -c 'write -P 2 512k 1M' -c flush -c 'sigraise 9' image; "
				"qemu-img info image | grep -i 'dirty\\|corrupt'; test $(qemu-img check image >/dev/null; echo $?) != 0",
			     how[v]), "a dirty image");
		uint8_t *model = calloc(1, SIZE);
		memset(model, 1, 1 << 20);
		memset(model + (512 << 10), 2, 1 << 20);
		struct block *b = open_disk(&t, in_dir(&t, "image"), "ro");
		read_all(b, model, SIZE);
		block_close(b);
		b = open_disk(&t, in_dir(&t, "image"), "");
		random_ops(b, model, SIZE, OPS_ALL, 100, 1);
		block_close(b);
		compare(&t, "image", model, SIZE);
		must(&t, sh(&t, "qemu-img convert -f qcow2 -l s -O raw image back && cmp -n 1048576 back /dev/zero; qemu-io -f raw -c 'read -P 1 0 1M' back"), "snapshot");
		free(model);
	}
	block_bench_stop(&t);
}

static void refused(struct block_bench *t, const char *name, const char *keys, const char *words)
{
	struct block *b = NULL;
	if (!try_open(t, &b, in_dir(t, name), keys))
		fail_msg("%s opened, but should say: %s", name, words);
	if (!strstr(t->err.text, words))
		fail_msg("\"%s\" should say: %s", t->err.text, words);
	assert_non_null(strstr(t->err.text, "--disk"));
}

static void refusals(void **unused)
{
	(void)unused;
	NEEDS_QEMU();
	struct block_bench t;
	block_bench_start(&t);
	must(&t, sh(&t, "qemu-img create -q -f qcow2 -o extended_l2=on sub 1M"), "create");
	refused(&t, "sub", "ro", "extended L2 entries");
	must(&t, sh(&t, "qemu-img create -q -f qcow2 -o data_file=data ext 1M"), "create");
	refused(&t, "ext", "ro", "external data file");
	must(&t, sh(&t, "qemu-img create -q -f qcow2 luks 1M && printf '\\2' | dd of=luks bs=1 seek=35 conv=notrunc"), "crypt method");
	refused(&t, "luks", "ro", "encrypted");
	/* An incompatible bit that nobody knows, 7, with a name and without. */
	must(&t, sh(&t, "qemu-img create -q -f qcow2 unknown 1M && printf '\\200' | dd of=unknown bs=1 seek=79 conv=notrunc"), "bit");
	refused(&t, "unknown", "ro", "(bit 7)");
	must(&t, sh(&t, "qemu-img create -q -f qcow2 v4 1M && printf '\\4' | dd of=v4 bs=1 seek=7 conv=notrunc"), "version");
	refused(&t, "v4", "", "version 4");
	must(&t, sh(&t, "qemu-img create -q -f qcow2 bits 1M && printf '\\37' | dd of=bits bs=1 seek=23 conv=notrunc"), "cluster bits");
	refused(&t, "bits", "", "2^31");
	must(&t, sh(&t, "qemu-img create -q -f qcow2 corrupt 1M && printf '\\2' | dd of=corrupt bs=1 seek=79 conv=notrunc"), "corrupt bit");
	refused(&t, "corrupt", "", "qemu-img check -r all");
	struct block *b = open_disk(&t, in_dir(&t, "corrupt"), "ro");
	block_close(b);
	must(&t, sh(&t, "qemu-img create -q -f qcow2 cut 1M && truncate -s 100k cut"), "cut");
	refused(&t, "cut", "", "not in the file");
	must(&t, sh(&t, "truncate -s 1M raw"), "raw");
	refused(&t, "raw", "format=qcow2", "not a qcow2 image");

	/* Backing files: none there, no format, one that is not supported, a circle. */
	must(&t, sh(&t, "qemu-img create -q -u -f qcow2 -b nothing -F raw gone 1M && qemu-img create -q -u -f qcow2 -b raw -F vmdk vmdk 1M && "
			"qemu-img create -q -u -f qcow2 -b loop2 -F qcow2 loop 1M && qemu-img create -q -u -f qcow2 -b loop -F qcow2 loop2 1M && "
			"qemu-img create -q -u -f qcow2 -b 'json:{\"driver\":\"null-co\"}' -F raw json 1M"),
	     "backing");
	refused(&t, "gone", "", "backing file of");
	refused(&t, "vmdk", "", "vmdk");
	refused(&t, "loop", "ro", "circle");
	refused(&t, "json", "", "json:");
	/* 2^32 refcounts in holes, to be counted anew at opening: the refcount table is the second cluster. */
	must(&t, sh(&t, "qemu-img create -q -f qcow2 -o cluster_size=2M,refcount_bits=1 holes 1M && truncate -s 1G holes && "
			"printf '\\1' | dd of=holes bs=1 seek=79 conv=notrunc"), "holes");
	int fd = open(in_dir(&t, "holes"), O_WRONLY);
	for (uint64_t i = 16; i < 272; i++) {
		uint64_t entry = __builtin_bswap64(i << 21);
		assert_int_equal(pwrite(fd, &entry, 8, (off_t)((2 << 20) + 8 * i)), 8);
	}
	close(fd);
	refused(&t, "holes", "", "cannot be repaired");
	/* qemu-img makes none without a format any more; the extension is taken out. */
	must(&t, sh(&t, "qemu-img create -q -u -f qcow2 -b raw -F raw nofmt 1M && printf '\\0\\0\\0\\1' | dd of=nofmt bs=1 seek=112 conv=notrunc && "
			"qemu-img info -U nofmt"), "no format");
	refused(&t, "nofmt", "", "backing-format=");
	b = open_disk(&t, in_dir(&t, "nofmt"), "backing-format=raw");
	block_close(b);

	/* Locks: ours against qemu-io's, and the other way round. */
	must(&t, sh(&t, "qemu-img create -q -f qcow2 image 1M"), "image");
	b = open_disk(&t, in_dir(&t, "image"), "");
	refused(&t, "image", "", "lock=off");
	assert_int_not_equal(sh(&t, "qemu-io -f qcow2 -c 'read 0 512' image"), 0);
	block_close(b);
	must(&t, sh(&t, "qemu-io -f qcow2 -c 'read 0 512' image"), "after us");
	block_bench_stop(&t);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(chains), cmocka_unit_test(overlays), cmocka_unit_test(snapshots), cmocka_unit_test(dirty_images), cmocka_unit_test(refusals),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
