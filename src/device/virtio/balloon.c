#include "device/virtio/balloon.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/error.h"
#include "base/unaligned.h"
#include "device/virtio/virtio.h"
#include "mem/ram.h"

#define PAGE_SHIFT 12 /* the unit of the protocol, whatever the guest's pages are (5.5.6) */
#define PAGE_SIZE (1ull << PAGE_SHIFT)

/* Features (5.5.3). */
enum { F_MUST_TELL_HOST = 0, F_STATS_VQ = 1, F_DEFLATE_ON_OOM = 2, F_FREE_PAGE_HINT = 3, F_PAGE_POISON = 4, F_REPORTING = 5 };
#define OFFERED                                                                                                             \
	(VIRTIO_BIT(F_STATS_VQ) | VIRTIO_BIT(F_DEFLATE_ON_OOM) | VIRTIO_BIT(F_FREE_PAGE_HINT) | VIRTIO_BIT(F_PAGE_POISON) | \
	 VIRTIO_BIT(F_REPORTING))

/* free_page_hint_cmd_id: these, or the number of a command. */
enum { HINT_STOP = 0, HINT_DONE = 1, HINT_FIRST = 2 };

enum role { INFLATE, DEFLATE, STATS, HINT, REPORT, ROLES };

#define QUEUE_SIZE 128
#define PFNS_MAX 4096	       /* looked at in one request; drivers send up to 1024 */
#define STAT_SIZE 10	       /* le16 tag, le64 value */
#define STATS_MAX 64	       /* of a buffer, looked at */
#define POLL_NS 1000000000ull
#define POLL_FOR_NS 10000000000ull /* after somebody asked */

struct config {
	uint32_t num_pages, actual, hint_cmd_id, poison_val;
};

struct balloon {
	struct virtio_device d; /* first */
	struct config config;
	uint8_t role[ROLES];	    /* of each queue */
	struct vtimer poll;
	uint64_t poll_until;
	struct virtio_chain *stats; /* the buffer that the driver lent us; pushing it asks for new values */
	uint64_t stats_time;
	unsigned known;
	uint64_t value[BALLOON_TAGS];
	uint64_t inflated, reported;
	void (*hint)(void *opaque, uint64_t gpa, uint64_t len);
	void *hint_opaque;
	uint32_t hint_cmd;
	bool hinting; /* the driver has begun with hint_cmd */
	uint32_t pfn[PFNS_MAX];
};

static struct balloon *of(struct virtio_device *d)
{
	return (struct balloon *)d;
}

/* --- pages --- */

static int compare(const void *a, const void *b)
{
	uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
	return x < y ? -1 : x > y;
}

static uint64_t discard(struct balloon *b, uint64_t gpa, uint64_t len)
{
	return ram_discard(b->d.ram, gpa, len) ? 0 : len;
}

/* A run of neighbours is one call to the host. If not all of it is RAM, what is not is left out. */
static uint64_t discard_run(struct balloon *b, uint64_t pfn, uint64_t n)
{
	if (ram_hva(b->d.ram, pfn << PAGE_SHIFT, n << PAGE_SHIFT))
		return discard(b, pfn << PAGE_SHIFT, n << PAGE_SHIFT);
	uint64_t done = 0;
	for (uint64_t i = 0; i < n; i++)
		done += discard(b, (pfn + i) << PAGE_SHIFT, PAGE_SIZE);
	return done;
}

static void inflate(struct balloon *b, const struct virtio_chain *c)
{
	size_t n = virtio_chain_read(c, 0, b->pfn, sizeof(b->pfn)) / sizeof(b->pfn[0]);
	qsort(b->pfn, n, sizeof(b->pfn[0]), compare);
	for (size_t i = 0, k; i < n; i = k) {
		for (k = i + 1; k < n && b->pfn[k] - b->pfn[k - 1] <= 1; k++)
			;
		b->inflated += discard_run(b, b->pfn[i], (uint64_t)b->pfn[k - 1] - b->pfn[i] + 1);
	}
}

/* The guest expects what it reports to come back as it was: with PAGE_POISON all poison_val, which a discarded page is only if that
 * is zero (5.5.6.7). */
static bool keeps_contents(const struct balloon *b)
{
	return virtio_has(&b->d, F_PAGE_POISON) && b->config.poison_val;
}

/* The whole pages of each of the chain's device-writable parts. */
static void for_pages(struct balloon *b, const struct virtio_chain *c, void (*fn)(struct balloon *b, uint64_t gpa, uint64_t len))
{
	if (keeps_contents(b))
		return;
	for (unsigned i = c->nout; i < c->nout + c->nin; i++) {
		uint64_t from = (c->gpa[i] + PAGE_SIZE - 1) & ~(PAGE_SIZE - 1);
		uint64_t to = (c->gpa[i] + c->iov[i].iov_len) & ~(PAGE_SIZE - 1);
		if (from < to)
			fn(b, from, to - from);
	}
}

static void report(struct balloon *b, uint64_t gpa, uint64_t len)
{
	b->reported += discard(b, gpa, len);
}

/* --- hints --- */

static void hint_pages(struct balloon *b, uint64_t gpa, uint64_t len)
{
	b->hint(b->hint_opaque, gpa, len);
}

static void hint_end(struct balloon *b)
{
	void (*fn)(void *opaque, uint64_t gpa, uint64_t len) = b->hint;
	b->hint = NULL;
	b->hinting = false;
	if (fn)
		fn(b->hint_opaque, 0, 0);
}

/* A buffer that we read is a command, those that we might write to are free pages (5.5.6.6). */
static void hint(struct balloon *b, const struct virtio_chain *c)
{
	uint32_t cmd;
	if (c->out_len >= sizeof(cmd)) {
		virtio_chain_read(c, 0, &cmd, sizeof(cmd));
		if (b->hint && cmd == b->hint_cmd) {
			b->hinting = true;
		} else if (b->hinting) { /* stop: it has no more, or was told to */
			b->config.hint_cmd_id = HINT_DONE;
			virtio_config_changed(&b->d);
			hint_end(b);
		}
	}
	if (b->hinting)
		for_pages(b, c, hint_pages);
}

int virtio_balloon_hint(struct virtio_device *d, void (*fn)(void *opaque, uint64_t gpa, uint64_t len), void *opaque)
{
	struct balloon *b = of(d);
	if (!virtio_is_live(d) || !virtio_has(d, F_FREE_PAGE_HINT))
		return -ENOTSUP;
	if (b->hint)
		return -EBUSY;
	b->hint = fn;
	b->hint_opaque = opaque;
	b->hint_cmd = b->hint_cmd < HINT_FIRST || b->hint_cmd == UINT32_MAX ? HINT_FIRST : b->hint_cmd + 1;
	b->config.hint_cmd_id = b->hint_cmd;
	virtio_config_changed(d);
	return 0;
}

/* --- statistics --- */

static void stats_read(struct balloon *b, const struct virtio_chain *c)
{
	uint8_t stat[STATS_MAX * STAT_SIZE];
	size_t n = virtio_chain_read(c, 0, stat, sizeof(stat)) / STAT_SIZE;
	for (size_t i = 0; i < n; i++) {
		uint16_t tag = unaligned_load16(stat + i * STAT_SIZE);
		if (tag >= BALLOON_TAGS)
			continue;
		b->known |= 1u << tag;
		b->value[tag] = unaligned_load64(stat + i * STAT_SIZE + 2);
	}
	b->stats_time = clock_ns();
}

static void stats_return(struct balloon *b)
{
	struct virtio_chain *c = b->stats;
	if (!c)
		return;
	b->stats = NULL;
	virtq_push(c->queue, c, 0);
	virtq_notify(c->queue);
}

static void stats_poll(void *opaque)
{
	struct balloon *b = opaque;
	if (clock_ns() > b->poll_until || !virtio_is_live(&b->d))
		return;
	stats_return(b);
	vtimer_arm(&b->poll, clock_ns() + POLL_NS);
}

void virtio_balloon_stats(struct virtio_device *d, struct balloon_stats *out)
{
	struct balloon *b = of(d);
	uint64_t now = clock_ns();
	*out = (struct balloon_stats){
		.actual = (uint64_t)b->config.actual << PAGE_SHIFT,
		.target = (uint64_t)b->config.num_pages << PAGE_SHIFT,
		.inflated = b->inflated,
		.reported = b->reported,
		.age_ns = b->known ? now - b->stats_time : UINT64_MAX,
		.known = b->known,
	};
	memcpy(out->value, b->value, sizeof(out->value));
	if (!virtio_is_live(d))
		return;
	bool polling = now <= b->poll_until;
	b->poll_until = now + POLL_FOR_NS;
	if (!polling)
		stats_poll(b);
}

/* --- the device --- */

void virtio_balloon_set_target(struct virtio_device *d, uint64_t bytes)
{
	struct balloon *b = of(d);
	uint64_t all = d->ram->size;
	uint64_t pages = bytes < all ? (all - bytes) >> PAGE_SHIFT : 0;
	b->config.num_pages = pages < UINT32_MAX ? (uint32_t)pages : UINT32_MAX;
	virtio_config_changed(d);
}

/* Queues exist only for features that were agreed on, and are numbered without gaps (5.5.2, as Linux and others read it). */
static void balloon_start(struct virtio_device *d)
{
	struct balloon *b = of(d);
	unsigned q = 0;
	b->role[q++] = INFLATE;
	b->role[q++] = DEFLATE;
	if (virtio_has(d, F_STATS_VQ))
		b->role[q++] = STATS;
	if (virtio_has(d, F_FREE_PAGE_HINT))
		b->role[q++] = HINT;
	if (virtio_has(d, F_REPORTING))
		b->role[q++] = REPORT;
	while (q < ROLES)
		b->role[q++] = DEFLATE; /* nobody's: answer and do nothing */
}

static void handle(struct balloon *b, enum role role, struct virtio_chain *c)
{
	switch (role) {
	case INFLATE:
		inflate(b, c);
		break;
	case STATS:
		stats_read(b, c);
		stats_return(b); /* there should be none: one buffer goes to and fro */
		b->stats = c;
		return;
	case HINT:
		hint(b, c);
		break;
	case REPORT:
		for_pages(b, c, report);
		break;
	case DEFLATE:
	case ROLES:
		break;
	}
	virtq_push(c->queue, c, 0);
}

static void balloon_notify(struct virtio_device *d, unsigned q)
{
	struct balloon *b = of(d);
	struct virtio_queue *queue = virtio_queue(d, q);
	do {
		virtq_no_notify(queue);
		for (struct virtio_chain *c; (c = virtq_pop(queue));)
			handle(b, b->role[q], c);
		virtq_notify(queue);
	} while (virtq_want_notify(queue));
}

static void drop_stats(struct balloon *b)
{
	if (b->stats)
		virtq_drop(b->stats);
	b->stats = NULL;
}

static bool balloon_queue_reset(struct virtio_device *d, unsigned q)
{
	struct balloon *b = of(d);
	if (b->role[q] == STATS)
		drop_stats(b);
	return true;
}

static bool balloon_reset(struct virtio_device *d)
{
	struct balloon *b = of(d);
	vtimer_cancel(&b->poll);
	b->poll_until = 0;
	drop_stats(b);
	b->known = 0;
	b->config.actual = 0;
	b->config.poison_val = 0;
	b->config.hint_cmd_id = HINT_STOP;
	hint_end(b);
	return true;
}

/* actual and poison_val are the driver's (5.5.4). */
static void balloon_config_write(struct virtio_device *d, unsigned offset, unsigned size, uint64_t value)
{
	struct balloon *b = of(d);
	for (unsigned i = offset; i < offset + size; i++, value >>= 8)
		if (i / 4 == 1 || i / 4 == 3)
			((uint8_t *)&b->config)[i] = (uint8_t)value;
}

static void balloon_stats(struct virtio_device *d, char *text, size_t room)
{
	static const char *const name[BALLOON_TAGS] = {
		[BALLOON_SWAP_IN] = "guest swapped in",
		[BALLOON_SWAP_OUT] = "guest swapped out",
		[BALLOON_MAJOR_FAULTS] = "guest major faults",
		[BALLOON_MINOR_FAULTS] = "guest minor faults",
		[BALLOON_FREE] = "guest free",
		[BALLOON_TOTAL] = "guest total",
		[BALLOON_AVAILABLE] = "guest available",
		[BALLOON_CACHES] = "guest caches",
		[BALLOON_HUGETLB_ALLOC] = "guest hugetlb allocations",
		[BALLOON_HUGETLB_FAIL] = "guest hugetlb failures",
	};
	struct balloon_stats s;
	virtio_balloon_stats(d, &s);
	int n = snprintf(text, room, "target %" PRIu64 "\nactual %" PRIu64 "\ninflated %" PRIu64 "\nreported %" PRIu64 "\n", s.target, s.actual,
			 s.inflated, s.reported);
	for (unsigned tag = 0; tag < BALLOON_TAGS && (size_t)n < room; tag++)
		if (s.known >> tag & 1)
			n += snprintf(text + n, room - (size_t)n, "%s %" PRIu64 "\n", name[tag], s.value[tag]);
}

static void balloon_destroy(struct virtio_device *d)
{
	struct balloon *b = of(d);
	vtimer_cancel(&b->poll);
	drop_stats(b);
	hint_end(b);
	virtio_fini(d);
	free(b);
}

static const struct virtio_ops balloon_ops = {
	.name = "virtio-balloon",
	.id = VIRTIO_ID_BALLOON,
	.budget = 64,
	.config_write = balloon_config_write,
	.start = balloon_start,
	.notify = balloon_notify,
	.reset = balloon_reset,
	.queue_reset = balloon_queue_reset,
	.destroy = balloon_destroy,
	.stats = balloon_stats,
};

int virtio_balloon_create(struct virtio_device **out, const struct virtio_host *host, struct error *err)
{
	static const uint16_t sizes[ROLES] = { QUEUE_SIZE, QUEUE_SIZE, QUEUE_SIZE, QUEUE_SIZE, QUEUE_SIZE };
	struct balloon *b = calloc(1, sizeof(*b));
	if (!b)
		return error_set(err, ENOMEM, "%s: out of memory", host->name);
	int r = virtio_init(&b->d, &balloon_ops, host, OFFERED, &b->config, sizeof(b->config), ROLES, sizes, err);
	if (r) {
		free(b);
		return r;
	}
	vtimer_init(&b->poll, host->loop, stats_poll, b);
	*out = &b->d;
	return 0;
}
