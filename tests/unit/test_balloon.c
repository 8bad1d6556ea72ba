/* virtio-balloon against a scripted driver: which pages go, which stay, and what a driver that means harm gets (virtio 1.2 5.5). */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "device/virtio/balloon.h"
#include "virtio_bench.h"

#define RAM_SIZE (16u << 20)
#define PAGES (RAM_SIZE >> 12)
#define FIRST 1024u /* pages from here on are the test's; below are the rings */

enum { INFLATE, DEFLATE, STATS, HINT, REPORT };
enum { F_STATS = 1 << 1, F_HINT = 1 << 3, F_POISON = 1 << 4, F_REPORT = 1 << 5 };
#define VERSION_1 VIRTIO_BIT(VIRTIO_F_VERSION_1)

struct fixture {
	struct vbench b;
	unsigned runs; /* discards seen in the test's pages */
};

static void written(void *opaque, uint64_t gpa, uint64_t len)
{
	struct fixture *f = opaque;
	(void)len;
	if (gpa >= (uint64_t)FIRST << 12)
		f->runs++;
}

static int setup(void **state)
{
	struct fixture *f = calloc(1, sizeof(*f));
	if (!f)
		return -1;
	vbench_open(&f->b, RAM_SIZE);
	const struct virtio_host host = vbench_host(&f->b, "balloon");
	ram_set_watcher(&f->b.ram, &(struct ram_watcher){ .written = written, .opaque = f });
	*state = f;
	return virtio_balloon_create(&f->b.d, &host, NULL);
}

static int teardown(void **state)
{
	struct fixture *f = *state;
	vbench_close(&f->b);
	free(f);
	return 0;
}

static uint32_t config(struct virtio_device *d, unsigned offset)
{
	return (uint32_t)virtio_config_read(d, offset, 4);
}

static void paint(struct fixture *f)
{
	memset(f->b.ram.base + FIRST * 4096, 0xaa, RAM_SIZE - FIRST * 4096);
	f->runs = 0;
}

/* Is exactly [first, first+n) of the test's pages empty? */
static void expect_gone(struct fixture *f, unsigned first, unsigned n)
{
	for (unsigned p = FIRST; p < PAGES; p++) {
		uint8_t want = p - first < n ? 0 : 0xaa;
		const uint8_t *page = f->b.ram.base + p * 4096;
		if (page[0] != want || page[2049] != want || page[4095] != want)
			fail_msg("page %u is %#x, %#x, %#x instead of %#x", p, page[0], page[2049], page[4095], want);
	}
}

static void send(struct fixture *f, unsigned q, const struct vbuf *bufs, unsigned n)
{
	uint32_t len = 1;
	int id = vbench_add(&f->b, q, bufs, n);
	vbench_kick(&f->b, q);
	assert_int_equal(vbench_used(&f->b, q, &len), id);
	assert_int_equal(len, 0);
}

static void inflate(struct fixture *f, const uint32_t *pfn, unsigned n)
{
	uint64_t gpa = vbench_alloc(&f->b, 4 * n, 4);
	memcpy(vbench_hva(&f->b, gpa), pfn, 4 * n);
	send(f, INFLATE, &(struct vbuf){ gpa, 4 * n, false }, 1);
}

static void neighbours_go_together(void **state)
{
	struct fixture *f = *state;
	struct balloon_stats s;
	vbench_start_sized(&f->b, VBENCH_FEATURES, 128);
	assert_true(f->b.d->features & F_REPORT && f->b.d->features & F_HINT);
	uint32_t pfn[256];

	paint(f);
	for (unsigned i = 0; i < 256; i++)
		pfn[i] = FIRST + 300 - i; /* as Linux allocates them: downwards */
	inflate(f, pfn, 256);
	expect_gone(f, FIRST + 45, 256);
	assert_int_equal(f->runs, 1);

	paint(f);
	for (unsigned i = 0; i < 256; i++)
		pfn[i] = FIRST + 10 + (i * 37) % 128; /* each twice, in no order */
	inflate(f, pfn, 256);
	expect_gone(f, FIRST + 10, 128);
	assert_int_equal(f->runs, 1);

	paint(f);
	for (unsigned i = 0; i < 100; i++)
		pfn[i] = FIRST + 2 * i;
	inflate(f, pfn, 100);
	assert_int_equal(f->runs, 100);
	assert_int_equal(f->b.ram.base[(FIRST + 100) * 4096], 0);
	assert_int_equal(f->b.ram.base[(FIRST + 101) * 4096], 0xaa);
	virtio_balloon_stats(f->b.d, &s);
	assert_int_equal(s.inflated, (256 + 128 + 100) * 4096);
	/* Deflating asks for nothing. */
	uint64_t gpa = vbench_alloc(&f->b, 400, 4);
	memcpy(vbench_hva(&f->b, gpa), pfn, 400);
	send(f, DEFLATE, &(struct vbuf){ gpa, 400, false }, 1);
}

static void what_is_not_ram_is_left_out(void **state)
{
	struct fixture *f = *state;
	vbench_start_sized(&f->b, VBENCH_FEATURES, 128);
	paint(f);
	/* Across the end of RAM, beyond, far beyond. */
	const uint32_t pfn[] = { PAGES + 1, PAGES, PAGES - 1, PAGES - 2, 0xc0000, 0xfee00, UINT32_MAX, UINT32_MAX - 1, 0x100000 };
	inflate(f, pfn, sizeof(pfn) / sizeof(pfn[0]));
	expect_gone(f, PAGES - 2, 2);
	/* The whole of what 32 bits can name, as one run's ends. */
	paint(f);
	inflate(f, (const uint32_t[]){ UINT32_MAX, FIRST + 7, FIRST + 8, FIRST + 7 }, 4);
	expect_gone(f, FIRST + 7, 2);

	/* Odd pieces: the list may be cut anywhere, and the rest of a number is none. */
	paint(f);
	uint64_t gpa = vbench_alloc(&f->b, 64, 4);
	memcpy(vbench_hva(&f->b, gpa), (const uint32_t[]){ FIRST + 1, FIRST + 2, FIRST + 3 }, 12);
	send(f, INFLATE, (struct vbuf[]){ { gpa, 1, false }, { gpa + 1, 6, false }, { gpa + 7, 3, false } }, 3);
	expect_gone(f, FIRST + 1, 2);
	/* Nothing, and only what we could write to. */
	paint(f);
	send(f, INFLATE, &(struct vbuf){ gpa, 0, false }, 1);
	send(f, INFLATE, &(struct vbuf){ gpa, 12, true }, 1);
	expect_gone(f, 0, 0);
	/* More than any driver sends: the first ones count. The numbers themselves may be among the pages. */
	gpa = (uint64_t)FIRST << 12;
	uint32_t *list = vbench_hva(&f->b, gpa);
	for (unsigned i = 0; i < 2048 * 1024; i++)
		list[i] = FIRST + i % 16;
	send(f, INFLATE, &(struct vbuf){ gpa, 8 << 20, false }, 1);
	assert_int_equal(list[0], 0);
	assert_int_equal(list[16 * 1024], FIRST);
	assert_int_equal(virtio_get_status(f->b.d), 15);
}

static void whole_pages_are_reported(void **state)
{
	struct fixture *f = *state;
	struct balloon_stats s;
	const uint64_t at = (uint64_t)FIRST << 12;
	vbench_start_sized(&f->b, VBENCH_FEATURES, 128);
	paint(f);
	send(f, REPORT, &(struct vbuf){ at, 2 << 20, true }, 1);
	expect_gone(f, FIRST, 512);
	assert_int_equal(f->runs, 1);
	paint(f);
	send(f, REPORT, (struct vbuf[]){ { at + 1, 8191, true }, { at + 3 * 4096, 4095, true }, { at + 0x5800, 0x1000, true } }, 3);
	expect_gone(f, FIRST + 1, 1);
	paint(f);
	send(f, REPORT, &(struct vbuf){ at, 8192, false }, 1); /* not what reporting is */
	expect_gone(f, 0, 0);
	virtio_balloon_stats(f->b.d, &s);
	assert_int_equal(s.reported, (2 << 20) + 4096);
	assert_int_equal(s.inflated, 0);
}

static void poisoned_pages_keep_their_contents(void **state)
{
	struct fixture *f = *state;
	const uint64_t at = (uint64_t)FIRST << 12;
	const uint64_t base = VERSION_1 | F_REPORT;
	/* Without the feature the value means nothing. */
	vbench_start_sized(&f->b, base, 128);
	paint(f);
	virtio_config_write(f->b.d, 12, 4, 0xaaaaaaaa);
	send(f, 2, &(struct vbuf){ at, 8192, true }, 1);
	expect_gone(f, FIRST, 2);
	/* With it, zeros are what discarded pages are; else they stay. */
	vbench_start_sized(&f->b, base | F_POISON, 128);
	paint(f);
	assert_int_equal(config(f->b.d, 12), 0);
	send(f, 2, &(struct vbuf){ at, 8192, true }, 1);
	expect_gone(f, FIRST, 2);
	paint(f);
	virtio_config_write(f->b.d, 12, 4, 0xaaaaaaaa);
	send(f, 2, &(struct vbuf){ at, 8192, true }, 1);
	expect_gone(f, 0, 0);
	/* What is in the balloon has no contents. */
	inflate(f, (const uint32_t[]){ FIRST + 5 }, 1);
	expect_gone(f, FIRST + 5, 1);
}

static void queues_are_numbered_by_features(void **state)
{
	struct fixture *f = *state;
	static const struct {
		uint64_t features;
		unsigned report;
	} test[] = { { F_REPORT, 2 }, { F_REPORT | F_STATS, 3 }, { F_REPORT | F_HINT, 3 }, { F_REPORT | F_STATS | F_HINT, 4 } };
	for (unsigned i = 0; i < 4; i++) {
		vbench_start_sized(&f->b, VERSION_1 | test[i].features, 64);
		paint(f);
		for (unsigned q = test[i].report + 1; q < 5; q++) /* nobody's */
			send(f, q, &(struct vbuf){ (uint64_t)FIRST << 12, 4096, true }, 1);
		expect_gone(f, 0, 0);
		send(f, test[i].report, &(struct vbuf){ (uint64_t)FIRST << 12, 4096, true }, 1);
		expect_gone(f, FIRST, 1);
	}
}

static void put_stat(uint8_t *at, uint16_t tag, uint64_t value)
{
	memcpy(at, &tag, 2);
	memcpy(at + 2, &value, 8);
}

static bool is_returned(void *opaque)
{
	struct vbench *b = opaque;
	return b->interrupts[STATS];
}

static void statistics_come_when_asked_for(void **state)
{
	struct fixture *f = *state;
	struct vbench *b = &f->b;
	struct balloon_stats s;
	virtio_balloon_stats(b->d, &s); /* nobody there */
	assert_true(s.known == 0 && s.age_ns == UINT64_MAX);
	vbench_start_sized(b, VBENCH_FEATURES, 128);
	uint64_t gpa = vbench_alloc(b, 200, 8);
	uint8_t *at = vbench_hva(b, gpa);
	put_stat(at, BALLOON_FREE, 1000);
	put_stat(at + 10, BALLOON_TOTAL, 2000);
	put_stat(at + 20, 77, 3000); /* of a later specification */
	put_stat(at + 30, 0xffff, 3000);

	/* The first buffer stays with the device until somebody asks. */
	int id = vbench_add(b, STATS, &(struct vbuf){ gpa, 43, false }, 1);
	vbench_kick(b, STATS);
	assert_int_equal(vbench_used(b, STATS, NULL), -1);
	virtio_balloon_stats(b->d, &s);
	assert_int_equal(s.known, 1 << BALLOON_FREE | 1 << BALLOON_TOTAL);
	assert_true(s.value[BALLOON_FREE] == 1000 && s.value[BALLOON_TOTAL] == 2000 && s.age_ns < 1000000000);
	assert_int_equal(vbench_used(b, STATS, NULL), id);

	/* Then it is polled for a while. */
	put_stat(at, BALLOON_FREE, 1001);
	id = vbench_add(b, STATS, &(struct vbuf){ gpa, 40, false }, 1);
	vbench_kick(b, STATS);
	assert_int_equal(vbench_used(b, STATS, NULL), -1);
	virtio_balloon_stats(b->d, &s);
	assert_int_equal(s.value[BALLOON_FREE], 1001);
	assert_int_equal(vbench_used(b, STATS, NULL), -1);
	b->interrupts[STATS] = 0;
	assert_true(vbench_loop(b, 5000, is_returned, b));
	assert_int_equal(vbench_used(b, STATS, NULL), id);

	/* A driver that lends two gets one back; a reset while one is lent. */
	id = vbench_add(b, STATS, &(struct vbuf){ gpa, 40, false }, 1);
	vbench_add(b, STATS, &(struct vbuf){ gpa, 5, false }, 1);
	vbench_kick(b, STATS);
	assert_int_equal(vbench_used(b, STATS, NULL), id);
	assert_int_equal(vbench_used(b, STATS, NULL), -1);
	virtq_reset(b->d, STATS);
	virtio_balloon_stats(b->d, &s);
	vbench_start_sized(b, VBENCH_FEATURES, 128);
	virtio_balloon_stats(b->d, &s);
	assert_int_equal(s.known, 0);
	vbench_add(b, STATS, &(struct vbuf){ vbench_alloc(b, 64, 8), 40, false }, 1);
	vbench_kick(b, STATS); /* and the end of the device with one lent */
}

static void target_and_actual(void **state)
{
	struct fixture *f = *state;
	struct virtio_device *d = f->b.d;
	struct balloon_stats s;
	virtio_balloon_set_target(d, RAM_SIZE - (4 << 20)); /* before there is a driver */
	vbench_start_sized(&f->b, VBENCH_FEATURES, 128);
	assert_int_equal(config(d, 0), 1024);
	assert_int_equal(f->b.config_interrupts, 0);
	virtio_balloon_set_target(d, 8 << 20);
	assert_int_equal(f->b.config_interrupts, 1);
	assert_int_equal(config(d, 0), 2048);
	virtio_config_write(d, 4, 4, 2000);
	virtio_config_write(d, 0, 4, 5); /* not the driver's */
	virtio_config_write(d, 8, 4, 5);
	virtio_balloon_stats(d, &s);
	assert_int_equal(s.target, 8 << 20);
	assert_int_equal(s.actual, 2000 * 4096);
	assert_int_equal(config(d, 8), 0);
	virtio_balloon_set_target(d, UINT64_MAX);
	assert_int_equal(config(d, 0), 0);
	virtio_balloon_set_target(d, 0);
	assert_int_equal(config(d, 0), PAGES);
	virtio_set_status(d, 0);
	assert_int_equal(config(d, 0), PAGES);
	assert_int_equal(config(d, 4), 0);
}

struct hints {
	unsigned n, ends;
	uint64_t gpa, len;
};

static void on_hint(void *opaque, uint64_t gpa, uint64_t len)
{
	struct hints *h = opaque;
	if (!len) {
		h->ends++;
		return;
	}
	h->n++;
	h->gpa = gpa;
	h->len = len;
}

static void hints_are_passed_on(void **state)
{
	struct fixture *f = *state;
	struct vbench *b = &f->b;
	struct hints h = { 0 };
	const uint64_t at = (uint64_t)FIRST << 12;
	assert_int_equal(virtio_balloon_hint(b->d, on_hint, &h), -ENOTSUP);
	vbench_start_sized(b, VBENCH_FEATURES, 128);
	paint(f);
	uint64_t cmd = vbench_alloc(b, 4, 4);
	uint32_t *id = vbench_hva(b, cmd);
	send(f, HINT, &(struct vbuf){ at, 8192, true }, 1); /* nobody asked */
	assert_int_equal(virtio_balloon_hint(b->d, on_hint, &h), 0);
	assert_int_equal(virtio_balloon_hint(b->d, on_hint, &h), -EBUSY);
	assert_int_equal(b->config_interrupts, 1);
	send(f, HINT, &(struct vbuf){ at, 8192, true }, 1); /* not begun */
	*id = 12345;
	send(f, HINT, &(struct vbuf){ cmd, 4, false }, 1);
	send(f, HINT, &(struct vbuf){ at, 8192, true }, 1); /* of another command */
	assert_int_equal(h.n, 0);
	*id = config(b->d, 8);
	assert_true(*id >= 2);
	send(f, HINT, &(struct vbuf){ cmd, 4, false }, 1);
	send(f, HINT, &(struct vbuf){ at, 4 << 20, true }, 1);
	assert_true(h.n == 1 && h.gpa == at && h.len == 4 << 20 && h.ends == 0);
	*id = 0;
	send(f, HINT, &(struct vbuf){ cmd, 4, false }, 1);
	assert_int_equal(h.ends, 1);
	assert_int_equal(config(b->d, 8), 1); /* done: the guest may have them back */
	send(f, HINT, &(struct vbuf){ at, 8192, true }, 1);
	assert_int_equal(h.n, 1);
	expect_gone(f, 0, 0);
	/* Once more, and a reset in the middle. */
	assert_int_equal(virtio_balloon_hint(b->d, on_hint, &h), 0);
	virtio_set_status(b->d, 0);
	assert_int_equal(h.ends, 2);
}

static uint64_t random_of(uint64_t *x)
{
	*x ^= *x << 13, *x ^= *x >> 7, *x ^= *x << 17;
	return *x;
}

/* Anything in any queue: the VMM lives, and every chain is answered or the device is broken in the core's words. */
static void noise(void **state)
{
	struct fixture *f = *state;
	struct vbench *b = &f->b;
	struct balloon_stats s;
	struct hints h = { 0 };
	uint64_t x = 88172645463325252ull;
	for (unsigned round = 0; round < 300; round++) {
		vbench_start_sized(b, random_of(&x) | VERSION_1, 64);
		for (unsigned i = 0; i < 40 && virtio_get_status(b->d) == 15; i++) {
			unsigned q = random_of(&x) % 5, n = 1 + random_of(&x) % 3;
			struct vbuf bufs[3];
			for (unsigned k = 0; k < n; k++)
				bufs[k] = (struct vbuf){ ((uint64_t)FIRST << 12) + random_of(&x) % (8 << 20), random_of(&x) % 70000, (k && bufs[k - 1].in) || random_of(&x) & 1 };
			uint32_t *list = vbench_hva(b, bufs[0].gpa & ~3ull);
			for (unsigned k = 0; k < 300; k++)
				list[k] = (uint32_t)(random_of(&x) & 1 ? FIRST + random_of(&x) % 3000 : random_of(&x));
			vbench_add(b, q, bufs, n);
			vbench_kick(b, q);
			while (virtio_get_status(b->d) == 15 && vbench_used(b, q, NULL) >= 0)
				;
			if (random_of(&x) % 8 == 0)
				virtio_balloon_stats(b->d, &s);
			if (random_of(&x) % 8 == 0)
				virtio_balloon_hint(b->d, on_hint, &h);
			if (random_of(&x) % 16 == 0)
				virtio_config_write(b->d, random_of(&x) % 20, 1 << random_of(&x) % 4, random_of(&x));
		}
	}
}

int main(void)
{
#define TEST(fn) cmocka_unit_test_setup_teardown(fn, setup, teardown)
	const struct CMUnitTest tests[] = {
		TEST(neighbours_go_together),	 TEST(what_is_not_ram_is_left_out),	 TEST(whole_pages_are_reported),
		TEST(poisoned_pages_keep_their_contents), TEST(queues_are_numbered_by_features), TEST(statistics_come_when_asked_for),
		TEST(target_and_actual),	 TEST(hints_are_passed_on),		 TEST(noise),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
