/* --net socket, against a scripted peer: framing both ways, back-pressure, nonsense, coming and going, and what the user gets wrong. */
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>

#include "net/stream.h"
#include "nettest.h"

static char dir[] = "/tmp/trapline-net-XXXXXX";
static char path[64], spec[96];

static int setup(void **state)
{
	(void)state;
	strcpy(dir + strlen(dir) - 6, "XXXXXX");
	if (!mkdtemp(dir))
		return -1;
	snprintf(path, sizeof(path), "%s/s", dir);
	return 0;
}

static int teardown(void **state)
{
	(void)state;
	unlink(path);
	return rmdir(dir); /* nothing else may be left */
}

static int peer_connect(void)
{
	struct sockaddr_un un = { .sun_family = AF_UNIX };
	strcpy(un.sun_path, path);
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	assert_int_equal(connect(fd, (struct sockaddr *)&un, sizeof(un)), 0);
	return fd;
}

static int peer_listen(void)
{
	struct sockaddr_un un = { .sun_family = AF_UNIX };
	strcpy(un.sun_path, path);
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	assert_int_equal(bind(fd, (struct sockaddr *)&un, sizeof(un)), 0);
	assert_int_equal(listen(fd, 1), 0);
	return fd;
}

static int peer_accept(int listener)
{
	struct pollfd p = { .fd = listener, .events = POLLIN };
	assert_int_equal(poll(&p, 1, 10000), 1);
	return accept4(listener, NULL, NULL, SOCK_CLOEXEC);
}

static void peer_write(int fd, const void *data, size_t len)
{
	for (const uint8_t *p = data; len;) {
		ssize_t n = send(fd, p, len, MSG_NOSIGNAL);
		assert_true(n > 0);
		p += n;
		len -= (size_t)n;
	}
}

static bool peer_read(int fd, void *data, size_t len)
{
	for (uint8_t *p = data; len;) {
		struct pollfd pfd = { .fd = fd, .events = POLLIN };
		if (poll(&pfd, 1, 10000) != 1)
			return false;
		ssize_t n = read(fd, p, len);
		if (n <= 0)
			return false;
		p += n;
		len -= (size_t)n;
	}
	return true;
}

static size_t framed(uint8_t *to, size_t len, uint8_t tag)
{
	uint32_t be = htonl((uint32_t)len);
	memcpy(to, &be, 4);
	memset(to + 4, tag, len);
	return 4 + len;
}

/* The peer turned us away or away from us: its end reads an end of file, or a reset. */
static bool peer_hears_end(int fd)
{
	char c;
	struct pollfd pfd = { .fd = fd, .events = POLLIN };
	return poll(&pfd, 1, 10000) == 1 && read(fd, &c, 1) <= 0;
}

static struct card *listening(void)
{
	static struct card c;
	snprintf(spec, sizeof(spec), "socket,listen=%s", path);
	card_must_open(&c, spec);
	return &c;
}

static void test_both_ways(void **state)
{
	(void)state;
	struct card *c = listening();
	static uint8_t buf[70000], got[70000];
	uint8_t frame[60];
	memset(frame, 0x11, sizeof(frame));
	assert_false(net_info(c->net)->link);
	assert_true(card_send(c, frame, sizeof(frame))); /* nobody there: lost, not waited for */
	assert_int_equal(card_stats(c).tx_dropped, 1);

	int fd = peer_connect();
	assert_true(card_wait_link(c, true));
	/* In single bytes, then three frames in one piece, the largest there is among them. */
	size_t n = framed(buf, 60, 1);
	for (size_t i = 0; i < n; i++)
		peer_write(fd, buf + i, 1);
	assert_true(card_wait(c, &c->nframes, 1));
	n = framed(buf, 14, 2);
	n += framed(buf + n, 65550, 3);
	n += framed(buf + n, 1514, 4);
	peer_write(fd, buf, n);
	assert_true(card_wait(c, &c->nframes, 4));
	static const size_t lens[] = { 60, 14, 65550, 1514 };
	for (unsigned i = 0; i < 4; i++) {
		assert_int_equal(c->frame[i].len, lens[i]);
		assert_int_equal(c->frame[i].bytes[0], i + 1);
		assert_int_equal(c->frame[i].bytes[lens[i] - 1], i + 1);
		assert_int_equal(c->frame[i].h.flags, 0);
	}
	/* Shorter than an Ethernet header: skipped. */
	n = framed(buf, 13, 9);
	n += framed(buf + n, 20, 5);
	peer_write(fd, buf, n);
	assert_true(card_wait(c, &c->nframes, 5));
	assert_int_equal(c->frame[4].bytes[0], 5);

	assert_true(card_send(c, frame, sizeof(frame)));
	assert_true(peer_read(fd, got, 64));
	framed(buf, 60, 0x11);
	assert_memory_equal(got, buf, 64);
	/* A frame in more parts than one sendmsg takes comfortably. */
	struct iovec many[200];
	for (int i = 0; i < 200; i++)
		many[i] = (struct iovec){ buf + i * 100, 100 };
	for (int i = 0; i < 20000; i++)
		buf[i] = (uint8_t)(i * 7);
	const struct net_header h = { 0 };
	card_lock(c);
	assert_true(net_send(c->net, 0, &h, many, 200));
	net_flush(c->net);
	card_unlock(c);
	assert_true(peer_read(fd, got, 20004));
	assert_int_equal(ntohl(*(uint32_t *)got), 20000);
	assert_memory_equal(got + 4, buf, 20000);
	close(fd);
	assert_true(card_wait_link(c, false));
	card_close(c);
	struct stat st;
	assert_int_equal(stat(path, &st), -1); /* its socket went with it */
}

/* A guest that takes nothing holds up the peer, not our memory; every frame arrives in the end. */
static void test_guest_without_room(void **state)
{
	(void)state;
	struct card *c = listening();
	card_lock(c);
	c->room = 0;
	card_unlock(c);
	int fd = peer_connect();
	static uint8_t buf[10004];
	int sent = 0;
	framed(buf, 10000, 7);
	for (;; sent++) {
		struct pollfd p = { .fd = fd, .events = POLLOUT };
		*(uint32_t *)(buf + 4) = (uint32_t)sent;
		if (poll(&p, 1, 300) == 0)
			break;
		ssize_t n = send(fd, buf, sizeof(buf), MSG_DONTWAIT);
		if (n < 0)
			break;
		if (n < (ssize_t)sizeof(buf)) {
			/* finish it when there is room */
			card_lock(c);
			c->room = CARD_FRAMES;
			net_resume(c->net);
			card_unlock(c);
			peer_write(fd, buf + n, sizeof(buf) - (size_t)n);
			sent++;
			break;
		}
		assert_true(sent < 200);
	}
	card_lock(c);
	c->room = CARD_FRAMES;
	net_resume(c->net);
	card_unlock(c);
	assert_true(card_wait(c, &c->nframes, (unsigned)sent));
	for (int i = 0; i < sent; i++)
		assert_int_equal(*(uint32_t *)c->frame[i].bytes, i);
	assert_true(c->refused >= 1 && c->refused < 10); /* it was not asked again and again */
	close(fd);
	card_close(c);
}

/* A peer that does not read: frames wait whole, `writable` comes once it does, nothing is lost or torn. */
static void test_peer_without_room(void **state)
{
	(void)state;
	struct card *c = listening();
	int fd = peer_connect();
	assert_true(card_wait_link(c, true));
	static uint8_t frame[9000], got[9004];
	unsigned sent = 0;
	for (; sent < 1000; sent++) {
		memset(frame, (int)(sent & 0xff), sizeof(frame));
		if (!card_send(c, frame, sizeof(frame)))
			break;
	}
	assert_in_range(sent, 2, 999);
	for (unsigned i = 0; i < sent; i++) {
		assert_true(peer_read(fd, got, sizeof(got)));
		assert_int_equal(ntohl(*(uint32_t *)got), 9000);
		assert_int_equal(got[4], i & 0xff);
		assert_int_equal(got[9003], i & 0xff);
	}
	assert_true(card_wait(c, &c->writable, 1));
	/* Gone while frames wait: they are lost, and the card is told that it need not wait. */
	while (card_send(c, frame, sizeof(frame)))
		;
	unsigned before = c->writable;
	close(fd);
	assert_true(card_wait(c, &c->writable, before + 1));
	assert_true(card_wait_link(c, false));
	assert_true(card_send(c, frame, sizeof(frame)));
	card_close(c);
}

static void test_nonsense(void **state)
{
	(void)state;
	static const uint32_t bad[] = { 0, 65551, 0x10000000, 0xffffffff };
	struct card *c = listening();
	for (unsigned i = 0; i < 4; i++) {
		uint32_t be = htonl(bad[i]);
		int fd = peer_connect();
		assert_true(card_wait_link(c, true));
		peer_write(fd, &be, 4);
		assert_true(peer_hears_end(fd));
		close(fd);
		assert_true(card_wait_link(c, false));
	}
	/* The next one is served as if nothing had been. */
	uint8_t buf[64];
	int fd = peer_connect();
	peer_write(fd, buf, framed(buf, 60, 1));
	assert_true(card_wait(c, &c->nframes, 1));
	close(fd);
	card_close(c);
}

static void test_one_peer(void **state)
{
	(void)state;
	struct card *c = listening();
	int first = peer_connect();
	assert_true(card_wait_link(c, true));
	int second = peer_connect();
	assert_true(peer_hears_end(second));
	close(second);
	uint8_t buf[64];
	peer_write(first, buf, framed(buf, 60, 1));
	assert_true(card_wait(c, &c->nframes, 1));
	close(first);
	assert_true(card_wait_link(c, false));
	card_close(c);
}

/* The connecting side starts before its peer, survives its end and finds it again. */
static void test_reconnect(void **state)
{
	(void)state;
	struct card c;
	snprintf(spec, sizeof(spec), "socket,connect=%s,mtu=9000", path);
	card_must_open(&c, spec);
	assert_int_equal(net_info(c.net)->mtu, 9000);
	assert_false(net_info(c.net)->link);
	for (unsigned i = 1; i <= 2; i++) {
		uint8_t buf[64];
		int listener = peer_listen(), fd = peer_accept(listener);
		assert_true(card_wait_link(&c, true));
		peer_write(fd, buf, framed(buf, 60, 1));
		assert_true(card_wait(&c, &c.nframes, i));
		close(fd);
		close(listener);
		unlink(path);
		assert_true(card_wait_link(&c, false));
	}
	card_close(&c);
}

/* Over TCP, between two of ours. */
static void test_tcp(void **state)
{
	(void)state;
	struct sockaddr_in in = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	socklen_t len = sizeof(in);
	int probe = socket(AF_INET, SOCK_STREAM, 0); /* a free port */
	assert_int_equal(bind(probe, (struct sockaddr *)&in, sizeof(in)), 0);
	assert_int_equal(getsockname(probe, (struct sockaddr *)&in, &len), 0);
	close(probe);
	static struct card a, b;
	snprintf(spec, sizeof(spec), "socket,connect=127.0.0.1:%u", ntohs(in.sin_port));
	card_must_open(&a, spec); /* refused at first */
	bench_sleep_us(50000);
	snprintf(spec, sizeof(spec), "socket,listen=127.0.0.1:%u", ntohs(in.sin_port));
	card_must_open(&b, spec);
	assert_true(card_wait_link(&a, true));
	assert_true(card_wait_link(&b, true));
	uint8_t frame[1500];
	memset(frame, 5, sizeof(frame));
	assert_true(card_send(&a, frame, sizeof(frame)));
	assert_true(card_send(&b, frame, sizeof(frame)));
	assert_true(card_wait(&a, &a.nframes, 1));
	assert_true(card_wait(&b, &b.nframes, 1));
	assert_memory_equal(a.frame[0].bytes, frame, sizeof(frame));
	card_close(&a);
	assert_true(card_wait_link(&b, false));
	card_close(&b);
}

/* QEMU at the other end, listening or connecting, with its own user-mode network behind a hub: it offers an address. */
static void with_qemu(const char *ours, const char *theirs)
{
	struct card c;
	char stream[160];
	snprintf(stream, sizeof(stream), "stream,id=s,%s,addr.type=unix,addr.path=%s", theirs, path);
	snprintf(spec, sizeof(spec), "socket,%s=%s", ours, path);
	card_must_open(&c, spec);
	pid_t pid = fork();
	if (!pid) {
		dup2(open("/dev/null", O_RDWR), 2);
		execlp("qemu-system-x86_64", "qemu-system-x86_64", "-M", "none", "-display", "none", "-monitor", "none", "-serial", "none", "-netdev",
		       "user,id=u", "-netdev", stream, "-netdev", "hubport,id=a,hubid=0,netdev=u", "-netdev", "hubport,id=b,hubid=0,netdev=s",
		       (char *)NULL);
		_exit(127);
	}
	uint8_t frame[400];
	int n = -1;
	if (card_wait_link(&c, true)) {
		card_send(&c, frame, card_discover(frame));
		n = card_wait_frame(&c, card_is_offer);
	}
	kill(pid, SIGKILL);
	waitpid(pid, NULL, 0);
	assert_true(n >= 0);
	assert_true(card_wait_link(&c, false));
	card_close(&c);
}

static void test_qemu(void **state)
{
	(void)state;
	if (system("command -v qemu-system-x86_64 >/dev/null")) {
		printf("no qemu-system-x86_64 to talk to\n");
		skip();
	}
	with_qemu("listen", "server=off");
	with_qemu("connect", "server=on");
}

/* A large frame is cut for the peer, as a whole or not at all; one that would become thousands is dropped. */
static void test_large_frame(void **state)
{
	(void)state;
	struct card *c = listening();
	static uint8_t frame[54 + 30000], got[2000];
	memcpy(frame + 6, CARD_MAC, 6);
	frame[12] = 8;
	frame[14] = 0x45, frame[22] = 64, frame[23] = IPPROTO_TCP;
	frame[16] = (sizeof(frame) - 14) >> 8, frame[17] = (uint8_t)(sizeof(frame) - 14);
	frame[46] = 0x50;
	for (size_t i = 0; i < 30000; i++)
		frame[54 + i] = (uint8_t)(i * 13 >> 2);
	int fd = peer_connect();
	assert_true(card_wait_link(c, true));
	struct net_header h = { .flags = NET_NEEDS_CSUM, .gso_type = NET_GSO_TCP4, .hdr_len = 54, .gso_size = 1448, .csum_start = 34, .csum_offset = 16 };
	const struct iovec iov = { frame, sizeof(frame) };
	card_lock(c);
	assert_true(net_send(c->net, 0, &h, &iov, 1));
	net_flush(c->net);
	card_unlock(c);
	for (size_t at = 0; at < 30000;) {
		size_t n = 30000 - at < 1448 ? 30000 - at : 1448;
		assert_true(peer_read(fd, got, 4 + 54 + n));
		assert_int_equal(ntohl(*(uint32_t *)got), 54 + n);
		assert_memory_equal(got + 4 + 54, frame + 54 + at, n);
		at += n;
	}
	h.gso_size = 1;
	card_lock(c);
	assert_true(net_send(c->net, 0, &h, &iov, 1));
	net_flush(c->net);
	card_unlock(c);
	assert_int_equal(card_stats(c).tx_dropped, 1);
	close(fd);
	card_close(c);
}

static void on_stream_closed(void *opaque, const char *why)
{
	(void)opaque;
	fail_msg("closed: %s", why);
}

/* To make room, a part of what is kept was written; the rest of it follows when the peer reads, whoever asks for more meanwhile or not. */
static void test_rest_follows(void **state)
{
	(void)state;
	static const struct stream_ops ops = { .closed = on_stream_closed };
	static uint8_t drain[1 << 16];
	struct bench b;
	struct stream s;
	int pair[2], size = 16 << 10;
	bench_start(&b);
	assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair), 0);
	assert_int_equal(setsockopt(pair[0], SOL_SOCKET, SO_SNDBUF, &size, sizeof(size)), 0);
	assert_int_equal(stream_init(&s, b.loop, &ops, NULL), 0);
	assert_int_equal(stream_start(&s, pair[0]), 0);
	size_t want = 0;
	for (; want < 9000; want += 1000)
		assert_int_equal(send(pair[0], drain, 1000, 0), 1000);
	for (unsigned i = 0; i < 30; i++, want += 1004)
		assert_int_equal(stream_send(&s, &(struct iovec){ drain, 1000 }, 1), STREAM_SENT);
	assert_true(stream_reserve(&s, STREAM_RESERVE_MAX - 20000));
	assert_true(s.blocked);
	assert_in_range(s.out_end - s.out_start, 1, 20000);
	bench_run(&b);
	size_t got = 0;
	for (int i = 0; i < 2000 && got < want; i++) {
		ssize_t n = recv(pair[1], drain, sizeof(drain), 0);
		got += n > 0 ? (size_t)n : 0;
		if (n <= 0)
			bench_sleep_us(1000);
	}
	assert_int_equal(got, want);
	bench_halt(&b);
	stream_fini(&s);
	close(pair[1]);
	bench_stop(&b);
}

static void refuse(const char *value, const char *words)
{
	struct card c;
	struct error err = { "" };
	assert_true(card_open(&c, value, &err) < 0);
	if (!strstr(err.text, words) || strncmp(err.text, "--net", 5))
		fail_msg("%s: \"%s\" does not say \"%s\"", value, err.text, words);
}

static void test_mistakes(void **state)
{
	(void)state;
	refuse("socket", "listen= or connect=");
	refuse("socket,listen=/tmp/a,connect=/tmp/a", "either");
	refuse("socket,listen=name", "needs a '/'");
	refuse("socket,listen=:", "needs a '/'");
	refuse("socket,listen=/nowhere/at/all", "cannot listen");
	refuse("socket,connect=no.such.host.invalid:1", "no such address");
	refuse("socket,listen=/tmp/x,speed=1", "speed");
	refuse("socket,listen=/tmp/x,mtu=1", "mtu");
	char lng[200] = "socket,listen=/";
	memset(lng + strlen(lng), 'a', 150);
	refuse(lng, "longer");
	/* Somebody listens there; a file that is no socket; a socket that nobody listens on is taken over. */
	snprintf(spec, sizeof(spec), "socket,listen=%s", path);
	int fd = peer_listen();
	refuse(spec, "listens there");
	close(fd);
	struct card c;
	card_must_open(&c, spec);
	card_close(&c);
	FILE *f = fopen(path, "w");
	fclose(f);
	refuse(spec, "no socket");
	unlink(path);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(test_both_ways, setup, teardown),
		cmocka_unit_test_setup_teardown(test_guest_without_room, setup, teardown),
		cmocka_unit_test_setup_teardown(test_peer_without_room, setup, teardown),
		cmocka_unit_test_setup_teardown(test_nonsense, setup, teardown),
		cmocka_unit_test_setup_teardown(test_one_peer, setup, teardown),
		cmocka_unit_test_setup_teardown(test_reconnect, setup, teardown),
		cmocka_unit_test_setup_teardown(test_tcp, setup, teardown),
		cmocka_unit_test_setup_teardown(test_large_frame, setup, teardown),
		cmocka_unit_test_setup_teardown(test_qemu, setup, teardown),
		cmocka_unit_test(test_rest_follows),
		cmocka_unit_test_setup_teardown(test_mistakes, setup, teardown),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
