/* stdio on a terminal: raw mode, the escape key, and giving the terminal back. */
#include <fcntl.h>
#include <pty.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#include "chardev/chardev.h"
#include "chardev/terminal.h"
#include "devtest.h"

struct guest {
	struct chardev *cd;
	size_t room;
	uint8_t got[64];
	size_t len;
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

static const struct chardev_client client = { .room = room, .receive = receive };

static bool quit_asked(struct bench *b)
{
	pthread_mutex_lock(&b->lock);
	bool asked = b->calls != 0;
	pthread_mutex_unlock(&b->lock);
	return asked;
}

/* The child's side: a VM's worth of serial line on the pty. Status 0 if all went as it should. */
static int child(void)
{
	struct bench b;
	struct chardev *cd, *second;
	struct guest g = { .room = 3 };
	struct termios before, during, after;
	bench_start(&b);
	tcgetattr(0, &before);
	struct chardev_config config = { .loop = b.loop, .quit = bench_call, .opaque = &b };
	if (chardev_open(&cd, "stdio", &config, NULL) != 0)
		return 10;
	if (chardev_open(&second, "stdio", &config, NULL) == 0)
		return 11; /* the terminal is taken */
	g.cd = cd;
	chardev_set_client(cd, &client, &g);
	tcgetattr(0, &during);
	if ((during.c_lflag & (ICANON | ECHO | ISIG)) || !(during.c_oflag & OPOST))
		return 12;
	if (write(1, "ready", 5) != 5)
		return 13;
	bench_run(&b);
	for (int i = 0; i < 3000 && !quit_asked(&b); i++)
		bench_sleep_us(1000);
	pthread_mutex_lock(&b.lock);
	bool ok = b.calls == 1 && g.len == 3 && memcmp(g.got, "a\1\3", 3) == 0;
	g.room = 8; /* room again: the rest comes without anything typed */
	chardev_resume(cd);
	ok = ok && g.len == 5 && memcmp(g.got, "a\1\3bc", 5) == 0;
	pthread_mutex_unlock(&b.lock);
	bench_halt(&b);
	chardev_close(cd);
	tcgetattr(0, &after);
	bench_stop(&b);
	if (memcmp(&before.c_lflag, &after.c_lflag, sizeof(before.c_lflag)) != 0)
		return 14;
	return ok ? 0 : 15;
}

static void read_until(int fd, const char *what)
{
	char text[4096] = "";
	size_t len = 0;
	while (!strstr(text, what)) {
		ssize_t n = read(fd, text + len, sizeof(text) - 1 - len);
		assert_true(n > 0);
		len += (size_t)n;
		text[len] = 0;
	}
}

static void escape_key(void **state)
{
	(void)state;
	int master;
	pid_t pid = forkpty(&master, NULL, NULL, NULL);
	assert_true(pid >= 0);
	if (pid == 0)
		_exit(child());
	read_until(master, "ready");
	/* a, Ctrl-A itself, Ctrl-C, help, two more that must wait for room, quit */
	static const char keys[] = "a\1\1\3\1hbc";
	assert_int_equal(write(master, keys, sizeof(keys) - 1), sizeof(keys) - 1);
	read_until(master, "Ctrl-A x");
	assert_int_equal(write(master, "\1x", 2), 2);
	int status;
	assert_int_equal(waitpid(pid, &status, 0), pid);
	assert_true(WIFEXITED(status));
	assert_int_equal(WEXITSTATUS(status), 0);
	close(master);
}

static void die(int sig)
{
	terminal_restore();
	signal(sig, SIG_DFL);
	raise(sig);
}

static void restored_from_a_signal_handler(void **state)
{
	(void)state;
	int master, slave;
	struct termios before, after;
	assert_int_equal(openpty(&master, &slave, NULL, NULL, NULL), 0);
	tcgetattr(slave, &before);
	pid_t pid = fork();
	if (pid == 0) {
		setsid();
		ioctl(slave, TIOCSCTTY, 0);
		signal(SIGTERM, die);
		if (terminal_raw(slave) != 0)
			_exit(1);
		raise(SIGTERM);
		_exit(2);
	}
	int status;
	assert_int_equal(waitpid(pid, &status, 0), pid);
	assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGTERM);
	tcgetattr(slave, &after);
	assert_int_equal(before.c_lflag, after.c_lflag);
	assert_int_equal(before.c_iflag, after.c_iflag);
	close(master);
	close(slave);
}

/* Input from a regular file or /dev/null, which epoll cannot watch. */
static void input_from_a_file(void **state)
{
	(void)state;
	struct bench b;
	struct chardev *cd;
	struct guest g = { .room = 64 };
	char path[] = "/tmp/trapline-chardev-XXXXXX";
	bench_start(&b);
	int fd = mkstemp(path), saved = dup(0);
	unlink(path);
	assert_int_equal(write(fd, "from a file", 11), 11);
	lseek(fd, 0, SEEK_SET);
	dup2(fd, 0);
	struct chardev_config config = { .loop = b.loop };
	assert_int_equal(chardev_open(&cd, "stdio", &config, NULL), 0);
	pthread_mutex_lock(&b.lock);
	chardev_set_client(cd, &client, &g);
	pthread_mutex_unlock(&b.lock);
	bench_run(&b);
	bench_sleep_us(100000);
	bench_halt(&b);
	assert_int_equal(g.len, 11);
	assert_memory_equal(g.got, "from a file", 11);
	chardev_close(cd);
	dup2(saved, 0);
	close(saved);
	close(fd);
	bench_stop(&b);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(escape_key),
		cmocka_unit_test(restored_from_a_signal_handler),
		cmocka_unit_test(input_from_a_file),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
