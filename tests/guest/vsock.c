/*
 * AF_VSOCK in the guest, for tests/integration/test_vsock.py, which builds it statically into an initramfs of its own:
 *   vsock connect CID PORT   standard input goes there, what comes back to standard output; ends when both have ended
 *   vsock listen PORT        the same with the first connection that comes
 *   vsock echo PORT N        echo the next N connections, all at the same time
 */
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <linux/vm_sockets.h>

static int fail(const char *what)
{
	printf("vsock: %s: %s\n", what, strerror(errno));
	return 1;
}

static int write_all(int fd, const char *data, ssize_t len)
{
	while (len > 0) {
		ssize_t n = write(fd, data, (size_t)len);
		if (n < 0)
			return -1;
		data += n;
		len -= n;
	}
	return 0;
}

/* `in` to the socket, the socket to `out`. */
static int relay(int fd, int in, int out)
{
	static char data[65536];
	struct pollfd p[2] = { { .fd = in, .events = POLLIN }, { .fd = fd, .events = POLLIN } };
	while (p[0].fd >= 0 || p[1].fd >= 0) {
		if (poll(p, 2, -1) < 0)
			return fail("poll");
		for (int i = 0; i < 2; i++) {
			if (p[i].fd < 0 || !p[i].revents)
				continue;
			ssize_t n = read(p[i].fd, data, sizeof(data));
			if (n < 0)
				return fail("read");
			if (n == 0) {
				p[i].fd = -1;
				if (i == 0)
					shutdown(fd, SHUT_WR);
			} else if (write_all(i ? out : fd, data, n) < 0) {
				return fail("write");
			}
		}
	}
	return 0;
}

static int listen_at(unsigned port)
{
	struct sockaddr_vm vm = { .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = port };
	int fd = socket(AF_VSOCK, SOCK_STREAM, 0);
	if (fd < 0 || bind(fd, (struct sockaddr *)&vm, sizeof(vm)) < 0 || listen(fd, 64) < 0)
		exit(fail("listen"));
	return fd;
}

int main(int argc, char **argv)
{
	if (argc == 4 && !strcmp(argv[1], "connect")) {
		struct sockaddr_vm vm = { .svm_family = AF_VSOCK, .svm_cid = (unsigned)atoi(argv[2]), .svm_port = (unsigned)atoi(argv[3]) };
		int fd = socket(AF_VSOCK, SOCK_STREAM, 0);
		if (fd < 0 || connect(fd, (struct sockaddr *)&vm, sizeof(vm)) < 0)
			return fail("connect");
		return relay(fd, 0, 1);
	}
	if (argc == 3 && !strcmp(argv[1], "listen")) {
		int fd = accept(listen_at((unsigned)atoi(argv[2])), NULL, NULL);
		return fd < 0 ? fail("accept") : relay(fd, 0, 1);
	}
	if (argc == 4 && !strcmp(argv[1], "echo")) {
		int listener = listen_at((unsigned)atoi(argv[2])), failed = 0;
		for (int i = 0; i < atoi(argv[3]); i++) {
			int fd = accept(listener, NULL, NULL);
			if (fd < 0)
				return fail("accept");
			if (fork() == 0) {
				char data[4096];
				ssize_t n;
				while ((n = read(fd, data, sizeof(data))) > 0 && write_all(fd, data, n) == 0)
					;
				_exit(n < 0);
			}
			close(fd);
		}
		for (int status; wait(&status) > 0;)
			failed += status != 0;
		printf("vsock: %d echoes failed\n", failed);
		return failed != 0;
	}
	printf("vsock: what?\n");
	return 2;
}
