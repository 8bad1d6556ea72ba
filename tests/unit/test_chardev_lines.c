/* Serial lines behind which somebody comes and goes: socket:PATH and pty. */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <termios.h>
#include <unistd.h>

#include "chardev/chardev.h"
#include "devtest.h"

struct guest {
	struct bench b;
	struct chardev *cd;
	size_t room, len;
	unsigned writable, resizes;
	uint16_t columns, rows;
	uint8_t got[1 << 16];
};

static size_t room(void *opaque)
{
	return ((struct guest *)opaque)->room;
}

static void receive(void *opaque, const uint8_t *data, size_t len)
{
	struct guest *g = opaque;
	memcpy(g->got + g->len, data, len);
	g->len += len;
	g->room -= len;
}

static void writable(void *opaque)
{
	((struct guest *)opaque)->writable++;
}

static void resize(void *opaque, uint16_t columns, uint16_t rows)
{
	struct guest *g = opaque;
	g->columns = columns;
	g->rows = rows;
	g->resizes++;
}

static const struct chardev_client client = { .room = room, .receive = receive, .writable = writable, .resize = resize };
static char dir[] = "/tmp/trapline-line-XXXXXX";
static char path[64], spec[80];

static struct guest *start(const char *kind)
{
	static struct guest g;
	struct error err = { "" };
	memset(&g, 0, sizeof(g));
	bench_start(&g.b);
	strcpy(dir + strlen(dir) - 6, "XXXXXX");
	assert_non_null(mkdtemp(dir));
	snprintf(path, sizeof(path), "%s/s", dir);
	snprintf(spec, sizeof(spec), "%s:%s", kind, path);
	g.room = sizeof(g.got);
	const struct chardev_config config = { .loop = g.b.loop };
	if (chardev_open(&g.cd, spec, &config, &err))
		fail_msg("%s", err.text);
	chardev_set_client(g.cd, &client, &g);
	bench_run(&g.b);
	return &g;
}

static void stop(struct guest *g)
{
	struct stat st;
	bench_halt(&g->b);
	chardev_close(g->cd);
	bench_stop(&g->b);
	assert_int_equal(lstat(path, &st), -1); /* it went with the line */
	rmdir(dir);
}

static size_t say(struct guest *g, const void *data, size_t len)
{
	pthread_mutex_lock(&g->b.lock);
	size_t n = chardev_write(g->cd, data, len);
	pthread_mutex_unlock(&g->b.lock);
	return n;
}

static bool got(struct guest *g, size_t len)
{
	for (int i = 0; i < 5000; i++) {
		pthread_mutex_lock(&g->b.lock);
		bool there = g->len >= len;
		pthread_mutex_unlock(&g->b.lock);
		if (there)
			return true;
		bench_sleep_us(1000);
	}
	return false;
}

static int join(void)
{
	struct sockaddr_un un = { .sun_family = AF_UNIX };
	strcpy(un.sun_path, path);
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	assert_int_equal(connect(fd, (struct sockaddr *)&un, sizeof(un)), 0);
	return fd;
}

static bool hear(int fd, void *to, size_t len)
{
	for (uint8_t *p = to; len;) {
		struct pollfd pfd = { .fd = fd, .events = POLLIN };
		ssize_t n = poll(&pfd, 1, 5000) == 1 ? read(fd, p, len) : -1;
		if (n <= 0)
			return false;
		p += n;
		len -= (size_t)n;
	}
	return true;
}

/* Until the line has noticed that its client is gone: then it keeps what is written, however much. */
static void wait_gone(struct guest *g)
{
	for (int i = 0; i < 5000; i++) {
		pthread_mutex_lock(&g->b.lock);
		bool gone = chardev_write_room(g->cd) >= 256 << 10;
		pthread_mutex_unlock(&g->b.lock);
		if (gone && i > 20)
			return;
		bench_sleep_us(1000);
	}
	fail_msg("it did not notice");
}

static void socket_talks(void **state)
{
	(void)state;
	struct guest *g = start("socket");
	char text[16];
	assert_int_equal(say(g, "early ", 6), 6);
	int fd = join();
	assert_true(hear(fd, text, 6)); /* what was said to nobody */
	assert_memory_equal(text, "early ", 6);
	assert_int_equal(say(g, "hello", 5), 5);
	assert_true(hear(fd, text, 5));
	assert_memory_equal(text, "hello", 5);
	assert_int_equal(write(fd, "abc", 3), 3);
	assert_true(got(g, 3));
	assert_memory_equal(g->got, "abc", 3);

	/* A second one is told, and does not disturb the first. */
	int second = join();
	char busy[64] = "";
	assert_true(hear(second, busy, 8));
	assert_memory_equal(busy, "trapline", 8);
	while (read(second, busy, sizeof(busy)) > 0)
		;
	close(second);
	assert_int_equal(write(fd, "d", 1), 1);
	assert_true(got(g, 4));

	/* It only listens from now on; then it goes, and another one comes. */
	shutdown(fd, SHUT_WR);
	bench_sleep_us(20000);
	assert_int_equal(say(g, "still", 5), 5);
	assert_true(hear(fd, text, 5));
	close(fd);
	wait_gone(g);
	fd = join();
	assert_int_equal(write(fd, "e", 1), 1);
	assert_true(got(g, 5));
	close(fd);
	stop(g);
}

/* With nobody there the guest never waits, and the latest output is kept. */
static void socket_keeps_the_latest(void **state)
{
	(void)state;
	struct guest *g = start("socket");
	static uint8_t data[100000], back[65536];
	for (size_t i = 0; i < sizeof(data); i++)
		data[i] = (uint8_t)(i * 31 >> 4);
	for (int i = 0; i < 5; i++)
		assert_int_equal(say(g, data, sizeof(data)), sizeof(data));
	int fd = join();
	assert_true(hear(fd, back, sizeof(back)));
	assert_memory_equal(back, data + sizeof(data) - sizeof(back), sizeof(back));
	assert_int_equal(say(g, "z", 1), 1);
	assert_true(hear(fd, back, 1));
	assert_int_equal(back[0], 'z');
	close(fd);
	stop(g);
}

/* A client that does not read holds the guest; when it goes the guest is free again. Input waits for the guest's room and outlives the client. */
static void socket_pushes_back(void **state)
{
	(void)state;
	struct guest *g = start("socket");
	static uint8_t data[65536];
	int fd = join();
	assert_int_equal(write(fd, "x", 1), 1);
	assert_true(got(g, 1)); /* connected */
	size_t said = 0, n;
	for (;;) {
		bench_sleep_us(2000);
		n = say(g, data, sizeof(data));
		said += n;
		assert_true(said < 64u << 20);
		if (n < sizeof(data))
			break;
	}
	bench_sleep_us(20000);
	assert_int_equal(g->writable, 0);
	static uint8_t drain[65536];
	size_t heard = 0;
	for (int i = 0; i < 5000 && !g->writable; i++) {
		ssize_t r = recv(fd, drain, sizeof(drain), MSG_DONTWAIT);
		heard += r > 0 ? (size_t)r : 0;
		bench_sleep_us(1000);
	}
	assert_int_equal(g->writable, 1);
	while (heard < said) {
		ssize_t r = read(fd, drain, sizeof(drain));
		assert_true(r > 0);
		heard += (size_t)r;
	}
	assert_int_equal(heard, said); /* nothing lost, nothing twice */

	while (say(g, data, sizeof(data)) == sizeof(data))
		bench_sleep_us(2000);
	pthread_mutex_lock(&g->b.lock);
	g->room = 10;
	g->len = 0;
	pthread_mutex_unlock(&g->b.lock);
	memset(data, 'i', sizeof(data));
	assert_int_equal(write(fd, data, 20000), 20000);
	close(fd);
	assert_true(got(g, 10));
	for (int i = 0; i < 1000; i++) {
		pthread_mutex_lock(&g->b.lock);
		g->room = sizeof(g->got) - g->len;
		chardev_resume(g->cd);
		pthread_mutex_unlock(&g->b.lock);
		if (g->writable == 2 && g->len >= 10)
			break;
		bench_sleep_us(1000);
	}
	assert_int_equal(g->writable, 2); /* it need not wait for who is gone */
	wait_gone(g);
	stop(g);
}

static void pty_talks(void **state)
{
	(void)state;
	struct guest *g = start("pty");
	struct termios t;
	char text[16];
	for (int round = 0; round < 2; round++) {
		assert_int_equal(say(g, "early", 5), 5);
		int fd = open(path, O_RDWR | O_NOCTTY | O_CLOEXEC); /* the link */
		assert_true(fd >= 0);
		assert_int_equal(tcgetattr(fd, &t), 0);
		assert_int_equal(t.c_lflag & (ICANON | ECHO), 0);
		assert_true(hear(fd, text, 5));
		assert_memory_equal(text, "early", 5);
		assert_int_equal(write(fd, "\3\r", 2), 2);
		assert_true(got(g, 2 * (size_t)round + 2));
		assert_memory_equal(g->got, "\3\r", 2);
		close(fd);
		wait_gone(g);
	}
	stop(g);
}

static void size_is_told(void **state)
{
	(void)state;
	struct guest *g = start("socket");
	uint16_t columns, rows;
	pthread_mutex_lock(&g->b.lock);
	chardev_resize(g->cd, 132, 50);
	chardev_resize(g->cd, 132, 50);
	chardev_size(g->cd, &columns, &rows);
	pthread_mutex_unlock(&g->b.lock);
	assert_int_equal(g->resizes, 1);
	assert_int_equal(g->columns, 132);
	assert_int_equal(g->rows, 50);
	assert_int_equal(columns, 132);
	assert_int_equal(rows, 50);
	stop(g);
}

static void refuse(const char *value, const char *words)
{
	struct bench b;
	struct chardev *cd;
	struct error err = { "" };
	bench_start(&b);
	const struct chardev_config config = { .loop = b.loop, .option = "--console" };
	assert_true(chardev_open(&cd, value, &config, &err) < 0);
	if (!strstr(err.text, words) || strncmp(err.text, "--console ", 10))
		fail_msg("%s: \"%s\" does not say \"%s\"", value, err.text, words);
	bench_stop(&b);
}

static void mistakes(void **state)
{
	(void)state;
	refuse("socket", "no path");
	refuse("socket:", "no path");
	refuse("socket:/nowhere/at/all", "cannot listen");
	refuse("socket:/dev/null", "no socket");
	refuse("pty:/nowhere/at/all", "cannot make a link");
	refuse("pty:/dev/null", "cannot make a link");
	refuse("none:x", "not known");
	refuse("telnet:1", "not known");
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(socket_talks), cmocka_unit_test(socket_keeps_the_latest), cmocka_unit_test(socket_pushes_back),
		cmocka_unit_test(pty_talks),	cmocka_unit_test(size_is_told),		   cmocka_unit_test(mistakes),
	};
	signal(SIGPIPE, SIG_IGN); /* as trapline run does */
	return cmocka_run_group_tests(tests, NULL, NULL);
}
