/*
 * --net passt against Debian's passt: started by us and running already; ARP, DHCP and a forwarded port; its end; mistakes.
 * Skipped where there is no passt, or no route to the outside, without which passt does not start.
 */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>

#include "nettest.h"

static uint16_t free_port(void)
{
	struct sockaddr_in in = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	socklen_t len = sizeof(in);
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	assert_int_equal(bind(fd, (struct sockaddr *)&in, sizeof(in)), 0);
	assert_int_equal(getsockname(fd, (struct sockaddr *)&in, &len), 0);
	close(fd);
	return ntohs(in.sin_port);
}

static int connect_to(uint16_t port)
{
	struct sockaddr_in in = { .sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (connect(fd, (struct sockaddr *)&in, sizeof(in)) < 0 && errno != EINPROGRESS) {
		close(fd);
		return -1;
	}
	return fd;
}

static bool is_syn_to_22(const uint8_t *f, size_t len)
{
	return len >= 54 && f[12] == 8 && f[13] == 0 && f[23] == IPPROTO_TCP && f[36] == 0 && f[37] == 22 && (f[47] & 0x12) == 2;
}

static void converse(struct card *c, uint16_t port)
{
	uint8_t frame[400];
	assert_true(card_send(c, frame, card_discover(frame)));
	int n = card_wait_frame(c, card_is_offer);
	assert_true(n >= 0);
	assert_memory_equal(c->frame[n].bytes, CARD_MAC, 6);
	/* It knows where the guest is now: a connection from outside becomes a SYN. */
	int fd = connect_to(port);
	assert_true(fd >= 0);
	assert_true(card_wait_frame(c, is_syn_to_22) >= 0);
	close(fd);
}

static char dir[] = "/tmp/trapline-passt-XXXXXX";

static void test_started(void **state)
{
	(void)state;
	struct card c;
	char spec[128];
	uint16_t port = free_port();
	snprintf(spec, sizeof(spec), "passt,hostfwd=tcp:127.0.0.1:%u-:22,hostfwd=udp:127.0.0.1:%u-:53", port, port);
	card_must_open(&c, spec);
	assert_true(net_info(c.net)->link);
	assert_int_equal(net_info(c.net)->mtu, 65520);
	card_lock(&c);
	net_set_guest_offloads(c.net, NET_GIVES_CSUM);
	card_unlock(&c);
	converse(&c, port);
	assert_int_equal(c.frame[0].h.flags, NET_DATA_VALID);
	card_close(&c);
	/* It ends with us. */
	for (int i = 0; i < 5000; i++) {
		int fd = connect_to(port), code = 0;
		socklen_t len = sizeof(code);
		bench_sleep_us(1000);
		if (fd >= 0)
			getsockopt(fd, SOL_SOCKET, SO_ERROR, &code, &len);
		close(fd);
		if (fd < 0 || code == ECONNREFUSED)
			return;
	}
	fail_msg("passt still listens");
}

static pid_t start_passt(const char *path, uint16_t port)
{
	char forward[64];
	snprintf(forward, sizeof(forward), "127.0.0.1/%u:22", port);
	pid_t pid = fork();
	if (!pid) {
		fclose(stderr);
		execlp("passt", "passt", "-q", "-f", "-s", path, "-t", forward, (char *)NULL);
		_exit(127);
	}
	struct sockaddr_un un = { .sun_family = AF_UNIX };
	strcpy(un.sun_path, path);
	struct stat st;
	for (int i = 0; i < 5000 && stat(path, &st) < 0; i++)
		bench_sleep_us(1000);
	bench_sleep_us(20000); /* from bind to listen */
	return pid;
}

/* One that runs already; its end and its return. */
static void test_running(void **state)
{
	(void)state;
	struct card c;
	char path[64], spec[128];
	uint16_t port = free_port();
	strcpy(dir + strlen(dir) - 6, "XXXXXX");
	assert_non_null(mkdtemp(dir));
	chmod(dir, 0777); /* passt becomes nobody */
	snprintf(path, sizeof(path), "%s/s", dir);
	pid_t pid = start_passt(path, port);
	snprintf(spec, sizeof(spec), "passt,mtu=1500,socket=%s", path);
	card_must_open(&c, spec);
	assert_int_equal(net_info(c.net)->mtu, 1500);
	converse(&c, port);
	kill(pid, SIGKILL);
	waitpid(pid, NULL, 0);
	assert_true(card_wait_link(&c, false));
	uint8_t frame[400];
	assert_true(card_send(&c, frame, card_discover(frame))); /* lost, not waited for */
	unlink(path);
	pid = start_passt(path, port);
	assert_true(card_wait_link(&c, true));
	card_lock(&c);
	card_forget(&c);
	card_unlock(&c);
	converse(&c, port);
	card_close(&c);
	kill(pid, SIGKILL);
	waitpid(pid, NULL, 0);
	unlink(path);
	rmdir(dir);
}

static void refuse(const char *value, const char *words)
{
	struct card c;
	struct error err = { "" };
	if (card_open(&c, value, &err) >= 0)
		fail_msg("%s: was taken", value);
	if (!strstr(err.text, words) || strncmp(err.text, "--net", 5))
		fail_msg("%s: \"%s\" does not say \"%s\"", value, err.text, words);
}

static void test_mistakes(void **state)
{
	(void)state;
	refuse("passt,path=/nowhere/passt", "there is no program");
	refuse("passt,path=/etc/passwd", "cannot start");
	refuse("passt,path=/bin/false", "did not start");
	refuse("passt,mtu=100000", "mtu");
	refuse("passt,hostfwd=tcp:22", "hostfwd");
	refuse("passt,hostfwd=tcp:127.0.0.1:0-:22", "hostfwd");
	refuse("passt,hostfwd=tcp:127.0.0.1:99999-:22", "hostfwd");
	refuse("passt,hostfwd=sctp::1-:22", "hostfwd");
	refuse("passt,hostfwd=tcp::2222-10.0.2.15:22", "leave the guest's address out");
	refuse("passt,args=--no-such-option", "did not start");
	refuse("passt,socket=/nowhere/s", "is passt running");
	refuse("passt,socket=/nowhere/s,args=-4", "leave socket= out");
	/* What passt itself says reaches the user. */
	refuse("passt,hostfwd=tcp:198.51.100.77:2222-:22", "Failed to bind");
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_started),
		cmocka_unit_test(test_running),
		cmocka_unit_test(test_mistakes),
	};
	struct card c;
	struct error err = { "" };
	if (card_open(&c, "passt", &err) == 0) {
		card_close(&c);
	} else if (strstr(err.text, "there is no program") || strstr(err.text, "interface not usable")) {
		printf("test_net_passt: skipped: %s\n", err.text);
		return 77;
	}
	return cmocka_run_group_tests(tests, NULL, NULL);
}
