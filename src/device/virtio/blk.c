#include "device/virtio/blk.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/error.h"
#include "base/keyval.h"
#include "block/block.h"
#include "device/virtio/virtio.h"

/* 5.2.3 */
enum {
	BLK_F_SEG_MAX = 2,
	BLK_F_RO = 5,
	BLK_F_BLK_SIZE = 6,
	BLK_F_FLUSH = 9,
	BLK_F_TOPOLOGY = 10,
	BLK_F_CONFIG_WCE = 11,
	BLK_F_MQ = 12,
	BLK_F_DISCARD = 13,
	BLK_F_WRITE_ZEROES = 14,
};

/* 5.2.4 */
struct blk_regs {
	uint64_t capacity; /* sectors */
	uint32_t size_max, seg_max;
	uint16_t cylinders;
	uint8_t heads, sectors;
	uint32_t blk_size;
	uint8_t physical_block_exp, alignment_offset;
	uint16_t min_io_size;
	uint32_t opt_io_size;
	uint8_t writeback, unused0;
	uint16_t num_queues;
	uint32_t max_discard_sectors, max_discard_seg, discard_sector_alignment;
	uint32_t max_write_zeroes_sectors, max_write_zeroes_seg;
	uint8_t write_zeroes_may_unmap, unused1[3];
} __attribute__((packed));
_Static_assert(sizeof(struct blk_regs) == 60, "virtio 1.2 5.2.4");

/* 5.2.6 */
enum { BLK_T_IN = 0, BLK_T_OUT = 1, BLK_T_FLUSH = 4, BLK_T_GET_ID = 8, BLK_T_DISCARD = 11, BLK_T_WRITE_ZEROES = 13 };
enum { BLK_S_OK = 0, BLK_S_IOERR = 1, BLK_S_UNSUPP = 2 };
#define SEGMENT_UNMAP 1u

struct blk_header {
	uint32_t type, reserved;
	uint64_t sector;
};

struct blk_segment {
	uint64_t sector;
	uint32_t num_sectors, flags;
};

#define SECTOR 512
#define QUEUE_SIZE 256
#define MAX_SEGMENTS 64			  /* of one DISCARD or WRITE_ZEROES */
#define MAX_DISCARD (1u << 21)		  /* sectors: 1 GiB */
#define MAX_ZERO (1u << 19)		  /* sectors: 256 MiB; some backends have to write them */
#define A_ROUND (2 * VIRTIO_QUEUE_MAX)	  /* requests of a queue, then others get the device lock */

struct blk;

struct blk_request {
	struct block_request r; /* the part that is being done */
	struct blk *blk;
	struct virtio_chain *chain;
	unsigned queue;
	struct iovec *iov; /* ours, or NULL: the chain's are used */
	struct blk_segment *segment; /* the rest of a DISCARD or WRITE_ZEROES; ours, or NULL */
	unsigned nsegments, next_segment;
	struct blk_request *next; /* of the free ones */
};

struct blk {
	struct virtio_device d;
	struct blk_regs regs;
	struct block *block;
	char serial[VIRTIO_BLK_SERIAL];
	bool read_only;
	bool cached; /* the backend has a cache to flush */
	bool closing;
	unsigned nqueues;
	unsigned in_flight[VIRTIO_BLK_MAX_QUEUES], total_in_flight;
	bool queue_resetting[VIRTIO_BLK_MAX_QUEUES];
	unsigned batch;	  /* depth of notify: answers are announced at its end */
	unsigned dirty;	  /* queues that have something to announce */
	unsigned pending; /* queues whose round was cut short */
	struct vtimer again;
	struct blk_request *free;
	uint64_t bad; /* requests that made no sense */
};

static struct blk *blk_of(struct virtio_device *d)
{
	return (struct blk *)d; /* its first member */
}

/* --- answers --- */

static void announce(struct blk *b)
{
	for (unsigned q = 0; b->dirty; q++, b->dirty >>= 1) {
		if (b->dirty & 1)
			virtq_notify(virtio_queue(&b->d, q));
	}
}

/* The status byte is the last that the device writes (5.2.6). */
static void answer(struct blk *b, unsigned q, struct virtio_chain *c, uint8_t status)
{
	const struct iovec *last = &c->iov[c->nout + c->nin - 1];
	((uint8_t *)last->iov_base)[last->iov_len - 1] = status;
	virtq_push(virtio_queue(&b->d, q), c, c->in_len);
	b->dirty |= 1u << q;
	if (!b->batch)
		announce(b);
}

static uint8_t status_of(int result)
{
	return result == 0 ? BLK_S_OK : result == -EOPNOTSUPP ? BLK_S_UNSUPP : BLK_S_IOERR;
}

static void finish(struct blk_request *req, int result)
{
	struct blk *b = req->blk;
	struct virtio_chain *c = req->chain;
	unsigned q = req->queue;
	free(req->iov);
	free(req->segment);
	req->next = b->free;
	b->free = req;
	b->in_flight[q]--;
	b->total_in_flight--;

	if (b->d.resetting || b->closing) {
		virtq_drop(c);
		if (!b->total_in_flight && b->d.resetting)
			virtio_reset_done(&b->d);
		return;
	}
	if (b->queue_resetting[q]) {
		virtq_drop(c);
		if (!b->in_flight[q]) {
			b->queue_resetting[q] = false;
			virtio_queue_reset_done(&b->d, q);
		}
		return;
	}
	answer(b, q, c, status_of(result));
}

/* Without a cache, or with one that the driver does not know of, a write that is done must last (5.2.6.2). */
static bool write_through(const struct blk *b)
{
	return b->cached && (!virtio_has(&b->d, BLK_F_FLUSH) || (virtio_has(&b->d, BLK_F_CONFIG_WCE) && !b->regs.writeback));
}

/* One part of a request is done: the next segment, the flush behind it, or the end. */
static void on_done(struct block_request *r, int result)
{
	struct blk_request *req = r->opaque;
	struct blk *b = req->blk;
	bool stopped = b->d.resetting || b->closing || b->queue_resetting[req->queue];
	if (result || stopped || r->op == BLOCK_READ || r->op == BLOCK_FLUSH) {
		finish(req, result);
		return;
	}
	if (req->next_segment < req->nsegments) {
		const struct blk_segment *s = &req->segment[req->next_segment++];
		r->offset = s->sector * SECTOR;
		r->len = (uint64_t)s->num_sectors * SECTOR;
		r->flags = s->flags & SEGMENT_UNMAP ? BLOCK_MAY_UNMAP : 0;
	} else if (r->op != BLOCK_DISCARD && write_through(b)) {
		r->op = BLOCK_FLUSH;
	} else {
		finish(req, 0);
		return;
	}
	block_submit(b->block, r);
	block_kick(b->block);
}

/* --- requests --- */

static struct blk_request *new_request(struct blk *b, unsigned q, struct virtio_chain *c)
{
	struct blk_request *req = b->free;
	if (req)
		b->free = req->next;
	else
		req = malloc(sizeof(*req));
	if (!req)
		return NULL;
	req->blk = b;
	req->chain = c;
	req->queue = q;
	req->iov = NULL;
	req->segment = NULL;
	req->nsegments = req->next_segment = 0;
	b->in_flight[q]++;
	b->total_in_flight++;
	return req;
}

static void submit(struct blk_request *req, enum block_op op, uint64_t offset, uint64_t len, const struct iovec *iov, unsigned niov)
{
	req->r.op = op;
	req->r.flags = 0;
	req->r.offset = offset;
	req->r.len = len;
	req->r.iov = iov;
	req->r.niov = niov;
	req->r.done = on_done;
	req->r.opaque = req;
	block_submit(req->blk->block, &req->r);
}

/* The data of a chain: [skip, skip+len) of n vectors. They are the chain's own where headers stand alone, as all drivers have them. */
static int data_of(struct blk_request *req, const struct iovec *iov, unsigned n, size_t skip, size_t len, const struct iovec **out)
{
	while (n && skip >= iov->iov_len) {
		skip -= iov->iov_len;
		iov++;
		n--;
	}
	while (n && !skip) {
		size_t sum = 0;
		unsigned m = 0;
		while (m < n && sum < len)
			sum += iov[m++].iov_len;
		if (sum != len)
			break; /* the end is in the middle of a vector */
		*out = iov;
		return (int)m;
	}
	req->iov = malloc((n ? n : 1) * sizeof(*iov));
	if (!req->iov)
		return -ENOMEM;
	*out = req->iov;
	return iov_slice(iov, n, skip, len, req->iov, n);
}

#define UNDER_WAY (-1)

/* These return UNDER_WAY, or the status to answer at once. */

static int transfer(struct blk *b, unsigned q, struct virtio_chain *c, const struct blk_header *h)
{
	bool in = h->type == BLK_T_IN;
	uint64_t len = in ? c->in_len - 1 : c->out_len - sizeof(*h);
	if (!in && b->read_only)
		return BLK_S_IOERR;
	if (len % SECTOR || h->sector > b->regs.capacity || len / SECTOR > b->regs.capacity - h->sector) {
		b->bad++;
		return BLK_S_IOERR;
	}
	struct blk_request *req = new_request(b, q, c);
	if (!req)
		return BLK_S_IOERR;
	const struct iovec *iov = NULL;
	int n = in ? data_of(req, c->iov + c->nout, c->nin, 0, len, &iov) : data_of(req, c->iov, c->nout, sizeof(*h), len, &iov);
	if (n < 0) {
		finish(req, n);
		return UNDER_WAY;
	}
	submit(req, in ? BLOCK_READ : BLOCK_WRITE, h->sector * SECTOR, len, iov, (unsigned)n);
	return UNDER_WAY;
}

static int flush(struct blk *b, unsigned q, struct virtio_chain *c)
{
	struct blk_request *req = new_request(b, q, c);
	if (!req)
		return BLK_S_IOERR;
	submit(req, BLOCK_FLUSH, 0, 0, NULL, 0);
	return UNDER_WAY;
}

/* DISCARD and WRITE_ZEROES: all segments are checked before the first is done. */
static int segments(struct blk *b, unsigned q, struct virtio_chain *c, const struct blk_header *h)
{
	bool zero = h->type == BLK_T_WRITE_ZEROES;
	if (b->read_only)
		return BLK_S_IOERR;
	if (!virtio_has(&b->d, zero ? BLK_F_WRITE_ZEROES : BLK_F_DISCARD))
		return BLK_S_UNSUPP;
	uint64_t len = c->out_len - sizeof(*h);
	if (!len || len % sizeof(struct blk_segment) || len > MAX_SEGMENTS * sizeof(struct blk_segment)) {
		b->bad++;
		return BLK_S_IOERR;
	}
	struct blk_segment s[MAX_SEGMENTS];
	unsigned n = (unsigned)(len / sizeof(s[0]));
	virtio_chain_read(c, sizeof(*h), s, len);
	for (unsigned i = 0; i < n; i++) {
		/* 5.2.6.2: unknown flags, and unmap of a discard. */
		if (s[i].flags & ~(zero ? SEGMENT_UNMAP : 0u)) {
			b->bad++;
			return BLK_S_UNSUPP;
		}
		if (s[i].sector > b->regs.capacity || s[i].num_sectors > b->regs.capacity - s[i].sector || s[i].num_sectors > (zero ? MAX_ZERO : MAX_DISCARD)) {
			b->bad++;
			return BLK_S_IOERR;
		}
	}
	struct blk_request *req = new_request(b, q, c);
	if (!req)
		return BLK_S_IOERR;
	if (n > 1) {
		req->segment = malloc(len);
		if (!req->segment) {
			finish(req, -ENOMEM);
			return UNDER_WAY;
		}
		memcpy(req->segment, s, len);
		req->nsegments = n;
		req->next_segment = 1;
	}
	submit(req, zero ? BLOCK_WRITE_ZEROES : BLOCK_DISCARD, s[0].sector * SECTOR, (uint64_t)s[0].num_sectors * SECTOR, NULL, 0);
	return UNDER_WAY;
}

static int start_request(struct blk *b, unsigned q, struct virtio_chain *c, const struct blk_header *h)
{
	switch (h->type) {
	case BLK_T_IN:
	case BLK_T_OUT:
		return transfer(b, q, c, h);
	case BLK_T_FLUSH:
		return flush(b, q, c);
	case BLK_T_DISCARD:
	case BLK_T_WRITE_ZEROES:
		return segments(b, q, c, h);
	case BLK_T_GET_ID:
		virtio_chain_write(c, 0, b->serial, c->in_len - 1 < sizeof(b->serial) ? c->in_len - 1 : sizeof(b->serial));
		return BLK_S_OK;
	default:
		b->bad++;
		return BLK_S_UNSUPP;
	}
}

/* One chain: under way, answered, or the driver is told that it broke the rules. */
static bool accept(struct blk *b, unsigned q, struct virtio_chain *c)
{
	struct blk_header h;
	if (c->out_len < sizeof(h) || !c->in_len) {
		virtio_broken(&b->d, "a request of %" PRIu64 " bytes out and %" PRIu64 " in has no room for header and status", c->out_len, c->in_len);
		virtq_drop(c);
		return false;
	}
	if (c->iov[0].iov_len >= sizeof(h))
		memcpy(&h, c->iov[0].iov_base, sizeof(h));
	else
		virtio_chain_read(c, 0, &h, sizeof(h));
	int status = start_request(b, q, c, &h);
	if (status != UNDER_WAY)
		answer(b, q, c, (uint8_t)status);
	return true;
}

static void serve(struct blk *b, unsigned q)
{
	struct virtio_queue *queue = virtio_queue(&b->d, q);
	unsigned round = 0;
	b->batch++;
	do {
		virtq_no_notify(queue);
		struct virtio_chain *c;
		while (round < A_ROUND && (c = virtq_pop(queue))) {
			round++;
			if (!accept(b, q, c))
				break;
		}
		block_kick(b->block);
		if (round >= A_ROUND) {
			b->pending |= 1u << q;
			vtimer_arm(&b->again, clock_ns());
			break;
		}
	} while (virtq_want_notify(queue));
	if (!--b->batch)
		announce(b);
}

static void on_again(void *opaque)
{
	struct blk *b = opaque;
	unsigned pending = b->pending;
	b->pending = 0;
	if (!virtio_is_live(&b->d))
		return;
	for (unsigned q = 0; q < b->nqueues; q++) {
		if (pending >> q & 1)
			serve(b, q);
	}
}

/* --- life --- */

static void blk_notify(struct virtio_device *d, unsigned q)
{
	struct blk *b = blk_of(d);
	if (q < b->nqueues)
		serve(b, q);
}

static void blk_config_write(struct virtio_device *d, unsigned offset, unsigned size, uint64_t value)
{
	struct blk *b = blk_of(d);
	if (offset == offsetof(struct blk_regs, writeback) && size == 1 && virtio_has(d, BLK_F_CONFIG_WCE))
		b->regs.writeback = value & 1;
}

static bool blk_reset(struct virtio_device *d)
{
	struct blk *b = blk_of(d);
	vtimer_cancel(&b->again);
	b->pending = b->dirty = 0;
	b->regs.writeback = b->cached;
	memset(b->queue_resetting, 0, sizeof(b->queue_resetting));
	return !b->total_in_flight;
}

static bool blk_queue_reset(struct virtio_device *d, unsigned q)
{
	struct blk *b = blk_of(d);
	b->queue_resetting[q] = b->in_flight[q] > 0;
	b->dirty &= ~(1u << q);
	return !b->queue_resetting[q];
}

static void blk_destroy(struct virtio_device *d)
{
	struct blk *b = blk_of(d);
	b->closing = true;
	vtimer_cancel(&b->again);
	if (b->total_in_flight)
		block_drain(b->block);
	virtio_fini(d);
	while (b->free) {
		struct blk_request *req = b->free;
		b->free = req->next;
		free(req);
	}
	free(b);
}

static void blk_stats(struct virtio_device *d, char *text, size_t room)
{
	struct blk *b = blk_of(d);
	struct block_stats s;
	block_get_stats(b->block, &s);
	size_t used = strlen(text);
	if (used >= room)
		return;
	snprintf(text + used, room - used,
		 "backend %s\nreads %" PRIu64 "\nread_bytes %" PRIu64 "\nwrites %" PRIu64 "\nwrite_bytes %" PRIu64 "\nflushes %" PRIu64 "\ndiscards %" PRIu64
		 "\nerrors %" PRIu64 "\nbusy_ms %" PRIu64 "\nin_flight %u\n",
		 block_describe(b->block), s.reads, s.read_bytes, s.writes, s.write_bytes, s.flushes, s.discards, s.errors + b->bad, s.busy_ns / 1000000,
		 s.in_flight);
}

static const struct virtio_ops blk_ops = {
	.name = "virtio-blk",
	.id = VIRTIO_ID_BLOCK,
	.config_write = blk_config_write,
	.notify = blk_notify,
	.reset = blk_reset,
	.queue_reset = blk_queue_reset,
	.destroy = blk_destroy,
	.stats = blk_stats,
};

/* --- making one --- */

static bool power_of_two(uint64_t v)
{
	return v && !(v & (v - 1));
}

int virtio_blk_parse(struct virtio_blk_config *c, struct keyval *kv, struct error *err)
{
	uint64_t queues = 0, queue_size = QUEUE_SIZE, logical = 0, physical = 0;
	*c = (struct virtio_blk_config){ 0 };
	const char *serial = keyval_get(kv, "serial");
	if (serial && (!*serial || strlen(serial) > VIRTIO_BLK_SERIAL))
		return error_set(err, EINVAL, "%s: serial=%s: a serial number has 1 to %d characters", kv->option, serial, VIRTIO_BLK_SERIAL);
	int r = keyval_u64(kv, "queues", 1, VIRTIO_BLK_MAX_QUEUES, &queues, err);
	if (!r)
		r = keyval_u64(kv, "queue-size", 4, VIRTIO_QUEUE_MAX, &queue_size, err);
	if (!r)
		r = keyval_size(kv, "block-size", &logical, err);
	if (!r)
		r = keyval_size(kv, "physical-block-size", &physical, err);
	if (r)
		return r;
	if (!power_of_two(queue_size))
		return error_set(err, EINVAL, "%s: queue-size=%" PRIu64 " is not a power of two; give for example %d", kv->option, queue_size, QUEUE_SIZE);
	if (keyval_get(kv, "block-size") && logical != 512 && logical != 4096)
		return error_set(err, EINVAL, "%s: block-size=%" PRIu64 ": a sector has 512 or 4096 bytes; give one of these", kv->option, logical);
	uint64_t least = logical ? logical : SECTOR;
	if (physical && (!power_of_two(physical) || physical < least || physical > 65536))
		return error_set(err, EINVAL, "%s: physical-block-size=%" PRIu64 ": give a power of two from the block size (%" PRIu64 ") to 64K", kv->option,
				 physical, least);
	if (serial)
		strcpy(c->serial, serial);
	c->queues = (unsigned)queues;
	c->queue_size = (unsigned)queue_size;
	c->logical_block = (uint32_t)logical;
	c->physical_block = (uint32_t)physical;
	return 0;
}

/* What the backend can do with it, a guest may call a sector. */
static uint32_t smallest(const struct block_info *info)
{
	return info->whole_blocks ? info->logical_block : SECTOR;
}

static uint64_t set_up(struct blk *b, const struct virtio_blk_config *c, unsigned queue_size)
{
	const struct block_info *info = block_info(b->block);
	uint32_t logical = c->logical_block ? c->logical_block : smallest(info);
	uint32_t physical = c->physical_block ? c->physical_block : info->physical_block;
	uint64_t features = VIRTIO_BIT(BLK_F_SEG_MAX) | VIRTIO_BIT(BLK_F_BLK_SIZE) | VIRTIO_BIT(BLK_F_TOPOLOGY);
	b->read_only = info->read_only;
	b->cached = info->write_cache;
	b->regs.capacity = info->size / SECTOR;
	/* Header and status take a descriptor each. */
	b->regs.seg_max = queue_size - 2;
	b->regs.blk_size = logical;
	for (uint32_t v = logical; v < physical && b->regs.physical_block_exp < 7; v <<= 1)
		b->regs.physical_block_exp++;
	b->regs.min_io_size = (uint16_t)(1u << b->regs.physical_block_exp);
	b->regs.num_queues = (uint16_t)b->nqueues;
	b->regs.writeback = b->cached;
	if (b->nqueues > 1)
		features |= VIRTIO_BIT(BLK_F_MQ);
	if (b->cached)
		features |= VIRTIO_BIT(BLK_F_FLUSH) | VIRTIO_BIT(BLK_F_CONFIG_WCE);
	if (b->read_only)
		return features | VIRTIO_BIT(BLK_F_RO);

	if (info->discard_granularity) {
		features |= VIRTIO_BIT(BLK_F_DISCARD);
		b->regs.max_discard_sectors = MAX_DISCARD;
		b->regs.max_discard_seg = MAX_SEGMENTS;
		b->regs.discard_sector_alignment = (info->discard_granularity > logical ? info->discard_granularity : logical) / SECTOR;
		b->regs.write_zeroes_may_unmap = 1;
	}
	b->regs.max_write_zeroes_sectors = MAX_ZERO;
	b->regs.max_write_zeroes_seg = MAX_SEGMENTS;
	return features | VIRTIO_BIT(BLK_F_WRITE_ZEROES);
}

int virtio_blk_create(struct virtio_device **out, const struct virtio_blk_config *c, const struct virtio_host *host, struct error *err)
{
	if (c->logical_block && block_info(c->block)->size % c->logical_block)
		return error_set(err, EINVAL, "--disk %s: its size is not a multiple of block-size=%" PRIu32 "; take another block size", block_describe(c->block),
				 c->logical_block);
	if (c->logical_block && c->logical_block < smallest(block_info(c->block)))
		return error_set(err, EINVAL, "--disk %s: its server takes no parts of blocks of %" PRIu32 " bytes; leave block-size=%" PRIu32 " out",
				 block_describe(c->block), smallest(block_info(c->block)), c->logical_block);
	struct blk *b = calloc(1, sizeof(*b));
	if (!b)
		return error_set(err, ENOMEM, "%s: out of memory", host->name);
	b->block = c->block;
	b->nqueues = c->queues < 1 ? 1 : c->queues > VIRTIO_BLK_MAX_QUEUES ? VIRTIO_BLK_MAX_QUEUES : c->queues;
	const char *serial = *c->serial ? c->serial : host->name;
	memcpy(b->serial, serial, strnlen(serial, sizeof(b->serial)));
	vtimer_init(&b->again, host->loop, on_again, b);
	uint16_t sizes[VIRTIO_BLK_MAX_QUEUES];
	for (unsigned q = 0; q < b->nqueues; q++)
		sizes[q] = (uint16_t)(c->queue_size ? c->queue_size : QUEUE_SIZE);
	uint64_t features = set_up(b, c, sizes[0]);
	int r = virtio_init(&b->d, &blk_ops, host, features, &b->regs, sizeof(b->regs), b->nqueues, sizes, err);
	if (r) {
		free(b);
		return r;
	}
	*out = &b->d;
	return 0;
}
