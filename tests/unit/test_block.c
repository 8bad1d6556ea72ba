/*
 * Disks on raw files: every cache mode and engine against a model in memory, ranges and refusals, limits, and locks against real
 * qemu-io.
 */
#include "block_bench.h"

#include <sys/wait.h>

#include "block/bounce.h"
#include "block/driver.h"
#include "block/throttle.h"

#define DISK (2u << 20)
#define SLOTS 16

/* --- against a model --- */

static uint32_t rnd(uint32_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 17;
	*state ^= *state << 5;
	return *state;
}

struct slot {
	struct sync_request s;
	struct iovec v[8];
	uint8_t *memory; /* room for the data of a request at any alignment */
	uint64_t offset, len;
	bool busy;
};

/* Cut [memory, memory+len) at places that are multiples of `grain`. */
static unsigned cut(struct slot *s, uint8_t *memory, uint64_t len, uint64_t grain, uint32_t *state)
{
	unsigned n = 0;
	while (len) {
		uint64_t part = n == 7 ? len : (rnd(state) % (len / grain + 1)) * grain;
		if (!part)
			part = len < grain ? len : grain;
		s->v[n++] = (struct iovec){ memory, part };
		memory += part;
		len -= part;
	}
	return n;
}

static bool overlaps(const struct slot *slots, uint64_t offset, uint64_t len)
{
	for (int i = 0; i < SLOTS; i++) {
		if (slots[i].busy && offset < slots[i].offset + slots[i].len && slots[i].offset < offset + len)
			return true;
	}
	return false;
}

static void finish(struct slot *s, const uint8_t *model)
{
	assert_true(s->s.finished);
	assert_int_equal(s->s.result, 0);
	if (s->s.r.op == BLOCK_READ) {
		uint64_t at = s->offset;
		for (unsigned i = 0; i < s->s.r.niov; i++) {
			assert_memory_equal(s->v[i].iov_base, model + at, s->v[i].iov_len);
			at += s->v[i].iov_len;
		}
	}
	s->busy = false;
}

static void random_io(struct block *b, uint8_t *model, uint64_t size, unsigned rounds, uint32_t seed)
{
	static struct slot slots[SLOTS];
	uint32_t state = seed;
	for (int i = 0; i < SLOTS; i++) {
		slots[i].busy = false;
		if (!slots[i].memory)
			slots[i].memory = aligned_alloc(4096, (128 << 10) + 4096);
	}
	for (unsigned round = 0; round < rounds; round++) {
		struct slot *s = &slots[round % SLOTS];
		if (s->busy) {
			block_drain(b);
			for (int i = 0; i < SLOTS; i++) {
				if (slots[i].busy)
					finish(&slots[i], model);
			}
		}
		uint64_t len = 512 * (1 + rnd(&state) % 250), offset = rnd(&state) % (size / 512) * 512;
		if (offset + len > size)
			len = size - offset;
		/* What is in flight is in no order. */
		if (overlaps(slots, offset, len))
			continue;
		/* Sometimes as a guest's page cache would have it, sometimes as nobody should. */
		uint64_t grain = rnd(&state) % 4 ? 512 : 1;
		uint8_t *memory = s->memory + (grain == 1 ? rnd(&state) % 4096 : 0);
		s->offset = offset;
		s->len = len;
		s->busy = true;
		unsigned n = cut(s, memory, len, grain, &state);
		enum block_op op = BLOCK_READ;
		unsigned flags = 0;
		switch (rnd(&state) % 10) {
		case 0 ... 3:
			break;
		case 4 ... 7:
			op = BLOCK_WRITE;
			fill(memory, len, rnd(&state));
			memcpy(model + offset, memory, len);
			break;
		case 8:
			op = BLOCK_WRITE_ZEROES;
			flags = rnd(&state) % 2 ? BLOCK_MAY_UNMAP : 0;
			memset(model + offset, 0, len);
			break;
		default:
			op = BLOCK_FLUSH;
			s->offset = s->len = 0;
		}
		if (op == BLOCK_READ)
			memset(memory, 0xdd, len);
		s->s = (struct sync_request){ 0 };
		s->s.r = (struct block_request){
			.op = op, .flags = flags, .offset = s->offset, .len = s->len, .iov = s->v, .niov = n, .done = sync_done, .opaque = &s->s
		};
		block_submit(b, &s->s.r);
		if (rnd(&state) % 3 == 0)
			block_kick(b);
	}
	block_drain(b);
	for (int i = 0; i < SLOTS; i++) {
		if (slots[i].busy)
			finish(&slots[i], model);
	}
}

static void check_file(const char *path, const uint8_t *model, uint64_t size)
{
	uint8_t *bytes = malloc(size);
	int fd = open(path, O_RDONLY);
	assert_int_equal(pread(fd, bytes, size, 0), size);
	struct stat st;
	assert_int_equal(fstat(fd, &st), 0);
	assert_int_equal(st.st_size, size);
	close(fd);
	assert_memory_equal(bytes, model, size);
	free(bytes);
}

static void modes(void **unused)
{
	(void)unused;
	static const char *const caches[] = { "writeback", "none", "writethrough", "directsync", "unsafe" };
	static const char *const engines[] = { "auto", "threads" };
	struct block_bench t;
	block_bench_start(&t);
	uint8_t *model = malloc(DISK);
	fill(model, DISK, 1);
	const char *path = make_file(&t, "disk", DISK, model);
	for (unsigned c = 0; c < 5; c++) {
		for (unsigned e = 0; e < 2; e++) {
			char keys[64];
			snprintf(keys, sizeof(keys), "cache=%s,aio=%s", caches[c], engines[e]);
			struct block *b;
			int r = try_open(&t, &b, path, keys);
			if (r == -EINVAL && strstr(t.err.text, "O_DIRECT")) {
				print_message("skipped: %s\n", t.err.text);
				continue;
			}
			assert_int_equal(r, 0);
			assert_int_equal(block_info(b)->size, DISK);
			assert_int_equal(block_info(b)->write_cache, c != 2 && c != 3);
			random_io(b, model, DISK, c == 2 || c == 3 ? 150 : 500, 99 + c);
			struct block_stats stats;
			block_get_stats(b, &stats);
			assert_int_equal(stats.in_flight, 0);
			assert_int_equal(stats.errors, 0);
			assert_true(stats.reads && stats.writes && stats.read_bytes > stats.reads * 512);
			block_close(b);
			check_file(path, model, DISK);
		}
	}
	free(model);
	block_bench_stop(&t);
}

/* A disk of 4096-byte sectors under O_DIRECT: writes of 512 bytes read the rest, alone. A loop device is one; where there is none, the part
 * that does it is tested by itself. */
static void big_sectors(void **unused)
{
	(void)unused;
	struct block_bench t;
	block_bench_start(&t);
	uint8_t *model = malloc(DISK);
	fill(model, DISK, 2);
	const char *path = make_file(&t, "disk", DISK, model);

	int fd = open(path, O_RDWR);
	struct bounce bounce = { .fd = fd, .align = 4096, .size = DISK };
	uint8_t *data = malloc(DISK), *back = malloc(DISK);
	uint32_t state = 7;
	for (int i = 0; i < 200; i++) {
		uint64_t len = 512 * (1 + rnd(&state) % (i % 20 ? 30 : 3000)), offset = rnd(&state) % (DISK / 512) * 512;
		if (offset + len > DISK)
			len = DISK - offset;
		fill(data, len, rnd(&state));
		struct iovec v[2] = { { data, len / 3 }, { data + len / 3, len - len / 3 } };
		assert_int_equal(bounce_write(&bounce, i % 7 ? v : NULL, 2, offset, len), 0);
		if (i % 7)
			memcpy(model + offset, data, len);
		else
			memset(model + offset, 0, len);
		offset = offset > 1024 ? offset - 1024 : 0;
		len = len + 2048 < DISK - offset ? len + 2048 : DISK - offset;
		struct iovec w[2] = { { back, 100 }, { back + 100, len - 100 } };
		assert_int_equal(bounce_read(&bounce, w, 2, offset, len), 0);
		assert_memory_equal(back, model + offset, len);
	}
	close(fd);
	check_file(path, model, DISK);

	char command[512], device[64] = "";
	snprintf(command, sizeof(command), "losetup --sector-size 4096 --show -f %s 2>/dev/null", path);
	FILE *p = popen(command, "r");
	bool have = p && fgets(device, sizeof(device), p);
	if (p)
		pclose(p);
	device[strcspn(device, "\n")] = '\0';
	if (!have || device[0] != '/') {
		print_message("no loop device to be had: only the bounce buffer was tested\n");
	} else {
		struct block *b = NULL;
		int r = try_open(&t, &b, device, "cache=none");
		if (!r) {
			assert_int_equal(block_info(b)->logical_block, 4096);
			random_io(b, model, DISK, 500, 5);
			block_close(b);
		}
		snprintf(command, sizeof(command), "losetup -d %s", device);
		assert_int_equal(system(command), 0);
		if (r)
			fail_msg("%s", t.err.text);
		check_file(path, model, DISK);
	}
	free(data);
	free(back);
	free(model);
	block_bench_stop(&t);
}

/* --- edges --- */

static void ranges(void **unused)
{
	(void)unused;
	struct block_bench t;
	block_bench_start(&t);
	static uint8_t buf[4096];
	struct block *b = open_disk(&t, make_file(&t, "disk", 8192, NULL), "");
	assert_int_equal(do_io(b, BLOCK_READ, 8192, buf, 512), -EINVAL);
	assert_int_equal(do_io(b, BLOCK_READ, 8192 - 512, buf, 1024), -EINVAL);
	assert_int_equal(do_io(b, BLOCK_READ, UINT64_MAX - 511, buf, 512), -EINVAL);
	assert_int_equal(do_io(b, BLOCK_WRITE, UINT64_MAX - 511, buf, 1024), -EINVAL);
	assert_int_equal(do_io(b, BLOCK_READ, 1, buf, 512), -EINVAL);
	assert_int_equal(do_io(b, BLOCK_READ, 0, buf, 511), -EINVAL);
	assert_int_equal(do_io(b, BLOCK_DISCARD, 512, NULL, 8192), -EINVAL);
	assert_int_equal(do_io(b, BLOCK_WRITE_ZEROES, 0, NULL, UINT64_MAX & ~511ull), -EINVAL);
	assert_int_equal(do_io(b, BLOCK_READ, 8192, buf, 0), 0);
	assert_int_equal(do_io(b, BLOCK_FLUSH, 0, NULL, 0), 0);
	struct block_stats stats;
	block_get_stats(b, &stats);
	assert_int_equal(stats.errors, 8);
	block_close(b);

	b = open_disk(&t, in_dir(&t, "disk"), "ro");
	assert_true(block_info(b)->read_only);
	assert_int_equal(do_io(b, BLOCK_READ, 0, buf, 512), 0);
	assert_int_equal(do_io(b, BLOCK_WRITE, 0, buf, 512), -EROFS);
	assert_int_equal(do_io(b, BLOCK_WRITE_ZEROES, 0, NULL, 512), -EROFS);
	assert_int_equal(do_io(b, BLOCK_DISCARD, 0, NULL, 512), -EROFS);
	assert_int_equal(do_io(b, BLOCK_FLUSH, 0, NULL, 0), 0);
	assert_non_null(strstr(block_describe(b), "read-only"));
	block_close(b);
	block_bench_stop(&t);
}

/* 512 + 100 bytes are two sectors; the second ends in zeroes and cannot be written. */
static void odd_size(void **unused)
{
	(void)unused;
	struct block_bench t;
	block_bench_start(&t);
	uint8_t bytes[612], buf[1024], *aligned = aligned_alloc(4096, 4096);
	memset(bytes, 0xab, sizeof(bytes));
	const char *path = make_file(&t, "odd", sizeof(bytes), bytes);
	static const char *const keys[] = { "", "aio=threads", "cache=none", "cache=none,aio=threads" };
	for (int i = 0; i < 4; i++) {
		struct block *b;
		if (try_open(&t, &b, path, keys[i])) {
			assert_non_null(strstr(t.err.text, "O_DIRECT"));
			continue;
		}
		assert_int_equal(block_info(b)->size, 1024);
		memset(buf, 0xff, sizeof(buf));
		memset(aligned, 0xff, 1024);
		assert_int_equal(do_io(b, BLOCK_READ, 0, buf, 1024), 0);
		assert_int_equal(do_io(b, BLOCK_READ, 0, aligned, 1024), 0);
		assert_memory_equal(buf, aligned, 1024);
		assert_int_equal(buf[611], 0xab);
		for (int j = 612; j < 1024; j++)
			assert_int_equal(buf[j], 0);
		assert_int_equal(do_io(b, BLOCK_WRITE, 512, aligned, 512), -EIO);
		assert_int_equal(do_io(b, BLOCK_WRITE_ZEROES, 0, NULL, 1024), -EIO);
		assert_int_equal(do_io(b, BLOCK_WRITE, 0, aligned, 512), 0);
		block_close(b);
	}
	check_file(path, bytes, sizeof(bytes));
	free(aligned);
	block_bench_stop(&t);
}

static uint64_t allocated(const char *path)
{
	struct stat st;
	assert_int_equal(stat(path, &st), 0);
	return (uint64_t)st.st_blocks * 512;
}

static void discards(void **unused)
{
	(void)unused;
	struct block_bench t;
	block_bench_start(&t);
	uint8_t *data = malloc(DISK);
	memset(data, 1, DISK);
	const char *path = make_file(&t, "disk", DISK, data);
	uint64_t before = allocated(path);

	struct block *b = open_disk(&t, path, "discard=ignore");
	assert_int_equal(block_info(b)->discard_granularity, 0);
	assert_int_equal(do_io(b, BLOCK_DISCARD, 0, NULL, DISK / 2), 0);
	block_close(b);
	assert_int_equal(allocated(path), before);

	b = open_disk(&t, path, "");
	assert_true(block_info(b)->discard_granularity > 0);
	assert_int_equal(do_io(b, BLOCK_DISCARD, 0, NULL, DISK / 2), 0);
	assert_true(allocated(path) <= before / 2 + 8192);
	/* Zeroes without leave to unmap keep the space; with it they give it back. */
	uint64_t half = allocated(path);
	assert_int_equal(do_io(b, BLOCK_WRITE_ZEROES, DISK / 2, NULL, DISK / 4), 0);
	assert_true(allocated(path) >= half);
	struct sync_request s;
	s = (struct sync_request){ 0 };
	s.r = (struct block_request){ .op = BLOCK_WRITE_ZEROES, .flags = BLOCK_MAY_UNMAP, .offset = DISK / 2, .len = DISK / 2, .done = sync_done, .opaque = &s };
	block_submit(b, &s.r);
	block_drain(b);
	assert_int_equal(s.result, 0);
	assert_true(allocated(path) <= 8192);
	block_close(b);
	free(data);
	block_bench_stop(&t);
}

static void refusals(void **unused)
{
	(void)unused;
	struct block_bench t;
	block_bench_start(&t);
	struct block *b;
	make_file(&t, "good", 4096, NULL);
	make_file(&t, "empty", 0, NULL);
	assert_int_equal(mkdir(in_dir(&t, "folder"), 0700), 0);
	assert_int_equal(mkfifo(in_dir(&t, "fifo"), 0600), 0);
	const struct {
		const char *file, *keys;
		int result;
		const char *says;
	} cases[] = {
		{ "missing", "", -ENOENT, "truncate -s" },
		{ "folder", "", -EISDIR, "--share" },
		{ "fifo", "", -EINVAL, "block device" },
		{ "empty", "", -EINVAL, "truncate -s" },
		{ "good/below", "", -ENOENT, "no such file" },
		{ "good", "cache=fast", -EINVAL, "writethrough" },
		{ "good", "format=vmdk", -EINVAL, "qcow2" },
		{ "good", "aio=native", -EINVAL, "io_uring" },
		{ "good", "ro=perhaps", -EINVAL, "ro=on" },
		{ "good", "iops=0", -ERANGE, "iops" },
		{ "good", "bps=7", -ERANGE, "512" },
		{ "good", "bps-rd=fast", -EINVAL, "bps-rd" },
		{ "good", "snapshot=one", -EINVAL, "qcow2" },
		{ "good", "discard=maybe", -EINVAL, "unmap" },
	};
	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		int r = try_open(&t, &b, in_dir(&t, cases[i].file), cases[i].keys);
		if (r != cases[i].result || !strstr(t.err.text, cases[i].says) || !strstr(t.err.text, "--disk"))
			fail_msg("%s,%s: %d, %s", cases[i].file, cases[i].keys, r, t.err.text);
	}
	assert_int_equal(try_open(&t, &b, "/dev/null", ""), -EINVAL);
	assert_int_equal(try_open(&t, &b, "ro", ""), -ENOENT);
	struct keyval kv;
	assert_int_equal(keyval_parse(&kv, "--disk", "ro,cache=none", NULL, &t.err), 0);
	assert_int_equal(block_open(&b, &kv, t.b.loop, &t.err), -EINVAL);
	assert_non_null(strstr(t.err.text, "no image"));

	/* Root may do everything. */
	if (geteuid()) {
		assert_int_equal(chmod(in_dir(&t, "good"), 0400), 0);
		assert_int_equal(try_open(&t, &b, in_dir(&t, "good"), ""), -EACCES);
		assert_non_null(strstr(t.err.text, "take ro"));
	}
	block_bench_stop(&t);
}

/* A guest that writes a qcow2 header to a disk whose format was guessed could name any file of the host at the next start. */
static void guessed(void **unused)
{
	(void)unused;
	struct block_bench t;
	block_bench_start(&t);
	static const char *const keys[] = { "", "cache=none", "cache=writethrough,aio=threads" };
	uint8_t *buf = aligned_alloc(4096, 8192), back[512];
	static const uint8_t head[] = { 'Q', 'F', 'I', 0xfb, 0, 0, 0, 3 };
	for (int i = 0; i < 3; i++) {
		const char *path = make_file(&t, "disk", DISK, NULL);
		struct block *b = open_disk(&t, path, keys[i]);
		fill(buf, 8192, 4);
		assert_int_equal(do_io(b, BLOCK_WRITE, 0, buf, 8192), 0);
		memcpy(buf, head, sizeof(head));
		assert_int_equal(do_io(b, BLOCK_WRITE, 0, buf, 8192), -EPERM);
		assert_int_equal(do_io(b, BLOCK_WRITE, 0, buf, 512), -EPERM);
		assert_int_equal(do_io(b, BLOCK_WRITE, 4096, buf, 512), 0);
		assert_int_equal(do_io(b, BLOCK_READ, 0, back, 512), 0);
		assert_memory_not_equal(back, head, 4);
		block_close(b);
		/* Who says that it is raw may write what he likes, and has it back. */
		char raw[64];
		snprintf(raw, sizeof(raw), "format=raw%s%s", *keys[i] ? "," : "", keys[i]);
		b = open_disk(&t, path, raw);
		assert_int_equal(do_io(b, BLOCK_WRITE, 0, buf, 8192), 0);
		block_close(b);
		b = open_disk(&t, path, raw);
		assert_int_equal(do_io(b, BLOCK_READ, 0, back, 512), 0);
		assert_memory_equal(back, buf, 512);
		block_close(b);
	}
	free(buf);
	block_bench_stop(&t);
}

/* --- limits --- */

static void buckets(void **unused)
{
	(void)unused;
	/* Ten seconds of a greedy guest. Small requests reach the rate, with the burst on top; large ones overdraw and pay for it. */
	const struct {
		struct throttle t;
		uint64_t bytes;
		uint64_t reads, writes; /* in 10 s */
	} cases[] = {
		{ { .ops = { [THROTTLE_ALL] = 100 } }, 4096, 505, 505 },
		{ { .ops = { [THROTTLE_READ] = 1000, [THROTTLE_WRITE] = 10 } }, 4096, 10100, 101 },
		{ { .bytes = { [THROTTLE_WRITE] = 1 << 20 } }, 1 << 20, 0, 11 },
		{ { .bytes = { [THROTTLE_READ] = 1 << 20 } }, 64 << 20, 1, 0 },
		{ { .ops = { [THROTTLE_READ] = 1, [THROTTLE_WRITE] = 1000 }, .bytes = { [THROTTLE_WRITE] = 409600 } }, 4096, 11, 1010 },
	};
	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		struct throttle t = cases[i].t;
		uint64_t done[2] = { 0 };
		int turn = 0;
		const uint64_t start = 5 * NS_PER_SEC; /* a clock that runs for a while */
		for (uint64_t now = start; now < start + 10 * NS_PER_SEC;) {
			uint64_t next = UINT64_MAX;
			for (int k = 0; k < 2; k++) {
				int write = turn ^ k;
				if (!(write ? cases[i].writes : cases[i].reads))
					continue;
				uint64_t when = throttle_admit(&t, write, cases[i].bytes, now);
				if (!when) {
					done[write]++;
					turn = !write;
					next = now;
					break;
				} else {
					assert_true(when > now);
				}
				next = when < next ? when : next;
			}
			now = next;
		}
		for (int write = 0; write < 2; write++) {
			uint64_t want = write ? cases[i].writes : cases[i].reads;
			if (done[write] + 2 + want / 100 < want || done[write] > want + 2 + want / 100)
				fail_msg("case %zu: %llu instead of %llu", i, (unsigned long long)done[write], (unsigned long long)want);
		}
	}
	struct throttle none = { 0 };
	assert_false(throttle_active(&none));
	assert_int_equal(throttle_admit(&none, true, UINT64_MAX, 1), 0);
	struct throttle slow = { .bytes = { [THROTTLE_ALL] = 1 } };
	assert_int_equal(throttle_admit(&slow, true, UINT64_MAX, 1), 0);
	assert_true(throttle_admit(&slow, true, 1, 2) > 2);
}

static void throttled(void **unused)
{
	(void)unused;
	struct block_bench t;
	block_bench_start(&t);
	static uint8_t buf[4096];
	struct block *b = open_disk(&t, make_file(&t, "disk", DISK, NULL), "iops=200");
	static struct sync_request s[80];
	uint64_t start = clock_ns();
	pthread_mutex_lock(&t.b.lock);
	bench_run(&t.b);
	for (int i = 0; i < 80; i++)
		queue_io(b, &s[i], i % 2 ? BLOCK_READ : BLOCK_WRITE, 4096 * (uint64_t)i, buf, 4096);
	block_kick(b);
	struct block_stats stats;
	for (int i = 0; i < 5000; i++) {
		block_get_stats(b, &stats);
		if (!stats.in_flight)
			break;
		pthread_mutex_unlock(&t.b.lock);
		bench_sleep_us(1000);
		pthread_mutex_lock(&t.b.lock);
	}
	uint64_t took = clock_ns() - start;
	assert_int_equal(stats.in_flight, 0);
	/* 80 less a burst of 20 at 200 a second. */
	assert_true(took > 280000000);
	for (int i = 0; i < 80; i++)
		assert_int_equal(s[i].result, 0);
	/* A close does not wait for tokens. */
	for (int i = 0; i < 80; i++)
		queue_io(b, &s[i], BLOCK_READ, 0, buf, 4096);
	block_kick(b);
	pthread_mutex_unlock(&t.b.lock);
	bench_halt(&t.b);
	start = clock_ns();
	block_close(b);
	assert_true(clock_ns() - start < 250000000);
	for (int i = 0; i < 80; i++)
		assert_true(s[i].finished);
	block_bench_stop(&t);
}

/* --- locks --- */

static void locks(void **unused)
{
	(void)unused;
	struct block_bench t;
	block_bench_start(&t);
	const char *path = make_file(&t, "disk", 4096, NULL);
	struct block *first, *second;

	first = open_disk(&t, path, "");
	assert_int_equal(try_open(&t, &second, path, ""), -EAGAIN);
	assert_non_null(strstr(t.err.text, "lock=off"));
	assert_int_equal(try_open(&t, &second, path, "ro"), -EAGAIN);
	block_close(open_disk(&t, path, "ro,lock=off"));
	block_close(first);

	first = open_disk(&t, path, "ro");
	second = open_disk(&t, path, "ro");
	block_close(second);
	assert_int_equal(try_open(&t, &second, path, ""), -EAGAIN);
	block_close(first);
	block_close(open_disk(&t, path, ""));
	block_bench_stop(&t);
}

/* qemu-io waits for commands on a pipe and holds the image meanwhile. */
struct holder {
	pid_t pid;
	int to;
};

static void hold(struct holder *h, const char *path, const char *mode)
{
	int in[2], out[2];
	assert_int_equal(pipe2(in, O_CLOEXEC), 0);
	assert_int_equal(pipe2(out, O_CLOEXEC), 0);
	h->pid = fork();
	if (!h->pid) {
		dup2(in[0], 0);
		dup2(out[1], 1);
		execlp("qemu-io", "qemu-io", "-f", "raw", path, mode, (char *)NULL);
		_exit(127);
	}
	close(in[0]);
	close(out[1]);
	h->to = in[1];
	/* It has opened the image when it answers. */
	static const char command[] = "length\n";
	assert_int_equal(write(h->to, command, strlen(command)), strlen(command));
	char answer[512];
	size_t n = 0;
	ssize_t r;
	while (n < sizeof(answer) - 1 && (r = read(out[0], answer + n, sizeof(answer) - 1 - n)) > 0) {
		n += (size_t)r;
		answer[n] = '\0';
		if (strstr(answer, "KiB") || strstr(answer, "4096"))
			break;
	}
	close(out[0]);
}

static void let_go(struct holder *h)
{
	close(h->to);
	waitpid(h->pid, NULL, 0);
}

static bool qemu_io(const char *path, const char *options)
{
	char command[512];
	snprintf(command, sizeof(command), "qemu-io -f raw %s -c 'read 0 512' %s >/dev/null 2>&1", options, path);
	return system(command) == 0;
}

static bool qemu_img(const char *path, const char *options)
{
	char command[512];
	snprintf(command, sizeof(command), "qemu-img convert -f raw -O raw %s %s %s.copy >/dev/null 2>&1", options, path, path);
	return system(command) == 0;
}

static void locks_qemu(void **unused)
{
	(void)unused;
	if (system("command -v qemu-io >/dev/null 2>&1")) {
		print_message("no qemu-io on this host (Debian: qemu-utils)\n");
		skip();
	}
	struct block_bench t;
	block_bench_start(&t);
	const char *path = make_file(&t, "disk", 4096, NULL);
	struct holder h;
	struct block *b;

	/* It writes. */
	hold(&h, path, "-n");
	assert_int_equal(try_open(&t, &b, path, ""), -EAGAIN);
	assert_int_equal(try_open(&t, &b, path, "ro"), -EAGAIN);
	block_close(open_disk(&t, path, "lock=off"));
	let_go(&h);

	/* It reads, and lets others write. */
	hold(&h, path, "-r");
	block_close(open_disk(&t, path, "ro"));
	let_go(&h);

	/* We write, we read. */
	b = open_disk(&t, path, "");
	assert_false(qemu_io(path, ""));
	assert_false(qemu_img(path, ""));
	assert_true(qemu_img(path, "-U")); /* "I know what I do" */
	block_close(b);
	b = open_disk(&t, path, "ro");
	assert_false(qemu_io(path, ""));
	assert_true(qemu_img(path, ""));
	block_close(b);
	assert_true(qemu_io(path, ""));
	block_bench_stop(&t);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(modes),    cmocka_unit_test(big_sectors), cmocka_unit_test(ranges),   cmocka_unit_test(odd_size),
		cmocka_unit_test(discards), cmocka_unit_test(refusals),	   cmocka_unit_test(buckets),  cmocka_unit_test(throttled),
		cmocka_unit_test(locks),    cmocka_unit_test(locks_qemu),  cmocka_unit_test(guessed),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
