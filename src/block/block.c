#include "block/block.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/error.h"
#include "base/keyval.h"
#include "block/aio.h"
#include "block/driver.h"
#include "block/throttle.h"
#include "vm/loop.h"

#define MAX_DEPTH 32 /* of a backing chain */

struct queue {
	struct block_request *first, *last;
};

struct block {
	struct block_node *node;
	struct aio *aio;
	struct block_info info;
	struct block_stats stats;
	bool discard;
	bool kicking, again;
	bool draining;
	bool throttled; /* has limits */
	struct throttle throttle;
	struct vtimer timer;	/* of the first queued request */
	int turn;		/* which of them goes first */
	struct queue queued[2]; /* by THROTTLE_READ, THROTTLE_WRITE: wait for tokens */
	struct queue ready;	/* done without the driver; the result is in node_private */
	char text[1200];
};

/* --- drivers and nodes --- */

static const struct {
	const struct block_driver *driver;
	bool (*probe)(const uint8_t *head, size_t len); /* NULL: never guessed */
} drivers[] = {
	{ &block_file, NULL },
	{ &block_qcow2, qcow2_probe },
	{ &block_nbd, NULL },
};

#define NDRIVERS (sizeof(drivers) / sizeof(drivers[0]))

static const struct block_driver *driver_named(const char *name)
{
	for (unsigned i = 0; i < NDRIVERS; i++) {
		if (!strcmp(drivers[i].driver->name, name))
			return drivers[i].driver;
	}
	return NULL;
}

const struct block_driver *block_probe(const uint8_t *head, size_t len)
{
	for (unsigned i = 0; i < NDRIVERS; i++) {
		if (drivers[i].probe && drivers[i].probe(head, len))
			return drivers[i].driver;
	}
	return &block_file;
}

static bool is_nbd(const char *name)
{
	return !strncmp(name, "nbd://", 6) || !strncmp(name, "nbds://", 7) || !strncmp(name, "nbd+unix://", 11) ||
	       !strncmp(name, "nbds+unix://", 12);
}

/* By the first bytes. What cannot be read is raw: its open says why. */
static const struct block_driver *look(const char *path)
{
	uint8_t head[512];
	int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
	if (fd < 0)
		return &block_file;
	ssize_t n = pread(fd, head, sizeof(head), 0);
	close(fd);
	return n > 0 ? block_probe(head, (size_t)n) : &block_file;
}

int block_node_open(struct block_node **out, const struct block_open *o, struct error *err)
{
	*out = NULL;
	if (o->depth > MAX_DEPTH)
		return error_set(err, ELOOP, "%s %s: more than %d backing files behind one another, or a circle of them; qemu-img rebase shortens chains",
				 o->option, o->name, MAX_DEPTH);
	if (strlen(o->name) >= sizeof((*out)->name))
		return error_set(err, ENAMETOOLONG, "%s %.60s...: the name of an image has %zu characters at most; give a shorter one", o->option,
				 o->name, sizeof((*out)->name) - 1);

	const char *wanted = o->overlay ? "qcow2" : o->format ? o->format : is_nbd(o->name) ? "nbd" : NULL;
	const struct block_driver *driver = wanted ? driver_named(wanted) : look(o->name);
	if (!driver)
		return error_set(err, ENOTSUP, "%s %s: this build has no driver for %s", o->option, o->name, wanted);
	if (o->snapshot && !o->overlay && strcmp(driver->name, "qcow2"))
		return error_set(err, EINVAL, "%s %s: snapshot=%s needs a qcow2 image, and this is %s", o->option, o->name, o->snapshot, driver->name);

	struct block_node *n = calloc(1, sizeof(*n));
	if (!n)
		return error_set(err, ENOMEM, "out of memory for %s %s", o->option, o->name);
	n->driver = driver;
	strcpy(n->name, o->name);
	int r = driver->open(n, o, err);
	if (r) {
		block_node_close(n->backing);
		free(n);
		return r;
	}
	*out = n;
	return 0;
}

void block_node_close(struct block_node *n)
{
	if (!n)
		return;
	n->driver->close(n);
	block_node_close(n->backing);
	free(n);
}

/* --- opening --- */

static const char *const cache_names[] = { "writeback", "none", "writethrough", "directsync", "unsafe", NULL };

static void on_timer(void *opaque);

static int limits(struct throttle *t, struct keyval *kv, struct error *err)
{
	static const char *const ops[] = { "iops-rd", "iops-wr", "iops" }, *const bytes[] = { "bps-rd", "bps-wr", "bps" };
	for (int i = 0; i < 3; i++) {
		int r = keyval_u64(kv, ops[i], 1, 1000000000, &t->ops[i], err);
		if (!r)
			r = keyval_size(kv, bytes[i], &t->bytes[i], err);
		if (r)
			return r;
		if (keyval_get(kv, bytes[i]) && t->bytes[i] < 512)
			return error_set(err, ERANGE, "%s: %s=%s is less than a sector a second; give at least 512, for example %s=50M", kv->option,
					 bytes[i], keyval_get(kv, bytes[i]), bytes[i]);
	}
	return 0;
}

int block_open(struct block **out, struct keyval *kv, struct loop *loop, struct error *err)
{
	static const char *const formats[] = { "auto", "raw", "qcow2", "nbd", NULL };
	static const char *const engines[] = { "auto", "io_uring", "threads", NULL }; /* enum aio_engine */
	static const char *const discards[] = { "unmap", "ignore", NULL };
	unsigned format = 0, cache = CACHE_WRITEBACK, engine = AIO_AUTO, discard = 0;
	bool read_only = false, overlay = false, lock = true;

	*out = NULL;
	struct block *b = calloc(1, sizeof(*b));
	if (!b)
		return error_set(err, ENOMEM, "out of memory for %s", kv->option);
	const char *name = keyval_get(kv, "file");
	const char *snapshot = keyval_get(kv, "snapshot");
	int r = 0;
	if (!name || !*name)
		r = error_set(err, EINVAL, "%s: no image; give its path first, for example %s disk.img,cache=none", kv->option, kv->option);
	else if (snapshot && !*snapshot)
		r = error_set(err, EINVAL, "%s %s: snapshot= without a name; trapline snapshots FILE lists them", kv->option, name);
	if (!r)
		r = keyval_choice(kv, "format", formats, &format, err);
	if (!r)
		r = keyval_choice(kv, "cache", cache_names, &cache, err);
	if (!r)
		r = keyval_choice(kv, "aio", engines, &engine, err);
	if (!r)
		r = keyval_choice(kv, "discard", discards, &discard, err);
	if (!r)
		r = keyval_bool(kv, "ro", &read_only, err);
	if (!r)
		r = keyval_bool(kv, "overlay", &overlay, err);
	if (!r)
		r = keyval_bool(kv, "lock", &lock, err);
	if (!r)
		r = limits(&b->throttle, kv, err);
	if (!r)
		r = aio_create(&b->aio, (enum aio_engine)engine, loop, err);
	if (r) {
		free(b);
		return r;
	}
	struct block_open o = {
		.name = name,
		.format = format ? formats[format] : NULL,
		.snapshot = snapshot,
		.option = kv->option,
		.read_only = read_only || (snapshot && !overlay),
		.overlay = overlay,
		.lock = lock,
		.discard = discard == 0,
		.cache = (enum block_cache)cache,
		.aio = b->aio,
		.loop = loop,
		.kv = kv,
	};
	r = block_node_open(&b->node, &o, err);
	if (r) {
		aio_destroy(b->aio);
		free(b);
		return r;
	}
	b->info = b->node->info;
	b->info.read_only |= o.read_only;
	b->discard = o.discard && !b->info.read_only;
	if (!b->discard)
		b->info.discard_granularity = 0;
	b->throttled = throttle_active(&b->throttle);
	vtimer_init(&b->timer, loop, on_timer, b);
	snprintf(b->text, sizeof(b->text), "%s %s%s (cache %s, %s%s)", b->info.format, name, overlay ? " under a throw-away overlay" : "",
		 cache_names[cache], strcmp(b->info.format, "nbd") ? aio_name(b->aio) : "network", b->info.read_only ? ", read-only" : "");
	*out = b;
	return 0;
}

void block_close(struct block *b)
{
	if (!b)
		return;
	block_drain(b);
	vtimer_cancel(&b->timer);
	block_node_close(b->node);
	aio_destroy(b->aio);
	free(b);
}

const struct block_info *block_info(const struct block *b)
{
	return &b->info;
}

const char *block_describe(const struct block *b)
{
	return b->text;
}

void block_get_stats(const struct block *b, struct block_stats *out)
{
	*out = b->stats;
}

/* --- requests --- */

static void add(struct queue *q, struct block_request *r)
{
	r->next = NULL;
	if (q->last)
		q->last->next = r;
	else
		q->first = r;
	q->last = r;
}

static struct block_request *take(struct queue *q)
{
	struct block_request *r = q->first;
	if (r) {
		q->first = r->next;
		if (!q->first)
			q->last = NULL;
	}
	return r;
}

static void count(struct block_stats *s, const struct block_request *r, int result)
{
	s->in_flight--;
	s->busy_ns += clock_ns() - r->started_ns;
	if (result) {
		s->errors++;
		return;
	}
	switch (r->op) {
	case BLOCK_READ:
		s->reads++;
		s->read_bytes += r->len;
		break;
	case BLOCK_WRITE:
		s->writes++;
		s->write_bytes += r->len;
		break;
	case BLOCK_WRITE_ZEROES:
		s->writes++;
		break;
	case BLOCK_FLUSH:
		s->flushes++;
		break;
	case BLOCK_DISCARD:
		s->discards++;
		break;
	}
}

static void on_done(struct block_request *r, int result)
{
	count(&r->block->stats, r, result);
	r->done = r->caller_done;
	r->done(r, result);
}

/* What needs no driver: 1 if it does need one, else the result. */
static int without_driver(const struct block *b, const struct block_request *r)
{
	if (r->op == BLOCK_FLUSH)
		return b->info.read_only ? 0 : 1;
	uint64_t end;
	if (__builtin_add_overflow(r->offset, r->len, &end) || end > b->info.size || (r->offset | r->len) % 512)
		return -EINVAL;
	if (r->op != BLOCK_READ && b->info.read_only)
		return -EROFS;
	if (!r->len || (r->op == BLOCK_DISCARD && !b->discard))
		return 0;
	return 1;
}

void block_submit(struct block *b, struct block_request *r)
{
	r->block = b;
	r->caller_done = r->done;
	r->done = on_done;
	r->started_ns = clock_ns();
	b->stats.in_flight++;
	int result = without_driver(b, r);
	if (result != 1) {
		r->node_private = (void *)(intptr_t)result;
		add(&b->ready, r);
		return;
	}
	if (r->op == BLOCK_WRITE_ZEROES && !b->discard)
		r->flags &= ~BLOCK_MAY_UNMAP;
	if (b->throttled && r->op != BLOCK_FLUSH)
		add(&b->queued[r->op == BLOCK_READ ? THROTTLE_READ : THROTTLE_WRITE], r);
	else
		b->node->driver->submit(b->node, r);
}

/* Let through what there are tokens for. Reads and writes in turn: they may share a bucket. */
static void admit(struct block *b)
{
	uint64_t earliest = UINT64_MAX;
	bool more;
	do {
		uint64_t now = clock_ns();
		earliest = UINT64_MAX;
		more = false;
		for (int i = 0; i < 2; i++) {
			int kind = b->turn ^ i;
			struct block_request *r = b->queued[kind].first;
			if (!r)
				continue;
			bool moves = r->op == BLOCK_READ || r->op == BLOCK_WRITE;
			uint64_t when = b->draining ? 0 : throttle_admit(&b->throttle, kind == THROTTLE_WRITE, moves ? r->len : 0, now);
			if (!when) {
				b->node->driver->submit(b->node, take(&b->queued[kind]));
				b->turn = !kind;
				more = true;
				break;
			} else if (when < earliest) {
				earliest = when;
			}
		}
	} while (more);
	if (earliest != UINT64_MAX)
		vtimer_arm(&b->timer, earliest);
}

void block_kick(struct block *b)
{
	if (b->kicking) {
		b->again = true;
		return;
	}
	b->kicking = true;
	do {
		struct block_request *r;
		b->again = false;
		if (b->throttled)
			admit(b);
		if (b->node->driver->kick)
			b->node->driver->kick(b->node);
		while ((r = take(&b->ready)))
			r->done(r, (int)(intptr_t)r->node_private);
	} while (b->again);
	b->kicking = false;
}

static void on_timer(void *opaque)
{
	block_kick(opaque);
}

void block_drain(struct block *b)
{
	b->draining = true;
	for (;;) {
		block_kick(b);
		if (!b->stats.in_flight)
			break;
		if (aio_busy(b->aio)) {
			aio_wait(b->aio);
		} else if (b->node->driver->wait) {
			b->node->driver->wait(b->node);
		} else {
			struct timespec ms = { .tv_nsec = 1000000 };
			nanosleep(&ms, NULL);
		}
	}
	b->draining = false;
}
