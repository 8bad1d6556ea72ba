/*
 * tap: a network interface of the host, made for this VM or attached to (Linux, Documentation/networking/tuntap).
 *
 * Frames pass with their struct net_header in front (IFF_VNET_HDR, 12 bytes), so large frames and open checksums stay as they are up to the
 * host's own network stack. One descriptor a queue pair (IFF_MULTI_QUEUE); those of pairs not in use are detached. Needs CAP_NET_ADMIN to make
 * an interface; attaching to one that was made for the user (ip tuntap add user NAME) needs no right but /dev/net/tun.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/error.h"
#include "base/keyval.h"
#include "base/log.h"
#include "net/backend.h"
#include "vm/loop.h"

#define TUN_PATH "/dev/net/tun"
#define HEADER sizeof(struct net_header)
#define MAX_PAIRS 8
#define FRAMES_A_ROUND 64 /* then others on the loop get their turn */
#define PARTS 64	  /* of a frame; one in more is copied together first */

/* Not in every <linux/if_tun.h> that we may meet. */
#ifndef TUN_F_USO4
#define TUN_F_USO4 0x20
#define TUN_F_USO6 0x40
#endif

_Static_assert(HEADER == 12, "the header with num_buffers, virtio 1.2 5.1.6");

struct pair {
	struct tap *tap;
	unsigned q;
	int fd;
	bool attached, watching;
	size_t held;	      /* bytes of a frame (with its header) that the guest has no room for */
	uint32_t want_out;    /* EPOLLOUT: a frame had no room */
	uint8_t *frame;	      /* HEADER + NET_FRAME_MAX */
};

struct tap {
	struct net net;
	char ifname[IFNAMSIZ];
	unsigned npairs;
	struct pair pair[MAX_PAIRS];
	bool broken; /* said that the interface is gone */
};

static struct tap *of(struct net *n)
{
	return (struct tap *)n;
}

static void on_ready(void *opaque, uint32_t revents);

static void watch(struct pair *p)
{
	uint32_t want = (p->attached && !p->held ? EPOLLIN : 0) | p->want_out;
	struct loop *loop = p->tap->net.loop;
	if (want)
		p->watching = loop_add_fd(loop, p->fd, want, on_ready, p) == 0;
	else if (p->watching)
		loop_del_fd(loop, p->fd);
	p->watching = p->watching && want;
}

/* The interface was deleted under us, or the like: one line, then a cable that is not plugged in. */
static void broken(struct tap *t, int code)
{
	log_warn_once(t->broken, "--net tap: %s cannot be used any more: %s; the network stays down", t->ifname, strerror(code));
	bool owed[MAX_PAIRS];
	for (unsigned i = 0; i < t->npairs; i++) {
		owed[i] = t->pair[i].want_out;
		t->pair[i].attached = false;
		t->pair[i].want_out = 0;
		t->pair[i].held = 0;
		watch(&t->pair[i]);
	}
	net_set_link(&t->net, false);
	for (unsigned i = 0; i < t->npairs; i++) {
		if (owed[i]) /* its frames are lost from now on, but they need not wait */
			net_writable(&t->net, i);
	}
}

/* --- to the guest --- */

static bool deliver(struct pair *p)
{
	struct net_header h;
	memcpy(&h, p->frame, HEADER);
	const struct iovec iov = { p->frame + HEADER, p->held - HEADER };
	if (!net_deliver(&p->tap->net, p->q, &h, &iov, 1))
		return false;
	p->held = 0;
	return true;
}

static void receive(struct pair *p)
{
	for (int i = 0; i < FRAMES_A_ROUND && p->attached && !p->held; i++) {
		ssize_t n = read(p->fd, p->frame, HEADER + NET_FRAME_MAX);
		if (n < 0 && errno != EINTR) {
			if (errno != EAGAIN)
				broken(p->tap, errno);
			return;
		}
		if (n <= (ssize_t)HEADER)
			continue;
		p->held = (size_t)n;
		if (!deliver(p))
			watch(p);
	}
}

static void resume(struct net *n)
{
	struct tap *t = of(n);
	for (unsigned i = 0; i < t->npairs; i++) {
		struct pair *p = &t->pair[i];
		if (p->held && deliver(p))
			watch(p);
	}
}

/* --- from the guest --- */

static bool send_frame(struct net *n, unsigned q, const struct net_header *h, const struct iovec *iov, unsigned niov)
{
	struct tap *t = of(n);
	struct pair *p = &t->pair[q < t->npairs ? q : 0];
	uint8_t linear[NET_FRAME_MAX];
	struct iovec parts[1 + PARTS];
	if (!p->attached) {
		n->stats.tx_dropped++;
		return true;
	}
	parts[0] = (struct iovec){ (void *)h, HEADER };
	if (niov > PARTS) {
		size_t len = 0;
		for (unsigned i = 0; i < niov; i++) {
			if (iov[i].iov_len > sizeof(linear) - len) {
				n->stats.tx_dropped++;
				return true;
			}
			memcpy(linear + len, iov[i].iov_base, iov[i].iov_len);
			len += iov[i].iov_len;
		}
		parts[1] = (struct iovec){ linear, len };
		niov = 1;
	} else {
		memcpy(parts + 1, iov, niov * sizeof(*iov));
	}
	ssize_t w;
	do
		w = writev(p->fd, parts, (int)niov + 1);
	while (w < 0 && errno == EINTR);
	if (w < 0 && errno == EAGAIN) {
		p->want_out = EPOLLOUT;
		watch(p);
		return false;
	}
	if (w < 0) {
		n->stats.tx_dropped++;
		/* EIO: the interface is down. EINVAL: a header that does not fit its frame: the guest's business. */
		if (errno == EBADFD || errno == ENODEV)
			broken(t, errno);
	}
	return true;
}

static void on_ready(void *opaque, uint32_t revents)
{
	struct pair *p = opaque;
	if (p->want_out && (revents & (EPOLLOUT | EPOLLERR | EPOLLHUP))) {
		p->want_out = 0;
		watch(p);
		net_writable(&p->tap->net, p->q);
	}
	if (revents & ~(uint32_t)EPOLLOUT)
		receive(p);
}

/* --- what the guest agreed to --- */

static unsigned tun_offloads(unsigned caps)
{
	unsigned f = 0;
	if (!(caps & NET_GIVES_CSUM))
		return 0; /* large frames have open checksums */
	f |= TUN_F_CSUM;
	if (caps & NET_GIVES_TSO4)
		f |= TUN_F_TSO4;
	if (caps & NET_GIVES_TSO6)
		f |= TUN_F_TSO6;
	if (caps & NET_GIVES_USO)
		f |= TUN_F_USO4 | TUN_F_USO6;
	return f;
}

static void changed(struct net *n)
{
	struct tap *t = of(n);
	/* The interface has one setting; any of its descriptors will do. */
	if (ioctl(t->pair[0].fd, TUNSETOFFLOAD, (unsigned long)tun_offloads(n->guest_offloads)) < 0)
		log_debug("--net tap: %s: cannot set offloads: %s", t->ifname, strerror(errno));
	for (unsigned i = 0; i < t->npairs && !t->broken && t->npairs > 1; i++) {
		struct pair *p = &t->pair[i];
		bool want = i < n->pairs;
		struct ifreq ifr = { .ifr_flags = (short)(want ? IFF_ATTACH_QUEUE : IFF_DETACH_QUEUE) };
		if (want == p->attached || ioctl(p->fd, TUNSETQUEUE, &ifr) < 0)
			continue;
		p->attached = want;
		if (!want)
			p->held = 0;
		watch(p);
	}
}

/* --- open and close --- */

static int refused(const struct tap *t, int code, struct error *err)
{
	switch (code) {
	case EPERM:
	case EACCES:
		return error_set(err, code,
				 "--net tap: no right to use %s; start with CAP_NET_ADMIN, or let an administrator make it for you: "
				 "ip tuntap add %s mode tap user $USER",
				 t->ifname[0] ? t->ifname : "a new interface", t->ifname[0] ? t->ifname : "tap0");
	case EBUSY:
		return error_set(err, EBUSY, "--net tap: %s is in use by another program; choose another ifname=", t->ifname);
	case EINVAL:
		return error_set(err, EINVAL, "--net tap: %s is no tap interface, or has not the queues that queues=%u asks for; make it with "
				 "ip tuntap add %s mode tap%s", t->ifname, t->npairs, t->ifname, t->npairs > 1 ? " multi_queue" : "");
	default:
		return error_set(err, code, "--net tap: cannot open %s: %s", t->ifname[0] ? t->ifname : "a new interface", strerror(code));
	}
}

/* One more descriptor of the interface; the first one makes it if there is none. */
static int open_pair(struct tap *t, struct pair *p, struct error *err)
{
	p->fd = open(TUN_PATH, O_RDWR | O_CLOEXEC | O_NONBLOCK);
	if (p->fd < 0 && (errno == ENOENT || errno == ENXIO || errno == ENODEV))
		return error_set(err, errno, "--net tap: this host has no " TUN_PATH "; load the module tun (modprobe tun), or in a container give it that device");
	if (p->fd < 0)
		return error_set(err, errno, "--net tap: cannot open " TUN_PATH ": %s; it needs read and write permission", strerror(errno));
	struct ifreq ifr = { .ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR };
	if (t->npairs > 1)
		ifr.ifr_flags |= IFF_MULTI_QUEUE;
	strcpy(ifr.ifr_name, t->ifname);
	if (ioctl(p->fd, TUNSETIFF, &ifr) < 0)
		return refused(t, errno, err);
	memcpy(t->ifname, ifr.ifr_name, IFNAMSIZ);
	return 0;
}

/* A descriptor that our parent opened for us: fd=N, or fd=N:N:... for queues. */
static int take_fds(struct tap *t, const char *text, struct error *err)
{
	t->npairs = 0;
	for (const char *s = text;;) {
		char *end;
		unsigned long fd = strtoul(s, &end, 10);
		if (end == s || (*end && *end != ':') || fd > 65535 || fd <= STDERR_FILENO)
			return error_set(err, EINVAL, "--net tap: fd=%s: write the number of an open descriptor, or several with colons between: fd=5:6", text);
		if (t->npairs == MAX_PAIRS)
			return error_set(err, E2BIG, "--net tap: fd=%s: more than %d queues; leave some out", text, MAX_PAIRS);
		struct ifreq ifr = { 0 };
		if (ioctl((int)fd, TUNGETIFF, &ifr) < 0)
			return error_set(err, EINVAL, "--net tap: fd=%lu is no open tap descriptor; open " TUN_PATH " with TUNSETIFF first", fd);
		if ((ifr.ifr_flags & (IFF_TAP | IFF_NO_PI | IFF_VNET_HDR)) != (IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
			return error_set(err, EINVAL, "--net tap: fd=%lu was opened with other flags; it needs IFF_TAP, IFF_NO_PI and IFF_VNET_HDR", fd);
		t->pair[t->npairs++].fd = (int)fd;
		memcpy(t->ifname, ifr.ifr_name, IFNAMSIZ);
		fcntl((int)fd, F_SETFL, fcntl((int)fd, F_GETFL) | O_NONBLOCK);
		fcntl((int)fd, F_SETFD, FD_CLOEXEC);
		if (!*end)
			return 0;
		s = end + 1;
	}
}

/* An interface that we made is down; one that was made for us may be up already, and ours to change or not. */
static void bring_up(struct tap *t)
{
	struct ifreq ifr = { 0 };
	memcpy(ifr.ifr_name, t->ifname, IFNAMSIZ);
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return;
	if (ioctl(fd, SIOCGIFFLAGS, &ifr) == 0 && !(ifr.ifr_flags & IFF_UP)) {
		ifr.ifr_flags |= IFF_UP;
		if (ioctl(fd, SIOCSIFFLAGS, &ifr) < 0)
			log_warn("--net tap: %s is down and it takes an administrator to change that: ip link set %s up", t->ifname, t->ifname);
	}
	close(fd);
}

/* vhost-net would move frames inside the kernel; whether there is any is the host's business. */
static int check_vhost(struct keyval *kv, struct error *err)
{
	static const char *const choices[] = { "off", "auto", "on", NULL };
	unsigned vhost = 1;
	int r = keyval_choice(kv, "vhost", choices, &vhost, err);
	if (r || vhost < 2)
		return r;
	if (access("/dev/vhost-net", F_OK) < 0)
		return error_set(err, ENOENT, "--net tap: vhost=on, but this host has no /dev/vhost-net; load the module vhost_net, or leave vhost= out");
	return error_set(err, ENOTSUP, "--net tap: vhost=on: Trapline does not drive /dev/vhost-net; leave vhost= out and frames take the ordinary way");
}

static void close_tap(struct net *n)
{
	struct tap *t = of(n);
	for (unsigned i = 0; i < MAX_PAIRS; i++) {
		struct pair *p = &t->pair[i];
		if (p->watching)
			loop_del_fd(n->loop, p->fd);
		if (p->fd >= 0)
			close(p->fd);
		free(p->frame);
	}
	free(t);
}

static int open_descriptors(struct tap *t, struct keyval *kv, struct error *err)
{
	const char *fds = keyval_get(kv, "fd"), *ifname = keyval_get(kv, "ifname");
	if (fds && ifname)
		return error_set(err, EINVAL, "--net tap: ifname= and fd= name two interfaces; give one of them");
	if (ifname && (!*ifname || strlen(ifname) >= IFNAMSIZ || strchr(ifname, '/')))
		return error_set(err, EINVAL, "--net tap: ifname=%.40s is no name of an interface; use 1 to %d characters such as tap0", ifname, IFNAMSIZ - 1);
	uint64_t queues = 1;
	int r = keyval_u64(kv, "queues", 1, MAX_PAIRS, &queues, err);
	if (r)
		return r;
	t->npairs = (unsigned)queues;
	if (fds) {
		r = take_fds(t, fds, err);
	} else {
		strcpy(t->ifname, ifname ? ifname : "");
		for (unsigned i = 0; i < t->npairs && !r; i++)
			r = open_pair(t, &t->pair[i], err);
	}
	for (unsigned i = 0; i < t->npairs && !r; i++) {
		const int len = HEADER, little = 1;
		if (ioctl(t->pair[i].fd, TUNSETVNETHDRSZ, &len) < 0 || ioctl(t->pair[i].fd, TUNSETVNETLE, &little) < 0)
			r = error_set(err, errno, "--net tap: %s does not take the headers that a guest needs: %s", t->ifname, strerror(errno));
		t->pair[i].frame = malloc(HEADER + NET_FRAME_MAX);
		if (!r && !t->pair[i].frame)
			r = error_set(err, ENOMEM, "--net tap: out of memory");
	}
	return r;
}

static int open_tap(struct net **out, struct keyval *kv, struct loop *loop, struct error *err)
{
	int r = check_vhost(kv, err);
	if (r)
		return r;
	struct tap *t = calloc(1, sizeof(*t));
	if (!t)
		return error_set(err, ENOMEM, "--net tap: out of memory");
	net_init(&t->net, &net_backend_tap, loop);
	for (unsigned i = 0; i < MAX_PAIRS; i++)
		t->pair[i] = (struct pair){ .tap = t, .q = i, .fd = -1, .attached = true };
	r = open_descriptors(t, kv, err);
	for (unsigned i = 0; i < t->npairs && !r; i++) {
		watch(&t->pair[i]);
		if (!t->pair[i].watching)
			r = error_set(err, EINVAL, "--net tap: cannot watch %s", t->ifname);
	}
	if (r) {
		close_tap(&t->net);
		return r;
	}
	bring_up(t);

	const unsigned large = NET_GIVES_CSUM | NET_GIVES_TSO4 | NET_GIVES_TSO6;
	t->net.info.caps = NET_CAN_CSUM | NET_CAN_TSO4 | NET_CAN_TSO6 | large;
	/* Linux 6.2 and later segments UDP too. */
	if (ioctl(t->pair[0].fd, TUNSETOFFLOAD, (unsigned long)tun_offloads(large | NET_GIVES_USO)) == 0)
		t->net.info.caps |= NET_CAN_USO | NET_GIVES_USO;
	t->net.info.queues = t->npairs;
	changed(&t->net);
	snprintf(t->net.describe, sizeof(t->net.describe), "tap, %s, %u queue pair%s", t->ifname, t->npairs, t->npairs > 1 ? "s" : "");
	*out = &t->net;
	return 0;
}

const struct net_backend net_backend_tap = {
	.type = "tap",
	.open = open_tap,
	.close = close_tap,
	.send = send_frame,
	.resume = resume,
	.changed = changed,
};
