/* vhost-user: the protocol, shadow rings and the device in front, against a back end that does what no honest one does. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <fcntl.h>
#include <signal.h>

#include "device/virtio/vhost.h"
#include "device/virtio/vhost_device.h"
#include "vhost_peer.h"
#include "virtio_bench.h"
#include "virtio_log.h"

struct fixture {
	struct vbench b;
	struct peer p;
	struct log_capture log;
	struct vhost_blk_config config;
	uint64_t header, data, status;
	uint64_t told_from, told_to; /* what the RAM watcher heard of `data` */
	struct error err;
};

static void on_written(void *opaque, uint64_t gpa, uint64_t len)
{
	struct fixture *f = opaque;
	if (gpa < f->data || gpa >= f->data + 8192)
		return;
	if (gpa < f->told_from)
		f->told_from = gpa;
	if (gpa + len > f->told_to)
		f->told_to = gpa + len;
}

static int setup(void **state)
{
	struct fixture *f = calloc(1, sizeof(*f));
	vbench_open(&f->b, 8 << 20);
	ram_set_watcher(&f->b.ram, &(struct ram_watcher){ .written = on_written, .opaque = f });
	peer_start(&f->p);
	log_start(&f->log);
	f->config.queues = 1;
	strcpy(f->config.socket, f->p.path);
	*state = f;
	return 0;
}

static int teardown(void **state)
{
	struct fixture *f = *state;
	vbench_close(&f->b);
	peer_stop(&f->p);
	log_stop(&f->log);
	free(f);
	return 0;
}

static int create(struct fixture *f)
{
	const struct virtio_host host = vbench_host(&f->b, "disk0");
	f->err.text[0] = 0;
	return virtio_vhost_blk_create(&f->b.d, &f->config, &host, &f->err);
}

static void start(struct fixture *f, uint64_t features)
{
	vbench_start_sized(&f->b, features, 64);
	f->header = vbench_alloc(&f->b, 16, 16);
	f->data = vbench_alloc(&f->b, 8192, 4096);
	f->status = vbench_alloc(&f->b, 1, 1);
	f->told_from = UINT64_MAX;
	f->told_to = 0;
}

static void open_device(struct fixture *f, uint64_t features)
{
	if (create(f) < 0)
		fail_msg("%s", f->err.text);
	start(f, features);
}

static int submit(struct fixture *f, bool write, uint64_t sector, uint32_t len)
{
	uint8_t *h = vbench_hva(&f->b, f->header);
	memset(h, 0, 16);
	h[0] = write;
	memcpy(h + 8, &sector, 8);
	*(uint8_t *)vbench_hva(&f->b, f->status) = 0xff;
	int id = vbench_add(&f->b, 0, (struct vbuf[]){ { f->header, 16, false }, { f->data, len, !write }, { f->status, 1, true } }, 3);
	vbench_kick(&f->b, 0);
	return id;
}

struct used {
	struct fixture *f;
	int id;
	uint32_t len;
};

static bool is_used(void *opaque)
{
	struct used *u = opaque;
	u->id = vbench_used(&u->f->b, 0, &u->len);
	return u->id >= 0;
}

static int wait_used(struct fixture *f, uint32_t *len)
{
	struct used u = { .f = f };
	if (!vbench_loop(&f->b, 5000, is_used, &u))
		return -1;
	*len = u.len;
	return u.id;
}

static bool is_broken(void *opaque)
{
	return virtio_get_status(((struct fixture *)opaque)->b.d) & VIRTIO_STATUS_NEEDS_RESET;
}

static void round_trip(struct fixture *f, unsigned seed)
{
	uint8_t *data = vbench_hva(&f->b, f->data);
	uint32_t len;
	for (unsigned i = 0; i < 4096; i++)
		data[i] = (uint8_t)(i * 7 + seed);
	int id = submit(f, true, seed % 8, 4096);
	assert_int_equal(wait_used(f, &len), id);
	assert_int_equal(len, 1);
	assert_int_equal(*(uint8_t *)vbench_hva(&f->b, f->status), 0);
	memset(data, 0, 4096);
	f->told_from = UINT64_MAX;
	f->told_to = 0;
	id = submit(f, false, seed % 8, 4096);
	assert_int_equal(wait_used(f, &len), id);
	assert_int_equal(len, 4097);
	for (unsigned i = 0; i < 4096; i++)
		assert_int_equal(data[i], (uint8_t)(i * 7 + seed));
	/* The translator was told before the guest could see it. */
	assert_int_equal(f->told_from, f->data);
	assert_true(f->told_to >= f->data + 4096);
}

static void requests_of_all_rings(void **state)
{
	struct fixture *f = *state;
	static const uint64_t without[] = { 0, VIRTIO_BIT(VIRTIO_F_RING_PACKED), VIRTIO_BIT(VIRTIO_F_EVENT_IDX),
					    VIRTIO_BIT(VIRTIO_F_RING_PACKED) | VIRTIO_BIT(VIRTIO_F_EVENT_IDX) };
	assert_int_equal(create(f), 0);
	for (unsigned k = 0; k < 4; k++) {
		start(f, ~without[k]);
		assert_true(f->p.acked & 1ull << 32 && f->p.acked & 1ull << 30 && f->p.acked & 1 << 9);
		assert_false(f->p.acked & (1 << 28 | 1 << 29)); /* rings' features are ours */
		for (unsigned i = 0; i < 100; i++)
			round_trip(f, i);
	}
	assert_true(f->b.interrupts[0] > 0);
	assert_int_equal(f->p.connections, 1);
	assert_int_equal(f->p.starts, 4);
	assert_int_equal(f->p.stops, 3);
	assert_false(f->p.shrunk);
	virtio_set_status(f->b.d, 0);
	assert_int_equal(f->p.stops, 4);
	assert_string_equal(log_take(&f->log), "");
}

static void more_written_than_said(void **state)
{
	struct fixture *f = *state;
	open_device(f, VBENCH_SPLIT);
	f->p.fault = PEER_MORE_THAN_SAID;
	uint32_t len;
	int id = submit(f, false, 0, 8192);
	assert_int_equal(wait_used(f, &len), id);
	assert_int_equal(len, 1);
	assert_int_equal(f->told_from, f->data);
	assert_int_equal(f->told_to, f->data + 8192);
}

static void used_ring_lies(void **state)
{
	struct fixture *f = *state;
	static const struct {
		int fault;
		const char *says;
	} lies[] = {
		{ PEER_BAD_ID, "does not have" },
		{ PEER_FREE_ID, "does not have" },
		{ PEER_TWICE, "counts more" },
		{ PEER_LONG, "more than the buffer" },
		{ PEER_INDEX, "counts more" },
	};
	assert_int_equal(create(f), 0);
	for (unsigned i = 0; i < 5; i++) {
		f->p.fault = PEER_GOOD;
		start(f, VBENCH_FEATURES); /* and so connects again */
		round_trip(f, i);
		f->p.fault = lies[i].fault;
		submit(f, false, 0, 512);
		assert_true(vbench_loop(&f->b, 5000, is_broken, f));
		const char *log = log_take(&f->log);
		if (log_lines(log) != 1 || !strstr(log, lies[i].says))
			fail_msg("lie %u: log \"%s\"", i, log);
		assert_int_equal(f->p.connections, i + 1);
	}
}

struct back {
	struct fixture *f;
	unsigned connections;
};

static bool is_back(void *opaque)
{
	struct back *b = opaque;
	return b->f->p.connections == b->connections;
}

/* Requests in flight when the connection ends are answered when it is there again. */
static void connection_lost(void **state)
{
	struct fixture *f = *state;
	static const int how[] = { PEER_CLOSE, PEER_SPEAK, PEER_HOLD };
	open_device(f, VBENCH_FEATURES);
	for (unsigned i = 0; i < 3; i++) {
		round_trip(f, i);
		f->p.fault = how[i];
		int id = submit(f, false, i % 8, 4096);
		struct back back = { f, i + 2 };
		if (how[i] == PEER_HOLD) {
			vbench_loop(&f->b, 50, NULL, NULL);
			peer_say(&f->p, 'd');
		}
		/* lost and seen; the peer is good before it is tried again */
		bool seen = false;
		for (int n = 0; n < 300 && !seen; n++) {
			vbench_loop(&f->b, 10, NULL, NULL);
			seen = strstr(log_take(&f->log), "requests wait");
		}
		assert_true(seen);
		f->p.fault = PEER_GOOD;
		assert_true(vbench_loop(&f->b, 8000, is_back, &back));
		uint32_t len;
		assert_int_equal(wait_used(f, &len), id);
		assert_int_equal(len, 4097);
		assert_non_null(strstr(log_take(&f->log), "is back"));
		assert_int_equal(virtio_get_status(f->b.d), 15);
	}
	round_trip(f, 3);
	/* Lost while the guest is not there: connected again when it is. */
	virtio_set_status(f->b.d, 0);
	peer_say(&f->p, 'd');
	vbench_loop(&f->b, 100, NULL, NULL);
	start(f, VBENCH_FEATURES);
	round_trip(f, 4);
}

/* More in flight than the shadow has room for when the connection ends: what is still in the guest's ring must not be forgotten. */
static void connection_lost_while_full(void **state)
{
	struct fixture *f = *state;
	enum { CHAINS = 20, PARTS = 64 };
	open_device(f, VBENCH_SPLIT);
	f->p.fault = PEER_HOLD;
	struct vbuf bufs[PARTS];
	for (unsigned i = 0; i < CHAINS; i++) {
		for (unsigned k = 0; k < PARTS; k++)
			bufs[k] = (struct vbuf){ k == 0 ? f->header : k + 1 < PARTS ? f->data + 16 * k : f->status, k + 1 < PARTS ? 16 : 1, k > 0 };
		vbench_add_indirect(&f->b, 0, bufs, PARTS);
		vbench_kick(&f->b, 0);
	}
	vbench_loop(&f->b, 50, NULL, NULL);
	assert_true(f->p.requests < CHAINS);
	peer_say(&f->p, 'd');
	vbench_loop(&f->b, 100, NULL, NULL);
	f->p.fault = PEER_GOOD;
	for (unsigned i = 0; i < CHAINS; i++) {
		uint32_t len;
		assert_true(wait_used(f, &len) >= 0);
		assert_int_equal(len, (PARTS - 2) * 16 + 1);
	}
	log_take(&f->log);
}

static void queue_reset(void **state)
{
	struct fixture *f = *state;
	uint32_t len;
	open_device(f, VBENCH_SPLIT);
	round_trip(f, 0);
	f->p.fault = PEER_HOLD;
	submit(f, false, 0, 512);
	vbench_loop(&f->b, 50, NULL, NULL);
	virtq_reset(f->b.d, 0);
	assert_int_equal(f->p.stops, 1);
	f->p.fault = PEER_GOOD;
	vbench_queue(&f->b, 0, 32);
	virtq_enable(f->b.d, 0);
	round_trip(f, 1);
	assert_int_equal(vbench_used(&f->b, 0, &len), -1);
	assert_string_equal(log_take(&f->log), "");
}

static bool is_larger(void *opaque)
{
	struct fixture *f = opaque;
	return virtio_config_read(f->b.d, 0, 8) == 4 * PEER_SECTORS;
}

static void configuration_changes(void **state)
{
	struct fixture *f = *state;
	open_device(f, VBENCH_FEATURES);
	assert_int_equal(virtio_config_read(f->b.d, 0, 8), PEER_SECTORS);
	f->p.capacity = 4 * PEER_SECTORS;
	peer_say(&f->p, 'c');
	assert_true(vbench_loop(&f->b, 5000, is_larger, f));
	assert_int_equal(f->b.config_interrupts, 1);
	round_trip(f, 1);
}

static void wrong_answers(void **state)
{
	struct fixture *f = *state;
	static const int at[] = { 1, 15, 3, 17, 21, 24 }; /* what is said before there is a device */
	static const int how[] = { ANSWER_OTHER_TYPE, ANSWER_HUGE, ANSWER_SHORT, ANSWER_REFUSE, ANSWER_CLOSE };
	for (unsigned i = 0; i < sizeof(at) / sizeof(at[0]); i++) {
		for (unsigned j = 0; j < sizeof(how) / sizeof(how[0]); j++) {
			bool acked = at[i] == 3 || at[i] == 21;
			if (how[j] == ANSWER_REFUSE && !acked)
				continue;
			f->p.wrong_at = at[i];
			f->p.wrong_how = how[j];
			assert_true(create(f) < 0);
			if (!strstr(f->err.text, "--disk") || !strstr(f->err.text, f->p.path))
				fail_msg("message %d: \"%s\"", at[i], f->err.text);
		}
	}
	/* Of guest memory, and at the start and the end of a driver. */
	f->p.wrong_at = 5;
	f->p.wrong_how = ANSWER_REFUSE;
	assert_int_equal(create(f), -EPROTO);
	assert_non_null(strstr(f->err.text, "refuses message 5"));
	f->p.wrong_at = 2;
	assert_int_equal(create(f), 0);
	start(f, VBENCH_FEATURES);
	assert_non_null(strstr(log_take(&f->log), "refuses message 2"));
	virtio_set_status(f->b.d, 0);
	f->p.wrong_at = 11;
	f->p.wrong_how = ANSWER_NONE;
	start(f, VBENCH_FEATURES);
	round_trip(f, 1);
	/* Mute: for three seconds, not for ever. */
	uint64_t begin = clock_ns();
	virtio_set_status(f->b.d, 0);
	assert_int_equal(virtio_get_status(f->b.d), 0);
	assert_true(clock_ns() - begin < 10 * NS_PER_SEC);
	f->p.wrong_at = 0;
	start(f, VBENCH_FEATURES);
	round_trip(f, 2);
}

static void refusals(void **state)
{
	struct fixture *f = *state;
	f->config.queues = PEER_RINGS + 1;
	assert_int_equal(create(f), -EINVAL);
	assert_non_null(strstr(f->err.text, "queues=4"));
	f->config.queues = 1;
	f->p.features &= ~(1ull << 32);
	assert_int_equal(create(f), -EPROTO);
	strcpy(f->config.socket, "/nonexistent/socket");
	assert_int_equal(create(f), -ENOENT);
	assert_non_null(strstr(f->err.text, "start the vhost-user back end"));
}

int main(void)
{
	signal(SIGPIPE, SIG_IGN);
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(requests_of_all_rings, setup, teardown),
		cmocka_unit_test_setup_teardown(more_written_than_said, setup, teardown),
		cmocka_unit_test_setup_teardown(used_ring_lies, setup, teardown),
		cmocka_unit_test_setup_teardown(connection_lost, setup, teardown),
		cmocka_unit_test_setup_teardown(connection_lost_while_full, setup, teardown),
		cmocka_unit_test_setup_teardown(queue_reset, setup, teardown),
		cmocka_unit_test_setup_teardown(configuration_changes, setup, teardown),
		cmocka_unit_test_setup_teardown(wrong_answers, setup, teardown),
		cmocka_unit_test_setup_teardown(refusals, setup, teardown),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
