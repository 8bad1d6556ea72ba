/*
 * The device that the virtio core's own tests put in front of their queues, and what they share: it echoes each request, or keeps what it
 * pops until the test gives it back. Two queues, of PROBE_SIZE places and of twice that.
 */
#ifndef TRAPLINE_TESTS_VIRTIO_PROBE_H
#define TRAPLINE_TESTS_VIRTIO_PROBE_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <errno.h>

#include "virtio_bench.h"
#include "virtio_log.h"

#define RAM (8ull << 20)
#define SIZE 8

/* --- a device that keeps what it pops until it is told to give it back --- */

struct probe {
	struct virtio_device d;
	struct virtio_chain *held[4 * SIZE];
	unsigned nheld;
	bool hold;	    /* keep chains instead of echoing */
	bool slow;	    /* resets finish later */
	struct vbench *refill; /* make a buffer available for each that is answered: what a driver on another CPU does */
	unsigned refills;
	unsigned notifies, starts, resets, queue_resets;
	uint8_t config[8];
};

static inline void echo(struct virtio_queue *q, struct virtio_chain *c)
{
	uint8_t bytes[256];
	size_t n = virtio_chain_read(c, 0, bytes, sizeof(bytes));
	virtq_push(q, c, virtio_chain_write(c, 0, bytes, n));
}

static inline void refill(struct probe *p)
{
	if (!p->refill)
		return;
	while (vbench_used(p->refill, 0, NULL) >= 0)
		;
	vbench_add(p->refill, 0, (struct vbuf[]){ { 0x1000, 1, false }, { 0x2000, 1, true } }, 2);
	p->refills++;
}

static inline void probe_notify(struct virtio_device *d, unsigned q)
{
	struct probe *p = (struct probe *)d;
	struct virtio_queue *queue = virtio_queue(d, q);
	p->notifies++;
	do {
		virtq_no_notify(queue);
		struct virtio_chain *c;
		while (p->nheld < sizeof(p->held) / sizeof(p->held[0]) && (c = virtq_pop(queue)))
			if (p->hold)
				p->held[p->nheld++] = c;
			else {
				echo(queue, c);
				refill(p);
			}
		virtq_notify(queue);
	} while (p->nheld < sizeof(p->held) / sizeof(p->held[0]) && virtq_want_notify(queue));
}

static inline void drop_all(struct probe *p)
{
	while (p->nheld)
		virtq_drop(p->held[--p->nheld]);
}

static inline bool probe_reset(struct virtio_device *d)
{
	struct probe *p = (struct probe *)d;
	p->resets++;
	if (p->slow)
		return false;
	drop_all(p);
	return true;
}

static inline bool probe_queue_reset(struct virtio_device *d, unsigned q)
{
	struct probe *p = (struct probe *)d;
	(void)q;
	p->queue_resets++;
	if (p->slow)
		return false;
	drop_all(p);
	return true;
}

static inline void probe_start(struct virtio_device *d)
{
	((struct probe *)d)->starts++;
}

static inline void probe_config_write(struct virtio_device *d, unsigned offset, unsigned size, uint64_t value)
{
	memcpy(((struct probe *)d)->config + offset, &value, size);
}

static inline int probe_features(struct virtio_device *d)
{
	return virtio_has(d, 1) && !virtio_has(d, 0) ? -EINVAL : 0; /* feature 1 needs feature 0 */
}

static inline void probe_destroy(struct virtio_device *d)
{
	drop_all((struct probe *)d);
	virtio_fini(d);
}

static const struct virtio_ops probe_ops = {
	.name = "virtio-probe",
	.id = 42,
	.config_write = probe_config_write,
	.features = probe_features,
	.start = probe_start,
	.notify = probe_notify,
	.reset = probe_reset,
	.queue_reset = probe_queue_reset,
	.destroy = probe_destroy,
};

struct fixture {
	struct vbench b;
	struct probe p;
	struct log_capture log;
};

static inline int open_fixture(void **state)
{
	struct fixture *f = calloc(1, sizeof(*f));
	static const uint16_t sizes[] = { SIZE, 2 * SIZE };
	vbench_open(&f->b, RAM);
	const struct virtio_host host = vbench_host(&f->b, "probe0");
	assert_int_equal(virtio_init(&f->p.d, &probe_ops, &host, 3, f->p.config, sizeof(f->p.config), 2, sizes, NULL), 0);
	f->b.d = &f->p.d;
	log_start(&f->log);
	*state = f;
	return 0;
}

static inline int close_fixture(void **state)
{
	struct fixture *f = *state;
	log_stop(&f->log);
	vbench_close(&f->b);
	free(f);
	return 0;
}

/* Features of the four kinds of ring. */
#define EVENT VIRTIO_BIT(VIRTIO_F_EVENT_IDX)
#define PACKED VIRTIO_BIT(VIRTIO_F_RING_PACKED)
static const uint64_t kinds[] = { ~(PACKED | EVENT), ~PACKED, ~EVENT, UINT64_MAX };
#define KINDS (sizeof(kinds) / sizeof(kinds[0]))

/* One request and its answer through queue q. */
static inline void round_trip(struct fixture *f, unsigned q, unsigned nbufs, bool indirect)
{
	struct vbench *b = &f->b;
	struct vbuf bufs[SIZE];
	uint8_t sent[SIZE] = { 0 };
	unsigned nout = (nbufs + 1) / 2;
	for (unsigned i = 0; i < nbufs; i++) {
		bufs[i] = (struct vbuf){ vbench_alloc(b, 1, 1), 1, i >= nout };
		if (!bufs[i].in)
			*(uint8_t *)vbench_hva(b, bufs[i].gpa) = sent[i] = (uint8_t)rand();
	}
	int id = indirect ? vbench_add_indirect(b, q, bufs, nbufs) : vbench_add(b, q, bufs, nbufs);
	vbench_kick(b, q);
	uint32_t len = 99;
	assert_int_equal(vbench_used(b, q, &len), id);
	assert_int_equal(len, nbufs - nout);
	for (unsigned i = 0; i < len; i++)
		assert_int_equal(*(uint8_t *)vbench_hva(b, bufs[nout + i].gpa), sent[i]);
}

static inline void add_one(struct vbench *b)
{
	vbench_add(b, 0, (struct vbuf[]){ { 0x1000, 1, false }, { 0x2000, 1, true } }, 2);
}

static inline void expect_broken(struct fixture *f, const char *name, const char *says)
{
	struct vbench *b = &f->b;
	const char *log = log_take(&f->log);
	if (!(virtio_get_status(b->d) & VIRTIO_STATUS_NEEDS_RESET) || log_lines(log) != 1 || !strstr(log, says) || !strstr(log, "probe0"))
		fail_msg("%s: status 0x%x, log \"%s\", expected one line with \"%s\"", name, virtio_get_status(b->d), log, says);
	assert_false(virtio_is_live(b->d));
	/* Nothing goes on, and nothing more is said. */
	assert_null(virtq_pop(virtio_queue(b->d, 0)));
	vbench_kick(b, 0);
	vbench_kick(b, 1);
	assert_false(virtq_want_notify(virtio_queue(b->d, 0)));
	assert_string_equal(log_take(&f->log), "");
	f->p.d.faults = 0;
}

#endif
