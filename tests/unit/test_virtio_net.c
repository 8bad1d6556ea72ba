/* The network card with a scripted driver in front and a scripted backend behind: headers, receive buffers of three kinds, the control queue. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <errno.h>

#include "base/keyval.h"
#include "device/virtio/net.h"
#include "net/backend.h"
#include "virtio_bench.h"
#include "virtio_log.h"

#define RX 0
#define TX 1
#define HEADER 12
#define BIT(n) VIRTIO_BIT(n)
enum { CSUM, GUEST_CSUM, CTRL_GUEST_OFFLOADS, MTU, MAC = 5, GUEST_TSO4 = 7, HOST_TSO4 = 11, MRG = 15, STATUS, CTRL_VQ, CTRL_RX, CTRL_VLAN, MQ = 22, HOST_USO = 56 };
#define PACKED BIT(VIRTIO_F_RING_PACKED)

static const uint8_t mac[6] = { 2, 0, 0, 0, 0, 7 };

/* --- a backend that keeps the last frame and is full on request --- */

struct wire {
	struct net n;
	bool full;
	bool echoes; /* answers with the same frame at once */
	unsigned sent, flushes, resumes, changes;
	struct net_header h;
	unsigned q;
	uint8_t frame[NET_FRAME_MAX];
	size_t len;
};

static bool wire_send(struct net *n, unsigned q, const struct net_header *h, const struct iovec *iov, unsigned niov)
{
	struct wire *w = (struct wire *)n;
	if (w->full)
		return false;
	w->sent++;
	w->h = *h;
	w->q = q;
	w->len = net_gather(w->frame, sizeof(w->frame), iov, niov);
	if (w->echoes)
		assert_true(net_deliver(n, 0, &(struct net_header){ 0 }, iov, niov));
	return true;
}

static void wire_flush(struct net *n)
{
	((struct wire *)n)->flushes++;
}

static void wire_resume(struct net *n)
{
	((struct wire *)n)->resumes++;
}

static void wire_changed(struct net *n)
{
	((struct wire *)n)->changes++;
}

static const struct net_backend wire_ops = {
	.type = "wire", .send = wire_send, .flush = wire_flush, .resume = wire_resume, .changed = wire_changed
};

struct fixture {
	struct vbench b;
	struct wire w;
	struct log_capture log;
	uint64_t ctrl_ack;
};

static void open_card(struct fixture *f, unsigned caps, unsigned pairs)
{
	memset(f, 0, sizeof(*f));
	vbench_open(&f->b, 32 << 20);
	net_init(&f->w.n, &wire_ops, f->b.loop);
	f->w.n.info.caps = caps;
	f->w.n.info.mtu = 9000;
	const struct virtio_net_config c = { .net = &f->w.n, .mac = { 2, 0, 0, 0, 0, 7 }, .queues = pairs };
	const struct virtio_host host = vbench_host(&f->b, "net0");
	assert_int_equal(virtio_net_create(&f->b.d, &c, &host, NULL), 0);
	log_start(&f->log);
}

static void close_card(struct fixture *f)
{
	log_stop(&f->log);
	vbench_close(&f->b);
	free(f->w.n.scratch);
}

#define ALL_CAPS                                                                                                                                     \
	(NET_CAN_CSUM | NET_CAN_TSO4 | NET_CAN_TSO6 | NET_CAN_USO | NET_GIVES_CSUM | NET_GIVES_TSO4 | NET_GIVES_TSO6 | NET_GIVES_USO)

/* --- transmission --- */

/* A frame with a header, in two buffers cut at `cut`. */
static int tx(struct fixture *f, const struct net_header *h, const uint8_t *frame, size_t len, size_t cut)
{
	struct vbench *b = &f->b;
	uint64_t gpa = vbench_alloc(b, HEADER + len + 1, 16);
	uint8_t *p = vbench_hva(b, gpa);
	memcpy(p, h, HEADER);
	memcpy(p + HEADER, frame, len);
	struct vbuf bufs[2] = { { gpa, (uint32_t)cut, false }, { gpa + cut, (uint32_t)(HEADER + len - cut), false } };
	int id = cut && cut < HEADER + len ? vbench_add(b, TX, bufs, 2) : vbench_add(b, TX, &(struct vbuf){ gpa, (uint32_t)(HEADER + len), false }, 1);
	vbench_kick(b, TX);
	return id;
}

static void test_transmit(void **state)
{
	(void)state;
	static struct fixture f;
	for (unsigned packed = 0; packed < 2; packed++) {
		open_card(&f, ALL_CAPS, 1);
		vbench_start(&f.b, packed ? UINT64_MAX : ~PACKED);
		uint8_t frame[2000];
		for (unsigned i = 0; i < sizeof(frame); i++)
			frame[i] = (uint8_t)(i * 3);
		const struct net_header plain = { 0 };
		static const size_t cuts[] = { 0, 1, 11, 12, 13, 500 };
		for (unsigned i = 0; i < sizeof(cuts) / sizeof(cuts[0]); i++) {
			uint32_t written = 9;
			int id = tx(&f, &plain, frame, sizeof(frame), cuts[i]);
			assert_int_equal(f.w.sent, i + 1);
			assert_int_equal(f.w.flushes, i + 1);
			assert_int_equal(f.w.len, sizeof(frame));
			assert_memory_equal(f.w.frame, frame, sizeof(frame));
			assert_int_equal(vbench_used(&f.b, TX, &written), id);
			assert_int_equal(written, 0);
		}
		/* Largest, and what the driver left in fields that say nothing. */
		static uint8_t large[NET_FRAME_MAX];
		const struct net_header noise = { .flags = 0xfe, .hdr_len = 0xffff, .gso_size = 77, .csum_start = 0xffff, .num_buffers = 9 };
		tx(&f, &noise, large, sizeof(large), 0);
		assert_int_equal(f.w.len, sizeof(large));
		assert_int_equal(f.w.h.flags, 0);
		assert_int_equal(f.w.h.gso_size, 0);
		assert_int_equal(f.w.h.num_buffers, 0);
		/* A burst is one batch. */
		unsigned flushes = f.w.flushes, interrupts = f.b.interrupts[TX];
		uint64_t gpa = vbench_alloc(&f.b, 100, 16);
		for (unsigned i = 0; i < 20; i++)
			vbench_add(&f.b, TX, &(struct vbuf){ gpa, 100, false }, 1);
		vbench_kick(&f.b, TX);
		assert_int_equal(f.w.flushes, flushes + 1);
		assert_true(f.b.interrupts[TX] <= interrupts + 1);
		assert_string_equal(log_take(&f.log), "");
		close_card(&f);
	}
}

static void test_bad_headers(void **state)
{
	(void)state;
	static struct fixture f;
	open_card(&f, ALL_CAPS, 1);
	uint8_t frame[100] = { 0 };
	/* `need`: without this feature it is a lie, with it it is sent. */
	static const struct {
		struct net_header h;
		size_t len;
		uint64_t need;
	} t[] = {
		{ { .flags = 1, .csum_start = 34, .csum_offset = 16 }, 100, BIT(CSUM) },
		{ { .flags = 1, .csum_start = 98, .csum_offset = 0 }, 100, BIT(CSUM) },
		{ { .flags = 1, .gso_type = 1, .gso_size = 10, .hdr_len = 0xffff, .csum_start = 34, .csum_offset = 16 }, 100, BIT(CSUM) | BIT(HOST_TSO4) },
		{ { .flags = 1, .gso_type = 5, .gso_size = 10, .csum_start = 34, .csum_offset = 6 }, 100, BIT(CSUM) | BIT(HOST_USO) },
		/* always lies */
		{ { .flags = 1, .csum_start = 99, .csum_offset = 0 }, 100, 0 },
		{ { .flags = 1, .csum_start = 0xffff, .csum_offset = 0xffff }, 100, 0 },
		{ { .flags = 1, .csum_start = 34, .csum_offset = 0xffff }, 100, 0 },
		{ { .flags = 1, .gso_type = 1, .gso_size = 0, .csum_start = 34, .csum_offset = 16 }, 100, 0 },
		{ { .flags = 0, .gso_type = 1, .gso_size = 10 }, 100, 0 },
		{ { .flags = 1, .gso_type = 2, .gso_size = 10, .csum_start = 34, .csum_offset = 16 }, 100, 0 },
		{ { .flags = 1, .gso_type = 3, .gso_size = 10, .csum_start = 34, .csum_offset = 6 }, 100, 0 },
		{ { .flags = 1, .gso_type = 0x81, .gso_size = 10, .csum_start = 34, .csum_offset = 16 }, 100, 0 },
		{ { .flags = 1, .gso_type = 0x80, .gso_size = 10, .csum_start = 34, .csum_offset = 16 }, 100, 0 },
		{ { 0 }, 13, 0 },
		{ { 0 }, 0, 0 },
	};
	for (unsigned i = 0; i < sizeof(t) / sizeof(t[0]); i++) {
		for (unsigned with = 0; with < 2; with++) {
			if (!t[i].need && !with)
				continue;
			uint64_t without = t[i].need & BIT(CSUM) && t[i].need != BIT(CSUM) ? t[i].need & ~BIT(CSUM) : t[i].need;
			uint64_t also = without & BIT(CSUM) ? BIT(HOST_TSO4) | BIT(HOST_TSO4 + 1) | BIT(HOST_USO) : 0;
			vbench_start(&f.b, with ? UINT64_MAX : ~(without | also));
			log_take(&f.log);
			unsigned sent = f.w.sent;
			uint32_t written;
			int id = tx(&f, &t[i].h, frame, t[i].len, 0);
			assert_int_equal(vbench_used(&f.b, TX, &written), id);
			bool goes = with && t[i].need;
			if (f.w.sent != sent + goes)
				fail_msg("header %u %s its features: %s", i, with ? "with" : "without", goes ? "not sent" : "sent");
			const char *log = log_take(&f.log);
			assert_int_equal(log_lines(log), !goes);
			if (goes)
				assert_true(f.w.h.hdr_len <= f.w.len);
			/* One line, however often. */
			id = tx(&f, &t[i].h, frame, t[i].len, 0);
			assert_int_equal(vbench_used(&f.b, TX, &written), id);
			assert_string_equal(log_take(&f.log), "");
			assert_int_equal(virtio_get_status(f.b.d), 15);
		}
	}
	/* No room for the header at all breaks the device, until a reset. */
	vbench_start(&f.b, UINT64_MAX);
	uint64_t gpa = vbench_alloc(&f.b, 16, 16);
	vbench_add(&f.b, TX, &(struct vbuf){ gpa, 11, false }, 1);
	vbench_kick(&f.b, TX);
	assert_true(virtio_get_status(f.b.d) & VIRTIO_STATUS_NEEDS_RESET);
	vbench_start(&f.b, UINT64_MAX);
	unsigned sent = f.w.sent;
	tx(&f, &(struct net_header){ 0 }, frame, 100, 0);
	assert_int_equal(f.w.sent, sent + 1);
	close_card(&f);
}

/* What the backend cannot do the card does: a partial checksum is complete when it leaves. */
static void test_checksum_for_backend(void **state)
{
	(void)state;
	static struct fixture f;
	open_card(&f, 0, 1);
	vbench_start(&f.b, UINT64_MAX);
	assert_true(virtio_has(f.b.d, CSUM));
	assert_false(virtio_has(f.b.d, HOST_TSO4));
	uint8_t frame[60] = { 0 };
	frame[40] = 0x12;
	const struct net_header h = { .flags = 1, .csum_start = 34, .csum_offset = 16 };
	tx(&f, &h, frame, sizeof(frame), 30);
	assert_int_equal(f.w.sent, 1);
	assert_int_equal(f.w.h.flags, 0);
	assert_int_equal(f.w.frame[50], 0xed);
	assert_int_equal(f.w.frame[51], 0xff);

	/* And what the guest does not want to complete is complete when it arrives. */
	vbench_start(&f.b, ~(BIT(GUEST_CSUM) | BIT(GUEST_TSO4) | BIT(GUEST_TSO4 + 1)));
	uint64_t gpa = vbench_alloc(&f.b, 2048, 16);
	vbench_add(&f.b, RX, &(struct vbuf){ gpa, 2048, true }, 1);
	const struct iovec iov = { frame, sizeof(frame) };
	assert_true(net_deliver(&f.w.n, 0, &h, &iov, 1));
	uint8_t *got = vbench_hva(&f.b, gpa);
	assert_int_equal(got[0], 0);
	assert_int_equal(got[HEADER + 50], 0xed);
	close_card(&f);
}

static void test_transmit_back_pressure(void **state)
{
	(void)state;
	static struct fixture f;
	open_card(&f, ALL_CAPS, 1);
	vbench_start(&f.b, UINT64_MAX);
	uint8_t frame[64] = { 0 };
	f.w.full = true;
	int id[3];
	for (unsigned i = 0; i < 3; i++) {
		frame[20] = (uint8_t)i;
		id[i] = tx(&f, &(struct net_header){ 0 }, frame, sizeof(frame), 0);
		assert_int_equal(vbench_used(&f.b, TX, NULL), -1);
	}
	assert_int_equal(f.w.sent, 0);
	net_writable(&f.w.n, 0); /* not true: nothing is lost */
	assert_int_equal(vbench_used(&f.b, TX, NULL), -1);
	f.w.full = false;
	net_writable(&f.w.n, 0);
	assert_int_equal(f.w.sent, 3);
	for (unsigned i = 0; i < 3; i++)
		assert_int_equal(vbench_used(&f.b, TX, NULL), id[i]);
	assert_int_equal(f.w.frame[20], 2);
	/* A reset forgets what waited. */
	f.w.full = true;
	tx(&f, &(struct net_header){ 0 }, frame, sizeof(frame), 0);
	vbench_start(&f.b, UINT64_MAX);
	f.w.full = false;
	net_writable(&f.w.n, 0);
	assert_int_equal(f.w.sent, 3);
	tx(&f, &(struct net_header){ 0 }, frame, sizeof(frame), 0);
	assert_int_equal(f.w.sent, 4);
	close_card(&f);
}

/* An answer that comes at once has an interrupt; the one for the transmit queue waits, and comes only if the driver did not clean up meanwhile. */
static uint64_t add_rx(struct fixture *f, uint32_t len);

static void test_put_off_interrupt(void **state)
{
	(void)state;
	static struct fixture f;
	uint8_t frame[64] = { 0 };
	for (unsigned cleans = 0; cleans < 2; cleans++) {
		open_card(&f, ALL_CAPS, 1);
		vbench_start(&f.b, ~(PACKED | BIT(VIRTIO_F_EVENT_IDX) * !cleans));
		f.w.echoes = true;
		add_rx(&f, 200);
		tx(&f, &(struct net_header){ 0 }, frame, sizeof(frame), 0);
		assert_int_equal(f.b.interrupts[RX], 1);
		assert_int_equal(f.b.interrupts[TX], 0);
		assert_true(vbench_used(&f.b, TX, NULL) >= 0);
		if (cleans) /* used_event: none for this one */
			vbench_avail(&f.b, TX)[2 + f.b.ring[TX].size] = 1;
		vbench_loop(&f.b, 50, NULL, NULL);
		assert_int_equal(f.b.interrupts[TX], !cleans);
		/* Without an answer it comes at once. */
		f.w.echoes = false;
		tx(&f, &(struct net_header){ 0 }, frame, sizeof(frame), 0);
		assert_int_equal(f.b.interrupts[TX], 1 + !cleans);
		close_card(&f);
	}
}

/* --- reception --- */

static uint64_t add_rx(struct fixture *f, uint32_t len)
{
	uint64_t gpa = vbench_alloc(&f->b, len, 16);
	vbench_add(&f->b, RX, &(struct vbuf){ gpa, len, true }, 1);
	return gpa;
}

static bool deliver(struct fixture *f, const uint8_t *frame, size_t len, size_t cut)
{
	const struct net_header h = { .flags = NET_DATA_VALID };
	const struct iovec iov[2] = { { (void *)frame, cut }, { (void *)(frame + cut), len - cut } };
	return net_deliver(&f->w.n, 0, &h, iov, 2);
}

static void test_receive_mergeable(void **state)
{
	(void)state;
	static struct fixture f;
	static uint8_t frame[NET_FRAME_MAX];
	for (unsigned i = 0; i < sizeof(frame); i++)
		frame[i] = (uint8_t)(i * 11 + i / 256);
	for (unsigned packed = 0; packed < 2; packed++) {
		open_card(&f, ALL_CAPS, 1);
		vbench_start(&f.b, packed ? UINT64_MAX : ~PACKED);
		/* Lengths around buffers' ends, of one buffer and of many. */
		static const uint32_t sizes[] = { 14, 60, 87, 88, 89, 187, 188, 189, 5000, NET_FRAME_MAX };
		for (unsigned i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
			uint32_t room = sizes[i] > 1000 ? 1000 : 100;
			unsigned n = (sizes[i] + HEADER + room - 1) / room;
			uint64_t gpa[80];
			for (unsigned k = 0; k < n + 2; k++)
				gpa[k] = add_rx(&f, room);
			assert_true(deliver(&f, frame, sizes[i], sizes[i] / 3));
			uint8_t *first = vbench_hva(&f.b, gpa[0]);
			assert_int_equal(first[0], NET_DATA_VALID);
			assert_int_equal(first[10] | first[11] << 8, n);
			size_t at = 0, skip = HEADER;
			for (unsigned k = 0; k < n; k++) {
				uint32_t written;
				assert_true(vbench_used(&f.b, RX, &written) >= 0);
				assert_int_equal(written, k + 1 < n ? room : sizes[i] - at + skip);
				assert_memory_equal((uint8_t *)vbench_hva(&f.b, gpa[k]) + skip, frame + at, written - skip);
				at += written - skip;
				skip = 0;
			}
			assert_int_equal(at, sizes[i]);
			assert_int_equal(vbench_used(&f.b, RX, NULL), -1);
			/* The two that are left would be in the way of the next count. */
			vbench_start(&f.b, packed ? UINT64_MAX : ~PACKED);
		}
		assert_string_equal(log_take(&f.log), "");
		close_card(&f);
	}
}

/* A guest that adds buffers in dribs and drabs gets its frame as soon as there is room, and is asked for a kick each time. */
static void test_receive_starved(void **state)
{
	(void)state;
	static struct fixture f;
	uint8_t frame[1000] = { 1 };
	static const uint64_t kinds[] = { ~(PACKED | BIT(VIRTIO_F_EVENT_IDX)), ~PACKED, ~BIT(VIRTIO_F_EVENT_IDX), UINT64_MAX };
	for (unsigned kind = 0; kind < 4; kind++) {
		open_card(&f, ALL_CAPS, 1);
		vbench_start(&f.b, kinds[kind]);
		assert_false(deliver(&f, frame, sizeof(frame), 10));
		unsigned resumes = f.w.resumes;
		for (unsigned k = 0; k < 4; k++) {
			add_rx(&f, 300);
			vbench_kick(&f.b, RX);
			assert_int_equal(f.w.resumes, ++resumes);
			assert_int_equal(deliver(&f, frame, sizeof(frame), 10), k == 3);
		}
		for (unsigned k = 0; k < 4; k++)
			assert_true(vbench_used(&f.b, RX, NULL) >= 0);
		/* Nobody waits: a kick is nothing. */
		add_rx(&f, 300);
		vbench_kick(&f.b, RX);
		assert_int_equal(f.w.resumes, resumes);
		close_card(&f);
	}

	/* With event indices the kick is asked for behind the buffers that were too few, or it never came. */
	open_card(&f, ALL_CAPS, 1);
	vbench_start(&f.b, ~PACKED);
	add_rx(&f, 300);
	add_rx(&f, 300);
	assert_false(deliver(&f, frame, sizeof(frame), 10));
	struct vring *r = &f.b.ring[RX];
	assert_int_equal(vbench_used_ring(&f.b, RX)[2 + 4 * r->size], 2); /* avail_event */
	close_card(&f);
}

static void test_receive_unmergeable(void **state)
{
	(void)state;
	static struct fixture f;
	static uint8_t frame[NET_FRAME_MAX];
	for (unsigned i = 0; i < sizeof(frame); i++)
		frame[i] = (uint8_t)(i * 5);
	open_card(&f, ALL_CAPS, 1);

	/* Small buffers: header and frame in one or in two parts; a frame that does not fit is dropped, the buffer stays. */
	vbench_start(&f.b, ~BIT(MRG));
	uint64_t gpa = vbench_alloc(&f.b, 2048, 16);
	int id = vbench_add(&f.b, RX, (struct vbuf[]){ { gpa, HEADER, true }, { gpa + 1024, 1514, true } }, 2);
	unsigned interrupts = f.b.interrupts[RX];
	assert_true(deliver(&f, frame, 1515, 100));
	assert_int_equal(vbench_used(&f.b, RX, NULL), -1);
	assert_int_equal(log_lines(log_take(&f.log)), 1);
	assert_true(deliver(&f, frame, 1600, 100));
	assert_string_equal(log_take(&f.log), "");
	assert_true(deliver(&f, frame, 1514, 100));
	uint32_t written;
	assert_int_equal(vbench_used(&f.b, RX, &written), id);
	assert_int_equal(written, HEADER + 1514);
	assert_int_equal(f.b.interrupts[RX], interrupts + 1);
	uint8_t *p = vbench_hva(&f.b, gpa);
	assert_int_equal(p[10] | p[11] << 8, 1); /* 5.1.6.4.1 */
	assert_memory_equal(p + 1024, frame, 1514);

	/* Big packets: one chain of pages for 64 KiB. */
	vbench_start(&f.b, ~BIT(MRG));
	struct vbuf bufs[18];
	for (unsigned i = 0; i < 18; i++)
		bufs[i] = (struct vbuf){ vbench_alloc(&f.b, 4096, 4096), i ? 4096 : HEADER, true };
	vbench_add_indirect(&f.b, RX, bufs, 18);
	assert_true(deliver(&f, frame, NET_FRAME_MAX, 5000));
	assert_true(vbench_used(&f.b, RX, &written) >= 0);
	assert_int_equal(written, HEADER + NET_FRAME_MAX);
	for (size_t at = 0, i = 1; at < NET_FRAME_MAX; at += 4096, i++)
		assert_memory_equal(vbench_hva(&f.b, bufs[i].gpa), frame + at, NET_FRAME_MAX - at < 4096 ? NET_FRAME_MAX - at : 4096);
	close_card(&f);
}

static void test_receive_hostile(void **state)
{
	(void)state;
	static struct fixture f;
	static uint8_t frame[NET_FRAME_MAX];
	open_card(&f, ALL_CAPS, 1);
	/* Nothing but crumbs: the frame is dropped, not waited for, and others pass. */
	vbench_start(&f.b, UINT64_MAX);
	for (unsigned i = 0; i < 130; i++)
		add_rx(&f, 100);
	assert_true(deliver(&f, frame, NET_FRAME_MAX, 1));
	assert_int_equal(log_lines(log_take(&f.log)), 1);
	assert_true(deliver(&f, frame, 60, 1));
	assert_true(vbench_used(&f.b, RX, NULL) >= 0);
	/* A first buffer that does not even hold the header. */
	vbench_start(&f.b, UINT64_MAX);
	add_rx(&f, 11);
	add_rx(&f, 1000);
	assert_true(deliver(&f, frame, 60, 1));
	assert_true(virtio_get_status(f.b.d) & VIRTIO_STATUS_NEEDS_RESET);
	/* Readable instead of writable. */
	vbench_start(&f.b, ~BIT(MRG));
	uint64_t gpa = vbench_alloc(&f.b, 2048, 16);
	vbench_add(&f.b, RX, &(struct vbuf){ gpa, 2048, false }, 1);
	assert_true(deliver(&f, frame, 60, 1));
	/* And a card that is not started, or not any more, takes nothing and holds nothing up. */
	virtio_set_status(f.b.d, 0);
	assert_true(deliver(&f, frame, 60, 1));
	close_card(&f);
}

/* --- the control queue --- */

static int control(struct fixture *f, unsigned queue, uint8_t class, uint8_t command, const void *data, size_t len)
{
	struct vbench *b = &f->b;
	uint64_t gpa = vbench_alloc(b, 16 + len, 16);
	uint8_t *p = vbench_hva(b, gpa);
	p[0] = class;
	p[1] = command;
	memcpy(p + 8, data, len);
	p[8 + len] = 0x55;
	struct vbuf bufs[] = { { gpa, 2, false }, { gpa + 8, (uint32_t)len, false }, { gpa + 8 + len, 1, true } };
	if (!len)
		bufs[1] = bufs[2];
	int id = vbench_add(b, queue, bufs, len ? 3 : 2);
	vbench_kick(b, queue);
	uint32_t written;
	assert_int_equal(vbench_used(b, queue, &written), id);
	assert_int_equal(written, 1);
	return p[8 + len];
}

static bool passes(struct fixture *f, const uint8_t *to, int vlan)
{
	uint8_t frame[64] = { 0 };
	memcpy(frame, to, 6);
	if (vlan >= 0) {
		frame[12] = 0x81;
		frame[14] = (uint8_t)(0xe0 | vlan >> 8);
		frame[15] = (uint8_t)vlan;
	}
	add_rx(f, 100);
	assert_true(deliver(f, frame, sizeof(frame), 3));
	return vbench_used(&f->b, RX, NULL) >= 0;
}

static void test_filters(void **state)
{
	(void)state;
	static struct fixture f;
	open_card(&f, ALL_CAPS, 1);
	vbench_start(&f.b, UINT64_MAX);
	static const uint8_t broadcast[6] = { 255, 255, 255, 255, 255, 255 }, group[6] = { 1, 0, 0x5e, 0, 0, 1 }, other[6] = { 2, 9, 9, 9, 9, 9 };
	const uint8_t on = 1, off = 0;
	/* Until the driver says otherwise everything passes, but no VLAN. */
	assert_true(passes(&f, mac, -1) && passes(&f, broadcast, -1) && passes(&f, group, -1) && passes(&f, other, -1));
	assert_false(passes(&f, mac, 5));
	assert_int_equal(control(&f, 2, 0, 0, &off, 1), 0); /* promiscuous off */
	assert_true(passes(&f, mac, -1) && passes(&f, broadcast, -1));
	assert_false(passes(&f, group, -1) || passes(&f, other, -1));
	uint8_t table[4 + 6 + 4 + 6] = { 1 };
	memcpy(table + 4, other, 6);
	table[10] = 1;
	memcpy(table + 14, group, 6);
	assert_int_equal(control(&f, 2, 1, 0, table, sizeof(table)), 0);
	assert_true(passes(&f, group, -1) && passes(&f, other, -1) && passes(&f, mac, -1));
	/* The other switches. */
	assert_int_equal(control(&f, 2, 0, 3, &on, 1), 0);
	assert_int_equal(control(&f, 2, 0, 4, &on, 1), 0);
	assert_int_equal(control(&f, 2, 0, 5, &on, 1), 0);
	assert_false(passes(&f, group, -1) || passes(&f, mac, -1) || passes(&f, broadcast, -1));
	for (uint8_t c = 3; c < 6; c++)
		assert_int_equal(control(&f, 2, 0, c, &off, 1), 0);
	static const uint8_t none[8];
	assert_int_equal(control(&f, 2, 1, 0, none, 8), 0);
	assert_false(passes(&f, group, -1) || passes(&f, other, -1));
	assert_int_equal(control(&f, 2, 0, 1, &on, 1), 0); /* all multicast */
	assert_true(passes(&f, group, -1));
	assert_int_equal(control(&f, 2, 0, 2, &on, 1), 0); /* all unicast */
	assert_true(passes(&f, other, -1));
	assert_int_equal(control(&f, 2, 0, 2, &off, 1), 0);
	/* More addresses than fit open the filter. */
	static uint8_t many[4 + 6 * 100 + 4] = { 100 };
	assert_int_equal(control(&f, 2, 1, 0, many, sizeof(many)), 0);
	assert_true(passes(&f, other, -1));
	assert_int_equal(control(&f, 2, 1, 0, none, 8), 0);
	/* VLANs. */
	uint16_t id = 4095;
	assert_int_equal(control(&f, 2, 2, 0, &id, 2), 0);
	assert_true(passes(&f, mac, 4095));
	assert_false(passes(&f, mac, 0));
	assert_int_equal(control(&f, 2, 2, 1, &id, 2), 0);
	assert_false(passes(&f, mac, 4095));
	/* A new address: the filter's and the configuration's, until a reset. */
	assert_int_equal(control(&f, 2, 1, 1, other, 6), 0);
	assert_true(passes(&f, other, -1));
	assert_false(passes(&f, mac, -1));
	assert_int_equal((uint16_t)virtio_config_read(f.b.d, 4, 2), 0x0909);
	vbench_start(&f.b, UINT64_MAX);
	assert_int_equal((uint16_t)virtio_config_read(f.b.d, 4, 2), 0x0700);
	assert_true(passes(&f, mac, -1) && passes(&f, other, -1));

	/* What is not possible is refused, and changes nothing. */
	static const uint8_t zeros[16], ff[16] = { 255, 255, 255, 255, 255, 255, 255, 255 };
	static const struct {
		uint8_t class, command;
		const void *data;
		size_t len;
	} bad[] = {
		{ 0, 6, zeros, 1 }, { 0, 0, zeros, 0 },	 { 1, 0, ff, 8 },    { 1, 0, zeros, 4 }, { 1, 0, zeros, 7 }, { 1, 1, zeros, 5 }, { 1, 2, zeros, 6 },
		{ 2, 0, ff, 2 },    { 2, 0, zeros, 1 },	 { 2, 2, zeros, 2 }, { 3, 0, zeros, 1 }, { 4, 0, zeros, 2 }, { 5, 0, ff, 8 },	  { 5, 0, zeros, 4 },
		{ 6, 0, zeros, 1 }, { 255, 255, ff, 16 },
	};
	for (unsigned i = 0; i < sizeof(bad) / sizeof(bad[0]); i++)
		if (control(&f, 2, bad[i].class, bad[i].command, bad[i].data, bad[i].len) != 1)
			fail_msg("bad[%u] was taken", i);
	/* Just a class, not even a command; then no room for the answer. */
	uint64_t gpa = vbench_alloc(&f.b, 16, 16);
	vbench_add(&f.b, 2, (struct vbuf[]){ { gpa, 1, false }, { gpa + 8, 1, true } }, 2);
	vbench_kick(&f.b, 2);
	assert_int_equal(*((uint8_t *)vbench_hva(&f.b, gpa) + 8), 1);
	assert_string_equal(log_take(&f.log), "");
	vbench_add(&f.b, 2, (struct vbuf[]){ { gpa, 2, false } }, 1);
	vbench_kick(&f.b, 2);
	assert_true(virtio_get_status(f.b.d) & VIRTIO_STATUS_NEEDS_RESET);
	close_card(&f);
}

static void test_offloads_and_pairs(void **state)
{
	(void)state;
	static struct fixture f;
	open_card(&f, ALL_CAPS, 4);
	/* Without MQ the control queue is the third. */
	vbench_start(&f.b, ~BIT(MQ));
	const uint8_t on = 1;
	const uint16_t two = 2, five = 5;
	assert_int_equal(control(&f, 2, 0, 0, &on, 1), 0);
	assert_int_equal(control(&f, 2, 4, 0, &two, 2), 1);

	vbench_start(&f.b, UINT64_MAX);
	assert_int_equal((uint16_t)virtio_config_read(f.b.d, 8, 2), 4);
	assert_int_equal(f.w.n.pairs, 1);
	assert_int_equal(control(&f, 8, 4, 0, &five, 2), 1);
	assert_int_equal(f.w.n.pairs, 1);
	assert_int_equal(control(&f, 8, 4, 0, &two, 2), 0);
	assert_int_equal(f.w.n.pairs, 2);
	assert_int_equal(f.w.n.guest_offloads, NET_GIVES_CSUM | NET_GIVES_TSO4 | NET_GIVES_TSO6 | NET_GIVES_USO);
	uint64_t offloads = BIT(GUEST_CSUM) | BIT(GUEST_TSO4);
	assert_int_equal(control(&f, 8, 5, 0, &offloads, 8), 0);
	assert_int_equal(f.w.n.guest_offloads, NET_GIVES_CSUM | NET_GIVES_TSO4);

	/* A backend with one queue: answers go to the pair that a flow was sent from. */
	uint8_t frame[64] = { [12] = 8, [14] = 0x45, [23] = 6, [29] = 1, [33] = 2, [35] = 10, [37] = 20 };
	uint64_t gpa = vbench_alloc(&f.b, 100, 16);
	uint8_t *p = vbench_hva(&f.b, gpa);
	memcpy(p + HEADER, frame, sizeof(frame));
	vbench_add(&f.b, 3, &(struct vbuf){ gpa, HEADER + sizeof(frame), false }, 1);
	vbench_kick(&f.b, 3);
	assert_int_equal(f.w.sent, 1);
	uint64_t rx0 = vbench_alloc(&f.b, 200, 16);
	vbench_add(&f.b, 0, &(struct vbuf){ rx0, 100, true }, 1);
	vbench_add(&f.b, 2, &(struct vbuf){ rx0 + 100, 100, true }, 1);
	frame[29] = 2, frame[33] = 1, frame[35] = 20, frame[37] = 10; /* the other way round */
	assert_true(deliver(&f, frame, sizeof(frame), 3));
	assert_int_equal(vbench_used(&f.b, 0, NULL), -1);
	assert_true(vbench_used(&f.b, 2, NULL) >= 0);
	frame[37] = 11;
	assert_true(deliver(&f, frame, sizeof(frame), 3));
	assert_true(vbench_used(&f.b, 0, NULL) >= 0);

	/* What waits for a buffer of a pair waits no more when that pair is reset, or no longer in use: no kick would come. */
	frame[37] = 10;
	assert_false(deliver(&f, frame, sizeof(frame), 3));
	unsigned resumes = f.w.resumes;
	virtq_reset(f.b.d, 2);
	assert_int_equal(f.w.resumes, resumes + 1);
	frame[37] = 11;
	assert_false(deliver(&f, frame, sizeof(frame), 3));
	const uint16_t one = 1;
	assert_int_equal(control(&f, 8, 4, 0, &one, 2), 0);
	assert_int_equal(f.w.resumes, resumes + 2);

	/* After a reset one pair, and the offloads agreed on. */
	virtio_set_status(f.b.d, 0);
	assert_int_equal(f.w.n.pairs, 1);
	assert_int_equal(f.w.n.guest_offloads, 0);
	close_card(&f);
}

static void test_features(void **state)
{
	(void)state;
	static struct fixture f;
	open_card(&f, ALL_CAPS, 1);
	static const uint64_t refused[] = { ~BIT(CSUM), ~BIT(GUEST_CSUM), ~BIT(CTRL_VQ) };
	for (unsigned i = 0; i < 3; i++)
		assert_false(vbench_negotiate(&f.b, refused[i]));
	assert_true(vbench_negotiate(&f.b, UINT64_MAX));
	assert_false(virtio_has(f.b.d, MQ));
	assert_true(virtio_has(f.b.d, MTU));
	assert_int_equal((uint16_t)virtio_config_read(f.b.d, 10, 2), 9000);
	assert_memory_equal(f.b.d->config, mac, 6);
	assert_true(virtio_has(f.b.d, VIRTIO_F_RING_PACKED));
	close_card(&f);

	open_card(&f, NET_CAN_CSUM | NET_GIVES_TSO4, 1);
	assert_true(vbench_negotiate(&f.b, UINT64_MAX));
	assert_false(virtio_has(f.b.d, HOST_TSO4));
	assert_true(virtio_has(f.b.d, GUEST_TSO4));
	assert_false(virtio_has(f.b.d, GUEST_TSO4 + 1));

	/* The link. */
	vbench_start(&f.b, UINT64_MAX);
	assert_int_equal((uint16_t)virtio_config_read(f.b.d, 6, 2), 1);
	unsigned interrupts = f.b.config_interrupts;
	net_set_link(&f.w.n, false);
	assert_int_equal(f.b.config_interrupts, interrupts + 1);
	assert_int_equal((uint16_t)virtio_config_read(f.b.d, 6, 2), 0);
	virtio_set_status(f.b.d, 0);
	net_set_link(&f.w.n, true);
	assert_int_equal((uint16_t)virtio_config_read(f.b.d, 6, 2), 1);
	char text[600] = "";
	f.b.d->ops->stats(f.b.d, text, sizeof(text));
	assert_non_null(strstr(text, "tx_frames 0\n"));
	close_card(&f);
}

static void parse(const char *spec, const char *vm, unsigned index, struct virtio_net_config *c)
{
	static struct keyval kv;
	struct error err = { "" };
	if (keyval_parse(&kv, "--net", spec, "type", &err) || virtio_net_parse(c, &kv, vm, index, &err))
		fail_msg("%s: %s", spec, err.text);
}

static void test_config(void **state)
{
	(void)state;
	struct virtio_net_config a, b;
	parse("user", "vm", 0, &a);
	parse("user,restrict", "vm", 0, &b);
	assert_memory_equal(a.mac, b.mac, 6);
	assert_int_equal(a.mac[0] & 3, 2);
	assert_int_equal(a.queues, 1);
	static const struct {
		const char *name;
		unsigned index;
	} others[] = { { "vm", 1 }, { "vn", 0 }, { "", 0 }, { "vm0", 0 } };
	for (unsigned i = 0; i < 4; i++) {
		parse("user", others[i].name, others[i].index, &b);
		assert_memory_not_equal(a.mac, b.mac, 6);
	}
	parse("user,mac=52:54:00:Aa:fF:01,queues=8,mtu=1500", "vm", 0, &a);
	static const uint8_t want[6] = { 0x52, 0x54, 0, 0xaa, 0xff, 1 };
	assert_memory_equal(a.mac, want, 6);
	assert_int_equal(a.queues, 8);
	assert_int_equal(a.mtu, 1500);
	static const char *const bad[] = { "user,mac=52:54:00:aa:ff", "user,mac=52:54:00:aa:ff:0g", "user,mac=53:54:00:aa:ff:01", "user,mac=00:00:00:00:00:00",
					   "user,mac=52-54-00-aa-ff-01", "user,mac=52:54:00:aa:ff:01:02", "user,mac", "user,queues=0", "user,queues=9",
					   "user,mtu=67", "user,mtu=65536" };
	for (unsigned i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		static struct keyval kv;
		struct error err = { "" };
		assert_int_equal(keyval_parse(&kv, "--net", bad[i], "type", &err), 0);
		if (!virtio_net_parse(&a, &kv, "vm", 0, &err) || !strstr(err.text, "--net"))
			fail_msg("%s: \"%s\"", bad[i], err.text);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_transmit),
		cmocka_unit_test(test_bad_headers),
		cmocka_unit_test(test_checksum_for_backend),
		cmocka_unit_test(test_transmit_back_pressure),
		cmocka_unit_test(test_put_off_interrupt),
		cmocka_unit_test(test_receive_mergeable),
		cmocka_unit_test(test_receive_starved),
		cmocka_unit_test(test_receive_unmergeable),
		cmocka_unit_test(test_receive_hostile),
		cmocka_unit_test(test_filters),
		cmocka_unit_test(test_offloads_and_pairs),
		cmocka_unit_test(test_features),
		cmocka_unit_test(test_config),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
