/*
 * A vhost-user back end for tests: a disk in memory behind a Unix socket, on a thread of its own, that misbehaves on request. What
 * real back ends make of the front end is for tests/integration/test_vhost.py; this one is for what they never do.
 */
#ifndef TRAPLINE_TESTS_VHOST_PEER_H
#define TRAPLINE_TESTS_VHOST_PEER_H

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define PEER_SECTORS 64
#define PEER_RINGS 4

enum peer_fault {
	PEER_GOOD,
	PEER_BAD_ID,	/* uses a descriptor that is out of range */
	PEER_FREE_ID,	/* one that it was not given */
	PEER_TWICE,	/* the same one twice */
	PEER_LONG,	/* says that it wrote more than there is room */
	PEER_INDEX,	/* a used index far ahead */
	PEER_CLOSE,	/* closes the connection instead of an answer to a request */
	PEER_SPEAK,	/* sends a message that nobody asked for */
	PEER_HOLD,	/* keeps requests */
	PEER_MORE_THAN_SAID, /* good, but writes more than it says */
};

/* Of the conversation at message `at` (front-end message type). */
enum peer_answer { ANSWER_RIGHT, ANSWER_NONE, ANSWER_OTHER_TYPE, ANSWER_HUGE, ANSWER_SHORT, ANSWER_REFUSE, ANSWER_CLOSE };

struct peer_ring {
	uint32_t size;
	uint64_t desc, avail, used; /* its addresses of the front end */
	uint16_t last_avail, used_idx;
	int kick, call;
	bool enabled;
};

struct peer {
	char path[108];
	int listening, fd, channel, wake[2];
	pthread_t thread;
	_Atomic int fault;
	int wrong_at, wrong_how;
	uint64_t features, protocol;
	_Atomic unsigned connections, stops, starts, requests;
	_Atomic bool shrunk;	    /* could make shared memory smaller */
	_Atomic bool announce;	    /* a changed configuration, when woken */
	_Atomic uint64_t acked;
	uint8_t disk[PEER_SECTORS * 512];
	uint64_t capacity;
	uint32_t nregions;
	struct {
		uint64_t gpa, size, user;
		uint8_t *map;
		uint64_t maplen;
	} region[8];
	struct peer_ring ring[PEER_RINGS];
};

struct peer_desc {
	uint64_t addr;
	uint32_t len;
	uint16_t flags, next;
};

static inline void peer_unmap(struct peer *p)
{
	for (unsigned i = 0; i < p->nregions; i++)
		munmap(p->region[i].map, p->region[i].maplen);
	p->nregions = 0;
}

static inline uint8_t *peer_at(struct peer *p, uint64_t addr, bool user)
{
	for (unsigned i = 0; i < p->nregions; i++) {
		uint64_t base = user ? p->region[i].user : p->region[i].gpa;
		if (addr >= base && addr - base < p->region[i].size)
			return p->region[i].map + p->region[i].maplen - p->region[i].size + (addr - base);
	}
	fprintf(stderr, "vhost peer: address 0x%llx is in no region\n", (unsigned long long)addr);
	abort();
}

static inline void peer_use(struct peer *p, struct peer_ring *r, uint32_t id, uint32_t len)
{
	uint8_t *used = peer_at(p, r->used, true);
	uint32_t entry[2] = { id, len };
	memcpy(used + 4 + 8 * (r->used_idx % r->size), entry, 8);
	__atomic_store_n((uint16_t *)(used + 2), ++r->used_idx, __ATOMIC_RELEASE);
}

static inline void peer_call(struct peer_ring *r)
{
	uint64_t one = 1;
	if (write(r->call, &one, 8) != 8)
		abort();
}

/* One virtio-blk request: header, data, status. */
static inline void peer_request(struct peer *p, struct peer_ring *r, uint16_t head)
{
	struct peer_desc *desc = (struct peer_desc *)peer_at(p, r->desc, true), *d = &desc[head];
	uint32_t type = 0, written = 0;
	uint64_t sector = 0;
	p->requests++;
	if (p->fault == PEER_HOLD)
		return;
	memcpy(&type, peer_at(p, d->addr, false), 4);
	memcpy(&sector, peer_at(p, d->addr, false) + 8, 8);
	uint64_t at = sector % PEER_SECTORS * 512;
	while (d->flags & 1) {
		d = &desc[d->next % r->size];
		uint8_t *data = peer_at(p, d->addr, false);
		if (!(d->flags & 1)) {
			*data = 0; /* status */
			written += d->len;
			break;
		}
		uint32_t n = at + d->len > sizeof(p->disk) ? (uint32_t)(sizeof(p->disk) - at) : d->len;
		if (d->flags & 2) {
			memcpy(data, p->disk + at, n);
			written += d->len;
		} else {
			memcpy(p->disk + at, data, n);
		}
		at += n;
	}
	switch (p->fault) {
	case PEER_BAD_ID: peer_use(p, r, r->size + 7, written); break;
	case PEER_FREE_ID: peer_use(p, r, (head + 500u) % r->size, written); break;
	case PEER_TWICE:
		peer_use(p, r, head, written);
		peer_use(p, r, head, written);
		break;
	case PEER_LONG: peer_use(p, r, head, UINT32_MAX); break;
	case PEER_INDEX:
		r->used_idx = (uint16_t)(r->used_idx + 1000);
		peer_use(p, r, head, written);
		break;
	case PEER_MORE_THAN_SAID: peer_use(p, r, head, 1); break;
	default: peer_use(p, r, head, written);
	}
	peer_call(r);
}

static inline void peer_serve_ring(struct peer *p, struct peer_ring *r)
{
	if (!r->enabled)
		return;
	uint8_t *avail = peer_at(p, r->avail, true);
	while (r->last_avail != __atomic_load_n((uint16_t *)(avail + 2), __ATOMIC_ACQUIRE)) {
		if (p->fault == PEER_CLOSE) {
			shutdown(p->fd, SHUT_RDWR);
			return;
		}
		if (p->fault == PEER_SPEAK) {
			uint32_t h[3] = { 1, 5, 0 };
			send(p->fd, h, sizeof(h), MSG_NOSIGNAL);
			return;
		}
		uint16_t head = ((uint16_t *)(avail + 4))[r->last_avail++ % r->size];
		peer_request(p, r, head);
	}
}

static inline void peer_reply(struct peer *p, uint32_t type, const void *payload, uint32_t size)
{
	uint8_t message[12 + 512] = { 0 };
	uint32_t h[3] = { type, 1 | 4, size };
	int how = p->wrong_at == (int)type ? p->wrong_how : ANSWER_RIGHT;
	if (how == ANSWER_NONE)
		return;
	if (how == ANSWER_CLOSE) {
		shutdown(p->fd, SHUT_RDWR);
		return;
	}
	if (how == ANSWER_OTHER_TYPE)
		h[0]++;
	if (how == ANSWER_HUGE)
		h[2] = 0xfffffff0;
	memcpy(message, h, 12);
	memcpy(message + 12, payload, size);
	send(p->fd, message, how == ANSWER_SHORT ? 12 + size / 2 : 12 + size, MSG_NOSIGNAL);
	if (how == ANSWER_SHORT)
		shutdown(p->fd, SHUT_WR);
}

/* False: the connection is over. */
static inline bool peer_message(struct peer *p)
{
	uint32_t h[3];
	uint8_t b[512] = { 0 };
	int fds[8], nfds = 0;
	char room[CMSG_SPACE(sizeof(fds))];
	struct iovec iov = { h, sizeof(h) };
	struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = room, .msg_controllen = sizeof(room) };
	if (recvmsg(p->fd, &m, MSG_WAITALL | MSG_CMSG_CLOEXEC) != sizeof(h))
		return false;
	for (struct cmsghdr *c = CMSG_FIRSTHDR(&m); c; c = CMSG_NXTHDR(&m, c)) {
		nfds = (int)((c->cmsg_len - CMSG_LEN(0)) / sizeof(int));
		memcpy(fds, CMSG_DATA(c), (size_t)nfds * sizeof(int));
	}
	if (h[2] > sizeof(b) || (h[2] && recv(p->fd, b, h[2], MSG_WAITALL) != (ssize_t)h[2]))
		return false;
	uint64_t u;
	uint32_t s[2];
	memcpy(&u, b, 8);
	memcpy(s, b, 8);
	struct peer_ring *r = &p->ring[s[0] % PEER_RINGS];
	bool answered = true;
	switch (h[0]) {
	case 1: u = p->features; peer_reply(p, h[0], &u, 8); break;
	case 15: u = p->protocol; peer_reply(p, h[0], &u, 8); break;
	case 17: u = PEER_RINGS; peer_reply(p, h[0], &u, 8); break;
	case 11:
		s[1] = r->last_avail;
		r->enabled = false;
		p->stops++;
		peer_reply(p, h[0], s, 8);
		break;
	case 24:
		memcpy(b + 12, &p->capacity, 8);
		peer_reply(p, h[0], b, h[2]);
		break;
	default: answered = false;
	}
	switch (h[0]) {
	case 2: p->acked = u; break;
	case 5:
		peer_unmap(p);
		for (unsigned i = 0; i < s[0]; i++) {
			uint64_t e[4];
			memcpy(e, b + 8 + 32 * i, 32);
			p->region[i].gpa = e[0], p->region[i].size = e[1], p->region[i].user = e[2];
			p->region[i].maplen = e[1] + e[3];
			p->region[i].map = mmap(NULL, p->region[i].maplen, PROT_READ | PROT_WRITE, MAP_SHARED, fds[i], 0);
			if (p->region[i].map == MAP_FAILED)
				abort();
			if (ftruncate(fds[i], 0) == 0)
				p->shrunk = true;
			close(fds[i]);
		}
		p->nregions = s[0];
		nfds = 0;
		break;
	case 8: r->size = s[1]; break;
	case 9: {
		uint64_t e[4];
		memcpy(e, b + 8, 32);
		r->desc = e[0], r->used = e[1], r->avail = e[2];
		break;
	}
	case 10: r->last_avail = r->used_idx = (uint16_t)s[1]; break;
	case 12:
	case 13: {
		int *fd = h[0] == 12 ? &r->kick : &r->call;
		if (*fd >= 0)
			close(*fd);
		*fd = fds[0];
		nfds = 0;
		break;
	}
	case 18:
		r->enabled = s[1];
		p->starts += s[1];
		break;
	case 21:
		p->channel = fds[0];
		nfds = 0;
		break;
	}
	while (nfds)
		close(fds[--nfds]);
	if (!answered && h[1] & 8) {
		u = p->wrong_at == (int)h[0] && p->wrong_how == ANSWER_REFUSE;
		peer_reply(p, h[0], &u, 8);
	}
	if (h[0] == 18)
		peer_serve_ring(p, r);
	return true;
}

static inline void peer_forget(struct peer *p)
{
	peer_unmap(p);
	for (unsigned i = 0; i < PEER_RINGS; i++) {
		if (p->ring[i].kick >= 0)
			close(p->ring[i].kick);
		if (p->ring[i].call >= 0)
			close(p->ring[i].call);
		p->ring[i] = (struct peer_ring){ .kick = -1, .call = -1 };
	}
	if (p->channel >= 0)
		close(p->channel);
	if (p->fd >= 0)
		close(p->fd);
	p->channel = p->fd = -1;
}

static inline void *peer_thread(void *opaque)
{
	struct peer *p = opaque;
	for (;;) {
		struct pollfd f[3 + PEER_RINGS] = { { p->wake[0], POLLIN, 0 }, { p->fd < 0 ? p->listening : -1, POLLIN, 0 }, { p->fd, POLLIN, 0 } };
		for (unsigned i = 0; i < PEER_RINGS; i++)
			f[3 + i] = (struct pollfd){ p->ring[i].kick, POLLIN, 0 };
		poll(f, 3 + PEER_RINGS, -1);
		if (f[0].revents) {
			char c;
			if (read(p->wake[0], &c, 1) != 1 || c == 'q')
				break;
			if (c == 'd') { /* drop the connection */
				peer_forget(p);
				continue;
			}
			if (c == 'c' && p->channel >= 0) {
				uint32_t h[3] = { 2, 1, 0 };
				send(p->channel, h, sizeof(h), MSG_NOSIGNAL);
			}
		}
		if (f[1].revents) {
			p->fd = accept(p->listening, NULL, NULL);
			p->connections++;
			continue;
		}
		if (f[2].revents && !peer_message(p)) {
			peer_forget(p);
			continue;
		}
		for (unsigned i = 0; i < PEER_RINGS; i++) {
			uint64_t n;
			if (f[3 + i].revents & POLLIN && p->ring[i].kick == f[3 + i].fd) {
				if (read(p->ring[i].kick, &n, 8) < 0 && errno != EAGAIN)
					abort();
				peer_serve_ring(p, &p->ring[i]);
			}
		}
	}
	peer_forget(p);
	return NULL;
}

static inline void peer_start(struct peer *p)
{
	memset(p, 0, sizeof(*p));
	struct sockaddr_un a = { .sun_family = AF_UNIX };
	snprintf(p->path, sizeof(p->path), "/tmp/trapline-peer-%d", (int)getpid());
	strcpy(a.sun_path, p->path);
	unlink(p->path);
	p->fd = p->channel = -1;
	p->capacity = PEER_SECTORS;
	for (unsigned i = 0; i < PEER_RINGS; i++)
		p->ring[i] = (struct peer_ring){ .kick = -1, .call = -1 };
	p->features = 1ull << 32 | 1ull << 30 | 1 << 9 | 1 << 5 | 1 << 28 | 1 << 29;
	p->protocol = 1 << 0 | 1 << 3 | 1 << 5 | 1 << 9;
	p->listening = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (bind(p->listening, (struct sockaddr *)&a, sizeof(a)) || listen(p->listening, 4) || pipe(p->wake) ||
	    pthread_create(&p->thread, NULL, peer_thread, p))
		abort();
}

static inline void peer_say(struct peer *p, char what)
{
	if (write(p->wake[1], &what, 1) != 1)
		abort();
}

static inline void peer_stop(struct peer *p)
{
	peer_say(p, 'q');
	pthread_join(p->thread, NULL);
	close(p->listening);
	close(p->wake[0]);
	close(p->wake[1]);
	unlink(p->path);
}

#endif
