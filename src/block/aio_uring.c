/*
 * The io_uring engine. Any thread that holds the device lock submits and reaps: so no flag that ties a ring to one thread, and none that
 * leaves completions to the submitter's next system call (it may be a vCPU that makes none).
 */
#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <stdlib.h>
#include <unistd.h>

#include "block/aio_internal.h"

#define ENTRIES 256
#define MAX_IN_FLIGHT (2 * ENTRIES) /* the completion ring's size: it cannot overflow */

struct aio_uring {
	struct io_uring ring;
	int event_fd;
	unsigned in_flight;
	/* A vector that continues a short transfer must last until the kernel has read it: with FEAT_SUBMIT_STABLE that is io_uring_submit. */
	struct iovec one[ENTRIES];
	unsigned nqueued; /* since the last io_uring_submit */
};

int aio_uring_create(struct aio_uring **out, int event_fd)
{
	struct aio_uring *u = calloc(1, sizeof(*u));
	if (!u)
		return -ENOMEM;
	struct io_uring_params params = { .flags = IORING_SETUP_CLAMP };
	int r = io_uring_queue_init_params(ENTRIES, &u->ring, &params);
	if (r < 0) {
		free(u);
		return r;
	}
	struct io_uring_probe *probe = io_uring_get_probe_ring(&u->ring);
	const unsigned features = IORING_FEAT_NODROP | IORING_FEAT_SUBMIT_STABLE;
	bool usable = probe && (params.features & features) == features && io_uring_opcode_supported(probe, IORING_OP_FALLOCATE) &&
		      io_uring_opcode_supported(probe, IORING_OP_READV);
	io_uring_free_probe(probe);
	r = usable ? io_uring_register_eventfd(&u->ring, event_fd) : -ENOSYS;
	if (r < 0) {
		io_uring_queue_exit(&u->ring);
		free(u);
		return r;
	}
	u->event_fd = event_fd;
	*out = u;
	return 0;
}

void aio_uring_destroy(struct aio_uring *u)
{
	if (!u)
		return;
	io_uring_queue_exit(&u->ring);
	free(u);
}

static void prepare(struct aio_uring *u, struct io_uring_sqe *sqe, struct aio_job *j)
{
	uint64_t at = j->offset + j->progress;
	switch (j->op) {
	case AIO_READ:
	case AIO_WRITE: {
		const struct iovec *iov = NULL;
		unsigned n = aio_piece(j, &u->one[u->nqueued], &iov);
		if (n == 1) {
			/* One buffer needs no vector: the kernel's shorter path. */
			unsigned len = iov->iov_len < (1u << 30) ? (unsigned)iov->iov_len : 1u << 30;
			if (j->op == AIO_READ)
				io_uring_prep_read(sqe, j->fd, iov->iov_base, len, at);
			else
				io_uring_prep_write(sqe, j->fd, iov->iov_base, len, at);
		} else if (j->op == AIO_READ) {
			io_uring_prep_readv(sqe, j->fd, iov, n, at);
		} else {
			io_uring_prep_writev(sqe, j->fd, iov, n, at);
		}
		if (j->op == AIO_WRITE && j->flags & AIO_DATASYNC)
			sqe->rw_flags = RWF_DSYNC;
		break;
	}
	case AIO_FSYNC:
		io_uring_prep_fsync(sqe, j->fd, IORING_FSYNC_DATASYNC);
		break;
	case AIO_DISCARD:
		io_uring_prep_fallocate(sqe, j->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)at, (off_t)j->len);
		break;
	case AIO_ZERO:
		io_uring_prep_fallocate(sqe, j->fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, (off_t)at, (off_t)j->len);
		break;
	}
	if (j->tries)
		sqe->flags |= IOSQE_ASYNC; /* it could not be done at once before */
	io_uring_sqe_set_data(sqe, j);
}

/* Errors here are passing ones (EAGAIN, EBUSY: no memory for requests): what was not taken stays in the ring, and the loop tries again. */
static void submit(struct aio_uring *u)
{
	int r;
	do
		r = io_uring_submit(&u->ring);
	while (r == -EINTR);
	if (!io_uring_sq_ready(&u->ring)) {
		u->nqueued = 0;
	} else if (r < 0) {
		uint64_t one = 1;
		ssize_t n = write(u->event_fd, &one, sizeof(one));
		(void)n;
	}
}

bool aio_uring_room(const struct aio_uring *u)
{
	return u->in_flight < MAX_IN_FLIGHT && !u->nqueued;
}

void aio_uring_start(struct aio_uring *u, struct aio_jobs *l)
{
	while (l->first && u->in_flight < MAX_IN_FLIGHT) {
		struct io_uring_sqe *sqe = u->nqueued < ENTRIES ? io_uring_get_sqe(&u->ring) : NULL;
		if (!sqe) {
			submit(u);
			if (u->nqueued)
				return;
			continue;
		}
		prepare(u, sqe, aio_jobs_take(l));
		u->nqueued++;
		u->in_flight++;
	}
	if (u->nqueued)
		submit(u);
}

struct aio_job *aio_uring_finished(struct aio_uring *u, struct aio_jobs *l)
{
	struct io_uring_cqe *cqe;
	while (!io_uring_peek_cqe(&u->ring, &cqe)) {
		struct aio_job *j = io_uring_cqe_get_data(cqe);
		int64_t result = cqe->res;
		io_uring_cqe_seen(&u->ring, cqe);
		u->in_flight--;
		j->result = aio_advance(j, result);
		if (j->result != AIO_AGAIN)
			return j;
		aio_jobs_add(l, j);
	}
	return NULL;
}

void aio_uring_signal(struct aio_uring *u, bool on)
{
	io_uring_cq_eventfd_toggle(&u->ring, on);
	/* Either the kernel sees the flag and signals, or aio_uring_ready sees the completion. */
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
}

bool aio_uring_ready(struct aio_uring *u)
{
	return io_uring_cq_ready(&u->ring) > 0;
}
