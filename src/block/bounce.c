#include "block/bounce.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "block/aio.h"
#include "block/driver.h"

/* Where a walk along iovecs is. */
struct place {
	const struct iovec *iov;
	unsigned left;
	size_t skip;
};

static void copy(struct place *p, uint8_t *buf, size_t len, bool to_iov)
{
	while (len && p->left) {
		size_t n = p->iov->iov_len - p->skip;
		n = n < len ? n : len;
		uint8_t *at = (uint8_t *)p->iov->iov_base + p->skip;
		memcpy(to_iov ? at : buf, to_iov ? buf : at, n);
		buf += n;
		len -= n;
		p->skip += n;
		if (p->skip == p->iov->iov_len) {
			p->iov++;
			p->left--;
			p->skip = 0;
		}
	}
}

static int read_all(int fd, uint8_t *buf, size_t len, uint64_t offset)
{
	struct iovec v = { buf, len };
	struct aio_job j = { .op = AIO_READ, .fd = fd, .offset = offset, .len = len, .iov = &v, .niov = 1 };
	return aio_run(&j);
}

static int write_all(const struct bounce *b, uint8_t *buf, size_t len, uint64_t offset)
{
	struct iovec v = { buf, len };
	struct aio_job j = { .op = AIO_WRITE, .fd = b->fd, .offset = offset, .len = len, .iov = &v, .niov = 1, .flags = b->datasync ? AIO_DATASYNC : 0 };
	return aio_run(&j);
}

/* A buffer for a request, and how much of the request each round takes: so much that with the rest of its first and last block it fits. */
static uint8_t *buffer(const struct bounce *b, uint64_t len, size_t *round)
{
	size_t room = len + 2 * b->align < BOUNCE_SIZE ? len + 2 * b->align : BOUNCE_SIZE;
	room = (room + 4095) & ~4095ull;
	*round = room - 2 * b->align;
	return aligned_alloc(4096, room);
}

int bounce_read(const struct bounce *b, const struct iovec *iov, unsigned niov, uint64_t offset, uint64_t len)
{
	struct place place = { iov, niov, 0 };
	size_t round;
	uint8_t *buf = buffer(b, len, &round);
	if (!buf)
		return -ENOMEM;
	int r = 0;
	while (len && !r) {
		size_t n = len < round ? len : round;
		uint64_t start = offset & ~(b->align - 1), end = (offset + n + b->align - 1) & ~(b->align - 1);
		r = read_all(b->fd, buf, end - start, start);
		if (!r)
			copy(&place, buf + (offset - start), n, true);
		offset += n;
		len -= n;
	}
	free(buf);
	return r;
}

int bounce_write(const struct bounce *b, const struct iovec *iov, unsigned niov, uint64_t offset, uint64_t len)
{
	struct place place = { iov, niov, 0 };
	size_t round;
	uint8_t *buf = buffer(b, len, &round);
	if (!buf)
		return -ENOMEM;
	int r = 0;
	while (len && !r) {
		size_t n = len < round ? len : round;
		uint64_t start = offset & ~(b->align - 1), end = (offset + n + b->align - 1) & ~(b->align - 1);
		if (start != offset || end != offset + n)
			r = read_all(b->fd, buf, end - start, start);
		if (r)
			break;
		if (iov)
			copy(&place, buf + (offset - start), n, false);
		else
			memset(buf + (offset - start), 0, n);
		if (b->guard && !start && block_probe(buf, end) != &block_file)
			r = -EPERM;
		if (!r)
			r = write_all(b, buf, end - start, start);
		/* The rest of the last block is not the file's. */
		if (!r && end > b->size && ftruncate(b->fd, (off_t)b->size) < 0)
			r = -errno;
		offset += n;
		len -= n;
	}
	free(buf);
	return r;
}
