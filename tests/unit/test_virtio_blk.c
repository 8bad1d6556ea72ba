/*
 * virtio-blk against a scripted driver: every request and every status, malformed ones, resets with requests in flight, on rings of
 * both formats. The image is looked at with plain system calls.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/keyval.h"
#include "block/block.h"
#include "device/virtio/blk.h"
#include "virtio_bench.h"
#include "virtio_log.h"

enum { T_IN = 0, T_OUT = 1, T_FLUSH = 4, T_GET_ID = 8, T_GET_LIFETIME = 10, T_DISCARD = 11, T_WRITE_ZEROES = 13 };
enum { S_OK = 0, S_IOERR = 1, S_UNSUPP = 2, S_NONE = 0xee };
#define F(n) VIRTIO_BIT(n)
#define DISK (1u << 20)
#define SECTORS (DISK / 512)

struct bed {
	struct vbench v;
	struct block *block;
	char path[64];
	int fd;
	/* What a request is made of, in guest memory. */
	uint64_t header, data, status;
	int id;
};

struct header {
	uint32_t type, reserved;
	uint64_t sector;
};

struct segment {
	uint64_t sector;
	uint32_t num, flags;
};

static void lay_out(struct bed *b)
{
	b->header = vbench_alloc(&b->v, 16, 16);
	b->data = vbench_alloc(&b->v, 256 << 10, 4096);
	b->status = vbench_alloc(&b->v, 1, 1);
}

static void open_bed(struct bed *b, const char *keys, uint64_t features)
{
	char spec[256];
	struct keyval kv;
	struct error err = { "" };
	struct virtio_blk_config c;
	vbench_open(&b->v, 16 << 20);
	strcpy(b->path, "/var/tmp/trapline-vblk-XXXXXX");
	b->fd = mkstemp(b->path);
	assert_true(b->fd >= 0);
	assert_int_equal(ftruncate(b->fd, DISK), 0);
	snprintf(spec, sizeof(spec), "%s,format=raw%s%s", b->path, *keys ? "," : "", keys);
	if (keyval_parse(&kv, "--disk", spec, "file", &err) || virtio_blk_parse(&c, &kv, &err) || block_open(&b->block, &kv, b->v.loop, &err) ||
	    keyval_finish(&kv, &err))
		fail_msg("%s", err.text);
	c.block = b->block;
	const struct virtio_host host = vbench_host(&b->v, "disk7");
	if (virtio_blk_create(&b->v.d, &c, &host, &err))
		fail_msg("%s", err.text);
	vbench_start(&b->v, features);
	lay_out(b);
}

static void close_bed(struct bed *b)
{
	b->v.d->ops->destroy(b->v.d);
	b->v.d = NULL;
	block_close(b->block);
	vbench_close(&b->v);
	close(b->fd);
	unlink(b->path);
}

static void put_header(struct bed *b, uint32_t type, uint64_t sector)
{
	struct header h = { type, 0, sector };
	memcpy(vbench_hva(&b->v, b->header), &h, sizeof(h));
	*(uint8_t *)vbench_hva(&b->v, b->status) = S_NONE;
}

struct wait {
	struct bed *b;
	unsigned q;
	int id;
	uint32_t len;
};

static bool is_used(void *opaque)
{
	struct wait *w = opaque;
	if (w->id < 0)
		w->id = vbench_used(&w->b->v, w->q, &w->len);
	return w->id >= 0;
}

/* Wait for the next answer. */
static uint32_t wait_used(struct bed *b, unsigned q, int id)
{
	struct wait w = { b, q, -1, 0 };
	if (!is_used(&w))
		assert_true(vbench_loop(&b->v, 5000, is_used, &w));
	assert_int_equal(w.id, id);
	return w.len;
}

/* One request in the usual shape; its status. */
static uint8_t request(struct bed *b, unsigned q, uint32_t type, uint64_t sector, uint32_t len)
{
	bool in = type == T_IN || type == T_GET_ID;
	struct vbuf bufs[3] = { { b->header, 16, false }, { b->data, len, in }, { b->status, 1, true } };
	if (!len)
		bufs[1] = bufs[2];
	put_header(b, type, sector);
	int id = vbench_add(&b->v, q, bufs, len ? 3 : 2);
	vbench_kick(&b->v, q);
	uint32_t used = wait_used(b, q, id);
	assert_int_equal(used, in ? len + 1 : 1);
	return *(uint8_t *)vbench_hva(&b->v, b->status);
}

static uint8_t *data(struct bed *b)
{
	return vbench_hva(&b->v, b->data);
}

static void fill(uint8_t *p, size_t len, uint32_t seed)
{
	for (size_t i = 0; i < len; i++) {
		seed = seed * 1664525u + 1013904223u;
		p[i] = (uint8_t)(seed >> 24);
	}
}

static void assert_file(struct bed *b, uint64_t offset, const uint8_t *bytes, size_t len)
{
	uint8_t *got = malloc(len);
	assert_int_equal(pread(b->fd, got, len, (off_t)offset), len);
	assert_memory_equal(got, bytes, len);
	free(got);
}

static uint64_t config_read(struct bed *b, unsigned offset, unsigned size)
{
	return virtio_config_read(b->v.d, offset, size) & (UINT64_MAX >> (64 - 8 * size));
}

static void config(void **unused)
{
	(void)unused;
	struct bed b;
	open_bed(&b, "queues=3,serial=S123,block-size=4096", VBENCH_FEATURES);
	assert_true(virtio_has(b.v.d, 2) && virtio_has(b.v.d, 6) && virtio_has(b.v.d, 9) && virtio_has(b.v.d, 10) && virtio_has(b.v.d, 11) &&
		    virtio_has(b.v.d, 12) && virtio_has(b.v.d, 13) && virtio_has(b.v.d, 14));
	assert_false(virtio_has(b.v.d, 5));
	assert_int_equal(virtio_config_read(b.v.d, 0, 8), SECTORS);
	assert_int_equal(config_read(&b, 12, 4), 254);
	assert_int_equal(config_read(&b, 20, 4), 4096);
	assert_int_equal(config_read(&b, 32, 1), 1);
	assert_int_equal(config_read(&b, 34, 2), 3);
	assert_int_equal(b.v.d->nqueues, 3);
	/* Only the write cache is the driver's. */
	virtio_config_write(b.v.d, 0, 4, 0);
	virtio_config_write(b.v.d, 32, 2, 0);
	assert_int_equal(virtio_config_read(b.v.d, 0, 8), SECTORS);
	assert_int_equal(config_read(&b, 32, 1), 1);
	virtio_config_write(b.v.d, 32, 1, 0);
	assert_int_equal(config_read(&b, 32, 1), 0);
	virtio_set_status(b.v.d, 0);
	assert_int_equal(config_read(&b, 32, 1), 1);
	close_bed(&b);

	open_bed(&b, "ro", VBENCH_FEATURES);
	assert_true(virtio_has(b.v.d, 5));
	assert_false(virtio_has(b.v.d, 9) || virtio_has(b.v.d, 11) || virtio_has(b.v.d, 12) || virtio_has(b.v.d, 13) || virtio_has(b.v.d, 14));
	close_bed(&b);

	open_bed(&b, "cache=writethrough,discard=ignore", VBENCH_FEATURES);
	assert_false(virtio_has(b.v.d, 9) || virtio_has(b.v.d, 11) || virtio_has(b.v.d, 13));
	assert_true(virtio_has(b.v.d, 14));
	assert_int_equal(config_read(&b, 32, 1), 0);
	assert_int_equal(config_read(&b, 56, 1), 0);
	close_bed(&b);
}

static void read_write(uint64_t features, const char *keys)
{
	struct bed b;
	open_bed(&b, keys, features);
	static uint8_t bytes[128 << 10];
	for (unsigned i = 0; i < 20; i++) {
		uint32_t len = 512u << i % 9;
		uint64_t sector = (i * 97) % (SECTORS - len / 512 + 1);
		unsigned q = i % b.v.d->nqueues;
		fill(bytes, len, i);
		memcpy(data(&b), bytes, len);
		assert_int_equal(request(&b, q, T_OUT, sector, len), S_OK);
		assert_file(&b, sector * 512, bytes, len);
		memset(data(&b), 0, len);
		assert_int_equal(request(&b, q, T_IN, sector, len), S_OK);
		assert_memory_equal(data(&b), bytes, len);
		assert_int_equal(request(&b, q, T_FLUSH, 0, 0), S_OK);
	}
	/* The end of the disk, and just behind it. */
	assert_int_equal(request(&b, 0, T_IN, SECTORS - 8, 4096), S_OK);
	assert_int_equal(request(&b, 0, T_IN, SECTORS - 7, 4096), S_IOERR);
	close_bed(&b);
}

static void read_write_split(void **unused)
{
	(void)unused;
	read_write(VBENCH_SPLIT, "queues=2");
	read_write(VBENCH_SPLIT, "aio=threads,cache=none");
}

static void read_write_packed(void **unused)
{
	(void)unused;
	read_write(VBENCH_FEATURES, "queues=2");
	read_write(VBENCH_FEATURES, "aio=threads");
}

/* Headers need not stand alone (2.7.4): cut everywhere, or all in one. */
static void framing(void **unused)
{
	(void)unused;
	struct bed b;
	open_bed(&b, "", VBENCH_FEATURES);
	uint64_t area = vbench_alloc(&b.v, 8192, 4096);
	uint8_t *a = vbench_hva(&b.v, area), bytes[1024];
	for (unsigned shape = 0; shape < 6; shape++) {
		struct header out = { T_OUT, 0, shape * 2 }, in = { T_IN, 0, shape * 2 };
		struct vbuf bufs[20];
		unsigned n = 0;
		fill(bytes, sizeof(bytes), shape);
		/* Header and data one behind the other, then the status. */
		memcpy(a, &out, 16);
		memcpy(a + 16, bytes, 1024);
		a[2000] = S_NONE;
		static const uint32_t cuts[6][5] = { { 1040 }, { 16, 1024 }, { 7, 1033 }, { 20, 500, 520 }, { 1, 14, 1, 1023, 1 }, { 528, 512 } };
		for (uint32_t at = 0; at < 1040; at += cuts[shape][n++])
			bufs[n] = (struct vbuf){ area + at, cuts[shape][n], false };
		bufs[n++] = (struct vbuf){ area + 2000, 1, true };
		int id = shape % 2 ? vbench_add_indirect(&b.v, 0, bufs, n) : vbench_add(&b.v, 0, bufs, n);
		vbench_kick(&b.v, 0);
		assert_int_equal(wait_used(&b, 0, id), 1);
		assert_int_equal(a[2000], S_OK);
		assert_file(&b, shape * 1024, bytes, 1024);

		/* And back: data and status one behind the other. */
		memcpy(a, &in, 16);
		memset(a + 4096, S_NONE, 1025);
		n = 0;
		bufs[n++] = (struct vbuf){ area, 9, false };
		bufs[n++] = (struct vbuf){ area + 9, 7, false };
		static const uint32_t back[6][4] = { { 1025 }, { 1024, 1 }, { 3, 1022 }, { 512, 513 }, { 1, 1, 1022, 1 }, { 1000, 25 } };
		unsigned k = 0;
		for (uint32_t at = 0; at < 1025; at += back[shape][k++])
			bufs[n++] = (struct vbuf){ area + 4096 + at, back[shape][k], true };
		id = shape % 2 ? vbench_add(&b.v, 0, bufs, n) : vbench_add_indirect(&b.v, 0, bufs, n);
		vbench_kick(&b.v, 0);
		assert_int_equal(wait_used(&b, 0, id), 1025);
		assert_memory_equal(a + 4096, bytes, 1024);
		assert_int_equal(a[4096 + 1024], S_OK);
	}
	close_bed(&b);
}

static void statuses(void **unused)
{
	(void)unused;
	static const struct {
		const char *keys;
		uint64_t without; /* features not taken */
		uint32_t type;
		uint64_t sector;
		uint32_t len;
		uint8_t status;
	} cases[] = {
		{ "", 0, T_IN, SECTORS, 512, S_IOERR },
		{ "", 0, T_IN, SECTORS, 0, S_OK },
		{ "", 0, T_IN, UINT64_MAX, 512, S_IOERR },
		{ "", 0, T_IN, UINT64_MAX / 512, 1024, S_IOERR },
		{ "", 0, T_IN, 1ull << 55, 512, S_IOERR },
		{ "", 0, T_IN, 0, 511, S_IOERR },
		{ "", 0, T_OUT, 0, 513, S_IOERR },
		{ "", 0, T_OUT, SECTORS - 1, 1024, S_IOERR },
		{ "ro", 0, T_OUT, 0, 512, S_IOERR },
		{ "ro", 0, T_FLUSH, 0, 0, S_OK },
		{ "ro", 0, T_DISCARD, 0, 16, S_IOERR },
		{ "", 0, T_GET_LIFETIME, 0, 0, S_UNSUPP },
		{ "", 0, 2, 0, 0, S_UNSUPP },
		{ "", 0, 0x80000000, 0, 512, S_UNSUPP },
		{ "", 0, UINT32_MAX, 0, 512, S_UNSUPP },
		{ "", 0, T_DISCARD, 0, 0, S_IOERR },
		{ "", 0, T_DISCARD, 0, 15, S_IOERR },
		{ "", 0, T_WRITE_ZEROES, 0, 17, S_IOERR },
		{ "", 0, T_DISCARD, 0, 65 * 16, S_IOERR },
		{ "", F(13), T_DISCARD, 0, 16, S_UNSUPP },
		{ "", F(14), T_WRITE_ZEROES, 0, 16, S_UNSUPP },
		{ "discard=ignore", 0, T_DISCARD, 0, 16, S_UNSUPP },
		{ "", 0, T_DISCARD, 0, 64 * 16, S_OK },
		{ "", 0, T_WRITE_ZEROES, 0, 64 * 16, S_OK },
	};
	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		struct bed b;
		open_bed(&b, cases[i].keys, VBENCH_FEATURES & ~cases[i].without);
		uint8_t status = request(&b, 0, cases[i].type, cases[i].sector, cases[i].len);
		if (status != cases[i].status)
			fail_msg("case %zu: status %u instead of %u", i, status, cases[i].status);
		assert_int_equal(virtio_get_status(b.v.d) & VIRTIO_STATUS_NEEDS_RESET, 0);
		close_bed(&b);
	}
}

static void get_id(void **unused)
{
	(void)unused;
	struct bed b;
	open_bed(&b, "serial=12345678901234567890", VBENCH_FEATURES);
	memset(data(&b), 0xff, 64);
	assert_int_equal(request(&b, 0, T_GET_ID, 0, 20), S_OK);
	assert_memory_equal(data(&b), "12345678901234567890", 20);
	memset(data(&b), 0xff, 64);
	assert_int_equal(request(&b, 0, T_GET_ID, 0, 5), S_OK);
	assert_memory_equal(data(&b), "12345\xff", 6);
	assert_int_equal(request(&b, 0, T_GET_ID, 0, 64), S_OK);
	assert_int_equal(data(&b)[20], 0xff);
	assert_int_equal(request(&b, 0, T_GET_ID, 0, 0), S_OK);
	close_bed(&b);

	/* Without one it is the device's name. */
	open_bed(&b, "", VBENCH_FEATURES);
	assert_int_equal(request(&b, 0, T_GET_ID, 0, 20), S_OK);
	assert_memory_equal(data(&b), "disk7\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", 20);
	close_bed(&b);
}

static void segments(void **unused)
{
	(void)unused;
	struct bed b;
	static uint8_t bytes[DISK];
	struct stat st;
	open_bed(&b, "", VBENCH_FEATURES);
	memset(bytes, 0x77, DISK);
	assert_int_equal(pwrite(b.fd, bytes, DISK, 0), DISK);
	const struct segment several[3] = { { 8, 8, 0 }, { 1, 1, 0 }, { SECTORS - 16, 16, 1 } };
	memcpy(data(&b), several, sizeof(several));
	assert_int_equal(request(&b, 0, T_WRITE_ZEROES, 0, sizeof(several)), S_OK);
	memset(bytes + 8 * 512, 0, 8 * 512);
	memset(bytes + 512, 0, 512);
	memset(bytes + DISK - 16 * 512, 0, 16 * 512);
	assert_file(&b, 0, bytes, DISK);

	/* One bad segment, and none is done. */
	const struct segment behind[2] = { { 32, 8, 0 }, { SECTORS - 1, 2, 0 } }, flags[2] = { { 32, 8, 0 }, { 64, 8, 2 } };
	const struct segment wrap = { UINT64_MAX, 2, 0 }, large = { 0, UINT32_MAX, 0 }, unmap = { 32, 8, 1 };
	memcpy(data(&b), behind, sizeof(behind));
	assert_int_equal(request(&b, 0, T_WRITE_ZEROES, 0, sizeof(behind)), S_IOERR);
	assert_int_equal(request(&b, 0, T_DISCARD, 0, sizeof(behind)), S_IOERR);
	memcpy(data(&b), flags, sizeof(flags));
	assert_int_equal(request(&b, 0, T_WRITE_ZEROES, 0, sizeof(flags)), S_UNSUPP);
	memcpy(data(&b), &wrap, sizeof(wrap));
	assert_int_equal(request(&b, 0, T_WRITE_ZEROES, 0, sizeof(wrap)), S_IOERR);
	memcpy(data(&b), &large, sizeof(large));
	assert_int_equal(request(&b, 0, T_DISCARD, 0, sizeof(large)), S_IOERR);
	memcpy(data(&b), &unmap, sizeof(unmap));
	assert_int_equal(request(&b, 0, T_DISCARD, 0, sizeof(unmap)), S_UNSUPP);
	assert_file(&b, 0, bytes, DISK);

	/* A discard gives the space back. */
	const struct segment all = { 0, SECTORS, 0 };
	memcpy(data(&b), &all, sizeof(all));
	assert_int_equal(request(&b, 0, T_DISCARD, 0, sizeof(all)), S_OK);
	assert_int_equal(fstat(b.fd, &st), 0);
	assert_true(st.st_blocks <= 16);
	assert_int_equal(st.st_size, DISK);
	close_bed(&b);
}

/* What leaves no place for a status ends the device's work until its reset. */
static void broken(void **unused)
{
	(void)unused;
	struct log_capture log;
	struct bed b;
	open_bed(&b, "", VBENCH_FEATURES);
	for (unsigned shape = 0; shape < 3; shape++) {
		struct vbuf bufs[2] = { { b.header, shape == 0 ? 15 : 16, false }, { b.status, 1, true } };
		put_header(&b, T_IN, 0);
		vbench_add(&b.v, 0, shape == 2 ? bufs + 1 : bufs, shape == 0 ? 2 : 1);
		log_start(&log);
		vbench_kick(&b.v, 0);
		const char *text = log_take(&log);
		log_stop(&log);
		assert_int_equal(log_lines(text), 1);
		assert_non_null(strstr(text, "disk7"));
		assert_true(virtio_get_status(b.v.d) & VIRTIO_STATUS_NEEDS_RESET);
		assert_int_equal(*(uint8_t *)vbench_hva(&b.v, b.status), S_NONE);
		vbench_start(&b.v, VBENCH_FEATURES);
		lay_out(&b);
		assert_int_equal(request(&b, 0, T_IN, 0, 512), S_OK);
	}
	close_bed(&b);
}

/* Many in one notification: all in one go, and one interrupt. */
static void batch(void **unused)
{
	(void)unused;
	struct bed b;
	open_bed(&b, "aio=threads", VBENCH_FEATURES & ~F(VIRTIO_F_EVENT_IDX));
	static uint8_t bytes[32 * 4096];
	fill(bytes, sizeof(bytes), 3);
	assert_int_equal(pwrite(b.fd, bytes, sizeof(bytes), 0), sizeof(bytes)); /* so it is in the page cache */
	uint64_t headers = vbench_alloc(&b.v, 32 * 16, 16), status = vbench_alloc(&b.v, 32, 1);
	for (unsigned i = 0; i < 32; i++) {
		struct header h = { T_IN, 0, i * 8 };
		memcpy((struct header *)vbench_hva(&b.v, headers) + i, &h, sizeof(h));
		vbench_add(&b.v, 0, (struct vbuf[]){ { headers + i * 16, 16, false }, { b.data + i * 4096, 4096, true }, { status + i, 1, true } }, 3);
	}
	b.v.interrupts[0] = 0;
	vbench_kick(&b.v, 0);
	unsigned got = 0;
	while (vbench_used(&b.v, 0, NULL) >= 0)
		got++;
	/* A page cache may be under pressure; most times all is there at once. */
	if (got == 32) {
		assert_int_equal(b.v.interrupts[0], 1);
		assert_memory_equal(data(&b), bytes, sizeof(bytes));
	} else {
		print_message("only %u of 32 reads came from the page cache\n", got);
	}
	close_bed(&b);
}

/* With the write cache off, or unknown to the driver, a write that is answered was flushed. */
static void write_cache(void **unused)
{
	(void)unused;
	struct bed b;
	struct block_stats s;
	open_bed(&b, "", VBENCH_FEATURES);
	assert_int_equal(request(&b, 0, T_OUT, 0, 4096), S_OK);
	block_get_stats(b.block, &s);
	assert_int_equal(s.flushes, 0);
	virtio_config_write(b.v.d, 32, 1, 0);
	assert_int_equal(request(&b, 0, T_OUT, 0, 4096), S_OK);
	memcpy(data(&b), &(struct segment){ 0, 8, 0 }, 16);
	assert_int_equal(request(&b, 0, T_WRITE_ZEROES, 0, 16), S_OK);
	block_get_stats(b.block, &s);
	assert_int_equal(s.flushes, 2);
	virtio_config_write(b.v.d, 32, 1, 1);
	assert_int_equal(request(&b, 0, T_OUT, 0, 4096), S_OK);
	block_get_stats(b.block, &s);
	assert_int_equal(s.flushes, 2);
	close_bed(&b);

	open_bed(&b, "", VBENCH_FEATURES & ~(F(9) | F(11)));
	assert_int_equal(request(&b, 0, T_OUT, 0, 4096), S_OK);
	block_get_stats(b.block, &s);
	assert_int_equal(s.flushes, 1);
	close_bed(&b);
}

static bool reset_is_done(void *opaque)
{
	struct bed *b = opaque;
	return !virtio_get_status(b->v.d);
}

static bool queue_is_reset(void *opaque)
{
	struct bed *b = opaque;
	struct virtq_regs regs;
	virtq_get_regs(b->v.d, 0, &regs);
	return !regs.resetting;
}

/* A limit of operations keeps requests in flight for as long as the test needs. */
static void in_flight(struct bed *b, unsigned n)
{
	put_header(b, T_IN, 0);
	for (unsigned i = 0; i < n; i++)
		vbench_add(&b->v, 0, (struct vbuf[]){ { b->header, 16, false }, { b->data, 4096, true }, { b->status, 1, true } }, 3);
	vbench_kick(&b->v, 0);
	struct block_stats s;
	block_get_stats(b->block, &s);
	assert_true(s.in_flight > 0);
}

/* A backend that takes whole blocks only decides what a sector is. */
static void whole_blocks(void **unused)
{
	(void)unused;
	struct bed b;
	struct error err;
	open_bed(&b, "", VBENCH_FEATURES);
	assert_int_equal(config_read(&b, 20, 4), 512);
	b.v.d->ops->destroy(b.v.d);
	struct block_info *info = (struct block_info *)(uintptr_t)block_info(b.block);
	info->logical_block = 4096;
	info->whole_blocks = true;
	struct virtio_blk_config c = { .block = b.block, .queues = 1, .queue_size = 64, .logical_block = 512 };
	const struct virtio_host host = vbench_host(&b.v, "disk7");
	assert_int_equal(virtio_blk_create(&b.v.d, &c, &host, &err), -EINVAL);
	assert_non_null(strstr(err.text, "leave block-size=512 out"));
	c.logical_block = 0;
	assert_int_equal(virtio_blk_create(&b.v.d, &c, &host, &err), 0);
	assert_int_equal(config_read(&b, 20, 4), 4096);
	close_bed(&b);
}

/* Of requests that a reset overtakes, the RAM watcher hears too: their data is in memory all the same. */
static void count_written(void *opaque, uint64_t gpa, uint64_t len)
{
	(void)gpa;
	*(uint64_t *)opaque += len;
}

static void resets(void **unused)
{
	(void)unused;
	struct bed b;
	uint64_t told = 0;
	open_bed(&b, "iops=50", VBENCH_FEATURES);
	ram_set_watcher(&b.v.ram, &(struct ram_watcher){ .written = count_written, .opaque = &told });
	in_flight(&b, 15);
	virtio_set_status(b.v.d, 0);
	assert_int_not_equal(virtio_get_status(b.v.d), 0);
	assert_true(vbench_loop(&b.v, 10000, reset_is_done, &b));
	assert_true(told >= 15 * 4097);
	ram_set_watcher(&b.v.ram, NULL);
	struct block_stats s;
	block_get_stats(b.block, &s);
	assert_int_equal(s.in_flight, 0);
	vbench_start(&b.v, VBENCH_FEATURES);
	lay_out(&b);
	assert_int_equal(request(&b, 0, T_IN, 0, 512), S_OK);

	/* One queue. */
	in_flight(&b, 10);
	virtq_reset(b.v.d, 0);
	assert_false(queue_is_reset(&b));
	assert_true(vbench_loop(&b.v, 10000, queue_is_reset, &b));
	vbench_queue(&b.v, 0, 256);
	virtq_enable(b.v.d, 0);
	lay_out(&b);
	assert_int_equal(request(&b, 0, T_IN, 0, 512), S_OK);

	/* The machine goes: the device waits, but not for the limit. */
	in_flight(&b, 60);
	uint64_t start = clock_ns();
	close_bed(&b);
	assert_true(clock_ns() - start < 1000000000);
}

static void keys(void **unused)
{
	(void)unused;
	static const struct {
		const char *spec;
		int result;
		const char *says;
	} cases[] = {
		{ "f,serial=123456789012345678901", -EINVAL, "1 to 20" },
		{ "f,serial=", -EINVAL, "1 to 20" },
		{ "f,queues=0", -ERANGE, "queues" },
		{ "f,queues=9", -ERANGE, "queues" },
		{ "f,queue-size=100", -EINVAL, "power of two" },
		{ "f,queue-size=2048", -ERANGE, "queue-size" },
		{ "f,block-size=1024", -EINVAL, "512 or 4096" },
		{ "f,block-size=4096,physical-block-size=512", -EINVAL, "physical-block-size" },
		{ "f,physical-block-size=3000", -EINVAL, "power of two" },
		{ "f,queues=8,queue-size=1024,block-size=4K,physical-block-size=64K,serial=x", 0, "" },
	};
	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		struct keyval kv;
		struct error err = { "" };
		struct virtio_blk_config c;
		assert_int_equal(keyval_parse(&kv, "--disk", cases[i].spec, "file", &err), 0);
		int r = virtio_blk_parse(&c, &kv, &err);
		if (r != cases[i].result || !strstr(err.text, cases[i].says))
			fail_msg("%s: %d, %s", cases[i].spec, r, err.text);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(config),   cmocka_unit_test(read_write_split), cmocka_unit_test(read_write_packed), cmocka_unit_test(framing),
		cmocka_unit_test(statuses), cmocka_unit_test(get_id),		cmocka_unit_test(segments),	     cmocka_unit_test(broken),
		cmocka_unit_test(batch),    cmocka_unit_test(write_cache),	cmocka_unit_test(resets), cmocka_unit_test(whole_blocks),	     cmocka_unit_test(keys),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
