/*
 * NBD client: an export of an NBD server as a block node, through libnbd's asynchronous interface on the machine's loop.
 *
 * One connection carries all requests, up to SLOTS commands at a time; what does not fit waits in a queue, so that memory is bounded whatever
 * the guest asks for. Requests are cut at the server's maximum block size and at NBD_PIECE_MAX. A piece that is contiguous in memory goes
 * straight from or to it, any other through a bounce buffer of its slot (libnbd takes one buffer a command).
 *
 * The server is not trusted: libnbd checks the protocol, sizes are checked here, and a command that stays unanswered for `timeout=` seconds
 * ends the connection. When the connection ends, everything that waits or comes fails with -EIO, and a thread of this node's own connects
 * again (name lookup and handshake may block), after 1, 2, 4, ... 30 seconds. A server that comes back with another size is refused. Writes
 * that were done, but not flushed, may be lost with the server: the first flush after such a loss fails, so that nobody takes them for safe.
 *
 * TLS: a certificate is checked against ca-cert.pem of tls-certs=DIR and against the URI's host name; a Unix socket has no name, so there it is
 * not checked, and tls-psk= is the way to know the server.
 *
 * pread, which qcow2 calls on worker threads, has a connection of its own with its own mutex, made when it is first needed: such use needs a
 * server that takes two clients (qemu-nbd --shared=2).
 */
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/error.h"
#include "base/log.h"
#include "block/driver.h"
#include "block/nbd_internal.h"
#include "vm/loop.h"

#define SLOTS 64 /* with NBD_PIECE_MAX the bound on bounce memory */
#define RANGE_MAX (1ull << 30)	    /* of a trim or zero: it has no payload */
#define BACKOFF_MAX 30		    /* seconds */
#define LOSSES_LOGGED 10	     /* a server that comes and goes does not fill the terminal */
#define EVENTS_A_TURN 64	    /* replies read before others get the device lock */

/* How a request is going; for those that have been started. */
struct track {
	struct block_request *r; /* NULL: free */
	unsigned pieces;	 /* in flight */
	bool issued;		 /* all of it */
	int result;
};

/* A command in flight. */
struct slot {
	struct nbd_node *node;
	struct track *track; /* NULL: free */
	uint8_t *bounce;     /* of NBD_PIECE_MAX bytes, or NULL: not needed yet */
	bool copy;	     /* a read that went to the bounce buffer */
	uint64_t skip, len;  /* the part of the request, bytes */
	uint32_t lead;	     /* bytes in front of it that were read to begin with a block of the server's */
	uint64_t since;	     /* clock_ns() */
	int error;	     /* of the completed, errno */
	struct slot *next;   /* of the completed */
};

struct nbd_node {
	struct block_node *node;
	struct loop *loop;
	struct nbd_target target;
	struct nbd_export export;
	uint64_t timeout_ns;
	bool fua;	  /* cache=writethrough: each write is durable when it is done */
	bool unsafe;	  /* cache=unsafe: flushes are ignored */
	bool unmap;	  /* discard=unmap */

	struct nbd_handle *nbd; /* NULL: not connected */
	int fd;			/* of the connection, registered with the loop; -1: not. libnbd forgets its own when the server closes */
	uint32_t events;	/* that the loop watches for */
	struct slot slot[SLOTS];
	struct track track[SLOTS + 1]; /* one for each command and one for the request that is being started */
	unsigned in_flight;
	struct slot *completed;
	struct block_request *waiting, **waiting_tail;	 /* not started, or in part (the first) */
	struct track *head;				 /* of the first in the queue, if it was started */
	uint64_t head_done;				 /* bytes of it that were issued */
	struct block_request *finished, **finished_tail; /* node_private is the result */
	bool delivering;
	uint8_t *zeroes; /* NBD_PIECE_MAX of them, for servers without write-zeroes */
	struct vtimer timer;
	bool timer_armed;

	bool unflushed;	 /* writes were done since the last flush */
	bool lost_writes; /* some of them with a connection that is gone */

	unsigned losses;
	unsigned backoff; /* seconds */
	bool differs;	  /* it came back as another export, which was said */
	int ready_fd;	  /* eventfd: the thread is done */
	bool connecting;
	pthread_t thread;
	atomic_bool cancel;
	/* The thread's, until it has written ready_fd. */
	struct nbd_handle *fresh;
	struct nbd_export fresh_export;
	struct error fresh_error;

	struct nbd_reader reader; /* pread's */
};

/* --- requests --- */

static int result_of(const struct block_request *r, int error)
{
	switch (error) {
	case 0: return 0;
	case ENOSPC: return -ENOSPC;
	case EPERM: return -EROFS;
	case EINVAL: return -EINVAL;
	case ENOMEM: return -ENOMEM;
	case ENOTSUP: return r->op == BLOCK_DISCARD ? 0 : -EIO; /* advice only */
	default: return -EIO;
	}
}

static void finish(struct nbd_node *n, struct block_request *r, int result)
{
	if (result == 0 && (r->op == BLOCK_WRITE || r->op == BLOCK_WRITE_ZEROES) && !n->fua)
		n->unflushed = true;
	r->node_private = (void *)(intptr_t)result;
	r->next = NULL;
	*n->finished_tail = r;
	n->finished_tail = &r->next;
}

static void track_settle(struct nbd_node *n, struct track *t)
{
	if (!t->issued || t->pieces)
		return;
	struct block_request *r = t->r;
	t->r = NULL;
	finish(n, r, t->result);
}

static void dequeue(struct nbd_node *n)
{
	n->waiting = n->waiting->next;
	if (!n->waiting)
		n->waiting_tail = &n->waiting;
	n->head = NULL;
	n->head_done = 0;
}

/* libnbd calls this from inside its own functions and with its own lock: note it down only. */
static int command_done(void *opaque, int *error)
{
	struct slot *s = opaque;
	s->error = *error;
	s->next = s->node->completed;
	s->node->completed = s;
	return 1;
}

static void copy_iov(const struct block_request *r, uint64_t skip, uint8_t *bounce, uint64_t len, bool to_iov)
{
	for (unsigned i = 0; i < r->niov && len; i++) {
		uint64_t room = r->iov[i].iov_len;
		if (skip >= room) {
			skip -= room;
			continue;
		}
		uint64_t n = room - skip < len ? room - skip : len;
		uint8_t *p = (uint8_t *)r->iov[i].iov_base + skip;
		if (to_iov)
			memcpy(p, bounce, n);
		else
			memcpy(bounce, p, n);
		bounce += n;
		len -= n;
		skip = 0;
	}
}

/* The memory of [skip, skip+len) of the request if it is contiguous, else NULL. */
static uint8_t *contiguous(const struct block_request *r, uint64_t skip, uint64_t len)
{
	uint8_t *start = NULL;
	uint64_t have = 0;
	for (unsigned i = 0; i < r->niov && have < len; i++) {
		uint64_t room = r->iov[i].iov_len;
		if (skip >= room) {
			skip -= room;
			continue;
		}
		uint8_t *p = (uint8_t *)r->iov[i].iov_base + skip;
		if (start && p != start + have)
			return NULL;
		if (!start)
			start = p;
		have += room - skip;
		skip = 0;
	}
	return have >= len ? start : NULL;
}

static void reap(struct nbd_node *n)
{
	while (n->completed) {
		struct slot *s = n->completed;
		n->completed = s->next;
		struct track *t = s->track;
		if (s->error == 0 && s->copy)
			copy_iov(t->r, s->skip, s->bounce + s->lead, s->len, true);
		if (s->error && !t->result)
			t->result = result_of(t->r, s->error);
		s->track = NULL;
		n->in_flight--;
		t->pieces--;
		track_settle(n, t);
	}
}

static void arm_timer(struct nbd_node *n, uint64_t deadline)
{
	vtimer_arm(&n->timer, deadline);
	n->timer_armed = true;
}

static void unwatch(struct nbd_node *n)
{
	if (n->fd >= 0)
		loop_del_fd(n->loop, n->fd);
	n->fd = -1;
	n->events = 0;
}

/* The connection is over: everything fails, and the next try is planned. */
static void lost(struct nbd_node *n, const char *reason)
{
	if (!n->nbd)
		return;
	if (++n->losses <= LOSSES_LOGGED)
		log_warn("%s: the connection to %s is lost (%s); its requests fail until it is back%s", n->target.option, n->target.uri, reason,
			 n->losses == LOSSES_LOGGED ? " (the last time that this is reported)" : "");
	unwatch(n);
	nbd_close(n->nbd);
	n->nbd = NULL;
	n->lost_writes |= n->unflushed;
	reap(n);
	for (unsigned i = 0; i < SLOTS; i++) {
		struct slot *s = &n->slot[i];
		if (!s->track)
			continue;
		s->error = EIO;
		s->next = n->completed;
		n->completed = s;
	}
	reap(n);
	n->backoff = 1;
	arm_timer(n, clock_ns() + n->backoff * NS_PER_SEC);
}

static void watch(struct nbd_node *n);

/* Fail the queue: there is no connection. */
static void fail_waiting(struct nbd_node *n)
{
	while (n->waiting) {
		struct block_request *r = n->waiting;
		struct track *t = n->head;
		dequeue(n);
		if (!t) {
			finish(n, r, -EIO);
			continue;
		}
		t->result = -EIO;
		t->issued = true;
		track_settle(n, t);
	}
}

static struct slot *free_slot(struct nbd_node *n)
{
	for (unsigned i = 0; i < SLOTS; i++)
		if (!n->slot[i].track)
			return &n->slot[i];
	return NULL;
}

static struct track *free_track(struct nbd_node *n)
{
	for (unsigned i = 0; i < SLOTS + 1; i++)
		if (!n->track[i].r)
			return &n->track[i];
	return NULL;
}

/* Requests that need nothing of the server: their result, or 1. */
static int answer_here(struct nbd_node *n, const struct block_request *r)
{
	if (r->op == BLOCK_FLUSH) {
		if (n->unsafe)
			return 0;
		if (n->lost_writes) {
			n->lost_writes = false;
			log_warn("%s: writes that were not flushed when the connection to %s was lost may be gone; the flush fails", n->target.option,
				 n->target.uri);
			return -EIO;
		}
		return n->export.can_flush ? 1 : 0;
	}
	if (r->op == BLOCK_DISCARD && !n->node->info.discard_granularity)
		return 0;
	if (r->op != BLOCK_READ && n->node->info.read_only)
		return -EROFS;
	return r->len ? 1 : 0;
}

/* Bounce buffer of the slot, allocated when it is first needed. */
static uint8_t *bounce(struct slot *s)
{
	if (!s->bounce)
		s->bounce = malloc(NBD_PIECE_MAX);
	return s->bounce;
}

/* Send one command for [skip, skip+s->len) of r. 0 or an errno. */
static int send_piece(struct nbd_node *n, struct slot *s, struct block_request *r)
{
	nbd_completion_callback cb = { .callback = command_done, .user_data = s };
	uint64_t offset = r->offset + s->skip, span;
	uint32_t fua = n->fua ? LIBNBD_CMD_FLAG_FUA : 0;
	uint8_t *p;
	int64_t cookie = -1;
	switch (r->op) {
	case BLOCK_READ:
		/* An overlay reads sectors, whatever the server's blocks are. */
		span = (s->lead + s->len + n->export.minimum - 1) & ~(uint64_t)(n->export.minimum - 1);
		p = span == s->len ? contiguous(r, s->skip, s->len) : NULL;
		s->copy = !p;
		if (!p && !(p = bounce(s)))
			return ENOMEM;
		cookie = nbd_aio_pread(n->nbd, p, span, offset - s->lead, cb, 0);
		break;
	case BLOCK_WRITE:
		p = contiguous(r, s->skip, s->len);
		if (!p) {
			if (!(p = bounce(s)))
				return ENOMEM;
			copy_iov(r, s->skip, p, s->len, false);
		}
		cookie = nbd_aio_pwrite(n->nbd, p, s->len, offset, cb, fua);
		break;
	case BLOCK_WRITE_ZEROES:
		if (n->export.can_zero) {
			uint32_t keep = r->flags & BLOCK_MAY_UNMAP && n->unmap ? 0 : LIBNBD_CMD_FLAG_NO_HOLE;
			cookie = nbd_aio_zero(n->nbd, s->len, offset, cb, fua | keep);
			break;
		}
		if (!n->zeroes && !(n->zeroes = calloc(1, NBD_PIECE_MAX)))
			return ENOMEM;
		cookie = nbd_aio_pwrite(n->nbd, n->zeroes, s->len, offset, cb, fua);
		break;
	case BLOCK_DISCARD:
		cookie = nbd_aio_trim(n->nbd, s->len, offset, cb, 0);
		break;
	case BLOCK_FLUSH:
		n->unflushed = false; /* if it fails, the guest is told by that */
		cookie = nbd_aio_flush(n->nbd, cb, 0);
		break;
	}
	if (cookie >= 0)
		return 0;
	int code = nbd_get_errno();
	return code ? code : EIO;
}

/* Start one piece of the first request. False: no slot is free. */
static bool issue(struct nbd_node *n)
{
	struct block_request *r = n->waiting;
	if (!n->head) {
		int here = answer_here(n, r);
		if (here <= 0) {
			dequeue(n);
			finish(n, r, here);
			return true;
		}
	}
	struct slot *s = free_slot(n);
	if (!s)
		return false;
	if (!n->head) {
		n->head = free_track(n);
		if (!n->head)
			return false;
		*n->head = (struct track){ .r = r };
	}
	struct track *t = n->head;
	bool payload = r->op == BLOCK_READ || r->op == BLOCK_WRITE || (r->op == BLOCK_WRITE_ZEROES && !n->export.can_zero);
	uint64_t most = payload ? n->export.maximum : RANGE_MAX, left = r->op == BLOCK_FLUSH ? 0 : r->len - n->head_done;
	s->skip = n->head_done;
	s->lead = r->op == BLOCK_READ ? (uint32_t)(r->offset + s->skip) & (n->export.minimum - 1) : 0;
	most -= s->lead;
	s->len = left < most ? left : most;
	s->copy = false;
	s->error = 0;
	s->since = clock_ns();
	s->track = t;
	t->pieces++;
	n->in_flight++;
	n->head_done += s->len;
	if (s->len == left) {
		dequeue(n);
		t->issued = true;
	}
	int code = send_piece(n, s, r);
	if (code) {
		s->error = code;
		s->next = n->completed;
		n->completed = s;
	}
	return true;
}

static void pump(struct nbd_node *n)
{
	while (n->nbd && n->waiting && issue(n)) {
		if (nbd_aio_is_dead(n->nbd) || nbd_aio_is_closed(n->nbd))
			lost(n, "the server closed it");
		else
			reap(n);
	}
	if (!n->nbd)
		fail_waiting(n);
	else if (n->in_flight && !n->timer_armed)
		arm_timer(n, clock_ns() + n->timeout_ns);
}

/* Read and write as far as it goes without waiting. */
static void serve_socket(struct nbd_node *n)
{
	for (int i = 0; i < EVENTS_A_TURN && n->nbd; i++) {
		unsigned direction = nbd_aio_get_direction(n->nbd);
		struct pollfd p = { .fd = nbd_aio_get_fd(n->nbd) };
		if (direction & LIBNBD_AIO_DIRECTION_READ)
			p.events |= POLLIN;
		if (direction & LIBNBD_AIO_DIRECTION_WRITE)
			p.events |= POLLOUT;
		if (!p.events || poll(&p, 1, 0) <= 0)
			break;
		/* One a turn: the first may change what the other means. */
		int r = 0;
		if (direction & LIBNBD_AIO_DIRECTION_READ && p.revents & (POLLIN | POLLHUP | POLLERR))
			r = nbd_aio_notify_read(n->nbd);
		else if (p.revents & (POLLOUT | POLLHUP | POLLERR))
			r = nbd_aio_notify_write(n->nbd);
		if (r < 0 || nbd_aio_is_dead(n->nbd) || nbd_aio_is_closed(n->nbd)) {
			lost(n, r < 0 ? nbd_why() : "the server closed it");
			break;
		}
		if (n->completed)
			reap(n);
	}
	pump(n);
}

/* Call `done` of what is complete. They may submit and kick again. */
static void deliver(struct nbd_node *n)
{
	if (n->delivering)
		return;
	n->delivering = true;
	while (n->finished) {
		struct block_request *r = n->finished;
		n->finished = r->next;
		if (!n->finished)
			n->finished_tail = &n->finished;
		int result = (int)(intptr_t)r->node_private;
		r->done(r, result);
	}
	n->delivering = false;
}

static void on_socket(void *opaque, uint32_t revents)
{
	struct nbd_node *n = opaque;
	(void)revents;
	serve_socket(n);
	deliver(n);
	watch(n);
}

static void watch(struct nbd_node *n)
{
	if (!n->nbd)
		return;
	unsigned direction = nbd_aio_get_direction(n->nbd);
	uint32_t events = (direction & LIBNBD_AIO_DIRECTION_READ ? EPOLLIN : 0u) | (direction & LIBNBD_AIO_DIRECTION_WRITE ? EPOLLOUT : 0u);
	if (events == n->events)
		return;
	n->events = events;
	n->fd = nbd_aio_get_fd(n->nbd);
	if (loop_add_fd(n->loop, n->fd, events, on_socket, n) < 0)
		lost(n, "the event loop cannot watch it"); /* the timer delivers what that fails */
}

static void check_timeout(struct nbd_node *n)
{
	uint64_t now = clock_ns(), oldest = UINT64_MAX;
	for (unsigned i = 0; i < SLOTS; i++)
		if (n->slot[i].track && n->slot[i].since < oldest)
			oldest = n->slot[i].since;
	if (oldest == UINT64_MAX)
		return;
	if (now >= oldest + n->timeout_ns) {
		lost(n, "a request was not answered in time");
		fail_waiting(n);
	} else if (!n->timer_armed) {
		arm_timer(n, oldest + n->timeout_ns);
	}
}

/* --- connecting again --- */

static void *connect_thread(void *opaque)
{
	struct nbd_node *n = opaque;
	nbd_connect(&n->fresh, &n->fresh_export, &n->target, &n->cancel, &n->fresh_error);
	uint64_t one = 1;
	ssize_t w = write(n->ready_fd, &one, sizeof(one));
	(void)w;
	return NULL;
}

static void on_ready(void *opaque, uint32_t revents)
{
	struct nbd_node *n = opaque;
	uint64_t count;
	(void)revents;
	if (read(n->ready_fd, &count, sizeof(count)) != sizeof(count) || !n->connecting)
		return;
	pthread_join(n->thread, NULL);
	n->connecting = false;
	const struct nbd_export *x = &n->fresh_export;
	if (n->fresh && (x->size != n->export.size || x->minimum > n->node->info.logical_block || (x->read_only && !n->node->info.read_only) ||
			 (n->fua && !x->can_fua))) {
		/* A guest has been told otherwise. */
		log_warn_once(n->differs, "%s: %s is back with another size or other abilities; restart the machine to use it", n->target.option,
			      n->target.uri);
		nbd_close(n->fresh);
		n->fresh = NULL;
	}
	if (!n->fresh) {
		n->backoff = n->backoff * 2 < BACKOFF_MAX ? n->backoff * 2 : BACKOFF_MAX;
		arm_timer(n, clock_ns() + n->backoff * NS_PER_SEC);
		return;
	}
	n->nbd = n->fresh;
	n->fresh = NULL;
	n->export = *x;
	if (n->losses <= LOSSES_LOGGED)
		log_warn("%s: %s is connected again", n->target.option, n->target.uri);
	watch(n);
}

static void on_timer(void *opaque)
{
	struct nbd_node *n = opaque;
	n->timer_armed = false;
	if (n->nbd)
		check_timeout(n);
	else
		fail_waiting(n);
	deliver(n);
	if (n->nbd || n->connecting || n->timer_armed)
		return;
	n->connecting = true;
	n->fresh = NULL;
	if (pthread_create(&n->thread, NULL, connect_thread, n)) {
		n->connecting = false;
		arm_timer(n, clock_ns() + BACKOFF_MAX * NS_PER_SEC);
	}
}

/* --- the driver --- */

static void nbd_node_free(struct nbd_node *n)
{
	if (n->connecting) {
		atomic_store(&n->cancel, true);
		pthread_join(n->thread, NULL);
		nbd_close(n->fresh);
	}
	if (n->timer.loop)
		vtimer_cancel(&n->timer);
	if (n->ready_fd >= 0) {
		loop_del_fd(n->loop, n->ready_fd);
		close(n->ready_fd);
	}
	unwatch(n);
	nbd_hang_up(n->nbd);
	nbd_reader_fini(&n->reader);
	for (unsigned i = 0; i < SLOTS; i++)
		free(n->slot[i].bounce);
	free(n->zeroes);
	nbd_target_free(&n->target);
	free(n);
}

static void describe_export(struct nbd_node *n, const struct block_open *o)
{
	const struct nbd_export *x = &n->export;
	struct block_info *info = &n->node->info;
	*info = (struct block_info){
		.size = x->size,
		.logical_block = x->minimum > 512 ? 4096 : 512,
		.physical_block = x->preferred > 4096 ? x->preferred : 4096,
		.whole_blocks = x->minimum > 512,
		.read_only = x->read_only || o->read_only,
		.write_cache = x->can_flush && !n->fua,
		.format = "nbd",
	};
	if (o->discard && x->can_trim && !info->read_only)
		info->discard_granularity = x->preferred > info->logical_block ? x->preferred : info->logical_block;
}

static int nbd_node_open(struct block_node *node, const struct block_open *o, struct error *err)
{
	struct nbd_node *n = calloc(1, sizeof(*n));
	if (!n)
		return error_set(err, ENOMEM, "out of memory for %s", o->name);
	clock_init(); /* images are opened before the machine that would do it */
	n->node = node;
	n->loop = o->loop;
	n->fd = n->ready_fd = -1;
	n->waiting_tail = &n->waiting;
	n->finished_tail = &n->finished;
	n->unmap = o->discard;
	n->unsafe = o->cache == CACHE_UNSAFE;
	for (unsigned i = 0; i < SLOTS; i++)
		n->slot[i].node = n;
	int r = nbd_target_parse(&n->target, o, &n->timeout_ns, err);
	nbd_reader_init(&n->reader, &n->target, n->timeout_ns, &n->cancel);
	if (r == 0)
		r = nbd_connect(&n->nbd, &n->export, &n->target, NULL, err);
	if (r == 0 && (o->cache == CACHE_WRITETHROUGH || o->cache == CACHE_DIRECTSYNC) && !o->read_only) {
		n->fua = true;
		if (!n->export.can_fua && n->export.can_flush && !n->export.read_only)
			r = error_set(err, ENOTSUP, "%s: the server %s cannot write through its cache; use cache=writeback", o->option, o->name);
		n->fua = n->export.can_fua;
	}
	if (r == 0) {
		describe_export(n, o);
		n->ready_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
		if (n->ready_fd < 0)
			r = error_set(err, errno, "%s: cannot make an eventfd: %s", o->option, strerror(errno));
	}
	if (r == 0) {
		vtimer_init(&n->timer, o->loop, on_timer, n);
		r = loop_add_fd(o->loop, n->ready_fd, EPOLLIN, on_ready, n);
		if (r < 0)
			error_set(err, -r, "%s: the event loop cannot watch %s: %s", o->option, o->name, strerror(-r));
	}
	if (r < 0) {
		nbd_node_free(n);
		return r;
	}
	node->priv = n;
	watch(n);
	return 0;
}

static void nbd_node_close(struct block_node *node)
{
	nbd_node_free(node->priv);
	node->priv = NULL;
}

static void nbd_node_submit(struct block_node *node, struct block_request *r)
{
	struct nbd_node *n = node->priv;
	r->next = NULL;
	*n->waiting_tail = r;
	n->waiting_tail = &r->next;
}

static void nbd_node_kick(struct block_node *node)
{
	struct nbd_node *n = node->priv;
	pump(n);
	if (n->nbd) {
		serve_socket(n);
		check_timeout(n);
	}
	deliver(n);
	watch(n);
}

static void nbd_node_wait(struct block_node *node)
{
	struct nbd_node *n = node->priv;
	unsigned direction = n->nbd && n->in_flight ? nbd_aio_get_direction(n->nbd) : 0;
	if (direction) {
		struct pollfd p = { .fd = n->fd };
		p.events = (short)((direction & LIBNBD_AIO_DIRECTION_READ ? POLLIN : 0) | (direction & LIBNBD_AIO_DIRECTION_WRITE ? POLLOUT : 0));
		poll(&p, 1, 100);
	}
	nbd_node_kick(node);
}

static int nbd_node_pread(struct block_node *node, void *buf, uint64_t len, uint64_t offset)
{
	return nbd_reader_pread(&((struct nbd_node *)node->priv)->reader, buf, len, offset);
}

const struct block_driver block_nbd = {
	.name = "nbd",
	.open = nbd_node_open,
	.close = nbd_node_close,
	.submit = nbd_node_submit,
	.kick = nbd_node_kick,
	.wait = nbd_node_wait,
	.pread = nbd_node_pread,
};
