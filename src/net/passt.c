/*
 * passt: user-mode networking in a process of its own, which we start (with one end of a socket pair) or find at a socket.
 *
 * A passt that we start tells that it is ready by going into the background: the process that we started exits 0 and its stderr
 * ends; else the last line there says what it did not like. Started as root it becomes nobody by itself. It ends when our end
 * of the socket closes, however we die (its --fd implies --one-off), so nobody has to end it.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/error.h"
#include "base/keyval.h"
#include "base/log.h"
#include "base/sock.h"
#include "net/backend.h"
#include "net/stream.h"
#include "vm/loop.h"

#define CHILD_FD 3
#define MAX_ARGS 96
#define MAX_FORWARDS 16
#define START_TIMEOUT_MS 10000
#define RETRY_NS NS_PER_SEC
#define MTU_MAX 65520 /* what passt takes: the longest frame, rounded down to words */

extern char **environ;

struct passt {
	struct net net;
	struct stream stream;
	struct sock_addr addr; /* socket=; len 0: we started it */
	struct vtimer retry;
	uint8_t frame[NET_FRAME_MAX]; /* from the guest, made whole */
	bool lost; /* said that it is gone */
};

static struct passt *of(struct net *n)
{
	return (struct passt *)n;
}

/* --- frames --- */

static bool send_frame(struct net *n, unsigned q, const struct net_header *h, const struct iovec *iov, unsigned niov)
{
	struct passt *p = of(n);
	struct iovec whole;
	(void)q;
	if (h->gso_type != NET_GSO_NONE || (h->flags & NET_NEEDS_CSUM)) {
		if (!stream_reserve(&p->stream, STREAM_FRAME_ROOM))
			return false; /* before the work, not after */
		size_t len = net_gather(p->frame, NET_FRAME_MAX, iov, niov);
		/* A large packet is as good to passt as many: it only looks at the payload. */
		if (h->gso_type != NET_GSO_NONE ? net_whole_packet(h, p->frame, len) : net_finish_checksum(h, p->frame, len)) {
			n->stats.tx_dropped++;
			return true;
		}
		whole = (struct iovec){ p->frame, len };
		iov = &whole;
		niov = 1;
	}
	enum stream_sent r = stream_send(&p->stream, iov, niov);
	if (r == STREAM_LOST)
		n->stats.tx_dropped++;
	return r != STREAM_FULL;
}

static bool on_frame(void *opaque, const uint8_t *frame, size_t len)
{
	struct passt *p = opaque;
	/* passt made the checksums, on this host, out of data that TCP or UDP had verified. */
	const struct net_header h = { .flags = p->net.guest_offloads & NET_GIVES_CSUM ? NET_DATA_VALID : 0 };
	const struct iovec iov = { (void *)frame, len };
	return net_deliver(&p->net, 0, &h, &iov, 1);
}

static void on_writable(void *opaque)
{
	struct passt *p = opaque;
	net_writable(&p->net, 0);
}

static void flush(struct net *n)
{
	stream_flush(&of(n)->stream);
}

static void resume(struct net *n)
{
	stream_resume(&of(n)->stream);
}

/* --- the connection --- */

static void on_closed(void *opaque, const char *why)
{
	struct passt *p = opaque;
	if (!p->lost)
		log_warn("--net passt: passt is gone (%s); %s", why,
			 p->addr.len ? "waiting for it to come back" : "this network stays down until the VM is started again");
	p->lost = true;
	net_set_link(&p->net, false);
	if (p->addr.len)
		vtimer_arm(&p->retry, clock_ns() + RETRY_NS);
}

static void on_retry(void *opaque)
{
	struct passt *p = opaque;
	if (p->stream.fd >= 0)
		return;
	int fd = sock_connect(&p->addr);
	if (fd < 0 || stream_start(&p->stream, fd)) {
		vtimer_arm(&p->retry, clock_ns() + RETRY_NS);
		return;
	}
	p->lost = false;
	log_info("--net passt: connected again");
	net_set_link(&p->net, true);
}

/* --- starting it --- */

/* passt's own way to say it: [ADDR/]PORT:GUEST_PORT. */
static int translate_forward(const char *spec, char *to, size_t room, bool *udp, struct error *err)
{
	char host[64] = "", guest[64] = "";
	unsigned port, guest_port;
	int end = 0;
	*udp = !strncmp(spec, "udp:", 4);
	const char *s = *udp || !strncmp(spec, "tcp:", 4) ? spec + 4 : NULL;
	const char *dash = s ? strchr(s, '-') : NULL;
	if (!dash)
		goto bad;
	/* Each side is ADDR:PORT with the address optional, in brackets if it is of IPv6. */
	const char *colon = memrchr(s, ':', (size_t)(dash - s));
	const char *guest_colon = strrchr(dash, ':');
	if (!colon || !guest_colon || colon - s >= (int)sizeof(host) || guest_colon - dash - 1 >= (int)sizeof(guest))
		goto bad;
	memcpy(host, s, (size_t)(colon - s));
	memcpy(guest, dash + 1, (size_t)(guest_colon - dash - 1));
	if (sscanf(colon, ":%5u-%n", &port, &end) != 1 || colon + end != dash + 1 || sscanf(guest_colon, ":%5u%n", &guest_port, &end) != 1 ||
	    guest_colon[end] || port < 1 || port > 65535 || guest_port < 1 || guest_port > 65535)
		goto bad;
	if (guest[0])
		return error_set(err, EINVAL,
				 "--net passt: hostfwd=%s: passt has one guest and forwards to it alone; leave the guest's address out, as in tcp::%u-:%u",
				 spec, port, guest_port);
	const char *address = host;
	if (host[0] == '[' && host[strlen(host) - 1] == ']') {
		host[strlen(host) - 1] = '\0';
		address++;
	}
	snprintf(to, room, "%s%s%u:%u", address, *address ? "/" : "", port, guest_port);
	return 0;
bad:
	return error_set(err, EINVAL, "--net passt: hostfwd=%s: write tcp:ADDRESS:PORT-:GUESTPORT (or udp:), for example tcp:127.0.0.1:2222-:22", spec);
}

/* What it says about itself, without its complaints about a missing syslog: the last line that is left. */
static void last_line(char *text, char *line, size_t room)
{
	char *save, *last = NULL;
	for (char *l = strtok_r(text, "\n", &save); l; l = strtok_r(NULL, "\n", &save)) {
		if (strncmp(l, "Failed to send ", 15) && strncmp(l, "Don't run as root", 17))
			last = l;
	}
	snprintf(line, room, "%s", last ? last : "it gave no reason");
}

/* Read what it says until it is ready or ends. False: neither came in time. */
static bool wait_ready(int fd, char *text, size_t room)
{
	uint64_t deadline = clock_ns() + START_TIMEOUT_MS * 1000000ull;
	size_t len = 0;
	char buf[512];
	for (;;) {
		uint64_t now = clock_ns();
		struct pollfd p = { .fd = fd, .events = POLLIN };
		if (now >= deadline || poll(&p, 1, (int)((deadline - now) / 1000000) + 1) == 0)
			return false;
		ssize_t n = read(fd, buf, sizeof(buf));
		if (n == 0)
			break;
		if (n < 0 && errno != EINTR)
			break;
		for (ssize_t i = 0; i < n; i++) {
			if (len == room - 1) { /* the end is what matters */
				memmove(text, text + room / 2, room - 1 - room / 2);
				len -= room / 2;
			}
			text[len++] = buf[i];
		}
	}
	text[len] = '\0';
	return true;
}

/* Its end, or that of our patience. What closes its stderr and goes on is not passt. */
static bool wait_end(pid_t pid, int *status)
{
	uint64_t deadline = clock_ns() + START_TIMEOUT_MS * 1000000ull;
	for (;;) {
		pid_t r = waitpid(pid, status, WNOHANG);
		if (r == pid || (r < 0 && errno != EINTR))
			return true;
		if (clock_ns() >= deadline)
			return false;
		poll(NULL, 0, 1);
	}
}

static int spawn(const char *path, char **argv, int sock, int err_fd, pid_t *pid)
{
	posix_spawn_file_actions_t files;
	posix_spawnattr_t attr;
	sigset_t none, all;
	sigemptyset(&none);
	sigfillset(&all);
	int r = posix_spawn_file_actions_init(&files);
	if (r)
		return -r;
	r = posix_spawnattr_init(&attr);
	if (r) {
		posix_spawn_file_actions_destroy(&files);
		return -r;
	}
	posix_spawn_file_actions_addopen(&files, 0, "/dev/null", O_RDWR, 0);
	posix_spawn_file_actions_adddup2(&files, 0, 1);
	posix_spawn_file_actions_adddup2(&files, err_fd, 2);
	posix_spawn_file_actions_adddup2(&files, sock, CHILD_FD);
	/* The main thread has signals blocked that end a program. */
	posix_spawnattr_setsigmask(&attr, &none);
	posix_spawnattr_setsigdefault(&attr, &all);
	posix_spawnattr_setflags(&attr, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);
	r = posix_spawnp(pid, path, &files, &attr, argv, environ);
	posix_spawnattr_destroy(&attr);
	posix_spawn_file_actions_destroy(&files);
	return -r;
}

/* Start it and wait until it is ready: our end of the socket, or -errno. */
static int start(const char *path, char **argv, struct error *err)
{
	int pair[2] = { -1, -1 }, text[2] = { -1, -1 };
	char said[4096], line[256];
	pid_t pid;
	int r = 0;
	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) < 0 || pipe2(text, O_CLOEXEC) < 0) {
		r = error_set(err, errno, "--net passt: cannot make a socket for it: %s", strerror(errno));
		goto out;
	}
	/* dup2 of a descriptor to itself would leave it to be closed; these must not be where the child's go. */
	for (int i = 0; i < 2; i++) {
		int *fd = i ? &text[1] : &pair[1];
		int high = fcntl(*fd, F_DUPFD_CLOEXEC, CHILD_FD + 1);
		if (high < 0) {
			r = error_set(err, errno, "--net passt: cannot make a socket for it: %s", strerror(errno));
			goto out;
		}
		close(*fd);
		*fd = high;
	}
	r = spawn(path, argv, pair[1], text[1], &pid);
	if (r == -ENOENT) {
		r = error_set(err, ENOENT, "--net passt: there is no program %s; install it (Debian: apt install passt) or name it with path=", path);
		goto out;
	}
	if (r) {
		r = error_set(err, -r, "--net passt: cannot start %s: %s", path, strerror(-r));
		goto out;
	}
	close(pair[1]);
	close(text[1]);
	pair[1] = text[1] = -1;
	int status = 0;
	bool in_time = wait_ready(text[0], said, sizeof(said));
	if (!in_time || !(in_time = wait_end(pid, &status))) {
		kill(pid, SIGKILL);
		while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
			;
	}
	if (!in_time) {
		r = error_set(err, ETIMEDOUT, "--net passt: %s did not get ready within %d seconds; is it passt?", path, START_TIMEOUT_MS / 1000);
	} else if (!WIFEXITED(status) || WEXITSTATUS(status)) {
		last_line(said, line, sizeof(line));
		r = error_set(err, EIO, "--net passt: passt did not start: %s", line);
	}
	if (!r) {
		r = pair[0];
		pair[0] = -1;
	}
out:
	for (int i = 0; i < 2; i++) {
		if (pair[i] >= 0)
			close(pair[i]);
		if (text[i] >= 0)
			close(text[i]);
	}
	return r;
}

/* Its command line out of our keys. */
static int open_started(struct passt *p, struct keyval *kv, uint64_t mtu, struct error *err)
{
	char forward[MAX_FORWARDS][96], mtu_text[16], args[KEYVAL_TEXT];
	char *argv[MAX_ARGS + 1];
	unsigned n = 0;
	const char *path = keyval_get(kv, "path"), *more = keyval_get(kv, "args"), *spec;
	if (!path)
		path = "passt";
	snprintf(mtu_text, sizeof(mtu_text), "%u", (unsigned)mtu);
	char *fixed[] = { (char *)path, "--quiet", "--fd", "3", "--mtu", mtu_text };
	_Static_assert(CHILD_FD == 3, "said to passt in words");
	for (size_t i = 0; i < sizeof(fixed) / sizeof(fixed[0]); i++)
		argv[n++] = fixed[i];
	for (unsigned i = 0; (spec = keyval_nth(kv, "hostfwd", i)); i++) {
		bool udp;
		if (i == MAX_FORWARDS)
			return error_set(err, E2BIG, "--net passt: more than %d hostfwd=; give port ranges to passt itself with args=-t RANGE", MAX_FORWARDS);
		int r = translate_forward(spec, forward[i], sizeof(forward[i]), &udp, err);
		if (r)
			return r;
		argv[n++] = udp ? "-u" : "-t";
		argv[n++] = forward[i];
	}
	char *save;
	snprintf(args, sizeof(args), "%s", more ? more : "");
	for (char *word = strtok_r(args, " ", &save); word; word = strtok_r(NULL, " ", &save)) {
		if (n == MAX_ARGS)
			return error_set(err, E2BIG, "--net passt: too many words in args=; start passt yourself and name it with socket=");
		argv[n++] = word;
	}
	argv[n] = NULL;
	int fd = start(path, argv, err);
	if (fd < 0)
		return fd;
	int r = stream_start(&p->stream, fd);
	snprintf(p->net.describe, sizeof(p->net.describe), "passt, started here");
	return r ? error_set(err, -r, "--net passt: cannot watch its socket: %s", strerror(-r)) : 0;
}

static int open_running(struct passt *p, struct keyval *kv, const char *path, struct error *err)
{
	static const char *const not_ours[] = { "path", "args", "hostfwd" };
	char what[160];
	for (size_t i = 0; i < sizeof(not_ours) / sizeof(not_ours[0]); i++) {
		if (keyval_get(kv, not_ours[i]))
			return error_set(err, EINVAL, "--net passt: %s= is for a passt that Trapline starts; give it to the one behind socket= itself, or leave socket= out",
					 not_ours[i]);
	}
	snprintf(what, sizeof(what), "--net passt: socket=%.120s", path);
	int r = sock_unix(&p->addr, path, what, err);
	if (r)
		return r;
	int fd = sock_connect(&p->addr);
	if (fd < 0)
		return error_set(err, -fd, "%s: cannot connect: %s; is passt running with --socket %.120s?", what, strerror(-fd), path);
	r = stream_start(&p->stream, fd);
	snprintf(p->net.describe, sizeof(p->net.describe), "passt at %.120s", path);
	return r ? error_set(err, -r, "%s: cannot watch it: %s", what, strerror(-r)) : 0;
}

static void close_passt(struct net *n)
{
	struct passt *p = of(n);
	vtimer_cancel(&p->retry);
	stream_fini(&p->stream);
	free(p);
}

static const struct stream_ops stream_ops = { .frame = on_frame, .writable = on_writable, .closed = on_closed };

static int open_passt(struct net **out, struct keyval *kv, struct loop *loop, struct error *err)
{
	struct passt *p = calloc(1, sizeof(*p));
	if (!p)
		return error_set(err, ENOMEM, "--net passt: out of memory");
	net_init(&p->net, &net_backend_passt, loop);
	vtimer_init(&p->retry, loop, on_retry, p);
	uint64_t mtu = MTU_MAX;
	int r = stream_init(&p->stream, loop, &stream_ops, p);
	if (r)
		error_set(err, -r, "--net passt: out of memory");
	if (!r)
		r = keyval_u64(kv, "mtu", 1280, MTU_MAX, &mtu, err);
	const char *socket = keyval_get(kv, "socket");
	if (!r)
		r = socket ? open_running(p, kv, socket, err) : open_started(p, kv, mtu, err);
	if (r) {
		close_passt(&p->net);
		return r;
	}
	p->net.info.caps = NET_CAN_CSUM | NET_CAN_TSO4 | NET_CAN_TSO6 | NET_GIVES_CSUM;
	p->net.info.mtu = (uint16_t)mtu;
	*out = &p->net;
	return 0;
}

const struct net_backend net_backend_passt = {
	.type = "passt",
	.open = open_passt,
	.close = close_passt,
	.send = send_frame,
	.flush = flush,
	.resume = resume,
};
