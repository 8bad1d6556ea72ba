/* virtio-vsock behind a scripted driver (virtio 1.2 5.10), the host's programs played by the test. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <errno.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "base/keyval.h"
#include "device/virtio/vsock.h"
#include "virtio_bench.h"

#define CID 7
enum { RX, TX, EVENT };
enum { REQUEST = 1, RESPONSE, RST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST };

struct packet {
	uint64_t src_cid, dst_cid;
	uint32_t src_port, dst_port, len;
	uint16_t type, op;
	uint32_t flags, buf_alloc, fwd_cnt;
	uint8_t data[8192 - 44];
} __attribute__((packed));

static struct vbench b;
static struct vsock *v;
static char dir[] = "/tmp/trapline-vsock-XXXXXX";
static char path[64];
static uint64_t rx_buffer, tx_buffer;
static bool waiting; /* a buffer that nothing came into yet */
static uint32_t alloc, fwd; /* credit that our guest gives */

static bool never(void *opaque)
{
	(void)opaque;
	return false;
}

static void settle(void)
{
	vbench_loop(&b, 5, never, NULL);
}

static int setup(void **state)
{
	(void)state;
	static struct keyval kv;
	char spec[96];
	struct error err = { "" };
	strcpy(dir + strlen(dir) - 6, "XXXXXX");
	if (!mkdtemp(dir))
		return -1;
	snprintf(path, sizeof(path), "%s/v", dir);
	snprintf(spec, sizeof(spec), "%s,cid=%d", path, CID);
	vbench_open(&b, 16 << 20);
	if (keyval_parse(&kv, "--vsock", spec, "path", &err) || vsock_open(&v, &kv, b.loop, &err) || keyval_finish(&kv, &err)) {
		fprintf(stderr, "%s\n", err.text);
		return -1;
	}
	const struct virtio_host host = vbench_host(&b, "vsock");
	if (virtio_vsock_create(&b.d, &host, v, &err))
		return -1;
	vbench_start_sized(&b, VBENCH_FEATURES, 64);
	rx_buffer = vbench_alloc(&b, 8192, 16);
	tx_buffer = vbench_alloc(&b, 256 << 10, 16);
	alloc = 65536;
	waiting = false;
	fwd = 0;
	return 0;
}

static int teardown(void **state)
{
	(void)state;
	struct stat st;
	vbench_destroy(&b);
	vsock_close(v);
	vbench_close(&b);
	return stat(path, &st) == 0 || rmdir(dir) ? -1 : 0;
}

/* A packet from the guest, with `len` bytes of `data` behind. Checks that the device takes it at once. */
static void put(uint32_t port, uint32_t peer, uint16_t op, uint32_t flags, const void *data, uint32_t len)
{
	struct packet *p = vbench_hva(&b, tx_buffer);
	*p = (struct packet){ CID, 2, port, peer, len, 1, op, flags, alloc, fwd, "" };
	if (len)
		memcpy(p->data, data, len);
	vbench_add(&b, TX, (struct vbuf[]){ { tx_buffer, 44 + len, false } }, 1);
	vbench_kick(&b, TX);
	assert_true(vbench_used(&b, TX, NULL) >= 0);
}

/* The next packet for the guest, or one with op 0. */
static struct packet *get_into(uint32_t room)
{
	static struct packet none;
	if (!waiting) {
		vbench_add(&b, RX, (struct vbuf[]){ { rx_buffer, room, true } }, 1);
		vbench_kick(&b, RX);
	}
	waiting = false;
	uint32_t len = 0;
	for (int i = 0; i < 3; i++) {
		if (vbench_used(&b, RX, &len) >= 0) {
			struct packet *p = vbench_hva(&b, rx_buffer);
			assert_int_equal(p->len + 44, len);
			assert_int_equal(p->src_cid, 2);
			assert_int_equal(p->dst_cid, CID);
			assert_int_equal(p->type, 1);
			return p;
		}
		settle();
	}
	waiting = true;
	memset(&none, 0, sizeof(none));
	return &none;
}

static struct packet *get(void)
{
	return get_into(8192);
}

static struct packet *expect(uint16_t op, uint32_t port, uint32_t peer)
{
	struct packet *p = get();
	assert_int_equal(p->op, op);
	if (op) {
		assert_int_equal(p->dst_port, port);
		assert_int_equal(p->src_port, peer);
		assert_int_equal(p->buf_alloc, VSOCK_BUFFER);
	}
	return p;
}

static int listen_at(uint32_t port)
{
	struct sockaddr_un un = { .sun_family = AF_UNIX };
	snprintf(un.sun_path, sizeof(un.sun_path), "%s_%u", path, port);
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	assert_int_equal(bind(fd, (struct sockaddr *)&un, sizeof(un)), 0);
	assert_int_equal(listen(fd, 300), 0);
	return fd;
}

static void unlisten(int fd, uint32_t port)
{
	char name[96];
	snprintf(name, sizeof(name), "%s_%u", path, port);
	close(fd);
	unlink(name);
}

static int dial(const char *line)
{
	struct sockaddr_un un = { .sun_family = AF_UNIX };
	strcpy(un.sun_path, path);
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	assert_int_equal(connect(fd, (struct sockaddr *)&un, sizeof(un)), 0);
	assert_int_equal(send(fd, line, strlen(line), MSG_NOSIGNAL), strlen(line));
	settle();
	return fd;
}

static ssize_t hear(int fd, void *to, size_t room)
{
	for (int i = 0; i < 5; i++) {
		ssize_t n = recv(fd, to, room, MSG_DONTWAIT);
		if (n >= 0 || errno != EAGAIN)
			return n < 0 ? -errno : n;
		settle();
	}
	return -EAGAIN;
}

/* A connection that the guest made from port 1000 to 5000: the program's descriptor. */
static int guest_connects(void)
{
	int listener = listen_at(5000);
	put(1000, 5000, REQUEST, 0, NULL, 0);
	expect(RESPONSE, 1000, 5000);
	int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
	assert_true(fd >= 0);
	unlisten(listener, 5000);
	return fd;
}

static void test_guest_to_host(void **state)
{
	(void)state;
	char text[32];
	int fd = guest_connects();
	put(1000, 5000, RW, 0, "hello", 5);
	assert_int_equal(hear(fd, text, sizeof(text)), 5);
	assert_memory_equal(text, "hello", 5);
	assert_int_equal(write(fd, "answer", 6), 6);
	settle();
	struct packet *p = expect(RW, 1000, 5000);
	assert_int_equal(p->len, 6);
	assert_memory_equal(p->data, "answer", 6);
	assert_int_equal(p->fwd_cnt, 5);
	put(1000, 5000, CREDIT_REQUEST, 0, NULL, 0);
	expect(CREDIT_UPDATE, 1000, 5000);

	/* The guest sends no more: an end of file; the program goes on and then ends too. */
	put(1000, 5000, SHUTDOWN, 2, NULL, 0);
	assert_int_equal(hear(fd, text, sizeof(text)), 0);
	assert_int_equal(write(fd, "last", 4), 4);
	shutdown(fd, SHUT_WR);
	settle();
	assert_int_equal(expect(RW, 1000, 5000)->len, 4);
	assert_int_equal(expect(SHUTDOWN, 1000, 5000)->flags & 2, 2);
	put(1000, 5000, SHUTDOWN, 3, NULL, 0);
	expect(RST, 1000, 5000);
	expect(0, 0, 0);
	close(fd);
	/* Nobody listens at port 6000. */
	put(1000, 6000, REQUEST, 0, NULL, 0);
	expect(RST, 1000, 6000);
}

static void test_host_to_guest(void **state)
{
	(void)state;
	char text[32], ok[32];
	int fd = dial("CONNECT 22\nearly");
	struct packet *p = get();
	assert_int_equal(p->op, REQUEST);
	assert_int_equal(p->dst_port, 22);
	uint32_t port = p->src_port;
	assert_true(port >= 1024);
	put(22, port, RESPONSE, 0, NULL, 0);
	int n = snprintf(ok, sizeof(ok), "OK %u\n", port);
	assert_int_equal(hear(fd, text, sizeof(text)), n);
	assert_memory_equal(text, ok, (size_t)n);
	settle();
	p = expect(RW, 22, port);
	assert_int_equal(p->len, 5);
	assert_memory_equal(p->data, "early", 5);
	/* The program ends: what it sent arrives, then the end. */
	assert_int_equal(write(fd, "bye", 3), 3);
	close(fd);
	settle();
	assert_int_equal(expect(RW, 22, port)->len, 3);
	unsigned flags = 0;
	for (int i = 0; i < 3 && flags != 3; i++)
		flags |= expect(SHUTDOWN, 22, port)->flags;
	assert_int_equal(flags, 3);
	put(22, port, RST, 0, NULL, 0);
	expect(0, 0, 0);

	/* Refused, and a second one gets another port. In pieces, too. */
	fd = dial("CONN");
	assert_int_equal(send(fd, "ECT 23\n", 7, 0), 7);
	settle();
	p = get();
	assert_int_equal(p->op, REQUEST);
	assert_int_not_equal(p->src_port, port);
	put(23, p->src_port, RST, 0, NULL, 0);
	assert_int_equal(hear(fd, text, sizeof(text)), 0);
	close(fd);
}

static void test_impatient(void **state)
{
	(void)state;
	int fd = dial("CONNECT 24\n");
	struct packet *p = get();
	assert_int_equal(p->op, REQUEST);
	uint32_t port = p->src_port;
	close(fd);
	settle();
	expect(RST, 24, port);
	put(24, port, RESPONSE, 0, NULL, 0); /* too late */
	expect(RST, 24, port);
}

static void test_bad_lines(void **state)
{
	(void)state;
	static const char *const bad[] = { "HELLO 1\n", "CONNECT\n", "CONNECT x\n", "CONNECT -1\n", "CONNECT 4294967296\n", "CONNECT 1 2\n", "\n",
					   "CONNECT 00000000000000000000000000000000000000000001\n" };
	char text[8];
	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		int fd = dial(bad[i]);
		ssize_t n = hear(fd, text, sizeof(text));
		assert_true(n == 0 || n == -ECONNRESET);
		close(fd);
	}
	expect(0, 0, 0);
}

/* The program does not read: the guest may send what its credit allows and no more; then it hears what was read. */
static void test_credit_of_the_host(void **state)
{
	(void)state;
	static uint8_t data[8000], got[65536];
	int fd = guest_connects();
	uint32_t sent = 0, heard = 0, freed = 0;
	/* An honest guest: never more than it knows to be free. */
	for (int i = 0; i < 2000; i++) {
		if (VSOCK_BUFFER - (sent - freed) < sizeof(data)) {
			struct packet *p = get();
			if (!p->op)
				break; /* the socket is full, and the buffer */
			assert_int_equal(p->op, CREDIT_UPDATE);
			freed = p->fwd_cnt;
			continue;
		}
		for (size_t k = 0; k < sizeof(data); k++)
			data[k] = (uint8_t)((sent + k) * 7 >> 3);
		put(1000, 5000, RW, 0, data, sizeof(data));
		sent += sizeof(data);
	}
	assert_true(sent > VSOCK_BUFFER && VSOCK_BUFFER - (sent - freed) < sizeof(data));
	while (heard < sent) {
		ssize_t n = hear(fd, got, sizeof(got));
		assert_true(n > 0);
		for (ssize_t k = 0; k < n; k++, heard++)
			assert_int_equal(got[k], (uint8_t)(heard * 7 >> 3));
	}
	settle();
	struct packet *p = expect(CREDIT_UPDATE, 1000, 5000);
	while (p->op)
		freed = p->fwd_cnt, p = get();
	assert_true(sent - freed < VSOCK_BUFFER / 4);
	/* A dishonest one is reset. */
	for (int i = 0; i < 200; i++)
		put(1000, 5000, RW, 0, data, sizeof(data));
	p = get();
	while (p->op == CREDIT_UPDATE)
		p = get();
	assert_int_equal(p->op, RST);
	while (hear(fd, got, sizeof(got)) > 0)
		;
	close(fd);
}

/* The guest gives little credit, or none: no byte more than that is sent; a request goes out once. */
static void test_credit_of_the_guest(void **state)
{
	(void)state;
	alloc = 10;
	int fd = guest_connects();
	assert_int_equal(write(fd, "0123456789abcdef", 16), 16);
	settle();
	struct packet *p = expect(RW, 1000, 5000);
	assert_int_equal(p->len, 10);
	expect(CREDIT_REQUEST, 1000, 5000);
	expect(0, 0, 0);
	fwd = 4;
	put(1000, 5000, CREDIT_UPDATE, 0, NULL, 0);
	p = expect(RW, 1000, 5000);
	assert_int_equal(p->len, 4);
	assert_memory_equal(p->data, "abcd", 4);
	expect(CREDIT_REQUEST, 1000, 5000);
	/* Numbers that cannot be: no credit, no crash. */
	fwd = 0x80000000;
	put(1000, 5000, CREDIT_UPDATE, 0, NULL, 0);
	expect(0, 0, 0);
	fwd = 14;
	put(1000, 5000, CREDIT_UPDATE, 0, NULL, 0);
	assert_int_equal(expect(RW, 1000, 5000)->len, 2);
	close(fd);
}

/* What the guest had sent before it let go arrives, also if the program reads late. */
static void test_last_words(void **state)
{
	(void)state;
	static uint8_t data[8000], got[65536];
	int fd = guest_connects();
	uint32_t sent = 0, heard = 0, freed = 0;
	while (VSOCK_BUFFER - (sent - freed) >= sizeof(data)) {
		put(1000, 5000, RW, 0, data, sizeof(data));
		sent += sizeof(data);
		if (VSOCK_BUFFER - (sent - freed) < sizeof(data)) {
			struct packet *p = get();
			if (p->op)
				freed = p->fwd_cnt;
		}
	}
	put(1000, 5000, SHUTDOWN, 3, NULL, 0);
	expect(0, 0, 0); /* not before it is written */
	put(1000, 5000, RST, 0, NULL, 0);
	ssize_t n;
	while ((n = hear(fd, got, sizeof(got))) > 0)
		heard += (uint32_t)n;
	assert_int_equal(heard, sent);
	assert_int_equal(n, 0);
	close(fd);
}

static void raw(uint64_t src, uint64_t dst, uint16_t type, uint16_t op, uint32_t len, uint32_t room)
{
	struct packet *p = vbench_hva(&b, tx_buffer);
	*p = (struct packet){ src, dst, 1000, 5000, len, type, op, 0, alloc, fwd, "" };
	vbench_add(&b, TX, (struct vbuf[]){ { tx_buffer, room, false } }, 1);
	vbench_kick(&b, TX);
	assert_true(vbench_used(&b, TX, NULL) >= 0);
}

static void test_nonsense(void **state)
{
	(void)state;
	raw(CID, 2, 1, RW, 0, 20);  /* too short */
	raw(CID, 9, 1, REQUEST, 0, 44);
	raw(3, 2, 1, REQUEST, 0, 44);
	raw(CID, 2, 1, RST, 0, 44); /* to nobody: no answer, or two devices would talk for ever */
	expect(0, 0, 0);
	raw(CID, 2, 2, REQUEST, 0, 44); /* SEQPACKET was not offered */
	expect(RST, 1000, 5000);
	raw(CID, 2, 1, RW, 5, 44); /* longer than it is */
	expect(RST, 1000, 5000);
	for (uint16_t op = 2; op < 9; op++) {
		if (op == RST)
			continue;
		put(1000, 5000, op, 0, NULL, 0);
		expect(RST, 1000, 5000);
	}
	/* On a connection. */
	static const uint16_t bad[] = { 0, REQUEST, RESPONSE, 77 };
	for (size_t i = 0; i < 4; i++) {
		int fd = guest_connects();
		char c;
		put(1000, 5000, bad[i], 0, NULL, 0);
		expect(RST, 1000, 5000);
		assert_int_equal(hear(fd, &c, 1), 0);
		close(fd);
	}
	int fd = guest_connects();
	put(1000, 5000, SHUTDOWN, 2, NULL, 0);
	put(1000, 5000, RW, 0, "x", 1); /* after its end */
	expect(RST, 1000, 5000);
	close(fd);
	/* A flood without a buffer for answers: held up, not piled up; all is answered in the end. */
	unsigned used = 0, answered = 0, added = 0;
	for (; added < 120; added++) {
		struct packet *p = vbench_hva(&b, tx_buffer + 64 * added);
		*p = (struct packet){ CID, 2, 3000 + added, 5000, 0, 1, RW, 0, alloc, fwd, "" };
		vbench_add(&b, TX, (struct vbuf[]){ { tx_buffer + 64 * added, 44, false } }, 1);
		vbench_kick(&b, TX);
		unsigned before = used;
		while (vbench_used(&b, TX, NULL) >= 0)
			used++;
		if (used == before && added > used + 20)
			break;
	}
	assert_in_range(used, 60, 70);
	for (int i = 0; i < 300 && answered <= added; i++) {
		if (get()->op == RST)
			answered++;
	}
	while (vbench_used(&b, TX, NULL) >= 0)
		used++;
	assert_int_equal(answered, used);
	assert_int_equal(answered, added + 1);
}

/* More connections than there may be: refused, and the others work. A reset of the device ends all. */
static void test_many(void **state)
{
	(void)state;
	static int fds[VSOCK_CONNECTIONS + 8];
	int listener = listen_at(5000), n = 0;
	char c;
	for (uint32_t i = 0; i < VSOCK_CONNECTIONS + 8; i++) {
		put(10000 + i, 5000, REQUEST, 0, NULL, 0);
		expect(i < VSOCK_CONNECTIONS ? RESPONSE : RST, 10000 + i, 5000);
		int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
		assert_true(fd >= 0);
		fds[n++] = fd;
	}
	put(10100, 5000, RW, 0, "x", 1);
	assert_int_equal(hear(fds[100], &c, 1), 1);
	virtio_set_status(b.d, 0);
	for (int i = 0; i < n; i++) {
		assert_int_equal(hear(fds[i], &c, 1), 0);
		close(fds[i]);
	}
	unlisten(listener, 5000);
	/* Without a driver the host's programs are hung up on. */
	int fd = dial("CONNECT 1\n");
	assert_int_equal(hear(fd, &c, 1), 0);
	close(fd);
	vbench_start_sized(&b, VBENCH_FEATURES, 64);
	waiting = false;
	rx_buffer = vbench_alloc(&b, 8192, 16);
	tx_buffer = vbench_alloc(&b, 256 << 10, 16);
	close(guest_connects());
	settle();
}

static void test_transport_reset(void **state)
{
	(void)state;
	char c;
	int fd = guest_connects();
	virtio_vsock_transport_reset(b.d);
	assert_int_equal(hear(fd, &c, 1), 0);
	close(fd);
	uint64_t gpa = vbench_alloc(&b, 16, 16);
	memset(vbench_hva(&b, gpa), 0xff, 4);
	vbench_add(&b, EVENT, (struct vbuf[]){ { gpa, 4, true } }, 1);
	vbench_kick(&b, EVENT);
	uint32_t len;
	assert_true(vbench_used(&b, EVENT, &len) >= 0);
	assert_int_equal(len, 4);
	assert_int_equal(*(uint32_t *)vbench_hva(&b, gpa), 0);
}

/* Buffers of any shape. */
static void test_odd_buffers(void **state)
{
	(void)state;
	int fd = guest_connects();
	assert_int_equal(write(fd, "abcdef", 6), 6);
	vbench_add(&b, RX, (struct vbuf[]){ { rx_buffer, 20, true } }, 1); /* too small: comes back empty */
	vbench_add(&b, RX, (struct vbuf[]){ { rx_buffer, 44, true } }, 1); /* a header and nothing else */
	vbench_add(&b, RX, (struct vbuf[]){ { rx_buffer, 10, true }, { rx_buffer + 100, 36, true }, { rx_buffer + 200, 100, true } }, 3);
	vbench_kick(&b, RX);
	settle();
	uint32_t len;
	assert_true(vbench_used(&b, RX, &len) >= 0);
	assert_int_equal(len, 0);
	assert_true(vbench_used(&b, RX, &len) >= 0);
	assert_int_equal(len, 0);
	assert_true(vbench_used(&b, RX, &len) >= 0);
	assert_int_equal(len, 50);
	assert_memory_equal((char *)vbench_hva(&b, rx_buffer + 100) + 34, "ab", 2);
	assert_memory_equal(vbench_hva(&b, rx_buffer + 200), "cdef", 4);
	close(fd);
}

static void refuse(const char *spec, const char *words)
{
	static struct keyval kv;
	struct vsock *other;
	struct error err = { "" };
	assert_int_equal(keyval_parse(&kv, "--vsock", spec, "path", &err), 0);
	assert_true(vsock_open(&other, &kv, b.loop, &err) < 0);
	if (!strstr(err.text, words) || strncmp(err.text, "--vsock", 7))
		fail_msg("%s: \"%s\" does not say \"%s\"", spec, err.text, words);
}

static void test_mistakes(void **state)
{
	(void)state;
	char lng[120] = "/";
	memset(lng + 1, 'a', 100);
	refuse(lng, "no room");
	refuse("/nowhere/at/all", "cannot listen");
	refuse("/dev/null", "no socket");
	refuse("/tmp/x,cid=2", "cid");
	refuse("/tmp/x,cid=4294967295", "cid");
	refuse("cid=5", "needs the path");
	refuse(path, "another program listens");
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(test_guest_to_host, setup, teardown),
		cmocka_unit_test_setup_teardown(test_host_to_guest, setup, teardown),
		cmocka_unit_test_setup_teardown(test_impatient, setup, teardown),
		cmocka_unit_test_setup_teardown(test_bad_lines, setup, teardown),
		cmocka_unit_test_setup_teardown(test_credit_of_the_host, setup, teardown),
		cmocka_unit_test_setup_teardown(test_credit_of_the_guest, setup, teardown),
		cmocka_unit_test_setup_teardown(test_last_words, setup, teardown),
		cmocka_unit_test_setup_teardown(test_nonsense, setup, teardown),
		cmocka_unit_test_setup_teardown(test_many, setup, teardown),
		cmocka_unit_test_setup_teardown(test_transport_reset, setup, teardown),
		cmocka_unit_test_setup_teardown(test_odd_buffers, setup, teardown),
		cmocka_unit_test_setup_teardown(test_mistakes, setup, teardown),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
