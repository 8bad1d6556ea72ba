/*
 * The host loses power: of what was written since the last fdatasync any part may be on the disk, in any order. The calls that write are wrapped (--wrap) and
 * remembered; at random moments an image is made of what was synced and a random part of the rest, sector by sector. qemu-img check must find no corruption in
 * it, and what a flush covered must be there.
 */
#include "qcow2_test.h"

#include "block/qcow2/image.h"

#define SIZE (2u << 20)
#define BLOCK 4096u
#define NBLOCKS (SIZE / BLOCK)
#define FILE_MAX (24u << 20)

ssize_t __real_pwritev64v2(int fd, const struct iovec *iov, int n, off_t offset, int flags);
ssize_t __wrap_pwritev64v2(int fd, const struct iovec *iov, int n, off_t offset, int flags);
int __real_fdatasync(int fd);
int __wrap_fdatasync(int fd);
int __real_fallocate64(int fd, int mode, off_t offset, off_t len);
int __wrap_fallocate64(int fd, int mode, off_t offset, off_t len);

/* What this test watches; one thread. */
static struct {
	int fd; /* -1: nothing */
	uint8_t *durable;
	struct {
		uint64_t at;
		uint8_t bytes[512];
	} *pending;
	size_t n, room;
	unsigned countdown; /* calls until the power goes */
	void (*lose)(void);
} watch = { .fd = -1 };

static struct {
	bool on;
	atomic_uint syncs;
} failing;

static void remember(uint64_t at, const uint8_t *bytes, uint64_t len)
{
	for (uint64_t k = 0; k < len;) {
		/* Sectors are whole; a table may end inside one. */
		uint64_t sector = (at + k) & ~511ull, from = at + k - sector, n = 512 - from < len - k ? 512 - from : len - k;
		if (sector >= FILE_MAX)
			return;
		if (watch.n == watch.room) {
			watch.room = watch.room ? watch.room * 2 : 1024;
			watch.pending = realloc(watch.pending, watch.room * sizeof(*watch.pending));
		}
		/* What is in the page cache of that sector now is what will be written. */
		watch.pending[watch.n].at = sector;
		memcpy(watch.pending[watch.n].bytes, watch.durable + sector, 512);
		for (size_t i = watch.n; i-- > 0;) {
			if (watch.pending[i].at == sector) {
				memcpy(watch.pending[watch.n].bytes, watch.pending[i].bytes, 512);
				break;
			}
			if (n == 512)
				break;
		}
		if (bytes)
			memcpy(watch.pending[watch.n].bytes + from, bytes + k, n);
		else
			memset(watch.pending[watch.n].bytes + from, 0, n);
		watch.n++;
		k += n;
	}
}

static void tick(int fd)
{
	if (fd == watch.fd && watch.countdown && !--watch.countdown)
		watch.lose();
}

ssize_t __wrap_pwritev64v2(int fd, const struct iovec *iov, int n, off_t offset, int flags)
{
	uint64_t at = (uint64_t)offset;
	for (int i = 0; fd == watch.fd && i < n; i++) {
		remember(at, iov[i].iov_base, iov[i].iov_len);
		at += iov[i].iov_len;
	}
	tick(fd);
	return __real_pwritev64v2(fd, iov, n, offset, flags);
}

int __wrap_fallocate64(int fd, int mode, off_t offset, off_t len)
{
	if (fd == watch.fd)
		remember((uint64_t)offset, NULL, (uint64_t)len);
	return __real_fallocate64(fd, mode, offset, len);
}

int __wrap_fdatasync(int fd)
{
	if (failing.on) {
		/* As the kernel has it: the first who comes back is told, and nobody else. */
		usleep(50000);
		if (atomic_fetch_add(&failing.syncs, 1))
			return 0;
		errno = EIO;
		return -1;
	}
	tick(fd);
	if (fd == watch.fd) {
		for (size_t i = 0; i < watch.n; i++)
			memcpy(watch.durable + watch.pending[i].at, watch.pending[i].bytes, 512);
		watch.n = 0;
	}
	return 0; /* the test's disk needs none */
}

struct model {
	uint64_t submitted[NBLOCKS], flushed[NBLOCKS], zeroed[NBLOCKS], version;
};

/* Of the one test there is. */
static struct {
	struct block_bench *t;
	const struct model *m;
	uint32_t *state;
	const char *what;
	unsigned times;
} at_loss;

static void lose_power(void)
{
	struct block_bench *t = at_loss.t;
	const struct model *m = at_loss.m;
	uint32_t *state = at_loss.state;
	const char *what = at_loss.what;
	at_loss.times++;
	uint8_t *disk = malloc(FILE_MAX), *out = malloc(SIZE);
	memcpy(disk, watch.durable, FILE_MAX);
	unsigned share = rnd(state) % 5; /* of the rest: none, some, half, most, all */
	for (size_t i = 0; i < watch.n; i++) {
		if (rnd(state) % 4 < share)
			memcpy(disk + watch.pending[i].at, watch.pending[i].bytes, 512);
	}
	struct stat st;
	assert_int_equal(fstat(watch.fd, &st), 0);
	uint64_t len = (uint64_t)st.st_size < FILE_MAX ? (uint64_t)st.st_size : FILE_MAX;
	make_file(t, "crash", len, disk);
	int r = check(t, "crash");
	if (r != 0 && r != 3) {
		print_out(t);
		fail_msg("%s: qemu-img check says %d after a power loss", what, r);
	}
	must(t, sh(t, "rm -f back && qemu-img convert -f qcow2 -O raw crash back"), what);
	int fd = open(in_dir(t, "back"), O_RDONLY);
	assert_int_equal(pread(fd, out, SIZE, 0), SIZE);
	close(fd);
	for (uint64_t b = 0; b < NBLOCKS; b++) {
		for (unsigned s = 0; s < BLOCK; s += 512) {
			uint64_t v[2];
			memcpy(v, out + b * BLOCK + s, 16);
			bool zero = !v[0] && !v[1];
			if (zero ? !m->flushed[b] || m->zeroed[b] >= m->flushed[b] : v[0] == b && v[1] >= m->flushed[b] && v[1] <= m->submitted[b])
				continue;
			fail_msg("%s: block %llu has block %llu version %llu; flushed %llu, submitted %llu, zeroes %llu", what, (unsigned long long)b,
				 (unsigned long long)v[0], (unsigned long long)v[1], (unsigned long long)m->flushed[b], (unsigned long long)m->submitted[b],
				 (unsigned long long)m->zeroed[b]);
		}
	}
	free(disk);
	free(out);
}

static void one(struct qcow2 *q, struct model *m, uint32_t *state)
{
	static uint8_t buf[16 * BLOCK];
	uint64_t n = 1 + rnd(state) % 16, first = rnd(state) % NBLOCKS;
	if (first + n > NBLOCKS)
		n = NBLOCKS - first;
	unsigned what = rnd(state) % 6;
	if (what == 0) {
		/* Most losses in the middle of a flush: that is where order counts. */
		watch.countdown = 1 + rnd(state) % 10;
		assert_int_equal(qcow2_flush(q), 0);
		watch.countdown = rnd(state) % 8 ? 0 : 1 + rnd(state) % 10;
		memcpy(m->flushed, m->submitted, sizeof(m->flushed));
		return;
	}
	for (uint64_t k = 0; k < n; k++) {
		uint64_t block = first + k, v = ++m->version;
		m->submitted[block] = v;
		if (what < 3)
			m->zeroed[block] = v;
		for (unsigned i = 0; i < BLOCK; i += 16) {
			memcpy(buf + k * BLOCK + i, &block, 8);
			memcpy(buf + k * BLOCK + i + 8, &v, 8);
		}
	}
	struct iovec iov = { buf, n * BLOCK };
	if (what < 3)
		assert_int_equal(qcow2_write_zeroes(q, first * BLOCK, n * BLOCK, what < 2), 0);
	else
		assert_int_equal(qcow2_write(q, &iov, 1, first * BLOCK, n * BLOCK), 0);
}

static void power_losses(void **unused)
{
	(void)unused;
	NEEDS_QEMU();
	static const char *const formats[] = { "cluster_size=4k", "cluster_size=512,refcount_bits=64", "cluster_size=64k", "cluster_size=16k,compat=0.10" };
	struct block_bench t;
	block_bench_start(&t);
	struct model *m = malloc(sizeof(*m));
	watch.durable = malloc(FILE_MAX);
	for (unsigned i = 0; i < 4; i++) {
		uint32_t state = 17 + i;
		memset(m, 0, sizeof(*m));
		memset(watch.durable, 0, FILE_MAX);
		must(&t, sh(&t, "rm -f image && qemu-img create -q -f qcow2 -o %s image %u && qemu-img snapshot -c s image", formats[i], SIZE), formats[i]);
		int fd = open(in_dir(&t, "image"), O_RDWR | O_CLOEXEC);
		assert_true(pread(fd, watch.durable, FILE_MAX, 0) > 0);
		watch.fd = fd;
		watch.n = 0;
		struct qcow2_params p = { .punch = true, .what = "image", .l2_cache = 1, .refcount_cache = 1 };
		struct qcow2 *q;
		assert_int_equal(qcow2_open(&q, fd, -1, &p, &t.err), 0);
		at_loss.t = &t;
		at_loss.m = m;
		at_loss.state = &state;
		at_loss.what = formats[i];
		at_loss.times = 0;
		watch.lose = lose_power;
		while (at_loss.times < 25)
			one(q, m, &state);
		watch.countdown = 0;
		qcow2_close(q);
		watch.fd = -1;
		must(&t, check(&t, "image"), formats[i]);
	}
	free(watch.durable);
	free(watch.pending);
	free(m);
	block_bench_stop(&t);
}

static void *flush(void *opaque)
{
	return (void *)(intptr_t)qcow2_flush(opaque);
}

/* Several flush at once, and the host's disk fails: all must hear of it. */
static void failed_sync(void **unused)
{
	(void)unused;
	NEEDS_QEMU();
	struct block_bench t;
	block_bench_start(&t);
	must(&t, sh(&t, "qemu-img create -q -f qcow2 image 1M"), "create");
	int fd = open(in_dir(&t, "image"), O_RDWR | O_CLOEXEC);
	struct qcow2_params p = { .what = "image" };
	struct qcow2 *q;
	assert_int_equal(qcow2_open(&q, fd, -1, &p, &t.err), 0);
	failing.on = true;
	pthread_t thread[4];
	for (int i = 0; i < 4; i++)
		assert_int_equal(pthread_create(&thread[i], NULL, flush, q), 0);
	for (int i = 0; i < 4; i++) {
		void *result;
		pthread_join(thread[i], &result);
		assert_int_equal((intptr_t)result, -EIO);
	}
	failing.on = false;
	qcow2_close(q);
	block_bench_stop(&t);
}

int main(void)
{
	const struct CMUnitTest tests[] = { cmocka_unit_test(power_losses), cmocka_unit_test(failed_sync) };
	return cmocka_run_group_tests(tests, NULL, NULL);
}
