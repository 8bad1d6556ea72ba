/* virtio-console behind a scripted driver (virtio 1.2 5.3); the chardevs are Unix sockets that the test is connected to. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <poll.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "chardev/chardev.h"
#include "device/virtio/console.h"
#include "virtio_bench.h"

#define PORTS 3
enum { READY, ADD, REMOVE, PORT_READY, CONSOLE, RESIZE, OPEN, NAME };

struct message {
	uint32_t id;
	uint16_t event, value;
	char more[56];
};

static struct vbench b;
static struct chardev *line[PORTS];
static int host[PORTS];
static char dir[] = "/tmp/trapline-vcon-XXXXXX";
static uint64_t buffer; /* gpa of 64 KiB */

static bool never(void *opaque)
{
	(void)opaque;
	return false;
}

static void settle(void)
{
	vbench_loop(&b, 10, never, NULL);
}

static void start(unsigned nports, uint64_t features)
{
	static const char *const names[PORTS] = { NULL, "org.test.one", "two" };
	struct virtio_console_port ports[PORTS];
	strcpy(dir + strlen(dir) - 6, "XXXXXX");
	assert_non_null(mkdtemp(dir));
	vbench_open(&b, 16 << 20);
	const struct chardev_config config = { .loop = b.loop };
	for (unsigned i = 0; i < nports; i++) {
		char spec[80];
		struct error err = { "" };
		snprintf(spec, sizeof(spec), "socket:%s/%u", dir, i);
		if (chardev_open(&line[i], spec, &config, &err))
			fail_msg("%s", err.text);
		ports[i] = (struct virtio_console_port){ names[i], line[i] };
		struct sockaddr_un un = { .sun_family = AF_UNIX };
		strcpy(un.sun_path, spec + 7);
		host[i] = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
		assert_int_equal(connect(host[i], (struct sockaddr *)&un, sizeof(un)), 0);
	}
	settle();
	const struct virtio_host h = vbench_host(&b, "console");
	assert_int_equal(virtio_console_create(&b.d, &h, ports, nports, NULL), 0);
	vbench_start_sized(&b, features, 64);
	buffer = vbench_alloc(&b, 1 << 16, 16);
}

static void stop(unsigned nports)
{
	vbench_destroy(&b);
	for (unsigned i = 0; i < nports; i++) {
		chardev_close(line[i]);
		close(host[i]);
	}
	rmdir(dir);
	vbench_close(&b);
}

static void give_rx(unsigned q, uint64_t gpa, uint32_t len)
{
	vbench_add(&b, q, (struct vbuf[]){ { gpa, len, true } }, 1);
	vbench_kick(&b, q);
}

static void send_tx(unsigned q, const void *data, uint32_t len)
{
	uint64_t gpa = vbench_alloc(&b, len, 16);
	memcpy(vbench_hva(&b, gpa), data, len);
	vbench_add(&b, q, (struct vbuf[]){ { gpa, len, false } }, 1);
	vbench_kick(&b, q);
}

static void expect(int fd, const char *text)
{
	char got[256];
	size_t len = 0, want = strlen(text);
	for (int i = 0; i < 200 && len < want; i++) {
		settle();
		ssize_t n = recv(fd, got + len, sizeof(got) - len, MSG_DONTWAIT);
		len += n > 0 ? (size_t)n : 0;
	}
	assert_int_equal(len, want);
	assert_memory_equal(got, text, want);
}

static uint32_t config32(unsigned offset)
{
	return (uint32_t)virtio_config_read(b.d, offset, 4);
}

static void test_console_alone(void **state)
{
	(void)state;
	start(1, VBENCH_FEATURES);
	uint32_t len;
	assert_int_equal(virtio_offered(b.d, 0) & 2, 0); /* no MULTIPORT */
	assert_int_equal(b.d->nqueues, 2);
	send_tx(1, "hello\n", 6);
	assert_true(vbench_used(&b, 1, &len) >= 0);
	assert_int_equal(b.interrupts[1], 1);
	expect(host[0], "hello\n");
	/* Input waits for a buffer, then fills one after the other. */
	assert_int_equal(write(host[0], "abcdef", 6), 6);
	settle();
	give_rx(0, buffer, 4);
	give_rx(0, buffer + 16, 4);
	settle();
	assert_true(vbench_used(&b, 0, &len) >= 0);
	assert_int_equal(len, 4);
	assert_memory_equal(vbench_hva(&b, buffer), "abcd", 4);
	assert_true(vbench_used(&b, 0, &len) >= 0);
	assert_int_equal(len, 2);
	assert_memory_equal(vbench_hva(&b, buffer + 16), "ef", 2);
	/* A buffer without room is given back, and the next one used. */
	vbench_add(&b, 0, (struct vbuf[]){ { buffer, 4, false } }, 1);
	give_rx(0, buffer, 16);
	assert_int_equal(write(host[0], "g", 1), 1);
	settle();
	assert_true(vbench_used(&b, 0, &len) >= 0);
	assert_int_equal(len, 0);
	assert_true(vbench_used(&b, 0, &len) >= 0);
	assert_int_equal(len, 1);
	/* Emergency output. */
	virtio_config_write(b.d, 8, 4, '!');
	virtio_config_write(b.d, 0, 2, 7); /* read-only */
	expect(host[0], "!");
	assert_int_equal(config32(0), 0);
	stop(1);
}

static void test_resize_alone(void **state)
{
	(void)state;
	start(1, VBENCH_FEATURES);
	chardev_resize(line[0], 132, 50);
	assert_int_equal(b.config_interrupts, 1);
	assert_int_equal(config32(0), 132 | 50 << 16);
	stop(1);
}

/* A reader that does not read: the guest's buffer is held, used once there is room, and given up in a reset. */
static void test_pushes_back(void **state)
{
	(void)state;
	static uint8_t drain[1 << 16];
	start(1, VBENCH_SPLIT);
	int added = 0, used = 0;
	for (; added < 60; added++) {
		vbench_add(&b, 1, (struct vbuf[]){ { buffer, 65536, false } }, 1);
		vbench_kick(&b, 1);
		settle();
		while (vbench_used(&b, 1, NULL) >= 0)
			used++;
		if (added > used + 2)
			break;
	}
	assert_in_range(added, 4, 59);
	added++;
	for (int i = 0; i < 500 && used < added; i++) {
		while (recv(host[0], drain, sizeof(drain), MSG_DONTWAIT) > 0)
			;
		settle();
		while (vbench_used(&b, 1, NULL) >= 0)
			used++;
	}
	assert_int_equal(used, added);
	for (int i = 0; i < 30; i++) {
		vbench_add(&b, 1, (struct vbuf[]){ { buffer, 65536, false } }, 1);
		vbench_kick(&b, 1);
	}
	virtio_set_status(b.d, 0);
	assert_int_equal(virtio_get_status(b.d), 0);
	while (recv(host[0], drain, sizeof(drain), MSG_DONTWAIT) > 0)
		settle();
	vbench_start_sized(&b, VBENCH_FEATURES, 64);
	send_tx(1, "after", 5);
	assert_true(vbench_used(&b, 1, NULL) >= 0);
	stop(1);
}

static void control(uint32_t id, uint16_t event, uint16_t value)
{
	const struct message m = { id, event, value, "" };
	send_tx(3, &m, 8);
}

static void expect_message(uint32_t id, uint16_t event)
{
	uint32_t len;
	struct message m = { 0 };
	/* One buffer at a time, so that its contents are known. */
	give_rx(2, buffer + 4096, 64);
	assert_true(vbench_used(&b, 2, &len) >= 0);
	assert_in_range(len, 8, 64);
	memcpy(&m, vbench_hva(&b, buffer + 4096), len);
	assert_int_equal(m.event, event);
	assert_int_equal(m.id, id);
	if (event == NAME)
		assert_string_equal(m.more, id == 1 ? "org.test.one" : "two");
}

static void test_ports(void **state)
{
	(void)state;
	start(PORTS, VBENCH_FEATURES);
	assert_int_equal(b.d->nqueues, 8);
	assert_int_equal(config32(4), PORTS);
	chardev_resize(line[0], 80, 25);
	control(0, READY, 1);
	/* There was no buffer to tell anything in: nothing is lost. */
	expect_message(0, ADD);
	expect_message(1, ADD);
	expect_message(2, ADD);
	control(0, PORT_READY, 1);
	expect_message(0, CONSOLE);
	expect_message(0, RESIZE);
	assert_int_equal(*(uint32_t *)vbench_hva(&b, buffer + 4096 + 8), 80 | 25 << 16);
	expect_message(0, OPEN);
	control(1, PORT_READY, 1);
	expect_message(1, NAME);
	expect_message(1, OPEN);
	control(2, PORT_READY, 1);
	expect_message(2, NAME);
	expect_message(2, OPEN);

	/* Input for a port that the guest has not opened waits outside; others are not held up by that. */
	assert_int_equal(write(host[1], "one", 3), 3);
	assert_int_equal(write(host[2], "two", 3), 3);
	give_rx(4, buffer, 64);
	give_rx(6, buffer + 64, 64);
	control(2, OPEN, 1);
	settle();
	uint32_t len;
	assert_int_equal(vbench_used(&b, 4, &len), -1);
	assert_true(vbench_used(&b, 6, &len) >= 0);
	assert_memory_equal(vbench_hva(&b, buffer + 64), "two", 3);
	control(1, OPEN, 1);
	settle();
	assert_true(vbench_used(&b, 4, &len) >= 0);
	assert_memory_equal(vbench_hva(&b, buffer), "one", 3);
	send_tx(5, "from one", 8);
	send_tx(7, "from two", 8);
	expect(host[1], "from one");
	expect(host[2], "from two");
	control(0, OPEN, 1);
	chardev_resize(line[0], 100, 30);
	expect_message(0, RESIZE);

	/* Nonsense: no port 3, no such event, a message cut short, from the guest what only a device says. */
	control(3, PORT_READY, 1);
	control(0xffffffff, OPEN, 1);
	control(1, 99, 1);
	control(1, ADD, 1);
	send_tx(3, "abc", 3);
	give_rx(2, buffer + 4096, 64);
	assert_int_equal(vbench_used(&b, 2, &len), -1);
	assert_int_equal(virtio_get_status(b.d) & VIRTIO_STATUS_NEEDS_RESET, 0);
	/* A buffer too short for a message gets what fits. */
	virtio_set_status(b.d, 0);
	vbench_start_sized(&b, VBENCH_FEATURES, 64);
	buffer = vbench_alloc(&b, 1 << 16, 16);
	give_rx(2, buffer + 4096, 3);
	control(0, READY, 1);
	assert_true(vbench_used(&b, 2, &len) >= 0);
	assert_int_equal(len, 3);
	stop(PORTS);
}

/* A driver that knows nothing of ports has a console. */
static void test_old_driver(void **state)
{
	(void)state;
	start(PORTS, VBENCH_FEATURES & ~2ull);
	send_tx(1, "plain", 5);
	expect(host[0], "plain");
	give_rx(0, buffer, 16);
	assert_int_equal(write(host[0], "in", 2), 2);
	settle();
	uint32_t len;
	assert_true(vbench_used(&b, 0, &len) >= 0);
	assert_int_equal(len, 2);
	vbench_kick(&b, 3);
	vbench_kick(&b, 2);
	stop(PORTS);
}

/* Would a driver that honours event indices (2.7.10) kick for the next buffer that it makes available? */
static bool asks_for_kick(unsigned q)
{
	return vbench_used_ring(&b, q)[2 + 4 * b.ring[q].size] == b.ring[q].avail;
}

/* Whoever has no buffer left asks to be told of the next: without, input stops for good once a guest was slower than the host. */
static void test_asks_for_buffers(void **state)
{
	(void)state;
	uint32_t len;
	start(PORTS, VBENCH_SPLIT);
	give_rx(0, buffer, 4);
	control(0, OPEN, 1);
	assert_int_equal(write(host[0], "abcdef", 6), 6);
	settle();
	assert_true(vbench_used(&b, 0, &len) >= 0);
	assert_int_equal(len, 4);
	assert_true(asks_for_kick(0));
	give_rx(0, buffer, 4);
	assert_true(vbench_used(&b, 0, &len) >= 0);
	assert_int_equal(len, 2);
	/* Control messages: three to be told, one buffer. */
	give_rx(2, buffer + 4096, 64);
	control(0, READY, 1);
	assert_true(vbench_used(&b, 2, &len) >= 0);
	assert_true(asks_for_kick(2));
	stop(PORTS);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_console_alone), cmocka_unit_test(test_resize_alone), cmocka_unit_test(test_pushes_back),
		cmocka_unit_test(test_ports),	      cmocka_unit_test(test_old_driver),
		cmocka_unit_test(test_asks_for_buffers),
	};
	signal(SIGPIPE, SIG_IGN);
	return cmocka_run_group_tests(tests, NULL, NULL);
}
