#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/error.h"
#include "base/log.h"
#include "block/nbd_internal.h"

/* One aligned read. */
static int pread_piece(struct nbd_reader *d, void *buf, uint64_t len, uint64_t offset)
{
	struct nbd_handle *h = d->nbd;
	int64_t cookie = nbd_aio_pread(h, buf, len, offset, NBD_NULL_COMPLETION, 0);
	if (cookie < 0)
		return -(nbd_get_errno() ? nbd_get_errno() : EIO);
	uint64_t end = clock_ns() + d->timeout_ns;
	for (;;) {
		int done = nbd_aio_command_completed(h, (uint64_t)cookie);
		if (done > 0)
			return 0;
		if (done < 0)
			return -EIO;
		if (clock_ns() >= end || nbd_poll(h, 100) < 0)
			break;
	}
	/* The buffer is the caller's from now on: libnbd must forget the command. */
	nbd_close(h);
	d->nbd = NULL;
	return -EIO;
}

static int pread_locked(struct nbd_reader *d, uint8_t *buf, uint64_t len, uint64_t offset)
{
	if (d->nbd && nbd_aio_is_ready(d->nbd) <= 0 && nbd_aio_is_processing(d->nbd) <= 0) {
		nbd_close(d->nbd);
		d->nbd = NULL;
	}
	if (!d->nbd) {
		struct error err;
		int r = nbd_connect(&d->nbd, &d->export, d->target, d->cancel, &err);
		if (r < 0) {
			log_warn_once(d->failed, "%s", err.text);
			return -EIO;
		}
	}
	const struct nbd_export *x = &d->export;
	if (len > x->size || offset > x->size - len)
		return -EIO;
	uint64_t mask = x->minimum - 1;
	while (len) {
		uint64_t start = offset & ~mask, skip = offset - start;
		uint64_t some = len < x->maximum - skip ? len : x->maximum - skip, span = (skip + some + mask) & ~mask;
		bool direct = !skip && span == some;
		if (!direct && !d->buf && !(d->buf = malloc(NBD_PIECE_MAX)))
			return -ENOMEM;
		int r = pread_piece(d, direct ? buf : d->buf, span, start);
		if (r < 0)
			return r;
		if (!direct)
			memcpy(buf, d->buf + skip, some);
		buf += some;
		offset += some;
		len -= some;
	}
	return 0;
}

void nbd_reader_init(struct nbd_reader *d, const struct nbd_target *target, uint64_t timeout_ns, const atomic_bool *cancel)
{
	*d = (struct nbd_reader){ .target = target, .timeout_ns = timeout_ns, .cancel = cancel };
	pthread_mutex_init(&d->lock, NULL);
}

void nbd_reader_fini(struct nbd_reader *d)
{
	nbd_hang_up(d->nbd);
	free(d->buf);
	pthread_mutex_destroy(&d->lock);
}

int nbd_reader_pread(struct nbd_reader *d, void *buf, uint64_t len, uint64_t offset)
{
	pthread_mutex_lock(&d->lock);
	int r = pread_locked(d, buf, len, offset);
	pthread_mutex_unlock(&d->lock);
	return r;
}
